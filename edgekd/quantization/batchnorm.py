"""Batch normalisation while integers are trained, folded away again without a trace.

What a folded network lacks is what lets a float one learn at high rates: by the statistics of each
batch, a layer's weights matter by their direction only, and what it gives stays in range. So behind
each layer that had a BatchNorm stands one again, behind its quantized weights. At first it changes
nothing: its factor and shift are the deviation and the mean of what it sees. At the end it is
folded, and since each output channel has a scale of its own, the integers q stay as they were
trained:

    γ · (s · Σ q x + b − μ) / σ + β  =  (s γ / σ) · Σ q x + (b − μ) γ / σ + β

So nothing is computed twice, as it is where each step folds (Jacob et al. 2018 §3.2,
arXiv:1712.05877). In the last part of a training its statistics should stay (Krishnamoorthi 2018
§3.2.2, arXiv:1806.08342), so that scales settle on what the device will see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.quantization.layers import Inputs, Layer, layers

EPS, MOMENTUM = 1e-5, 0.1  # as in torch


class BatchNorms(nn.Module):
    """One behind each layer of `graph` that `capture` took one from; `graph` is changed.

    Args:
        graph: a placed one as it is trained, see `placement.training_graph`.
        batches: of its inputs, (N, ...) each, which the first statistics are from.
    """

    def __init__(self, graph: GraphModule, batches: Sequence[Inputs]) -> None:
        super().__init__()
        self._pairs = [(each, _BatchNorm(each)) for each in layers(graph) if _has_lost_one(each)]
        self.each = nn.ModuleList(norm for _, norm in self._pairs)
        for index, (layer, norm) in enumerate(self._pairs):
            name = f"_edgekd_batchnorm_{index}"  # a network may call its own by any other
            graph.add_submodule(name, norm)
            readers = list(layer.node.users)
            with graph.graph.inserting_after(layer.node):
                node = graph.graph.call_module(name, (layer.node,))
            for reader in readers:
                reader.replace_input_with(layer.node, node)
        graph.recompile()
        with torch.no_grad():
            for inputs in batches if self._pairs else ():
                graph(*inputs)
        for _, norm in self._pairs:
            norm.start()

    @torch.no_grad()
    def fold(self) -> None:
        """Into the layers' weights, their scales and biases."""
        for layer, norm in self._pairs:
            assert layer.bias is not None
            factor = norm.factor.double() / (norm.variance.double() + EPS).sqrt()
            wide = [-1 if axis == layer.axis else 1 for axis in range(layer.weight.dim())]
            layer.weight.copy_(layer.weight * factor.view(wide))
            layer.bias.copy_((layer.bias - norm.mean.double()) * factor + norm.shift)
            if layer.quantizer is not None:  # symmetric: a negative factor turns all integers
                layer.quantizer.scale.copy_(layer.quantizer.scale * factor.abs())


def _has_lost_one(layer: Layer) -> bool:
    """And can fold one again: nothing else reads its weight, and each channel has its own scale."""
    return (
        bool(layer.node.meta.get("had_batchnorm"))
        and not layer.shared
        and layer.bias is not None
        and layer.bias.numel() == layer.weight.shape[layer.axis]
        and (layer.quantizer is None or layer.quantizer.scale.shape == layer.bias.shape)
    )


class _BatchNorm(nn.Module):
    """Of (N, C, ...); until it has started it only looks."""

    mean: Tensor
    variance: Tensor

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        assert layer.bias is not None
        zeros = torch.zeros_like(layer.bias)
        self.factor, self.shift = nn.Parameter(zeros.clone()), nn.Parameter(zeros.clone())
        self.register_buffer("mean", zeros.clone())
        self.register_buffer("variance", zeros.clone())
        self._seen: list[Tensor] | None = []

    def forward(self, x: Tensor) -> Tensor:
        if self._seen is not None:
            y = x.transpose(0, 1).flatten(1).double()
            self._seen.append(torch.stack([y.mean(1), y.square().mean(1)]))
            return x
        of_batch = self.training and x.numel() > x.shape[1]  # one value has no deviation
        return nn.functional.batch_norm(
            x, self.mean, self.variance, self.factor, self.shift, of_batch, MOMENTUM, EPS
        )

    @torch.no_grad()
    def start(self) -> None:
        """As if it were not there, by the statistics of what it has seen."""
        assert self._seen
        mean, square = torch.stack(self._seen).mean(0)
        self.mean.copy_(mean)
        self.variance.copy_((square - mean.square()).clamp(min=0))
        self.shift.copy_(self.mean)
        self.factor.copy_((self.variance + EPS).sqrt())
        self._seen = None
