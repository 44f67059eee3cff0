"""The bundle: what lies beside a model, run as a device runs it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from edgekd.latency.measuring import RawMeasurement
from edgekd.network import Network
from edgekd.runtimes.base import Artifact, get_runtime
from edgekd.runtimes.integer_ends import IntegerEnd
from edgekd.stages.export import export
from edgekd.target import Target


def infer(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The bundle's own script, in a process that knows nothing of edgekd."""
    command = [sys.executable, "-W", "error", str(folder / "infer.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def phone(quantized: Network, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(quantized, target="android-arm64", out=tmp_path_factory.mktemp("phone"))


def test_the_manifest_says_what_is_in_the_folder(int8_artifact: Artifact, quantized: Network):
    manifest = manifest_of(int8_artifact.path.parent)
    assert manifest["sha256"] == int8_artifact.sha256
    assert (manifest["target"], manifest["precision"]) == ("host-onnxruntime", "int8")
    assert manifest["io"]["inputs"] == [{"name": "input", "shape": [3, 16, 16], "dtype": "float32"}]
    assert manifest["scheme"]["weight_bits"] == 7
    labels = (int8_artifact.path.parent / "labels.txt").read_text().splitlines()
    assert tuple(labels) == quantized.io.labels


@pytest.mark.parametrize("fixture", ["int8_artifact", "fp32_artifact"])
def test_a_device_checks_itself(fixture: str, request: pytest.FixtureRequest, tmp_path: Path):
    folder = shutil.copytree(request.getfixturevalue(fixture).path.parent, tmp_path / "bundle")
    ran = infer(folder, "--check")
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["passed"] is True
    assert said["inputs"] == 3
    kept = dict(np.load(folder / "check.npz"))
    kept["output"] = kept["output"] + 2 * said["tolerance"]["output"]
    np.savez(folder / "check.npz", **kept)
    ran = infer(folder, "--check")
    assert (ran.returncode, json.loads(ran.stdout)["passed"]) == (1, False)


def test_openvinos_bundle_checks_itself(trained: Network, tmp_path: Path):
    pytest.importorskip("openvino")
    export(trained, target="intel-cpu", out=tmp_path)
    ran = infer(tmp_path, "--check")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["passed"] is True


def test_the_check_takes_the_images_that_are_given(trained: Network, batches: Any, tmp_path: Path):
    images = batches[0][0]
    export(trained, target="host-onnxruntime", out=tmp_path, examples=images)
    kept = np.load(tmp_path / "check.npz")
    np.testing.assert_array_equal(kept["input"], images[:3].numpy())
    with torch.no_grad():
        np.testing.assert_array_equal(kept["output"], trained(images[:3]).numpy())


def test_an_image_is_answered_as_in_evaluation(fp32_artifact: Artifact, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    path = tmp_path / "one image.png"
    Image.fromarray(pixels).save(path)
    fitted = np.asarray(ImageOps.fit(Image.fromarray(pixels), (16, 16), Image.Resampling.BILINEAR))
    x = (fitted.astype(np.float32).transpose(2, 0, 1)[None] / 255 - 0.5) / 0.25
    (scores,) = ort.InferenceSession(fp32_artifact.path).run(None, {"input": x.astype(np.float32)})
    ran = infer(fp32_artifact.path.parent, str(path), "--top", "1")
    assert ran.returncode == 0, ran.stderr
    labels = (fp32_artifact.path.parent / "labels.txt").read_text().splitlines()
    best = scores[0].argmax()
    assert ran.stdout == f"{path}: {labels[best]} {scores[0, best]:.4f}\n"


def test_without_anything_to_do_it_says_what_it_takes(fp32_artifact: Artifact):
    ran = infer(fp32_artifact.path.parent)
    assert ran.returncode == 2
    assert "name an image, or --check" in ran.stderr


def test_integers_go_in_and_come_out(trained: Network, batches: Any, host: Target, tmp_path: Path):
    from edgekd.stages.quantize import quantize

    assert host.scheme is not None
    scheme = host.scheme.model_copy(update={"integer_inputs": True, "integer_outputs": True})
    target = host.model_copy(update={"scheme": scheme})
    export(quantize(trained, target=target, data=batches), target=target, out=tmp_path)
    assert set(manifest_of(tmp_path)["integers"]) == {"input", "output"}
    ran = infer(tmp_path, "--check")
    assert ran.returncode == 0, ran.stdout + ran.stderr


# ---- TensorRT's side, with a TensorRT that is made up --------------------------------------------


class FakeCuda:
    """Memory of a device by address, as the CUDA runtime hands it out."""

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}

    def cudaMalloc(self, pointer: Any, size: Any) -> int:  # noqa: N802  # CUDA's name
        pointer._obj.value = 4096 * (len(self.memory) + 1)
        self.memory[pointer._obj.value] = bytearray(size.value)
        return 0

    def cudaMemcpy(self, to: Any, source: Any, size: Any, kind: int) -> int:  # noqa: N802
        import ctypes

        if kind == 1:
            self.memory[to.value][:] = ctypes.string_at(source.value, size.value)
        else:
            ctypes.memmove(to.value, bytes(self.memory[source.value]), size.value)
        return 0

    def cudaFree(self, pointer: Any) -> int:  # noqa: N802
        return 0


def fake_tensorrt(cuda: FakeCuda, new: bool) -> types.ModuleType:
    """Its engine doubles the input; `new`: tensors by name, as from 8.5 on."""

    class Context:
        shape = (0,)

        def set_input_shape(self, name: str, shape: Any) -> None:
            assert name == "input"
            self.shape = shape

        def set_binding_shape(self, index: int, shape: Any) -> None:
            assert index == 0
            self.shape = shape

        def get_tensor_shape(self, name: str) -> Any:
            return self.shape

        get_binding_shape = get_tensor_shape

        def execute_v2(self, pointers: list[int]) -> bool:
            x = np.frombuffer(bytes(cuda.memory[pointers[0]]), np.float32)
            cuda.memory[pointers[1]][:] = (2 * x).tobytes()
            return True

    engine: dict[str, Any] = {"create_execution_context": lambda self: Context()}
    names = ["input", "output"]
    if new:
        engine |= {"num_io_tensors": 2, "get_tensor_name": lambda self, i: names[i]}
    else:
        engine |= {"num_bindings": 2, "get_binding_name": lambda self, i: names[i]}
    made = type("Engine", (), engine)()
    module = types.ModuleType("tensorrt")
    module.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})  # type: ignore[attr-defined]
    module.Runtime = lambda logger: types.SimpleNamespace(  # type: ignore[attr-defined]
        deserialize_cuda_engine=lambda content: made if content == b"engine" else None
    )
    return module


