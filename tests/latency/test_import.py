"""What measure.py wrote by hand comes into the user's rows, and is found again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.errors import StateError, TargetError
from edgekd.latency.profiles import device_rows, import_measurement, imported_ms, own_file
from edgekd.network import Network
from edgekd.runtimes.base import Artifact
from edgekd.stages.export import export

ANDROID = "android-arm64"


@pytest.fixture(scope="module")
def measured(trained: Network, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    """A phone's bundle, measured by hand: this host stands in for the phone."""
    folder = tmp_path_factory.mktemp("bundle")
    artifact = export(trained, target=ANDROID, out=folder)
    command = [sys.executable, "measure.py", "--runs", "20", "--seconds", "1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return artifact, folder / "measurement.json"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path))
    return tmp_path


def test_a_measurement_is_found_by_its_artifact_and_by_its_network(
    measured: tuple[Artifact, Path], trained: Network
):
    artifact, file = measured
    assert imported_ms(ANDROID, artifact.sha256) is None
    done = CliRunner().invoke(app, ["profile", "--import", str(file)])
    assert done.exit_code == 0 and str(own_file(ANDROID)) in done.stdout
    (row,) = device_rows(ANDROID)
    samples = json.loads(file.read_text())
    clock = samples["files"][0][f"{samples['clock']}_ms"]
    assert min(clock) <= row.p50_ms <= max(clock)
    assert imported_ms(ANDROID, artifact.sha256) == row.p50_ms
    assert (row.network, row.precision) == (trained.architecture, "fp32")
    assert (row.origin, row.sha256) == ("device", artifact.sha256)
    assert imported_ms(ANDROID, "0" * 64) is None


def test_the_same_file_counts_once(measured: tuple[Artifact, Path]):
    for _ in range(2):
        import_measurement(measured[1])
    assert len(device_rows(ANDROID)) == 1


def test_what_is_no_measurement_of_a_bundle_is_refused(
    measured: tuple[Artifact, Path], tmp_path: Path
):
    text = measured[1].read_text()
    other = tmp_path / "other.json"
    for change, error, message in (
        ({"precision": None}, StateError, "does not say which precision"),
        ({"target": "phone"}, TargetError, "no target 'phone'"),
        ({"files": []}, StateError, "is not what measure.py writes: files"),
    ):
        other.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(error, match=message):
            import_measurement(other)
    other.write_text(text[: len(text) // 2])
    with pytest.raises(StateError, match=r"is not what measure\.py writes"):
        import_measurement(other)
    assert not own_file(ANDROID).exists()


def test_an_architecture_is_its_shapes_alone(trained: Network):
    said = json.loads(trained.architecture or "")
    assert said["model"] == "edgekd/resnet" and said["inputs"] == [[3, 16, 16]]
    other = trained.copy()
    other.resized = {"head": {"in_features": 8}}
    assert other.architecture != trained.architecture
    other.build = None
    assert other.architecture is None
