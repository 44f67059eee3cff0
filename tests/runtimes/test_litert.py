"""`.tflite`: the trained scales, in integers throughout, equal to the trained network."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.errors import MissingPackageError, StateError
from edgekd.network import Network
from edgekd.quantization.fake_quant import FakeQuant
from edgekd.quantization.placement import MOVING, quantized_activations, quantizers
from edgekd.runtimes.base import Artifact
from edgekd.runtimes.litert import LiteRt, LiteRtSession, _layouts
from edgekd.runtimes.onnx_graph import quantized_name
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import verify
from edgekd.target import Target
from edgekd.tasks.classification import Classification

Batches = list[tuple[Tensor, Tensor]]
PHONE = Target.load("android-litert")
needs_converter = pytest.mark.skipif(
    find_spec("litert_torch") is None, reason="litert-torch: pip install 'edgekd[litert]'"
)


@pytest.fixture(scope="module")
def phone(trained: Network, batches: Batches) -> Network:
    """`trained` in the phone's integers, trained further."""
    return quantize(
        trained, target=PHONE, data=batches, task=Classification(), epochs=1, accelerator="cpu"
    )


@pytest.fixture(scope="module")
def artifact(phone: Network, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(phone, target=PHONE, out=tmp_path_factory.mktemp("litert"))


def opened(path: Path, *, emulated: bool = False) -> LiteRtSession:
    return LiteRt().load(path, threads=1, emulated=emulated)


def interpreter(path: Path) -> Any:
    """LiteRT's own view of the file."""
    module = pytest.importorskip("ai_edge_litert.interpreter")
    made = module.Interpreter(str(path))
    made.allocate_tensors()
    return made


def steps_off(net: Network, session: LiteRtSession, x: Tensor) -> list[NDArray[Any]]:
    """Difference of each output, in steps of its quantizer."""
    with torch.no_grad():
        out = net(x)
    ours = [out] if isinstance(out, Tensor) else list(out.values())
    assert isinstance(net.module, GraphModule)
    ends = [n for n in net.module.graph.output_node().all_input_nodes]
    scales = [net.module.get_submodule(str(n.target)).scale.item() for n in ends]
    theirs = session([x.numpy()])
    assert [t.shape for t in theirs] == [tuple(o.shape) for o in ours]
    return [
        np.abs(t - o.numpy()) / s for t, o, s in zip(theirs, ours, scales, strict=True)
    ]  # fmt: skip


# ---- the file ------------------------------------------------------------------------------------


@needs_converter
def test_every_operator_is_an_integer_kernel_and_none_transposes(artifact: Artifact):
    model = interpreter(artifact.path)
    types = {d["index"]: np.dtype(d["dtype"]).name for d in model.get_tensor_details()}
    kinds = [op["op_name"] for op in model._get_ops_details() if op["op_name"] != "DELEGATE"]
    assert kinds.count("CONV_2D") == 6
    assert kinds.count("FULLY_CONNECTED") == 1
    assert not {"TRANSPOSE", "QUANTIZE", "DEQUANTIZE"} & set(kinds)
    named = {i for op in model._get_ops_details() for i in (*op["inputs"], *op["outputs"])}
    assert {types[i] for i in named if i >= 0} == {"int8", "int32"}  # biases, axes and paddings
    (given,), (answer,) = model.get_input_details(), model.get_output_details()
    assert (given["name"], given["dtype"], list(given["shape"])) == ("input", np.int8,
                                                                     [1, 16, 16, 3])  # fmt: skip
    assert (answer["name"], answer["dtype"], list(answer["shape"])) == ("output", np.int8, [1, 4])
    assert list(model.get_signature_runner().get_input_details()) == ["input"]


@needs_converter
def test_scales_zero_points_and_weights_are_the_trained_ones(artifact: Artifact, phone: Network):
    model = interpreter(artifact.path)
    stored = [d["quantization_parameters"] | {"index": d["index"]}
              for d in model.get_tensor_details()]  # fmt: skip
    one = {(float(p["scales"][0]), int(p["zero_points"][0])) for p in stored if len(p["scales"])}
    assert isinstance(phone.module, GraphModule)
    tensors = dict(phone.module.named_parameters())
    weights = 0
    for name, quantizer in quantizers(phone.module).items():
        scale = quantizer.scale.detach().numpy()
        if not scale.ndim:
            assert (float(scale), int(quantizer.zero_point)) in one, name
            continue
        (node,) = (n for n in phone.module.graph.nodes if n.name == name)
        weight = tensors[str(node.target)].detach().numpy()
        integers = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).clip(-127, 127)
        if weight.ndim == 4:
            integers = integers.transpose(0, 2, 3, 1)
        (index,) = (p["index"] for p in stored if np.array_equal(p["scales"], scale))
        np.testing.assert_array_equal(model.get_tensor(index), integers)
        weights += 1
    assert weights == 7


