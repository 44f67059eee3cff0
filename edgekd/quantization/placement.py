"""Where quantizers go: one table of operators, read with the target's scheme.

An operator that is not in the table stays in float and is counted (`left_in_float`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import operator
from collections import Counter
from collections.abc import Collection
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

from edgekd.errors import ModelError, nearest
from edgekd.quantization.canonical import ACTIVATIONS, split_silu
from edgekd.quantization.capture import WEIGHTED, arguments, tensor_of
from edgekd.quantization.fake_quant import FakeQuant
from edgekd.target import IntegerOp, QuantScheme

aten = torch.ops.aten

Kind = IntegerOp | Literal["pass"]

KINDS: dict[Any, Kind] = {
    aten.conv1d.default: "conv",
    aten.conv1d.padding: "conv",
    aten.conv2d.default: "conv",
    aten.conv2d.padding: "conv",
    aten.conv3d.default: "conv",
    aten.conv3d.padding: "conv",
    aten.conv_transpose1d.default: "conv_transpose",
    aten.conv_transpose2d.input: "conv_transpose",
    aten.conv_transpose3d.input: "conv_transpose",
    aten.linear.default: "linear",
    aten.matmul.default: "matmul",
    aten.bmm.default: "matmul",
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.sigmoid.default: "sigmoid",
    aten.cat.default: "concat",
    aten.avg_pool2d.default: "pool",
    aten.adaptive_avg_pool2d.default: "pool",
    # "pass": the integers of the input are the integers of the output
    aten.max_pool2d.default: "pass",
    aten.flatten.using_ints: "pass",
    aten.unflatten.int: "pass",
    aten.reshape.default: "pass",
    aten.squeeze.dim: "pass",
    aten.squeeze.dims: "pass",
    aten.unsqueeze.default: "pass",
    aten.permute.default: "pass",
    aten.transpose.int: "pass",
    aten.slice.Tensor: "pass",
    aten.select.int: "pass",
    aten.pixel_shuffle.default: "pass",
    aten.pixel_unshuffle.default: "pass",
    aten.channel_shuffle.default: "pass",
    aten.upsample_nearest2d.vec: "pass",
    aten.pad.default: "pass",
    aten.constant_pad_nd.default: "pass",
}
WHOLE_POOL = aten.adaptive_avg_pool2d.default
# they move numbers, or repeat them
MOVING = {op for op, kind in KINDS.items() if kind == "pass"} | {
    aten.expand.default, aten.clone.default, aten.split.Tensor, aten.unbind.int, aten.roll.default,
    aten.repeat.default,
}  # fmt: skip
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
# with channels last in torch, they may be computed with channels first
ON_CHANNELS = {aten.layer_norm.default, aten.linear.default, aten.reshape.default, *ACTIVATIONS}
# kinds whose kernels multiply: what "runs in integers" is about
MATRIX: tuple[Kind, ...] = ("conv", "conv_transpose", "linear", "matmul")
# kinds that a convolution's kernel takes along, see `QuantScheme.add_inputs`
SUMS: tuple[Kind, ...] = ("add", "sub")
# kinds whose kernel takes the activation behind them along
FUSING: tuple[Kind, ...] = ("conv", "conv_transpose", "linear", *SUMS)
# kinds that are cheap: worth it in integers only where integers come in
FOLLOWING: tuple[Kind, ...] = (*SUMS, "mul", "sigmoid", "concat", "pool")
UNARY: tuple[Kind, ...] = ("sigmoid", "pool")


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


def operator_name(node: Node) -> str:
    """`gelu` of `aten.gelu.default`, as `QuantScheme.fused_activations` names it."""
    name = getattr(node.target, "__name__", str(node.target))
    return str(name).partition(".")[0]


def fused_activation(node: Node) -> Node:
    """The ReLU or ReLU6 that runs inside `node`'s kernel, else `node`."""
    users = list(node.users)
    if len(users) == 1 and upper_bound(users[0]) is not None:
        return users[0]
    return node


def layer_name(node: Node) -> str:
    """What a layer is called in reports and in `float_layers`: the module that owns its weight.

    An operator without a weight goes by its name in the captured graph.
    """
    if node.target in WEIGHTED:
        weight = arguments(node)[1]
        if weight.op == "call_module":  # its quantizer
            weight = arguments(weight)[0]
        if weight.op == "get_attr":
            return str(weight.target).rpartition(".")[0]
    return node.name


