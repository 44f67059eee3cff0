"""Rules about quantize and dequantize operators: how a device wants its integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekd.runtimes.onnx_graph import MATRIX_OPS, averaged_padding
from edgekd.runtimes.onnx_values import constant, producer
from edgekd.runtimes.rule import (
    QUANTIZERS,
    Device,
    Found,
    Graph,
    Rule,
    Severity,
)

# what moves numbers and leaves them as they are: a quantizer counts on either side of it
MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "MaxPool"}
# operator -> what a scheme calls it
KINDS = {"Conv": "conv", "ConvTranspose": "conv_transpose", "Gemm": "linear", "MatMul": "linear"}
TYPES = ("INT8", "UINT8")
FUSED = ("Relu", "Clip")  # they run inside the operator before them


class Dequantized(NamedTuple):
    """Where an operator's input comes from: a dequantize operator, seen through `MOVES`.

    Attributes:
        axis: of the scales, as the operator's input has it; None where one scale is for all, or
            where the way changes the axes.
        integers: if they are constants.
    """

    node: ir.Node
    scale: NDArray[Any] | None
    axis: int | None
    integers: NDArray[Any] | None


def dequantized(value: ir.Value | None) -> Dequantized | None:
    """None where `value` is in float."""
    perms: list[tuple[int, ...]] = []
    known = True
    while value is not None and (mover := value.producer()) and mover.op_type in MOVES:
        if mover.op_type == "Transpose" and "perm" in mover.attributes:
            perms.append(tuple(mover.attributes.get_ints("perm", ())))
        else:
            known = known and mover.op_type in ("Identity", "MaxPool")
        value = mover.inputs[0]
    node = producer(value, "DequantizeLinear")
    if node is None:
        return None
    scale, axis = constant(node.inputs[1]), None
    if scale is not None and scale.size > 1 and known:
        axis = node.attributes.get_int("axis", 1)
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        axis += len(shape) if axis < 0 and shape is not None else 0
        for perm in reversed(perms):
            axis = perm.index(axis)
    return Dequantized(node, scale, axis, _integers(node))


def _integers(node: ir.Node) -> NDArray[Any] | None:
    """What a dequantize operator reads, if it is constant: stored, or quantized on the way."""
    stored = constant(node.inputs[0])
    quantizer = producer(node.inputs[0], "QuantizeLinear")
    if stored is not None or quantizer is None:
        return stored
    real, scale = constant(quantizer.inputs[0]), constant(quantizer.inputs[1])
    if real is None or scale is None:
        return None
    if scale.ndim and real.ndim:
        shape = [1] * real.ndim
        shape[quantizer.attributes.get_int("axis", 1)] = -1
        if real.shape[shape.index(-1)] != scale.size:
            return None
        scale = scale.reshape(shape)
    with np.errstate(all="ignore"):  # a bad scale is another rule's
        steps = np.nan_to_num(np.rint(real.astype(np.float32) / scale))
    zero = constant(quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None
    limits = np.iinfo(np.uint8 if zero is None or zero.dtype == np.uint8 else np.int8)
    clipped: NDArray[Any] = steps.clip(limits.min, limits.max)
    return clipped


class Matrix(NamedTuple):
    """A convolution or product, with its input and weight as far as they are quantized.

    Attributes:
        weighted: whether the second input is a weight, and not another activation.
    """

    node: ir.Node
    x: Dequantized | None
    w: Dequantized | None
    weighted: bool


def matrices(graph: Graph) -> Iterator[Matrix]:
    """All that there are."""
    for node in graph.nodes:
        if node.op_type in MATRIX_OPS and node.inputs[1] is not None:
            weighted = node.inputs[1] not in graph.varying
            yield Matrix(node, dequantized(node.inputs[0]), dequantized(node.inputs[1]), weighted)


def _activations(graph: Graph) -> Iterator[ir.Node]:
    """Quantize and dequantize operators of what is computed."""
    for node in graph.nodes:
        if node.op_type in QUANTIZERS and node.outputs[0] in graph.varying:
            yield node


def _quantizers(graph: Graph) -> Iterator[ir.Node]:
    return (node for node in graph.nodes if node.op_type in QUANTIZERS)


def _integer_type(node: ir.Node) -> str | None:
    """ONNX's name of the integers that a quantize or dequantize operator gives or takes."""
    value = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    for known in (value, zero):
        if known is not None and known.dtype is not None:
            return known.dtype.name
    # without a zero point, a quantize operator gives unsigned integers
    return "UINT8" if node.op_type == "QuantizeLinear" and zero is None else None


