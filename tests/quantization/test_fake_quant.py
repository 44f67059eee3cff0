"""FakeQuant against NumPy, ONNX Runtime and a plain autograd form of LSQ."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from edgekd.quantization.fake_quant import (
    BACKWARD,
    FORWARD,
    MIN_SCALE,
    NO_CLIP,
    SHRINK,
    FakeQuant,
    _gradient_scale,
    _strided,
)

# (dtype, symmetric, bits) -> (lowest, highest integer) as the schemes of the targets want them
RANGES = {
    (torch.uint8, False, 8): (0, 255),
    (torch.int8, False, 8): (-128, 127),
    (torch.int8, True, 8): (-127, 127),
    (torch.int8, True, 7): (-63, 63),
}
Kind = tuple[torch.dtype, bool, int]
kinds = pytest.mark.parametrize("kind", RANGES, ids=lambda k: f"{k[0]}-sym{k[1]}-{k[2]}bit")


def quantizer(
    kind: Kind,
    scale: float | NDArray[np.float32],
    zero: int = 0,
    *,
    ch_axis: int = 0,
    max_value: float | None = None,
) -> FakeQuant:
    dtype, symmetric, bits = kind
    channels = len(scale) if isinstance(scale, np.ndarray) else None
    made = FakeQuant(
        dtype=dtype, symmetric=symmetric, bits=bits, channels=channels, ch_axis=ch_axis,
        max_value=max_value,
    )  # fmt: skip
    with torch.no_grad():
        made.scale.copy_(torch.as_tensor(scale))
        made.zero_point.fill_(zero)
    return made


def values(kind: Kind, scale: NDArray[np.float32], zero: int, shape: tuple[int, ...]) -> Tensor:
    """Random values around every integer of the range and beyond it, none near a tie.

    The last integer of each side is met only from inside: just outside of it, the rounded value
    is in the range and the value is not, and LSQ's gradient there is a matter of convention.
    """
    low, high = RANGES[kind]
    rng = np.random.default_rng(0)
    steps = rng.integers(low - 20, high + 21, shape)
    offset = rng.uniform(-0.45, 0.45, shape)
    offset[steps == high] = -np.abs(offset[steps == high])
    offset[steps == low] = np.abs(offset[steps == low])
    x = (steps + offset - zero) * scale.astype(np.float64)
    return torch.from_numpy(x.astype(np.float32))


def in_numpy(
    x: NDArray[np.float32], scale: NDArray[np.float32], zero: int, kind: Kind
) -> NDArray[np.float32]:
    low, high = RANGES[kind]
    q = np.clip(np.rint(x.astype(np.float64) / scale) + zero, low, high)
    return (q - zero).astype(np.float32) * scale


def in_onnxruntime(
    x: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.integer], axis: int
) -> NDArray[np.float32]:
    qdq = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
    ]
    ends = (helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in "xy")
    graph = helper.make_graph(qdq, "qdq", *([end] for end in ends))
    graph.initializer.extend(
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    assert isinstance(y, np.ndarray)
    return y


# ---- forward -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("zero", [0, 37])
def test_forward_is_numpys_quantize_dequantize(kind: Kind, zero: int):
    zero = 0 if kind[1] else zero
    scale = np.float32(0.037)
    x = values(kind, scale, zero, (4, 3, 9, 5))
    y = quantizer(kind, float(scale), zero)(x)
    np.testing.assert_array_equal(y.detach().numpy(), in_numpy(x.numpy(), scale, zero, kind))
    assert len(np.unique(y.detach().numpy())) > 50  # the integers of the range are used


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_forward_per_channel_is_numpys(bits: int, axis: int):
    kind = (torch.int8, True, bits)
    scale = np.geomspace(1e-3, 3, 6, dtype=np.float32)
    shape = (6, 4, 3, 3) if axis == 0 else (4, 6, 3, 3)
    wide = scale.reshape((-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1))
    x = values(kind, wide, 0, shape)
    y = quantizer(kind, scale, ch_axis=axis)(x)
    np.testing.assert_array_equal(y.detach().numpy(), in_numpy(x.numpy(), wide, 0, kind))


@kinds
def test_forward_is_onnx_runtimes_quantize_dequantize(kind: Kind):
    dtype, symmetric, _ = kind
    zero = 0 if symmetric else 21
    scale = np.float32(0.0123)
    x = values(kind, scale, zero, (2, 3, 8, 8))
    if symmetric:  # ONNX always clips at the type's range; inside ours they must agree
        bound = RANGES[kind][1] * float(scale)
        x = x.clamp(-bound, bound)
    y = quantizer(kind, float(scale), zero)(x)
    integer = np.uint8 if dtype is torch.uint8 else np.int8
    theirs = in_onnxruntime(x.numpy(), np.asarray(scale), np.asarray(zero, integer), 0)
    np.testing.assert_array_equal(y.detach().numpy(), theirs)


def test_forward_per_channel_is_onnx_runtimes():
    kind = (torch.int8, True, 8)
    scale = np.geomspace(0.01, 1, 5, dtype=np.float32)
    wide = scale.reshape(-1, 1, 1, 1)
    x = values(kind, wide, 0, (5, 4, 3, 3))
    x = torch.minimum(torch.maximum(x, torch.tensor(-127 * wide)), torch.tensor(127 * wide))
    y = quantizer(kind, scale)(x)
    theirs = in_onnxruntime(x.numpy(), scale, np.zeros(5, np.int8), 0)
    np.testing.assert_array_equal(y.detach().numpy(), theirs)


def test_ties_go_to_the_even_integer_as_in_onnx_runtime():
    kind = (torch.int8, False, 8)
    x = torch.arange(-10, 11, dtype=torch.float32) / 4  # scale 0.5: every other value is a tie
    y = quantizer(kind, 0.5)(x).detach().numpy()
    np.testing.assert_array_equal(y, in_numpy(x.numpy(), np.float32(0.5), 0, kind))
    theirs = in_onnxruntime(x.numpy(), np.asarray(np.float32(0.5)), np.asarray(0, np.int8), 0)
    np.testing.assert_array_equal(y, theirs)


# ---- gradients -----------------------------------------------------------------------------------


def lsq(x: Tensor, scale: Tensor, zero: int, low: int, high: int, count: int) -> Tensor:
    """arXiv:1902.08153: eq. 1 and 2 with a straight-through round, its appendix' gradscale."""
    gradient_scale = 1 / (count * high) ** 0.5
    scale = scale * gradient_scale + (scale - scale * gradient_scale).detach()
    v = (x / scale + zero).clamp(low, high)
    return (v + (v.round() - v).detach() - zero) * scale


