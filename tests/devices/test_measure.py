"""Artifacts measured over a link: a real OpenSSH server, a real ONNX Runtime, a fake trtexec.

Where the link does not matter, the device is a folder of this machine.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from rich.console import Console

from edgekd.devices import binaries
from edgekd.devices.base import DeviceFacts
from edgekd.devices.build import build_on
from edgekd.devices.local import LocalDevice
from edgekd.errors import DeviceError
from edgekd.latency.measuring import Measurement
from edgekd.network import Network
from edgekd.reporting import progress
from edgekd.runtimes.base import Artifact
from edgekd.stages.export import export
from edgekd.stages.profile import profile, profile_together

FAKE = Path(__file__).with_name("fake_trtexec.py")
# what differs from one measurement to the next
OF_THE_RUN = ("measure.lock", "times.json", "profile.json", "layers.json")


@pytest.fixture
def remote(server: Any) -> Any:
    """A device whose python3 is this one's: it has ONNX Runtime."""
    server.program("python3", f'exec {sys.executable} "$@"\n')
    return server


class Elsewhere(LocalDevice):
    """A device with a folder of its own for programs, and without Python unless it is told."""

    python: str | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__("ssh://elsewhere")
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()

    @property
    def home(self) -> Path:
        return self._folder

    def program(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}")
        (self.bin / name).chmod(0o755)

    def check(self) -> DeviceFacts:
        return super().check().model_copy(update={"python": self.python})


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    made = Elsewhere(tmp_path)
    monkeypatch.setenv("PATH", str(made.bin), prepend=os.pathsep)
    monkeypatch.setattr(binaries, "CALLS", 3)
    return made


@pytest.fixture
def jetson(bare: Elsewhere) -> Elsewhere:
    bare.python = "3.6.9"
    with_trtexec(bare, "8.2")
    return bare


def with_trtexec(remote: Any, version: str) -> None:
    fake = shutil.copy(FAKE, remote.folder)
    remote.program("trtexec", f'exec {sys.executable} {fake} {version} "$@"\n# {version}\n')


