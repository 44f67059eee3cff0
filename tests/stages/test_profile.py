"""profile: measures here what runs here, and refuses the rest."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime
import pytest

from edgekd.errors import TargetError
from edgekd.latency import measuring
from edgekd.latency.measuring import Measurement
from edgekd.runtimes.base import Artifact
from edgekd.stages.profile import profile, profile_together
from edgekd.target import Target


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "WARM_UP_SECONDS", 0.01)


def test_a_measurement_says_how_it_came_about(int8_artifact: Artifact, host: Target):
    got = profile(int8_artifact, target=host, runs=30)
    assert 0 < got.p50_ms <= got.p90_ms <= got.p99_ms
    assert (got.runs, got.threads, got.target) == (30, 1, "host-onnxruntime")
    assert got.warm_up_runs >= 10
    assert got.load_ms > 0
    if got.peak_memory_mib is not None:
        assert got.load_memory_mib is not None
        assert got.load_memory_mib <= got.peak_memory_mib
    assert (got.runtime, got.runtime_version) == ("onnxruntime", onnxruntime.__version__)
    assert got.sha256 == int8_artifact.sha256
    assert got.compared == (got.sha256,)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", got.date)
    assert Measurement.model_validate_json(got.model_dump_json()) == got


def test_artifacts_measured_together_name_each_other(
    int8_artifact: Artifact, fp32_artifact: Artifact, host: Target
):
    both = profile_together([int8_artifact, fp32_artifact.path], target=host, runs=20)
    hashes = (int8_artifact.sha256, fp32_artifact.sha256)
    assert tuple(m.sha256 for m in both) == hashes
    assert {m.compared for m in both} == {hashes}
    assert len({m.clock for m in both}) == 1


def test_another_device_is_not_measured_here(int8_artifact: Artifact):
    with pytest.raises(TargetError, match=r"android-arm64 is not this host \(.+\): a latency"):
        profile(int8_artifact, target="android-arm64")


def test_a_device_that_no_link_reaches_is_refused(int8_artifact: Artifact, host: Target):
    with pytest.raises(TargetError, match="device 'adb': only 'local'"):
        profile(int8_artifact, target=host, device="adb")


def test_a_file_that_is_not_there_is_named(host: Target, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.onnx"):
        profile(tmp_path / "absent.onnx", target=host)
