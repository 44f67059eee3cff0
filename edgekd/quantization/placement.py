"""Where quantizers go: one table of operators, read with the target's scheme.

An operator that is not in the table stays in float and is counted (`left_in_float`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from edgekd.quantization.capture import WEIGHTED, arguments, tensor_of
from edgekd.quantization.fake_quant import FakeQuant
from edgekd.target import QuantScheme

aten = torch.ops.aten

Kind = Literal["conv", "linear", "add", "concat", "pool", "pass"]

KINDS: dict[Any, Kind] = {
    aten.conv1d.default: "conv",
    aten.conv2d.default: "conv",
    aten.conv2d.padding: "conv",
    aten.conv3d.default: "conv",
    aten.linear.default: "linear",
    aten.add.Tensor: "add",
    aten.cat.default: "concat",
    aten.avg_pool2d.default: "pool",
    aten.adaptive_avg_pool2d.default: "pool",
    aten.mean.dim: "pool",
    # "pass": the integers of the input are the integers of the output
    aten.max_pool2d.default: "pass",
    aten.flatten.using_ints: "pass",
    aten.reshape.default: "pass",
    aten.view.default: "pass",
    aten.squeeze.dims: "pass",
    aten.pad.default: "pass",
    aten.constant_pad_nd.default: "pass",
}


FUSING = ("conv", "linear", "add")  # kinds whose kernel takes the activation behind them along


def upper_bound(node: Node) -> float | None:
    """Where this activation clips from above, given that it clips from below at 0.

    inf for ReLU, 6 for ReLU6, None if `node` is neither, and then does not fuse.
    """
    if node.target is aten.relu.default:
        return float("inf")
    if node.target is aten.relu6.default:
        return 6.0
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        low, high = (*arguments(node)[1:3], None, None)[:2]
        if low == 0:
            return float("inf") if high is None else float(high)
    return None


class SchemeQuantizer(Quantizer):  # type: ignore[misc]  # torchao ships no types
    """Annotates a captured graph for one `QuantScheme`, operator by operator."""

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme
        self._specs: dict[Node, QuantizationSpec] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark every operator of the table with the quantizers it wants."""
        for node in model.graph.nodes:
            kind = self._kind(node)
            if kind is not None:
                self._annotate(model, node, kind)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what is not annotated stays in float."""

    # ---- which operators ---------------------------------------------------------------------

    def _kind(self, node: Node) -> Kind | None:
        kind = KINDS.get(node.target)
        if kind == "pass":
            # worth it only on the way to an integer operator
            zero_pad = not ("pad" in str(node.target) and any(arguments(node)[3:]))
            wanted = zero_pad and any(self._kind(user) for user in node.users)
            return "pass" if wanted else None
        if kind is None or kind not in self.scheme.ops:
            return None
        if kind in ("conv", "linear") and arguments(node)[1].op != "get_attr":
            return None
        if kind == "add" and not self._adds_integers(node):
            return None
        return kind

    def _adds_integers(self, node: Node) -> bool:
        """Two activations, at least one of them out of an integer operator."""
        terms = arguments(node)[:2]
        if not all(isinstance(t, Node) and t.op != "get_attr" for t in terms):
            return False
        return any(self._kind(self._source(t)) for t in terms)

    def _source(self, node: Node) -> Node:
        """The operator before a fused activation, else the node itself."""
        if upper_bound(node) is not None:
            before: Node = arguments(node)[0]
            if len(before.users) == 1 and KINDS.get(before.target) in FUSING:
                return before
        return node

    # ---- how each is quantized ---------------------------------------------------------------

    def _annotate(self, model: GraphModule, node: Node, kind: Kind) -> None:
        args = arguments(node)
        inputs: dict[Node, Any] = {s: self._activation(s) for s in self._inputs(node, kind)}
        if kind in ("conv", "linear"):
            inputs[args[1]] = self._weight(model, node)
        last = self._fused_activation(node) if kind in FUSING else node
        output = None
        if kind == "pass":
            output = SharedQuantizationSpec((args[0], node))
        elif self.scheme.outputs and not self._leaves(last, kind):
            output = self._activation(last)
        if last is node:
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=inputs, output_qspec=output, _annotated=True
            )
        else:
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=inputs, _annotated=True
            )
            last.meta["quantization_annotation"] = QuantizationAnnotation(
                output_qspec=output, _annotated=True
            )

    def _inputs(self, node: Node, kind: Kind) -> list[Node]:
        """The activations that are quantized on the way into `node`."""
        args = arguments(node)
        if kind == "concat":
            return list(args[0])
        if kind != "add":
            return [args[0]]
        terms = list(args[:2])
        if self.scheme.add_inputs == "skip":
            # the main branch is the first term by convention; one convolution is fused, not two
            fused = next((t for t in terms if self._ends_in_convolution(t)), None)
            terms = [t for t in terms if t is not fused]
        return terms

    def _ends_in_convolution(self, node: Node) -> bool:
        return self._kind(node) == "conv" and len(node.users) == 1

    def _fused_activation(self, node: Node) -> Node:
        """The ReLU or ReLU6 that runs inside `node`'s kernel, else `node`."""
        users = list(node.users)
        if len(users) == 1 and upper_bound(users[0]) is not None:
            return users[0]
        return node

    def _leaves(self, node: Node, kind: Kind) -> bool:
        """A linear layer may give the network's output in float."""
        return kind == "linear" and all(user.op == "output" for user in node.users)

    def _activation(self, node: Node) -> QuantizationSpec:
        """One spec for one tensor, so that producer and consumers share one quantizer."""
        root = node
        while self._kind(root) == "pass":
            root = arguments(root)[0]
        if root not in self._specs:
            bound = upper_bound(root)
            dtype = getattr(torch, self.scheme.activation_dtype)
            self._specs[root] = QuantizationSpec(
                dtype=dtype,
                observer_or_fake_quant_ctr=FakeQuant.with_args(
                    dtype=dtype,
                    symmetric=self.scheme.activation_symmetric,
                    max_value=None if bound is None or bound == float("inf") else bound,
                ),
            )
        return self._specs[root]

    def _weight(self, model: GraphModule, node: Node) -> QuantizationSpec:
        weight = tensor_of(model, arguments(node)[1])
        assert weight is not None
        axis = WEIGHTED[node.target]  # type: ignore[index]  # operators are its keys
        per_channel = self.scheme.weight_granularity == "channel"
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=FakeQuant.with_args(
                dtype=torch.int8,
                bits=self.scheme.weight_bits,
                symmetric=True,
                channels=weight.shape[axis] if per_channel else None,
                ch_axis=axis,
            ),
        )


