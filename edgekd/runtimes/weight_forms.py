"""The two forms of quantized weights in ONNX, one made from the other without loss.

TensorRT 8 takes float weights with a quantize and a dequantize operator behind them, and float
biases (https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-861/developer-guide/ §7.4);
other runtimes take integers with a dequantize operator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekd.errors import ModelError
from edgekd.runtimes.onnx_values import constant, new_constant, producer

WEIGHTS = (np.dtype(np.int8), np.dtype(np.uint8))


def store_integers(model: ir.Model) -> int:
    """Float weights behind a QuantizeLinear become its integers; how many did."""
    count = 0
    for dq in list(model.graph):
        q = producer(dq.inputs[0], "QuantizeLinear") if dq.op_type == "DequantizeLinear" else None
        floats = None if q is None else constant(q.inputs[0])
        if q is None or floats is None or (grid := _grid(q, floats.ndim, np.uint8)) is None:
            continue
        integers = _quantized(floats, *grid)
        dq.replace_input_with(0, new_constant(model.graph, f"{dq.outputs[0].name}.int", integers))
        count += 1
    RemoveUnusedNodesPass()(model)
    return count


def store_floats(model: ir.Model) -> int:
    """Integer weights become the floats that they stand for, behind a QuantizeLinear; how many did.

    int32 biases become floats, with nothing behind them.

    Raises:
        ModelError: the floats would not be rounded back to the integers (a scale so large that
            float32 cannot hold them, or so small that it has no steps left there).
    """
    count = 0
    for dq in list(model.graph):
        stored = constant(dq.inputs[0]) if dq.op_type == "DequantizeLinear" else None
        if stored is None or (grid := _grid(dq, stored.ndim, stored.dtype.type)) is None:
            continue
        scale, zero = grid
        steps = stored.astype(np.int64) - zero.astype(np.int64)
        with np.errstate(over="ignore"):  # found below
            floats = steps.astype(np.float32) * scale
        name = str(dq.outputs[0].name)
        if stored.dtype == np.int32:
            ir.convenience.replace_all_uses_with(
                dq.outputs[0], new_constant(model.graph, f"{name}.float", floats),
                replace_graph_outputs=True,
            )  # fmt: skip
        elif stored.dtype in WEIGHTS:
            if not np.array_equal(_quantized(floats, scale, zero), stored):
                raise ModelError(
                    f"{dq.name}: with scales from {scale.min():.3g} to {scale.max():.3g} float32 "
                    "does not hold its weights apart; 1e-36 to 1e36 do: quantize it again"
                )
            inputs = [new_constant(model.graph, f"{name}.float", floats), dq.inputs[1]]
            zeros = dq.inputs[2] if len(dq.inputs) > 2 else None
            if zeros is None:  # without one, QuantizeLinear gives uint8
                shape = () if scale.size == 1 else (scale.size,)
                zeros = new_constant(model.graph, f"{name}.zero", np.zeros(shape, stored.dtype))
            axis = {"axis": dq.attributes.get_int("axis", 1)} if scale.size > 1 else {}
            q = ir.node("QuantizeLinear", [*inputs, zeros], axis, name=f"{dq.name}.quantize")
            model.graph.insert_before(dq, q)
            dq.replace_input_with(0, q.outputs[0])
            dq.resize_inputs(3)
            dq.replace_input_with(2, zeros)
        else:
            continue
        count += 1
    RemoveUnusedNodesPass()(model)
    return count


def _grid(node: ir.Node, rank: int, dtype: Any) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """(scale, zero point) of a quantize or dequantize operator, as they spread over its tensor.

    None where one is computed, not float32, or given for blocks.
    """
    scale = constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    blocks: int = node.attributes.get_int("block_size", 0)
    if scale is None or scale.dtype != np.float32 or blocks:
        return None
    zero = np.zeros_like(scale, dtype) if given is None else constant(given)
    if zero is None:
        return None
    if scale.size == 1:
        return scale.reshape(()), zero.reshape(())
    shape = [1] * rank
    shape[node.attributes.get_int("axis", 1)] = -1
    return scale.reshape(shape), zero.reshape(shape)


def _quantized(floats: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any]) -> NDArray[Any]:
    """As QuantizeLinear defines it: half to even, saturating."""
    limits = np.iinfo(zero.dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.nan_to_num(np.rint(floats / scale)) + zero.astype(np.int32)
    integers: NDArray[Any] = steps.clip(limits.min, limits.max).astype(zero.dtype)
    return integers
