"""Anybody's ONNX on each kind of target: its form, and the same numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.errors import ModelError, StateError, TargetError
from edgekd.runtimes.base import Artifact
from edgekd.runtimes.operator_tables import operator_table
from edgekd.runtimes.weight_form import float_weights, integer_weights
from edgekd.stages.adapt import _apart, adapt
from edgekd.stages.check import check
from edgekd.target import Target

RNG = np.random.default_rng(0)
W = RNG.normal(0, 0.3, (6, 3, 3, 3)).astype(np.float32)
X = RNG.normal(0, 1, (1, 3, 8, 8)).astype(np.float32)
HEAD = (
    '<ir_version: 8, opset_import: ["" : {opset}]>'
    " g (float[N, 3, {size}] x) => (float[N, 6, h, w] y)"
)
# a flattening by shapes and a LayerNormalization, which no TensorRT 8.2 has
FLOAT = """{
    c = Conv<pads = [1, 1, 1, 1]>(x, w) s = Shape(c)
    g = Constant<value_floats = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.5]>()
    n = LayerNormalization<axis = -1>(c, g) r = Reshape(n, s) y = HardSwish(r)
}"""


def model_of(
    nodes: str, weights: dict[str, NDArray[Any]], opset: int, size: str
) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"{HEAD.format(opset=opset, size=size)} {nodes}")
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return model


def run(model: onnx.ModelProto | Path) -> NDArray[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    (y,) = ort.InferenceSession(given, options).run(None, {"x": X})
    assert isinstance(y, np.ndarray)
    return y


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    path = tmp_path / "theirs.onnx"
    onnx.save(model_of(FLOAT, {"w": W}, 17, "8, 8"), path)
    return path


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def test_a_newer_float_file_on_a_nano(floats: Path, tmp_path: Path):
    artifact, error = adapt(floats, target="jetson-nano", out=tmp_path / "nano")
    model = onnx.load(artifact.path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 13
    assert kinds(model) <= operator_table(Target.load("jetson-nano")).operators.keys()
    assert error <= 1e-6
    wanted = run(floats)
    assert np.abs(run(artifact.path) - wanted).max() <= 1e-6 * np.abs(wanted).max()
    script = tmp_path / "nano" / "build_engine.sh"
    assert os.access(script, os.X_OK)
    assert "--shapes=x:1x3x8x8" in script.read_text()
    assert artifact.precision == "fp16"
    assert Artifact.load(tmp_path / "nano") == artifact
    facts = {p.key: p.value for p in model.metadata_props}
    assert facts["edgekd.target"] == "jetson-nano"
    assert facts["edgekd.source"].startswith("theirs.onnx ")


def test_an_old_file_of_any_size_gets_the_shape_that_a_device_needs(tmp_path: Path):
    nodes = "{ c = Conv<pads = [1, 1, 1, 1]>(x, w) s = Shape(c) r = Relu(c) y = Reshape(r, s) }"
    path = tmp_path / "old.onnx"
    onnx.save(model_of(nodes, {"w": W}, 11, "H, W"), path)
    for target in ("ios-coreml-ort", "host-onnxruntime", "intel-cpu", "jetson-nano"):
        with pytest.raises(ModelError, match=r"shape of input 'x', .*: give --shape x=1x3x224x224"):
            adapt(path, target=target, out=tmp_path / "ios")
    artifact, error = adapt(
        path, target="ios-coreml-ort", out=tmp_path / "ios", shapes={"x": (1, 3, 8, 8)}
    )
    model = onnx.load(artifact.path)
    assert (model.opset_import[0].version, error) == (18, 0.0)
    assert kinds(model) == {"Conv", "Relu"}
    assert [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [1, 6, 8, 8]
    assert np.array_equal(run(artifact.path), run(path))


def test_an_ir_for_openvino(floats: Path, tmp_path: Path):
    openvino = pytest.importorskip("openvino")
    artifact, _ = adapt(floats, target="intel-cpu", out=tmp_path / "ov")
    assert artifact.path.name == "model.xml"
    (given,) = openvino.Core().read_model(artifact.path).inputs
    assert given.shape[0] == 1  # the source's batch is open
    (y,) = openvino.Core().compile_model(artifact.path, "CPU", {
        "INFERENCE_PRECISION_HINT": "f32"
    })([X]).values()  # fmt: skip
    wanted = run(floats)
    assert np.abs(y - wanted).max() <= 1e-5 * np.abs(wanted).max()


# ---- forms of quantized weights --------------------------------------------------------------

STORED = RNG.integers(-127, 128, W.shape).astype(np.int8)
SCALES = RNG.uniform(1e-3, 1e-2, 6).astype(np.float32)
BIAS = RNG.integers(-(2**20), 2**20, 6).astype(np.int32)
QUANTIZED = """{
    xs = Constant<value_float = 0.02>() zero = Constant<value = int8 {0}>()
    xq = QuantizeLinear(x, xs, zero) xd = DequantizeLinear(xq, xs, zero)
    wd = DequantizeLinear<axis = 0>(w, s, z) bd = DequantizeLinear<axis = 0>(b, bs)
    y = Conv<pads = [1, 1, 1, 1]>(xd, wd, bd)
}"""


def quantized(**changes: Any) -> onnx.ModelProto:
    weights = {
        "w": STORED, "s": SCALES, "z": np.zeros(6, np.int8), "b": BIAS,
        "bs": (SCALES * np.float32(0.02)).astype(np.float32),
    }  # fmt: skip
    return model_of(QUANTIZED, weights | changes, 13, "8, 8")


def float_stored(model: onnx.ModelProto) -> list[bool]:
    """Of each DequantizeLinear of a weight: whether a QuantizeLinear of floats is before it."""
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    return [
        made.get(node.input[0]) == "QuantizeLinear"
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and "xq" not in node.input
    ]


def test_forms_of_weights_are_bit_equal_both_ways():
    before = quantized()
    model = ir.from_proto(before)
    assert float_weights(model) == 2
    floating = ir.to_proto(model)
    onnx.checker.check_model(floating, full_check=True)
    assert float_stored(floating) == [True]  # the bias is a plain float
    assert np.array_equal(run(floating), run(before))
    assert integer_weights(model) == 1
    back = ir.to_proto(model)
    assert float_stored(back) == [False]
    assert np.array_equal(run(back), run(before))
    stored = [numpy_helper.to_array(t) for t in back.graph.initializer]
    assert any(a.dtype == np.int8 and np.array_equal(a, STORED) for a in stored)


def test_a_weight_without_a_zero_point_stays_int8():
    text = QUANTIZED.replace("(w, s, z)", "(w, s)")
    weights = {"w": STORED, "s": SCALES, "b": BIAS, "bs": SCALES}
    before = model_of(text, weights, 13, "8, 8")
    model = ir.from_proto(before)
    assert float_weights(model) == 2
    assert np.array_equal(run(ir.to_proto(model)), run(before))


@pytest.mark.parametrize(
    ("target", "form"), [("jetson-orin-nano", [True]), ("host-onnxruntime", [False, False])]
)
def test_a_target_gets_its_form_of_weights(target: str, form: list[bool], tmp_path: Path):
    path = tmp_path / "q.onnx"
    onnx.save(quantized(), path)
    artifact, error = adapt(path, target=target, out=tmp_path / "out")
    assert (artifact.precision, error) == ("int8", 0.0)
    assert float_stored(onnx.load(artifact.path)) == form
    assert np.array_equal(run(artifact.path), run(path))


# a weight in integers, of a file with neither Q nor DQ
DYNAMIC = """{
    xq, xs, xz = DynamicQuantizeLinear(x) c = ConvInteger<pads = [1, 1, 1, 1]>(xq, w, xz)
    f = Cast<to = 1>(c) y = Mul(f, xs)
}"""


def test_integer_operators_are_int8(tmp_path: Path):
    path = tmp_path / "q.onnx"
    onnx.save(model_of(DYNAMIC, {"w": STORED}, 18, "8, 8"), path)
    artifact, error = adapt(path, target="host-onnxruntime", out=tmp_path / "out")
    assert (artifact.precision, error) == ("int8", 0.0)
    with pytest.raises(TargetError, match="jetson-nano runs no integers"):
        adapt(path, target="jetson-nano", out=tmp_path / "nano")


def test_weights_in_half_precision_are_fp16(tmp_path: Path):
    path = tmp_path / "half.onnx"
    nodes = "{ h = Cast<to = 10>(x) c = Conv<pads = [1, 1, 1, 1]>(h, w) y = Cast<to = 1>(c) }"
    onnx.save(model_of(nodes, {"w": W.astype(np.float16)}, 18, "8, 8"), path)
    artifact, error = adapt(path, target="host-onnxruntime", out=tmp_path / "out")
    assert (artifact.precision, error) == ("fp16", 0.0)
    assert Artifact.load(tmp_path / "out") == artifact
    onnx.save(model_of("{ y = Conv<pads = [1, 1, 1, 1]>(x, w) }", {"w": W}, 18, "8, 8"), path)
    assert adapt(path, target="host-onnxruntime", out=tmp_path / "f")[0].precision == "fp32"


# ---- numbers that are none ---------------------------------------------------------------------


def test_what_is_not_finite_in_both_is_equal(tmp_path: Path):
    nodes = "{ c = Conv<pads = [1, 1, 1, 1]>(x, w) z = Sub(c, c) r = Log(c) d = Div(c, z) "
    for last in ("y = Identity(r)", "y = Identity(d)"):  # of negative numbers; ±∞
        path = tmp_path / "log.onnx"
        onnx.save(model_of(f"{nodes} {last} }}", {"w": W}, 18, "8, 8"), path)
        assert not np.isfinite(run(path)).all()
        assert adapt(path, target="host-onnxruntime", out=tmp_path / "out")[1] == 0.0


def test_differences_are_numpys():
    nan, inf = np.nan, np.inf
    assert _apart(np.array([nan, inf, -inf, 4.0]), np.array([nan, inf, -inf, 3.0])) == 0.25
    assert _apart(np.array([True, False]), np.array([True, True])) == 1.0
    assert _apart(np.array([inf, 1.0]), np.array([-inf, 1.0])) == inf
    assert np.isnan(_apart(np.array([nan, 1.0]), np.array([0.0, 1.0])))
    assert np.isnan(_apart(np.array([0.0, 1.0]), np.array([nan, 1.0])))


def test_a_nan_in_a_later_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = iter([[X, X], [X, X * np.float32(np.nan)]])
    monkeypatch.setattr("edgekd.stages.adapt._outputs", lambda *_: next(found))
    path = tmp_path / "relu.onnx"
    onnx.save(model_of("{ y = Conv<pads = [1, 1, 1, 1]>(x, w) }", {"w": W}, 18, "8, 8"), path)
    with pytest.raises(TargetError, match="differs from the source by nan"):
        adapt(path, target="host-onnxruntime", out=tmp_path / "out")


# ---- refusals --------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(floats: Path, tmp_path: Path):
    path = tmp_path / "q.onnx"
    onnx.save(quantized(), path)
    with pytest.raises(TargetError, match=r"jetson-nano runs no integers: .*give the float file"):
        adapt(path, target="jetson-nano", out=tmp_path / "a")
    with pytest.raises(TargetError, match="takes no ONNX; its format is written from a network"):
        adapt(floats, target="android-litert", out=tmp_path / "a")
    with pytest.raises(ModelError, match=r"absent\.onnx does not exist"):
        adapt(tmp_path / "absent.onnx", target="jetson-nano", out=tmp_path / "a")
    adapt(floats, target="jetson-nano", out=tmp_path / "a")
    with pytest.raises(StateError, match="holds jetson-nano fp16; give each artifact a folder"):
        adapt(floats, target="host-onnxruntime", out=tmp_path / "a")


def test_other_numbers_are_refused(floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def spoil(model: ir.Model, _: Target) -> None:
        weight = model.graph.initializers["w"]
        weight.const_value = ir.tensor(W + np.float32(0.01), name="w")

    monkeypatch.setattr("edgekd.stages.adapt.fit_operators", spoil)
    with pytest.raises(TargetError, match=r"differs from the source by 0\.0.*0\.0001 is allowed"):
        adapt(floats, target="host-onnxruntime", out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def written(text: str, path: Path, **weights: NDArray[Any]) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    onnx.save(model, path)
    return path


def test_what_noise_cannot_run_is_one_line_with_the_shapes(tmp_path: Path):
    table = RNG.normal(size=(1, 5)).astype(np.float32)  # of one row: index 1 is outside
    text = "(int64[N, 4] x) => (float[N, 4, 5] y) { y = Gather(w, x) }"
    path = written(text, tmp_path / "embed.onnx", w=table)
    with pytest.raises(
        ModelError, match=r"noise of x=1x4 \(.*out of data bounds.*--shape"
    ) as found:
        adapt(path, target="host-onnxruntime", out=tmp_path / "a")
    assert "\n" not in str(found.value)


STRINGS = "(string[2] x) => (string[2] y) { y = Identity(x) }"


@pytest.mark.parametrize(("text", "says"), [
    (STRINGS, "x holds strings; devices take tensors"),
    ('(float[2] x) => (float[2] y, string[1] z) <string[1] w = {"a"}>'
     " { y = Relu(x) z = Identity(w) }", "w holds strings"),
    ("(float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }", r"y is a Sequence\("),
])  # fmt: skip
def test_what_are_no_tensors_of_numbers_is_refused(text: str, says: str, tmp_path: Path):
    path = written(text, tmp_path / "m.onnx")
    for target in ("host-onnxruntime", "jetson-orin-nano"):
        with pytest.raises(ModelError, match=says):
            adapt(path, target=target, out=tmp_path / "a")
    with pytest.raises(ModelError, match=says):
        check(path, target="host-onnxruntime")


def test_a_device_without_strings_names_the_operator(tmp_path: Path):
    found = check(written(STRINGS, tmp_path / "m.onnx"), target="jetson-orin-nano").errors
    assert [(f.rule, f.found) for f in found] == [("type", "Identity of STRING")]


def test_what_openvino_cannot_convert_is_one_line(tmp_path: Path):
    pytest.importorskip("openvino")
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float[1, 4] x) => (float[1, 4] y)
        <float s = {0.1}, int8 z = {0}> {
            q = QuantizeLinear(x, s, z) p = com.microsoft.QGemm(q, s, z, w, s, z, b, s, z)
            y = DequantizeLinear(p, s, z)
        }""")
    stored = {"w": np.eye(4, dtype=np.int8), "b": np.zeros(4, np.int32)}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in stored.items())
    path = tmp_path / "gemm.onnx"
    onnx.save(model, path)
    with pytest.raises(TargetError, match=r"OpenVINO .* cannot convert .*QGemm; use") as found:
        adapt(path, target="intel-cpu", out=tmp_path / "ov")
    assert "\n" not in str(found.value)


# ---- the command -----------------------------------------------------------------------------


def test_export_takes_a_file(floats: Path, tmp_path: Path):
    result = CliRunner().invoke(app, [
        "export", str(floats), "--target", "jetson-nano", "--shape", "x=1x3x8x8",
        "--out", str(tmp_path / "cli"),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "relative error" in result.output
    (value,) = onnx.load(tmp_path / "cli" / "model.onnx").graph.input
    assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [1, 3, 8, 8]
