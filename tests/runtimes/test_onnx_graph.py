"""Each rewrite of the exported graph, on a graph of a few nodes: the outputs stay the same."""

from __future__ import annotations

import getpass
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import edgekd
from edgekd.errors import ModelError, TargetError
from edgekd.network import Network
from edgekd.runtimes.base import Artifact
from edgekd.runtimes.onnx_graph import (
    integer_bias,
    integer_matrix_ops,
    keep_floats,
    pad_in_convolution,
    pool_globally,
    small_letters,
    to_onnx,
)
from edgekd.target import QuantScheme, Target

Array = NDArray[Any]
RNG = np.random.default_rng(0)
X = (2, 3, 8, 8)


def model_of(
    nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: tuple[int, ...] = X
) -> onnx.ModelProto:
    """A checked model from `x` of `shape` to `y`."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {model.graph.input[0].name: x})
    assert isinstance(y, np.ndarray)
    return y


def rewritten(model: onnx.ModelProto, rewrite: Any, count: int) -> onnx.ModelProto:
    """The model after `rewrite`, which must have found `count` places."""
    graph = ir.from_proto(model)
    assert rewrite(graph) == count
    after = ir.to_proto(graph)
    assert isinstance(after, onnx.ModelProto)
    onnx.checker.check_model(after)
    return after


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def floats(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, dtype=np.float32)


# ---- pool_globally -------------------------------------------------------------------------------


def mean(axes: list[int], keepdims: int = 1) -> onnx.ModelProto:
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)
    return model_of([node], {"axes": np.array(axes, np.int64)})


@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-2, -1], [-1, 2]])
def test_a_mean_over_height_and_width_becomes_a_global_pool(axes: list[int]):
    before = mean(axes)
    after = rewritten(before, pool_globally, 1)
    assert operators(after) == ["GlobalAveragePool"]
    x = floats(*X)
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "keepdims"), [([1], 1), ([2], 1), ([1, 2], 1), ([1, 2, 3], 1), ([2, 3], 0)]
)
def test_other_means_stay(axes: list[int], keepdims: int):
    assert operators(rewritten(mean(axes, keepdims), pool_globally, 0)) == ["ReduceMean"]


def test_a_mean_of_three_axes_stays():
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=1)
    before = model_of([node], {"axes": np.array([1, 2], np.int64)}, (2, 8, 8))
    assert operators(rewritten(before, pool_globally, 0)) == ["ReduceMean"]


# ---- pad_in_convolution --------------------------------------------------------------------------


def padded(
    pads: list[int], *, quantized: bool, fill: float | None = None, mode: str = "constant",
    own: list[int] | None = None,
) -> onnx.ModelProto:  # fmt: skip
    """Pad → (Q → DQ →) Conv, all after a Relu; with Q/DQ before the Pad too, as exported."""
    constants: dict[str, Array] = {
        "pads": np.array(pads, np.int64), "w": floats(4, 3 + pads[1] + pads[5], 3, 3),
        "s": np.array(0.02, np.float32), "z": np.array(3, np.uint8),
    }  # fmt: skip
    inputs = ["relu", "pads"]
    if fill is not None:
        constants["fill"] = np.array(fill, np.float32)
        inputs.append("fill")
    nodes = [helper.make_node("Relu", ["x"], ["relu"])]
    if quantized:
        inputs[0] = "dq0"
        nodes += [
            helper.make_node("QuantizeLinear", ["relu", "s", "z"], ["q0"]),
            helper.make_node("DequantizeLinear", ["q0", "s", "z"], ["dq0"]),
        ]
    nodes.append(helper.make_node("Pad", inputs, ["pad"], mode=mode))
    if quantized:
        nodes += [
            helper.make_node("QuantizeLinear", ["pad", "s", "z"], ["q1"]),
            helper.make_node("DequantizeLinear", ["q1", "s", "z"], ["dq1"]),
        ]
    attributes = {} if own is None else {"pads": own}
    source = "dq1" if quantized else "pad"
    nodes.append(helper.make_node("Conv", [source, "w"], ["y"], strides=[2, 2], **attributes))
    return model_of(nodes, constants)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("fill", [None, 0.0])
@pytest.mark.parametrize("own", [None, [1, 0, 2, 1]])
@pytest.mark.parametrize("sides", [(0, 0, 1, 1), (1, 2, 3, 0)])
def test_a_pad_of_zeros_moves_into_the_convolution(
    quantized: bool, fill: float | None, own: list[int] | None, sides: tuple[int, ...]
):
    top, left, bottom, right = sides
    pads = [0, 0, top, left, 0, 0, bottom, right]
    before = padded(pads, quantized=quantized, fill=fill, own=own)
    after = rewritten(before, pad_in_convolution, 1)
    conv = after.graph.node[-1]
    (attribute,) = [a for a in conv.attribute if a.name == "pads"]
    assert list(attribute.ints) == [a + b for a, b in zip(own or [0] * 4, sides, strict=True)]
    made_by = {name: node.op_type for node in after.graph.node for name in node.output}
    assert made_by[conv.input[0]] == ("DequantizeLinear" if quantized else "Relu")
    x = floats(*X)
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "fill": 1.0},
        {"pads": [0, 1, 1, 1, 0, 0, 1, 1]},
        {"pads": [1, 0, 1, 1, 0, 0, 1, 1]},
        {"pads": [0, 0, 1, 1, 0, 2, 1, 1]},
        {"pads": [0, 0, 1, 1, 1, 0, 1, 1]},
        {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "reflect"},
        {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "edge"},
    ],
    ids=str,
)
def test_other_pads_stay(quantized: bool, options: dict[str, Any]):
    before = padded(quantized=quantized, **options)
    after = rewritten(before, pad_in_convolution, 0)
    assert operators(after) == operators(before)


# ---- integer_bias --------------------------------------------------------------------------------


def quantized_conv(
    bias: Array, w_scale: Array, *, name: str = "layer", x_scale: float = 0.05
) -> onnx.ModelProto:
    constants: dict[str, Array] = {
        "xs": np.array(x_scale, np.float32), "xz": np.array(120, np.uint8),
        "w": RNG.integers(-63, 64, (4, 3, 3, 3)).astype(np.int8), "ws": w_scale,
        "wz": np.zeros(w_scale.shape, np.int8), "b": bias,
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["dq"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], axis=0),
        helper.make_node("Conv", ["dq", "dw", "b"], ["y"], name=name),
    ]
    return model_of(nodes, constants)


@pytest.mark.parametrize(
    "w_scale",
    [np.geomspace(1e-4, 1e-2, 4, dtype=np.float32), np.array(0.003, np.float32)],
    ids=["per channel", "per tensor"],
)
def test_the_bias_becomes_int32_at_the_scale_of_the_products(w_scale: Array):
    bias = floats(4) * 3
    before = quantized_conv(bias, w_scale)
    after = rewritten(before, integer_bias, 1)
    constants = {c.name: numpy_helper.to_array(c) for c in after.graph.initializer}
    (dequantize,) = [
        node for node in after.graph.node if node.output[0] == after.graph.node[-1].input[2]
    ]
    assert dequantize.op_type == "DequantizeLinear"
    steps, scale = (constants[name] for name in dequantize.input)
    wanted = np.float32(0.05).astype(np.float64) * w_scale.astype(np.float64)
    assert steps.dtype == np.int32
    np.testing.assert_allclose(scale, wanted, rtol=1e-6)
    np.testing.assert_allclose(steps, bias / wanted, atol=0.51)
    x = floats(*X)
    half_a_step = wanted.max() / 2
    np.testing.assert_allclose(run(after, x), run(before, x), atol=half_a_step + 1e-5)


def test_a_bias_beyond_int32_is_an_error_that_names_the_place():
    bias = np.array([0.1, 0.2, 7.5, 0.3], np.float32)
    w_scale = np.array([1e-3, 1e-3, 1e-9, 1e-3], np.float32)
    before = ir.from_proto(quantized_conv(bias, w_scale, name="stem/conv"))
    with pytest.raises(ModelError, match=r"stem/conv.*channel 2 is 7\.5.*1\.5e\+11.*2\^31"):
        integer_bias(before)


def test_the_bias_of_a_float_convolution_stays():
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"])]
    before = model_of(nodes, {"w": floats(4, 3, 3, 3), "b": floats(4)})
    assert operators(rewritten(before, integer_bias, 0)) == ["Conv"]


def test_two_layers_that_share_weights_get_each_their_own_scale():
    # What the first layer gives are multiples of 0.0005, its biases too, and the second's steps
    # turn between two of them: nothing that is rounded here lands a step aside.
    constants: dict[str, Array] = {
        "s0": np.array(0.05, np.float32), "s1": np.array(0.5003, np.float32),
        "z": np.array(120, np.uint8), "w": RNG.integers(-63, 64, (3, 3, 1, 1)).astype(np.int8),
        "ws": np.full(3, 0.01, np.float32), "wz": np.zeros(3, np.int8),
        "b": (RNG.integers(-2000, 2000, 3) * 0.0005).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], axis=0),
        helper.make_node("QuantizeLinear", ["x", "s0", "z"], ["q0"]),
        helper.make_node("DequantizeLinear", ["q0", "s0", "z"], ["dq0"]),
        helper.make_node("Conv", ["dq0", "dw", "b"], ["c0"], name="first"),
        helper.make_node("QuantizeLinear", ["c0", "s1", "z"], ["q1"]),
        helper.make_node("DequantizeLinear", ["q1", "s1", "z"], ["dq1"]),
        helper.make_node("Conv", ["dq1", "dw", "b"], ["y"], name="second"),
    ]
    before = model_of(nodes, constants)
    after = rewritten(before, integer_bias, 2)
    x = floats(*X)
    np.testing.assert_allclose(run(after, x), run(before, x), atol=0.01)


# ---- integer_matrix_ops --------------------------------------------------------------------------


def test_matrix_operators_count_as_integer_if_both_their_inputs_are():
    constants: dict[str, Array] = {
        "s": np.array(0.05, np.float32), "z": np.array(120, np.uint8),
        "w8": RNG.integers(-63, 64, (3, 3, 1, 1)).astype(np.int8), "ws": np.float32(0.01) * 1,
        "wz": np.array(0, np.int8), "w": floats(3, 3, 1, 1), "m": floats(8, 8),
    }  # fmt: skip
    constants["ws"] = np.array(0.01, np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        helper.make_node("DequantizeLinear", ["w8", "ws", "wz"], ["dw"]),
        helper.make_node("Conv", ["dq", "dw"], ["both"]),  # the only one in integers
        helper.make_node("Conv", ["both", "dw"], ["weight"]),
        helper.make_node("Conv", ["dq", "w"], ["input"]),
        helper.make_node("Add", ["weight", "input"], ["sum"]),
        helper.make_node("MatMul", ["sum", "m"], ["y"]),
    ]
    assert integer_matrix_ops(model_of(nodes, constants)) == (1, 4)


# ---- the whole export ----------------------------------------------------------------------------


@pytest.fixture(params=["fp32_artifact", "int8_artifact"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    made: Artifact = request.getfixturevalue(request.param)
    return made


def test_the_file_has_the_targets_opset_and_only_onnxs_operators(artifact: Artifact, host: Target):
    model = onnx.load(artifact.path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", host.opset)]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}


def test_the_file_has_the_networks_names_and_a_dynamic_batch(artifact: Artifact):
    graph = onnx.load(artifact.path).graph

    def shape(value: onnx.ValueInfoProto) -> list[object]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert [(i.name, shape(i)) for i in graph.input] == [("input", ["batch", 3, 16, 16])]
    assert [(o.name, shape(o)) for o in graph.output] == [("output", ["batch", 4])]


def test_the_file_says_what_it_is(artifact: Artifact, trained: Network, scheme: QuantScheme):
    metadata = {p.key: p.value for p in onnx.load(artifact.path).metadata_props}
    assert metadata["edgekd.target"] == "host-onnxruntime"
    assert json.loads(metadata["edgekd.labels"]) == list(trained.io.labels)
    assert json.loads(metadata["edgekd.preprocessing"]) == {
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "fit": "crop",
    }  # fmt: skip
    tools = json.loads(metadata["edgekd.tools"])
    assert tools.pop("torch") == torch.__version__  # with its build
    assert tools == {name: version(name) for name in ("edgekd", "onnx", "onnxscript")}
    if artifact.precision == "int8":
        assert QuantScheme(**json.loads(metadata["edgekd.scheme"])) == scheme
    else:
        assert "edgekd.scheme" not in metadata


def test_the_file_names_nobody_and_no_place(artifact: Artifact):
    content = artifact.path.read_bytes()
    for private in (getpass.getuser() + "/", str(Path.home()) + "/", str(artifact.path.parent)):
        assert private.encode() not in content
    assert str(Path(edgekd.__file__).parent).encode() not in content


def test_nothing_unused_is_left_in_the_file(artifact: Artifact):
    graph = onnx.load(artifact.path).graph
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    assert {c.name for c in graph.initializer} <= read
    assert all(set(node.output) & read for node in graph.node)


def test_integers_are_stored_as_integers(int8_artifact: Artifact, quantized: Network):
    graph = onnx.load(int8_artifact.path).graph
    stored = [numpy_helper.to_array(c) for c in graph.initializer]
    weights = sum(a.size for a in stored if a.dtype == np.int8 and a.ndim > 1)
    biases = sum(a.size for a in stored if a.dtype == np.int32)
    assert weights + biases == quantized.params


def test_another_opset_than_asked_for_is_an_error_not_a_note(trained: Network, host: Target):
    # torch's exporter logs a failed down-conversion and leaves a newer opset in place
    old = host.model_copy(update={"opset": 17})
    try:
        given = to_onnx(trained, old).opset_imports[""]
    except TargetError as error:
        assert re.search(r"host-onnxruntime takes opset 17; .* gave 1[89]", str(error))
    else:
        assert given == 17


@pytest.mark.parametrize(
    ("op", "weight", "shape", "relu"),
    [
        ("Conv", (8, 3, 3, 3), X, False),
        ("Conv", (6, 1, 3, 3), (2, 6, 8, 8), True),
        ("ConvTranspose", (3, 5, 2, 2), X, False),
        ("Gemm", (6, 4), (5, 6), True),
    ],
)
def test_float_layers_between_integers_stay_float(
    op: str, weight: tuple[int, ...], shape: tuple[int, ...], relu: bool
):
    attributes = {"group": 6} if weight[:2] == (6, 1) else {}
    w = RNG.normal(size=weight).astype(np.float32)
    w.flat[0] = 900  # with one scale for the tensor, all other weights would be 0
    middle = helper.make_node(op, ["dq", "w"], ["m"], **attributes)
    ends = [helper.make_node("Relu", ["m"], ["r"])] if relu else []
    model = model_of(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
            middle,
            *ends,
            helper.make_node("QuantizeLinear", ["r" if relu else "m", "s", "z"], ["mq"]),
            helper.make_node("DequantizeLinear", ["mq", "s", "z"], ["y"]),
        ],
        {
            "s": np.float32(0.05),
            "z": np.uint8(128),
            "w": w,
        },
        shape,
    )
    rewritten = ir.from_proto(model)
    assert keep_floats(rewritten) == 1
    kept = ir.to_proto(rewritten)
    x = RNG.normal(size=shape).astype(np.float32)
    assert np.array_equal(run(kept, x), run(model, x))
    options = ort.SessionOptions()
    shipped = ort.InferenceSession(
        kept.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = shipped.run(None, {"x": x})
    flips = np.abs(y - run(model, x)) / 0.05
    assert flips.max() < 1.5 and (flips > 0.5).mean() < 0.02
    assert keep_floats(ir.from_proto(kept)) == 0


def test_an_einsums_axes_get_small_letters_and_it_computes_the_same():
    equation, sizes = "BGHID,BGHJD->BGHIJ", ((2, 3, 1, 4, 5), (2, 3, 1, 6, 5))
    values = [
        ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(s))
        for i, s in enumerate(sizes)
    ]
    node = ir.node("Einsum", values, {"equation": equation})
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=8)
    assert small_letters(model) == 1
    assert small_letters(model) == 0
    assert node.attributes.get_string("equation").replace("->", "").replace(",", "").islower()
    randoms = [np.random.default_rng(i) for i in range(2)]
    arrays = [r.normal(size=s).astype(np.float32) for r, s in zip(randoms, sizes, strict=True)]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(None, {"x0": arrays[0], "x1": arrays[1]})
    np.testing.assert_allclose(found, np.einsum(equation, *arrays), rtol=1e-5, atol=1e-6)


class PooledChannelsLast(nn.Module):
    """The end of a Swin or ConvNeXt: pooled where another layer had its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool, self.head = nn.LayerNorm(3), nn.AdaptiveAvgPool2d(1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.pool(x).flatten(1))


@pytest.mark.parametrize("target", ["host-onnxruntime", "intel-npu", "jetson-nano"])
def test_pooling_of_another_memory_layout_is_a_pooling(target: str):
    net = Network(PooledChannelsLast(), torch.zeros(1, 3, 8, 8))
    model = ir.serde.serialize_model(to_onnx(net, Target.load(target)))
    kinds = {node.op_type for node in model.graph.node}
    assert "GlobalAveragePool" in kinds and not kinds & {"Gather", "Range", "Identity"}
    x = torch.randn(2, 3, 8, 8)[: 1 if target == "intel-npu" else 2]
    with torch.no_grad():
        wanted = net(x).numpy()
    np.testing.assert_allclose(run(model, x.numpy()), wanted, rtol=1e-4, atol=1e-5)
