"""`.pte`: the trained scales, integers in XNNPACK's graph, equal to the trained network."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from edgekd.errors import MissingPackageError, StateError
from edgekd.network import Network
from edgekd.quantization.placement import quantizers
from edgekd.runtimes.base import Artifact
from edgekd.runtimes.executorch import ExecuTorch, ExecuTorchSession, delegated, read_program
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import verify
from edgekd.target import Target
from edgekd.tasks.classification import Classification

Batches = list[tuple[Tensor, Tensor]]
PHONE = Target.load("android-executorch")
needs_executorch = pytest.mark.skipif(
    find_spec("executorch") is None, reason="executorch: pip install 'edgekd[executorch]'"
)


@pytest.fixture(scope="module")
def phone(trained: Network, batches: Batches) -> Network:
    """`trained` in the phone's integers, trained further."""
    return quantize(
        trained, target=PHONE, data=batches, task=Classification(), epochs=1, accelerator="cpu"
    )


@pytest.fixture(scope="module")
def artifact(phone: Network, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(phone, target=PHONE, out=tmp_path_factory.mktemp("executorch"))


def opened(path: Path) -> ExecuTorchSession:
    return ExecuTorch().load(path, threads=1)


@needs_executorch
def test_xnnpack_has_it_whole_with_the_trained_scales(artifact: Artifact, phone: Network):
    program = read_program(artifact.path.read_bytes())
    (plan,) = (p for p in program.execution_plan if p.name == "forward")
    assert [o.name for o in plan.operators] == []  # no portable kernel is left
    (graph,) = delegated(program)
    kinds = [node["xnode_union_type"] for node in graph["xnodes"]]
    assert kinds.count("XNNConv2d") == 6
    assert kinds.count("XNNFullyConnected") == 1
    assert "XNNConvert" not in kinds  # the file's ends are integers
    stored = [value["xvalue_union"].get("quant_params") or {} for value in graph["xvalues"]]
    zeros = {p["zero_point"]: [] for p in stored if "zero_point" in p}
    for p in stored:
        if "zero_point" in p:
            zeros[p["zero_point"]].append(p["scale"])
    assert isinstance(phone.module, GraphModule)
    for name, quantizer in quantizers(phone.module).items():
        if not quantizer.scale.dim():
            near = np.asarray(zeros[int(quantizer.zero_point)]) / quantizer.scale.item()
            assert np.abs(near - 1).min() < 1e-3, name  # flatc prints four digits


@needs_executorch
def test_outputs_are_the_networks_within_one_step(
    artifact: Artifact, phone: Network, batches: Batches
):
    session = opened(artifact.path)
    assert session.integer_share() == (7, 7)
    x = torch.cat([x for x, _ in batches])
    (theirs,) = session([x.numpy()])
    with torch.no_grad():
        ours = phone(x).numpy()
    assert isinstance(phone.module, GraphModule)
    (end,) = phone.module.graph.output_node().all_input_nodes
    off = np.abs(theirs - ours) / phone.module.get_submodule(str(end.target)).scale.item()
    assert (off < 1.01).mean() >= 0.99
    assert off.mean() < 0.05


@needs_executorch
def test_it_passes_verification_and_says_what_cannot_be_seen(
    artifact: Artifact, phone: Network, batches: Batches
):
    parity = verify(artifact, phone, data=batches, task=Classification())
    assert (parity.gate, parity.verifier, parity.integer_share) == ("passed", "emulated", 1.0)
    assert parity.local is not None
    assert parity.local.passes == {}
    assert "no inner tensors" in parity.local.skipped
    whole = parity.local.as_a_whole
    assert whole is not None
    assert (whole.exact, whole.unknown) == (1.0, ())


@needs_executorch
def test_integers_are_answered_in_integers(artifact: Artifact, phone: Network, batches: Batches):
    session = opened(artifact.path)
    assert (session.input_shapes, session.input_types) == ([(1, 3, 16, 16)], ["int8"])
    assert isinstance(phone.module, GraphModule)
    (first,) = phone.module.graph.find_nodes(op="placeholder")[0].users
    quantizer = phone.module.get_submodule(str(first.target))
    x = batches[0][0][:4].numpy()
    integers = np.rint(x / quantizer.scale.item()) + int(quantizer.zero_point)
    (answer,) = session([integers.clip(-128, 127).astype(np.int8)])
    assert (answer.dtype, answer.shape) == (np.int8, (4, 4))
    assert (answer.argmax(1) == session([x])[0].argmax(1)).all()


@needs_executorch
def test_a_float_network_stays_float(trained: Network, batches: Batches, tmp_path: Path):
    session = opened(export(trained, target=PHONE, out=tmp_path).path)
    assert (session.integer_share(), session.input_types) == ((0, 7), ["float32"])
    x = batches[-1][0][:5]
    with torch.no_grad():
        np.testing.assert_allclose(session([x.numpy()])[0], trained(x), rtol=1e-4, atol=1e-4)


@needs_executorch
def test_what_it_cannot_open_is_refused(artifact: Artifact, tmp_path: Path):
    path = tmp_path / "model.pte"
    path.write_bytes(b"not a program")
    with pytest.raises(StateError, match=r"ExecuTorch refuses .*model\.pte"):
        opened(path)
    with pytest.raises(StateError, match="without XNNPACK's kernels"):
        ExecuTorch().load(artifact.path, threads=1, emulated=True)


def test_without_the_package_nothing_is_written_or_checked(
    phone: Network, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(MissingPackageError, match=r"executorch .* 'edgekd\[executorch\]'"):
        export(phone, target=PHONE, out=tmp_path)
    assert not list(tmp_path.iterdir())
    path = tmp_path / "model.pte"
    path.write_bytes(b"")
    artifact = Artifact.of(path, target=PHONE, precision="int8", versions={})
    parity = verify(artifact, phone, data=batches)
    assert parity.gate == "unchecked"
    assert parity.reasons == (
        "executorch is not installed; run: pip install 'edgekd[executorch]'",
    )  # fmt: skip