class SchemeQuantizer(Quantizer):  # type: ignore[misc]  # torchao ships no types
    """Annotates a captured graph for one `QuantScheme`, operator by operator.

    Args:
        float_layers: names of layers that stay in float, see `layer_name`.
    """

    def __init__(self, scheme: QuantScheme, float_layers: Collection[str] = ()) -> None:
        self.scheme = scheme
        self.float_layers = frozenset(float_layers)
        self._specs: dict[Node, QuantizationSpec] = {}
        self._kinds: dict[Node, Kind | None] = {}
        self._varying: set[Node] = set()  # what depends on an input of the network
        self._repeated: set[Node] = set()  # of these, what depends on nothing but its shape

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark every operator of the table with the quantizers it wants.

        Raises:
            ModelError: `float_layers` names no operator of the table.
        """
        layers = {layer_name(n) for n in model.graph.nodes if n.target in KINDS}
        for name in sorted(self.float_layers - layers):
            raise ModelError(f"float_layers: no layer {name!r}{nearest(name, layers)}")
        for node in model.graph.nodes:
            sources = self._varying.intersection(node.all_input_nodes)
            if node.op == "placeholder" or sources:
                self._varying.add(node)
            counts = isinstance(node.meta.get("val"), torch.SymInt)
            if sources and (sources <= self._repeated or counts):
                self._repeated.add(node)
        for node in model.graph.nodes:
            kind = self._kind(node)
            node.meta["integer_kind"] = kind
            if kind is not None:
                self._annotate(model, node, kind)
                if self._activated(node, kind):
                    next(iter(node.users)).meta["runs_inside"] = True
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what is not annotated stays in float."""

    # ---- which operators ---------------------------------------------------------------------

    def _kind(self, node: Node) -> Kind | None:
        if node not in self._kinds:
            self._kinds[node] = self._decide(node)
        return self._kinds[node]

    def _decide(self, node: Node) -> Kind | None:
        kind = KINDS.get(node.target)
        if kind == "pass":
            # worth it only on the way to an integer operator
            moves = _passes(node) and node in self._varying
            leads = any(map(self._kind, node.users)) or (
                self.scheme.integer_outputs and _ends(node)
            )
            return "pass" if moves and leads and not self._joins(node) else None
        if kind is None or kind not in self.scheme.ops or layer_name(node) in self.float_layers:
            return None
        args = arguments(node)
        if node.target in WEIGHTED:
            # on constants, as a positional encoding is, the exporter computes it beforehand, and on
            # those repeated for each image a runtime does
            runs = args[1].op == "get_attr" and args[0] in self._varying - self._repeated
            return kind if runs and not (kind == "conv" and self._too_few(args[0])) else None
        terms = args[0] if kind == "concat" else args[: 1 if kind in UNARY else 2]
        if not all(isinstance(t, Node) and t in self._varying for t in terms):
            return None
        if kind in FOLLOWING and not any(self._kind(self._source(t)) for t in terms):
            return None
        return kind

    def _too_few(self, x: Node) -> bool:
        _, channels, *sides = x.meta["val"].shape
        return channels < self.scheme.least_pooled_channels and all(side == 1 for side in sides)

    def _source(self, node: Node) -> Node:
        """The operator whose numbers `node` passes on, by itself or as a fused activation."""
        while node.op == "call_function":
            moves = KINDS.get(node.target) == "pass" and _passes(node)
            if not moves and (upper_bound(node) is None or not _fuses(arguments(node)[0])):
                break
            node = arguments(node)[0]
        return node

    # ---- how each is quantized ---------------------------------------------------------------

    def _annotate(self, model: GraphModule, node: Node, kind: Kind) -> None:
        args = arguments(node)
        inputs: dict[Node, Any] = {s: self._activation(s) for s in self._inputs(node, kind)}
        if node.target in WEIGHTED:
            inputs[args[1]] = self._weight(model, node)
        last = fused_activation(node) if kind in FUSING else node
        output = None
        if self._shares(node, kind):
            first, *others = inputs
            shared = SharedQuantizationSpec((first, node))
            inputs |= dict.fromkeys(others, shared)
            output = shared
        elif kind == "pass":
            output = SharedQuantizationSpec((args[0], node))
        elif self._wants_output(last, kind):
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
        if kind not in (*SUMS, "mul", "matmul"):
            return [args[0]]
        return [t for t in args[:2] if not (kind in SUMS and self._joins(t))]

    def _joins(self, node: Node) -> bool:
        """Whether `node` is on the way from a convolution to the Add that it is fused into.

        The main branch is the first term by convention; one convolution is fused, not two.
        """
        if self.scheme.add_inputs == "both" or len(node.users) != 1:
            return False
        (add,) = node.users
        if KINDS.get(add.target) == "pass":
            return self._joins(add)
        if self._kind(add) not in SUMS:
            return False
        return next(filter(self._takes_sum, arguments(add)[:2]), None) is node

    def _takes_sum(self, node: Node) -> bool:
        """Whether a convolution's kernel gives `node`, and may give the sum with it instead."""
        way, kind = [node], "conv"
        if self.scheme.add_inputs == "skip-activated" and upper_bound(node) is not None:
            way.append(arguments(node)[0])
        elif self.scheme.linear_as_conv and _turns_back(node):
            kind = "linear"
            while KINDS.get(way[-1].target) == "pass":
                way.append(arguments(way[-1])[0])
        alone = all(len(each.users) == 1 for each in way)
        return alone and KINDS.get(way[-1].target) == kind == self._kind(way[-1])

    def _shares(self, node: Node, kind: Kind) -> bool:
        """Whether the inputs and the output of `node` have one scale."""
        if kind == "concat" and "concat-alike" in self.scheme.shared_scales:
            return len({_nonnegative(term) for term in arguments(node)[0]}) == 1
        return kind in self.scheme.shared_scales and node.target is not WHOLE_POOL

    def _wants_output(self, node: Node, kind: Kind) -> bool:
        if self.scheme.integer_outputs and all(map(_ends, node.users)):
            return True
        floats = kind == "matmul" and self.scheme.symmetric_matmul
        return self.scheme.outputs and not (
            floats or self._leaves(node, kind) or self._joins(node) or self._activated(node, kind)
        )

    def _activated(self, node: Node, kind: Kind) -> bool:
        """Whether the activation behind `node` runs inside its kernel, on its sums."""
        users = list(node.users)
        return (
            kind in ("conv", "linear")
            and len(users) == 1
            and operator_name(users[0]) in self.scheme.fused_activations
        )

    def _leaves(self, node: Node, kind: Kind) -> bool:
        """A linear layer may give floats: the network's output, reshaped or not, or where asked."""
        if self.scheme.linear_gives_float and KINDS.get(node.target) == "linear":
            return not any(map(self._kind, node.users))
        return kind == "linear" and all(map(_ends, node.users))

    def _activation(self, node: Node) -> QuantizationSpec:
        """One spec for one tensor, so that producer and consumers share one quantizer."""
        root = node
        while self._kind(root) == "pass":
            root = arguments(root)[0]
        if root not in self._specs:
            bound = upper_bound(root)
            symmetric = (self.scheme.symmetric_matmul and self._is_factor(root)) or (
                self.scheme.symmetric_norms and _is_normalized(root)
            )
            dtype = torch.int8 if symmetric else getattr(torch, self.scheme.activation_dtype)
            self._specs[root] = QuantizationSpec(
                dtype=dtype,
                observer_or_fake_quant_ctr=FakeQuant.with_args(
                    dtype=dtype,
                    symmetric=symmetric or self.scheme.activation_symmetric,
                    max_value=None if bound is None or bound == float("inf") else bound,
                    fixed_scale=self._fixed_scale(root),
                ),
            )
        return self._specs[root]

    def _is_factor(self, node: Node) -> bool:
        """Whether a matrix product reads `node`, moved or not, and it may be below 0."""
        return node.target is not aten.softmax.int and any(
            self._kind(user) == "matmul" or (self._kind(user) == "pass" and self._is_factor(user))
            for user in node.users
        )

    def _fixed_scale(self, node: Node) -> float | None:
        """LiteRT's 8-bit specification, LOGISTIC: the output's scale is 1 / 256."""
        fixed = "sigmoid" in self.scheme.fixed_scales and node.target is aten.sigmoid.default
        return 1 / 256 if fixed else None

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


