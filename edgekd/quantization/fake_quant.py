"""The quantizer that is calibrated, trained and converted: one module for every tensor.

Quantize-dequantize with learnable scales, after LSQ (arXiv:1902.08153):

    q(x) = clamp(round(x / s) + z, q_min, q_max)        x̂ = s · (q(x) − z)

`z` is fixed after calibration. The arithmetic is that of the quantize and dequantize operators
that `convert_pt2e` puts in its place, operation by operation, so both give the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantizeBase

Observer = Literal["minmax", "moving-average", "percentile", "mse"]
MIN_SCALE = 2**-23  # float32's eps, as in torch's observers
# OpenVINO takes a range's end within 1e-6 of 0 for 0, and the zero point with it
MIN_END = 2e-6
# Candidate clipping ranges of the "mse" observer, as a share of the observed range.
# No two have a simple ratio: where a tensor of 0.98 the range of another goes into it, multiples
# of 25 lie between two integers, and each runtime rounds them as its arithmetic happens to.
SHRINK = torch.linspace(-1.12, 0, 56).exp()
SAMPLE = 1 << 16  # elements of a tensor and batch that "mse" and "percentile" look at
AVERAGED = 0.1  # share of the newest batch in "moving-average"
PERCENTILE = 0.9999


class _LearnedStep(torch.autograd.Function):
    """x̂ with gradients for x (straight through inside the range) and for s.

    LSQ's gradient of s is Σ dy · (x̂ − m·x) / s, m = 1 inside the range (their eq. 3 with z
    written out). As dx = m · dy, that is (⟨dy, x̂⟩ − ⟨dx, x⟩) / s: two dot products. Forward is
    in vectorised operators: torch's own fake-quantize kernel is scalar, five times as slow.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int,
        clip: float | None,
    ) -> Tensor:  # fmt: skip
        ctx.axis, ctx.clip = axis, clip
        ctx.gradient_scale = _gradient_scale(x, scale, high)
        if scale.dim():  # symmetric, z = 0
            ctx.range = low, high
            s: Any = along(scale, x, axis)
        else:
            zero = int(zero_point)
            ctx.range = low, high = low - zero if clip is None else 0, high - zero
            s = float(scale)
        y: Tensor = (x * (1.0 / s)).round_().clamp_(low, high).mul_(s)
        ctx.save_for_backward(x, y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, scale = ctx.saved_tensors
        (dy,) = grads
        learns = ctx.needs_input_grad[1]
        low, high = ctx.range[0] - 0.5, ctx.range[1] + 0.5
        if scale.dim():
            s = along(scale, x, ctx.axis)
            dx = torch.where((x >= low * s) & (x <= high * s), dy, 0.0)
            if not learns:
                return (dx, *[None] * 6)
            other = [d for d in range(x.dim()) if d != ctx.axis]
            ds = (dy * y - dx * x).sum(other) / scale
        else:
            value = float(scale)
            ends = low * value, high * value
            if ctx.clip is not None:
                ends = 0.0, min(ends[1], ctx.clip)
            # the gradient of a clip, as one fused kernel
            dx = torch.ops.aten.hardtanh_backward(dy, x, *ends)
            if not learns:
                return (dx, *[None] * 6)
            ds = (_dot(dy, y) - _dot(dx, x)) / value
        return (dx, ds * ctx.gradient_scale, *[None] * 5)


class _LearnedStepOnGPU(torch.autograd.Function):
    """The same, in one kernel each way, and never waiting for a scale to reach the host."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int,
        clip: float | None,
    ) -> Tensor:  # fmt: skip
        ctx.gradient_scale = _gradient_scale(x, scale, high)
        ctx.summed = [d for d in range(x.dim()) if not scale.dim() or d != axis]
        ctx.numbers = {"low": low, "high": high, "clip": NO_CLIP if clip is None else clip}
        steps = [along(t, x, axis) if scale.dim() else t for t in (scale, zero_point)]
        y = _gpu_kernels()[0](x, *steps, **ctx.numbers)
        ctx.save_for_backward(x, y, *steps)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, scale, zero_point = ctx.saved_tensors
        dx, ds = _gpu_kernels()[1](*grads, x, y, scale, zero_point, **ctx.numbers)
        if not ctx.needs_input_grad[1]:
            return (dx, *[None] * 6)
        return (dx, ds.sum(ctx.summed) * ctx.gradient_scale, *[None] * 5)


NO_CLIP = -1.0
FORWARD = """
template <typename T> T learned_step(T x, T s, T z, T low, T high, T clip) {
  T least = clip < T(0) ? low - z : T(0), most = high - z, q = rint(x * (T(1) / s));
  return (q < least ? least : q > most ? most : q) * s;
}"""
BACKWARD = """
template <typename T> void learned_step_gradients(
    T dy, T x, T y, T s, T z, T low, T high, T clip, T& dx, T& ds) {
  T least = clip < T(0) ? (low - z - T(0.5)) * s : T(0), most = (high - z + T(0.5)) * s;
  if (clip >= T(0) && most > clip) most = clip;
  dx = x > least && x < most ? dy : T(0);
  ds = (dy * y - dx * x) / s;
}"""


@functools.cache
def _gpu_kernels() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """Forward and backward; torch compiles them at first use, without any compiler here."""
    numbers = {"low": 0.0, "high": 0.0, "clip": NO_CLIP}
    make = torch.cuda.jiterator
    return (
        make._create_jit_fn(FORWARD, **numbers),
        make._create_multi_output_jit_fn(BACKWARD, 2, **numbers),
    )


def _gradient_scale(x: Tensor, scale: Tensor, high: int) -> float:
    """LSQ §2.2: g = 1 / sqrt(N · Qp) puts the step of s on the scale of the weights' steps.

    N counts the weights of the layer, or the features of one sample.
    """
    count = x.numel() if scale.dim() else x.numel() // max(1, x.shape[0])
    return float((max(1, count) * max(1, high)) ** -0.5)


def along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """(C,) shaped to multiply `x`, whose channels are on `axis`."""
    return scale.view([-1 if d == axis else 1 for d in range(x.dim())])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ without a copy where both are channels-last, as they are in training."""
    if a.dim() == 4:
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    product: Tensor = torch.dot(a.reshape(-1), b.reshape(-1))
    return product


def _strided(rows: Tensor) -> Tensor:
    """About SAMPLE elements of each row, evenly spaced; (C, n) in and out."""
    step = max(1, rows.shape[1] // SAMPLE)
    while math.gcd(step, rows.shape[1]) > 1:  # else it may meet one column of each image only
        step += 1
    return rows[:, ::step]


class FakeQuant(FakeQuantizeBase):  # type: ignore[misc]  # torchao ships no types
    """Quantize-dequantize of one tensor, per tensor or per channel.

    Args:
        dtype: `torch.int8` or `torch.uint8`, the integer type of the exported file.
        bits: symmetric integers are within ±(2^(bits-1) − 1), as weights are (7 of 8 keeps
            `vpmaddubsw` from saturating); the exported type stays `dtype`. None: they are all that
            `dtype` has, where the exported quantize operator saturates.
        symmetric: zero point 0, and the scale from amax.
        channels: number of channels on `ch_axis`, or None for one scale for the tensor; several
            scales are symmetric.
        max_value: largest real value the range may reach (6 behind a ReLU6, so that the clip
            vanishes into the quantizer).
        fixed_scale: the scale, whatever is observed and learnt, from 0 on: where the device's
            kernel takes no other.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        bits: int | None = None,
        symmetric: bool,
        channels: int | None = None,
        ch_axis: int = 0,
        max_value: float | None = None,
        fixed_scale: float | None = None,
        **_: Any,  # torchao repeats the fields of its QuantizationSpec here
    ) -> None:
        nn.Module.__init__(self)  # not FakeQuantizeBase's: its switches would be saved as state
        assert symmetric or channels is None
        info = torch.iinfo(dtype)
        self.dtype = dtype
        self.symmetric = symmetric
        self.quant_min, self.quant_max = info.min, info.max
        amax = 2 ** (bits - 1) - 1 if symmetric and bits is not None else None
        self.low: int = info.min if amax is None else -amax
        self.high: int = info.max if amax is None else amax
        self.ch_axis = ch_axis
        self.qscheme = torch.per_tensor_affine if channels is None else torch.per_channel_symmetric
        self.max_value = max_value
        self.fixed_scale = fixed_scale
        self.mode: Literal["range", "average", "sample", "error", "quantize"] = "quantize"
        shape = () if channels is None else (channels,)
        self.scale = nn.Parameter(torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.zero_point: Tensor
        self._range: tuple[Tensor, Tensor] | None = None
        self._average: tuple[Tensor, Tensor] | None = None
        self._error: Tensor | None = None
        self._samples: list[Tensor] = []

    def forward(self, x: Tensor, clip: float | None = None) -> Tensor:
        """x̂ of x's shape; while calibrating, x itself.

        Args:
            clip: of one scale for the tensor: x is clipped to 0 … clip as well, see
                `placement.training_graph`. All of it costs one pass forward and one back.
        """
        if self.mode == "quantize":
            if torch.is_grad_enabled() and self.scale.requires_grad:
                self.bound_scale()
            step = _LearnedStepOnGPU if x.is_cuda else _LearnedStep
            y: Tensor = step.apply(
                x, self.scale, self.zero_point, self.low, self.high, self.ch_axis, clip
            )
            return y
        with torch.no_grad():
            if self.mode == "error":
                self._observe_error(x)
            elif self.mode == "sample":
                self._samples.append(_strided(self._channels_first(x)))
            else:
                self._observe_range(x)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point), as torchao's conversion asks for them."""
        return self.scale.detach(), self.zero_point

    # ---- calibration -------------------------------------------------------------------------

    def _channels_first(self, x: Tensor) -> Tensor:
        """(1, n) or (C, n): one row for each scale."""
        if self.scale.dim():
            return x.transpose(0, self.ch_axis).reshape(x.shape[self.ch_axis], -1)
        return x.reshape(1, -1)

    def _observe_range(self, x: Tensor) -> None:
        rows = self._channels_first(x)
        low: Tensor = rows.amin(1).clamp(max=0)
        high: Tensor = rows.amax(1).clamp(min=0)
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = (low, high)

    def end_batch(self) -> None:
        """Average what this batch showed, be it several tensors that share the scale."""
        if self.mode == "average" and self._range is not None:
            old, new = self._average or self._range, self._range
            self._average = (
                torch.lerp(old[0], new[0], AVERAGED),
                torch.lerp(old[1], new[1], AVERAGED),
            )
            self._range = None

    def _observe_error(self, x: Tensor) -> None:
        rows = _strided(self._channels_first(x))
        errors = []
        for share in SHRINK.tolist():
            scale, zero = (t[:, None] for t in self._qparams(share))
            q = ((rows / scale).round() + zero).clamp(self.low, self.high)
            errors.append((((q - zero) * scale - rows) ** 2).sum(1))
        error = torch.stack(errors)
        self._error = error if self._error is None else self._error + error

    def _qparams(self, share: Tensor | float) -> tuple[Tensor, Tensor]:
        """Scale and zero point for `share` of the observed range, rows of `_range`."""
        assert self._range is not None
        low, high = self._range[0] * share, self._range[1] * share
        if self.max_value is not None:
            high = high.clamp(max=self.max_value)
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.high
            return scale.clamp(min=MIN_SCALE), torch.zeros_like(scale)
        low = low * (low < -MIN_END)
        scale = ((high - low) / (self.high - self.low)).clamp(min=MIN_SCALE)
        return scale, (self.low - (low / scale).round()).clamp(self.low, self.high)

    def start(self) -> bool:
        """Set scale and zero point from what was observed; False if nothing passed through."""
        self.mode = "quantize"
        if self._average is not None:
            self._range = self._average
        if self._samples:
            # NumPy's: torch's takes 2²⁴ elements at most
            rows = torch.cat(self._samples, 1).cpu().numpy()
            ends = np.quantile(rows, [1 - PERCENTILE, PERCENTILE], axis=1)
            low, high = torch.from_numpy(ends).to(self.scale)
            self._range = low.clamp(max=0), high.clamp(min=0)
        if self._range is None:
            return False
        share: Tensor | float = 1.0
        if self._error is not None:
            share = SHRINK.to(self._error)[self._error.argmin(0)]
        scale, zero = self._qparams(share)
        with torch.no_grad():
            self.scale.copy_(scale.reshape(self.scale.shape))
            self.zero_point.copy_(zero.reshape(self.scale.shape).to(torch.int32))
            self.bound_scale()
        self._range = self._average = self._error = None
        self._samples = []
        return True

    # ---- training and conversion -------------------------------------------------------------

    def bound_scale(self) -> None:
        """Keep the scale positive, and the range inside what the fused clip allows."""
        self.scale.data.clamp_(min=MIN_SCALE)
        if self.fixed_scale is not None:
            self.scale.data.fill_(self.fixed_scale)
            self.zero_point.fill_(self.low)
        if self.max_value is not None:
            # a little below: high · s must not exceed max_value after rounding
            largest = self.max_value * (1 - 2**-22) / (self.high - self.zero_point)
            self.scale.data.copy_(torch.minimum(self.scale.data, largest))

    def to_unsigned(self) -> None:
        """int8 → uint8 without loss: the same scale, the zero point moved by 128."""
        self.dtype = torch.uint8
        self.quant_min, self.quant_max = 0, 255
        self.low, self.high = self.low + 128, self.high + 128
        self.zero_point += 128
