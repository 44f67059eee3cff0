"""The two forms of a quantized weight in a Q/DQ graph, each made of the other without loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekd.runtimes.onnx_values import constant, new_constant, producer


def float_weights(model: ir.Model) -> int:
    """Weights in float with a quantize and a dequantize operator, as TensorRT 8 wants them.

    A dequantized int32 bias becomes a float one. Returns how many there were.
    """
    count = 0
    for node, stored, scale, zero in _dequantized(model):
        name = f"{node.outputs[0].name}.float"
        real = ((stored.astype(np.int64) - zero).astype(np.float32) * scale).astype(np.float32)
        value = new_constant(model.graph, name, real)
        if stored.dtype == np.int32:
            ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        else:
            axis = node.attributes.get_int("axis", 1)
            if len(node.inputs) < 3 or node.inputs[2] is None:  # else it would be uint8
                assert node.inputs[1] is not None and node.inputs[1].shape is not None
                zeros = np.zeros(node.inputs[1].shape.numpy(), stored.dtype)
                node.resize_inputs(3)
                node.replace_input_with(2, new_constant(model.graph, f"{name}.zero", zeros))
            quantize = ir.node("QuantizeLinear", [value, *node.inputs[1:]], {"axis": axis})
            model.graph.insert_before(node, quantize)
            node.replace_input_with(0, quantize.outputs[0])
        count += 1
    _drop_unused(model)
    return count


def integer_weights(model: ir.Model) -> int:
    """Weights stored as integers, with a dequantize operator. Returns how many there were."""
    count = 0
    for node in list(model.graph):
        quantize = producer(node.inputs[0], "QuantizeLinear") if node.inputs else None
        if node.op_type != "DequantizeLinear" or quantize is None:
            continue
        real, parameters = constant(quantize.inputs[0]), _scale_and_zero(quantize)
        if real is None or parameters is None:
            continue
        scale, zero = parameters
        limits = np.iinfo(zero.dtype)
        steps = np.rint(real / scale) + zero.astype(np.float32)
        stored = np.clip(steps, limits.min, limits.max).astype(zero.dtype)
        value = new_constant(model.graph, f"{node.outputs[0].name}.integer", stored)
        node.replace_input_with(0, value)
        count += 1
    _drop_unused(model)
    return count


def _dequantized(
    model: ir.Model,
) -> Iterator[tuple[ir.Node, NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Each DequantizeLinear of stored integers: node, integers, scale and zero point."""
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear":
            stored, parameters = constant(node.inputs[0]), _scale_and_zero(node)
            if stored is not None and parameters is not None:
                yield node, stored, *parameters


def _scale_and_zero(node: ir.Node) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Of a Q or DQ node, shaped so that they broadcast to its data; None if not constant."""
    scale = constant(node.inputs[1])
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    zero, data = constant(zero_point), constant(node.inputs[0])
    if scale is None or data is None or (zero_point is not None and zero is None):
        return None
    if zero is None:
        zero = np.zeros_like(scale, np.uint8 if node.op_type == "QuantizeLinear" else data.dtype)
    if scale.size == 1:
        return scale.reshape(()), zero.reshape(())
    axis = node.attributes.get_int("axis", 1) % data.ndim
    if scale.shape != (data.shape[axis],):  # by blocks
        return None
    shape = [1] * data.ndim
    shape[axis] = -1
    return scale.reshape(shape), zero.reshape(shape)


def _drop_unused(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