def _passes(node: Node) -> bool:
    """Whether a "pass" operator does so with these arguments: a Pad of other than 0 does not."""
    return not ("pad" in str(node.target) and any(arguments(node)[3:]))


def _turns_back(node: Node) -> bool:
    """Whether `node` ends what the export computes with channels first, see `turn_maps`."""
    if not _permutes(node, TO_FIRST):
        return False
    region = [arguments(node)[0]]
    for each in region:
        if not _permutes(each, TO_LAST):
            if each.target not in ON_CHANNELS:
                return False
            sources = [source for source in each.all_input_nodes if source.op != "get_attr"]
            region += [source for source in sources if source not in region]
    return all(
        user in region or _permutes(user, TO_FIRST) for each in region for user in each.users
    )


def _permutes(node: Node, axes: tuple[int, ...]) -> bool:
    return node.target is aten.permute.default and tuple(arguments(node)[1]) == axes


def _is_normalized(node: Node) -> bool:
    """Whether a vector norm reads `node`, moved or joined or not, and it may be below 0."""
    return any(
        _is_normalized(user)
        if user.target in (*MOVING, aten.cat.default, operator.getitem)
        else user.target is aten.linalg_vector_norm.default and not _nonnegative(node)
        for user in node.users
    )


def _nonnegative(node: Node) -> bool:
    """Whether `node` is known to give nothing below 0: its zero point is 0."""
    if upper_bound(node) is not None or node.target in (aten.sigmoid.default, aten.softmax.int):
        return True
    keeps = node.target in MOVING or KINDS.get(node.target) in ("add", "mul", "concat", "pool")
    return keeps and all(map(_nonnegative, node.all_input_nodes))


