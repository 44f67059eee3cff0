"""check: planted faults are found, good files raise nothing, and tensorrt-rtx agrees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

import edgekd
from edgekd.cli import app
from edgekd.errors import MissingPackageError, ModelError
from edgekd.network import Network
from edgekd.runtimes.tensorrt import compile_check
from edgekd.stages.check import check
from edgekd.stages.export import export
from edgekd.target import Target

ORIN, XAVIER, NANO = "jetson-orin-nano", "jetson-xavier-nx", "jetson-nano"
HOST, PHONE, INTEL, IPHONE = "host-onnxruntime", "android-arm64", "intel-cpu", "ios-coreml-ort"
RNG = np.random.default_rng(0)


class Maker:
    """An ONNX file, operator by operator, with quantizers as TensorRT or as ONNX Runtime wants."""

    def __init__(self, style: str, opset: int = 17, bits: int = 7) -> None:
        self.style, self.opset, self.bits = style, opset, bits
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs = [self.value("x", ["batch", 3, 8, 8])]
        self.outputs: list[Any] = []

    @staticmethod
    def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def const(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        out = f"t{len(self.nodes)}"
        node = helper.make_node(kind, list(inputs), [out], name=name or f"n{len(self.nodes)}",
                                **attributes)  # fmt: skip
        self.nodes.append(node)
        return out

    def q(self, x: str, *, scale: Any = 0.05, zero: Any = None, **attributes: Any) -> str:
        """Q and DQ of an activation."""
        own = np.int8(0) if self.style == "trt" else np.uint8(128)
        zero = own if zero is None else zero
        number = len(self.nodes)
        parameters = (
            self.const(f"s{number}", np.asarray(scale, np.float32)), self.const(f"z{number}", zero)
        )  # fmt: skip
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *parameters, **attributes),
                       *parameters, **attributes)  # fmt: skip

    def weight(self, shape: tuple[int, ...], axis: int = 0, stored: str | None = None) -> str:
        """A weight behind its quantizers: "float" with Q/DQ, or "integer" with DQ."""
        stored = stored or ("float" if self.style == "trt" else "integer")
        number, bound = len(self.nodes), 2 ** (self.bits - 1) - 1
        scale = self.const(f"ws{number}", np.full(shape[axis], 0.02, np.float32))
        zero = self.const(f"wz{number}", np.zeros(shape[axis], np.int8))
        steps = RNG.integers(-bound, bound + 1, shape)
        steps.flat[0] = bound
        if stored == "integer":
            weight = self.const(f"w{number}", steps.astype(np.int8))
        else:
            floats = self.const(f"w{number}", (steps * 0.02).astype(np.float32))
            weight = self.op("QuantizeLinear", floats, scale, zero, axis=axis)
        return self.op("DequantizeLinear", weight, scale, zero, axis=axis)

    def bias(self, channels: int, stored: str | None = None) -> str:
        number = len(self.nodes)
        if (stored or ("float" if self.style == "trt" else "integer")) == "float":
            return self.const(f"b{number}", RNG.normal(size=channels).astype(np.float32))
        scale = self.const(f"bs{number}", np.full(channels, 0.001, np.float32))
        steps = self.const(f"b{number}", RNG.integers(-99, 99, channels).astype(np.int32))
        return self.op("DequantizeLinear", steps, scale, axis=0)

    def conv(self, x: str, cin: int, cout: int, *, weight: str = "", bias: str = "",
             name: str = "") -> str:  # fmt: skip
        weight = weight or self.weight((cout, cin, 3, 3))
        return self.op("Conv", x, weight, bias or self.bias(cout), name=name, pads=[1, 1, 1, 1])

    def block(self, x: str, *, main: bool | None = None, skip: bool = True) -> str:
        """A residual block over 8 channels; `main`, `skip`: quantizers at the Add."""
        main = self.style == "ort" if main is None else main
        y = self.q(self.op("Relu", self.conv(x, 8, 8)))
        y = self.conv(y, 8, 8, name="main")
        source = next(n for n in self.nodes if x in n.output).input[0]  # in integers
        source = next(n for n in self.nodes if source in n.output).input[0]  # in float
        y = self.op("Add", self.q(y) if main else y, x if skip else source, name="add")
        return self.q(self.op("Relu", y))

    def head(self, x: str, axis: int = 0, weight: str = "") -> str:
        pooled = self.op("GlobalAveragePool", x)
        pooled = self.q(self.op("Flatten", self.q(pooled) if self.style == "ort" else pooled))
        return self.op("Gemm", pooled, weight or self.weight((4, 8), axis), self.bias(4), transB=1,
                       name="head")  # fmt: skip

    def done(self, y: str, path: Path, kind: int = TensorProto.FLOAT) -> Path:
        graph = helper.make_graph(
            self.nodes, "g", self.inputs, [helper.make_tensor_value_info(y, kind, None)],
            self.constants,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(d, 1) for d in {n.domain for n in self.nodes} - {""}]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        model = onnx.shape_inference.infer_shapes(model)  # the output's shape too
        end = model.graph.output[0].type.tensor_type
        if not end.HasField("shape"):  # of an operator that nobody knows
            end.shape.CopyFrom(self.value("y", ["batch", 8, 8, 8]).type.tensor_type.shape)
        onnx.save(model, path)
        return path


def network(m: Maker, path: Path, **block: Any) -> Path:
    """Quantized convolution, residual block, pooling, Gemm: nothing is wrong with it."""
    x = m.q(m.op("Relu", m.conv(m.q("x"), 3, 8)))
    return m.done(m.head(m.block(x, **block)), path)


def floats(m: Maker, path: Path, *middle: Callable[[Maker, str], str], kind: int = 1) -> Path:
    """A float convolution and then `middle`."""
    w = m.const("w", RNG.normal(size=(8, 3, 3, 3)).astype(np.float32))
    y = m.op("Relu", m.op("Conv", "x", w, pads=[1, 1, 1, 1]))
    for each in middle:
        y = each(m, y)
    return m.done(y, path, kind)


def plain(kind: str, **attributes: Any) -> Callable[[Maker, str], str]:
    return lambda m, y: m.op(kind, y, name="here", **attributes)


# ---- faults --------------------------------------------------------------------------------------


def first(m: Maker, **options: Any) -> str:
    """The quantized input, with other parameters."""
    return m.q("x", **options)


def with_first(style: str, **options: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        m = Maker(style)
        return m.done(m.conv(first(m, **options), 3, 8, name="here"), path)

    return make


def with_conv(style: str, **options: Callable[[Maker], str]) -> Callable[[Path], Path]:
    """A quantized convolution, of which the weight or the bias is made by `options`."""

    def make(path: Path) -> Path:
        m = Maker(style)
        x = first(m)
        y = m.conv(x, 3, 8, name="here", **{key: made(m) for key, made in options.items()})
        return m.done(y if style == "trt" else m.q(y), path)

    return make


def of_floats(
    *middle: Callable[[Maker, str], str], opset: int = 13, kind: int = 1
) -> Callable[[Path], Path]:
    return lambda path: floats(Maker("trt", opset), path, *middle, kind=kind)


def of_network(style: str, opset: int = 17, bits: int = 7, **block: Any) -> Callable[[Path], Path]:
    return lambda path: network(Maker(style, opset, bits), path, **block)


def float_weight(m: Maker) -> str:
    return m.const("fw", RNG.normal(size=(8, 3, 3, 3)).astype(np.float32))


def of_float_input(style: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        m = Maker(style)
        y = m.conv("x", 3, 8, name="here")
        return m.done(y if style == "trt" else m.q(y), path)

    return make


def matmul_axis(axis: int) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        m = Maker("trt")
        flat = m.q(m.op("Flatten", "x"))
        return m.done(m.op("MatMul", flat, m.weight((192, 4), axis), name="here"), path)

    return make


def gemm_axis(style: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        m = Maker(style)
        x = m.q(m.op("Relu", m.conv(m.q("x"), 3, 8)))
        return m.done(m.head(x, axis=1), path)

    return make


def transposed_axis(path: Path) -> Path:
    m = Maker("trt")
    return m.done(m.op("ConvTranspose", m.q("x"), m.weight((3, 8, 2, 2), 0), name="here"), path)


def integer_convolution(path: Path) -> Path:
    m = Maker("trt")
    s, z = m.const("s", np.float32(0.05)), m.const("z", np.int8(0))
    w = m.const("w", np.ones((8, 3, 3, 3), np.int8))
    x = m.op("QuantizeLinear", "x", s, z)
    y = m.op("QLinearConv", x, s, z, w, s, z, s, z, name="here")
    return m.done(m.op("DequantizeLinear", y, s, z), path)


def dynamic(path: Path) -> Path:
    m = Maker("ort")
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"], name="here")
    m.nodes.append(node)
    return m.done(m.op("Cast", "q", to=TensorProto.FLOAT), path)


def with_input(*shape: Any, target_op: str = "Relu") -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        m = Maker("trt", 13)
        m.inputs = [m.value("x", list(shape))]
        return m.done(m.op(target_op, "x"), path)

    return make


def huge(path: Path) -> Path:
    """16 GiB of one activation."""
    m = Maker("trt", 13)
    m.inputs = [m.value("x", ["batch", 1024, 2048, 2048])]
    return m.done(m.op("Relu", "x"), path)


def roi_align(path: Path) -> Path:
    m = Maker("trt", 16)
    rois = m.const("rois", np.zeros((1, 4), np.float32))
    y = m.op("RoiAlign", "x", rois, m.const("of", np.zeros(1, np.int64)), name="here",
             output_height=2, output_width=2)  # fmt: skip
    return m.done(y, path)


def integer_product(path: Path) -> Path:
    m = Maker("trt", 13)
    x = m.op("Cast", "x", to=TensorProto.INT32)
    y = m.op("MatMul", x, m.const("w", np.ones((8, 4), np.int32)), name="here")
    return m.done(y, path, TensorProto.INT32)


def second_input_in_float(path: Path) -> Path:
    """An Add of integers and of what a sigmoid gives, where both are wanted in integers."""
    m = Maker("ort")
    x = m.q("x")
    return m.done(m.q(m.op("Add", x, m.op("Sigmoid", x), name="here")), path)


def float_output(path: Path) -> Path:
    m = Maker("ort")
    y = m.conv(m.q("x"), 3, 8, name="here")
    return m.done(m.op("Sigmoid", y), path)


def mod(m: Maker, y: str) -> str:
    return m.op("Mod", y, m.const("two", np.float32(2)), name="here", fmod=1)


def one_hot(m: Maker, y: str) -> str:
    index = m.op("ArgMax", y, axis=1, keepdims=0)
    depth = m.const("depth", np.int64(8))
    return m.op("OneHot", index, depth, m.const("v", np.array([0, 1], np.float32)), name="here")


def grid_sample(m: Maker, y: str) -> str:
    grid = m.const("grid", np.zeros((1, 4, 4, 2), np.float32))
    return m.op("GridSample", y, grid, name="here")


def layer_norm(m: Maker, y: str) -> str:
    return m.op("LayerNormalization", y, m.const("g", np.ones(8, np.float32)), name="here")


def einsum(m: Maker, y: str) -> str:
    return m.op("Einsum", y, y, name="here", equation="BCHW,BCHW->BC")


def custom(m: Maker, y: str) -> str:
    m.nodes.append(helper.make_node("Mine", [y], ["mine"], name="here", domain="my.own"))
    return "mine"


def complained(m: Maker, y: str) -> str:
    return m.op("DequantizeLinear", m.op("QuantizeLinear", y, m.const("s", np.float32(0.1)),
                m.const("z", np.int8(0)), name="here"), "s", "z")  # fmt: skip


FAULTS: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    # name: target, the rule that it breaks, the file
    "zero point": (ORIN, "zero-point", with_first("trt", zero=np.int8(3))),
    "zero point on Xavier": (XAVIER, "zero-point", with_first("trt", zero=np.int8(-7))),
    "uint8 activations": (ORIN, "integer-type", with_first("trt", zero=np.uint8(128))),
    "uint8 activations on Xavier": (XAVIER, "integer-type", with_first("trt", zero=np.uint8(0))),
    "int8 activations on a CPU": (HOST, "signed", with_first("ort", zero=np.int8(0))),
    "scale 0": (ORIN, "scale", with_first("trt", scale=0.0)),
    "negative scale": (XAVIER, "scale", with_first("trt", scale=-0.1)),
    "scale not a number": (HOST, "scale", with_first("ort", scale=float("nan"))),
    "infinite scale": (INTEL, "scale", with_first("ort", scale=float("inf"))),
    "per-channel activation": (
        ORIN, "activation-granularity",
        with_first("trt", scale=[0.1, 0.2, 0.3], zero=np.zeros(3, np.int8), axis=1),
    ),
    "per-channel activation on a CPU": (
        HOST, "activation-granularity",
        with_first("ort", scale=[0.1, 0.2, 0.3], zero=np.full(3, 128, np.uint8), axis=1),
    ),
    "integer bias": (ORIN, "integer-bias", with_conv("trt", bias=lambda m: m.bias(8, "integer"))),
    "integer bias on Xavier": (
        XAVIER, "integer-bias", with_conv("trt", bias=lambda m: m.bias(8, "integer"))
    ),
    "float bias on a phone": (
        PHONE, "float-bias", with_conv("ort", bias=lambda m: m.bias(8, "float"))
    ),
    "weight axis of a convolution": (
        ORIN, "weight-axis", with_conv("trt", weight=lambda m: m.weight((8, 3, 3, 3), 1))
    ),
    "weight axis on a CPU": (
        HOST, "weight-axis", with_conv("ort", weight=lambda m: m.weight((8, 3, 3, 3), 1))
    ),
    "weight axis of a Gemm": (ORIN, "weight-axis", gemm_axis("trt")),
    "weight axis of a Gemm on a CPU": (HOST, "weight-axis", gemm_axis("ort")),
    "weight axis of a MatMul": (ORIN, "weight-axis", matmul_axis(0)),
    "weight axis of a ConvTranspose": (ORIN, "weight-axis", transposed_axis),
    "weight only": (ORIN, "weight-only", of_float_input("trt")),
    "weight only on a CPU": (HOST, "weight-only", of_float_input("ort")),
    "activation only": (ORIN, "activation-only", with_conv("trt", weight=float_weight)),
    "activation only on a phone": (
        PHONE, "activation-only",
        with_conv("ort", weight=float_weight, bias=lambda m: m.bias(8, "float")),
    ),
    "int8 weights on TensorRT 8": (
        XAVIER, "integer-weight",
        with_conv("trt", weight=lambda m: m.weight((8, 3, 3, 3), stored="integer")),
    ),
    "QLinearConv": (ORIN, "operator", integer_convolution),
    "DynamicQuantizeLinear": (ORIN, "operator", dynamic),
    "RoiAlign": (ORIN, "plugin", roi_align),
    "RoiAlign on a Nano": (NANO, "operator", roi_align),
    "Q/DQ on a Nano": (NANO, "integers", of_floats(complained)),
    "Q/DQ on a TX2": ("jetson-tx2", "integers", of_floats(complained)),
    "Q/DQ on an iPhone": (IPHONE, "integers", of_floats(complained)),
    "HardSwish on a Nano": (NANO, "operator", of_floats(plain("HardSwish"), opset=14)),
    "LayerNormalization on a Nano": (NANO, "operator", of_floats(layer_norm, opset=17)),
    "Mod on a Nano": (NANO, "operator", of_floats(mod)),
    "OneHot on a Nano": (NANO, "operator", of_floats(one_hot)),
    "Reciprocal on a Nano": (NANO, "operator", of_floats(plain("Reciprocal"))),
    "GridSample on a Nano": (NANO, "operator", of_floats(grid_sample, opset=16)),
    "HardSwish on an iPhone": (IPHONE, "operator", of_floats(plain("HardSwish"), opset=14)),
    "an Einsum of capitals": (ORIN, "einsum", of_floats(einsum)),
    "somebody's own operator": (ORIN, "operator", of_floats(custom)),
    "somebody's own operator on a CPU": (HOST, "operator", of_floats(custom)),
    "somebody's own operator on OpenVINO": (INTEL, "operator", of_floats(custom)),
    "opset 17 on a Nano": (NANO, "opset", of_floats(opset=17)),
    "opset 18 on Xavier": (XAVIER, "opset", of_floats(opset=18)),
    "opset 21 on Orin": (ORIN, "opset", of_floats(opset=21)),
    "a product of int32": (ORIN, "type", integer_product),
    "a product of int32 on a Nano": (NANO, "type", integer_product),
    "Q/DQ on the convolution's branch": (ORIN, "conv-branch", of_network("trt", main=True)),
    "Q/DQ on the convolution's branch on OpenVINO": (
        INTEL, "conv-branch", of_network("ort", main=True)
    ),
    "no Q/DQ on the skip input": (ORIN, "skip-branch", of_network("trt", skip=False)),
    "an Add half in integers": (HOST, "add-inputs", second_input_in_float),
    "float output of a convolution": (HOST, "float-output", float_output),
    "8-bit weights on AVX2": (HOST, "weight-range", of_network("ort", bits=8)),
    "dynamic size": (ORIN, "shape", with_input("batch", 3, "height", "width")),
    "dynamic size on a CPU": (HOST, "shape", with_input("batch", 3, "height", 8)),
    "dynamic batch on an NPU": ("intel-npu", "shape", with_input("batch", 3, 8, 8)),
    "too large": (NANO, "memory", huge),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path):
    target, rule, make = FAULTS[name]
    if Target.load(target).runtime == "openvino":
        pytest.importorskip("openvino")
    found = check(make(tmp_path / "faulty.onnx"), target=target)
    rules = {f.rule for f in found.findings}
    # an operator newer than the device comes in an opset newer than it
    assert rule in rules
    assert rules <= {rule, "opset"}, [f for f in found.findings if f.rule != rule]
    for f in found.findings:
        assert f.found
        assert f.limit
        assert f.remedy
        assert "{" not in f.limit + f.remedy
    if rule == "operator" and target != INTEL:
        assert {f.node for f in found.findings if f.rule == "operator"} == {"here"}


def test_enough_faults_are_planted():
    assert len(FAULTS) >= 40


# ---- good files ----------------------------------------------------------------------------------


def ours(target: str) -> Callable[[pytest.FixtureRequest, Path], Path]:
    """A residual network of the project's own, quantized for the target."""

    def make(request: pytest.FixtureRequest, path: Path) -> Path:
        trained, batches = (request.getfixturevalue(n) for n in ("trained", "batches"))
        net = trained
        if Target.load(target).scheme is not None:
            net = edgekd.quantize(trained, target=target, data=batches[:1])
        return export(net, target=target, out=path.parent / target).path

    return make


