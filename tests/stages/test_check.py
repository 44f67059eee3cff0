"""check: it finds every planted fault, nothing in good files, and agrees with tensorrt-rtx."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekd
from edgekd.cli import main
from edgekd.runtimes.operator_tables import read_table
from edgekd.runtimes.rules import RULES
from edgekd.runtimes.tensorrt import compile_check
from edgekd.stages.adapt import adapt
from edgekd.target import Target, target_names

FLOAT, INT8, INT32 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT32
SIZE, CHANNELS = 16, 8
Shape = Sequence[int | str]
Options = MappingProxyType[str, Any]
NONE: Options = MappingProxyType({})


class Net:
    """A graph in the making: each method adds a node and returns the name of its output."""

    def __init__(self, shape: Shape = ("N", CHANNELS, SIZE, SIZE), dtype: int = FLOAT) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs = [helper.make_tensor_value_info("x", dtype, shape)]
        self.random = np.random.default_rng(0)

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype)
        return name

    def add(self, op: str, *inputs: str, outputs: int = 1, name: str = "", **options: Any) -> str:
        names = [f"{op}{len(self.nodes)}.{i}" for i in range(outputs)]
        name = name or f"{op}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, names, name=name, **options))
        return names[0]

    def quantize(
        self, x: str, scale: Any = 0.05, zero: Any = 0, dtype: Any = np.int8, **axis: int
    ) -> str:
        """Through a quantize and a dequantize operator."""
        s = self.constant(scale)
        z = self.constant(np.full(np.shape(scale), zero), dtype)
        q = self.add("QuantizeLinear", x, s, z, **axis)
        return self.add("DequantizeLinear", q, s, z, **axis)

    def weight(
        self, *shape: int, axis: int = 0, form: str = "float", largest: float = 127, scale: Any = 1,
        zero: int = 0,
    ) -> str:  # fmt: skip
        """Quantized per channel of `axis`: from "float", or as "integers"; or "plain"."""
        real = self.random.normal(0, 1, shape).astype(np.float32)
        if form == "plain":
            return self.constant(real)
        other = tuple(a for a in range(len(shape)) if a != axis)
        scales = (np.abs(real).max(other) / largest * scale).astype(np.float32)
        if form == "float":
            return self.quantize(self.constant(real), scales, zero, axis=axis)
        spread = [-1 if a == axis else 1 for a in range(len(shape))]
        integers = self.constant(np.rint(real / scales.reshape(spread)), np.int8)
        z = self.constant(np.full(len(scales), zero), np.int8)
        return self.add("DequantizeLinear", integers, self.constant(scales), z, axis=axis)

    def conv(self, x: str, w: str, bias: str | None = "float", op: str = "Conv", **at: Any) -> str:
        extra = [self.constant(np.zeros(CHANNELS))] if bias == "float" else [bias] if bias else []
        return self.add(op, x, w, *extra, name="conv", **{"pads": [1, 1, 1, 1], **at})

    def model(self, *outputs: str, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
        """With outputs of whatever type and shape follow."""
        tensors = [numpy_helper.from_array(v, k) for k, v in self.constants.items()]
        domains = {n.domain for n in self.nodes} - {""}
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
        ends = [onnx.ValueInfoProto(name=o) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, ends, tensors)
        model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
        inferred = onnx.shape_inference.infer_shapes(model)
        for end in inferred.graph.output:  # what ONNX infers nothing of
            if not end.type.tensor_type.HasField("shape"):
                dtype = end.type.tensor_type.elem_type or FLOAT
                end.CopyFrom(helper.make_tensor_value_info(end.name, dtype, ["A"]))
        return inferred


def orin(
    x: Options | None = NONE, w: Options = NONE, bias: str = "float", **at: Any
) -> onnx.ModelProto:
    """One convolution as TensorRT wants it, but for the changes; `x=None`: input in float."""
    net = Net()
    given = "x" if x is None else net.quantize("x", **x)
    weight = net.weight(CHANNELS, CHANNELS, 3, 3, **w)
    if bias == "int32":
        s, z = net.constant(np.full(CHANNELS, 1e-3)), net.constant(np.zeros(CHANNELS), np.int32)
        b = net.add("DequantizeLinear", net.constant(np.ones(CHANNELS), np.int32), s, z, axis=0)
        return net.model(net.conv(given, weight, b), **at)
    return net.model(net.conv(given, weight), **at)


def host(
    bias: str = "int32", off: float = 1, x: Options = NONE, w: Options = NONE, **at: Any
) -> onnx.ModelProto:  # fmt: skip
    """One convolution as ONNX Runtime wants it: uint8, int32 bias, 7-bit weights."""
    net = Net()
    given = net.quantize("x", **{"zero": 128, "dtype": np.uint8, **x})
    weight = net.weight(CHANNELS, CHANNELS, 3, 3, **{"form": "integers", "largest": 63, **w})
    b: str | None = "float"
    if bias == "int32":
        scales = net.constants[net.nodes[-1].input[1]]
        s, z = net.constant(scales * 0.05 * off), net.constant(np.zeros(CHANNELS), np.int32)
        b = net.add("DequantizeLinear", net.constant(np.ones(CHANNELS), np.int32), s, z, axis=0)
    y = net.conv(given, weight, b)
    return net.model(net.quantize(y, 0.1, 128, np.uint8), **at)


def sigmoided() -> onnx.ModelProto:
    """A convolution as ONNX Runtime wants it, whose output goes into a sigmoid in float."""
    model = host()
    q = next(n for n in model.graph.node if n.input[0].startswith("Conv"))
    end = model.graph.output[0].name
    kept = [n for n in model.graph.node if n.output[0] not in (q.output[0], end)]
    made = helper.make_node("Sigmoid", [q.input[0]], [end], name="sigmoid")
    del model.graph.node[:]
    model.graph.node.extend([*kept, made])
    return model


def one(
    op: str, *inputs: tuple[int, Shape], constants: Sequence[Any] = (), outputs: int = 1,
    used: Sequence[int] = (0,), opset: int = 13, ir_version: int = 8, **options: Any,
) -> onnx.ModelProto:  # fmt: skip
    """A single operator, named "it"."""
    net = Net()
    net.inputs = [helper.make_tensor_value_info(f"x{i}", *x) for i, x in enumerate(inputs)]
    names = [i.name for i in net.inputs] + [net.constant(c, np.asarray(c).dtype) for c in constants]
    first = net.add(op, *names, outputs=outputs, name="it", **options)
    return net.model(*(first[:-1] + str(i) for i in used), opset=opset, ir_version=ir_version)


def product(op: str, axis: int, **options: Any) -> onnx.ModelProto:
    """A quantized Gemm or MatMul whose weight is 16 × 16."""
    net = Net(("N", 16))
    x = net.quantize("x")
    return net.model(net.add(op, x, net.weight(16, 16, axis=axis), name="product", **options))


def upsampled(axis: int) -> onnx.ModelProto:
    net = Net()
    w = net.weight(CHANNELS, CHANNELS, 2, 2, axis=axis)
    y = net.conv(net.quantize("x"), w, op="ConvTranspose", pads=[0, 0, 0, 0], strides=[2, 2])
    return net.model(y)


def residual(
    skip: bool, branch: bool, unsigned: bool = False, convolved: bool = False
) -> onnx.ModelProto:
    """conv → Relu → conv, and an Add; with quantizers on the inputs of the Add as asked for."""
    net = Net()
    kind: dict[str, Any] = {"zero": 128, "dtype": np.uint8} if unsigned else {}
    form: dict[str, Any] = {"form": "integers", "largest": 63} if unsigned else {}
    shape = (CHANNELS, CHANNELS, 3, 3)
    x = net.quantize("x", **kind)

    def conv(given: str) -> str:
        return net.add("Conv", given, net.weight(*shape, **form), pads=[1, 1, 1, 1])

    first = net.add("Relu", conv(x))
    quantized = net.quantize(first, **kind)
    y = conv(quantized)
    other = conv(quantized) if convolved else first
    if branch:
        y = net.quantize(y, **kind)
    if skip:
        other = net.quantize(other, **kind) if convolved else quantized
    return net.model(net.add("Relu", net.add("Add", y, other, name="sum")))


def averaged(zero: int) -> onnx.ModelProto:
    """An average over windows, whose padding counts, of integers with this zero point."""
    net = Net()
    x = net.quantize("x", zero=zero, dtype=np.uint8)
    y = net.add("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1,
                name="mean")  # fmt: skip
    return net.model(net.quantize(y, zero=zero, dtype=np.uint8))


def pooled(channels: int) -> onnx.ModelProto:
    """A squeeze-and-excite convolution over 1 × 1 maps."""
    net = Net(("N", channels, 8, 8))
    x = net.quantize(net.add("GlobalAveragePool", "x"))
    y = net.add("Conv", x, net.weight(channels, channels, 1, 1), name="conv")
    return net.model(y)


def integer_conv() -> onnx.ModelProto:
    net = Net(dtype=TensorProto.INT8)
    s, z = net.constant(0.05), net.constant(0, np.int8)
    w = net.constant(np.ones((CHANNELS, CHANNELS, 3, 3)), np.int8)
    return net.model(net.add("QLinearConv", "x", s, z, w, s, z, s, z, name="it"))


def computed_scale() -> onnx.ModelProto:
    net = Net()
    largest = net.add("ReduceMax", "x", keepdims=0)
    scale = net.add("Div", largest, net.constant(127))
    zero = net.constant(0, np.int8)
    q = net.add("QuantizeLinear", "x", scale, zero)
    d = net.add("DequantizeLinear", q, scale, zero)
    return net.model(net.conv(d, net.weight(CHANNELS, CHANNELS, 3, 3)))


def computed_k() -> onnx.ModelProto:
    net = Net((1, 16))
    k = net.add("Cast", net.add("ReduceMax", "x", keepdims=0), to=TensorProto.INT64)
    k = net.add("Reshape", k, net.constant([1], np.int64))
    return net.model(net.add("TopK", "x", k, outputs=2, name="it"))


def conditional(op: str, **options: Any) -> onnx.ModelProto:
    """`op` in one branch of an If."""
    net = Net((1, 4, 4))

    def branch(kind: str, name: str, **more: Any) -> onnx.GraphProto:
        node = helper.make_node(kind, ["x"], [name], name="it", **more)
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(name, FLOAT, [1])]
        )

    bodies = {"then_branch": branch(op, "a", **options),
              "else_branch": branch("ReduceSumSquare", "b", axes=[1, 2], keepdims=0)}  # fmt: skip
    big = net.add("Cast", net.add("ReduceMax", "x", keepdims=0), to=TensorProto.BOOL)
    return net.model(net.add("If", big, **bodies))


def unnamed_zero() -> onnx.ModelProto:
    """Without a zero point: that is uint8."""
    net = Net()
    s = net.constant(0.05)
    d = net.add("DequantizeLinear", net.add("QuantizeLinear", "x", s), s)
    return net.model(net.conv(d, net.weight(CHANNELS, CHANNELS, 3, 3)))


def large(elements: int = 64, maps: int = 1) -> onnx.ModelProto:
    """Weights of so many elements, behind so many MiB of activations."""
    net = Net((1, maps, 512, 512))
    x = net.add("GlobalAveragePool", net.add("Relu", "x"))
    x = net.add("Reshape", x, net.constant([1, maps], np.int64))
    return net.model(net.add("MatMul", x, net.weight(maps, elements // maps, form="plain")))


def fixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """For a batch of one."""
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return model


def headless() -> onnx.ModelProto:
    """The first node is missing."""
    model = orin()
    del model.graph.node[0]
    return model


def misfit() -> onnx.ModelProto:
    """A product of (1, 5) and (16, 4)."""
    model = one("MatMul", ROW, constants=[np.ones((16, 4), np.float32)])
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    return model


# ---- faults --------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A file with one fault: for which target, what is to be found, and where.

    Attributes:
        node: the name of the node; None: the rule is about the file.
    """

    target: str
    rule: str
    severity: str
    node: str | None
    make: Callable[[], onnx.ModelProto]


