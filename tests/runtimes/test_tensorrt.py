"""Jetson artifacts: real opset, operators of the device's parser, integers where they are meant."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

import edgekd
from edgekd.errors import MissingPackageError, StateError, TargetError
from edgekd.models.resnet import resnet
from edgekd.runtimes import tensorrt
from edgekd.runtimes.onnx_values import constant
from edgekd.runtimes.operator_tables import read_table
from edgekd.runtimes.opset import lower
from edgekd.runtimes.rules import check_operators
from edgekd.runtimes.tensorrt import build_flags, compile_check
from edgekd.target import Target

NANO, ORIN = Target.load("jetson-nano"), Target.load("jetson-orin-nano")


def network(module: nn.Module, size: int = 32, channels: int = 3) -> edgekd.Network:
    torch.manual_seed(0)
    module.train()
    with torch.no_grad():
        for _ in range(3):  # BatchNorm's statistics
            module(torch.randn(8, channels, size, size))
    return edgekd.Network(module.eval(), torch.zeros(1, channels, size, size))


def batches(size: int = 32, channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, channels, size, size, generator=generator) for _ in range(2)]


def ours() -> edgekd.Network:
    torch.manual_seed(0)
    return network(resnet(num_classes=10, widths=[8, 16, 32]))


SHAPES = {"input": (1, 3, 32, 32)}  # of `ours`


@pytest.fixture(scope="module")
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx compiles for the Orin")


@pytest.fixture(scope="module")
def quantized() -> edgekd.Network:
    return edgekd.quantize(ours(), target=ORIN, data=batches())


# ---- Orin ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_every_convolution_and_product_compiles_to_int8(rtx, tmp_path, name):
    net = network(getattr(torchvision.models, name)())
    q = edgekd.quantize(net, target=ORIN, data=batches())
    artifact = edgekd.export(q, target=ORIN, out=tmp_path)
    parity = edgekd.verify(artifact, q, data=batches(), agreement=0.5)
    nodes = Counter(node.op_type for node in onnx.load(artifact.path).graph.node)
    assert parity.compiled is not None
    assert parity.compiled.error is None
    assert (parity.compiled.integer, parity.compiled.floating) == (parity.compiled.total, ())
    assert parity.compiled.total == nodes["Conv"] + nodes["Gemm"] > 20
    assert (parity.gate, parity.integer_share, parity.mean_steps < 1) == ("passed", 1.0, True)


def test_weights_are_floats_before_their_quantizers_and_biases_are_floats(tmp_path, quantized):
    artifact = edgekd.export(quantized, target=ORIN, out=tmp_path)
    model = ir.load(artifact.path)
    for node in model.graph:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        dequantize = node.inputs[1].producer()
        quantize = dequantize.inputs[0].producer()
        assert (dequantize.op_type, quantize.op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert constant(quantize.inputs[0]).dtype == np.float32
        assert not constant(quantize.inputs[2]).any()
        assert len(node.inputs) < 3 or constant(node.inputs[2]).dtype == np.float32
    assert all(node.op_type != "Clip" for node in model.graph)


def test_an_add_reads_its_skip_input_only_from_a_quantizer(tmp_path, quantized):
    artifact = edgekd.export(quantized, target=ORIN, out=tmp_path)
    model = ir.load(artifact.path)
    kinds = [
        [value.producer().op_type for value in node.inputs]
        for node in model.graph if node.op_type == "Add"
    ]  # fmt: skip
    # the main branch comes first; the skip is an identity once, a convolution twice
    assert kinds == [["Conv", "DequantizeLinear"]] * 3


def test_an_asymmetric_file_is_refused(rtx, tmp_path):
    host = edgekd.quantize(ours(), target="host-onnxruntime", data=batches())
    artifact = edgekd.export(host, target="host-onnxruntime", out=tmp_path)
    check = compile_check(artifact.path, ORIN, "int8")
    assert check.error is not None
    assert check.integer == 0


def rewritten(path: Path, change) -> Path:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return path


def test_convolutions_that_would_silently_run_in_float_are_named(rtx, tmp_path, quantized):
    artifact = edgekd.export(quantized, target=ORIN, out=tmp_path)

    def unquantize_one_input(graph):
        conv = next(n for n in graph.node if n.op_type == "Conv")
        dq = next(n for n in graph.node if n.output[0] == conv.input[0])
        q = next(n for n in graph.node if n.output[0] == dq.input[0])
        conv.input[0] = q.input[0]  # weights only: TensorRT builds it, in float

    rewritten(artifact.path, unquantize_one_input)
    check = compile_check(artifact.path, ORIN, "int8")
    first = next(n.name for n in onnx.load(artifact.path).graph.node if n.op_type == "Conv")
    assert (check.error, check.floating) == (None, (first,))
    parity = edgekd.verify(artifact, quantized, data=batches(), agreement=0, mean_steps=99)
    assert parity.gate == "failed"
    assert any(f"1 of {check.total} matrix operators in float: {first}" in r
               for r in parity.reasons)  # fmt: skip


def test_without_the_compiler_the_gate_is_unchecked(tmp_path, quantized, monkeypatch):
    def missing():
        raise MissingPackageError("tensorrt-rtx", "tensorrt")

    monkeypatch.setattr(tensorrt, "_tensorrt_rtx", missing)
    artifact = edgekd.export(quantized, target=ORIN, out=tmp_path)
    parity = edgekd.verify(artifact, quantized, data=batches(), agreement=0.5)
    assert (parity.gate, parity.compiled) == ("unchecked", None)
    assert "pip install 'edgekd[tensorrt]'" in parity.reasons[0]


def test_distilled_in_the_orins_integers_it_passes(rtx, tmp_path):
    x = torch.cat(batches())
    labels = (x.mean((1, 2, 3)) > 0).long()
    data = [(x[i : i + 16], labels[i : i + 16]) for i in (0, 16)]
    torch.manual_seed(0)
    net = network(resnet(num_classes=2, widths=[8, 16]))
    task = edgekd.get_task("classification")
    q = edgekd.quantize(net, target=ORIN, data=data, task=task, teacher=net, hints="auto", epochs=2)
    artifact = edgekd.export(q, target=ORIN, out=tmp_path)
    parity = edgekd.verify(artifact, q, data=data, agreement=1.0)
    assert (parity.gate, parity.reasons) == ("passed", ())


# ---- Nano ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_0"])
def test_a_nanos_file_is_opset_13_and_computes_the_same(tmp_path, name):
    net = network(getattr(torchvision.models, name)(), size=64)
    artifact = edgekd.export(net, target=NANO, out=tmp_path)
    assert artifact.precision == "fp16"
    model = onnx.load(artifact.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]
    assert model.ir_version <= 8
    table = read_table("tensorrt", "8.2").operators
    assert {node.op_type for node in model.graph.node} <= table.keys()
    assert all(t.data_type == onnx.TensorProto.FLOAT for t in model.graph.initializer
               if t.name.endswith("weight"))  # fmt: skip
    (x,) = batches(64)[:1]
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"input": x.numpy()})
    with torch.no_grad():
        wanted = net(x).numpy()
    assert np.abs(got - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())


class Attending(nn.Module):
    """What transformers are made of, on tokens of 4 × 8."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU())
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.mlp(x + mixed).mean(1)


