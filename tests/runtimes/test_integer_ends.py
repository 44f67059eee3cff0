"""Files that take and give integers: the same network, its ends cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from edgekd.errors import ModelError, StateError
from edgekd.network import Network
from edgekd.runtimes.base import get_runtime
from edgekd.runtimes.integer_ends import KEY, IntegerEnds
from edgekd.stages.export import export
from edgekd.stages.profile import profile
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import verify
from edgekd.target import Target

Batches = list[tuple[Tensor, Tensor]]
TYPES = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}


def whole(name: str, **changes: object) -> Target:
    """The target with integers from end to end."""
    target = Target.load(name)
    assert target.scheme is not None
    ends = {"integer_inputs": True, "integer_outputs": True}
    return target.model_copy(update={"scheme": target.scheme.model_copy(update=ends | changes)})


@pytest.fixture(scope="module", params=["host-onnxruntime", "intel-cpu", "signed"])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "intel-cpu":
        pytest.importorskip("openvino")
    if request.param == "signed":
        return whole("host-onnxruntime", activation_dtype="int8")
    return whole(request.param)


@pytest.fixture(scope="module")
def net(target: Target, trained: Network, batches: Batches) -> Network:
    return quantize(trained, target=target, data=batches, accelerator="cpu")


def test_integers_in_give_integers_out_and_floats_the_same_in_floats(
    target: Target, net: Network, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Target, "load", staticmethod(lambda _: target))
    artifact = export(net, target=target, out=tmp_path)
    session = get_runtime(target.runtime).load(artifact.path, threads=1)
    assert target.scheme is not None
    dtype = target.scheme.activation_dtype
    assert session.input_types == [dtype]
    x = batches[-1][0].numpy()
    if target.runtime == "onnxruntime":
        model = onnx.load(artifact.path)
        ends = [*model.graph.input, *model.graph.output]
        assert [e.type.tensor_type.elem_type for e in ends] == [TYPES[dtype]] * 2
        integers = IntegerEnds.read({p.key: p.value for p in model.metadata_props})
        given = integers["input"].quantize(x)
        (answer,) = session([given])
        assert answer.dtype == dtype and len(np.unique(answer)) > 50
        np.testing.assert_array_equal(integers["output"].dequantize(answer), session([x])[0])
    with torch.no_grad():
        wanted = net(batches[-1][0]).numpy()
    (floats,) = session([x])
    assert floats.dtype == np.float32
    assert np.abs(floats - wanted).mean() < 0.01 * np.abs(wanted).max() / 127

    if dtype == "int8":  # ONNX Runtime has integer kernels for it on Arm alone
        emulated = target.model_copy(update={"verifier": "emulated"})
        monkeypatch.setattr(Target, "load", staticmethod(lambda _: emulated))
    parity = verify(artifact, net, data=batches)
    assert (parity.gate, parity.reasons) == ("passed", ())
    if dtype == "uint8":
        assert profile(artifact, target=target, runs=20).p50_ms > 0


def test_a_file_with_float_ends_says_nothing_of_integers(int8_artifact):  # type: ignore[no-untyped-def]
    model = onnx.load(int8_artifact.path)
    assert KEY not in {p.key for p in model.metadata_props}


def test_damaged_metadata_is_refused():
    with pytest.raises(StateError, match=r"edgekd\.integers .* is damaged"):
        IntegerEnds.read({KEY: '{"input": {"scale": 1}}'})


class Ends(nn.Module):
    """A convolution between what a test wants at its ends."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.conv, self.after = before, nn.Conv2d(3, 4, 3), after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.conv(self.before(x)))
        return out


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (nn.Sigmoid(), nn.Identity(), "integer inputs: input goes in float into Sigmoid"),
        (nn.Identity(), nn.Tanh(), "integer outputs: output comes out of a float operator"),
        (nn.Identity(), nn.Flatten(), None),
        (nn.MaxPool2d(2), nn.ReLU(), None),
    ],
)
def test_only_what_is_quantized_can_be_an_integer_end(
    before: nn.Module, after: nn.Module, reason: str | None, tmp_path: Path
):
    target = whole("host-onnxruntime")
    data = [torch.randn(8, 3, 8, 8)]
    net = quantize(
        Network(Ends(before, after), data[0]), target=target, data=data, accelerator="cpu"
    )
    if reason:
        with pytest.raises(ModelError, match=reason):
            export(net, target=target, out=tmp_path)
        return
    path = export(net, target=target, out=tmp_path).path
    session = get_runtime("onnxruntime").load(path, threads=1)
    with torch.no_grad():
        np.testing.assert_allclose(session([data[0].numpy()])[0], net(data[0]), atol=1e-4)
