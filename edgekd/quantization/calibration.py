"""The start of every scale: what a few hundred samples show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgekd.errors import DataError
from edgekd.quantization.capture import WEIGHTED, arguments, tensor_of
from edgekd.quantization.fake_quant import FakeQuant, Observer
from edgekd.quantization.placement import quantizers
from edgekd.reporting.progress import Progress


def calibrate(graph: GraphModule, batches: Sequence[Tensor], observer: Observer) -> None:
    """Set every quantizer of `graph` from `batches`.

    Args:
        batches: inputs of (N, ...), passed through once ("minmax") or twice ("mse").
        observer: "minmax" takes the whole range; "mse" the share of it that gives the least
            squared error of the tensor itself.

    Raises:
        DataError: there are no batches.
    """
    if not batches:
        raise DataError("no samples to calibrate with: the data gave no batch")
    modes: list[Literal["range", "error"]] = ["range"]
    if observer == "mse":
        modes.append("error")
    with torch.no_grad(), Progress("calibrating", len(modes) * len(batches)) as progress:
        for mode in modes:
            for quantizer in quantizers(graph).values():
                quantizer.mode = mode
            for x in batches:
                graph(x)
                progress.advance()
    for quantizer in quantizers(graph).values():
        quantizer.start()
    settle(graph)


def settle(graph: GraphModule) -> None:
    """What must hold of the scales that are exported; the last step of training may break it."""
    for quantizer in quantizers(graph).values():
        quantizer.bound_scale()
    floor_weight_scales(graph)


def floor_weight_scales(graph: GraphModule) -> None:
    """Keep |bias| / (s_x · s_w) below 2³¹, so that every bias fits into int32.

    A channel that BatchNorm switched off has weights near 0 and a bias that is not; with the
    scale of its weights alone the bias would overflow.
    """
    for node in graph.graph.nodes:
        args = arguments(node)
        if node.target not in WEIGHTED or len(args) < 3:
            continue
        x, weight = (_quantizer(graph, n) for n in args[:2])
        stored = args[2] is not None and args[2].op == "get_attr"
        bias = tensor_of(graph, args[2]) if stored else None
        if x is None or weight is None or bias is None:
            continue
        with torch.no_grad():
            floor = bias.abs() / (x.scale * 2**30)
            floor = floor if weight.scale.dim() else floor.amax()
            weight.scale.copy_(torch.maximum(weight.scale, floor))


def _quantizer(graph: GraphModule, node: torch.fx.Node) -> FakeQuant | None:
    if node.op != "call_module":
        return None
    module = graph.get_submodule(str(node.target))
    return module if isinstance(module, FakeQuant) else None
