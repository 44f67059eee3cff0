"""measure: artifacts timed on a device by measure.py, or by its runtime's own binary."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.devices.base import Device
from edgekd.devices.binaries import measure_by_binary
from edgekd.devices.build import BUILD_SECONDS, SCRIPT, remote_folder
from edgekd.errors import DeviceError, TargetError
from edgekd.latency import pace
from edgekd.latency.measuring import RawMeasurement
from edgekd.reporting.progress import Progress
from edgekd.runtimes import on_device
from edgekd.runtimes.bundle import ON_DEVICE
from edgekd.target import Target

AGENT = "edgekd/agent"  # where measure.py and its jobs are
LONGEST_SECONDS = 20.0  # of the timed runs of all files together
JOB_SECONDS = 1800.0  # with loading, warming up and profiling


def measure_on(
    link: Device,
    paths: Mapping[str, Path],
    *,
    target: Target,
    runs: int,
    threads: int,
    layers: bool,
    lock_clocks: bool,
    reference: pace.Reference | None = None,
    quietest_ms: float | None = None,
) -> RawMeasurement:
    """Copy the files there, each once, and time them in turns; what has arrived stays.

    Args:
        paths: of the model files, by their SHA-256.
        reference, quietest_ms: a network to time in the same turns, and what it took there when
            that was quietest, see `latency/pace.py`.

    Raises:
        TargetError: TensorRT's file has no script beside it that builds it.
        DeviceError: the device cannot be reached, the link was lost, or it lacks something.
    """
    facts = link.check()
    files = []
    for digest, path in paths.items():
        folder = remote_folder(target.name, digest)
        with tempfile.TemporaryDirectory() as staged:
            for file in _belonging(path, target):
                (Path(staged) / file.name).symlink_to(file.resolve())
            link.push(Path(staged), folder)
        files.append(f"../{Path(folder).name}/{path.name}")
    job: dict[str, Any] = {
        "target": target.name, "runtime": target.runtime, "device": target.device,
        "providers": target.providers, "files": files, "runs": runs, "seconds": LONGEST_SECONDS,
        "threads": threads, "layers": layers, "lock_clocks": lock_clocks,
        "reference": reference and reference.file, "quietest_ms": quietest_ms,
    }  # fmt: skip
    if facts.python is None:
        with Progress(f"measuring on {facts.host}", None):
            return measure_by_binary(link, job, paths, AGENT, facts)
    return _by_agent(link, job, reference, facts.host)


def _by_agent(
    link: Device, job: dict[str, Any], reference: pace.Reference | None, host: str
) -> RawMeasurement:
    text = json.dumps(job)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    given, result = f"job-{name}.json", f"measurement-{name}.json"
    with tempfile.TemporaryDirectory() as staged:
        for script in ON_DEVICE:
            shutil.copy(Path(on_device.__path__[0]) / script, staged)
        if reference:
            pace.write_reference(Path(staged) / reference.file, reference)
        (Path(staged) / given).write_text(text)
        link.push(Path(staged), AGENT)
        building = BUILD_SECONDS * len(job["files"]) if job["runtime"] == "tensorrt" else 0.0
        with Progress(f"measuring on {host}", None):
            ran = link.run(
                ["python3", "measure.py", "--job", given, "--out", result], cwd=AGENT,
                timeout=JOB_SECONDS + building,
            )  # fmt: skip
        if ran.exit_code in (137, -9):
            raise DeviceError(f"{link.address} ran out of memory; end other programs there")
        if ran.exit_code != 0:
            raise DeviceError(f"{link.address}: {ran.stderr.strip()[-2000:]}")
        link.fetch(f"{AGENT}/{result}", Path(staged) / result)
        link.run(["rm", "-f", "--", given, result], cwd=AGENT)
        return RawMeasurement.read(Path(staged) / result)


def _belonging(path: Path, target: Target) -> list[Path]:
    """The model file, and what it cannot do without."""
    if target.runtime == "tensorrt":
        script = path.with_name(SCRIPT)
        if not script.is_file() or path.name != "model.onnx":
            raise TargetError(
                f"{path} has no {SCRIPT} beside it; run: edgekd export {path} --target "
                f"{target.name} --out FOLDER"
            )
        return [path, script]
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    data = path.with_name(path.name + ".data")  # weights of a large ONNX file
    return [path, *beside, *([data] if data.is_file() else [])]
