"""The measuring protocol, in one place.

Candidates are timed in turns of a few runs each, so that whatever else the machine does falls on
all of them alike, and each finds its weights in the caches, as it does in use: the first run of a
turn is not timed. With one thread on a busy host the process' CPU time stands in for the wall
clock: under load the median of the wall clock repeats within 26 %, that of CPU time within 2.3 %.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from edgekd.target import host_instruction_set

Clock = Literal["wall", "cpu"]
WARM_UP_RUNS, WARM_UP_SECONDS = 10, 0.3
TURN_RUNS = 5
LONGEST_SECONDS = 20.0
BUSY = 1.05  # wall ÷ CPU time above which the host counts as busy


class Measurement(BaseModel):
    """One honest latency of one artifact, batch 1, and its conditions.

    Attributes:
        clock: "wall", or "cpu": the process' CPU time, used for all of a comparison as soon as
            the host is busy.
        load_ms: from file to first possible run.
        load_memory_mib, peak_memory_mib: held once loaded, and at most until the first run has
            ended, above what the process held before; None where the system does not tell.
        compared: SHA-256 of the artifacts that were timed in turns with this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    target: str
    sha256: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    clock: Clock
    runs: int
    warm_up_runs: int
    threads: int
    load_ms: float
    load_memory_mib: float | None = None
    peak_memory_mib: float | None
    runtime: str
    runtime_version: str
    host: str
    instruction_set: str
    date: str
    compared: tuple[str, ...]


class Timing(BaseModel):
    """Percentiles of one candidate's runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    p50_ms: float
    p90_ms: float
    p99_ms: float
    clock: Clock
    runs: int
    warm_up_runs: int


def time_in_turns(
    candidates: Mapping[str, Callable[[], object]], *, runs: int, threads: int
) -> dict[str, Timing]:
    """Time each candidate `runs` times, in turns, after its warm-up.

    A slow candidate ends the turns early: LONGEST_SECONDS for all together, but 20 runs at
    least. No timed run is thrown away.
    """
    warm_ups = {name: _warm_up(call) for name, call in candidates.items()}
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    began = time.monotonic()
    for done in range(0, runs, TURN_RUNS):
        if done >= 20 and time.monotonic() - began > LONGEST_SECONDS:
            break
        for name, call in candidates.items():
            call()
            for _ in range(min(TURN_RUNS, runs - done)):
                cpu_start, wall_start = time.process_time_ns(), time.perf_counter_ns()
                call()
                wall_end, cpu_end = time.perf_counter_ns(), time.process_time_ns()
                wall[name].append((wall_end - wall_start) / 1e6)
                cpu[name].append((cpu_end - cpu_start) / 1e6)
    busy = any(np.median(wall[n]) > BUSY * np.median(cpu[n]) for n in candidates)
    clock: Clock = "cpu" if threads == 1 and busy else "wall"
    timings = {}
    for name in candidates:
        samples = cpu[name] if clock == "cpu" else wall[name]
        p50, p90, p99 = (float(p) for p in np.percentile(samples, [50, 90, 99]))
        timings[name] = Timing(
            p50_ms=p50, p90_ms=p90, p99_ms=p99, clock=clock, runs=len(samples),
            warm_up_runs=warm_ups[name],
        )  # fmt: skip
    return timings


def _warm_up(call: Callable[[], object]) -> int:
    began, count = time.monotonic(), 0
    while count < WARM_UP_RUNS or time.monotonic() - began < WARM_UP_SECONDS:
        call()
        count += 1
    return count


class PeakMemory:
    """Resident memory above what it was on entering, in MiB; None where unknown.

    Attributes:
        held_mib: when `hold` was called.
        mib: at most.
    """

    held_mib: float | None = None
    mib: float | None = None

    def hold(self) -> None:
        """Note what is held now."""
        if self._before is not None:
            self.held_mib = _status_mib("VmRSS") - self._before

    def __enter__(self) -> PeakMemory:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
            self._before: float | None = _status_mib("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.mib = _status_mib("VmHWM") - self._before


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def host_name() -> str:
    """The processor of this host, as the system calls it, and its instruction set."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model} ({host_instruction_set()})"


def today() -> str:
    """The date, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
