"""What a device cannot hold, rule by rule, of anybody's ONNX file.

`RULES` is the table: what each is about, for which targets it holds, how serious it is, the limit,
the remedy, and where the fact comes from. A rule's function yields what breaks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from edgekd.runtimes.onnx_graph import MATRIX_OPS
from edgekd.runtimes.onnx_values import constant, producer
from edgekd.runtimes.operators import operators, release, unsupported
from edgekd.target import Target

Severity = Literal["error", "warning"]
# the node, and what was found there
Found = tuple[ir.Node | None, str]
FUSED = {"Relu", "Clip"}  # they run inside the operator before them
MOVING = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Softmax"}
PLUGINS = {"RoiAlign"}  # TensorRT has them in its plugin library
INTEGER_OPS = {
    "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
}  # fmt: skip
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Rule:
    """One thing that a device wants of a file."""

    holds: Callable[[Target], bool]
    find: Callable[[ir.Model, Target], Iterator[Found]]
    severity: Severity
    limit: str
    remedy: str
    source: str = ""


# ---- which targets -------------------------------------------------------------------------------


def _always(_: Target) -> bool:
    return True


def _tensorrt(target: Target) -> bool:
    return target.runtime == "tensorrt" and target.scheme is not None


def _onnxruntime(target: Target) -> bool:
    return target.runtime == "onnxruntime" and target.scheme is not None


def _integers(target: Target) -> bool:
    return target.scheme is not None


def _symmetric(target: Target) -> bool:
    return target.scheme is not None and target.scheme.activation_symmetric


# ---- what is looked at ---------------------------------------------------------------------------


def _parameter(node: ir.Node, index: int) -> np.ndarray | None:
    """Scale (1) or zero point (2) of a quantize or dequantize operator."""
    return constant(node.inputs[index]) if len(node.inputs) > index else None


def _weight(node: ir.Node) -> ir.Node | None:
    """The dequantize operator of a matrix operator's weight, if that is a constant."""
    dq = producer(node.inputs[1], DEQUANTIZE)
    return dq if dq is not None and _stored(dq) is not None else None


def _stored(dq: ir.Node) -> np.ndarray | None:
    """The constant that a dequantize operator reads, by itself or through a quantize operator."""
    q = producer(dq.inputs[0], QUANTIZE)
    return constant(q.inputs[0] if q is not None else dq.inputs[0])


def _integer_input(node: ir.Node) -> ir.Node | None:
    """The dequantize operator that a matrix operator's first input comes out of."""
    dq = producer(node.inputs[0], DEQUANTIZE)
    return dq if dq is not None and _stored(dq) is None else None


def _of(model: ir.Model, *kinds: str) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type in kinds)


def _matrix(model: ir.Model) -> Iterator[ir.Node]:
    return _of(model, *MATRIX_OPS)


def _activations(model: ir.Model) -> Iterator[ir.Node]:
    """Quantize and dequantize operators that are not a weight's or a bias'."""
    for node in _of(model, QUANTIZE, DEQUANTIZE):
        dq = node if node.op_type == DEQUANTIZE else None
        known = constant(node.inputs[0]) if dq is None else _stored(dq)
        if known is None:
            yield node


