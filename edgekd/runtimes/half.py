"""What half precision makes of a model, foretold in FP16 on this host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgekd.runtimes.base import Arrays
from edgekd.runtimes.onnx_values import constant, new_constant, producer
from edgekd.runtimes.onnxruntime import OrtSession

MAX = 65504 / 2  # half of the largest FP16 number: other inputs reach further than those given
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
# inputs that are float32 whatever the data's type is
FLOAT_INPUTS = {"Resize": (2,), "Upsample": (1,)}
# their type is an attribute's, or that of a graph in them
AS_THEY_ARE = (
    "QuantizeLinear", "DequantizeLinear", "ConstantOfShape", "RandomUniformLike",
    "RandomNormalLike", "EyeLike", "Loop", "If", "Scan",
)  # fmt: skip


def to_half(model: ir.Model | Path, inputs: Arrays) -> tuple[ir.Model, list[str]]:
    """An FP16 copy of an FP32 model, with float32 inputs and outputs.

    Where a tensor or a weight goes beyond half of FP16's range on the given inputs, the nodes that
    give or read it stay in FP32.

    Args:
        inputs: arrays of (N, ...) in the order of the model's inputs; N as the model takes it.

    Returns:
        The copy, and the names of the nodes that are kept in FP32.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    source = ir.load(model) if isinstance(model, Path) else model
    copy = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(source)))
    large = _beyond(copy, inputs)
    kept: list[str] = []
    for node in list(copy.graph):
        if node.op_type in AS_THEY_ARE or node.op_type == "Constant":
            continue  # a constant is rounded by each reader
        if any(v is not None and v.name in large for v in (*node.inputs, *node.outputs)):
            kept.append(str(node.name))
        else:
            _halve(copy.graph, node)
    RemoveUnusedNodesPass()(copy)
    return copy, kept


def _beyond(model: ir.Model, inputs: Arrays) -> set[str]:
    """Names of the float tensors, weights included, that exceed MAX somewhere."""
    proto = ir.to_proto(model)
    outputs = {str(v.name) for v in model.graph.outputs}
    computed = [v for n in model.graph for v in n.outputs if v.name and v.dtype == FLOAT]
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=str(v.name)) for v in computed if v.name not in outputs
    )
    session = OrtSession(proto.SerializeToString(), threads=1, emulated=True, origin="the model")
    constants = {str(v.name): constant(v) for n in model.graph for v in n.inputs if v is not None}
    given = zip((str(v.name) for v in model.graph.inputs), inputs, strict=True)
    ran = zip((output.name for output in proto.graph.output), session(inputs), strict=True)
    return {name for name, array in (*constants.items(), *given, *ran) if _exceeds(array)}


def _exceeds(array: NDArray[Any] | None) -> bool:
    """Infinities do not count, FP16 has them: a mask of -inf stays what it is."""
    if array is None or array.dtype != np.float32:
        return False
    return bool(
        np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max(initial=0) > MAX
    )


def _halve(graph: ir.Graph, node: ir.Node) -> None:
    """Make the node compute in FP16: casts before and behind it."""
    exempt = FLOAT_INPUTS.get(node.op_type, ())
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == FLOAT and index not in exempt:
            node.replace_input_with(index, _as_half(graph, node, value))
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", HALF)
    for output in node.outputs:
        if output.dtype == FLOAT:
            whole = ir.Value(name=output.name, type=ir.TensorType(FLOAT), shape=output.shape)
            ir.convenience.replace_all_uses_with(output, whole, replace_graph_outputs=True)
            output.name, output.dtype = f"{output.name}.half", HALF
            graph.insert_after(node, ir.node("Cast", [output], {"to": FLOAT}, outputs=[whole]))


def _as_half(graph: ir.Graph, reader: ir.Node, value: ir.Value) -> ir.Value:
    """`value` in FP16: a constant rounded, what was FP16 before, or a cast."""
    array = constant(value)
    if array is not None:
        known = graph.initializers.get(f"{value.name}.half")
        return known or new_constant(graph, f"{value.name}.half", array.astype(np.float16))
    if (cast := producer(value, "Cast")) is not None:
        before = cast.inputs[0]
        if before is not None and before.dtype == HALF:
            return before
    name = f"{value.name}.cast"
    for node in value.consumers():
        if node.outputs[0].name == name:
            return node.outputs[0]
    half = ir.Value(name=name, type=ir.TensorType(HALF), shape=value.shape)
    graph.insert_before(reader, ir.node("Cast", [value], {"to": HALF}, outputs=[half]))
    return half


def written_out(model: ir.Model) -> ir.Model:
    """The FP16 model with FP32 arithmetic and each rounding a Cast of its own, for this host.

    ONNX Runtime's CPU has few FP16 kernels; for a chain of others it computes in FP32 and drops
    the roundings between them. It keeps casts that are in the file.
    """
    copy = model.clone()
    for node in list(copy.graph):
        if node.op_type in ("Cast", "Constant"):
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == HALF:
                cast = ir.node("Cast", [value], {"to": FLOAT})
                copy.graph.insert_before(node, cast)
                cast.outputs[0].dtype, cast.outputs[0].shape = FLOAT, value.shape
                node.replace_input_with(index, cast.outputs[0])
        for output in node.outputs:
            if output.dtype == HALF:
                rounded = ir.Value(name=output.name, type=ir.TensorType(HALF), shape=output.shape)
                ir.convenience.replace_all_uses_with(output, rounded, replace_graph_outputs=True)
                output.name, output.dtype = f"{output.name}.single", FLOAT
                cast = ir.node("Cast", [output], {"to": HALF}, outputs=[rounded])
                copy.graph.insert_after(node, cast)
    return copy