ORIN, XAVIER, NANO, TX2 = "jetson-orin-nano", "jetson-xavier-nx", "jetson-nano", "jetson-tx2"
HOST, IOS, NPU = "host-onnxruntime", "ios-coreml-ort", "intel-npu"
IMAGE: tuple[int, Shape] = (FLOAT, (1, CHANNELS, SIZE, SIZE))
ROW: tuple[int, Shape] = (FLOAT, (1, 16))
SQUARE: tuple[int, Shape] = (FLOAT, (1, 4, 4))
BOXES = [(FLOAT, (1, 6, 4)), (FLOAT, (1, 2, 6))]
ROIS = np.zeros((3, 4), np.float32), np.zeros(3, np.int64)
QUANTIZED = [
    np.float32(0.1), np.int8(0), np.ones((4, 4), np.int8), np.float32(0.1), np.int8(0),
    np.float32(0.1), np.int8(0),
]  # fmt: skip
DOUBLES = [(TensorProto.DOUBLE, IMAGE[1]), (TensorProto.DOUBLE, (8, 8, 1, 1))]


def o(**options: Any) -> Options:
    return MappingProxyType(options)


FAULTS: dict[str, Fault] = {
    # how quantizers are written
    "zero point 3": Fault(ORIN, "zero-point", "error", "QuantizeLinear0",
        lambda: orin(o(zero=3))),
    "uint8 with its middle at 128": Fault(ORIN, "zero-point", "error", "QuantizeLinear0",
        lambda: orin(o(zero=128, dtype=np.uint8))),
    "uint8 with zero point 0": Fault(ORIN, "unsigned", "error", "QuantizeLinear0",
        lambda: orin(o(dtype=np.uint8))),
    "no zero point, which is uint8": Fault(ORIN, "unsigned", "error", "QuantizeLinear0",
        unnamed_zero),
    "zero point 3 on Xavier": Fault(XAVIER, "zero-point", "error", "QuantizeLinear0",
        lambda: orin(o(zero=3))),
    "zero point of a weight": Fault(ORIN, "zero-point", "error", "QuantizeLinear2",
        lambda: orin(w=o(zero=1))),
    "scale 0": Fault(ORIN, "scale", "error", "QuantizeLinear0", lambda: orin(o(scale=0))),
    "scale NaN": Fault(HOST, "scale", "error", "QuantizeLinear0",
        lambda: host(x=o(scale=np.nan))),
    "scale below 0": Fault(ORIN, "scale", "error", "QuantizeLinear0",
        lambda: orin(o(scale=-0.05))),
    "scale of a channel infinite": Fault(ORIN, "scale", "error", "QuantizeLinear2",
        lambda: orin(w=o(scale=[np.inf, *[1] * 7]))),
    "scale infinite": Fault(
        HOST, "scale", "error", "QuantizeLinear0", lambda: host(x=o(scale=np.inf))
    ),
    "scale that is computed": Fault(ORIN, "computed-scale", "error", "QuantizeLinear2",
        computed_scale),
    "int16 activations": Fault(HOST, "integer-width", "warning", "QuantizeLinear0",
        lambda: host(x=o(zero=0, dtype=np.int16), opset=21)),
    "per-channel activations": Fault(ORIN, "per-channel-activation", "warning", "QuantizeLinear0",
        lambda: orin(o(scale=np.linspace(0.04, 0.06, 8), axis=1))),
    "per-channel activations on the host": Fault(
        HOST, "per-channel-activation", "warning", "QuantizeLinear0",
        lambda: host(x=o(scale=np.linspace(0.04, 0.06, 8), axis=1))),
    "int8 initializer": Fault(XAVIER, "int8-initializer", "error", "DequantizeLinear2",
        lambda: orin(w=o(form="integers"))),
    # weights
    "weight axis 1 of Conv": Fault(ORIN, "weight-axis", "warning", "conv",
        lambda: orin(w=o(axis=1))),
    "weight axis 1 of Gemm, transposed": Fault(ORIN, "weight-axis", "warning", "product",
        lambda: product("Gemm", 1, transB=1)),
    "weight axis 0 of Gemm": Fault(ORIN, "weight-axis", "warning", "product",
        lambda: product("Gemm", 0)),
    "weight axis 0 of MatMul": Fault(ORIN, "weight-axis", "warning", "product",
        lambda: product("MatMul", 0)),
    "weight axis 0 of ConvTranspose": Fault(ORIN, "weight-axis", "warning", "conv",
        lambda: upsampled(0)),
    "weight axis 1 of Conv on the host": Fault(HOST, "weight-axis", "warning", "conv",
        lambda: host(w=o(axis=1))),
    "only the weight quantized": Fault(ORIN, "weight-only", "warning", "conv",
        lambda: orin(None)),
    "only the input quantized": Fault(ORIN, "activation-only", "warning", "conv",
        lambda: orin(w=o(form="plain"))),
    "weights of 8 bits": Fault(HOST, "weight-range", "warning", "conv",
        lambda: host(w=o(largest=127))),
    "weights of 8 bits in float": Fault("intel-cpu", "weight-range", "warning", "conv",
        lambda: host(w=o(largest=127, form="float"))),
    "a convolution of 4 pooled channels": Fault(ORIN, "pooled-channels", "warning", "conv",
        lambda: pooled(4)),
    # biases
    "int32 bias": Fault(ORIN, "integer-bias", "error", "DequantizeLinear4",
        lambda: orin(bias="int32")),
    "float bias": Fault(HOST, "float-bias", "warning", "conv", lambda: host(bias="float")),
    "bias of another scale": Fault(HOST, "bias-scale", "error", "conv", lambda: host(off=2)),
    "int8 activations on the host": Fault(HOST, "signed", "warning", "QuantizeLinear0",
        lambda: host(x=o(zero=0, dtype=np.int8))),
    "float output of a convolution": Fault(HOST, "float-output", "warning", "conv", sigmoided),
    "an Einsum of capitals": Fault(ORIN, "einsum", "error", "it",
        lambda: one("Einsum", IMAGE, IMAGE, equation="BCHW,BCHW->BC")),
    # adds
    "skip input in float": Fault(ORIN, "add-skip", "warning", "sum",
        lambda: residual(skip=False, branch=False)),
    "quantizer on the branch": Fault(ORIN, "add-branch", "warning", "sum",
        lambda: residual(skip=True, branch=True)),
    "quantizers on two convolutions": Fault(XAVIER, "add-branch", "warning", "sum",
        lambda: residual(skip=True, branch=True, convolved=True)),
    "quantizer on the branch on OpenVINO": Fault("intel-cpu", "add-branch", "warning", "sum",
        lambda: residual(skip=True, branch=True, unsigned=True)),
    "one input of the Add in float": Fault(HOST, "add-input", "warning", "sum",
        lambda: residual(skip=True, branch=False, unsigned=True)),
    "padding that counts in an average": Fault("intel-cpu", "averaged-padding", "error", "mean",
        lambda: averaged(100)),
    # devices without integers
    "Q/DQ on Nano": Fault(NANO, "no-integers", "error", "QuantizeLinear0",
        lambda: orin(opset=13)),
    "Q/DQ on TX2": Fault(TX2, "no-integers", "error", "QuantizeLinear0",
        lambda: orin(opset=13)),
    "Q/DQ on Core ML": Fault(IOS, "no-integers", "warning", "QuantizeLinear0",
        lambda: fixed(orin())),
    # operators
    "QLinearConv": Fault(ORIN, "integer-operator", "error", "it", integer_conv),
    "QLinearMatMul": Fault(XAVIER, "integer-operator", "error", "it",
        lambda: one("QLinearMatMul", (INT8, (4, 4)), constants=QUANTIZED)),
    "DynamicQuantizeLinear": Fault(ORIN, "integer-operator", "error", "it",
        lambda: one("DynamicQuantizeLinear", ROW, outputs=3, used=(0, 1, 2))),
    "MatMulInteger": Fault(ORIN, "integer-operator", "error", "it",
        lambda: one("MatMulInteger", (INT8, (4, 4)), constants=[np.ones((4, 4), np.int8)])),
    "ConvInteger": Fault(NANO, "integer-operator", "error", "it",
        lambda: one("ConvInteger", (INT8, IMAGE[1]), constants=[np.ones((8, 8, 1, 1), np.int8)])),
    "Mod on Nano": Fault(NANO, "operator", "error", "it", lambda: one("Mod", ROW, ROW, fmod=1)),
    "Reciprocal on TX2": Fault(TX2, "operator", "error", "it", lambda: one("Reciprocal", ROW)),
    "RoiAlign on Nano": Fault(NANO, "operator", "error", "it",
        lambda: one("RoiAlign", IMAGE, constants=ROIS, output_height=2, output_width=2)),
    "LayerNormalization on Xavier": Fault(XAVIER, "operator", "error", "it",
        lambda: one("LayerNormalization", ROW, constants=[np.ones(16, np.float32)], opset=17)),
    "Det on Orin": Fault(ORIN, "operator", "error", "it", lambda: one("Det", SQUARE)),
    "Det in a branch of an If": Fault(ORIN, "operator", "error", "it", lambda: conditional("Det")),
    "StringNormalizer on OpenVINO": Fault("intel-cpu", "operator", "error", "it",
        lambda: one("StringNormalizer", (TensorProto.STRING, (4,)))),
    "Pad on Core ML": Fault(IOS, "operator", "warning", "it",
        lambda: one("Pad", IMAGE, constants=[np.array([0, 0, 1, 1, 0, 0, 1, 1])])),
    "HardSwish on Core ML": Fault(IOS, "operator", "warning", "it",
        lambda: one("HardSwish", IMAGE, opset=14)),
    "RoiAlign on Orin": Fault(ORIN, "plugin", "warning", "it",
        lambda: one("RoiAlign", IMAGE, constants=ROIS, opset=16, output_height=2,
                    output_width=2)),
    "NonMaxSuppression on Nano": Fault(NANO, "plugin", "warning", "it",
        lambda: one("NonMaxSuppression", *BOXES)),
    "EfficientNMS_TRT on Orin": Fault(ORIN, "plugin", "warning", "it",
        lambda: one("EfficientNMS_TRT", *BOXES)),
    "EfficientNMS_TRT on Nano": Fault(NANO, "custom-operator", "error", "it",
        lambda: one("EfficientNMS_TRT", *BOXES)),
    "a vendor's operator": Fault(ORIN, "custom-operator", "error", "it",
        lambda: one("QuickGelu", ROW, domain="com.microsoft")),
    "a vendor's operator by ONNX's name": Fault(
        ORIN,
        "custom-operator",
        "warning",
        "it",
        lambda: one("Gelu", ROW, domain="com.microsoft"),
    ),
    "somebody's operator": Fault(HOST, "custom-operator", "error", "it",
        lambda: one("Swirl", IMAGE, domain="org.example")),
    # element types
    "MatMul of int32 on Nano": Fault(NANO, "type", "error", "it",
        lambda: one("MatMul", (INT32, (4, 4)), (INT32, (4, 4)))),
    "an output of uint8 on Nano": Fault(NANO, "type", "error", "it",
        lambda: one("Cast", ROW, to=TensorProto.UINT8)),
    "an exponent of int64 on Nano": Fault(NANO, "type", "error", "it",
        lambda: one("Pow", ROW, constants=[np.array(2)])),
    "Add of int16": Fault(ORIN, "type", "error", "it",
        lambda: one("Add", (TensorProto.INT16, (1, 16)), (TensorProto.INT16, (1, 16)),
                    opset=14)),
    "Conv of double on the host": Fault(HOST, "type", "error", "it",
        lambda: one("Conv", *DOUBLES)),
    # how they are used
    "K of TopK computed": Fault(XAVIER, "constant-input", "error", "it", computed_k),
    "weight of Gemm computed on Core ML": Fault(IOS, "constant-input", "warning", "it",
        lambda: one("Gemm", (FLOAT, (4, 4)), (FLOAT, (4, 4)))),
    "convolution in 3D on Core ML": Fault(IOS, "spatial-axes", "warning", "it",
        lambda: one("Conv", (FLOAT, (1, 2, 8, 8, 8)),
                    constants=[np.ones((2, 2, 3, 3, 3), np.float32)])),
    "indices of MaxPool": Fault(ORIN, "further-output", "error", "it",
        lambda: one("MaxPool", IMAGE, outputs=2, used=(0, 1), kernel_shape=[2, 2])),
    # the file
    "opset 14 on Nano": Fault(NANO, "opset", "error", None, lambda: one("Relu", IMAGE, opset=14)),
    "opset 18 on Xavier": Fault(XAVIER, "opset", "error", None,
        lambda: one("Relu", IMAGE, opset=18)),
    "opset 21 on Orin": Fault(ORIN, "opset", "error", None, lambda: orin(opset=21)),
    "an opset that is not out": Fault(HOST, "opset", "error", None,
        lambda: one("Relu", IMAGE, opset=99)),
    "IR version 14": Fault(HOST, "ir-version", "error", None,
        lambda: one("Relu", IMAGE, ir_version=14)),
    "dynamic height": Fault(ORIN, "dynamic-shape", "warning", None,
        lambda: one("Relu", (FLOAT, ("N", 3, "H", "W")))),
    "dynamic batch on NPU": Fault(NPU, "dynamic-shape", "error", None,
        lambda: one("Relu", (FLOAT, ("N", 3, 8, 8)))),
    "dynamic batch on Core ML": Fault(IOS, "dynamic-shape", "warning", None,
        lambda: one("Relu", (FLOAT, ("N", 3, 8, 8)))),
    "weights of 5 MiB on 4": Fault("tiny", "memory", "error", None,
        lambda: large(elements=5 * 2**18)),
    "activations of 8 MiB on 4": Fault("tiny", "memory", "error", None, lambda: large(maps=4)),
    "a node that reads nothing known": Fault(ORIN, "invalid-onnx", "error", None,
        headless),
    "an attribute that is missing": Fault(HOST, "invalid-onnx", "error", None,
        lambda: one("MaxPool", IMAGE)),
    "shapes that do not fit": Fault(NANO, "invalid-onnx", "error", None,
        misfit),
}  # fmt: skip