def _integer_type(node: ir.Node) -> str:
    """Of a quantize or dequantize operator; uint8 where nothing says otherwise."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return str(zero.dtype)
    value = node.outputs[0] if node.op_type == QUANTIZE else node.inputs[0]
    return str(value.dtype) if value is not None and value.dtype is not None else "UINT8"


# ---- the rules -----------------------------------------------------------------------------------


def _opset(model: ir.Model, target: Target) -> Iterator[Found]:
    found = model.opset_imports.get("", 0)
    if found > target.opset:
        yield None, f"opset {found}"


def _operator(model: ir.Model, target: Target) -> Iterator[Found]:
    for node, what, kind in unsupported(model, target):
        if kind == "operator" and not (target.scheme is None and what in (QUANTIZE, DEQUANTIZE)):
            yield node, what


def _type(model: ir.Model, target: Target) -> Iterator[Found]:
    for node, what, kind in unsupported(model, target):
        if kind == "type" and node.op_type not in (QUANTIZE, DEQUANTIZE):
            yield node, what


def _no_integers(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _of(model, QUANTIZE, DEQUANTIZE, *INTEGER_OPS):
        yield node, node.op_type


def _zero_point(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _of(model, QUANTIZE, DEQUANTIZE):
        zero = _parameter(node, 2)
        if zero is not None and zero.any() and zero.dtype == np.int8:
            yield node, f"zero point {zero.reshape(-1)[np.abs(zero.reshape(-1)).argmax()]}"


def _integer_kind(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _of(model, QUANTIZE, DEQUANTIZE):
        if _integer_type(node) not in ("INT8", "INT32"):  # int32: a bias, which has its own rule
            yield node, _integer_type(node).lower()


def _signed(model: ir.Model, target: Target) -> Iterator[Found]:
    assert target.scheme is not None
    if target.scheme.activation_dtype == "uint8":
        for node in _activations(model):
            if node.op_type == QUANTIZE and _integer_type(node) == "INT8":
                yield node, "int8 activations"


def _scale(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _of(model, QUANTIZE, DEQUANTIZE):
        scale = _parameter(node, 1)
        if scale is not None and (bad := scale[~(np.isfinite(scale) & (scale > 0))]).size:
            yield node, f"scale {bad[0]:g}"


def _per_channel_activation(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _activations(model):
        scale = _parameter(node, 1)
        if scale is None or scale.size == 1:
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if node.op_type == DEQUANTIZE and not any(_weight(r) for r in readers
                                                  if r.op_type in MATRIX_OPS):  # fmt: skip
            continue  # a layer that is in float all the same
        yield node, f"{scale.size} scales"


def _weight_axis(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _matrix(model):
        dq = _weight(node)
        scale = None if dq is None else _parameter(dq, 1)
        if dq is None or scale is None or scale.size == 1:
            continue
        stored = _stored(dq)
        assert stored is not None
        axis = dq.attributes.get_int("axis", 1) % stored.ndim
        if node.op_type == "MatMul":
            wanted = stored.ndim - 1
        elif node.op_type == "Gemm":
            wanted = 0 if node.attributes.get_int("transB", 0) else 1
        else:
            wanted = 1 if node.op_type == "ConvTranspose" else 0
        if axis != wanted:
            yield node, f"scales along axis {axis} of the weight; {wanted} counts output channels"


def _weight_only(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _matrix(model):
        if _weight(node) is not None and _integer_input(node) is None:
            yield node, "a quantized weight and a float input"


def _activation_only(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _matrix(model):
        dq = _integer_input(node)
        scale = None if dq is None else _parameter(dq, 1)
        # a scale for each channel says that the layer is meant to be in float
        if scale is not None and scale.size == 1 and constant(node.inputs[1]) is not None:
            yield node, "a quantized input and a float weight"


def _integer_bias(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _matrix(model):
        dq = producer(node.inputs[2], DEQUANTIZE) if len(node.inputs) > 2 else None
        if dq is not None:
            yield node, "a bias in integers behind a DequantizeLinear"


def _float_bias(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _matrix(model):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if _weight(node) and _integer_input(node) and constant(bias) is not None:
            yield node, "a float bias"


def _integer_weight(model: ir.Model, target: Target) -> Iterator[Found]:
    if release(target.runtime_version) < (9,):
        for node in _matrix(model):
            dq = _weight(node)
            if dq is not None and producer(dq.inputs[0], QUANTIZE) is None:
                yield node, "an int8 weight in front of a DequantizeLinear"


def _eight_bits(model: ir.Model, target: Target) -> Iterator[Found]:
    assert target.scheme is not None
    if target.scheme.weight_bits == 7 and target.machines != ("aarch64", "arm64"):
        for node in _matrix(model):
            dq = _weight(node)
            stored = None if dq is None else constant(dq.inputs[0])
            if stored is not None and stored.dtype == np.int8:
                low, high = int(stored.min()), int(stored.max())
                if low < -64 or high > 63:
                    yield node, f"weights from {low} to {high}"


def _adds(model: ir.Model) -> Iterator[tuple[ir.Node, list[ir.Node | None], list[ir.Node | None]]]:
    """(Add, the dequantize operators of its inputs, integer convolutions at their ends)."""
    for node in _of(model, "Add"):
        dqs, convs = [], []
        for value in node.inputs:
            dq = producer(value, DEQUANTIZE)
            dq = dq if dq is not None and _stored(dq) is None else None
            q = None if dq is None else producer(dq.inputs[0], QUANTIZE)
            end = value if q is None else q.inputs[0]
            conv = producer(end, "Conv")
            whole = conv is not None and _weight(conv) and _integer_input(conv)
            alone = conv is not None and len(list(conv.outputs[0].uses())) == 1
            dqs.append(dq)
            convs.append(conv if whole and alone else None)
        yield node, dqs, convs


def _main_branch(model: ir.Model, target: Target) -> Iterator[Found]:
    assert target.scheme is not None
    if target.scheme.add_inputs == "skip" and "add" in target.scheme.ops:
        for node, dqs, convs in _adds(model):
            ends = [conv for conv in convs if conv is not None]
            if ends and all(dqs):
                yield node, f"Q/DQ on the branch of {ends[0].name} too"


def _skip_branch(model: ir.Model, target: Target) -> Iterator[Found]:
    assert target.scheme is not None
    if target.scheme.add_inputs == "skip" and "add" in target.scheme.ops:
        for node, dqs, convs in _adds(model):
            if any(convs) and not any(dqs):
                yield node, "no Q/DQ on the skip input"


def _both_inputs(model: ir.Model, target: Target) -> Iterator[Found]:
    assert target.scheme is not None
    if target.scheme.add_inputs == "both" and "add" in target.scheme.ops:
        for node, dqs, _ in _adds(model):
            floating = [v for v, dq in zip(node.inputs, dqs, strict=True)
                        if dq is None and constant(v) is None]  # fmt: skip
            if any(dqs) and floating:
                yield node, f"input {floating[0].name if floating[0] else ''} in float"


def _float_output(model: ir.Model, target: Target) -> Iterator[Found]:
    assert target.scheme is not None
    if not target.scheme.outputs:
        return
    for node in _of(model, "Conv", "Add"):
        if node.op_type == "Conv" and not (_weight(node) and _integer_input(node)):
            continue
        if node.op_type == "Add" and not all(producer(v, DEQUANTIZE) for v in node.inputs):
            continue
        end = node.outputs[0]
        readers = [use.node for use in end.uses()]
        if len(readers) == 1 and readers[0].op_type in FUSED:
            end = readers[0].outputs[0]
            readers = [use.node for use in end.uses()]
        leaves = end.is_graph_output() or all(_leaves(reader) for reader in readers)
        if not leaves and any(reader.op_type != QUANTIZE for reader in readers):
            others = sorted({r.op_type for r in readers if r.op_type != QUANTIZE})
            yield node, f"its output goes in float into {', '.join(others)}"


def _leaves(node: ir.Node) -> bool:
    """Whether what it gives only moves on its way out of the network."""
    return node.op_type in MOVING and all(
        value.is_graph_output() or all(_leaves(use.node) for use in value.uses())
        for value in node.outputs
    )


def _plugin(model: ir.Model, target: Target) -> Iterator[Found]:
    _, table = operators(target)
    for node in _of(model, *PLUGINS):
        if table is None or node.op_type in table:
            yield node, node.op_type


def _einsum(model: ir.Model, target: Target) -> Iterator[Found]:
    for node in _of(model, "Einsum"):
        equation = node.attributes.get_string("equation", "")
        if equation != equation.lower():
            yield node, equation


def _shape(model: ir.Model, target: Target) -> Iterator[Found]:
    first = 0 if target.shapes == "static" else 1
    for value in model.graph.inputs:
        if value.shape is None:
            yield None, f"{value.name} has no shape"
        elif any(not isinstance(d, int) for d in value.shape.dims[first:]):
            yield None, f"{value.name} is {value.shape}"


def _memory(model: ir.Model, target: Target) -> Iterator[Found]:
    assert target.memory_mib is not None
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    largest = 0
    for node in model.graph:
        for value in node.outputs:
            if value.shape is None or value.dtype is None:
                continue
            sizes = [d if isinstance(d, int) else 1 for d in value.shape.dims]
            largest = max(largest, int(np.prod(sizes)) * value.dtype.bitwidth // 8)
    # the weights, and the two tensors that the largest operator reads and writes
    needed = (weights + 2 * largest) / 2**20
    if needed > target.memory_mib:
        yield None, f"{needed:,.0f} MiB of weights and of the largest operator's tensors"


NVIDIA = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html"
ORT = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
RULES: dict[str, Rule] = {
    "opset": Rule(
        _always, _opset, "error", "opset {opset} at most",
        "edgekd export lowers it: edgekd export FILE --target {name}",
        "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md",
    ),
    "operator": Rule(
        _always, _operator, "error", "the operators of {table}",
        "use other layers; edgekd export writes out those that have an equal in older operators",
    ),
    "type": Rule(
        _always, _type, "error", "the element types of {table}",
        "cast to float or int32 before it",
    ),
    "plugin": Rule(
        lambda t: t.runtime == "tensorrt", _plugin, "warning", "operators of TensorRT itself; this "
        "one is in its plugin library, which trtexec loads and tensorrt-rtx does not have",
        "load libnvinfer_plugin in your program too",
        "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md",
    ),
    "einsum": Rule(
        lambda t: t.runtime == "tensorrt", _einsum, "error", "small letters in an equation",
        "edgekd export FILE --target {name} renames the axes",
        "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md",
    ),
    "integers": Rule(
        lambda t: t.scheme is None, _no_integers, "error", "no integers{why}",
        "give the float file; the device builds it in half precision",
        "https://github.com/NVIDIA/TensorRT/issues/3157",
    ),
    "zero-point": Rule(
        _symmetric, _zero_point, "error", "symmetric integers: zero point 0",
        "quantize with edgekd quantize --target {name}, or symmetric = True in your tool",
        "https://github.com/NVIDIA/TensorRT/issues/2774",
    ),
    "integer-type": Rule(
        _symmetric, _integer_kind, "error", "int8", "quantize to signed integers with zero point 0",
        NVIDIA,
    ),
    "signed": Rule(
        _onnxruntime, _signed, "warning", "uint8 activations fuse; int8 ones are slower",
        "add 128 to the zero points of activations: nothing is lost", ORT,
    ),
    "scale": Rule(
        _always, _scale, "error", "finite scales above 0", "calibrate again; a channel of zeros "
        "needs a small scale all the same", NVIDIA,
    ),
    "activation-granularity": Rule(
        _integers, _per_channel_activation, "error", "one scale for an activation; with more the "
        "operator runs in float without a word", "quantize activations per tensor", NVIDIA,
    ),
    "weight-axis": Rule(
        _integers, _weight_axis, "error", "scales along output channels; along another axis the "
        "operator runs in float without a word", "set axis of the weight's Q/DQ", NVIDIA,
    ),
    "weight-only": Rule(
        _integers, _weight_only, "error", "both inputs quantized; with the weight alone the "
        "operator runs in float without a word", "quantize its input too, or neither", NVIDIA,
    ),
    "activation-only": Rule(
        _integers, _activation_only, "warning", "both inputs quantized; with the activation alone "
        "the operator runs in float without a word",
        "quantize its weight too, if it is meant to run in integers", NVIDIA,
    ),
    "integer-bias": Rule(
        _tensorrt, _integer_bias, "error", "a float bias", "leave the bias in float",
        "https://github.com/NVIDIA/TensorRT/issues/4527",
    ),
    "float-bias": Rule(
        _onnxruntime, _float_bias, "warning", "an int32 bias of scale s_x · s_w; ONNX Runtime "
        "rounds a float one by itself, other runtimes compute in float",
        "store the bias in int32 behind a DequantizeLinear", ORT,
    ),
    "integer-weight": Rule(
        _tensorrt, _integer_weight, "error", "float weights with Q/DQ behind them",
        "edgekd export FILE --target {name} writes them so",
        "https://github.com/NVIDIA/TensorRT/issues/3360",
    ),
    "weight-range": Rule(
        lambda t: _integers(t) and t.verifier == "native", _eight_bits, "warning",
        "7-bit weights, −64 to 63: with 8 bits, vpmaddubsw saturates on a CPU without VNNI",
        "quantize with 7-bit weights (reduce_range in ONNX Runtime's tool)",
        "https://docs.openvino.ai/latest/pot_saturation_issue.html",
    ),
    "conv-branch": Rule(
        _integers, _main_branch, "warning", "at a residual Add, Q/DQ on the skip input alone: so "
        "convolution, Add and ReLU are one kernel", "take the Q/DQ between convolution and Add out",
        "https://github.com/NVIDIA/Model-Optimizer/pull/425",
    ),
    "skip-branch": Rule(
        _integers, _skip_branch, "warning", "at a residual Add, Q/DQ on the skip input",
        "quantize the skip input", "https://github.com/NVIDIA/Model-Optimizer/pull/425",
    ),
    "add-inputs": Rule(
        _integers, _both_inputs, "warning", "both inputs of an Add quantized; else it runs in "
        "float", "quantize the other input too", ORT,
    ),
    "float-output": Rule(
        _onnxruntime, _float_output, "warning", "a quantized output; without it the operator runs "
        "in float", "quantize its output", ORT,
    ),
    "shape": Rule(
        _always, _shape, "error", "{shapes}", "edgekd export FILE --shape INPUT=1x3x224x224",
    ),
    "memory": Rule(
        lambda t: t.memory_mib is not None, _memory, "error", "{memory_mib} MiB on the device",
        "a smaller network or resolution",
    ),
}  # fmt: skip


def limit_of(rule: Rule, target: Target) -> str:
    """The rule's limit, with the target's own figures."""
    return _filled(rule.limit, target)


def remedy_of(rule: Rule, target: Target) -> str:
    """The rule's remedy, likewise."""
    return _filled(rule.remedy, target)


def _filled(text: str, target: Target) -> str:
    static = "static shapes" if target.shapes == "static" else "static shapes but for the batch"
    return text.format(
        name=target.name, opset=target.opset, why=target.why_float, shapes=static,
        table=operators(target)[0], memory_mib=target.memory_mib,
    )  # fmt: skip
