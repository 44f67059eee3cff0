"""Measurements, and how they come out of what a device timed.

The protocol itself (warm-up until stable, turns, enough runs, nothing thrown away, separate passes
for memory and layers) is `runtimes/on_device/measure.py`, the one loop of the project: it lies in
every bundle, and runs on this host in a process of its own as it does on a device.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgekd.errors import StateError, describe_invalid
from edgekd.latency import layers
from edgekd.latency.layers import LayerTime
from edgekd.runtimes.on_device.measure import median_interval
from edgekd.target import Precision, host_instruction_set

Clock = Literal["wall", "cpu"]
Trust = Literal["steady", "drift", "throttled"]
DRIFT = 0.03  # a change of the median over a measurement, as a share of it, that is none yet
COOLER, FASTER = 5.0, 0.97  # °C, and share of the clock: from there on it is throttling


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Conditions(_Frozen):
    """What a device was like while it was measured; None where it does not tell.

    Attributes:
        cpu_mhz_before, …: at the first timed run and at the last one; the fastest core's, the
            GPU's, the hottest zone's.
        governor: of the CPU's clock.
        power_mode: a Jetson's, as nvpmodel calls it.
        clocks_locked: whether `jetson_clocks` held them for the measurement.
        load_average: of the last minute before it.
        rails: those that the energy was read from.
        reference_ms: what the reference network took in the same turns, see `pace.py`.
    """

    cpu_mhz_before: float | None = None
    cpu_mhz_after: float | None = None
    gpu_mhz_before: float | None = None
    gpu_mhz_after: float | None = None
    temperature_c_before: float | None = None
    temperature_c_after: float | None = None
    governor: str | None = None
    power_mode: str | None = None
    clocks_locked: bool = False
    load_average: float | None = None
    rails: tuple[str, ...] = ()
    reference_ms: float | None = None

    @property
    def throttled(self) -> bool:
        """Whether a clock fell, or the device got hotter."""
        return (
            _fell(self.cpu_mhz_before, self.cpu_mhz_after)
            or _fell(self.gpu_mhz_before, self.gpu_mhz_after)
            or (self.temperature_c_after or 0.0) - (self.temperature_c_before or 1e3) > COOLER
        )


def _fell(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after < FASTER * before


class Measurement(_Frozen):
    """One honest latency of one artifact, batch 1, and its conditions.

    Attributes:
        runs, runs_asked: timed, and at most; None in files of older versions.
        p50_ci95_ms: the median's 95 % interval, by order statistics.
        throughput_per_s: inferences one after another; trtexec's overlap with their copies.
        clock: "wall", or "cpu": the process' CPU time, used for all of a comparison as soon as
            the host is busy.
        load_ms: from file to first possible run; None where the runtime does not tell.
        load_memory_mib, peak_memory_mib: held once loaded, and at most until the first run has
            ended, above what the process held before; None where the system does not tell.
        compared: SHA-256 of the artifacts that were timed in turns with this one.
        origin: whether this machine was measured, or a device over a link or by hand.
        device: its address; "local" is this machine.
        energy_mj: of one inference, at the rails that `conditions` names.
        layers: in the order they run in, from a pass of their own; empty where not asked for, or
            the runtime does not tell.
        rest_ms, rest: p50_ms less the sum over the layers, and what it is.
        profiled_p50_ms: the median run while the layers were timed, by the same clock.
        quiet_ms: what it takes on this host when nobody else disturbs it: its median, turn by turn
            as a share of what a reference network took, times what that took when this host was
            quietest (`pace.py`, which says where there is none).
        trust: "drift" where the last third of the runs differs from the first by more than noise,
            "throttled" where the clocks fell or the device got hotter as well.
        repeats: measurements before this one that were not steady.
        warm_up_steady: whether the warm-up ended because two windows in a row agreed.
    """

    target: str
    sha256: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    clock: Clock
    runs: int
    warm_up_runs: int
    threads: int
    load_ms: float | None
    load_memory_mib: float | None = None
    peak_memory_mib: float | None
    runtime: str
    runtime_version: str
    host: str
    instruction_set: str
    date: str
    compared: tuple[str, ...]
    runs_asked: int | None = None
    p50_ci95_ms: tuple[float, float] | None = None
    throughput_per_s: float | None = None
    size_bytes: int | None = None
    origin: Literal["host", "device"] = "host"
    device: str = "local"
    conditions: Conditions = Conditions()
    energy_mj: float | None = None
    layers: tuple[LayerTime, ...] = ()
    rest_ms: float | None = None
    rest: str = ""
    profiled_p50_ms: float | None = None
    quiet_ms: float | None = None
    trust: Trust | None = None
    repeats: int = 0
    warm_up_steady: bool = True


# ---- what a device gives back --------------------------------------------------------------------


class Profiled(_Frozen):
    """A profile as the runtime wrote it, and the median run while it did, by either clock."""

    format: Literal["tensorrt", "onnxruntime", "openvino", "litert"]
    text: str
    info: str | None = None
    wall_ms: float | None = None
    cpu_ms: float | None = None


class RawFile(_Frozen):
    """The timed runs of one file, in their order; `compute_ms` without the copies to a GPU.

    `copies` of it were loaded, and took turns; `per_reference` is their median, turn by turn as a
    share of the reference network's, by CPU time.
    """

    file: str
    sha256: str
    size_bytes: int
    warm_up_runs: int
    warm_up_steady: bool = True
    copies: int = 1
    wall_ms: Annotated[tuple[float, ...], Field(min_length=1)]
    cpu_ms: tuple[float, ...] = ()
    compute_ms: tuple[float, ...] = ()
    per_reference: float | None = None
    throughput_per_s: float | None = None
    load_ms: float | None = None
    load_memory_mib: float | None = None
    peak_memory_mib: float | None = None
    energy_mj: float | None = None
    layers: Profiled | None = None


class Machine(_Frozen):
    """What a device says it is."""

    node: str
    machine: str
    python: str | None = None
    model: str | None = None


class RawMeasurement(_Frozen):
    """`measurement.json` as measure.py writes it: files that were timed in turns.

    Attributes:
        precision, network: of a bundle, as its manifest has them, see `Network.architecture`.
    """

    format: Literal[1]
    target: str
    runtime: str
    runtime_version: str
    threads: int
    clock: Clock
    date: str
    machine: Machine
    conditions: Conditions
    files: Annotated[tuple[RawFile, ...], Field(min_length=1)]
    precision: Precision | None = None
    network: str | None = None

    @staticmethod
    def read(path: Path) -> RawMeasurement:
        """A device's `measurement.json`.

        Raises:
            StateError: it is none.
        """
        try:
            return RawMeasurement.model_validate_json(path.read_bytes())
        except ValidationError as error:
            said = describe_invalid(error, RawMeasurement)
            raise StateError(f"{path} is not what measure.py writes: {said}") from None

    def measurements(
        self, *, device: str, repeats: int = 0, quietest_ms: float | None = None
    ) -> list[Measurement]:
        """One for each file.

        Args:
            device: the address it was measured at; "local" is this machine.
            repeats: measurements before this one that were not steady.
            quietest_ms: what the reference network took when this host was quietest.
        """
        here, arm = device == "local", self.machine.machine in ("aarch64", "arm64")
        there = self.machine.model or self.machine.node
        named = f"{there} ({self.machine.machine})"
        return [
            Measurement(
                **self.model_dump(
                    include={"target", "runtime", "runtime_version", "threads", "clock", "date"}
                ),
                **file.model_dump(
                    include={"sha256", "size_bytes", "warm_up_runs", "warm_up_steady", "load_ms",
                             "load_memory_mib", "peak_memory_mib", "energy_mj"}
                ),
                **_figures(file, self.clock, self.conditions),
                conditions=self.conditions,
                host=host_name() if here else named,
                instruction_set=host_instruction_set() if here
                else "neon" if arm else self.machine.machine,
                compared=tuple(other.sha256 for other in self.files),
                origin="host" if here else "device", device=device, repeats=repeats,
                quiet_ms=quietest_ms and file.per_reference and quietest_ms * file.per_reference,
            )
            for file in self.files
        ]  # fmt: skip


def _figures(file: RawFile, clock: Clock, conditions: Conditions) -> dict[str, Any]:
    samples = file.cpu_ms if clock == "cpu" else file.wall_ms
    p50, p90, p99 = (float(p) for p in np.percentile(samples, [50, 90, 99]))
    figures: dict[str, Any] = {
        "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "runs": len(samples),
        "p50_ci95_ms": median_interval(samples),
        "throughput_per_s": file.throughput_per_s or 1e3 / float(np.mean(samples)),
        "trust": trust(samples, conditions),
    }  # fmt: skip
    if file.layers is None:
        return figures
    found = _READERS[file.layers.format](file.layers, clock == "cpu")
    rest = p50 - sum(layer.p50_ms for layer in found)
    said = f"{rest / p50:.1%} of the median is outside the layers: the call, and between them"
    if rest < 0:
        said = (
            f"the layers add up to {-rest / p50:.1%} more than the median: profiling costs time, "
            "or something else ran meanwhile"
        )
    if file.compute_ms:
        copies = float(np.median(np.subtract(file.wall_ms, file.compute_ms)))
        said += f"; copies to and from the GPU take {copies:.3f} ms"
    whole = file.layers.cpu_ms if clock == "cpu" else file.layers.wall_ms
    if whole is not None:
        said += f"; a run took {whole:.3f} ms while profiling"
    if clock == "cpu":
        said += (
            "; the host was busy: layers are of the runs that nothing interrupted, whole runs find "
            "their caches cold"
        )
    return figures | {
        "layers": tuple(found), "rest_ms": rest, "rest": said, "profiled_p50_ms": whole,
    }  # fmt: skip


_READERS: dict[str, Callable[[Profiled, bool], list[LayerTime]]] = {
    "tensorrt": lambda p, _: layers.trtexec_profile(p.text, p.info),
    "onnxruntime": lambda p, busy: layers.onnxruntime_profile(p.text, busy=busy),
    "openvino": lambda p, busy: layers.openvino_counters(p.text, busy=busy),
    "litert": lambda p, _: layers.litert_ops(p.text),
}


def trust(samples: Sequence[float], conditions: Conditions) -> Trust:
    """Whether the last third of the runs is as fast as the first, within DRIFT and the noise.

    The noise is the sum of the half-widths of both medians' 95 % intervals.
    """
    third = len(samples) // 3
    if third == 0:
        return "steady"
    thirds = samples[:third], samples[-third:]
    first, last = (float(np.median(x)) for x in thirds)
    noise = sum((high - low) / 2 for low, high in map(median_interval, thirds))
    if abs(last - first) <= max(DRIFT * float(np.median(samples)), noise):
        return "steady"
    return "throttled" if last > first and conditions.throttled else "drift"


def host_name() -> str:
    """The processor of this host, as the system calls it, and its instruction set.

    With its family and model, where the system has them: virtual machines call processors of twice
    the speed by one name.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = told.get("model name") or platform.processor() or platform.machine()
    kind = "-".join(told[key] for key in ("cpu family", "model") if key in told)
    return " ".join(filter(None, (name, kind, f"({host_instruction_set()})")))


def today() -> str:
    """The date, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
