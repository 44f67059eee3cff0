"""verify: passes what is sound, fails what is not, and says where; never passes unchecked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from edgekd.errors import DataError, MissingPackageError, StateError
from edgekd.network import Network
from edgekd.runtimes import onnxruntime
from edgekd.runtimes.base import Artifact
from edgekd.stages import verify as stage
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import Parity, verify
from edgekd.target import QuantScheme, Target, target_names
from edgekd.tasks.classification import Classification

Batches = list[tuple[Tensor, Tensor]]


@pytest.mark.parametrize("with_task", [True, False])
def test_a_sound_integer_artifact_passes(
    int8_artifact: Artifact, quantized: Network, batches: Batches, with_task: bool
):
    task = Classification() if with_task else None
    parity = verify(int8_artifact, quantized, data=batches, task=task)
    assert (parity.gate, parity.reasons) == ("passed", ())
    assert parity.local is not None and parity.local.as_shipped is not None
    for found in parity.local.passes.values():
        assert (found.first, found.tensors) == (None, found.of)
        assert found.exact >= 0.999
        assert found.max_steps <= 1
    assert (parity.verifier, parity.n, parity.integer_share) == ("native", 6 * 64, 1.0)
    assert parity.agreement is not None
    assert parity.agreement >= 0.995
    assert parity.mean_steps is not None and parity.max_steps is not None
    assert 0 < parity.mean_steps < parity.max_steps < 4
    assert parity.relative_error is None
    if with_task:
        assert parity.metric is not None and parity.reference_metric is not None
        with torch.no_grad():
            hits = sum(int((quantized(x).argmax(1) == y).sum()) for x, y in batches)
        assert parity.reference_metric.value == hits / (6 * 64)
    else:
        assert parity.metric is None


def test_a_sound_float_artifact_passes(fp32_artifact: Artifact, trained: Network, batches: Batches):
    parity = verify(fp32_artifact, trained, data=batches, task=Classification())
    assert (parity.gate, parity.agreement) == ("passed", 1.0)
    assert parity.relative_error is not None
    assert parity.relative_error < 1e-4
    assert parity.max_steps is parity.integer_share is parity.local is None


def test_figures_are_numpys(int8_artifact: Artifact, quantized: Network, batches: Batches):
    import onnxruntime as ort

    session = ort.InferenceSession(int8_artifact.path, providers=["CPUExecutionProvider"])
    theirs = np.concatenate([session.run(None, {"input": x.numpy()})[0] for x, _ in batches])
    with torch.no_grad():
        ours = np.concatenate([quantized(x).numpy() for x, _ in batches])
    steps = np.abs(theirs - ours) / (np.abs(ours).max() / 127)  # the output is float
    parity = verify(int8_artifact, quantized, data=batches)
    assert parity.max_steps == pytest.approx(float(steps.max()), rel=1e-3)
    assert parity.mean_steps == pytest.approx(float(steps.mean()), rel=1e-3)
    assert parity.agreement == (theirs.argmax(1) == ours.argmax(1)).mean()


# ---- what is not sound ---------------------------------------------------------------------------


def tampered(artifact: Artifact, folder: Path, change: Any) -> Artifact:
    """A copy of the artifact whose model went through `change`."""
    path = folder / "model.onnx"
    shutil.copy(artifact.path, path)
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return artifact.model_copy(update={"path": path})


def multiply_scale(tensor: str, factor: float = 3) -> Any:
    """Change the scale of one quantized activation, where it is dequantized."""

    def change(model: onnx.ModelProto) -> None:
        (node,) = [n for n in model.graph.node if n.output[0] == f"quant.{tensor}"]
        (scale,) = [c for c in model.graph.initializer if c.name == node.input[1]]
        array = numpy_helper.to_array(scale) * np.float32(factor)
        model.graph.initializer.append(numpy_helper.from_array(array, "tampered"))
        node.input[1] = "tampered"

    return change


def activations(artifact: Artifact) -> list[str]:
    """Quantized activations in the order of the file."""
    outputs = (n.output[0] for n in onnx.load(artifact.path).graph.node)
    return [o.removeprefix("quant.") for o in outputs if o.startswith("quant.")]


@pytest.fixture(scope="module")
def faint(batches: Batches) -> list[Tensor]:
    """The test images under more noise, so that a small error changes an answer."""
    generator = torch.Generator().manual_seed(1)
    return [0.3 * x + torch.randn(x.shape, generator=generator) for x, _ in batches]


@pytest.mark.parametrize("index", range(9))
def test_a_tampered_scale_fails_and_is_named(
    int8_artifact: Artifact, quantized: Network, faint: list[Tensor], index: int, tmp_path: Path
):
    assert verify(int8_artifact, quantized, data=faint, agreement=0.99).gate == "passed"
    tensor = activations(int8_artifact)[index]
    broken = tampered(int8_artifact, tmp_path, multiply_scale(tensor))
    parity = verify(broken, quantized, data=faint, agreement=0.99)
    assert parity.gate == "failed"
    assert any(r.startswith(f"local parity as written: {tensor} (") for r in parity.reasons)
    assert parity.local is not None
    names = [d.tensor for d in parity.local.as_written.worst if d.max_steps > 1]
    assert names == [tensor]  # what comes before and behind is sound


def test_local_parity_alone_fails_the_gate(
    int8_artifact: Artifact, quantized: Network, batches: Batches, tmp_path: Path
):
    tensor = activations(int8_artifact)[4]
    broken = tampered(int8_artifact, tmp_path, multiply_scale(tensor, 1.02))
    options: dict[str, Any] = {
        "data": batches, "agreement": 0.0, "mean_steps": 100.0, "integer_share": 0.0,
    }  # fmt: skip
    parity = verify(broken, quantized, **options)
    assert parity.gate == "failed"
    *local, whole = parity.reasons
    assert local
    assert all(reason.startswith("local parity as ") for reason in local)
    assert "in the runtime's own integers" in whole
    asked = verify(int8_artifact, quantized, **options, local_exact=1.1).reasons
    assert len(asked) == 2
    assert "110.000% is asked for" in asked[0]


def test_float_layers_in_an_integer_artifact_fail(
    int8_artifact: Artifact, quantized: Network, batches: Batches, tmp_path: Path
):
    def change(model: onnx.ModelProto) -> None:
        """The head reads what its input's quantizer would have read."""
        (head,) = [n for n in model.graph.node if n.op_type == "Gemm"]
        made_by = {name: n for n in model.graph.node for name in n.output}
        quantize = made_by[made_by[head.input[0]].input[0]]
        head.input[0] = quantize.input[0]

    broken = tampered(int8_artifact, tmp_path, change)
    parity = verify(broken, quantized, data=batches)
    assert parity.gate == "failed"
    assert parity.reasons == ("6 of 7 matrix operators run in integers",)
    assert parity.integer_share == pytest.approx(6 / 7)
    assert verify(broken, quantized, data=batches, integer_share=0.8).gate == "passed"


