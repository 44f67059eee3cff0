"""A folded normalisation against the same done by NumPy in front of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekd.errors import ModelError
from edgekd.network import Preprocessing
from edgekd.runtimes.preprocessing import fold_preprocessing

KNOWN = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (2, 3, 16, 16)).astype(np.float32)


def model_of(nodes: str, **weights: NDArray[Any]) -> onnx.ModelProto:
    head = '<ir_version: 8, opset_import: ["" : 13]>'
    graph = "g (float[N, 3, H, W] x) => (float[N, C, h, w] y)"
    model = onnx.parser.parse_model(f"{head} {graph} {{{nodes}}}")
    given = {"w": RNG.normal(0, 0.3, (6, 3, 3, 3)), "b": RNG.normal(size=6)} | weights
    model.graph.initializer.extend(
        numpy_helper.from_array(a.astype(np.float32), n) for n, a in given.items()
    )
    return model


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    (y,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    assert isinstance(y, np.ndarray)
    return y


@pytest.mark.parametrize(
    ("nodes", "operators"),
    [
        ("y = Conv<strides = [2, 2]>(x, w, b)", ["Conv"]),
        ("y = Conv(x, w)", ["Conv"]),
        ("c = Conv<pads = [1, 1, 1, 1]>(x, w, b) y = Relu(c)", ["Sub", "Conv", "Relu"]),
        ("y = Conv<pads = [0, 1, 2, 0]>(x, w)", ["Sub", "Conv"]),
        ('y = Conv<auto_pad = "SAME_UPPER">(x, w, b)', ["Sub", "Conv"]),
        ("y = Conv<group = 3, pads = [1, 1, 1, 1]>(x, d, b)", ["Sub", "Conv"]),
        ("y = Conv<group = 3>(x, d, b)", ["Conv"]),
    ],
)
def test_pixels_in_give_what_normalised_images_do(nodes: str, operators: list[str]):
    before = model_of(nodes, d=RNG.normal(0, 0.3, (6, 1, 3, 3)))
    model = ir.from_proto(before)
    fold_preprocessing(model, KNOWN)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert [node.op_type for node in after.graph.node] == operators
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (KNOWN.mean, KNOWN.std))
    wanted = run(before, ((PIXELS / 255.0 - mean) / std).astype(np.float32))
    assert np.abs(run(after, PIXELS) - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("y = Relu(x)", "x is read by Relu"),
        ("a = Conv(x, w) r = Relu(x) y = Add(a, r)", "x is read by (Conv, Relu|Relu, Conv)"),
        ("w2 = Relu(w) y = Conv(x, w2)", "float weights"),
    ],
)
def test_what_takes_no_preprocessing(nodes: str, message: str):
    with pytest.raises(ModelError, match=message):
        fold_preprocessing(ir.from_proto(model_of(nodes)), KNOWN)


def test_other_channels_are_an_error():
    with pytest.raises(ModelError, match="takes 3 channels in 1 groups; preprocessing has 1"):
        fold_preprocessing(
            ir.from_proto(model_of("y = Conv(x, w)")), Preprocessing(mean=(0.5,), std=(0.5,))
        )
