"""Biases that make up for the mean error of quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgekd.quantization.calibration import settle
from edgekd.quantization.layers import Inputs, layers, walk
from edgekd.reporting.progress import Progress


def correct_biases(
    graph: GraphModule, floats: Mapping[str, Tensor], batches: Sequence[Inputs]
) -> None:
    """Take E[ŷ − y] of each output channel from the bias of every layer of a calibrated graph.

    Nagel et al. 2019 §4.2 (arXiv:1906.04721), with the mean over samples. Layer by layer, before
    the activation: the corrections of earlier layers are in effect when a later one is measured,
    layers that stay in float included. A layer without a bias gets none, for it would be one that
    the network has no name for on disk; one that shares weight or bias is left as it is.

    Args:
        floats: the float network's weights, see `walk`.
        batches: of the graph's inputs, of which `walk` keeps what fits into memory.
    """
    with Progress("correcting biases", sum(1 for _ in layers(graph))) as progress:
        for layer, inputs, targets in walk(graph, floats, batches):
            if layer.bias is not None and not layer.shared:
                with torch.no_grad():
                    weight = layer.quantizer(layer.weight) if layer.quantizer else layer.weight
                    errors = [
                        (layer(x, weight) - y).double().movedim(layer.channel_axis, 0).flatten(1)
                        for x, y in zip(inputs, targets, strict=True)
                    ]
                    total = sum(error.sum(1) for error in errors)
                    layer.bias.sub_(total / sum(error.shape[1] for error in errors))
            progress.advance()
    settle(graph)