def device(name: str) -> Target:
    if name == "tiny":
        return Target.load(HOST).model_copy(update={"memory_mib": 4})
    return Target.load(name)


def written(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(tmp_path, name):
    fault = FAULTS[name]
    done = edgekd.check(written(fault.make(), tmp_path), target=device(fault.target))
    assert {(f.rule, f.severity) for f in done.findings} == {(fault.rule, fault.severity)}
    assert done.passed == (fault.severity == "warning")
    first = done.findings[0]
    assert first.node == (fault.node or "")
    assert first.found and first.limit and first.remedy
    assert (first.source or "https://").startswith("https://")


def test_the_corpus_is_large_enough_and_knows_every_rule():
    planted = {fault.rule for fault in FAULTS.values()}
    assert len(FAULTS) >= 40
    assert {rule.name for rule in RULES} | {"invalid-onnx"} == planted


def outside(folder: Path) -> Path:
    """A file whose weight lies in `weights.bin`."""
    model = one("MatMul", ROW, constants=[np.ones((16, 64), np.float32)])
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_weights_beside_the_file_are_there_and_whole(tmp_path):
    path = outside(tmp_path)
    assert edgekd.check(path, target=ORIN).findings == ()
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    (short,) = edgekd.check(path, target=ORIN).findings
    assert (short.rule, "4095 bytes" in short.found) == ("external-data", True)
    weights.unlink()
    (missing,) = edgekd.check(path, target=ORIN).findings
    assert (missing.rule, missing.severity) == ("external-data", "error")
    assert missing.found.endswith("weights.bin is missing")


# ---- good files ----------------------------------------------------------------------------------


def classifier(
    pool: str = "GlobalAveragePool", shape: Shape = ("N", 3, 32, 32), norm: bool = False
) -> onnx.ModelProto:
    """conv → (norm) → Relu → MaxPool → a residual block → pool → Gemm."""
    net = Net(shape)

    def conv(x: str, channels: int, **at: Any) -> str:
        w = net.weight(8, channels, 3, 3, form="plain")
        return net.add("Conv", x, w, net.constant(np.zeros(8)), pads=[1, 1, 1, 1], **at)

    y = conv("x", 3, strides=[2, 2])
    if norm:
        y = net.add("BatchNormalization", y, *(net.constant(np.ones(8)) for _ in range(4)))
    y = net.add("MaxPool", net.add("Relu", y), kernel_shape=[2, 2], strides=[2, 2])
    y = net.add("Relu", net.add("Add", conv(net.add("Relu", conv(y, 8)), 8), y))
    y = net.add("Reshape", net.add(pool, y), net.constant([-1, 8], np.int64))
    w = net.weight(10, 8, form="plain")
    return net.model(net.add("Gemm", y, w, net.constant(np.zeros(10)), transB=1), opset=13)


def mobile() -> onnx.ModelProto:
    """Depthwise, ReLU6, squeeze-and-excite."""
    net = Net()
    y = net.add("Conv", "x", net.weight(8, 1, 3, 3, form="plain"), group=8, pads=[1, 1, 1, 1])
    y = net.add("Clip", y, net.constant(0), net.constant(6))
    gate = net.add("GlobalAveragePool", y)
    gate = net.add("Conv", gate, net.weight(8, 8, 1, 1, form="plain"))
    return net.model(net.add("Mul", y, net.add("HardSigmoid", gate)), opset=13)


def detector() -> onnx.ModelProto:
    """Two scales, upsampled and joined, with shapes computed on the way."""
    net = Net((1, 8, 16, 16))
    low = net.add("Conv", "x", net.weight(8, 8, 3, 3, form="plain"), strides=[2, 2],
                  pads=[1, 1, 1, 1])  # fmt: skip
    up = net.add("Resize", low, "", net.constant([1, 1, 2, 2]), mode="nearest")
    both = net.add("Concat", up, "x", axis=1)
    flat = net.add("Reshape", both, net.constant([1, 16, -1], np.int64))
    y = net.add("Transpose", flat, perm=[0, 2, 1])
    size = net.add("Gather", net.add("Shape", y), net.constant([1], np.int64))
    return net.model(net.add("Sigmoid", y), size, opset=13)


def decoder() -> onnx.ModelProto:
    net = Net()
    w = net.weight(8, 8, 2, 2, form="plain")
    return net.model(net.add("Tanh", net.add("ConvTranspose", "x", w, strides=[2, 2])), opset=13)


def attention(normalized: bool = True) -> onnx.ModelProto:
    """One head over 8 tokens of 16."""
    net = Net(("N", 8, 16))
    x = "x"
    if normalized:
        x = net.add("LayerNormalization", x, net.constant(np.ones(16)), net.constant(np.ones(16)))
    q, k, v = (net.add("MatMul", x, net.weight(16, 16, form="plain")) for _ in range(3))
    scores = net.add("MatMul", q, net.add("Transpose", k, perm=[0, 2, 1]))
    y = net.add("MatMul", net.add("Softmax", net.add("Div", scores, net.constant(4))), v)
    return net.model(net.add("Add", y, "x"), opset=17 if normalized else 13)


def moved() -> onnx.ModelProto:
    """Quantizers in front of operators that only move numbers."""
    net = Net(("N", 8, 4, 4))
    x = net.add("MaxPool", net.quantize("x"), kernel_shape=[2, 2], strides=[2, 2])
    y = net.add("Conv", x, net.weight(8, 8, 1, 1))
    y = net.add("Flatten", net.quantize(y))
    w = net.add("Transpose", net.weight(8, 32), perm=[1, 0])
    return net.model(net.add("MatMul", y, w, name="product"))


def listed() -> onnx.ModelProto:
    """As old exporters do: weights are listed among the inputs, and nodes have no names."""
    model = orin(opset=13)
    for tensor in model.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(value)
    for node in model.graph.node:
        node.name = node.name if node.name == "conv" else ""
    return model


def local_function() -> onnx.ModelProto:
    """An operator that the file defines itself."""
    return onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13, "mine" : 1]>
        g (float[1, 4] x) => (float[1, 4] y) { y = mine.Twice (x) }
        <domain: "mine", opset_import: ["" : 13]> Twice (a) => (b) { b = Add (a, a) }"""
    )


CPUS = [HOST, "android-arm64", "raspberry-pi-4", "raspberry-pi-5", "intel-cpu", "intel-cpu-vnni",
        "intel-igpu"]  # fmt: skip
ORINS = [ORIN, "jetson-orin-nx", "jetson-agx-orin"]
XAVIERS = [XAVIER, "jetson-agx-xavier"]
JETSONS = [NANO, TX2, *XAVIERS, *ORINS]
# name -> (file, the targets that take it)
GOOD: dict[str, tuple[Callable[[], onnx.ModelProto], list[str]]] = {
    "residual network": (classifier, CPUS + JETSONS),
    "residual network, fixed": (lambda: classifier(shape=(1, 3, 32, 32)),
                                [*CPUS, *JETSONS, IOS, NPU]),
    "an average of integers from 0 on": (lambda: averaged(0), CPUS),
    "with BatchNorm": (lambda: classifier(norm=True), CPUS + JETSONS),
    "any height": (lambda: classifier(shape=("N", 3, "H", "W")), CPUS),
    "mobile": (mobile, CPUS + JETSONS),
    "mobile, fixed": (lambda: fixed(mobile()), [IOS, NPU]),
    "detector": (detector, [*CPUS, *JETSONS, NPU]),
    "decoder": (decoder, CPUS + JETSONS),
    "attention": (attention, CPUS + ORINS),
    "attention without norm": (lambda: attention(False), CPUS + JETSONS),
    "an If": (lambda: conditional("ReduceSumSquare", axes=[1, 2], keepdims=0), CPUS),
    "its own function": (local_function, [*CPUS, *JETSONS, NPU, IOS]),
    "integers of TensorRT": (orin, XAVIERS + ORINS),
    "integers at opset 13": (lambda: orin(opset=13), XAVIERS + ORINS),
    "integers at opset 20": (lambda: orin(opset=20), ORINS),
    "int8 initializers": (lambda: orin(w=o(form="integers")), ORINS),
    "residual, skip quantized": (lambda: residual(skip=True, branch=False), XAVIERS + ORINS),
    "residual, two convolutions": (lambda: residual(skip=True, branch=False, convolved=True),
                                   XAVIERS + ORINS),
    "Gemm": (lambda: product("Gemm", 0, transB=1), XAVIERS + ORINS),
    "Gemm, not transposed": (lambda: product("Gemm", 1), XAVIERS + ORINS),
    "MatMul": (lambda: product("MatMul", 1), XAVIERS + ORINS),
    "ConvTranspose": (lambda: upsampled(1), XAVIERS + ORINS),
    "pooled channels": (lambda: pooled(8), XAVIERS + ORINS),
    "moved numbers": (moved, XAVIERS + ORINS),
    "weights among the inputs": (listed, XAVIERS + ORINS),
    "integers of ONNX Runtime": (host, CPUS),
    "integers of ONNX Runtime, 7 bits in float": (lambda: host(w=o(form="float")), CPUS),
    "residual, both quantized": (lambda: residual(skip=True, branch=True, unsigned=True),
                                 [HOST, "android-arm64"]),
    "QLinearConv where there is one": (integer_conv, CPUS),
    "a vendor's operator where it is known": (
        lambda: one("QuickGelu", ROW, domain="com.microsoft"), [HOST]),
    "FP16": (lambda: one("Conv", (TensorProto.FLOAT16, IMAGE[1]),
                         constants=[np.ones((8, 8, 1, 1), np.float16)]), [*CPUS, *JETSONS, IOS]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_raises_nothing(tmp_path, name):
    make, targets = GOOD[name]
    path = written(make(), tmp_path)
    assert {n: edgekd.check(path, target=n).findings for n in targets} == dict.fromkeys(targets, ())


def test_there_are_enough_good_files():
    assert len(GOOD) >= 20
    shown = {name for _, names in GOOD.values() for name in names}
    without = {"android-litert", "android-executorch"}  # their runtimes do not read ONNX
    assert shown == set(target_names()) - without


# ---- what edgekd itself exports -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained_for", "targets"),
    [
        (HOST, [HOST, "android-arm64", "raspberry-pi-4", "raspberry-pi-5"]),
        (ORIN, ORINS),
        (XAVIER, XAVIERS),
        (None, [HOST, "android-arm64", "raspberry-pi-5", *JETSONS]),
    ],
)
def test_what_edgekd_exports_raises_nothing(tmp_path, trained, batches, trained_for, targets):
    net = trained
    if trained_for is not None:
        net = edgekd.quantize(net, target=trained_for, data=[x for x, _ in batches[:1]])
    for name in targets:
        artifact = edgekd.export(net, target=name, out=tmp_path / name)
        assert edgekd.check(artifact.path, target=name).findings == (), name


def test_a_file_for_another_device_is_told_from_its_own(int8_artifact):
    rules = {f.rule for f in edgekd.check(int8_artifact.path, target=ORIN).findings}
    assert {"zero-point", "integer-bias", "add-branch"} <= rules
    assert {f.rule for f in edgekd.check(int8_artifact.path, target=NANO).findings} >= {
        "no-integers", "opset",
    }  # fmt: skip


# ---- agreement with the compiler -----------------------------------------------------------------

# what tensorrt-rtx 1.7 takes, and why it is reported all the same
TAKEN_BY_RTX = {
    "uint8 with zero point 0": "its parser is newer than TensorRT 10.3's",
    "no zero point, which is uint8": "its parser is newer than TensorRT 10.3's",
    "scale of a channel infinite": "it looks at the sign alone; that channel computes NaN or 0",
    "a vendor's operator by ONNX's name": "it is taken for ONNX's operator, which may differ",
    "opset 21 on Orin": "it takes every opset; TensorRT 10.3's parser ends at 20",
    "quantizer on the branch": "it computes in Int8, but the Add is not fused: slower, not wrong",
    "skip input in float": "likewise: the convolutions have the types that are meant",
}
# what it cannot judge
NOT_JUDGED = {
    "scale that is computed": "it crashes",
    "dynamic height": "it builds for sizes that are chosen, and these are not",
    "weight axis 0 of ConvTranspose": "it computes none in Int8, on whatever axis (11 forms tried)",
    "ConvTranspose": "likewise",
}
FAULTS_OF_ORIN = [n for n, f in FAULTS.items() if f.target == ORIN and n not in NOT_JUDGED]
GOOD_ON_ORIN = [n for n, (_, names) in GOOD.items() if ORIN in names and n not in NOT_JUDGED]
# the rows of NVIDIA's table in the facts on Jetson, as far as they are faults
ROWS = {
    "zero point not 0, or uint8": [
        "zero point 3", "uint8 with its middle at 128", "uint8 with zero point 0",
    ],
    "int32 bias behind a DQ": ["int32 bias"],
    "QLinearConv, DynamicQuantizeLinear": ["QLinearConv", "DynamicQuantizeLinear"],
    "RoiAlign": ["RoiAlign on Orin"],
    "per-channel activations": ["per-channel activations"],
    "weight axis 1": ["weight axis 1 of Conv"],
    "weight-only": ["only the weight quantized"],
    "activation-only": ["only the input quantized"],
    "opsets, all of which it accepts": ["opset 21 on Orin"],
}  # fmt: skip


def test_every_row_of_what_the_compiler_does_is_planted():
    for names in ROWS.values():
        assert set(names) <= set(FAULTS_OF_ORIN)
    assert {*TAKEN_BY_RTX, *NOT_JUDGED} <= {*FAULTS, *GOOD}


def judged(model: onnx.ModelProto, folder: Path) -> bool:
    """Whether tensorrt-rtx builds the file, and its convolutions and products as they are meant."""
    integers = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    path = written(model, folder)
    done = compile_check(path, Target.load(ORIN), "int8" if integers else "fp16")
    return done.error is None and done.floating == ()


@pytest.fixture(scope="module")
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx compiles for the Orin")


@pytest.mark.parametrize("name", FAULTS_OF_ORIN)
def test_tensorrt_rtx_agrees_on_a_fault(rtx, tmp_path, name):
    assert judged(FAULTS[name].make(), tmp_path) == (name in TAKEN_BY_RTX)


@pytest.mark.parametrize("name", GOOD_ON_ORIN)
def test_tensorrt_rtx_agrees_on_a_good_file(rtx, tmp_path, name):
    assert judged(GOOD[name][0](), tmp_path)


# ---- the command and the verb --------------------------------------------------------------------


@pytest.fixture
def edge(monkeypatch, capsys):
    """Run the entry point in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgekd", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capsys.readouterr())

    return call


