"""An older opset for what torch's exporter gives, proven operator by operator.

torch's own down-conversion may give up and say nothing; so models are exported at opset 18 and
lowered here. An operator whose definition has changed since the wanted opset is rewritten, or known
to have changed in its element types only, or refused.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from edgekd.errors import TargetError
from edgekd.runtimes.decompose import decompose
from edgekd.runtimes.onnx_values import constant, new_constant

EXPORTED = 18
# changed between opsets 13 and 18 in nothing but the element types that they take
SAME = {
    "Add", "Sub", "Mul", "Div", "Relu", "Identity", "Where", "Pow", "LeakyRelu", "PRelu", "CumSum",
    "BatchNormalization", "ScatterND", "ScatterElements", "GreaterOrEqual", "LessOrEqual",
}  # fmt: skip


def lower(model: ir.Model, opset: int, device: str) -> None:
    """Rewrite `model`, exported at opset 18, to `opset`, 13 or more.

    Raises:
        TargetError: an operator has no form there; the node is named.
    """
    older = {node.op_type for node in model.graph if _since(node.op_type, opset) is not None}
    decompose(model, older)
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if _since(node.op_type, opset) == _since(node.op_type, EXPORTED):
            continue
        if node.op_type in SAME:
            continue
        rewrite = REWRITES.get(node.op_type)
        if rewrite is None or not rewrite(model.graph, node):
            raise TargetError(
                f"{device} takes opset {opset}; {node.op_type} of {node.name!r} (opset "
                f"{_since(node.op_type, EXPORTED)}) has no form there: use another layer in its "
                "place"
            )
    model.opset_imports[""] = opset
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def _since(op_type: str, opset: int) -> int | None:
    """The opset that brought the definition that is valid at `opset`; None if there is none."""
    try:
        since: int = onnx.defs.get_schema(op_type, opset, "").since_version
    except onnx.defs.SchemaError:
        return None
    return since


def _without(*attributes: str) -> Callable[[ir.Graph, ir.Node], bool]:
    """Attributes that older definitions do not have, where they have their default: 0."""

    def rewrite(_: ir.Graph, node: ir.Node) -> bool:
        if any(node.attributes.get_int(name, 0) for name in attributes):
            return False
        for name in attributes:
            node.attributes.pop(name, None)
        return True

    return rewrite


def _reshape(_: ir.Graph, node: ir.Node) -> bool:
    """`allowzero` matters only where a dimension is 0."""
    shape = constant(node.inputs[1])
    if node.attributes.get_int("allowzero", 0) and (shape is None or (shape == 0).any()):
        return False
    node.attributes.pop("allowzero", None)
    return True


def _axes_to_attribute(_: ir.Graph, node: ir.Node) -> bool:
    """Reductions took their axes as an attribute."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or not len(axes):
        return len(node.inputs) < 2 and _without("noop_with_empty_axes")(_, node)
    node.attributes["axes"] = ir.AttrInt64s("axes", [int(a) for a in axes])
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)
    return True


def _split(graph: ir.Graph, node: ir.Node) -> bool:
    """`num_outputs` equal parts, the last one smaller, become a list of sizes."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        node.attributes.pop("num_outputs", None)
        return True
    axis, count = node.attributes.get_int("axis", 0), len(node.outputs)
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or not isinstance(whole := shape[axis], int):
        return False
    part = -(-whole // count)
    sizes = np.array([part] * (count - 1) + [whole - part * (count - 1)], np.int64)
    node.resize_inputs(2)
    node.replace_input_with(1, new_constant(graph, f"{node.outputs[0].name}.sizes", sizes))
    node.attributes.pop("num_outputs", None)
    return True


def _pad(_: ir.Graph, node: ir.Node) -> bool:
    """No list of axes yet."""
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return False
    return node.attributes.get_string("mode", "constant") != "wrap"


def _resize(_: ir.Graph, node: ir.Node) -> bool:
    """No antialias, no axes, and one policy for the aspect ratio."""
    policy = node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
    if "axes" in node.attributes or policy != "stretch":
        return False
    node.attributes.pop("keep_aspect_ratio_policy", None)
    return _without("antialias")(_, node)


def _shape(graph: ir.Graph, node: ir.Node) -> bool:
    """`start` and `end` become a Slice of the whole shape."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 2**31 - 1)
    node.attributes.pop("start", None)
    node.attributes.pop("end", None)
    output = node.outputs[0]
    if start == 0 and end == 2**31 - 1:
        return True
    bounds = [
        new_constant(graph, f"{output.name}.{name}", np.array([bound], np.int64))
        for name, bound in (("start", start), ("end", end))
    ]
    whole = ir.node("Shape", node.inputs, name=node.name)
    part = ir.node("Slice", [*whole.outputs, *bounds], name=f"{node.name}.part")
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [whole, part], node.outputs, part.outputs
    )
    return True


REWRITES: dict[str, Callable[[ir.Graph, ir.Node], bool]] = {
    **dict.fromkeys(
        ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
         "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"), _axes_to_attribute,
    ),
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Split": _split,
}  # fmt: skip
