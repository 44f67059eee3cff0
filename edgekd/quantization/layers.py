"""The layers of a captured graph that have weights, and a walk over them in float and integers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgekd.quantization.capture import WEIGHTED, arguments, tensor_of
from edgekd.quantization.fake_quant import FakeQuant

Inputs = tuple[Tensor, ...]  # one batch of a network's inputs, (N, ...) each
WALK_BYTES = 2 << 30  # memory for the activations that a walk keeps


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer, placed or not, whose weight and bias are stored.

    Attributes:
        axis: of the weight that counts output channels, as in `WEIGHTED`.
        weight: the float parameter itself; bias: likewise, or None.
        quantizer: of the weight, or None where the layer stays in float.
        shared: whether something else reads the weight or the bias too.
    """

    node: Node
    axis: int
    weight: Tensor
    bias: Tensor | None
    quantizer: FakeQuant | None
    shared: bool

    @property
    def input(self) -> Node:
        """What the layer reads; its quantizer, in integers."""
        node: Node = arguments(self.node)[0]
        return node

    @property
    def channel_axis(self) -> int:
        """Of the output: 1, but the last one for a linear layer over (N, ..., C)."""
        return -1 if self.node.target is torch.ops.aten.linear.default else 1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The output for `x` with `weight` in place of the layer's own."""
        y: Tensor = self.node.target(  # type: ignore[operator]  # an operator
            x, weight, self.bias, *arguments(self.node)[3:], **self.node.kwargs
        )
        return y


def layers(graph: GraphModule) -> Iterator[Layer]:
    """Each layer in the order of the graph, without those whose weight or bias is computed."""
    readers = _readers(graph)
    for node in graph.graph.nodes:
        if node.target not in WEIGHTED:
            continue
        _, weight, bias = (*arguments(node)[:3], None)[:3]
        quantizer = quantizer_at(graph, weight)
        stored = arguments(weight)[0] if quantizer is not None else weight
        if any(source is not None and source.op != "get_attr" for source in (stored, bias)):
            continue
        tensors = [tensor_of(graph, stored), tensor_of(graph, bias)]
        assert tensors[0] is not None
        yield Layer(
            node, WEIGHTED[node.target], tensors[0], tensors[1], quantizer,
            shared=any(readers[id(t)] > 1 for t in tensors if t is not None),
        )  # fmt: skip


def _readers(graph: GraphModule) -> Counter[int]:
    """id of each stored tensor -> operators that read it, itself or through its quantizers."""
    count: Counter[int] = Counter()
    for node in graph.graph.nodes:
        tensor = tensor_of(graph, node) if node.op == "get_attr" else None
        if tensor is not None:
            readers = [len(u.users) if quantizer_at(graph, u) else 1 for u in node.users]
            count[id(tensor)] += sum(readers)
    return count


def quantizer_at(graph: GraphModule, node: Node) -> FakeQuant | None:
    """The quantizer that `node` calls, if it is one."""
    if node.op != "call_module":
        return None
    module = graph.get_submodule(str(node.target))
    return module if isinstance(module, FakeQuant) else None


# ---- the walk ------------------------------------------------------------------------------------


def stored_tensors(graph: GraphModule) -> dict[str, Tensor]:
    """Copies of the weights and constants of `graph`; a later walk takes them as the float ones."""
    nodes = [node for node in graph.graph.nodes if node.op == "get_attr"]
    return {
        str(n.target): t.detach().clone() for n in nodes if (t := tensor_of(graph, n)) is not None
    }


def walk(
    graph: GraphModule, floats: Mapping[str, Tensor], batches: Sequence[Inputs]
) -> Iterator[tuple[Layer, list[Tensor], list[Tensor]]]:
    """Each layer of a calibrated graph with what it reads in integers and should give.

    One pass, operator by operator, all samples at each. Whoever is given a layer may change its
    weight and bias; later layers then read what the changed one gives. Samples are as many of the
    first ones as fit into `WALK_BYTES`, both computations counted.

    Args:
        floats: the weights of the float network, from `stored_tensors`.
        batches: of the graph's inputs, (N, ...) each.

    Yields:
        the layer, its inputs x̂ from the quantized layers before it, and its outputs y of the
        float network; a list over batches.
    """
    at = {layer.node: layer for layer in layers(graph)}
    last_uses = _last_uses(graph)
    batches = _affordable(graph, batches)
    exact: dict[Node, list[Any]] = {}
    quantized: dict[Node, list[Any]] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            return
        exact[node] = _evaluate(graph, node, exact, batches, floats)
        if layer := at.get(node):
            yield layer, quantized[layer.input], exact[node]
            weight = arguments(node)[1]
            quantized[weight] = _evaluate(graph, weight, quantized, batches)
        quantized[node] = _evaluate(graph, node, quantized, batches)
        for done in last_uses[node]:
            del exact[done], quantized[done]


def _evaluate(
    graph: GraphModule,
    node: Node,
    values: Mapping[Node, list[Any]],
    batches: Sequence[Inputs],
    floats: Mapping[str, Tensor] | None = None,
) -> list[Any]:
    """`node`'s value for each batch; with `floats` in their place and no quantizer, in float."""
    if node.op == "placeholder":
        place = graph.graph.find_nodes(op="placeholder").index(node)
        return [inputs[place] for inputs in batches]
    if node.op == "get_attr":
        own = attrgetter(str(node.target))(graph)
        return [own if floats is None else floats.get(str(node.target), own)] * len(batches)
    quantizer = quantizer_at(graph, node)
    if quantizer is not None and floats is not None:
        return values[arguments(node)[0]]
    call: Any = quantizer or node.target
    with torch.no_grad():
        if quantizer is not None and arguments(node)[0].op == "get_attr":
            return [call(tensor_of(graph, arguments(node)[0]))] * len(batches)
        return [
            call(*map_arg(node.args, lambda n: values[n][i]),  # noqa: B023  # used up within the turn
                 **map_arg(node.kwargs, lambda n: values[n][i]))  # noqa: B023
            for i in range(len(batches))
        ]  # fmt: skip


def _last_uses(graph: GraphModule) -> Mapping[Node, list[Node]]:
    """Node -> the nodes that nothing behind it reads."""
    last: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        for source in (node, *node.all_input_nodes):
            last[source] = node
    done: dict[Node, list[Node]] = defaultdict(list)
    for source, node in last.items():
        done[node].append(source)
    return done


def _affordable(graph: GraphModule, batches: Sequence[Inputs]) -> list[Inputs]:
    """The first samples, as many as `WALK_BYTES` hold, one at least."""
    last_uses = _last_uses(graph)
    alive = peak = 1
    for node in graph.graph.nodes:
        alive += 2 * _sample_bytes(node)
        peak = max(peak, alive)
        alive -= 2 * sum(map(_sample_bytes, last_uses[node]))
    left = max(1, WALK_BYTES // peak)
    kept = []
    for inputs in batches:
        kept.append(tuple(x[:left] for x in inputs))
        left -= len(kept[-1][0])
        if not left:
            break
    return kept


def _sample_bytes(node: Node) -> int:
    """Size of one sample of what `node` gives."""
    if node.op == "get_attr":
        return 0
    if node.op == "call_module":
        return _sample_bytes(arguments(node)[0])
    value = node.meta.get("val")
    return (
        math.prod(map(int, value.shape[1:])) * value.element_size()
        if isinstance(value, Tensor)
        else 0
    )