@kinds
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_per_tensor_are_lsqs(kind: Kind, layout: torch.memory_format):
    zero = 0 if kind[1] else 30
    scale = np.float32(0.021)
    x = values(kind, scale, zero, (4, 6, 8, 10)).to(memory_format=layout)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    dy = dy.to(memory_format=layout)
    made = quantizer(kind, float(scale), zero)
    x.requires_grad_()
    y = made(x)
    y.backward(dy)

    plain_x = x.detach().clone().requires_grad_()
    plain_scale = torch.tensor(float(scale), requires_grad=True)
    features = 6 * 8 * 10  # of one sample: LSQ §2.2 counts features, not the batch
    plain = lsq(plain_x, plain_scale, zero, *RANGES[kind], features)
    plain.backward(dy)

    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(x.grad, plain_x.grad)
    assert 0 < (x.grad == 0).float().mean() < 0.9  # some values are clipped, others not
    torch.testing.assert_close(made.scale.grad, plain_scale.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [7, 8])
def test_gradients_per_channel_are_lsqs(bits: int):
    kind = (torch.int8, True, bits)
    scale = np.geomspace(0.01, 1, 6, dtype=np.float32)
    w = values(kind, scale.reshape(-1, 1, 1, 1), 0, (6, 8, 3, 3))
    dy = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    made = quantizer(kind, scale)
    w.requires_grad_()
    made(w).backward(dy)
    assert made.scale.grad is not None

    for channel in range(6):
        plain_w = w.detach()[channel].clone().requires_grad_()
        plain_scale = torch.tensor(float(scale[channel]), requires_grad=True)
        weights = 6 * 8 * 3 * 3  # of the layer: LSQ §2.2
        lsq(plain_w, plain_scale, 0, *RANGES[kind], weights).backward(dy[channel])
        torch.testing.assert_close(w.grad[channel], plain_w.grad)
        torch.testing.assert_close(made.scale.grad[channel], plain_scale.grad, rtol=1e-3, atol=1e-3)


