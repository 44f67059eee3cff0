"""Fixed shapes: known everywhere, nothing computed from them, the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from torch import Tensor

from edgekd.errors import ModelError
from edgekd.network import Network
from edgekd.runtimes.shapes import fix_shapes
from edgekd.stages.export import export
from edgekd.stages.verify import verify
from edgekd.tasks.classification import Classification

# the usual way to flatten: a shape made of the batch and of the rest
FLATTEN = """<ir_version: 10, opset_import: ["" : 18]> g (float[N, 3, H, W] x) => (float[a, b] y) {
    first = Constant<value_ints = [0]>() rest = Constant<value_ints = [-1]>()
    s = Shape(x) n = Gather(s, first) to = Concat<axis = 0>(n, rest)
    r = Relu(x) y = Reshape(r, to)
}"""


def test_chains_of_shapes_become_constants():
    before = onnx.parser.parse_model(FLATTEN)
    model = ir.from_proto(before)
    fix_shapes(model, {"x": (2, 3, 5, 4)})
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert [node.op_type for node in after.graph.node if node.op_type != "Constant"] == [
        "Relu", "Reshape",
    ]  # fmt: skip
    assert [d.dim_value for d in after.graph.output[0].type.tensor_type.shape.dim] == [2, 60]
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    got, wanted = (
        ort.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0] for m in (after, before)
    )
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"X": (1, 3, 4, 4)}, "no input 'X'; there are: x"),
        ({"x": (1, 4, 4, 4)}, r"input 'x' is .*; \(1, 4, 4, 4\) does not fit it"),
        ({"x": (1, 3, 4)}, r"does not fit it"),
        ({}, r"x of the inputs has no fixed shape: \[N,3,H,W\]; give each input a shape"),
    ],
)
def test_shapes_that_cannot_be(shapes, message):
    with pytest.raises(ModelError, match=message):
        fix_shapes(ir.from_proto(onnx.parser.parse_model(FLATTEN)), shapes)


def test_a_shape_that_depends_on_values_is_named():
    text = FLATTEN.replace("float[a, b] y", "int64[a, b] y").replace(
        "y = Reshape(r, to)", "y = NonZero(r)"
    )
    with pytest.raises(ModelError, match=r"y of .*NonZero.* has no fixed shape"):
        fix_shapes(ir.from_proto(onnx.parser.parse_model(text)), {"x": (1, 3, 4, 4)})


@pytest.mark.parametrize("name", ["ios-coreml-ort", "intel-npu"])
def test_a_target_of_fixed_shapes_gets_them_and_passes(
    name: str, trained: Network, batches: list[tuple[Tensor, Tensor]], tmp_path: Path
):
    artifact = export(trained, target=name, out=tmp_path)
    if artifact.path.suffix == ".onnx":
        graph = onnx.shape_inference.infer_shapes(onnx.load(artifact.path), strict_mode=True).graph
        for value in (*graph.input, *graph.output, *graph.value_info):
            dims = value.type.tensor_type.shape.dim
            assert all(d.HasField("dim_value") for d in dims), value.name
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    else:
        openvino = pytest.importorskip("openvino")
        for op in openvino.Core().read_model(artifact.path).get_ordered_ops():
            assert all(o.get_partial_shape().is_static for o in op.outputs())
    # the CPU plugin computes the FP16 weights of an NPU's file in FP32
    parity = verify(artifact, trained, data=batches[:2], task=Classification())
    assert (parity.gate, parity.reasons) == ("passed", ())
    assert parity.relative_error is not None
    assert parity.relative_error <= (1e-5 if name == "ios-coreml-ort" else 1e-2)
