"""Cross-layer equalization: neighbouring layers share out their channels' ranges.

Nagel et al. 2019 §4.1 (arXiv:1906.04721). For f with f(s·x) = s·f(x), s > 0, as ReLU has it,

    W₂ · f(W₁ x + b₁) = (W₂ S) · f(S⁻¹ W₁ x + S⁻¹ b₁)

so the network computes the same, with scales that suit one step for a whole tensor better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgekd.quantization.capture import arguments, groups_of
from edgekd.quantization.layers import Layer, layers
from edgekd.quantization.placement import upper_bound

aten = torch.ops.aten

POOLS = {
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
}
MOST_ROUNDS = 20
Side = Literal["in", "out"]


def equalize(graph: GraphModule) -> int:
    """Equalize each pair of layers of a captured float graph, in place; return how many pairs.

    A pair is a convolution (of any kind) or linear layer and the next one, with nothing but ReLU,
    leaky ReLU, pooling, and a flattening of 1×1 between them, where nothing else reads the tensors
    in between. ReLU6 clips at 6 whatever the scale, so there is no pair across it; nor is there one
    for a weight that is shared.

    The rounds over all pairs end when no factor is further than 0.1 % from 1.
    """
    pairs = list(_pairs(graph))
    for _ in range(MOST_ROUNDS):
        if all([_equalize(first, second) < 1e-3 for first, second in pairs]):
            break
    return len(pairs)


def _pairs(graph: GraphModule) -> Iterator[tuple[Layer, Layer]]:
    own = [layer for layer in layers(graph) if not layer.shared and _channels_on_axis_1(layer)]
    at = {layer.node: layer for layer in own}
    for first in own:
        before, node = first.node, _only_user(first.node)
        while node is not None and _scales(node):
            before, node = node, _only_user(node)
        second = None if node is None else at.get(node)
        if second is not None and second.input is before:
            yield first, second


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _channels_on_axis_1(layer: Layer) -> bool:
    """True of convolutions, and of linear layers over (N, C)."""
    linear = layer.node.target is aten.linear.default
    return not linear or (_rank(layer.input) == 2 and _rank(layer.node) == 2)


def _rank(node: Node) -> int:
    return int(node.meta["val"].dim())


def _scales(node: Node) -> bool:
    """Whether f(s·x) = s·f(x) for each channel, which is on axis 1 before and behind it."""
    if node.target is aten.flatten.using_ints:
        source, *axes = arguments(node)
        return axes in ([1], [1, -1]) and math.prod(source.meta["val"].shape[2:]) == 1
    if node.target in POOLS:
        return _rank(node) == 4
    return node.target is aten.leaky_relu.default or upper_bound(node) == math.inf


def _equalize(first: Layer, second: Layer) -> float:
    """Apply s = √(r₁ / r₂) (their eq. 11) to both; return how far from 1 it is at most.

    Channels without weights on either side are left alone. And no bias grows beyond what the layer
    has already: a channel that BatchNorm has all but switched off has weights near 0 and a bias
    that is not, and scaled up it would take the whole range of the activations.
    """
    ours, theirs = _ranges(first, "out"), _ranges(second, "in")
    factor = torch.where((ours > 0) & (theirs > 0), (ours / theirs).sqrt(), 1.0)
    if first.bias is not None:
        bias = first.bias.detach().double().abs()
        factor = torch.maximum(factor, bias / torch.maximum(bias.amax(), ours.amax()))
    with torch.no_grad():
        _multiply(first, "out", 1 / factor)
        if first.bias is not None:
            first.bias.div_(factor)
        _multiply(second, "in", factor)
    return float((factor - 1).abs().max())


def _by_group(layer: Layer, side: Side) -> tuple[Tensor, int]:
    """The weight as (groups, a, b, rest) in float64, and which of a and b is not of that side."""
    weight = layer.weight.detach().double()
    other = 2 if (layer.axis == 0) == (side == "out") else 1
    return weight.reshape(groups_of(layer.node), -1, weight.shape[1], weight[0, 0].numel()), other


def _ranges(layer: Layer, side: Side) -> Tensor:
    """Largest absolute weight of each input or output channel, (C,)."""
    weight, other = _by_group(layer, side)
    return weight.abs().amax((other, 3)).flatten()


def _multiply(layer: Layer, side: Side, factor: Tensor) -> None:
    """The weights of each input or output channel times `factor`, (C,)."""
    weight, other = _by_group(layer, side)
    by_channel = factor.view(groups_of(layer.node), -1).unsqueeze(other).unsqueeze(3)
    layer.weight.copy_((weight * by_channel).reshape(layer.weight.shape))
