"""Measuring where there is no Python: by the runtime's own binary, over the link.

trtexec and onnxruntime_perf_test give every run. benchmark_model and benchmark_app give figures of
a whole call, so each call of a few runs counts as one sample, of their median (or mean, of older
versions). Files are measured in turns of one call each. All of it is by the wall clock.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from edgekd.devices.base import Device, DeviceFacts
from edgekd.devices.build import BUILD_SECONDS
from edgekd.errors import DeviceError
from edgekd.latency import layers
from edgekd.latency.measuring import RawMeasurement, today
from edgekd.runtimes.base import fingerprint
from edgekd.runtimes.on_device.measure import (
    BUILD,
    LAYER_RUNS,
    LEAST_RUNS,
    TRTEXEC,
    benchmark_model,
    failure,
    tensorrt_version,
    trtexec_layers,
    trtexec_timing,
)

CALLS = 10  # of one file, where a call gives one sample
ROUNDS = 3  # of several files in turns, where a call gives every run
CALL_SECONDS = 600.0
# names of a program -> where it is
FIND = """
for place in "$(command -v "$1")" "$PWD/$1" "$PWD/../../$1" "$2"; do
  if [ -f "$place" ] && [ -x "$place" ]; then echo "$place"; exit 0; fi
done
exit 3
"""
# the fastest core's clock in kHz, the hottest zone in thousandths of °C, the governor: a line each
LOOK = """
cd /sys/devices/system/cpu
echo "$(cat cpu[0-9]*/cpufreq/scaling_cur_freq 2>/dev/null | sort -n | tail -n 1)"
echo "$(cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null | sort -n | tail -n 1)"
echo "$(cat cpu0/cpufreq/scaling_governor 2>/dev/null)"
"""
OPENVINO_REPORT = "benchmark_detailed_counters_report.csv"
ORT_PROFILE = "cat edgekd_profile*.json && rm -f edgekd_profile*.json"


class There(NamedTuple):
    """One file of this machine's on the device, and how its binary is called there."""

    link: Device
    program: str
    folder: str
    path: Path
    threads: int

    def call(self, *arguments: str) -> str:
        """What the binary prints; DeviceError where it fails."""
        ran = self.link.run([self.program, *arguments], cwd=self.folder, timeout=CALL_SECONDS)
        said = f"{ran.stdout}\n{ran.stderr}"
        if ran.exit_code != 0:
            raise DeviceError(f"{self.link.address}: {failure(self.program, ran.exit_code, said)}")
        return said

    def read(self, name: str) -> str:
        """A file that the binary wrote."""
        with tempfile.TemporaryDirectory() as folder:
            self.link.fetch(f"{self.folder}/{name}", Path(folder) / "file")
            return (Path(folder) / "file").read_text(errors="replace")


class Timed(NamedTuple):
    """What one call gave, in ms; `compute_ms` without the copies to a GPU."""

    said: str
    wall_ms: list[float]
    compute_ms: Sequence[float] = ()
    throughput_per_s: float | None = None


# ---- what each binary is asked, and what it answers ----------------------------------------------


def _litert(there: There, runs: int) -> Timed:
    said = there.call(*benchmark_model(there.path.name, there.threads, runs, layers=False))
    timings = layers.litert_timings(said)
    return Timed(said, [timings.avg_ms if timings.median_ms is None else timings.median_ms])


def _litert_layers(there: There) -> dict[str, Any]:
    said = there.call(*benchmark_model(there.path.name, there.threads, LAYER_RUNS, layers=True))
    return {"format": "litert", "text": said}


def _onnxruntime(there: There, runs: int, *profile: str) -> Timed:
    options = ["-e", "cpu", "-m", "times", "-r", str(runs), "-x", str(there.threads), "-y", "1"]
    said = there.call(
        *options, "-o", "99", "-I", "-s", *profile, there.path.name, "edgekd_runs.csv"
    )
    return Timed(said, layers.onnxruntime_times(there.read("edgekd_runs.csv")))


def _onnxruntime_layers(there: There) -> dict[str, Any]:
    _onnxruntime(there, LAYER_RUNS, "-p", "edgekd_profile")
    ran = there.link.run(["sh", "-c", ORT_PROFILE], cwd=there.folder)
    return {"format": "onnxruntime", "text": ran.stdout}


def _openvino(there: There, runs: int, *report: str) -> Timed:
    # one stream is what the hint for latency comes to; with a hint it takes no -nthreads
    options = ["-d", "CPU", "-hint", "none", "-nstreams", "1", "-nthreads", str(there.threads)]
    options += ["-infer_precision", "f32", "-api", "sync", "-niter", str(runs)]
    if shapes := ",".join(f"{name}[{shape}]" for name, shape in _inputs_of_ir(there.path)):
        options += ["-shape", shapes]
    said = there.call("-m", there.path.name, *options, *report)
    return Timed(said, [layers.benchmark_app_median(said)])


def _inputs_of_ir(path: Path) -> Iterator[tuple[str, str]]:
    """(name, shape) of its inputs, an open batch as 1: benchmark_app refuses it open."""
    if path.suffix == ".xml":
        for layer in ElementTree.parse(path).iterfind("./layers/layer[@type='Parameter']"):
            shape = layer.find("data")
            assert shape is not None
            sizes = shape.attrib["shape"].replace("?", "1").replace("-1", "1")
            yield layer.attrib["name"], sizes


def _openvino_layers(there: There) -> dict[str, Any]:
    report = ["-pc", "-report_type", "detailed_counters", "-report_folder", "."]
    _openvino(there, LAYER_RUNS, *report)
    return {"format": "openvino", "text": there.read(OPENVINO_REPORT)}