def test_the_command_groups_what_it_finds(edge, tmp_path):
    path = written(residual(skip=False, branch=False), tmp_path)
    code, out, _ = edge("check", path, "--target", NANO, "--target", ORIN)
    words = " ".join(out.split())
    assert code == 1
    assert f"{path} on {NANO}" in words
    assert "no-integers" in words and "and 1 more" in words
    assert "add-skip" in words and "pull/425" in words
    assert out.count("no-integers") == 2  # a line for each operator, not for each node


def test_warnings_alone_are_no_failure(edge, tmp_path):
    path = written(residual(skip=False, branch=False), tmp_path)
    assert edge("check", path, "--target", ORIN)[0] == 0
    code, out, _ = edge("check", written(orin(), tmp_path), "--target", ORIN)
    assert (code, f"{ORIN} takes it" in out) == (0, True)


def test_json_has_every_finding(edge, tmp_path):
    path = written(orin(None, opset=13), tmp_path)
    code, out, _ = edge("check", path, "--target", NANO, "--target", ORIN, "--json")
    nano, orins = json.loads(out)
    assert code == 1
    assert [f["rule"] for f in nano["findings"]] == ["no-integers"] * 2
    assert (nano["opset"], nano["operators"]["Conv"]) == (13, 1)
    assert [(f["rule"], f["node"], f["severity"]) for f in orins["findings"]] == [
        ("weight-only", "conv", "warning")
    ]


