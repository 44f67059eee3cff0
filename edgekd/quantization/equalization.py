"""Weights of consecutive layers share their range evenly, channel by channel.

Cross-layer equalization, Nagel et al. 2019 §4.1, arXiv:1906.04721: what a positive factor takes
from channel c of one layer's output, the next layer's input channel c gives back. It matters most
where one scale serves all channels of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgekd.quantization.capture import WEIGHTED, arguments, groups_of, tensor_of

aten = torch.ops.aten

# f(s · x) = s · f(x) for s > 0, channel by channel; ReLU6 and other clips are not
EQUIVARIANT = {
    aten.relu.default, aten.leaky_relu.default, aten.max_pool2d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
}  # fmt: skip
PASSES, CLOSE = 30, 1e-3


def equalize(graph: GraphModule) -> int:
    """Rescale every pair of layers in place, until factors are near 1; return how many pairs.

    A pair is a layer, operators that a positive factor passes through, and a layer that alone reads
    them; the second one is dense or depthwise, no weight is shared, and none is transposed. The
    network computes what it did.
    """
    pairs = list(_pairs(graph))
    with torch.no_grad():
        for _ in range(PASSES):
            if all([_balance(graph, *pair) for pair in pairs]):
                break
    return len(pairs)


def _balance(graph: GraphModule, first: Node, second: Node) -> bool:
    """Their eq. 11: s = √(r₁ / r₂), so that both ranges become √(r₁ · r₂); whether s was near 1."""
    weight, following = (tensor_of(graph, arguments(node)[1]) for node in (first, second))
    bias = tensor_of(graph, _bias(first))
    assert weight is not None and following is not None
    dense = groups_of(second) == 1
    reads = following.transpose(0, 1) if dense else following  # a view: input channels first
    ranges = [rows.abs().flatten(1).amax(1) for rows in (weight, reads)]
    alive = (ranges[0] > 0) & (ranges[1] > 0)
    factor = torch.where(alive, (ranges[0] / ranges[1]).sqrt(), 1.0)
    weight /= _along_first(factor, weight)
    reads *= _along_first(factor, reads)
    if bias is not None:
        bias /= factor
    return bool(((factor - 1).abs() < CLOSE).all())


def _along_first(factor: Tensor, tensor: Tensor) -> Tensor:
    return factor.view(-1, *(1,) * (tensor.dim() - 1))


def _bias(node: Node) -> Node | None:
    return arguments(node)[2] if len(node.args) > 2 else None


def _pairs(graph: GraphModule) -> Iterator[tuple[Node, Node]]:
    for first in graph.graph.nodes:
        if not _own_weights(first):
            continue
        node = first
        while len(node.users) == 1 and (user := next(iter(node.users))).target in EQUIVARIANT:
            node = user
        if len(node.users) != 1:
            continue
        second = next(iter(node.users))
        if _own_weights(second) and arguments(second)[0] is node and _reads_all(graph, second):
            yield first, second


def _own_weights(node: Node) -> bool:
    """A convolution or linear layer whose weight and bias are stored for it alone."""
    if WEIGHTED.get(node.target) != 0:  # type: ignore[call-overload]
        return False
    stored = [arguments(node)[1], *([bias] if (bias := _bias(node)) is not None else [])]
    return all(n.op == "get_attr" and len(n.users) == 1 for n in stored)


def _reads_all(graph: GraphModule, node: Node) -> bool:
    """Dense, or depthwise with one output for each input."""
    weight = tensor_of(graph, arguments(node)[1])
    assert weight is not None
    groups = groups_of(node)
    return groups == 1 or (groups == len(weight) and weight.shape[1] == 1)