@pytest.mark.parametrize("new", [False, True], ids=["8.2", "10.3"])
def test_an_engine_is_run_through_the_cuda_runtime(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    net = Network(nn.Identity(), torch.zeros(1, 2, 3, 3))
    export(net, target="jetson-nano", out=tmp_path)
    spec = importlib.util.spec_from_file_location("bundle_infer", tmp_path / "infer.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(cuda, new))
    monkeypatch.setattr(script.ctypes, "CDLL", lambda name: cuda)
    manifest = manifest_of(tmp_path)
    with pytest.raises(SystemExit, match=r"model.engine: run build_engine.sh first"):
        script.load_model(manifest)
    (tmp_path / "model.engine").write_bytes(b"another")
    with pytest.raises(SystemExit, match="did not build"):
        script.load_model(manifest)
    (tmp_path / "model.engine").write_bytes(b"engine")
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 3)).astype(np.float32)
    (y,) = script.load_model(manifest)([x])
    np.testing.assert_array_equal(y, 2 * x)
    assert script.check(script.load_model(manifest), manifest) is False  # it doubles


# ---- variants ------------------------------------------------------------------------------------


def test_ort_format_computes_the_same(phone: Artifact, batches: Any):
    x = batches[0][0].numpy()
    session = ort.InferenceSession(str(phone.path.with_suffix(".ort")))
    (found,) = session.run(None, {"input": x})
    (expected,) = get_runtime("onnxruntime").load(phone.path, threads=1, emulated=True)([x])
    step = np.abs(expected).max() / 127
    assert (np.abs(found - expected) <= step).mean() >= 0.99