def test_what_the_device_does_not_have_is_decomposed(tmp_path):
    torch.manual_seed(0)
    net = edgekd.Network(Attending(), torch.zeros(1, 4, 8))
    artifact = edgekd.export(net, target=NANO, out=tmp_path)
    kinds = {node.op_type for node in onnx.load(artifact.path).graph.node}
    assert kinds <= read_table("tensorrt", "8.2").operators.keys()
    assert "ReduceMean" in kinds  # of the LayerNormalization
    data = [(torch.randn(16, 4, 8),)]
    parity = edgekd.verify(artifact, net, data=data, agreement=1.0)
    assert parity.gate == "passed"
    assert parity.relative_error is not None and parity.relative_error <= 1e-5


def test_what_has_no_older_form_is_named(tmp_path):
    class Sampled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.grid_sample(x, x.permute(0, 2, 3, 1)[..., :2], align_corners=True)

    net = edgekd.Network(Sampled(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(TargetError, match=r"jetson-nano takes opset 13; GridSample of '"):
        edgekd.export(net, target=NANO, out=tmp_path)


@pytest.mark.parametrize(
    ("op", "inputs", "dtype", "message"),
    [
        ("Mod", 2, ir.DataType.FLOAT, r"tensorrt 8\.2 does not have Mod \(here\)"),
        ("MatMul", 2, ir.DataType.INT32, r"MatMul of INT32: .* FLOAT, FLOAT16 \(here\)"),
        ("Relu", 1, ir.DataType.FLOAT, None),
        ("Add", 2, ir.DataType.INT64, None),
    ],
)
def test_operators_and_types_come_from_the_parsers_table(op, inputs, dtype, message):
    values = [ir.Value(name=f"x{i}", type=ir.TensorType(dtype)) for i in range(inputs)]
    node = ir.node(op, values, name="here")
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 13})
    model = ir.Model(graph, ir_version=8)
    if message is None:
        check_operators(model, NANO)
    else:
        with pytest.raises(TargetError, match=message):
            check_operators(model, NANO)


def test_the_nano_has_no_integers():
    with pytest.raises(TargetError, match=r"runs no integers: its GPU \(SM 5\.3\) has no INT8"):
        edgekd.quantize(ours(), target=NANO, data=batches())