def test_a_frozen_scale_gets_no_gradient_and_x_still_does():
    made = quantizer((torch.int8, True, 8), 0.1)
    made.scale.requires_grad_(False)
    x = torch.tensor([[-100.0, 0.04, 3.0]], requires_grad=True)
    made(x).sum().backward()
    assert made.scale.grad is None
    np.testing.assert_array_equal(x.grad, [[0, 1, 1]])


# ---- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_max_value_bounds_the_range_at_calibration_and_in_training(dtype: torch.dtype):
    made = FakeQuant(dtype=dtype, symmetric=False, max_value=6.0)
    made.mode = "range"
    made(torch.tensor([[0.0, 9.5]]))
    assert made.start()

    def largest() -> np.float32:
        steps = np.float32(made.high - int(made.zero_point))
        return steps * made.scale.detach().numpy()

    assert 5.999 < largest() <= 6
    with torch.no_grad():
        made.scale.mul_(3)  # an optimizer's step too far
    y = made(torch.tensor([[100.0]], requires_grad=True))
    assert 5.999 < largest() <= 6
    assert y.item() == largest()


def test_a_scale_stays_positive_in_training():
    made = quantizer((torch.uint8, False, 8), -0.5)
    y = made(torch.ones(1, 3, requires_grad=True))
    assert made.scale.item() == pytest.approx(MIN_SCALE)
    assert torch.isfinite(y).all()


# ---- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "zero"), [(-1e-6, 0), (-5e-6, 42), (-1.0, 128)])
def test_an_end_that_openvino_takes_for_zero_is_zero(low: float, zero: int):
    made = FakeQuant(dtype=torch.uint8, symmetric=False)
    calibrated(made, [torch.tensor([low, -low])], "minmax")
    assert made.scale.item() >= MIN_SCALE
    assert abs(int(made.zero_point) - zero) <= 1


def calibrated(made: FakeQuant, batches: list[Tensor], observer: str) -> FakeQuant:
    made.mode = "range"
    for x in batches:
        assert made(x) is x  # nothing is quantized while it is observed
    if observer == "mse":
        made.mode = "error"
        for x in batches:
            assert made(x) is x
    assert made.start()
    return made


def random_batches(shift: float = 0.3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(16, 4, 16, 16, generator=generator) + shift for _ in range(3)]
    made[1][3, 2, 5, 5] = shift + 8  # outliers worth clipping
    made[2][7, 1, 0, 2] = shift - 7
    return made


