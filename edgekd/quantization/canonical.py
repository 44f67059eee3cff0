"""One form for each operation, so that the placement's table and the runtimes meet few of them.

Each rewrite takes a node of a captured graph and puts its equal there, if it applies.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten


def canonicalize(graph: Graph) -> None:
    """Apply every rewrite of the table to every node; what is computed twice, compute once."""
    for node in list(graph.nodes):
        if rewrite := REWRITES.get(node.target):
            rewrite(node)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op in ("get_attr", "call_function"):
            same = seen.setdefault((node.op, str(node.target), repr((node.args, node.kwargs))), node)
            if same is not node:
                node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def _before(node: Node) -> Callable[..., Node]:
    """A function that inserts `operator(*arguments)` before `node`, as a part of its module."""

    def call(target: Any, *args: Any) -> Node:
        with node.graph.inserting_before(node):
            made = node.graph.call_function(target, args)
        made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        made.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
        return made

    return call


def _shape(node: Any) -> list[Any]:
    """Sizes of the node's tensor; those that depend on the batch are symbols."""
    return list(node.meta["val"].shape)


def _replace(node: Node, by: Node) -> None:
    """`by` takes the place and the name of `node`."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
    by.name = node.name


def flat_linear(node: Node) -> None:
    """A linear layer over (N, ..., C) becomes one over (N·..., C): the integer kernels' Gemm."""
    sizes = _shape(node)
    if len(sizes) < 3 or not all(isinstance(size, int) for size in sizes[1:]):
        return
    x, *rest = node.args
    call = _before(node)
    flat = call(aten.reshape.default, x, [-1, _shape(x)[-1]])
    inner = call(aten.linear.default, flat, *rest)
    _replace(node, call(aten.reshape.default, inner, [-1, *sizes[1:]]))


def spatial_mean(node: Node) -> None:
    """The mean over H and W becomes a pooling to 1×1."""
    x, axes, *rest = node.args
    size = _shape(x)
    if len(size) != 4 or not isinstance(axes, (list, tuple)) or node.kwargs:
        return
    if sorted(axis % 4 for axis in axes) != [2, 3]:
        return
    call = _before(node)
    pooled = call(aten.adaptive_avg_pool2d.default, x, [1, 1])
    _replace(node, pooled if rest and rest[0] else call(aten.flatten.using_ints, pooled, 1))


def attention(node: Node) -> None:
    """softmax(q · kᵀ · scale + mask) · v, as two matrix products (Vaswani et al. 2017 eq. 1)."""
    q, k, v, *rest = node.args
    mask, _, causal = (*rest, *(None, 0.0, False)[len(rest) :])
    mask = node.kwargs.get("attn_mask", mask)
    if causal or node.kwargs.get("is_causal") or node.kwargs.get("enable_gqa"):
        return
    if isinstance(mask, Node) and mask.meta["val"].dtype is torch.bool:
        return
    width = _shape(q)[-1]
    scale = node.kwargs.get("scale")
    call = _before(node)
    scaled = call(aten.mul.Tensor, q, width**-0.5 if scale is None else scale)
    weights = call(aten.matmul.default, scaled, call(aten.transpose.int, k, -2, -1))
    if mask is not None:
        weights = call(aten.add.Tensor, weights, mask)
    _replace(node, call(aten.matmul.default, call(aten.softmax.int, weights, -1), v))


def reshape(node: Node) -> None:
    """A view becomes a reshape, which channels-last tensors in training take too.

    The one size that depends on the batch becomes -1: then the exported graph computes no shapes.
    """
    node.target = aten.reshape.default
    x, sizes = node.args[:2]
    assert isinstance(sizes, (list, tuple))
    computed = [i for i, size in enumerate(sizes) if isinstance(size, Node)]
    if len(computed) == 1 and -1 not in sizes:
        node.args = (x, [-1 if i in computed else size for i, size in enumerate(sizes)])


def chunk(node: Node) -> None:
    """Equal parts along an axis become slices, which keep the integers of their source."""
    x, parts, axis = (*node.args, 0)[:3]
    whole = _shape(x)[axis]
    if not isinstance(whole, int) or not all(u.target is operator.getitem for u in node.users):
        return
    step = -(-whole // parts)
    for user in list(node.users):
        start = user.args[1] * step
        part = _before(user)(aten.slice.Tensor, x, axis, start, min(start + step, whole))
        _replace(user, part)


def whole_slice(node: Node) -> None:
    """A slice from the first to the last element, as `x[:, 1:]` has one over the batch, goes."""
    x, _, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])[:5]
    if (start or 0) == 0 and (end is None or end == sys.maxsize) and step == 1:
        node.replace_all_uses_with(x)
        node.graph.erase_node(node)


def pad_of_nothing(node: Node) -> None:
    """A pad of no element on any side, as for sizes that a window divides, goes."""
    x, pads = node.args[:2]
    if not any(pads):
        node.replace_all_uses_with(x)
        node.graph.erase_node(node)


REWRITES: dict[Any, Callable[[Node], None]] = {
    aten.linear.default: flat_linear,
    aten.mean.dim: spatial_mean,
    aten.scaled_dot_product_attention.default: attention,
    aten.view.default: reshape,
    aten.reshape.default: reshape,
    aten.chunk.default: chunk,
    aten.slice.Tensor: whole_slice,
    aten.pad.default: pad_of_nothing,
}