def floating(target: str) -> Callable[[pytest.FixtureRequest, Path], Path]:
    def make(request: pytest.FixtureRequest, path: Path) -> Path:
        net = request.getfixturevalue("trained")
        return export(net, target=target, out=path.parent / target).path

    return make


def made(make: Callable[[Path], Path]) -> Callable[[pytest.FixtureRequest, Path], Path]:
    return lambda request, path: make(path)


def attention(request: pytest.FixtureRequest, path: Path) -> Path:
    """Layer normalisation, attention and GELU, in float."""
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, activation="gelu", batch_first=True, norm_first=True
    )
    net = Network(nn.Sequential(nn.Linear(8, 16), layer).eval(), torch.zeros(1, 5, 8))
    return export(net, target=HOST, out=path.parent / "attention").path


GOOD: dict[str, tuple[str, Callable[[pytest.FixtureRequest, Path], Path]]] = {
    **{f"ours on {t}": (t, ours(t)) for t in (ORIN, XAVIER, NANO, HOST, PHONE, IPHONE)},
    **{f"ours in float on {t}": (t, floating(t)) for t in (ORIN, HOST, "raspberry-pi-4")},
    "attention on a CPU": (HOST, attention),
    "a network as TensorRT wants it": (ORIN, made(of_network("trt"))),
    "a network as TensorRT 8 wants it": (XAVIER, made(of_network("trt"))),
    "8-bit weights on TensorRT": (ORIN, made(of_network("trt", bits=8))),
    "8-bit weights on a phone": (PHONE, made(of_network("ort", bits=8))),
    "a network as ONNX Runtime wants it": (HOST, made(of_network("ort"))),
    "a network as OpenVINO wants it": (INTEL, made(of_network("ort", main=False))),
    "a MatMul by its columns": (ORIN, made(matmul_axis(1))),
    "float on a Nano": (NANO, made(of_floats())),
    "float on a TX2": ("jetson-tx2", made(of_floats(plain("Sigmoid")))),
    "float on an iPhone": (IPHONE, made(with_input(1, 3, 8, 8))),
    "HardSwish on a CPU": (HOST, made(of_floats(plain("HardSwish"), opset=14))),
    "LayerNormalization on Orin": (ORIN, made(of_floats(layer_norm, opset=17))),
    "int8 weights on TensorRT 10": (
        ORIN, made(with_conv("trt", weight=lambda m: m.weight((8, 3, 3, 3), stored="integer")))
    ),
    "a fixed size": (ORIN, made(with_input(1, 3, 8, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_raises_nothing(name: str, request: pytest.FixtureRequest, tmp_path: Path):
    target, make = GOOD[name]
    if Target.load(target).runtime == "openvino":
        pytest.importorskip("openvino")
    assert check(make(request, tmp_path / "good.onnx"), target=target).findings == ()


def test_enough_files_are_good():
    assert len(GOOD) >= 20


# ---- the compiler's opinion ----------------------------------------------------------------------

# what tensorrt-rtx has no opinion on: it takes every opset and slow networks too
UNJUDGED = {
    "opset 21 on Orin": "it accepts opsets 9 to 26; the device's TensorRT 10.3 does not",
    "Q/DQ on the convolution's branch": "every convolution is Int8 all the same, unfused",
    "no Q/DQ on the skip input": "every convolution is Int8 all the same, unfused",
    "dynamic size": "it asks for a range of sizes, which our build gives for the batch only",
}
JUDGED = [n for n, (target, _, _) in FAULTS.items() if target == ORIN and n not in UNJUDGED]


def compiles(path: Path) -> bool:
    """Whether every quantized operator comes out in Int8, and every file without any at all."""
    pytest.importorskip("tensorrt_rtx")
    try:
        found = compile_check(path, Target.load(ORIN), "int8")
    except MissingPackageError as error:
        pytest.skip(str(error))
    return found.error is None and found.integer == found.total


@pytest.mark.parametrize("name", JUDGED)
def test_the_compiler_takes_no_faulty_file(name: str, tmp_path: Path):
    assert not compiles(FAULTS[name][2](tmp_path / "faulty.onnx"))


@pytest.mark.parametrize(
    "name", [n for n, (t, _) in GOOD.items() if t == ORIN and "float" not in n and n not in
             ("LayerNormalization on Orin", "a fixed size")],
)  # fmt: skip
def test_the_compiler_takes_the_good_files(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
):
    assert compiles(GOOD[name][1](request, tmp_path / "good.onnx"))


# ---- the command and bad files -------------------------------------------------------------------


def test_the_command_names_rule_limit_and_remedy(tmp_path: Path):
    path = str(FAULTS["zero point"][2](tmp_path / "faulty.onnx"))
    ran = CliRunner().invoke(app, ["check", path, "--target", ORIN])
    assert ran.exit_code == 1
    said = " ".join(ran.output.split())
    assert "zero-point" in said
    assert "zero point 3" in said
    ran = CliRunner().invoke(app, ["check", path, "--target", ORIN, "--target", HOST, "--json"])
    assert ran.exit_code == 1
    first, second = json.loads(ran.output)
    assert (first["target"], second["target"]) == (ORIN, HOST)
    assert {f["rule"] for f in first["findings"]} == {"zero-point"}
    assert first["findings"][0]["source"].startswith("https://")


def test_warnings_alone_exit_with_0(tmp_path: Path):
    path = str(FAULTS["8-bit weights on AVX2"][2](tmp_path / "wide.onnx"))
    ran = CliRunner().invoke(app, ["check", path, "--target", HOST])
    assert (ran.exit_code, "weight-range" in ran.output) == (0, True)


def test_what_is_no_onnx_is_told(tmp_path: Path):
    with pytest.raises(ModelError, match=r"none.onnx does not exist"):
        check(tmp_path / "none.onnx", target=ORIN)
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ModelError, match=r"text.onnx is no valid ONNX"):
        check(tmp_path / "text.onnx", target=ORIN)
    m = Maker("trt")
    with pytest.raises(ModelError, match=r"invalid.onnx is no valid ONNX"):
        check(m.done(m.op("Conv", "x"), tmp_path / "invalid.onnx"), target=ORIN)


def test_weights_that_are_missing_beside_the_file_are_told(tmp_path: Path):
    path = network(Maker("trt"), tmp_path / "whole.onnx")
    model = onnx.load(path)
    onnx.save(model, tmp_path / "parts.onnx", save_as_external_data=True, location="weights.bin",
              size_threshold=0)  # fmt: skip
    assert check(tmp_path / "parts.onnx", target=ORIN).findings == ()
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weights\.bin"):
        check(tmp_path / "parts.onnx", target=ORIN)