@needs_converter
def test_the_file_says_what_it_is_for(artifact: Artifact, phone: Network):
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    content = artifact.path.read_bytes()
    model = schema.Model.GetRootAs(content)
    facts = {}
    for entry in map(model.Metadata, range(model.MetadataLength())):
        buffer = model.Buffers(entry.Buffer())
        facts[entry.Name().decode()] = buffer.DataAsNumpy().tobytes().decode()
    assert facts["edgekd.target"] == "android-litert"
    assert tuple(json.loads(facts["edgekd.labels"])) == phone.io.labels
    assert json.loads(facts["edgekd.preprocessing"])["mean"] == [0.5, 0.5, 0.5]
    assert json.loads(facts["edgekd.tensors"])["input"][1] is True  # (N, H, W, C)
    starts = [model.Buffers(i)._tab.Vector(model.Buffers(i)._tab.Offset(4))
              for i in range(model.BuffersLength()) if model.Buffers(i).DataLength()]  # fmt: skip
    assert {start % 16 for start in starts} == {0}
    assert set(artifact.versions) == {"edgekd", "torch", "litert-torch", "ai-edge-litert"}


# ---- running -------------------------------------------------------------------------------------


@needs_converter
@pytest.mark.parametrize("emulated", [True, False], ids=["reference kernels", "XNNPACK"])
def test_outputs_are_the_networks_within_one_step(
    artifact: Artifact, phone: Network, batches: Batches, emulated: bool
):
    session = opened(artifact.path, emulated=emulated)
    assert session.integer_share() == (7, 7)
    (off,) = steps_off(phone, session, torch.cat([x for x, _ in batches]))
    assert (off < 1.01).mean() >= 0.99
    assert off.mean() < 0.1


@needs_converter
def test_it_passes_verification_operator_by_operator(
    artifact: Artifact, phone: Network, batches: Batches
):
    parity = verify(artifact, phone, data=batches, task=Classification())
    assert (parity.gate, parity.verifier, parity.integer_share) == ("passed", "emulated", 1.0)
    assert parity.local is not None
    found = parity.local.passes["as written"]
    assert found.max_steps <= 1
    assert found.tensors >= found.of - 1  # a 1 × 1 map and its flattening are one tensor there
    whole = parity.local.as_a_whole  # by XNNPACK
    assert whole is not None
    assert (whole.exact, whole.unknown) == (1.0, ())


@needs_converter
@pytest.mark.parametrize("emulated", [True, False])
def test_inner_tensors_are_the_trained_graphs(
    artifact: Artifact, phone: Network, batches: Batches, emulated: bool
):
    assert isinstance(phone.module, GraphModule)
    ours: dict[str, tuple[Tensor, float]] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n.op == "call_module" and n.args[0].op != "get_attr":
                quantizer = self.module.get_submodule(n.target)
                assert isinstance(quantizer, FakeQuant)
                ours[quantized_name(n.args[0].name)] = result, quantizer.scale.item()
            return result

    x = batches[-1][0][:8]
    with torch.no_grad():
        Recorder(phone.module).run(x)
    names = [quantized_name(tensor) for tensor in quantized_activations(phone.module)]
    theirs = opened(artifact.path, emulated=emulated).tensors([x.numpy()], [*names, "nothing"])
    assert len(names) - 1 <= len(theirs) <= len(names)
    for name, value in theirs.items():
        own, scale = ours[name]
        assert value.shape == own.shape, name
        off = np.abs(value - own.numpy()) / scale
        assert off.mean() < 0.25, name  # one that rounds to the other side moves those behind it
        assert off.max() < 3.1, name


@needs_converter
def test_integers_are_answered_in_integers(artifact: Artifact, batches: Batches):
    session = opened(artifact.path)
    assert (session.input_shapes, session.input_types) == ([(1, 3, 16, 16)], ["int8"])
    x = batches[0][0][:4].numpy()
    (given,) = interpreter(artifact.path).get_input_details()
    scale, zero = given["quantization"]
    integers = (np.rint(x / np.float32(scale)) + zero).clip(-128, 127).astype(np.int8)
    (answer,), (floats,) = session([integers]), session([x])
    assert answer.dtype == np.int8
    (end,) = interpreter(artifact.path).get_output_details()
    scale, zero = end["quantization"]
    np.testing.assert_allclose((answer.astype(np.float32) - zero) * scale, floats, rtol=1e-6)