@pytest.mark.parametrize(
    ("content", "target", "says"),
    [
        (b"no model at all", ORIN, "is no ONNX file"),
        (b"", ORIN, "is no ONNX file"),
        (None, ORIN, "No such file"),
        (b"", "android-litert", "litert does not read ONNX"),
        (b"", "jetson-nan", "did you mean 'jetson-nano'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(edge, tmp_path, content, target, says):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    code, _, stderr = edge("check", path, "--target", target)
    assert (code, says in stderr, stderr.count("\n")) == (2, True, 1)


def test_help_has_an_example(edge):
    code, out, _ = edge("check", "--help")
    assert (code, "Example: edgekd check" in " ".join(out.split())) == (0, True)


def test_nodes_without_names_go_by_their_output(tmp_path):
    model = orin(None)
    for node in model.graph.node:
        node.name = ""
    (finding,) = edgekd.check(written(model, tmp_path), target=ORIN).findings
    assert finding.node == model.graph.node[-1].output[0]


# ---- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "read", "newest"),
    [
        ("tensorrt", "8.2", "8.2", 13),
        ("tensorrt", "8.6", "8.5", 17),
        ("tensorrt", "10.3", "10.1", 20),
        ("tensorrt", "7.1", "8.2", 13),
    ],
)
def test_a_table_is_not_newer_than_the_device(name, version, read, newest):
    table = read_table(name, version)
    assert (table.version, table.max_opset) == (read, newest)
    assert table.url.startswith("https://")


def test_onnxruntimes_table_is_what_it_runs():
    """Each operator of the good files, by itself: in the table, and run."""
    table = read_table("onnxruntime", "1.31")
    for name, (make, targets) in GOOD.items():
        if HOST in targets:
            model = make()
            onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
            own = {node.op_type for node in model.graph.node if not node.domain}
            assert own <= table.operators.keys(), name


def test_the_remedy_is_export_where_that_writes_the_operator_out(tmp_path):
    path = written(one("LayerNormalization", ROW, constants=[np.ones(16, np.float32)], opset=17),
                   tmp_path)  # fmt: skip
    (found,) = edgekd.check(path, target=XAVIER).findings
    assert f"edgekd export FILE --target {XAVIER}" in found.remedy
    artifact, error = adapt(path, target=XAVIER, out=tmp_path / "out")
    assert error <= 1e-5
    assert edgekd.check(artifact.path, target=XAVIER).findings == ()
