"""FP16 copies: what overflows stays in FP32, the rest is what NumPy's halves give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from torch import Tensor

from edgekd.network import Network
from edgekd.runtimes import half
from edgekd.runtimes.half import to_half, written_out
from edgekd.stages.export import export
from edgekd.stages.verify import verify
from edgekd.tasks.classification import Classification

X = np.random.default_rng(0).normal(0, 1, (4, 8)).astype(np.float32)


def parsed(nodes: str) -> ir.Model:
    head = '<ir_version: 8, opset_import: ["" : 13]> g (float[N, 8] x) => (float[N, M] y)'
    return ir.from_proto(onnx.parser.parse_model(f"{head} {{{nodes}}}"))


def run(model: ir.Model) -> NDArray[np.float32]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    written = ir.to_proto(written_out(model))
    onnx.checker.check_model(written, full_check=True)
    (y,) = ort.InferenceSession(written.SerializeToString()).run(None, {"x": X})
    assert isinstance(y, np.ndarray) and y.dtype == np.float32
    return y


def test_each_node_rounds_to_half_precision():
    nodes = (
        "c = Constant<value_float = 0.1>() a = Mul(x, c) b = Add(a, x) r = Relu(b) y = Sub(r, c)"
    )
    copy, kept = to_half(parsed(nodes), [X])
    x, c = X.astype(np.float16), np.float16(0.1)
    assert kept == []
    assert np.array_equal(run(copy), (np.maximum(x * c + x, 0) - c).astype(np.float32))
    # one cast in, one out, none between
    assert sum(node.op_type == "Cast" for node in copy.graph) == 2


PLANTED = (
    "big = Constant<value_float = 300000.0>() a = Relu(x) [wide] b = Mul(a, big)"
    "[narrow] c = Div(b, big) y = Neg(c)"
)


def test_what_overflows_stays_in_single_precision(monkeypatch: pytest.MonkeyPatch):
    source = parsed(PLANTED)
    copy, kept = to_half(source, [X])
    assert kept == ["wide", "narrow"]
    wanted, got = run(source), run(copy)
    assert np.isfinite(got).all()
    assert np.abs(got - wanted).max() <= 1e-3 * np.abs(wanted).max()
    monkeypatch.setattr(half, "MAX", np.inf)
    with np.errstate(over="ignore"):
        naive, none = to_half(source, [X])
    assert none == []
    assert not np.isfinite(run(naive)).all()


def test_an_activation_that_only_the_data_shows():
    nodes = "[power] a = Exp(x) s = Constant<value_float = 0.1>() y = Mul(a, s)"
    assert to_half(parsed(nodes), [X])[1] == []
    assert to_half(parsed(nodes), [X + 10])[1][:1] == ["power"]


def test_a_mask_of_minus_infinity_is_no_overflow():
    nodes = "m = Constant<value = float {-inf}>() a = Add(x, m) b = Exp(a) y = Add(b, x)"
    copy, kept = to_half(parsed(nodes), [X])
    assert kept == []
    assert np.array_equal(run(copy), X.astype(np.float16).astype(np.float32))


def test_verify_foretells_a_nanos_half_precision(
    trained: Network, batches: list[tuple[Tensor, Tensor]], tmp_path: Path
):
    artifact = export(trained, target="jetson-nano", out=tmp_path)
    parity = verify(artifact, trained, data=batches[:2], task=Classification())
    assert (parity.gate, parity.reasons) == ("passed", ())
    assert parity.half_agreement is not None and parity.half_agreement >= 0.995
    assert parity.relative_error is not None and parity.half_relative_error is not None
    # an FP16 number has 11 bits, and a few layers add up
    assert parity.relative_error < 1e-5 < 2**-14 < parity.half_relative_error < 2**-7
