"""An ONNX file in float64, by the reference implementation that comes with the standard.

In float32 a deep network of random weights moves by itself: a sum that lies between two integers
rounds to either, and one such element fills the output. In float64 none lies there, whatever the
file's operators are, so a file and the network it came from give the same integers from end to end.

Weights and the image become integers in float32 as ever, and biases are the float32 numbers that
are written; all that follows is in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_resize import Resize as StandardResize

from edgekd.runtimes.base import Arrays

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
# what PyTorch's operators hold in float64 and their decompositions write in float32
CONSTANTS = {
    float(np.float32(x)): x for x in (2**0.5, 0.5**0.5, (2 / np.pi) ** 0.5, 0.044715, 1 / 6)
}


class DequantizeLinear(OpRun):
    """(x - zero) · scale; the standard's is in float32."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, zero: Any = 0, axis: int = 1, **_: Any) -> Any:
        if x.dtype == np.int32:
            return ((x.astype(np.float32) * scale).astype(np.float64),)
        spread = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        scale, zero = (v.reshape(spread) if np.size(v) > 1 else v for v in (scale, zero))
        return ((x.astype(np.float64) - zero) * np.float64(scale),)


class Erf(OpRun):
    """The standard's is in float32."""

    op_domain = ""

    def _run(self, x: Any) -> Any:
        return (torch.from_numpy(x).erf().numpy(),)


class Gelu(OpRun):
    """The standard's has its constants in float32, as have the next two."""

    op_domain = ""

    def _run(self, x: Any, approximate: Any = "none") -> Any:
        return (torch.nn.functional.gelu(torch.from_numpy(x), approximate=approximate).numpy(),)


class HardSigmoid(OpRun):
    """clip(alpha · x + beta, 0, 1)."""

    op_domain = ""

    def _run(self, x: Any, alpha: Any = 0.2, beta: Any = 0.5) -> Any:
        return (np.clip(CONSTANTS.get(float(alpha), alpha) * x + beta, 0, 1),)


class HardSwish(OpRun):
    """x · clip(x / 6 + 0.5, 0, 1)."""

    op_domain = ""

    def _run(self, x: Any) -> Any:
        return (x * np.clip(x / 6 + 0.5, 0, 1),)


class Resize(StandardResize):
    """PyTorch's cubic one is off by a millionth in float64 as well; it is what the graph has."""

    op_domain = ""

    def _run(
        self, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None, **how: Any
    ) -> Any:
        if how["mode"] != "cubic" or sizes is None:
            return super()._run(x, roi, scales, sizes, **how)
        aligned = how["coordinate_transformation_mode"] == "align_corners"
        return (
            torch.nn.functional.interpolate(
                torch.from_numpy(x), size=sizes[2:].tolist(), mode="bicubic", align_corners=aligned
            ).numpy(),
        )


def widened(tensor: onnx.TensorProto) -> None:
    """The same numbers in float64; a constant of an operator as it was before float32."""
    array: NDArray[Any] = to_array(tensor)
    if array.dtype == np.float32:
        wide = array.astype(np.float64)
        if wide.size == 1:
            wide[...] = CONSTANTS.get(wide.item(), wide.item())
        tensor.CopyFrom(from_array(wide, tensor.name))


def in_float64(model: onnx.ModelProto, inputs: Arrays) -> Arrays:
    """The outputs of a file for `inputs`, of float32; `model` is changed."""
    quantizers = [node for node in model.graph.node if node.op_type in QUANTIZERS]
    quantized = {name for node in quantizers for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name not in quantized:
            widened(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.DOUBLE
            if attribute.HasField("t"):
                widened(attribute.t)
    for value in model.graph.input:
        narrow = f"{value.name} in float32"
        for node in quantizers:
            node.input[:] = [narrow if name == value.name else name for name in node.input]
        cast = make_node("Cast", [value.name], [narrow], to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(0, cast)
    given = {v.name: x.astype(np.float64) for v, x in zip(model.graph.input, inputs, strict=True)}
    ops = [DequantizeLinear, Erf, Gelu, HardSigmoid, HardSwish, Resize]
    outputs: Arrays = ReferenceEvaluator(model, new_ops=ops).run(None, given)
    return outputs
