"""The start of every scale: what a few hundred samples show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgekd.errors import DataError, RecipeError, nearest
from edgekd.quantization.fake_quant import FakeQuant, Observer
from edgekd.quantization.layers import Inputs, layers, quantizer_at
from edgekd.quantization.placement import quantized_activations, quantizers
from edgekd.reporting.progress import Progress

Mode = Literal["range", "average", "sample", "error"]
# what each observer looks at, a pass over the samples each
MODES: dict[Observer, tuple[Mode, ...]] = {
    "minmax": ("range",),
    "moving-average": ("average",),
    "percentile": ("sample",),
    "mse": ("range", "error"),
}


def calibrate(graph: GraphModule, batches: Sequence[Inputs], observer: Observer) -> None:
    """Set every quantizer of `graph` from `batches`.

    Args:
        batches: of the graph's inputs, (N, ...) each, passed through once, or twice for "mse".
        observer: "minmax" takes the whole range; "moving-average" of each batch's range a tenth
            (Jacob et al. 2018 §3.1, arXiv:1712.05877); "percentile" leaves out the outer 0.01 % on
            either side; "mse" takes the share of the range that gives the least squared error of
            the tensor itself. Weights, which do not vary, have their whole range, or "mse".

    Raises:
        DataError: there are no batches.
        RecipeError: there is no such observer.
    """
    if not batches:
        raise DataError("no samples to calibrate with: the data gave no batch")
    if observer not in MODES:
        raise RecipeError(f"no observer {observer!r}{nearest(observer, MODES)}")
    activations = set(quantized_activations(graph))
    with torch.no_grad(), Progress("calibrating", len(MODES[observer]) * len(batches)) as progress:
        for mode in MODES[observer]:
            for name, quantizer in quantizers(graph).items():
                varies = name in activations or mode == "error"
                quantizer.mode = mode if varies else "range"
            for inputs in batches:
                graph(*inputs)
                for quantizer in quantizers(graph).values():
                    quantizer.end_batch()
                progress.advance()
    for quantizer in quantizers(graph).values():
        quantizer.start()
    settle(graph)


def settle(graph: GraphModule, *, integer_bias: bool = False) -> None:
    """What must hold of scales and biases that are exported; training may break it.

    Args:
        integer_bias: biases become multiples of s_x · s_w, as the device holds them in int32.
    """
    for quantizer in quantizers(graph).values():
        quantizer.bound_scale()
    floor_weight_scales(graph)
    if integer_bias:
        round_biases(graph)


def floor_weight_scales(graph: GraphModule) -> None:
    """Keep |bias| / (s_x · s_w) below 2³¹, so that every bias fits into int32.

    A channel that BatchNorm switched off has weights near 0 and a bias that is not; with the
    scale of its weights alone the bias would overflow.
    """
    for x, weight, bias in _biased(graph):
        with torch.no_grad():
            floor = _by_scale(bias.abs(), weight).amax(0) / (x.scale * 2**30)
            weight.scale.copy_(torch.maximum(weight.scale, floor.view_as(weight.scale)))


def round_biases(graph: GraphModule) -> None:
    """Each bias to the nearest multiple of s_x · s_w.

    Left to the export, this alone moves one in 600 integers behind a first layer of 3 channels.
    """
    for x, weight, bias in _biased(graph):
        with torch.no_grad():
            step = x.scale * weight.scale
            bias.copy_(((_by_scale(bias, weight) / step).round() * step).flatten())


def _biased(graph: GraphModule) -> Iterator[tuple[FakeQuant, FakeQuant, Tensor]]:
    """Quantizers of input and weight, and the bias, of each integer layer that has one."""
    for layer in layers(graph):
        x = quantizer_at(graph, layer.input)
        if x is not None and layer.quantizer is not None and layer.bias is not None:
            yield x, layer.quantizer, layer.bias


def _by_scale(bias: Tensor, weight: FakeQuant) -> Tensor:
    """(n, scales of the weight); n > 1 for the groups of a transposed convolution."""
    return bias.view(-1, weight.scale.numel())
