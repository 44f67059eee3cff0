"""One form for each operation, so that the placement's table and the runtimes meet few of them.

Each rewrite takes a node of a captured graph with its arguments, and puts its equal there, if it
applies.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
ACTIVATIONS = (
    aten.gelu.default, aten.hardswish.default, aten.relu.default, aten.relu6.default,
    aten.hardtanh.default, aten.silu.default,
)  # fmt: skip


def canonicalize(graph: Graph) -> None:
    """Apply every rewrite of the table to every node; what is computed twice, compute once."""
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            inline(node, *node.args)
    for node in list(graph.nodes):
        if rewrite := REWRITES.get(node.target):
            rewrite(node, *node.args, **node.kwargs)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op in ("get_attr", "call_function"):
            computed = node.op, str(node.target), repr((node.args, node.kwargs))
            same = seen.setdefault(computed, node)
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


def split_silu(graph: Graph) -> None:
    """Each SiLU as x · σ(x) (Ramachandran et al. 2017, arXiv:1710.05941)."""
    for node in graph.find_nodes(op="call_function", target=aten.silu.default):
        (x,) = node.args
        call = _before(node)
        _replace(node, call(aten.mul.Tensor, x, call(aten.sigmoid.default, x)))


def inline(
    node: Node, device: str, dtype: Any, enabled: bool, cached: Any, body: Node, *inputs: Any
) -> None:
    """What is computed with `torch.autocast` turned off is computed like all else."""
    inner: Graph = getattr(node.graph.owning_module, str(body.target)).graph
    if enabled or inner.find_nodes(op="get_attr"):
        return
    values = dict(zip(inner.find_nodes(op="placeholder"), inputs, strict=True))
    with node.graph.inserting_before(node):
        outputs: Any = node.graph.graph_copy(inner, values)
    for user in list(node.users):  # each takes one of the outputs
        user.replace_all_uses_with(outputs[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def flat_linear(node: Node, x: Node, *rest: Any) -> None:
    """A linear layer over (N, ..., C) becomes one over (N·..., C): the integer kernels' Gemm.

    The activation behind it stays beside it, so that a kernel may take it along.
    """
    sizes = _shape(node)
    if len(sizes) < 3 or not all(isinstance(size, int) for size in sizes[1:]):
        return
    call = _before(node)
    flat = x.args[0] if x.target is aten.reshape.default else None
    if not isinstance(flat, Node) or _shape(flat)[1:] != _shape(x)[-1:]:
        flat = call(aten.reshape.default, x, [-1, _shape(x)[-1]])
    last, inner = node, call(aten.linear.default, flat, *rest)
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target in ACTIVATIONS:
        reader = readers[0]
        last, call = reader, _before(reader)
        inner = call(reader.target, inner, *reader.args[1:])
        inner.kwargs = reader.kwargs
    _replace(last, call(aten.reshape.default, inner, [-1, *sizes[1:]]))
    if last is not node:
        node.graph.erase_node(node)


def spatial_mean(node: Node, x: Node, axes: Any, keepdim: bool = False, dtype: Any = None) -> None:
    """The mean over H and W becomes a pooling to 1×1."""
    if len(_shape(x)) != 4 or dtype is not None or axes is None:
        return
    if sorted(axis % 4 for axis in axes) != [2, 3]:
        return
    call = _before(node)
    pooled = call(aten.adaptive_avg_pool2d.default, x, [1, 1])
    _replace(node, pooled if keepdim else call(aten.flatten.using_ints, pooled, 1))


def attention(
    node: Node,
    q: Node,
    k: Node,
    v: Node,
    attn_mask: Node | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """softmax(q · kᵀ · scale + mask) · v, as two matrix products (Vaswani et al. 2017 eq. 1).

    Causal, grouped or behind a mask of booleans it stays as it is.
    """
    chooses = attn_mask is not None and attn_mask.meta["val"].dtype is torch.bool
    if is_causal or enable_gqa or chooses:
        return
    call = _before(node)
    scaled = call(aten.mul.Tensor, q, _shape(q)[-1] ** -0.5 if scale is None else scale)
    weights = call(aten.matmul.default, scaled, call(aten.transpose.int, k, -2, -1))
    if attn_mask is not None:
        weights = call(aten.add.Tensor, weights, attn_mask)
    _replace(node, call(aten.matmul.default, call(aten.softmax.int, weights, -1), v))


def reshape(node: Node, x: Node, sizes: Any) -> None:
    """A view becomes a reshape, which channels-last tensors in training take too.

    The one size that depends on the batch becomes -1: then the exported graph computes no shapes.
    """
    node.target = aten.reshape.default
    computed = [i for i, size in enumerate(sizes) if isinstance(size, Node)]
    if len(computed) == 1 and -1 not in sizes:
        node.args = (x, [-1 if i in computed else size for i, size in enumerate(sizes)])
    _channel_shuffle(node)


def _channel_shuffle(node: Node) -> None:
    """(N, C, H, W) as (N, G, C / G, H, W), as (N, C / G, G, H, W) and back is one operation.

    Runtimes know it by its parts (Zhang et al. 2018, arXiv:1707.01083 §3.1), if nothing is between
    them.
    """
    turned: Any = node.args[0]
    if turned.target is not aten.transpose.int or len(turned.users) > 1:
        return
    apart, *axes = turned.args
    if apart.target is not aten.reshape.default or len(apart.users) > 1 or sorted(axes) != [1, 2]:
        return
    whole, parts = _shape(apart.args[0]), _shape(apart)
    if len(whole) == 4 and _shape(node) == whole and len(parts) == 5 and parts[3:] == whole[2:]:
        _replace(node, _before(node)(aten.channel_shuffle.default, apart.args[0], parts[1]))


def chunk(node: Node, x: Node, parts: int, axis: int = 0) -> None:
    """Equal parts along an axis become slices, which keep the integers of their source."""
    whole = _shape(x)[axis]
    if not isinstance(whole, int) or not all(u.target is operator.getitem for u in node.users):
        return
    step = -(-whole // parts)
    for user in list(node.users):
        start = step * operator.index(user.args[1])  # type: ignore[arg-type]  # getitem's index
        part = _before(user)(aten.slice.Tensor, x, axis, start, min(start + step, whole))
        _replace(user, part)


def whole_slice(
    node: Node, x: Node, axis: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> None:
    """A slice from the first to the last element, as `x[:, 1:]` has one over the batch, goes."""
    if start in (None, 0) and end in (None, sys.maxsize) and step == 1:
        _drop(node, x)


def pad_of_nothing(node: Node, x: Node, pads: Any, *_: Any) -> None:
    """A pad of no element on any side, as for sizes that a window divides, goes."""
    if not any(pads):
        _drop(node, x)


def assertion(node: Node, *_: Any, **__: Any) -> None:
    """What a type was at capture is not asked again; local parity computes in float64."""
    node.graph.erase_node(node)


def _drop(node: Node, x: Node) -> None:
    node.replace_all_uses_with(x)
    node.graph.erase_node(node)


REWRITES: dict[Any, Callable[..., None]] = {
    aten.linear.default: flat_linear,
    aten.mean.dim: spatial_mean,
    aten.scaled_dot_product_attention.default: attention,
    aten.view.default: reshape,
    aten.reshape.default: reshape,
    aten.chunk.default: chunk,
    aten.slice.Tensor: whole_slice,
    aten.pad.default: pad_of_nothing,
    aten._assert_tensor_metadata.default: assertion,
}