@pytest.fixture(scope="module")
def nano(trained: Network, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(trained, target="jetson-nano", out=tmp_path_factory.mktemp("nano"))


def calls(remote: Any) -> list[str]:
    return (remote.folder / "calls").read_text().split()


def hashes(home: Path) -> dict[str, str]:
    return {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(home.rglob("*"))
        if path.is_file() and path.name not in OF_THE_RUN and path.suffix != ".pyc"
    }


# ---- the whole job -------------------------------------------------------------------------------


def test_a_device_is_measured_by_its_own_python(
    remote: Any, int8_artifact: Artifact, fp32_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
):
    # a terminal takes one bar at a time
    monkeypatch.setattr(progress, "console", Console(force_terminal=True, file=io.StringIO()))
    given = [int8_artifact, fp32_artifact.path]
    first, second = profile_together(
        given, target="host-onnxruntime", device=remote.address, runs=20, layers=True
    )
    assert (first.origin, first.device, first.runs) == ("device", remote.address, 20)
    assert first.runtime_version == onnxruntime.__version__
    assert first.sha256 == int8_artifact.sha256
    assert first.compared == second.compared == (int8_artifact.sha256, fp32_artifact.sha256)
    assert "QLinearConv" in {layer.operator for layer in first.layers}
    place = remote.home / "edgekd" / f"host-onnxruntime-{first.sha256[:12]}"
    assert [path.name for path in place.iterdir()] == ["model.onnx"]
    assert not list((remote.home / "edgekd" / "agent").glob("*.json"))  # nothing is left behind
    sent = (place / "model.onnx").stat().st_mtime_ns
    profile(int8_artifact, target="host-onnxruntime", device=remote.address, runs=20)
    assert (place / "model.onnx").stat().st_mtime_ns == sent


@pytest.mark.parametrize("version", ["8.2", "8.5", "10.3"])
def test_trtexec_is_read(version: str, jetson: Elsewhere, nano: Artifact):
    with_trtexec(jetson, version)
    m = profile(nano, target="jetson-nano", device=jetson, runs=60, layers=True)
    assert m.runtime_version.startswith(version)
    assert m.p50_ms == pytest.approx(2.3, abs=0.02)  # with the copies
    assert (m.clock, m.load_ms, m.runs, m.trust) == ("wall", 125.0, 60, "steady")
    assert m.throughput_per_s == pytest.approx(60 / (59 * 3 + 2.5) * 1e3)
    assert [layer.p50_ms for layer in m.layers] == [1.2, 0.5, 0.2]
    assert {layer.operator for layer in m.layers} == {"CaskConvolution"}
    assert m.layers[1].name == 'odd "name" \\x'
    assert m.rest_ms == pytest.approx(m.p50_ms - 1.9)
    assert "copies to and from the GPU take 0.300 ms" in m.rest
    place = jetson.home / "edgekd" / f"jetson-nano-{nano.sha256[:12]}"
    assert "PASSED" in (place / "build.log").read_text()


def test_an_engine_is_built_once_by_one_trtexec(jetson: Elsewhere, nano: Artifact, tmp_path: Path):
    def measured(path: Path) -> None:
        profile(path, target="jetson-nano", device=jetson, runs=20)

    measured(nano.path)
    measured(nano.path)
    # nor does this build it again; what checks it would need TensorRT
    copied = shutil.copytree(nano.path.parent, tmp_path / "nano", ignore=lambda *_: ["infer.py"])
    build_on(Artifact.load(copied), device=jetson)
    assert calls(jetson).count("building") == 1
    with_trtexec(jetson, "10.3")  # the device got another one
    measured(nano.path)
    assert calls(jetson).count("building") == 2


def test_two_engines_are_timed_in_turns(jetson: Elsewhere, nano: Artifact, tmp_path: Path):
    other = tmp_path / "other" / "model.onnx"
    shutil.copytree(nano.path.parent, other.parent)
    model = onnx.load(other)
    model.doc_string = "another"
    onnx.save(model, other)
    script = other.with_name("build_engine.sh")
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    script.write_text(script.read_text().replace(nano.sha256, digest))
    both = [nano, other]
    first, second = profile_together(both, target="jetson-nano", device=jetson, runs=60)
    assert (first.sha256, second.sha256) == (nano.sha256, digest)
    assert (first.runs, second.runs) == (60, 60)
    # each is warmed up once, then they take turns
    assert calls(jetson) == ["building"] * 2 + ["timing"] * (2 + 6)


# ---- a link that is lost -------------------------------------------------------------------------


def wait_for(there: Callable[[], bool]) -> None:
    for _ in range(1000):
        if there():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def cut(remote: Any, job: Callable[[], Measurement], there: Callable[[], bool]) -> None:
    """Kill the server when the job is there; the job ends in one error that says so."""
    errors: list[DeviceError] = []

    def run() -> None:
        try:
            job()
        except DeviceError as error:
            errors.append(error)

    link = threading.Thread(target=run)
    link.start()
    wait_for(there)
    remote.kill()
    link.join(60)
    assert not link.is_alive()
    assert "try again" in str(errors[0])
    remote.start()


def test_a_job_whose_link_is_lost_three_times_ends_the_same(remote: Any, nano: Artifact):
    with_trtexec(remote, "8.2")

    def job() -> Measurement:
        return profile(nano, target="jetson-nano", device=remote.address, runs=40, layers=True)

    whole = job()
    wanted = hashes(remote.home)
    shutil.rmtree(remote.home / "edgekd")
    (remote.folder / "calls").unlink()
    for stage in ("building", "timing"):
        (remote.folder / stage).unlink()
        (remote.folder / f"{stage}.hold").touch()

    remote.program("cat", "head -c 300; exec sleep 30")  # a slow link
    place = remote.home / "edgekd" / f"jetson-nano-{nano.sha256[:12]}"
    cut(remote, job, lambda: any(p.stat().st_size == 300 for p in place.glob(".*.partial")))
    (remote.bin / "cat").unlink()
    for stage in ("building", "timing"):  # it goes on there, and the next job waits for it
        cut(remote, job, (remote.folder / stage).exists)
        (remote.folder / f"{stage}.hold").unlink()
    again = job()

    assert hashes(remote.home) == wanted
    assert calls(remote).count("building") == 1
    assert again.model_dump(exclude={"conditions"}) == whole.model_dump(exclude={"conditions"})


def test_with_onnxruntime_too(remote: Any, int8_artifact: Artifact):
    def job() -> Measurement:
        return profile(int8_artifact, target="host-onnxruntime", device=remote.address, runs=20)

    whole = job()
    wanted = hashes(remote.home)
    shutil.rmtree(remote.home / "edgekd")
    flags = {name: remote.folder / name for name in ("pushing", "measuring", "fetching")}
    real = f'exec {sys.executable} "$@"'
    remote.program("cat", f"touch {flags['pushing']}; exec sleep 30")
    cut(remote, job, flags["pushing"].exists)
    remote.program("cat", 'exec /bin/cat "$@"')
    remote.program(
        "python3", f"case $1 in measure.py) touch {flags['measuring']}; sleep 1;; esac; {real}"
    )
    cut(remote, job, flags["measuring"].exists)
    remote.program("python3", real)
    remote.program("cat", f'case "$*" in *measurement-*) touch {flags["fetching"]}; '
                   'exec sleep 30;; esac; exec /bin/cat "$@"')  # fmt: skip
    cut(remote, job, flags["fetching"].exists)
    remote.program("cat", 'exec /bin/cat "$@"')
    again = job()

    assert {k: v for k, v in hashes(remote.home).items() if "measurement-" not in k} == wanted
    assert (again.sha256, again.runs) == (whole.sha256, whole.runs)
    assert 0 < again.p50_ms <= again.p90_ms


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trtexec", "said"),
    [
        ("echo Killed; exit 137", r"build_engine.sh in .* ran out of memory; .* add swap"),
        ("echo '[E] Cuda failure: out of memory'; exit 1", "ran out of memory"),
        ("echo 'write: No space left on device'; exit 1", "the disk is full; make room"),
        ("echo '[E] no importer for Foo'; exit 3", r"failed with 3: (.*\n)*.*no importer for Foo"),
    ],
)
@pytest.mark.parametrize("python", ["3.6.9", None])
def test_a_build_that_fails_says_why_and_the_next_goes_on(
    trtexec: str, said: str, python: str | None, jetson: Elsewhere, nano: Artifact
):
    jetson.python = python
    jetson.program("trtexec", trtexec)
    with pytest.raises(DeviceError, match=said):
        profile(nano, target="jetson-nano", device=jetson, runs=20)
    with_trtexec(jetson, "8.2")
    assert profile(nano, target="jetson-nano", device=jetson, runs=20).runs == 20


