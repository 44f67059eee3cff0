"""Network: its figures, and saving and loading in another process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors import safe_open
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.errors import ModelError, StateError
from edgekd.models.build import Build
from edgekd.network import Network, Preprocessing
from edgekd.quantization.placement import digest
from edgekd.runtimes.base import Artifact
from edgekd.runtimes.onnxruntime import OnnxRuntime
from edgekd.stages.distill import distill
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.target import Target
from edgekd.tasks.classification import Classification

Batches = list[tuple[Tensor, Tensor]]

# ---- figures -------------------------------------------------------------------------------------


def test_params_and_macs_are_those_of_paper_and_pencil(trained: Network, quantized: Network):
    # stem, block 1 (8 -> 8), block 2 (8 -> 16 at half the resolution, 1×1 shortcut), head
    weights = 3 * 8 * 9 + 2 * 8 * 8 * 9 + (8 * 16 + 16 * 16) * 9 + 8 * 16 + 16 * 4
    macs = (3 * 8 * 9 + 2 * 8 * 8 * 9) * 256 + ((8 * 16 + 16 * 16) * 9 + 8 * 16) * 64 + 16 * 4
    channels = 8 * 3 + 16 * 3
    assert trained.params == weights + 4 + 2 * channels  # γ and β of each BatchNorm
    assert quantized.params == weights + 4 + channels  # a bias in their place, no scales
    assert trained.macs == macs
    assert quantized.macs == macs


def test_asking_for_figures_leaves_modes_alone():
    net = Network(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), torch.zeros(1, 3, 8, 8))
    net.module.train()
    assert net.macs == 3 * 4 * 64
    assert net.module[1].training
    assert net.module[1].num_batches_tracked == 0


class Two(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 4, 1), kind

    def forward(self, a: Tensor, b: Tensor) -> Any:
        y = self.conv(a) + b
        return {"y": y, "mean": y.mean((2, 3))} if self.kind is dict else (y, y.mean((2, 3)))


def test_inputs_may_come_by_name_in_any_order():
    a, b = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    net = Network(Two(tuple), {"b": b, "a": a})
    assert [(i.name, i.shape) for i in net.io.inputs] == [("a", (3, 8, 8)), ("b", (4, 8, 8))]
    got, wanted = net.program().module()(a, b), net(a, b)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(got, wanted, strict=True))


def test_a_batch_that_lacks_an_input_or_has_another_type_is_refused():
    inputs = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8)]
    labels = torch.zeros(2).long()
    net = Network(Two(tuple), inputs)
    several = r"takes 2 inputs \(input0 float32, input1 float32\); the batch is of "
    with pytest.raises(ModelError, match=several + r"1 \(float32\)"):
        net(inputs[0])
    with pytest.raises(ModelError, match=r"takes 2 inputs and gets 3"):
        net(*inputs, labels)
    with pytest.raises(ModelError, match=several):
        quantize(net, target="host-onnxruntime", data=[inputs[0]], accelerator="cpu")
    with pytest.raises(ModelError, match=several + r"2 \(float32, int64\): give batches of the in"):
        distill(net, task=Classification(), data=[(inputs[0], labels)], epochs=1)


def test_inputs_by_names_that_forward_has_not_are_refused():
    with pytest.raises(ModelError, match=r"Two\.forward takes a, b; .* are a, c: name its first"):
        Network(Two(tuple), {"a": torch.zeros(1, 3, 8, 8), "c": torch.zeros(1, 4, 8, 8)})


@pytest.mark.parametrize(
    ("kind", "names"), [(dict, ("y", "mean")), (tuple, ("output0", "output1"))]
)
def test_inputs_and_outputs_are_read_off_the_module(kind: type, names: tuple[str, ...]):
    net = Network(Two(kind), [torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 8, 8)])
    assert [(i.name, i.shape, i.dtype) for i in net.io.inputs] == [
        ("input0", (3, 8, 8), "float32"), ("input1", (4, 8, 8), "float32"),
    ]  # fmt: skip
    assert net.io.outputs == names
    assert [tuple(x.shape) for x in net.io.example(5)] == [(5, 3, 8, 8), (5, 4, 8, 8)]


def test_a_module_that_fails_on_its_examples_is_refused():
    with pytest.raises(ModelError, match=r"Conv2d fails on the example inputs \[\(1, 2, 8, 8\)\]"):
        Network(nn.Conv2d(3, 4, 1), torch.zeros(1, 2, 8, 8))


def test_a_module_for_one_sample_only_is_refused():
    class One(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(1, -1))

    message = r"One fails on .*\[\(2, 8\)\]: .*it fixes the batch at 1: use x\.size\(0\)"
    with pytest.raises(ModelError, match=message):
        Network(One(8, 4), torch.zeros(1, 8))


def test_a_copy_is_independent(trained: Network):
    other = trained.copy()
    before = {name: t.clone() for name, t in trained.state().items()}
    with torch.no_grad():
        for tensor in other.state().values():
            tensor.zero_()
    assert all(torch.equal(before[name], t) for name, t in trained.state().items())


# ---- what is written -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved(
    trained: Network, quantized: Network, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    for name, net in {"float": trained, "int8": quantized}.items():
        net.save(folder / name)
    return {name: folder / name for name in ("float", "int8")}


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["int8"], tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_nothing_is_pickled_and_nothing_temporary_is_left(kind: str, saved: dict[str, Path]):
    assert sorted(p.name for p in saved[kind].iterdir()) == ["spec.json", "weights.safetensors"]
    json.loads((saved[kind] / "spec.json").read_text())
    with safe_open(saved[kind] / "weights.safetensors", "np") as file:  # type: ignore[no-untyped-call]
        assert len(list(file.keys())) > 10


def test_a_quantized_network_is_stored_under_the_modules_names(
    saved: dict[str, Path], trained: Network
):
    with safe_open(saved["int8"] / "weights.safetensors", "np") as file:  # type: ignore[no-untyped-call]
        names = set(file.keys())
    layers = {
        name for name, m in trained.module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    own = {name for name in names if not name.startswith("quant.")}
    assert own == {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    quant = {name.removeprefix("quant.").rpartition(".")[0] for name in names - own}
    placement = json.loads((saved["int8"] / "spec.json").read_text())["quant"]["placement"]
    assert quant == set(placement)
    assert names - own == {f"quant.{t}.{leaf}" for t in quant for leaf in ("scale", "zero_point")}


# ---- another process -----------------------------------------------------------------------------

ELSEWHERE = """
import sys
from pathlib import Path
import numpy as np, torch
from edgekd.network import Network
from edgekd.quantization.placement import digest
from edgekd.stages.export import export
folder, x = Path(sys.argv[1]), torch.from_numpy(np.load(sys.argv[2]))
for kind in ("float", "int8"):
    net = Network.load(folder / kind)
    if net.scheme is not None:
        (folder / "digest").write_text(digest(net.module))
    net.train_mode(False)
    with torch.no_grad():
        np.save(folder / f"{kind}.npy", net(x).numpy())
    export(net, target="host-onnxruntime", out=folder / f"{kind}-artifact")
