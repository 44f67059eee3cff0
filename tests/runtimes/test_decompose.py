"""Each definition against ONNX Runtime's own kernel of the operator, or ONNX's reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edgekd.runtimes.decompose import DEFINITIONS, decompose, fold_constants

RNG = np.random.default_rng(0)
X = RNG.normal(0, 3, (2, 6, 5, 4)).astype(np.float32)
C = "c = Constant<value_floats = [0.5, 2.0, -1.0, 3.0, 0.25, 1.5]>()"
# operator, nodes from the inputs to y, their types, opset, inputs
FLOAT = "float[B, 6, 5, 4] x"
WHOLE = np.array([7, -7, 7, -7, 6, -6, 0, 3], np.int64)
PARTS = np.array([3, 3, -3, -3, 3, -2, 5, -3], np.int64)
CASES: dict[str, tuple[str, str, str, int, list[NDArray[Any]]]] = {
    "LayerNormalization": (
        "s = Constant<value_floats = [0.5, 2.0, -1.0, 3.0]>()"
        "b = Constant<value_floats = [1.0, 0.0, -1.0, 0.5]>()"
        "y = LayerNormalization<axis = -1, epsilon = 0.001>(x, s, b)",
        FLOAT, "float", 18, [X],
    ),
    "LayerNormalization over two axes, no bias": (
        "s = Constant<value = float[5, 4] {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2}>()"
        "y = LayerNormalization<axis = 2>(x, s)",
        FLOAT, "float", 18, [X],
    ),
    "Gelu": ("y = Gelu(x)", FLOAT, "float", 20, [X]),
    "Gelu by tanh": ('y = Gelu<approximate = "tanh">(x)', FLOAT, "float", 20, [X]),
    "GroupNormalization of 18": (
        "s = Constant<value_floats = [0.5, 2.0, -1.0]>()"
        "y = GroupNormalization<num_groups = 3>(x, s, s)",
        FLOAT, "float[B, 6, 5, 4]", 18, [X],
    ),
    "GroupNormalization of 21": (
        f"{C} y = GroupNormalization<num_groups = 3, epsilon = 0.01>(x, c, c)",
        FLOAT, "float[B, 6, 5, 4]", 21, [X],
    ),
    "HardSwish": ("y = HardSwish(x)", FLOAT, "float", 18, [X]),
    "Mish": ("y = Mish(x)", FLOAT, "float", 18, [X]),
    "Reciprocal": ("y = Reciprocal(x)", FLOAT, "float", 18, [X]),
    "Mod": ("y = Mod(a, b)", "int64[8] a, int64[8] b", "int64", 18, [WHOLE, PARTS]),
    "Mod as in C": (
        "y = Mod<fmod = 1>(a, b)", "int64[8] a, int64[8] b", "int64", 18, [WHOLE, PARTS],
    ),
    "Xor": (
        "y = Xor(a, b)", "bool[4] a, bool[4] b", "bool", 18,
        [np.array([0, 0, 1, 1], np.bool_), np.array([0, 1, 0, 1], np.bool_)],
    ),
    "CastLike": (
        "i = Constant<value_ints = [1]>() y = CastLike(x, i)", FLOAT, "int64", 18, [X],
    ),
    "HardSigmoid": ("y = HardSigmoid<alpha = 0.7, beta = 0.1>(x)", FLOAT, "float", 18, [X]),
    "Softplus": ("y = Softplus(x)", FLOAT, "float", 18, [X * 20]),
    "Swish": ("y = Swish<alpha = 1.7>(x)", FLOAT, "float", 24, [X]),
    "ThresholdedRelu": ("y = ThresholdedRelu<alpha = 0.2>(x)", FLOAT, "float", 18, [X]),
    "RMSNormalization": (
        "s = Constant<value_floats = [0.5, 2.0, -1.0, 3.0]>()"
        "y = RMSNormalization<epsilon = 0.1>(x, s)",
        FLOAT, "float", 23, [X],
    ),
    "RMSNormalization over two axes": (
        "s = Constant<value_float = 2.0>() y = RMSNormalization<axis = 2>(x, s)",
        FLOAT, "float", 23, [X],
    ),
    "InstanceNormalization": (
        f"{C} y = InstanceNormalization<epsilon = 0.1>(x, c, c)", FLOAT, "float", 18, [X],
    ),
    "GlobalAveragePool": ("y = GlobalAveragePool(x)", FLOAT, "float", 18, [X]),
    "GlobalMaxPool": ("y = GlobalMaxPool(x)", FLOAT, "float", 18, [X]),
    "OneHot": (
        "d = Constant<value_int = 7>() v = Constant<value_floats = [-1.0, 2.5]>()"
        "y = OneHot(a, d, v)",
        "int64[8] a", "float", 18, [WHOLE],
    ),
    "OneHot in front": (
        "d = Constant<value_int = 7>() v = Constant<value_floats = [-1.0, 2.5]>()"
        "y = OneHot<axis = 0>(a, d, v)",
        "int64[8] a", "float", 18, [WHOLE],
    ),
    "Trilu": (
        "k = Constant<value_int = 1>() y = Trilu<upper = 0>(x, k)", FLOAT, "float", 18, [X],
    ),
}  # fmt: skip


def model_of(nodes: str, inputs: str, output: str, opset: int) -> onnx.ModelProto:
    given = output if "[" in output else f"{output}[]"
    head = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({given} y)'
    model = onnx.parser.parse_model(f"{head} {{{nodes}}}")
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def run(model: onnx.ModelProto, arrays: list[NDArray[Any]]) -> NDArray[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    names = [i.name for i in session.get_inputs()]
    (y,) = session.run(None, dict(zip(names, arrays, strict=True)))
    assert isinstance(y, np.ndarray)
    return y


def by_reference(model: onnx.ModelProto, arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """For what is newer than ONNX Runtime's kernels."""
    given = dict(zip([i.name for i in model.graph.input], arrays, strict=True))
    return np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, given)[0])


