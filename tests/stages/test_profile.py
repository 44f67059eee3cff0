"""profile: measures here what runs here, over a link what is there, and refuses the rest."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from edgekd.devices.base import DeviceFacts, get_device
from edgekd.devices.local import LocalDevice
from edgekd.errors import DeviceError, TargetError
from edgekd.latency.measuring import Measurement, RawMeasurement, host_name
from edgekd.network import Network
from edgekd.runtimes.base import Artifact
from edgekd.stages import profile as stage
from edgekd.stages.export import export
from edgekd.stages.profile import profile, profile_together
from edgekd.target import Target


def test_a_measurement_says_how_it_came_about(int8_artifact: Artifact, host: Target):
    got = profile(int8_artifact, target=host, runs=30)
    assert 0 < got.p50_ms <= got.p90_ms <= got.p99_ms
    assert got.runs_asked == 30
    assert (got.runs, got.threads, got.target) == (30, 1, "host-onnxruntime")
    assert got.p50_ci95_ms is not None
    assert got.p50_ci95_ms[0] <= got.p50_ms <= got.p50_ci95_ms[1]
    assert got.warm_up_runs >= 10
    assert got.load_ms is not None and got.load_ms > 0
    assert got.throughput_per_s is not None and got.throughput_per_s > 0
    if got.peak_memory_mib is not None:
        assert got.load_memory_mib is not None
        assert got.load_memory_mib <= got.peak_memory_mib
    assert (got.runtime, got.runtime_version) == ("onnxruntime", onnxruntime.__version__)
    assert (got.host, got.device, got.origin) == (host_name(), "local", "host")
    assert (got.sha256, got.size_bytes) == (int8_artifact.sha256, int8_artifact.size_bytes)
    assert got.compared == (got.sha256,)
    assert (got.layers, got.rest_ms) == ((), None)
    assert got.conditions.reference_ms is not None and got.conditions.reference_ms > 0
    assert got.quiet_ms is not None and 0 < got.quiet_ms <= got.p99_ms
    assert profile(int8_artifact, target=host, runs=20, threads=2).quiet_ms is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", got.date)
    assert Measurement.model_validate_json(got.model_dump_json()) == got


def test_artifacts_measured_together_name_each_other(
    int8_artifact: Artifact, fp32_artifact: Artifact, host: Target
):
    given = [int8_artifact, fp32_artifact.path, int8_artifact]
    measured = profile_together(given, target=host, runs=20)
    hashes = tuple(x.sha256 for x in (int8_artifact, fp32_artifact, int8_artifact))
    assert tuple(m.sha256 for m in measured) == hashes
    assert {m.compared for m in measured} == {hashes}
    assert len({m.clock for m in measured}) == 1


@pytest.mark.parametrize("target", ["host-onnxruntime", "intel-cpu"])
def test_the_layers_and_the_rest_are_the_whole(target: str, trained: Network, tmp_path: Path):
    if target == "intel-cpu":
        pytest.importorskip("openvino")
    artifact = export(trained, target=target, out=tmp_path)
    got = profile(artifact, target=target, runs=20, layers=True)
    total = sum(layer.p50_ms for layer in got.layers)
    assert got.rest_ms is not None
    assert total + got.rest_ms == pytest.approx(got.p50_ms)
    assert sum(layer.share for layer in got.layers) == pytest.approx(1)
    assert "outside the layers" in got.rest or "more than the median" in got.rest
    assert any("Conv" in layer.operator for layer in got.layers)


def test_another_device_is_not_measured_here(int8_artifact: Artifact):
    with pytest.raises(TargetError, match=r"jetson-nano is not this host \(.+\): a latency"):
        profile(int8_artifact, target="jetson-nano")


def test_a_device_that_no_link_reaches_is_refused(int8_artifact: Artifact, host: Target):
    with pytest.raises(DeviceError, match=r"no device 'usb'; there are: adb, local, ssh"):
        profile(int8_artifact, target=host, device="usb")


def test_a_file_that_is_not_there_is_named(host: Target, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.onnx"):
        profile(tmp_path / "absent.onnx", target=host)


def test_a_file_that_is_no_model_is_named(host: Target, tmp_path: Path):
    (tmp_path / "broken.onnx").write_text("no model")
    with pytest.raises(DeviceError, match=r"local: onnxruntime refuses broken\.onnx"):
        profile(tmp_path / "broken.onnx", target=host)


def test_a_file_for_tensorrt_needs_its_script(fp32_artifact: Artifact):
    class Nano(LocalDevice):
        address = "ssh://nano"

    with pytest.raises(TargetError, match=r"no build_engine.sh beside it; run: edgekd export"):
        profile(fp32_artifact, target="jetson-nano", device=Nano("ssh://nano"))


# ---- trust ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drifts", "calls", "trusted"), [(1, 2, "steady"), (9, 3, "drift")])
def test_what_is_not_steady_is_measured_again(
    drifts: int, calls: int, trusted: str, int8_artifact: Artifact, host: Target,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    count = itertools.count(1)

    def measure_on(link: Any, paths: dict[str, Path], **_: Any) -> RawMeasurement:
        step = 0.01 if next(count) <= drifts else 0.0
        file = {
            "file": "x", "sha256": next(iter(paths)), "size_bytes": 1, "warm_up_runs": 1,
            "wall_ms": [1 + step * i for i in range(90)],
        }  # fmt: skip
        return RawMeasurement.model_validate({
            "format": 1, "target": host.name, "runtime": "onnxruntime", "runtime_version": "1",
            "threads": 1, "clock": "wall", "date": "2026-01-01", "conditions": {},
            "machine": {"node": "n", "machine": "m"}, "files": [file],
        })  # fmt: skip

    monkeypatch.setattr(stage, "measure_on", measure_on)
    got = profile(int8_artifact, target=host)
    assert (got.trust, got.repeats) == (trusted, calls - 1)
    assert next(count) == calls + 1


# ---- this machine as a device --------------------------------------------------------------------


def test_this_machine_is_a_device_too(tmp_path: Path):
    device = get_device("local")
    assert isinstance(device.check(), DeviceFacts)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("1")
    device.push(tmp_path, "far")
    device.push(tmp_path, "far")
    (tmp_path / "sub" / "a").unlink()
    (tmp_path / "sub" / "a").write_text("2")
    device.push(tmp_path, "far")
    ran = device.run(["sh", "-c", "cat sub/a; echo wrong >&2; exit 7"], cwd="far")
    assert ran == (7, "2", "wrong\n")
    assert device.run(["no-such-program"]).exit_code == 127
    device.fetch("far/sub/a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "2"
    with pytest.raises(DeviceError, match="absent"):
        device.fetch("absent", tmp_path / "c")
    with pytest.raises(DeviceError, match="sleep did not end within 1 s"):
        device.run(["sleep", "60"], timeout=1)
