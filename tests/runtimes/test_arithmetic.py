"""A runtime's outputs, bit for bit: nothing here may differ by a single integer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from edgekd.network import Network
from edgekd.runtimes.arithmetic import XNNPACK, Terms
from edgekd.runtimes.base import Artifact
from edgekd.runtimes.local_parity import LocalParity, saturating
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import verify
from edgekd.target import Target

HOST = Target.load("host-onnxruntime")
pytestmark = pytest.mark.skipif(
    saturating(HOST.scheme), reason="ONNX Runtime's kernels saturate on this host"
)
Joint = Callable[[Tensor, Tensor], Tensor]


class Joined(nn.Module):
    """`joint` of two convolutions; then a depthwise one, a ReLU6, and a head."""

    def __init__(self, joint: Joint) -> None:
        super().__init__()
        self.joint = joint
        self.first, self.second = (nn.Conv2d(3, 16, 3, padding=1) for _ in range(2))
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16)
        self.last, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 100)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.depthwise(self.joint(self.first(x), self.second(x))))
        return self.head(self.last(y).relu().mean((2, 3)))


def as_a_whole(module: nn.Module, folder: Path, target: Target = HOST) -> LocalParity:
    """Of `module` in integers: the gate on 128 samples, and all outputs of the first 8."""
    torch.manual_seed(0)
    x = torch.randn(32, 3, 14, 14)
    net = quantize(
        Network(module, x[:1]), target=target, data=[x], calibration=32, accelerator="cpu"
    )
    artifact = export(net, target=target, out=folder)
    parity = verify(artifact, net, data=[torch.randn(128, 3, 14, 14)], agreement=0.0)
    assert parity.gate == "passed", parity.reasons
    assert parity.local is not None and parity.local.as_a_whole is not None
    return parity.local


@pytest.mark.parametrize(
    "joint",
    [
        lambda a, b: (a + b).relu(),
        lambda a, b: a + b,
        lambda a, b: a * b,
        lambda a, b: a * b.mean((2, 3), keepdim=True).sigmoid(),
        lambda a, b: F.silu(a) + F.gelu(b),
        lambda a, b: F.max_pool2d(a.relu(), 3, 1, 1) + F.pad(b, (1, -1, 0, 0)),
        lambda a, b: torch.cat([a, b], 1)[:, 4:20].relu(),
    ],
    ids=["sum-relu", "sum", "product", "squeeze", "activations", "moved", "joined"],
)
def test_every_output_is_the_runtimes(joint: Joint, tmp_path: Path):
    for seed in range(2):
        torch.manual_seed(seed)
        found = as_a_whole(Joined(joint), tmp_path / str(seed)).as_a_whole
        assert found is not None
        assert (found.exact, found.max_steps, found.unknown) == (1.0, 0.0, ())
        assert found.elements == 8 * 100


@pytest.mark.parametrize("target", ["android-arm64", "raspberry-pi-4"])
def test_a_phones_file_in_this_hosts_kernels(target: str, tmp_path: Path):
    torch.manual_seed(0)
    local = as_a_whole(Joined(torch.add), tmp_path, Target.load(target))
    assert local.as_shipped is None  # the device's kernels are not here
    assert local.as_a_whole is not None
    assert local.as_a_whole.exact == 1.0


def test_what_no_rule_says_is_named(tmp_path: Path):
    torch.manual_seed(0)
    found = as_a_whole(Joined(lambda a, b: F.avg_pool2d(a, 2) - F.avg_pool2d(b, 2)), tmp_path)
    assert found.as_a_whole is not None
    assert found.as_a_whole.unknown == ("avg_pool2d", "sub")
    assert "as real numbers, rounded once: avg_pool2d, sub" in found.as_a_whole.summary


def test_nothing_is_said_where_the_runtime_is_another(
    trained: Network, batches: list[tuple[Tensor, Tensor]], tmp_path: Path
):
    target = "jetson-orin-nano"  # ONNX Runtime stands in for TensorRT
    net = quantize(trained, target=target, data=batches, accelerator="cpu")
    parity = verify(export(net, target=target, out=tmp_path), net, data=batches)
    assert parity.local is not None
    assert parity.local.as_a_whole is None


def test_one_weight_that_is_another_is_seen(
    quantized: Network, int8_artifact: Artifact, batches: list[tuple[Tensor, Tensor]],
    tmp_path: Path,
):  # fmt: skip
    sound = verify(int8_artifact, quantized, data=batches).local
    assert sound is not None and sound.as_a_whole is not None
    assert sound.as_a_whole.exact == 1.0
    model = onnx.load(int8_artifact.path)
    weight = next(w for w in model.graph.initializer if w.data_type == 3 and len(w.dims) == 4)
    integers = numpy_helper.to_array(weight).copy()
    integers *= -1
    weight.CopyFrom(numpy_helper.from_array(integers, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    broken = Artifact.of(
        tmp_path / "model.onnx", target=HOST, precision="int8", versions=int8_artifact.versions
    )
    parity = verify(broken, quantized, data=batches)
    assert parity.local is not None and parity.local.as_a_whole is not None
    assert parity.local.as_a_whole.within_one_step < 0.99
    assert any("in the runtime's own integers; 99% are asked for" in r for r in parity.reasons)


def test_xnnpacks_sum_beside_integers_of_python():
    """In the arithmetic of 32-bit integers, as its reference kernel has it."""
    torch.manual_seed(0)
    a, b = torch.randint(-255, 256, (2, 10_000)).double()
    for first, second in (0.7, 1.3), (2.1, -0.004), (0.31, 0.29):
        factors = torch.tensor(first), torch.tensor(second)
        ours = XNNPACK.add(Terms(a, b, factors, (3, 5, 7)))
        exponent = int(np.frexp(np.float32(max(abs(first), abs(second))))[1]) - 1
        shift = 20 - exponent
        left, right = (int(np.rint(np.float32(f) * np.float32(2.0**shift))) for f in factors)
        assert 2**20 <= max(abs(left), abs(right)) <= 2**21
        wanted = [
            (int(x) * left + int(y) * right + (1 << shift - 1)) >> shift
            for x, y in zip(a, b, strict=True)
        ]
        assert ours.tolist() == wanted