def _is_bias(node: ir.Node) -> bool:
    """Whether the operator dequantizes a constant of int32."""
    return _integer_type(node) == "INT32" and constant(node.inputs[0]) is not None


# ---- each quantizer ------------------------------------------------------------------------------


def _no_integers(graph: Graph, device: Device) -> Iterator[Found]:
    for node in _quantizers(graph):
        limit = f"{device.target.name} runs no integers{device.target.why_float}"
        yield Found(node, f"{node.op_type} of {_integer_type(node)}", limit, device.lenient)


def _zero_point(graph: Graph, device: Device) -> Iterator[Found]:
    for node in _quantizers(graph):
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if zero is not None and zero.any():
            values = f"{zero.min()} to {zero.max()}" if zero.size > 1 else f"{zero.item()}"
            yield Found(node, f"zero point {values}", f"{device.target.name} takes 0", "error")


def _unsigned(graph: Graph, device: Device) -> Iterator[Found]:
    for node in _quantizers(graph):
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if _integer_type(node) == "UINT8" and (zero is None or not zero.any()):
            yield Found(node, "uint8", f"{device.target.name} takes int8, zero point 0", "error")


def _integer_width(graph: Graph, device: Device) -> Iterator[Found]:
    for node in _quantizers(graph):
        dtype = _integer_type(node)
        if dtype is not None and dtype not in TYPES and not _is_bias(node):
            types = device.table.operators.get("DequantizeLinear", frozenset())
            severity: Severity = "warning" if not types or dtype in types else "error"
            limit = f"{device.target.name} computes in integers of 8 bits"
            yield Found(node, f"{node.op_type} of {dtype}", limit, severity)


def _scale(graph: Graph, device: Device) -> Iterator[Found]:
    for node in _quantizers(graph):
        scale = constant(node.inputs[1])
        if scale is not None:
            bad = scale[~(np.isfinite(scale) & (scale > 0))]
            if bad.size:
                yield Found(
                    node, f"scale {bad.flat[0]}" + (f" ({bad.size} of {scale.size})" if scale.ndim
                    else ""), "scales are finite and above 0", "error",
                )  # fmt: skip


def _computed_scale(graph: Graph, device: Device) -> Iterator[Found]:
    severity: Severity = "error" if device.table.name == "tensorrt" else "warning"
    for node in _quantizers(graph):
        for value in node.inputs[1:]:
            if value is not None and value in graph.varying:
                limit = f"{device.target.name} takes constant scales and zero points"
                yield Found(node, f"{value.name} is computed", limit, severity)


def _per_channel_activation(graph: Graph, device: Device) -> Iterator[Found]:
    for node in _activations(graph):
        scale = constant(node.inputs[1])
        if scale is None or scale.size < 2 or _stays_in_float(node):
            continue
        limit = f"{device.target.name} takes one scale for an activation, else it runs in float"
        yield Found(node, f"{scale.size} scales for an activation", limit, "warning")


def _stays_in_float(node: ir.Node) -> bool:
    """One scale, repeated for a float layer, so that ONNX Runtime does not quantize its weight."""
    scale = constant(node.inputs[1])
    if scale is None or (scale != scale.flat[0]).any():
        return False
    readers = node.outputs[0].consumers()
    return bool(readers) and all(
        reader.op_type in MATRIX_OPS and dequantized(reader.inputs[1]) is None for reader in readers
    )


def _int8_initializer(graph: Graph, device: Device) -> Iterator[Found]:
    for node in _quantizers(graph):
        stored = node.op_type == "DequantizeLinear" and constant(node.inputs[0]) is not None
        if stored and not _is_bias(node):
            limit = f"TensorRT {device.table.version} takes no integer initializers"
            yield Found(node, f"{_integer_type(node)} initializer", limit, "error")


def _signed(graph: Graph, device: Device) -> Iterator[Found]:
    for node in _activations(graph):
        if node.op_type == "QuantizeLinear" and _integer_type(node) == "INT8":
            limit = f"{device.target.name} fuses uint8 activations; int8 ones are slower"
            yield Found(node, "int8 activations", limit, "warning")


# ---- each convolution and product ----------------------------------------------------------------