@needs_converter
def test_a_float_network_stays_float(trained: Network, batches: Batches, tmp_path: Path):
    artifact = export(trained, target=PHONE, out=tmp_path)
    x = batches[-1][0][:5]
    with torch.no_grad():
        ours = trained(x)
    for emulated in (True, False):
        session = opened(artifact.path, emulated=emulated)
        assert (session.integer_share(), session.input_types) == ((0, 7), ["float32"])
        np.testing.assert_allclose(session([x.numpy()])[0], ours, rtol=1e-4, atol=1e-4)


class Branches(nn.Module):
    """Depthwise behind a ReLU6, concatenation, poolings, a residual; a map and scores come out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.deep = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.side = nn.Conv2d(8, 4, 1)
        self.join = nn.Conv2d(12, 8, 1)
        self.map = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x).relu()
        x = x + self.join(torch.cat([nn.functional.relu6(self.deep(x)), self.side(x)], 1))
        x = nn.functional.avg_pool2d(nn.functional.max_pool2d(x, 3, 1, 1), 2)
        return {"map": self.map(x), "scores": self.head(x.mean((2, 3)))}


@needs_converter
def test_branches_and_several_outputs(batches: Batches, tmp_path: Path):
    torch.manual_seed(0)
    x = torch.cat([x for x, _ in batches[:2]])
    net = Network(Branches(), x[:1])
    net = quantize(net, target=PHONE, data=[x], accelerator="cpu")
    artifact = export(net, target=PHONE, out=tmp_path)
    for emulated in (True, False):
        session = opened(artifact.path, emulated=emulated)
        assert session.integer_share() == (6, 6)
        for off in steps_off(net, session, x[:32]):
            assert (off < 1.01).mean() >= 0.99
    assert [d["name"] for d in interpreter(artifact.path).get_output_details()] == ["map", "scores"]


class Normalised(nn.Module):
    """L2 over channels in between, as SSD300 has it: torch expands the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(20 * nn.functional.normalize(self.before(x).relu()))


@needs_converter
@pytest.mark.parametrize("integers", [False, True])
def test_a_norm_over_channels(tmp_path: Path, integers: bool):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    net = Network(Normalised(), x[:1])
    if integers:
        net = quantize(net, target=PHONE, data=[x], accelerator="cpu")
    artifact = export(net, target=PHONE, out=tmp_path)
    found = opened(artifact.path, emulated=True)([x.numpy()])[0]
    with torch.no_grad():
        wanted = net(x).numpy()
    assert np.abs(found - wanted).mean() <= (0.01 if integers else 1e-5) * np.abs(wanted).max()


class Rolled(nn.Module):
    """A window's shift and rows of features, as Swin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 8, 1)
        self.norm, self.wide, self.narrow = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.before(x).permute(0, 2, 3, 1)).roll((-3, 2), (1, 2))
        y = y + self.narrow(nn.functional.gelu(self.wide(y)))
        return self.behind(y.permute(0, 3, 1, 2))


@needs_converter
def test_what_is_rolled_and_rows_of_features_are_compared(tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    net = quantize(Network(Rolled(), x[:1]), target=PHONE, data=[x], accelerator="cpu")
    artifact = export(net, target=PHONE, out=tmp_path)
    parity = verify(artifact, net, data=[(x,)], mean_steps=1.0)
    assert parity.local is not None and parity.local.as_written is not None
    found = parity.local.as_written
    assert found.max_steps <= 1
    assert found.exact >= 0.99
    places = LiteRt().load(artifact.path, threads=1)._places
    shown = {"quant.roll", "quant.linear_default", "quant.gelu_default", "quant.add"}
    assert shown <= places.keys()


class Windowed(nn.Module):
    """A Swin block's windows, as many as each has rows, around two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 8, 1)
        self.norm, self.inner, self.outer = nn.LayerNorm(24), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).permute(0, 2, 3, 1)
        windows = self.norm(x).reshape(-1, 4, 4, 4, 4, 24).transpose(2, 3).reshape(-1, 16, 24)
        y = self.outer(nn.functional.gelu(self.inner(windows)))
        y = y.reshape(-1, 4, 4, 4, 4, 24).transpose(2, 3).reshape(-1, 16, 16, 24)
        return self.behind((x + y).permute(0, 3, 1, 2))


