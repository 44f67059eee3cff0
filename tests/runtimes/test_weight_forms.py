"""Quantized weights from one form to the other: ONNX Runtime's outputs stay equal to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from edgekd.errors import ModelError
from edgekd.network import Network
from edgekd.runtimes.base import Artifact
from edgekd.runtimes.weight_forms import store_floats, store_integers

RNG = np.random.default_rng(0)
X = RNG.normal(0, 2, (3, 4, 9, 9)).astype(np.float32)


def model_of(form: str, **constants: np.ndarray) -> onnx.ModelProto:
    """x through its own Q/DQ and a convolution of `constants`, whose weight has the given form."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[3, 4, 9, 9] x) => (float[a, b, c, d] y) {{
        xq = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xq, xs, xz)
        {form}
        y = Conv(xd, wd, bd)
    }}"""
    model = onnx.parser.parse_model(text)
    constants |= {"xs": np.array(0.03, np.float32), "xz": np.array(3, np.int8)}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, x: np.ndarray = X) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def rewritten(model: onnx.ModelProto, rewrite, count: int) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    assert rewrite(graph) == count
    after = ir.to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    return after


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def constants(dtype: str, channels: bool) -> dict[str, np.ndarray]:
    limits, size = np.iinfo(dtype), (8,) if channels else ()
    zero = RNG.integers(-5, 5, size) if dtype == "int8" else RNG.integers(100, 140, size)
    return {
        "wi": RNG.integers(limits.min, limits.max + 1, (8, 4, 3, 3)).astype(dtype),
        "ws": RNG.uniform(1e-4, 2, size).astype(np.float32), "wz": zero.astype(dtype),
        "bi": RNG.integers(-(2**31), 2**31, 8).astype(np.int32),
        "bs": RNG.uniform(1e-9, 1e-6, 8).astype(np.float32),
    }  # fmt: skip


INTEGERS = "wd = DequantizeLinear<axis = 0>(wi, ws, wz) bd = DequantizeLinear<axis = 0>(bi, bs)"


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integers_become_floats_and_integers_again(dtype, channels):
    before = model_of(INTEGERS, **constants(dtype, channels))
    floats = rewritten(before, store_floats, 2)
    assert operators(floats).count("QuantizeLinear") == 2
    assert operators(floats).count("DequantizeLinear") == 2  # the bias has none
    assert np.array_equal(run(before), run(floats))
    back = rewritten(floats, store_integers, 1)
    assert operators(back).count("QuantizeLinear") == 1
    assert np.array_equal(run(before), run(back))
    kept = {i.name: numpy_helper.to_array(i) for i in back.graph.initializer}
    (weight,) = (a for a in kept.values() if a.shape == (8, 4, 3, 3))
    wanted = next(numpy_helper.to_array(i) for i in before.graph.initializer if i.name == "wi")
    assert weight.dtype == dtype and np.array_equal(weight, wanted)


@pytest.mark.parametrize("zero", [", wz", ""])
def test_any_floats_become_the_integers_that_they_are_rounded_to(zero):
    form = f"wq = QuantizeLinear(w, ws{zero}) wd = DequantizeLinear(wq, ws{zero})"
    halves = RNG.integers(-700, 700, (8, 4, 3, 3)).astype(np.float32) / 4  # ties, and saturation
    found = constants("int8", channels=False) | {"ws": np.array(0.5, np.float32)}
    given = {name: found[name] for name in ("ws", "wz") if name in zero or name == "ws"}
    before = model_of(form, w=halves, bd=np.zeros(8, np.float32), **given)
    after = rewritten(before, store_integers, 1)
    assert np.array_equal(run(before), run(after))


def test_a_weight_without_zero_point_keeps_its_type():
    form = INTEGERS.replace(", wz", "")
    found = constants("int8", channels=True)
    del found["wz"]
    before = model_of(form, **found)
    assert np.array_equal(run(before), run(rewritten(before, store_floats, 2)))


def test_a_scale_out_of_range_is_refused():
    tiny = constants("int8", channels=False) | {"ws": np.array(1e-45, np.float32)}
    graph = ir.from_proto(model_of(INTEGERS, **tiny | {"wi": tiny["wi"] // 2 * 2}))
    assert store_floats(graph) == 2  # whole multiples of the smallest float are exact
    with pytest.raises(ModelError, match="float32 does not hold its weights apart"):
        store_floats(ir.from_proto(model_of(INTEGERS, **tiny | {"ws": np.array(3e38, np.float32)})))


def test_a_whole_network_goes_both_ways(int8_artifact: Artifact, trained: Network, tmp_path: Path):
    before = onnx.load(int8_artifact.path)
    x = RNG.normal(0, 1, (4, 3, 16, 16)).astype(np.float32)
    graph = ir.from_proto(before)
    assert store_floats(graph) > 4
    floats = ir.to_proto(graph)
    assert np.array_equal(run(before, x), run(floats, x))
    assert store_integers(graph) > 4
    assert np.array_equal(run(before, x), run(ir.to_proto(graph), x))