@pytest.mark.parametrize("name", ["host-onnxruntime", "intel-cpu", "jetson-orin-nano"])
def test_layers_left_in_float_are_not_missed_but_a_missing_quantizer_is(
    trained: Network, batches: Batches, name: str, tmp_path: Path
):
    """ONNX Runtime would otherwise give the float weights integers of its own."""
    package = {"intel-cpu": "openvino", "jetson-orin-nano": "tensorrt_rtx"}.get(name)
    if package:
        pytest.importorskip(package)
    layers = ("stages.0.0.conv1", "stages.1.0.conv2", "head")  # a ReLU, an Add, nothing behind it
    net = quantize(trained, target=name, data=batches, float_layers=layers, accelerator="cpu")
    artifact = export(net, target=name, out=tmp_path / "sound")
    parity = verify(artifact, net, data=batches, task=Classification(), mean_steps=0.2)
    assert (parity.gate, parity.reasons, parity.integer_share) == ("passed", (), 1.0)
    if parity.compiled is not None:
        assert (parity.compiled.integer, parity.compiled.total) == (4, 4)
    if name == "intel-cpu":
        return

    def change(model: onnx.ModelProto) -> None:
        """The first integer convolution reads what its input's quantizer would have read."""
        made_by = {name: n for n in model.graph.node for name in n.output}
        stem = next(n for n in model.graph.node if n.op_type == "Conv")
        stem.input[0] = made_by[made_by[stem.input[0]].input[0]].input[0]

    broken = verify(tampered(artifact, tmp_path, change), net, data=batches)
    assert broken.gate == "failed"
    assert broken.integer_share == pytest.approx(3 / 4)
    assert broken.reasons[0] == "3 of 4 matrix operators run in integers"
    if broken.compiled is not None:
        assert (broken.compiled.integer, broken.compiled.total) == (3, 4)
        assert any("computes 1 of 4 matrix operators in float" in r for r in broken.reasons)


