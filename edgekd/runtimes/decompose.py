"""Operators that a runtime lacks, in terms of older and simpler ones that it has.

Each function replaces one node by its definition and says whether it could; what it writes is valid
at opset 18 and is lowered from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from edgekd.runtimes.onnx_values import constant

LARGEST = 1 << 24  # elements of a tensor that folding may make


def decompose(model: ir.Model, supported: Collection[str]) -> int:
    """Replace what is not in `supported` and has a definition here; how many nodes that were."""
    count = 0
    while wanting := [
        node
        for node in model.graph
        if node.domain in ("", "ai.onnx") and node.op_type not in supported
        and node.op_type in DEFINITIONS and DEFINITIONS[node.op_type](model.graph, node)
    ]:  # fmt: skip  # a definition may itself use what is lacking
        count += len(wanting)
    return count


def fold_constants(model: ir.Model) -> None:
    """Compute what depends on constants and known shapes only; quantized weights stay as they are.

    Tensors of more than 2^24 elements are left for the runtime.
    """
    from onnxscript.optimizer import fold_constants as fold

    fold(
        model, input_size_limit=LARGEST, output_size_limit=LARGEST,
        should_fold=lambda node: FOLDED.get(node.op_type),
    )  # fmt: skip


# the folder would do the opposite
FOLDED = {"ConstantOfShape": True, "QuantizeLinear": False, "DequantizeLinear": False}


class _Writer(ir.tape.Tape):
    """Nodes in the place of one; `ops.op("Mul", [a, b])` adds the next."""

    def scalar(self, number: float, like: ir.Value | None) -> ir.Value:
        """`number` in the element type of `like`, float where that is unknown."""
        dtype = None if like is None else like.dtype
        array = np.array(number, (dtype or ir.DataType.FLOAT).numpy())
        return self.op("Constant", [], {"value": ir.tensor(array)})

    def integers(self, *numbers: int) -> ir.Value:
        """A list of integers: a shape, axes."""
        return self.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})

    def replace(self, graph: ir.Graph, node: ir.Node, by: ir.Value) -> bool:
        """Put what was written in the place of `node`, whose one output `by` becomes."""
        last = by.producer()
        assert last is not None
        last.name = node.name
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], self.nodes, node.outputs[:1], [by]
        )
        return True


def _one_output(node: ir.Node) -> bool:
    """Whether nothing reads the outputs behind the first."""
    return not any(o.consumers() or o.is_graph_output() for o in node.outputs[1:])


def _standardised(ops: _Writer, x: ir.Value, axes: tuple[int, ...], epsilon: float) -> ir.Value:
    """x less its mean over `axes`, over its standard deviation there."""
    where = ops.integers(*axes)
    centred = ops.op("Sub", [x, ops.op("ReduceMean", [x, where])])
    variance = ops.op("ReduceMean", [ops.op("Mul", [centred, centred]), where])
    deviation = ops.op("Sqrt", [ops.op("Add", [variance, ops.scalar(epsilon, x)])])
    return ops.op("Div", [centred, deviation])


def _layer_normalization(graph: ir.Graph, node: ir.Node) -> bool:
    """Mean and variance over the axes from `axis` on."""
    x, axis = node.inputs[0], node.attributes.get_int("axis", -1)
    if x is None or not _one_output(node):
        return False
    if axis >= 0:
        if x.shape is None:
            return False
        axis -= len(x.shape)
    ops = _Writer()
    y = _standardised(ops, x, tuple(range(axis, 0)), node.attributes.get_float("epsilon", 1e-5))
    y = ops.op("Mul", [y, node.inputs[1]])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        y = ops.op("Add", [y, node.inputs[2]])
    return ops.replace(graph, node, y)


def _group_normalization(graph: ir.Graph, node: ir.Node) -> bool:
    """Each group is one channel of an InstanceNormalization; then scale and bias.

    They are per group before opset 21, per channel from there on.
    """
    x, scale, bias = node.inputs
    groups = node.attributes.get_int("num_groups", 0)
    if x is None or x.shape is None or scale is None or scale.shape is None:
        return False
    channels, given = x.shape[1], scale.shape[0]
    if not isinstance(channels, int) or given not in (groups, channels):
        return False
    ops = _Writer()
    ones, zeros = (
        ops.op("Constant", [], {"value": ir.tensor(np.full(groups, v, np.float32))}) for v in (1, 0)
    )
    y = ops.op(
        "InstanceNormalization",
        [ops.op("Reshape", [x, ops.integers(0, groups, -1)]), ones, zeros],
        {"epsilon": node.attributes.get_float("epsilon", 1e-5)},
    )
    if given == channels:
        y, wide = ops.op("Reshape", [y, ops.op("Shape", [x])]), (-1, *[1] * (len(x.shape) - 2))
    else:
        wide = (-1, 1)
    for op_type, value in (("Mul", scale), ("Add", bias)):
        y = ops.op(op_type, [y, ops.op("Reshape", [value, ops.integers(*wide)])])
    if given != channels:
        y = ops.op("Reshape", [y, ops.op("Shape", [x])])
    return ops.replace(graph, node, y)


def _gelu(graph: ir.Graph, node: ir.Node) -> bool:
    """x · Φ(x), Φ by erf or by its approximation with tanh: arXiv:1606.08415 §2."""
    x, ops = node.inputs[0], _Writer()
    if node.attributes.get_string("approximate", "none") == "tanh":
        cubed = ops.op("Mul", [ops.op("Mul", [x, x]), x])
        inner = ops.op("Add", [x, ops.op("Mul", [cubed, ops.scalar(0.044715, x)])])
        bent = ops.op("Tanh", [ops.op("Mul", [inner, ops.scalar(math.sqrt(2 / math.pi), x)])])
    else:
        bent = ops.op("Erf", [ops.op("Mul", [x, ops.scalar(math.sqrt(0.5), x)])])
    half = ops.op("Mul", [x, ops.scalar(0.5, x)])
    return ops.replace(graph, node, ops.op("Mul", [half, ops.op("Add", [bent, ops.scalar(1, x)])]))


def _hard_swish(graph: ir.Graph, node: ir.Node) -> bool:
    """x · HardSigmoid(x), as it is defined."""
    x, ops = node.inputs[0], _Writer()
    gate = ops.op("HardSigmoid", [x], {"alpha": 1 / 6, "beta": 0.5})
    return ops.replace(graph, node, ops.op("Mul", [x, gate]))


def _mish(graph: ir.Graph, node: ir.Node) -> bool:
    """x · tanh(softplus(x))."""
    x, ops = node.inputs[0], _Writer()
    return ops.replace(graph, node, ops.op("Mul", [x, ops.op("Tanh", [ops.op("Softplus", [x])])]))


def _reciprocal(graph: ir.Graph, node: ir.Node) -> bool:
    x, ops = node.inputs[0], _Writer()
    return ops.replace(graph, node, ops.op("Div", [ops.scalar(1, x), x]))


def _mod(graph: ir.Graph, node: ir.Node) -> bool:
    """Of integers: the remainder has the divisor's sign, Div rounds towards zero.

    Of floats there is no exact form: a quotient may round to the next integer.
    """
    a, b = node.inputs
    if a is None or a.dtype is None or not a.dtype.is_integer():
        return False
    ops = _Writer()

    def rest(value: ir.Value) -> ir.Value:
        whole = ops.op("Mul", [ops.op("Div", [value, b]), b])
        return ops.op("Sub", [value, whole])

    y = rest(a)
    if not node.attributes.get_int("fmod", 0):
        y = rest(ops.op("Add", [y, b]))
    return ops.replace(graph, node, y)


def _xor(graph: ir.Graph, node: ir.Node) -> bool:
    """One of them, and not both."""
    ops = _Writer()
    both = ops.op("Not", [ops.op("And", node.inputs)])
    return ops.replace(graph, node, ops.op("And", [ops.op("Or", node.inputs), both]))


def _cast_like(graph: ir.Graph, node: ir.Node) -> bool:
    like = node.inputs[1]
    if like is None or like.dtype is None:
        return False
    ops = _Writer()
    return ops.replace(graph, node, ops.op("Cast", [node.inputs[0]], {"to": like.dtype}))


def _trilu(graph: ir.Graph, node: ir.Node) -> bool:
    """A choice by a constant triangle, where height and width are known."""
    x = node.inputs[0]
    k = constant(node.inputs[1]) if len(node.inputs) > 1 else np.array(0)
    if x is None or x.shape is None or k is None:
        return False
    height, width = x.shape[-2:]
    if not isinstance(height, int) or not isinstance(width, int):
        return False
    upper = node.attributes.get_int("upper", 1)
    kept = (np.triu if upper else np.tril)(np.ones((height, width), np.bool_), int(k))
    ops = _Writer()
    mask = ops.op("Constant", [], {"value": ir.tensor(kept)})
    return ops.replace(graph, node, ops.op("Where", [mask, x, ops.scalar(0, x)]))


def _hard_sigmoid(graph: ir.Graph, node: ir.Node) -> bool:
    """max(0, min(1, α · x + β))."""
    x, ops = node.inputs[0], _Writer()
    alpha, beta = (node.attributes.get_float(n, d) for n, d in (("alpha", 0.2), ("beta", 0.5)))
    line = ops.op("Add", [ops.op("Mul", [x, ops.scalar(alpha, x)]), ops.scalar(beta, x)])
    return ops.replace(graph, node, ops.op("Clip", [line, ops.scalar(0, x), ops.scalar(1, x)]))


def _swish(graph: ir.Graph, node: ir.Node) -> bool:
    """x · sigmoid(α · x)."""
    x, ops, alpha = node.inputs[0], _Writer(), node.attributes.get_float("alpha", 1.0)
    inner = x if alpha == 1 else ops.op("Mul", [x, ops.scalar(alpha, x)])
    return ops.replace(graph, node, ops.op("Mul", [x, ops.op("Sigmoid", [inner])]))


def _softplus(graph: ir.Graph, node: ir.Node) -> bool:
    """max(x, 0) + log(1 + exp(−|x|)), which never overflows."""
    x, ops = node.inputs[0], _Writer()
    small = ops.op("Exp", [ops.op("Neg", [ops.op("Abs", [x])])])
    rest = ops.op("Log", [ops.op("Add", [small, ops.scalar(1, x)])])
    return ops.replace(graph, node, ops.op("Add", [ops.op("Relu", [x]), rest]))


def _thresholded_relu(graph: ir.Graph, node: ir.Node) -> bool:
    x, ops, alpha = node.inputs[0], _Writer(), node.attributes.get_float("alpha", 1.0)
    above = ops.op("Greater", [x, ops.scalar(alpha, x)])
    return ops.replace(graph, node, ops.op("Where", [above, x, ops.scalar(0, x)]))


def _rms_normalization(graph: ir.Graph, node: ir.Node) -> bool:
    """x over the root of its mean square over the axes from `axis` on: arXiv:1910.07467."""
    x, axis = node.inputs[0], node.attributes.get_int("axis", -1)
    if x is None or (axis >= 0 and x.shape is None):
        return False
    if axis >= 0 and x.shape is not None:
        axis -= len(x.shape)
    ops = _Writer()
    mean = ops.op("ReduceMean", [ops.op("Mul", [x, x]), ops.integers(*range(axis, 0))])
    epsilon = ops.scalar(node.attributes.get_float("epsilon", 1e-5), x)
    y = ops.op("Div", [x, ops.op("Sqrt", [ops.op("Add", [mean, epsilon])])])
    return ops.replace(graph, node, ops.op("Mul", [y, node.inputs[1]]))


def _instance_normalization(graph: ir.Graph, node: ir.Node) -> bool:
    """Mean and variance of each channel of each sample."""
    x = node.inputs[0]
    if x is None or x.shape is None:
        return False
    ops, axes = _Writer(), tuple(range(2, len(x.shape)))
    y = _standardised(ops, x, axes, node.attributes.get_float("epsilon", 1e-5))
    for op_type, value in zip(("Mul", "Add"), node.inputs[1:], strict=True):
        wide = ops.op("Reshape", [value, ops.integers(-1, *[1] * len(axes))])
        y = ops.op(op_type, [y, wide])
    return ops.replace(graph, node, y)


def _over_the_map(reduction: str) -> Callable[[ir.Graph, ir.Node], bool]:
    def define(graph: ir.Graph, node: ir.Node) -> bool:
        x = node.inputs[0]
        if x is None or x.shape is None:
            return False
        ops = _Writer()
        axes = ops.integers(*range(2, len(x.shape)))
        return ops.replace(graph, node, ops.op(reduction, [x, axes]))

    return define


def _one_hot(graph: ir.Graph, node: ir.Node) -> bool:
    """Integer indices against 0 … depth − 1, where depth is known; −1 is the last class."""
    x, depth = node.inputs[0], constant(node.inputs[1])
    if x is None or x.shape is None or x.dtype is None or depth is None:
        return False
    if not x.dtype.is_integer() or not x.dtype.is_signed():
        return False
    axis, count = node.attributes.get_int("axis", -1), int(depth.item())
    axis = axis if axis >= 0 else axis + len(x.shape) + 1
    ops = _Writer()
    classes = np.arange(count, dtype=x.dtype.numpy())
    classes = classes.reshape(-1, *[1] * (len(x.shape) - axis))
    index = ops.op("Unsqueeze", [x, ops.integers(axis)])
    hits = [
        ops.op("Equal", [index, ops.op("Constant", [], {"value": ir.tensor(numbers)})])
        for numbers in (classes, classes - count)
    ]
    off, on = (
        ops.op(
            "Gather", [node.inputs[2], ops.op("Constant", [], {"value": ir.tensor(np.array(i))})]
        )
        for i in (0, 1)
    )
    return ops.replace(graph, node, ops.op("Where", [ops.op("Or", hits), on, off]))


DEFINITIONS: dict[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "CastLike": _cast_like,
    "Gelu": _gelu,
    "GlobalAveragePool": _over_the_map("ReduceMean"),
    "GlobalMaxPool": _over_the_map("ReduceMax"),
    "GroupNormalization": _group_normalization,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "Mish": _mish,
    "Mod": _mod,
    "OneHot": _one_hot,
    "RMSNormalization": _rms_normalization,
    "Reciprocal": _reciprocal,
    "Softplus": _softplus,
    "Swish": _swish,
    "ThresholdedRelu": _thresholded_relu,
    "Trilu": _trilu,
    "Xor": _xor,
}
