"""A file that takes images of 0 … 255 gives what the file that takes normalised ones gives."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from edgekd.errors import ModelError
from edgekd.network import Preprocessing
from edgekd.runtimes.preprocessing import KEY, fold_preprocessing

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (2, 3, 9, 9)).astype(np.uint8)
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.2))
UNIT = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))


def model_of(nodes: str, **constants: np.ndarray) -> onnx.ModelProto:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 3, 9, 9] x) => (float[a, b, c, d] y) {{ {nodes} }}"""
    model = onnx.parser.parse_model(text)
    weight = RNG.normal(0, 1, (6, 3, 3, 3)).astype(np.float32)
    constants = {"w": weight, "bias": RNG.normal(0, 1, 6).astype(np.float32)} | constants
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])


def normalised(preprocessing: Preprocessing) -> np.ndarray:
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return ((IMAGE / 255 - mean) / std).astype(np.float32)


def folded(
    before: onnx.ModelProto, preprocessing: Preprocessing, dtype: str = "uint8"
) -> tuple[str, onnx.ModelProto]:
    graph = ir.from_proto(before)
    place = fold_preprocessing(graph, preprocessing, dtype=dtype)  # type: ignore[arg-type]
    after = ir.to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    assert graph.metadata_props[KEY] == dtype
    expected, given = run(before, normalised(preprocessing)), run(after, IMAGE.astype(dtype))
    assert np.abs(given - expected).max() <= 1e-6 * np.abs(expected).max()
    return place, after


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(
    ("attributes", "preprocessing", "in_front"),
    [
        ("", IMAGENET, []),
        ("pads = [0, 0, 0, 0], strides = [2, 2]", HALF, []),
        ("pads = [1, 1, 1, 1]", UNIT, []),
        ("pads = [1, 0, 2, 1]", HALF, ["Pad"]),
        ("pads = [1, 0, 2, 1], dilations = [2, 1]", IMAGENET, ["Sub"]),
        ('auto_pad = "SAME_UPPER"', HALF, ["Sub"]),
        ('auto_pad = "SAME_LOWER", strides = [2, 2]', IMAGENET, ["Sub"]),
        ('auto_pad = "SAME_UPPER"', UNIT, []),
        ('auto_pad = "VALID"', IMAGENET, []),
    ],
)
def test_the_first_convolution_takes_it(attributes, preprocessing, in_front, dtype):
    between = f"<{attributes}>" if attributes else ""
    place, after = folded(model_of(f"y = Conv{between}(x, w, bias)"), preprocessing, dtype)
    assert place == "convolution"
    assert operators(after) == ["Cast"] * (dtype == "uint8") + in_front + ["Conv"]


def test_a_convolution_by_channel_without_bias_takes_it():
    weight = RNG.normal(0, 1, (6, 1, 3, 3)).astype(np.float32)
    place, after = folded(model_of("y = Conv<group = 3>(x, w)", w=weight), IMAGENET)
    assert place == "convolution" and operators(after) == ["Cast", "Conv"]


@pytest.mark.parametrize(
    "nodes",
    ["r = Relu(x) y = Conv(r, w)", "z = Conv(x, w) r = ReduceMax(x) y = Add(z, r)"],
)
def test_whatever_else_comes_first_has_it_in_front(nodes):
    place, after = folded(model_of(nodes), IMAGENET)
    assert place == "in front" and operators(after)[:3] == ["Cast", "Sub", "Mul"]


def quantized(scale: float, zero: int, dtype: str = "uint8") -> onnx.ModelProto:
    nodes = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Conv(d, w)"
    return model_of(nodes, s=np.array(scale, np.float32), z=np.array(zero, dtype))


@pytest.mark.parametrize(
    ("preprocessing", "scale", "zero"),
    [
        (UNIT, 1 / 255, 0),
        (Preprocessing(mean=(0.2, 0.2, 0.2), std=(0.25, 0.25, 0.25)), 4 / 255, 51),
    ],
)
def test_a_quantizer_of_the_images_own_values_is_left_out(preprocessing, scale, zero):
    place, after = folded(quantized(scale, zero), preprocessing)
    assert place == "quantizer" and operators(after) == ["DequantizeLinear", "Conv"]


@pytest.mark.parametrize(
    ("preprocessing", "scale", "zero", "dtype"),
    [(UNIT, 1 / 254, 0, "uint8"), (UNIT, 1 / 255, 1, "uint8"), (IMAGENET, 0.0186, 114, "uint8"),
     (UNIT, 1 / 255, -128, "int8")],
)  # fmt: skip
def test_other_quantizers_stay(preprocessing, scale, zero, dtype):
    graph = ir.from_proto(quantized(scale, zero, dtype))
    assert fold_preprocessing(graph, preprocessing) == "in front"
    after = ir.to_proto(graph)
    expected = run(quantized_like(after), normalised(preprocessing))
    given = run(after, IMAGE)
    # one value that rounds to the other side is a step apart
    assert np.mean(np.abs(given - expected) > 1e-5 * np.abs(expected).max()) < 0.01


def quantized_like(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same weights behind a float input, without what was put in front."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:3]
    plain.graph.node[0].input[0] = "x"
    plain.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return plain


def test_channels_must_be_as_many():
    grey = Preprocessing(mean=(0.5,), std=(0.5,))
    with pytest.raises(ModelError, match=r"x is FLOAT of .*as many channels"):
        fold_preprocessing(ir.from_proto(model_of("y = Conv(x, w)")), grey)