def _weight_axis(graph: Graph, device: Device) -> Iterator[Found]:
    for node, x, w, weighted in matrices(graph):
        if x is None or w is None or w.axis is None or not weighted:
            continue
        rank = len(node.inputs[1].shape or ()) if node.inputs[1] is not None else 0
        transposed = node.attributes.get_int("transB", 0) == 1
        wanted = {"Conv": 0, "Gemm": 0 if transposed else 1, "MatMul": rank - 1}
        if w.axis != (axis := wanted.get(node.op_type, 1)):
            limit = f"{node.op_type} has its output channels on axis {axis}; else it runs in float"
            yield Found(node, f"scales of the weight on axis {w.axis}", limit, "warning")


def _weight_only(graph: Graph, device: Device) -> Iterator[Found]:
    for node, x, w, weighted in matrices(graph):
        if x is None and w is not None and weighted:
            limit = f"{device.target.name} computes in integers if both are quantized"
            yield Found(node, "weight quantized, input in float", limit, "warning")


def _activation_only(graph: Graph, device: Device) -> Iterator[Found]:
    ops = () if device.target.scheme is None else device.target.scheme.ops
    for node, x, w, weighted in matrices(graph):
        one = x is not None and w is None
        if not weighted:  # the product of two activations: either may be the one in float
            one = (x is None) != (w is None)
        kind = KINDS[node.op_type] if weighted else "matmul"
        if one and kind in ops and not _too_few(node, device):
            limit = f"{device.target.name} computes in integers if both are quantized"
            said = "input quantized, weight in float" if weighted else "one input in float"
            yield Found(node, said, limit, "warning")


def _pooled_channels(graph: Graph, device: Device) -> Iterator[Found]:
    for node, x, w, _ in matrices(graph):
        if x is not None and w is not None and _too_few(node, device):
            least = device.target.scheme.least_pooled_channels if device.target.scheme else 0
            limit = f"{device.target.name} computes those of less than {least} in float"
            yield Found(node, "a convolution over 1 × 1 maps of few channels", limit, "warning")


def _too_few(node: ir.Node, device: Device) -> bool:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if node.op_type != "Conv" or shape is None or device.target.scheme is None:
        return False
    _, channels, *sides = shape.dims
    least = device.target.scheme.least_pooled_channels
    return isinstance(channels, int) and channels < least and all(side == 1 for side in sides)


def _biases(graph: Graph) -> Iterator[tuple[Matrix, ir.Value]]:
    """Those of operators in integers."""
    for matrix in matrices(graph):
        inputs = matrix.node.inputs
        value = inputs[2] if len(inputs) > 2 else None
        if matrix.x is not None and matrix.w is not None and value is not None:
            yield matrix, value


def _integer_bias(graph: Graph, device: Device) -> Iterator[Found]:
    for node in _quantizers(graph):
        if _is_bias(node):
            limit = f"{device.target.name} takes biases in float"
            yield Found(node, "an int32 bias behind a DequantizeLinear", limit, "error")


def _float_bias(graph: Graph, device: Device) -> Iterator[Found]:
    for matrix, value in _biases(graph):
        dq = producer(value, "DequantizeLinear")
        if dq is None or _integer_type(dq) != "INT32":
            limit = f"{device.target.name} takes int32 biases, scale = input's · weight's"
            said = "float" if dq is None else str(_integer_type(dq))
            yield Found(matrix.node, f"a bias in {said}", limit, "warning")


def _bias_scale(graph: Graph, device: Device) -> Iterator[Found]:
    for (node, x, w, _), value in _biases(graph):
        dq = producer(value, "DequantizeLinear")
        scale = None if dq is None else constant(dq.inputs[1])
        if scale is None or x is None or w is None or x.scale is None or w.scale is None:
            continue
        if x.scale.size == 1 and scale.size in (1, w.scale.size):
            with np.errstate(all="ignore"):  # a bad scale is another rule's
                product = x.scale * w.scale
                good = np.isfinite(product) & (product > 0)
                off = np.abs(scale / np.where(good, product, scale) - 1).max()
            if off > 1e-3:  # kernels take the product for granted
                limit = f"{device.target.name} takes scale = input's · weight's for granted"
                yield Found(node, f"the bias's scale is {off:.0%} off", limit, "error")