def _ends(node: Node) -> bool:
    """Whether what `node` gives only moves on its way out of the network."""
    return node.op == "output" or (node.target in MOVING and all(map(_ends, node.users)))


def _fuses(node: Node) -> bool:
    """Whether `node`'s kernel takes the activation behind it along."""
    return len(node.users) == 1 and KINDS.get(node.target) in FUSING


def place(
    graph_module: GraphModule, scheme: QuantScheme, float_layers: Collection[str] = ()
) -> GraphModule:
    """The captured graph with a `FakeQuant` wherever the scheme wants integers.

    Args:
        graph_module: used up: give a copy of one that is needed still.
        float_layers: layers that stay in float all the same, by `layer_name`.
    """
    if "sigmoid" in scheme.ops:
        split_silu(graph_module.graph)
    prepared = prepare_pt2e(graph_module, SchemeQuantizer(scheme, float_layers))
    assert isinstance(prepared, GraphModule)
    return prepared


def training_graph(placed: GraphModule) -> GraphModule:
    """The placed graph as it is trained; its parameters and quantizers are those of `placed`.

    A ReLU or ReLU6 that only a quantizer reads is left to the quantizer, which clips anyway: the
    same numbers with a pass less over the tensor each way, a tenth of a step. Gradients are the
    same too, but for a scale behind a ReLU6: above 6, it is the quantizer now that clips.
    """
    graph = copy.deepcopy(placed.graph)
    for node in list(graph.nodes):
        bound = upper_bound(node) if node.op == "call_function" else None
        if bound is None or any(user.op != "call_module" for user in node.users):
            continue
        for reader in list(node.users):
            if isinstance(placed.get_submodule(str(reader.target)), FakeQuant):
                reader.args, reader.kwargs = (arguments(node)[0],), {"clip": bound}
        if not node.users:
            graph.erase_node(node)
    return GraphModule(placed, graph)


def input_scales(placed: GraphModule) -> list[torch.Tensor]:
    """Scales of the network's inputs, which training leaves as they were calibrated.

    To learn them, the first layer would have to compute gradients of images, at the highest
    resolution that the network has.
    """
    readers = (user for node in placed.graph.find_nodes(op="placeholder") for user in node.users)
    modules = (placed.get_submodule(str(r.target)) for r in readers if r.op == "call_module")
    return [module.scale for module in modules if isinstance(module, FakeQuant)]


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
    count: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.meta.get("integer_kind") is not None:
            continue
        fused = node.meta.get("runs_inside") or (
            upper_bound(node) is not None and arguments(node)[0].meta.get("integer_kind")
        )
        if not (
            fused or node.target in MOVING or not isinstance(node.meta.get("val"), torch.Tensor)
        ):
            count[operator_name(node)] += 1
    return count


def intended_matrix_ops(graph_module: GraphModule) -> int:
    """How many convolutions and matrix products of a placed graph the scheme has in integers."""
    return sum(node.meta.get("integer_kind") in MATRIX for node in graph_module.graph.nodes)


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
                if q.fixed_scale is not None:
                    rows[-1].append(q.fixed_scale)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