def minmax_in_numpy(
    low: NDArray[np.float64], high: NDArray[np.float64], kind: Kind
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Jacob et al. 2018, arXiv:1712.05877 eq. 3 to 5: real 0 is one of the integers."""
    q_low, q_high = RANGES[kind]
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if kind[1]:
        return np.maximum(-low, high) / q_high, np.zeros_like(low)
    scale = (high - low) / (q_high - q_low)
    return scale, np.clip(q_low - np.rint(low / scale), q_low, q_high)


@kinds
@pytest.mark.parametrize("shift", [-40.0, 0.3, 40.0])
def test_minmax_takes_the_whole_range(kind: Kind, shift: float):
    batches = random_batches(shift)
    everything = torch.cat(batches).double().numpy()
    made = calibrated(quantizer(kind, 1.0), batches, "minmax")
    scale, zero = minmax_in_numpy(everything.min(), everything.max(), kind)
    assert made.scale.item() == pytest.approx(scale, rel=1e-6)
    assert made.zero_point.item() == zero


def test_a_sample_of_a_large_tensor_meets_every_column():
    x = torch.arange(32.0).expand(64, 8, 32, 32)  # 8 times as many elements as are looked at
    assert set(_strided(x.reshape(1, -1))[0].tolist()) == set(range(32))


def test_minmax_per_channel_takes_each_channels_range():
    kind = (torch.int8, True, 7)
    batches = random_batches()
    rows = torch.cat(batches).double().numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    made = calibrated(quantizer(kind, np.ones(4, np.float32), ch_axis=1), batches, "minmax")
    np.testing.assert_allclose(made.scale.detach(), np.abs(rows).max(1) / 63, rtol=1e-6)


@kinds
def test_mse_takes_the_share_of_the_range_with_the_least_error(kind: Kind):
    batches = random_batches()
    x = torch.cat(batches).double().numpy().ravel()
    low, high = RANGES[kind]
    candidates = []
    for share in np.exp(np.linspace(-1.12, 0, 56)):
        scale, zero = minmax_in_numpy(x.min() * share, x.max() * share, kind)
        q = np.clip(np.rint(x / scale) + zero, low, high)
        candidates.append(((((q - zero) * scale - x) ** 2).sum(), scale))
    errors = np.array([error for error, _ in candidates])
    assert 0 < errors.argmin() < 55
    made = calibrated(quantizer(kind, 1.0), batches, "mse")
    nearest = int(np.abs([scale - made.scale.item() for _, scale in candidates]).argmin())
    assert made.scale.item() == pytest.approx(candidates[nearest][1], rel=1e-5)
    assert errors[nearest] <= errors.min() * (1 + 1e-4)


def test_no_integer_of_one_candidate_lies_between_two_of_another():
    shares = SHRINK.double().numpy()
    for share in shares:
        steps = np.arange(1, 256)[:, None] * (shares[shares != share] / share)
        ties = np.abs(steps - np.floor(steps) - 0.5)
        assert ties[steps < 256].min() > 1e-4  # float32 has an error of 1e-5 at 128


def test_mse_per_channel_chooses_for_each_channel_alone():
    kind = (torch.int8, True, 8)
    tails = torch.tensor([1.0, 3.0, 5.0])  # from a normal channel to one with few large values
    x = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    x = x.sign() * x.abs() ** tails[:, None]
    made = calibrated(quantizer(kind, np.ones(3, np.float32)), [x], "mse")
    for row, scale in zip(x.double().numpy(), made.scale.tolist(), strict=True):
        whole = np.abs(row).max() / 127
        errors = {
            s: (((np.clip(np.rint(row / s), -127, 127)) * s - row) ** 2).sum()
            for s in whole * np.exp(np.linspace(-1.12, 0, 56))
        }
        assert ((np.clip(np.rint(row / scale), -127, 127) * scale - row) ** 2).sum() == (
            pytest.approx(min(errors.values()), rel=1e-3)
        )
    shares = made.scale.detach().numpy() / (x.abs().amax(1).numpy() / 127)
    assert len(set(np.round(shares, 3))) > 1


def test_a_tensor_of_zeros_gets_a_scale_that_is_not_zero():
    made = calibrated(quantizer((torch.uint8, False, 8), 1.0), [torch.zeros(2, 3)], "mse")
    assert made.scale.item() >= MIN_SCALE * 0.999
    assert torch.equal(made(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_without_an_observation_nothing_starts():
    made = quantizer((torch.uint8, False, 8), 0.25)
    made.mode = "range"
    assert not made.start()
    assert made.scale.item() == 0.25


# ---- S8 -> U8 ------------------------------------------------------------------------------------


def test_to_unsigned_changes_nothing_but_the_integers():
    kind = (torch.int8, False, 8)
    scale, zero = np.float32(0.037), -11
    made = quantizer(kind, float(scale), zero)
    x = values(kind, scale, zero, (4, 3, 9, 5))
    before = made(x).detach()
    made.to_unsigned()
    assert torch.equal(made(x), before)
    assert (made.dtype, made.zero_point.item()) == (torch.uint8, zero + 128)
    assert (made.quant_min, made.quant_max, made.low, made.high) == (0, 255, 0, 255)
    assert made.scale.item() == pytest.approx(float(scale))
    theirs = in_onnxruntime(x.numpy(), np.asarray(scale), np.asarray(zero + 128, np.uint8), 0)
    np.testing.assert_array_equal(before, theirs)


def test_a_fixed_scale_is_neither_calibrated_nor_learnt():
    quantizer = FakeQuant(dtype=torch.int8, symmetric=False, fixed_scale=1 / 256)
    quantizer.mode = "range"
    quantizer(torch.linspace(-3, 5, 100))
    assert quantizer.start()
    x = torch.linspace(0, 0.99, 64, requires_grad=True)
    optimizer = torch.optim.SGD([quantizer.scale], lr=0.1)
    for _ in range(3):
        quantizer(x).square().sum().backward()
        optimizer.step()
    quantizer.bound_scale()
    assert (quantizer.scale.item(), int(quantizer.zero_point)) == (1 / 256, -128)
    expected = np.rint(x.detach().numpy() * 256).clip(0, 255) / 256
    np.testing.assert_array_equal(quantizer(x).detach().numpy(), expected.astype(np.float32))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(("channels", "clip"), [(None, None), (None, 6.0), (None, 0.5), (8, None)])
def test_the_gpus_kernels_compute_the_same(
    channels: int | None, clip: float | None, tmp_path: Path
):
    """Their text is compiled for the CPU; on a GPU, tests/test_cuda.py runs them."""
    made = quantizer(
        (torch.int8, True, 8) if channels else (torch.uint8, False, 8),
        np.linspace(0.03, 0.04, 8).astype(np.float32) if channels else 0.03,
        0 if channels else 100, ch_axis=1,
    )  # fmt: skip
    torch.manual_seed(0)
    dy, x = torch.randn(2, 4, 8, 6) * 3
    leaf = x.clone().requires_grad_()
    y = made(leaf, clip)
    y.backward(dy)
    assert leaf.grad is not None and made.scale.grad is not None

    (tmp_path / "kernels.cpp").write_text(
        f"#include <cmath>\nusing std::rint;{FORWARD}{BACKWARD}"
        """
extern "C" void run(int n, const float* dy, const float* x, const float* s, float z, float low,
                    float high, float clip, float* y, float* dx, float* ds) {
  for (int i = 0; i < n; i++) {
    y[i] = learned_step(x[i], s[i], z, low, high, clip);
    learned_step_gradients(dy[i], x[i], y[i], s[i], z, low, high, clip, dx[i], ds[i]);
  }
}"""
    )
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-o", tmp_path / "kernels.so", tmp_path / "kernels.cpp"],
        check=True,
    )
    step = made.scale.detach().view(1, -1, 1) if channels else made.scale.detach()
    given = [np.ascontiguousarray(t.expand(x.shape).numpy()) for t in (dy, x, step)]
    found = [np.zeros(x.shape, np.float32) for _ in range(3)]
    numbers = (float(made.zero_point.flatten()[0]), made.low, made.high, clip or NO_CLIP)
    ctypes.CDLL(str(tmp_path / "kernels.so")).run(
        x.numel(), *(a.ctypes.data_as(ctypes.c_void_p) for a in given),
        *map(ctypes.c_float, numbers), *(a.ctypes.data_as(ctypes.c_void_p) for a in found),
    )  # fmt: skip
    np.testing.assert_array_equal(found[0], y.detach().numpy())
    np.testing.assert_array_equal(found[1], leaf.grad.numpy())
    total = found[2].sum((0, 2) if channels else None) * _gradient_scale(x, made.scale, made.high)
    np.testing.assert_allclose(total, made.scale.grad.numpy(), rtol=1e-4, atol=1e-5)