def test_a_float_layer_that_the_runtime_quantizes_by_itself_fails(
    trained: Network, host: Target, batches: Batches, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(onnxruntime, "keep_floats", lambda model: 0)
    layers = ("stages.1.0.conv2",)
    net = quantize(trained, target=host, data=batches, float_layers=layers, accelerator="cpu")
    parity = verify(export(net, target=host, out=tmp_path), net, data=batches, mean_steps=99)
    assert parity.gate == "failed"
    assert any("7 matrix operators run in integers; only 6 are meant to" in r
               for r in parity.reasons)  # fmt: skip


def test_outputs_that_are_not_finite_fail(
    fp32_artifact: Artifact, trained: Network, batches: Batches, tmp_path: Path
):
    def change(model: onnx.ModelProto) -> None:
        for constant in model.graph.initializer:
            array: NDArray[Any] = numpy_helper.to_array(constant)
            if array.shape == (4,):  # the head's bias
                array = array.copy()
                array[2] = np.nan
                constant.CopyFrom(numpy_helper.from_array(array, constant.name))

    broken = tampered(fp32_artifact, tmp_path, change)
    parity = verify(broken, trained, data=batches, task=Classification())
    assert parity.gate == "failed"
    assert "the artifact's outputs are not finite" in parity.reasons
    Parity.model_validate_json(parity.model_dump_json())  # what is written can be read again


def test_an_inner_tensor_that_is_not_finite_is_named_and_written_as_json(
    int8_artifact: Artifact, quantized: Network, batches: Batches, tmp_path: Path
):
    tensor = activations(int8_artifact)[4]
    broken = tampered(int8_artifact, tmp_path, multiply_scale(tensor, np.nan))
    parity = verify(broken, quantized, data=batches)
    assert parity.gate == "failed"
    again = Parity.model_validate_json(parity.model_dump_json())
    assert again.local is not None and again.local.as_written.first is not None
    assert again.local.as_written.first.startswith(f"{tensor} (")


def test_a_worse_metric_fails(
    fp32_artifact: Artifact, trained: Network, batches: Batches, tmp_path: Path
):
    def change(model: onnx.ModelProto) -> None:
        for constant in model.graph.initializer:
            array = numpy_helper.to_array(constant)
            if array.shape == (4, 16):  # the head's weights, two classes exchanged
                swapped = array[[1, 0, 2, 3]].copy()
                constant.CopyFrom(numpy_helper.from_array(swapped, constant.name))

    broken = tampered(fp32_artifact, tmp_path, change)
    parity = verify(broken, trained, data=batches, task=Classification())
    assert parity.gate == "failed"
    assert [r.partition(" ")[0] for r in parity.reasons] == ["agreement", "top-1"]
    assert parity.metric is not None and parity.reference_metric is not None
    assert parity.metric.value < 0.7 < parity.reference_metric.value


# ---- what was not checked ------------------------------------------------------------------------


def test_without_labels_the_metric_is_unchecked(
    int8_artifact: Artifact, quantized: Network, batches: Batches
):
    parity = verify(int8_artifact, quantized, data=[x for x, _ in batches], task=Classification())
    assert parity.gate == "unchecked"
    assert parity.reasons == ("metric: the data has no labels",)
    assert parity.agreement is not None


def test_outputs_that_no_one_can_compare_are_unchecked(host: Target, tmp_path: Path):
    torch.manual_seed(0)
    net = Network(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8))
    artifact = export(net, target=host, out=tmp_path)
    parity = verify(artifact, net, data=[torch.randn(4, 3, 8, 8)])
    assert parity.gate == "unchecked"
    assert parity.reasons == ("agreement: outputs are not (N, K) scores; give a task",)
    assert parity.agreement is None
    assert parity.relative_error is not None
    assert parity.relative_error < 1e-5