def test_the_config_of_a_reduced_build_names_the_kernels(phone: Artifact):
    lines = phone.path.with_suffix(".required_operators.config").read_text().splitlines()
    named = {
        operator.split("{")[0]
        for line in lines if line and not line.startswith("#")
        for operator in line.split(";")[-1].split(",")
    }  # fmt: skip
    assert {"QLinearConv", "QuantizeLinear"} <= named
    facts = manifest_of(phone.path.parent)["variants"]["model.required_operators.config"]
    assert facts["operators"] == len(named)
    assert facts["reduced_build"]["estimated"] is True


def test_the_file_that_takes_integers_computes_the_same(phone: Artifact, batches: Any):
    x = batches[0][0].numpy()
    facts = manifest_of(phone.path.parent)["variants"]["model.integer_inputs.onnx"]
    integers = IntegerEnd(**facts["integers"]["input"]).quantize(x)
    session = ort.InferenceSession(str(phone.path.with_name("model.integer_inputs.onnx")))
    assert session.get_inputs()[0].type == "tensor(uint8)"
    (found,) = session.run(None, {"input": integers})
    (expected,) = ort.InferenceSession(str(phone.path)).run(None, {"input": x})
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_the_file_that_takes_images_computes_the_same(
    precision: str, phone: Artifact, trained: Network, tmp_path: Path
):
    path = phone.path
    if precision == "fp32":
        path = export(trained, target="android-arm64", out=tmp_path).path
    pixels = np.random.default_rng(0).integers(0, 256, (16, 3, 16, 16), np.uint8)
    x = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)
    session = ort.InferenceSession(str(path.with_name("model.images.onnx")))
    assert session.get_inputs()[0].type == "tensor(uint8)"
    (found,) = session.run(None, {"input": pixels})
    (expected,) = ort.InferenceSession(str(path)).run(None, {"input": x})
    step = np.abs(expected).max() / 127
    if precision == "int8":
        assert np.abs(found - expected).mean() <= 0.1 * step  # one byte may round otherwise
    else:
        np.testing.assert_allclose(found, expected, atol=1e-3 * step, rtol=1e-4)


def test_a_float_artifact_takes_floats_in_all_its_forms(trained: Network, tmp_path: Path):
    export(trained, target="android-arm64", out=tmp_path)
    assert not (tmp_path / "model.integer_inputs.onnx").exists()
    assert (tmp_path / "model.ort").exists()


def test_the_apps_snippets_are_filled_in(phone: Artifact, trained: Network, tmp_path: Path):
    kotlin = (phone.path.parent / "Classifier.kt").read_text()
    assert "@" not in kotlin.replace("@Suppress", "")
    assert "longArrayOf(1, 3, 16, 16)" in kotlin
    assert "doubleArrayOf(0.25, 0.25, 0.25)" in kotlin
    export(trained, target="ios-coreml-ort", out=tmp_path)
    swift = (tmp_path / "Classifier.swift").read_text()
    assert "@" not in swift
    assert '["input": tensor], outputNames: ["output"]' in swift


PACKAGES = {"litert_torch": "ai-edge-litert", "executorch": "executorch"}  # that run the file


@pytest.mark.parametrize(
    ("target", "package", "snippet"),
    [
        ("android-litert", "litert_torch", "LiteRtClassifier.kt"),
        ("android-executorch", "executorch", None),
    ],
)
def test_a_phones_bundle_checks_itself(
    target: str, package: str, snippet: str | None, trained: Network, batches: Any, tmp_path: Path
):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    from edgekd.stages.quantize import quantize

    export(quantize(trained, target=target, data=batches[:2]), target=target, out=tmp_path)
    integers = manifest_of(tmp_path)["integers"]
    assert {"input", "output"} <= set(integers)
    assert {end["dtype"] for end in integers.values()} == {"int8"}
    command = [sys.executable, "-W", "ignore", str(tmp_path / "infer.py"), "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.strip().splitlines()[-1])["passed"] is True
    if snippet is not None:
        assert "@" not in (tmp_path / snippet).read_text()
    command = [sys.executable, "-W", "ignore", "measure.py", "--runs", "20"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (m,) = RawMeasurement.read(tmp_path / "measurement.json").measurements(device="phone")
    assert (m.runs, m.runtime_version) == (20, version(PACKAGES[package]))