@pytest.mark.parametrize("case", CASES)
def test_a_definition_computes_what_its_operator_does(case: str):
    nodes, inputs, output, opset, arrays = CASES[case]
    operator = case.split()[0]
    before = model_of(nodes, inputs, output, opset)
    model = ir.from_proto(before)
    assert decompose(model, ()) >= 1
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert operator not in {node.op_type for node in after.graph.node}
    execute = by_reference if opset > 22 else run
    wanted, got = execute(before, arrays), execute(after, arrays)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    error = np.abs(got.astype(np.float64) - wanted).max() if got.dtype != bool else got ^ wanted
    assert np.max(error) <= 1e-6 * np.abs(wanted).max()


def test_every_definition_has_its_case():
    assert {case.split()[0] for case in CASES} == set(DEFINITIONS)


def test_what_the_device_has_stays():
    model = ir.from_proto(model_of("y = HardSwish(x)", FLOAT, "float", 18))
    assert decompose(model, ("HardSwish",)) == 0
    assert [node.op_type for node in model.graph] == ["HardSwish"]


@pytest.mark.parametrize(
    ("nodes", "inputs"),
    [
        # a quotient of floats may round to the next integer
        ("y = Mod<fmod = 1>(x, x)", FLOAT),
        # its second output is read
        ("y, m = LayerNormalization(x, w) z = Identity(m)", f"{FLOAT}, float[4] w"),
        # a triangle of unknown size
        ("y = Trilu(x)", "float[H, W] x"),
    ],
)
def test_what_has_no_exact_form_stays(nodes: str, inputs: str):
    model = ir.from_proto(model_of(nodes, inputs, "float", 18))
    before = [node.op_type for node in model.graph]
    assert decompose(model, ("Identity",)) == 0
    assert [node.op_type for node in model.graph] == before


def test_folding_leaves_quantized_weights_as_they_are():
    nodes = (
        "one = Constant<value_float = 0.5>() zero = Constant<value = int8 {0}>()"
        "w = Constant<value_floats = [0.3, 1.0, 2.0, 0.1]>()"
        "q = QuantizeLinear(w, one, zero) d = DequantizeLinear(q, one, zero)"
        "a = Mul(one, one) p = Add(x, d) y = Mul(p, a)"
    )
    before = model_of(nodes, FLOAT, "float", 18)
    model = ir.from_proto(before)
    fold_constants(model)
    left = {node.op_type for node in model.graph} - {"Constant"}
    assert left == {"QuantizeLinear", "DequantizeLinear", "Add", "Mul"}
    assert sum(node.op_type == "Mul" for node in model.graph) == 1
    assert np.array_equal(run(before, [X]), run(ir.to_proto(model), [X]))