class LayerScaled(nn.Module):
    """ConvNeXt's blocks before training: all their linear layers give the smallest scale."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 8, 1)
        self.deep = nn.ModuleList(nn.Conv2d(24, 24, 3, 1, 1, groups=24) for _ in range(3))
        self.wide = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.scales = nn.ParameterList(torch.full((24, 1, 1), 1e-6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for deep, wide, scale in zip(self.deep, self.wide, self.scales, strict=True):
            x = x + scale * wide(deep(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.behind(x)


@needs_converter
@pytest.mark.parametrize("module", [Windowed, LayerScaled])
def test_equal_scales_and_shapes_are_told_apart(tmp_path: Path, module: type[nn.Module]):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    net = quantize(Network(module(), x[:1]), target=PHONE, data=[x], accelerator="cpu")
    artifact = export(net, target=PHONE, out=tmp_path)
    parity = verify(artifact, net, data=[(x,)], mean_steps=1.0)
    assert parity.local is not None and parity.local.as_written is not None
    assert parity.local.as_written.max_steps <= 1
    assert isinstance(net.module, GraphModule)
    places = LiteRt().load(artifact.path, threads=1)._places
    nodes = {n.name: n for n in net.module.graph.nodes}
    missing = {n for n in quantized_activations(net.module) if quantized_name(n) not in places}
    assert {nodes[n].target for n in missing} <= MOVING


def test_rows_may_be_merged_but_not_exchanged():
    assert _layouts((512, 96), (1, 16, 16, 96)) == (False, True)
    assert _layouts((2, 16, 16, 96), (1, 256, 96)) == (False, True)
    assert _layouts((2, 96, 16, 8), (1, 16, 8, 96)) == (True, False)
    assert _layouts((2, 8, 8, 8), (1, 8, 8, 8)) == (True, True)
    assert _layouts((2, 197, 3, 64), (1, 3, 197, 64)) == (False, False)
    assert _layouts((128, 49, 96), (1, 3136, 96)) == (False, True)
    assert _layouts((128, 49, 96), (1, 56, 56, 96)) == (False, False)


@needs_converter
def test_a_file_that_is_no_model_is_refused(tmp_path: Path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"not a model")
    with pytest.raises(StateError, match=r"LiteRT refuses .*model\.tflite"):
        opened(path)


# ---- without the packages ------------------------------------------------------------------------


def test_without_the_interpreter_nothing_is_checked(
    phone: Network, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    path = tmp_path / "model.tflite"
    path.write_bytes(b"")
    artifact = Artifact.of(path, target=PHONE, precision="int8", versions={})
    parity = verify(artifact, phone, data=batches)
    assert (parity.gate, parity.n) == ("unchecked", 0)
    assert parity.reasons == (
        "ai-edge-litert is not installed; run: pip install 'edgekd[litert]'",
    )  # fmt: skip


def test_without_the_converter_nothing_is_written(
    phone: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(MissingPackageError, match=r"litert-torch .* 'edgekd\[litert\]'"):
        export(phone, target=PHONE, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_training_serves_both_phone_formats():
    other = Target.load("android-executorch")
    assert PHONE.scheme is not None
    assert other.scheme is not None
    assert PHONE.scheme.fits(other.scheme)
    assert other.scheme.fits(PHONE.scheme)


class Excited(nn.Module):
    """Squeeze and excite (Hu et al. 2018, arXiv:1709.01507) with a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        gate = torch.sigmoid(self.gate(nn.functional.adaptive_avg_pool2d(x, 1)))
        return self.head((x * gate).mean((2, 3)))


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_sigmoid_has_the_one_scale_that_its_kernel_takes(
    epochs: int, batches: Batches, tmp_path: Path
):
    torch.manual_seed(0)
    net = Network(Excited().eval(), torch.zeros(1, 3, 16, 16))
    excited = quantize(
        net, target=PHONE, data=batches[:2], teacher=net, epochs=epochs, accelerator="cpu"
    )
    assert isinstance(excited.module, GraphModule)
    gate = quantizers(excited.module)["sigmoid"]
    assert (gate.scale.item(), int(gate.zero_point)) == (1 / 256, -128)
    if find_spec("litert_torch") is None:
        pytest.skip("litert-torch: pip install 'edgekd[litert]'")
    parity = verify(export(excited, target=PHONE, out=tmp_path), excited, data=batches[:1])
    assert (parity.gate, parity.integer_share) == ("passed", 1.0)