def test_what_is_missing_there_is_named(remote: Any, jetson: Elsewhere, nano: Artifact,
                                        int8_artifact: Artifact):  # fmt: skip
    (jetson.bin / "trtexec").unlink()
    with pytest.raises(DeviceError, match="apt-get install libnvinfer-bin"):
        profile(nano, target="jetson-nano", device=jetson)
    kill = f'case $1 in measure.py) kill -9 $$;; esac; exec {sys.executable} "$@"'
    remote.program("python3", kill)
    with pytest.raises(DeviceError, match="ran out of memory; end other programs"):
        profile(int8_artifact, target="host-onnxruntime", device=remote.address)


# ---- without Python: by the runtimes' own binaries -----------------------------------------------


def test_benchmark_model(bare: Elsewhere, tmp_path: Path):
    model = tmp_path / "model.tflite"
    model.write_bytes(b"a model")
    with pytest.raises(DeviceError, match="no python3, and no benchmark_model on its PATH or at"):
        profile(model, target="android-litert", device=bare)
    bare.program("benchmark_model", r"""
case "$*" in *"--graph=model.tflite --num_threads=1"*) ;; *) exit 9;; esac
[ -f model.tflite ] || exit 8
printf '============================== Run Order ==============================\n'
printf '\t[node type]\t[first]\t[avg ms]\t[%%]\t[cdf%%]\t[mem KB]\t[times called]\t[Name]\n'
printf '\t  CONV_2D\t 0.9\t 0.8\t 100%%\t 100%%\t 0.0\t 1\t[conv]:0\n\n'
echo 'Timings (microseconds): count=50 first=1100 curr=1000 min=990 max=1200 avg=1010 std=9'
""")  # fmt: skip
    m = profile(model, target="android-litert", device=bare, layers=True)
    assert (m.p50_ms, m.runs, m.clock, m.runtime_version) == (1.01, 3, "wall", "not told")
    assert [(layer.name, layer.p50_ms) for layer in m.layers] == [("conv", 0.8)]
    assert m.rest_ms == pytest.approx(0.21)