# ---- the bundle ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "precision", "wanted", "absent"),
    [
        ("8.2", "fp16", ["--fp16", "--workspace=1024", "--buildOnly"], ["--int8"]),
        ("8.5", "int8", ["--int8", "--fp16", "--memPoolSize=workspace:1024", "--buildOnly"], []),
        ("10.3", "int8", ["--memPoolSize=workspace:1024", "--skipInference"], ["--buildOnly"]),
        ("11.4", "int8", ["--skipInference"], ["--int8", "--fp16"]),
    ],
)
def test_flags_are_those_of_the_version(release, precision, wanted, absent):
    target = NANO.model_copy(update={"runtime_version": release})
    flags = build_flags(SHAPES, target, precision)
    assert set(wanted) <= set(flags)
    assert not set(absent) & set(flags)
    assert "--shapes=input:1x3x32x32" in flags


def test_the_script_builds_with_the_devices_trtexec(tmp_path):
    artifact = edgekd.export(ours(), target=NANO, out=tmp_path)
    (tmp_path / "trtexec").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$(dirname "$0")/called"\n')
    (tmp_path / "trtexec").chmod(0o755)

    def build() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(tmp_path / "build_engine.sh")], capture_output=True, text=True, cwd="/",
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        )  # fmt: skip

    assert build().returncode == 0
    called = (tmp_path / "called").read_text().split()
    assert called == build_flags(SHAPES, NANO, "fp16")
    artifact.path.write_bytes(artifact.path.read_bytes() + b" ")
    (tmp_path / "called").unlink()
    assert build().returncode != 0  # not the file that was checked
    assert not (tmp_path / "called").exists()


def test_the_manifest_says_what_is_in_the_folder(tmp_path, quantized):
    artifact = edgekd.export(quantized, target=ORIN, out=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sha256"] == artifact.sha256
    assert (manifest["precision"], manifest["runtime_version"]) == ("int8", "10.3")
    assert manifest["io"]["inputs"][0]["shape"] == [3, 32, 32]


def test_a_jetson_is_not_profiled_or_run_here(tmp_path):
    artifact = edgekd.export(ours(), target=NANO, out=tmp_path)
    with pytest.raises(TargetError, match="jetson-nano is not this host"):
        edgekd.profile(artifact, target=NANO)
    with pytest.raises(StateError, match="build it on the device"):
        tensorrt.TensorRt().load(artifact.path, threads=1)


# ---- lowering --------------------------------------------------------------------------------


def lowered(
    nodes: str, x: np.ndarray, y: str = "a, b, c, d"
) -> tuple[np.ndarray, np.ndarray, onnx.ModelProto]:
    """(before, after, lowered model) of a graph from `x` to `y` in ONNX's text form."""
    head = f"g (float[{', '.join(map(str, x.shape))}] x) => (float[{y}] y)"
    before = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {head} {{{nodes}}}')
    model = ir.from_proto(onnx.shape_inference.infer_shapes(before))
    lower(model, 13, "a device")
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)

    def run(proto: onnx.ModelProto) -> np.ndarray:
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        return session.run(None, {"x": x})[0]

    return run(before), run(after), after


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ("i = Constant<value_ints = [1, -1]>() y = ReduceMean<keepdims = 0>(x, i)", "a, b"),
        ("y = ReduceMax<keepdims = 0>(x)", ""),
        ("a, b = Split<axis = 3, num_outputs = 2>(x) y = Concat<axis = 3>(b, a)", "a, b, c, d"),
        ("y = HardSwish(x)", "a, b, c, d"),
        ("s = Constant<value_ints = [2, -1]>() y = Reshape<allowzero = 1>(x, s)", "a, b"),
        ("p = Constant<value_ints = [0, 0, 1, 2, 0, 0, 1, 0]>() y = Pad(x, p)", "a, b, c, d"),
        ("y = Add(x, x)", "a, b, c, d"),
    ],
)
def test_lowered_operators_compute_the_same(nodes, shape):
    x = np.random.default_rng(0).normal(0, 3, (2, 3, 4, 7)).astype(np.float32)
    before, after, model = lowered(nodes, x, shape)
    assert model.opset_import[0].version == 13
    assert np.allclose(before, after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        "s = Shape(x) c = Cast<to = 1>(s) axes = Cast<to = 7>(c) y = ReduceMean(x, axes)",
        "p = Constant<value_ints = [1, 1]>() c = Constant<value_float = 0.0>()"
        " a = Constant<value_ints = [2]>() y = Pad(x, p, c, a)",
        "s = Constant<value_ints = [0, -1]>() y = Reshape<allowzero = 1>(x, s)",
    ],
)
def test_what_has_no_older_form_is_refused(nodes):
    with pytest.raises(TargetError, match=r"a device takes opset 13; .* has no form there"):
        lowered(nodes, np.zeros((2, 3, 4, 7), np.float32))