def _trtexec(there: There, runs: int) -> Timed:
    flags = trtexec_timing(there.read("build_engine.sh"), runs)
    said = there.call(*flags, "--exportTimes=times.json")
    text = there.read("times.json")
    timed, events = layers.trtexec_times(text), json.loads(text)
    seconds = (events[-1]["endD2hMs"] - events[0]["startEnqMs"]) / 1e3
    return Timed(
        said, [run.latency_ms for run in timed], [run.compute_ms for run in timed],
        len(timed) / seconds,
    )  # fmt: skip


def _trtexec_layers(there: There) -> dict[str, Any]:
    flags = trtexec_timing(there.read("build_engine.sh"), LAYER_RUNS)
    version = tensorrt_version(there.call("--help")) or "8.0"
    told = trtexec_layers(version)
    there.call(*flags, *told)
    info = there.read("layers.json") if len(told) > 1 else None
    return {"format": "tensorrt", "text": there.read("profile.json"), "info": info}


class Binary(NamedTuple):
    """A runtime's own.

    Attributes:
        place: where it is when it is not on the PATH.
        every_run: whether a call gives every run; else one sample.
        version: a pattern in what it prints.
    """

    name: str
    place: str
    time: Callable[[There, int], Timed]
    layers: Callable[[There], dict[str, Any]]
    every_run: bool
    version: str


BINARIES = {
    "litert": Binary(
        "benchmark_model", "/data/local/tmp/benchmark_model", _litert, _litert_layers, False, r"$^"
    ),
    "onnxruntime": Binary(
        "onnxruntime_perf_test", "/data/local/tmp/onnxruntime_perf_test", _onnxruntime,
        _onnxruntime_layers, True, r"ORT version: *([\d.]+)",
    ),
    "openvino": Binary(
        "benchmark_app", "/usr/bin/benchmark_app", _openvino, _openvino_layers, False,
        r"Build \.+ ([\d.]+)",
    ),
    "tensorrt": Binary("trtexec", TRTEXEC, _trtexec, _trtexec_layers, True, r"$^"),
}  # fmt: skip


def measure_by_binary(
    link: Device, job: dict[str, Any], paths: Mapping[str, Path], agent: str, facts: DeviceFacts
) -> RawMeasurement:
    """The job's files, by the binary of its runtime.

    Args:
        paths: of the files here by their SHA-256, in the job's order.
        agent: the folder that the job's names start from.

    Raises:
        DeviceError: there is no such binary there, or it fails.
    """
    binary = BINARIES.get(job["runtime"])
    needs = f"{link.address} has no python3"
    if binary is None:
        raise DeviceError(f"{needs}, and {job['runtime']} no binary that measures; install python3")
    places = [str(Path(agent).parent / Path(name).parent.name) for name in job["files"]]
    found = link.run(["sh", "-c", FIND, "sh", binary.name, binary.place], cwd=places[0])
    if found.exit_code != 0:
        raise DeviceError(
            f"{needs}, and no {binary.name} on its PATH or at {binary.place}; install one of both"
        )
    program = found.stdout.strip()
    theres = [
        There(link, program, place, path, job["threads"])
        for place, path in zip(places, paths.values(), strict=True)
    ]
    if job["runtime"] == "tensorrt":
        for there in theres:
            _build(there)
    first = [binary.time(there, LEAST_RUNS) for there in theres]  # warms up; tells what can be had
    seconds = sum(timed.wall_ms[-1] for timed in first) / 1e3
    runs = max(LEAST_RUNS, min(job["runs"], int(job["seconds"] / max(seconds, 1e-6))))
    calls = CALLS if not binary.every_run else ROUNDS if len(theres) > 1 else 1
    before = _look(link)
    timed: list[list[Timed]] = [[] for _ in theres]
    for _ in range(calls):
        for there, kept in zip(theres, timed, strict=True):
            kept.append(binary.time(there, max(runs // calls, 5)))
    after = _look(link)
    named = re.search(binary.version, first[0].said)
    version = tensorrt_version(first[0].said) or (named[1] if named else "not told")
    conditions = {f"{key}_before": before[key] for key in ("cpu_mhz", "temperature_c")}
    conditions |= {f"{key}_after": after[key] for key in ("cpu_mhz", "temperature_c")}
    files = [
        {
            "file": path.name, "sha256": digest, "size_bytes": fingerprint(path)[1],
            "warm_up_runs": LEAST_RUNS,
            "wall_ms": [ms for one in kept for ms in one.wall_ms],
            "compute_ms": [ms for one in kept for ms in one.compute_ms],
            "throughput_per_s": kept[0].throughput_per_s,
            "layers": binary.layers(there) if job["layers"] else None,
        }
        for there, (digest, path), kept in zip(theres, paths.items(), timed, strict=True)
    ]  # fmt: skip
    return RawMeasurement.model_validate({
        "format": 1, "target": job["target"], "runtime": job["runtime"],
        "runtime_version": version, "threads": job["threads"], "clock": "wall", "date": today(),
        "machine": {"node": facts.host, "machine": facts.machine},
        "conditions": conditions | {"governor": after["governor"]}, "files": files,
    })  # fmt: skip


def _build(there: There) -> None:
    ran = there.link.run(["sh", "-c", BUILD], cwd=there.folder, timeout=BUILD_SECONDS)
    if ran.exit_code != 0:
        log = there.read("build.log")
        said = failure(f"build_engine.sh in {there.folder}", ran.exit_code, log)
        raise DeviceError(f"{there.link.address}: {said}")


def _look(link: Device) -> dict[str, Any]:
    clock, temperature, governor = link.run(["sh", "-c", LOOK]).stdout.splitlines()
    return {
        "cpu_mhz": float(clock) / 1e3 if clock else None,
        "temperature_c": float(temperature) / 1e3 if temperature else None,
        "governor": governor or None,
    }