def _weight_range(graph: Graph, device: Device) -> Iterator[Found]:
    for node, _, w, weighted in matrices(graph):
        if w is None or w.integers is None or not weighted or not w.integers.size:
            continue
        if (integers := w.integers).min() < -64 or integers.max() > 63:
            limit = f"{device.target.name} wants 7 bits, -64 to 63: its kernels may saturate"
            found = f"weights from {integers.min():.0f} to {integers.max():.0f}"
            yield Found(node, found, limit, "warning")


def _float_output(graph: Graph, device: Device) -> Iterator[Found]:
    for node, x, w, _ in matrices(graph):
        if x is None or w is None or node.op_type != "Conv":
            continue
        end = node.outputs[0]
        if len(end.uses()) == 1 and (after := end.consumers()[0]).op_type in FUSED:
            end = after.outputs[0]
        others = {n.op_type for n in end.consumers()} - {"QuantizeLinear", "Add"}  # its own rule
        if others and not all(map(_leaves, end.consumers())):
            limit = f"{device.target.name} computes in integers if the output is quantized too"
            yield Found(node, f"its output goes in float into {', '.join(sorted(others))}", limit,
                        "warning")  # fmt: skip


def _leaves(node: ir.Node) -> bool:
    """Whether what it gives only moves on its way out of the network."""
    return node.op_type in MOVES and all(map(_leaves, node.outputs[0].consumers()))


def _averaged_padding(graph: Graph, device: Device) -> Iterator[Found]:
    for node in graph.nodes:
        dq = averaged_padding(node)
        zero = constant(dq.inputs[2]) if dq is not None and len(dq.inputs) > 2 else None
        if zero is not None and zero.any():
            limit = f"{device.target.name} pads integers with 0, whatever their zero point is"
            found = f"an average that counts its padding, over integers with zero point {zero}"
            yield Found(node, found, limit, "error")


# ---- each Add ------------------------------------------------------------------------------------


def _adds(graph: Graph) -> Iterator[tuple[ir.Node, list[ir.Value]]]:
    """Those of two activations of one shape."""
    for node in graph.nodes:
        values = [v for v in node.inputs if v is not None]
        if node.op_type == "Add" and graph.varying.issuperset(values):
            shapes = [v.shape for v in values]
            if None in shapes or shapes[0] == shapes[1]:
                yield node, values


def _one_input(graph: Graph, device: Device) -> Iterator[Found]:
    for node, values in _adds(graph):
        if sum(dequantized(v) is not None for v in values) == 1:
            missing = next(v for v in values if dequantized(v) is None)
            limit = f"{device.target.name} adds in integers if both inputs are quantized"
            yield Found(node, f"input {missing.name} is in float", limit, "warning")


def _branch(value: ir.Value, device: Device) -> ir.Node | None:
    """The convolution in integers whose output `value` is, or whose ReLU's where that is fused."""
    scheme, relu = device.target.scheme, producer(value, "Relu")
    if relu is not None and scheme is not None and scheme.add_inputs == "skip-activated":
        value = relu.inputs[0] if len(value.uses()) == 1 and relu.inputs[0] else value
    node = producer(value, "Conv")
    whole = node is not None and len(value.uses()) == 1
    return node if whole and node and all(map(dequantized, node.inputs[:2])) else None


def _skip_input(graph: Graph, device: Device) -> Iterator[Found]:
    for node, values in _adds(graph):
        if any(map(dequantized, values)) or not any(_branch(v, device) for v in values):
            continue
        skip = next((v for v in values if _branch(v, device) is None), values[-1])
        limit = f"{device.target.name} fuses the Add into its convolution if the skip is quantized"
        yield Found(node, f"the skip input {skip.name} is in float", limit, "warning")


def _branch_input(graph: Graph, device: Device) -> Iterator[Found]:
    for node, values in _adds(graph):
        if not all(map(dequantized, values)):
            continue
        for value in values:
            dq = producer(value, "DequantizeLinear")
            quantizer = producer(dq.inputs[0], "QuantizeLinear") if dq else None
            source = quantizer.inputs[0] if quantizer else None
            if source is not None and _branch(source, device) is not None:
                limit = f"{device.target.name} fuses the Add into a convolution right before it"
                yield Found(node, f"a quantizer on the branch {value.name}", limit, "warning")
                break


def _wants(**facts: object) -> Callable[[Device], bool]:
    """Devices whose scheme has those values; without any, devices that have integers."""

    def applies(device: Device) -> bool:
        scheme = device.target.scheme
        return scheme is not None and all(getattr(scheme, k) == v for k, v in facts.items())

    return applies