def place(graph_module: GraphModule, scheme: QuantScheme) -> GraphModule:
    """A copy of the captured graph with a `FakeQuant` wherever the scheme wants integers."""
    prepared = prepare_pt2e(graph_module, SchemeQuantizer(scheme))
    assert isinstance(prepared, GraphModule)
    return prepared


def quantizers(graph_module: GraphModule) -> dict[str, FakeQuant]:
    """Name of the quantized tensor -> its quantizer, in the order of the graph."""
    found: dict[str, FakeQuant] = {}
    seen: set[int] = set()
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, FakeQuant) and id(module) not in seen:
                seen.add(id(module))
                found[arguments(node)[0].name] = module
    return found


def left_in_float(graph_module: GraphModule) -> Counter[str]:
    """Operators of a placed graph that compute in float -> how many.

    Left out are those that only move or reshape numbers, and activations that their producer's
    kernel takes along.
    """
    integer: set[Node] = set()
    count: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        kind = KINDS.get(node.target)
        fed = any(source.op == "call_module" for source in node.all_input_nodes)
        fused = upper_bound(node) is not None and arguments(node)[0] in integer
        if (kind is not None and fed) or fused:
            integer.add(node)
        elif kind != "pass" and isinstance(node.meta.get("val"), torch.Tensor):
            count[str(node.target.__name__).partition(".")[0]] += 1
    return count


def describe(operators: Counter[str]) -> str:
    """`9 hardsigmoid, 19 hardswish`."""
    return ", ".join(f"{count} {name}" for name, count in sorted(operators.items()))


def quantized_activations(graph_module: GraphModule) -> list[str]:
    """Names of the quantized activations in the order of the graph, one per fake-quantizer.

    The exported graph has one quantize operator for each, in this order.
    """
    return [
        arguments(node)[0].name
        for node in graph_module.graph.nodes
        if node.op == "call_module" and arguments(node)[0].op != "get_attr"
    ]


def digest(graph_module: GraphModule) -> str:
    """SHA-256 of the placement: each quantizer, its integers, its shape and its consumers."""
    rows = []
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            q = graph_module.get_submodule(str(node.target))
            if isinstance(q, FakeQuant):
                users = sorted(user.name for user in node.users)
                rows.append([node.args[0].name, str(q.dtype), q.low, q.high, q.max_value,
                             list(q.scale.shape), q.ch_axis, users])  # fmt: skip
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