@pytest.fixture(scope="module")
def of_scheme(trained: Network, batches: Batches) -> Callable[[Target], Network]:
    """`trained` in the target's integers; each scheme once."""

    @cache
    def made(scheme: QuantScheme, name: str) -> Network:
        return quantize(trained, target=name, data=batches[:2], accelerator="cpu")

    first: dict[QuantScheme, str] = {}
    return lambda target: made(target.scheme, first.setdefault(target.scheme, target.name))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", target_names())
def test_every_target_gets_what_was_trained(
    name: str, trained: Network, of_scheme: Callable[[Target], Network], batches: Batches,
    tmp_path: Path,
):  # fmt: skip
    target = Target.load(name)
    nets = {"float": trained} if target.float_precision else {}
    if target.scheme is not None:
        nets["integers"] = of_scheme(target)
    for folder, net in nets.items():
        try:
            artifact = export(net, target=target, out=tmp_path / folder)
        except MissingPackageError as error:
            pytest.skip(str(error))  # it names the extra
        parity = verify(artifact, net, data=batches, task=Classification())
        assert parity.gate in ("passed", "unchecked"), parity.reasons
        # what is unchecked needs a package or a CPU that is not here
        assert all("not installed" in r or "this host is another" in r for r in parity.reasons)


def test_without_the_runtime_nothing_is_checked(
    int8_artifact: Artifact, quantized: Network, batches: Batches, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "openvino", None)  # importing it raises ImportError
    elsewhere = int8_artifact.model_copy(update={"target": "intel-cpu"})
    parity = verify(elsewhere, quantized, data=batches, task=Classification())
    assert (parity.gate, parity.verifier, parity.n) == ("unchecked", None, 0)
    assert parity.reasons == ("openvino is not installed; run: pip install 'edgekd[openvino]'",)
    assert parity.agreement is None


def test_another_devices_artifact_is_emulated(
    int8_artifact: Artifact, quantized: Network, batches: Batches, monkeypatch: pytest.MonkeyPatch
):
    asked: list[bool] = []
    verifying_runtime = stage.verifying_runtime

    def watched(target: Target) -> Any:
        runtime = verifying_runtime(target)
        load = runtime.load

        def loaded(path: Path, *, threads: int, emulated: bool = False) -> Any:
            asked.append(emulated)
            return load(path, threads=threads, emulated=emulated)

        monkeypatch.setattr(runtime, "load", loaded, raising=False)
        return runtime

    monkeypatch.setattr(stage, "verifying_runtime", watched)
    phone = int8_artifact.model_copy(update={"target": "android-arm64"})
    parity = verify(phone, quantized, data=batches, task=Classification())
    # as written for all figures; in this host's kernels, if at all, only to be compared as a whole
    assert (parity.gate, parity.verifier, asked[0]) == ("passed", "emulated", True)
    assert parity.local is not None
    assert list(parity.local.passes) == ["as written"]


def test_no_samples_no_parity(fp32_artifact: Artifact, trained: Network):
    with pytest.raises(DataError, match="no batch"):
        verify(fp32_artifact, trained, data=[])


def test_an_artifact_of_another_kind_than_the_network_is_refused(
    int8_artifact: Artifact, fp32_artifact: Artifact, trained: Network, quantized: Network
):
    message = r"model\.onnx is int8; the network beside it is float: .*a quantize-\.\.\. folder"
    with pytest.raises(StateError, match=message):
        verify(int8_artifact, trained, data=[])
    message = r"model\.onnx is fp32; the network beside it is quantized: .* a distill-\.\.\. or"
    with pytest.raises(StateError, match=message):
        verify(fp32_artifact, quantized, data=[])


def test_images_of_another_size_are_refused(fp32_artifact: Artifact, trained: Network):
    message = r"input: samples of the data are \(3, 8, 16\); the network takes \(3, 16, 16\): "
    with pytest.raises(DataError, match=message):
        verify(fp32_artifact, trained, data=[torch.zeros(4, 3, 8, 16)])