def _skips(device: Device) -> bool:
    """Whether an Add runs inside the convolution before it."""
    return device.target.scheme is not None and device.target.scheme.add_inputs != "both"


SYMMETRIC = {"tensorrt": "https://github.com/NVIDIA/TensorRT/issues/2774"}
SKIP = {"tensorrt": "https://github.com/NVIDIA/Model-Optimizer/pull/425"}
ORT = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
BOTH = "quantize both, or neither"
QUANTIZATION_RULES: tuple[Rule, ...] = (
    Rule(
        "no-integers", _no_integers, "export the float network",
        applies=lambda d: d.target.scheme is None,
        sources={"tensorrt": "https://github.com/NVIDIA/TensorRT/issues/3157",
                 "coreml": "https://onnxruntime.ai/docs/execution-providers/"
                 "CoreML-ExecutionProvider.html"},
    ),
    Rule(
        "zero-point", _zero_point, "quantize symmetrically: int8, zero point 0",
        applies=_wants(activation_symmetric=True), sources=SYMMETRIC,
    ),
    Rule(
        "unsigned", _unsigned, "quantize to int8, with a zero point of that type",
        applies=_wants(activation_symmetric=True), sources=SYMMETRIC,
    ),
    Rule("integer-width", _integer_width, "quantize to 8 bits", applies=_wants()),
    Rule("scale", _scale, "calibrate again; a channel of zeros takes any scale above 0",
         applies=_wants()),
    Rule("computed-scale", _computed_scale, "fold scales into initializers", applies=_wants()),
    Rule(
        "per-channel-activation", _per_channel_activation, "quantize activations per tensor",
        applies=_wants(),
    ),
    Rule(
        "int8-initializer", _int8_initializer,
        "store the weight in float, with a QuantizeLinear in front of the DequantizeLinear",
        applies=lambda d: d.target.scheme is not None and not d.table.int8_initializers,
        sources={"tensorrt": "https://github.com/NVIDIA/TensorRT/issues/3360"},
    ),
    Rule("weight-axis", _weight_axis, "set `axis` of the weight's quantizers", applies=_wants()),
    Rule("weight-only", _weight_only, BOTH, applies=_wants()),
    Rule("activation-only", _activation_only, BOTH, applies=_wants()),
    Rule("pooled-channels", _pooled_channels, "leave it in float", applies=_wants()),
    Rule(
        "integer-bias", _integer_bias, "store the bias in float",
        applies=_wants(bias="float"),
        sources={"tensorrt": "https://github.com/NVIDIA/TensorRT/issues/4527"},
    ),
    Rule(
        "float-bias", _float_bias, "store it as int32 behind a DequantizeLinear",
        applies=_wants(bias="int32"),
    ),
    Rule(
        "bias-scale", _bias_scale, "requantize the bias at the product of the two scales",
        applies=_wants(bias="int32"),
    ),
    Rule(
        "weight-range", _weight_range, "quantize to 7 bits: reduce_range, or scale = amax / 63",
        applies=_wants(weight_bits=7),
        sources={"": ORT, "openvino": "https://docs.openvino.ai/latest/pot_saturation_issue.html"},
    ),
    Rule(
        "signed", _signed, "add 128 to the zero points of activations: nothing is lost",
        applies=lambda d: d.target.runtime == "onnxruntime" and _wants(activation_dtype="uint8")(d),
        sources={"": ORT},
    ),
    Rule(
        "float-output", _float_output, "quantize its output",
        applies=lambda d: d.target.runtime == "onnxruntime" and _wants(outputs=True)(d),
        sources={"": ORT},
    ),
    Rule(
        "averaged-padding", _averaged_padding,
        "put a Pad, a QuantizeLinear and a DequantizeLinear in front, and average without padding",
        applies=lambda d: d.target.runtime == "openvino" and d.target.scheme is not None,
    ),
    Rule("add-input", _one_input, BOTH, applies=_wants(add_inputs="both")),
    Rule(
        "add-skip", _skip_input, "quantize the skip input, and that one only",
        applies=_skips, sources=SKIP,
    ),
    Rule(
        "add-branch", _branch_input, "leave out the quantizer between the convolution and the Add",
        applies=_skips, sources=SKIP,
    ),
)  # fmt: skip