"""


@pytest.fixture(scope="session")
def elsewhere(saved: dict[str, Path], batches: Batches) -> Path:
    """Where another process has put outputs and artifacts of the loaded networks."""
    folder = saved["int8"].parent
    np.save(folder / "x.npy", batches[0][0].numpy())
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder), str(folder / "x.npy")], check=True
    )
    return folder


def initializers(path: Path) -> dict[str, bytes]:
    graph = onnx.load(path).graph
    return {c.name: numpy_helper.to_array(c).tobytes() for c in graph.initializer}


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_loaded_in_another_process_it_is_the_same_to_the_bit(
    kind: str, elsewhere: Path, batches: Batches, request: pytest.FixtureRequest
):
    net = request.getfixturevalue({"float": "trained", "int8": "quantized"}[kind])
    here: Artifact = request.getfixturevalue({"float": "fp32", "int8": "int8"}[kind] + "_artifact")
    with torch.no_grad():
        ours = net(batches[0][0]).numpy()
    np.testing.assert_array_equal(np.load(elsewhere / f"{kind}.npy"), ours)
    there = Artifact.load(elsewhere / f"{kind}-artifact")
    assert initializers(there.path) == initializers(here.path)
    assert len(initializers(here.path)) > 10


def test_the_placements_digest_is_the_same_in_another_process(elsewhere: Path, quantized: Network):
    assert isinstance(quantized.module, GraphModule)
    assert (elsewhere / "digest").read_text() == digest(quantized.module)


def test_a_loaded_network_knows_what_the_saved_one_knew(saved: dict[str, Path], quantized: Network):
    loaded = Network.load(saved["int8"])
    assert loaded.io == quantized.io
    assert loaded.io.labels == ("upright stripes", "level stripes", "checks", "plain")
    assert loaded.io.preprocessing == Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    assert (loaded.build, loaded.scheme) == (quantized.build, quantized.scheme)
    loaded(torch.zeros(2, 3, 16, 16)).sum().backward()  # and can be trained further


# ---- what cannot be loaded -----------------------------------------------------------------------


def change(folder: Path, **changes: Any) -> None:
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | changes))


def test_a_missing_or_damaged_spec_is_refused(copied: Path):
    (copied / "spec.json").write_text('{"format": 1, ')
    with pytest.raises(StateError, match=r"spec\.json is damaged"):
        Network.load(copied)
    (copied / "spec.json").write_text("[]")
    with pytest.raises(StateError, match=r"spec\.json is damaged"):
        Network.load(copied)
    (copied / "spec.json").unlink()
    with pytest.raises(StateError, match=r"holds no saved network \(no spec\.json\)"):
        Network.load(copied)


@pytest.mark.parametrize("key", ["io", "build", "quant"])
def test_a_spec_with_a_part_missing_is_refused(copied: Path, key: str):
    spec = json.loads((copied / "spec.json").read_text())
    del spec[key]
    (copied / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(StateError, match=rf"spec\.json.*{key}"):
        Network.load(copied)


def test_a_spec_with_a_wrong_part_is_refused(copied: Path):
    change(copied, io={"inputs": 3, "outputs": ["y"]})
    with pytest.raises(StateError, match=r"spec\.json: inputs"):
        Network.load(copied)


def test_another_format_is_refused(copied: Path):
    change(copied, format=99)
    with pytest.raises(StateError, match="has format 99; this version reads 1"):
        Network.load(copied)


def test_damaged_or_missing_weights_are_refused(copied: Path):
    path = copied / "weights.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-8], b"", b"not safetensors", whole[:100]):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=r"weights\.safetensors is damaged"):
            Network.load(copied)
    path.unlink()
    with pytest.raises(StateError, match=r"weights\.safetensors does not exist"):
        Network.load(copied)


def test_weights_of_another_network_are_refused(copied: Path, saved: dict[str, Path]):
    shutil.copy(saved["float"] / "weights.safetensors", copied)
    with pytest.raises(StateError, match=r"missing \['head\.|missing \['quant\.") as caught:
        Network.load(copied)
    assert "unexpected" in str(caught.value)
    change(copied, quant=None)
    build = {"model": "edgekd/resnet", "kwargs": {"num_classes": 5, "widths": [8, 16]}}
    change(copied, build=build)
    with pytest.raises(StateError, match=r"head\.\w+ has shape \(4.*the network has \(5"):
        Network.load(copied)


def test_a_placement_that_is_not_reproduced_is_refused_with_both_versions(copied: Path):
    quant = json.loads((copied / "spec.json").read_text())["quant"]
    change(copied, quant=quant | {"placement_sha256": "0" * 64, "torch": "1.2.3"})
    with pytest.raises(
        StateError, match=rf"torch {torch.__version__.split('+')[0]}.*torch 1\.2\.3"
    ):
        Network.load(copied)
    # a scheme that places others is noticed too
    changed = quant["scheme"] | {"weight_bits": 8}
    change(copied, quant=quant | {"scheme": changed})
    with pytest.raises(StateError, match="placed differently"):
        Network.load(copied)


def test_a_factory_from_elsewhere_runs_only_when_trusted(tmp_path: Path):
    build = Build(model="torch.nn:Conv2d", kwargs={k: 3 for k in (
        "in_channels", "out_channels", "kernel_size")})  # fmt: skip
    net = Network(nn.Conv2d(3, 3, 3), torch.zeros(1, 3, 8, 8), build=build)
    net.save(tmp_path)
    with pytest.raises(ModelError, match=r"names the callable 'torch\.nn:Conv2d'; if you trust it"):
        Network.load(tmp_path)
    loaded = Network.load(tmp_path, trust=True)
    assert torch.equal(loaded.module.weight, net.module.weight)


def test_without_a_factory_the_module_is_asked_for(tmp_path: Path, scheme: Any, host: Target):
    net = quantize(
        Network(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)), target=host,
        data=[torch.randn(8, 3, 8, 8)], accelerator="cpu",
    )  # fmt: skip
    net.save(tmp_path)
    assert json.loads((tmp_path / "spec.json").read_text())["build"] is None
    with pytest.raises(StateError, match=r"Network\.load\(path, module=\.\.\.\)"):
        Network.load(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(Network.load(tmp_path, module=nn.Conv2d(3, 4, 3))(x), net(x))


# ---- S8 -> U8 ------------------------------------------------------------------------------------


def test_int8_activations_are_exported_as_uint8_without_loss(
    trained: Network, batches: Batches, host: Target, tmp_path: Path
):
    assert host.scheme is not None
    signed = host.scheme.model_copy(update={"activation_dtype": "int8"})
    target = host.model_copy(update={"scheme": signed})
    net = quantize(trained, target=target, data=batches[:1], accelerator="cpu")
    x = batches[1][0].numpy()
    outputs, zeros = [], []
    for name, wanted in {"s8": target, "u8": host}.items():
        artifact = export(net, target=wanted, out=tmp_path / name)
        session = OnnxRuntime().load(artifact.path, threads=1, emulated=True)
        outputs.append(session([x])[0])
        graph = onnx.load(artifact.path).graph
        constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        zeros.append([constants[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"])
    np.testing.assert_array_equal(*outputs)
    assert {z.dtype.type for z in zeros[0]} == {np.int8}
    assert {z.dtype.type for z in zeros[1]} == {np.uint8}
    assert [int(z) + 128 for z in zeros[0]] == [int(z) for z in zeros[1]]
    with torch.no_grad():
        ours = net(batches[1][0]).numpy()
    assert np.abs(outputs[1] - ours).mean() < 0.25 * np.abs(ours).max() / 127