def test_onnxruntime_perf_test(bare: Elsewhere, int8_artifact: Artifact):
    bare.program("onnxruntime_perf_test", r"""
for last; do :; done
echo 'Session creation time cost: 0.01 s'
: > "$last"; for i in 1 2 3 4 5 6 7; do echo "model,0.00$i,1024,x" >> "$last"; done
echo '[{"cat":"Node","name":"conv_kernel_time","dur":900,"args":{"op_name":"Conv"}},
{"cat":"Session","name":"model_run","dur":1,"args":{}}]' > edgekd_profile_2026.json
""")  # fmt: skip
    m = profile(int8_artifact, target="host-onnxruntime", device=bare, layers=True)
    assert (m.p50_ms, m.runs) == (4.0, 7)  # every run of the call
    assert [(layer.operator, layer.p50_ms) for layer in m.layers] == [("Conv", 0.9)]


def test_trtexec(bare: Elsewhere, nano: Artifact):
    with_trtexec(bare, "8.2")
    m = profile(nano, target="jetson-nano", device=bare, runs=60, layers=True)
    assert (m.runtime_version, m.runs) == ("8.2.1", 60)
    assert m.p50_ms == pytest.approx(2.3, abs=0.02)
    assert [layer.p50_ms for layer in m.layers] == [1.2, 0.5, 0.2]
    assert calls(bare).count("building") == 1
    bare.program("trtexec", "echo Killed; exit 137")
    with pytest.raises(DeviceError, match="ran out of memory"):
        profile(nano, target="jetson-nano", device=bare)


def test_the_real_benchmark_app(bare: Elsewhere, trained: Network, tmp_path: Path):
    pytest.importorskip("openvino")
    app = Path(sys.executable).with_name("benchmark_app")
    bare.program("benchmark_app", f'exec {app} "$@"')
    artifact = export(trained, target="intel-cpu", out=tmp_path / "ir")
    m = profile(artifact, target="intel-cpu", device=bare, runs=30, layers=True)
    assert (m.runs, m.sha256) == (3, artifact.sha256)
    assert m.runtime_version.startswith("20")
    assert "Convolution" in {layer.operator for layer in m.layers}
    assert np.isfinite(m.p50_ms) and m.p50_ms > 0


def test_a_runtime_without_a_binary(bare: Elsewhere, tmp_path: Path):
    (tmp_path / "model.pte").write_bytes(b"a model")
    with pytest.raises(DeviceError, match="executorch no binary that measures; install python3"):
        profile(tmp_path / "model.pte", target="android-executorch", device=bare)
