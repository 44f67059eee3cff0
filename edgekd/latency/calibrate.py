"""Fit a latency model to a device: measure small networks on it, once each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from edgekd.errors import TargetError
from edgekd.latency import pace
from edgekd.latency.kernels import timed_kernels
from edgekd.latency.measuring import Clock, Measurement, host_name, today
from edgekd.latency.model import LatencyModel, leave_one_out
from edgekd.latency.probes import ProbeKind, probe
from edgekd.latency.profiles import ProfileRow, append_rows, own_file, read_profile
from edgekd.latency.runtime_graph import READERS, RUNS, RuntimeNode, runtime_nodes
from edgekd.network import Network
from edgekd.reporting.progress import Progress, console
from edgekd.runtimes.base import Arrays, Session, fingerprint, get_runtime
from edgekd.runtimes.on_device.measure import (
    COPIES,
    MOST_RUNS,
    Watch,
    has_cpu_clock,
    median_interval,
    quiet,
    time_in_turns,
)
from edgekd.stages.profile import profile_together
from edgekd.stages.quantize import quantize
from edgekd.target import Precision, Target, host_instruction_set

COUNTS: dict[ProbeKind, int] = {"dense": 5, "depthwise": 6, "transformer": 5, "mixed": 4}
# in turns: where the time is up early, each kind has been there
PROBES: tuple[tuple[ProbeKind, int], ...] = tuple(
    (kind, seed) for seed in range(6) for kind, count in COUNTS.items() if seed < count
)
ADAPTING = 8  # probes that tell how a device differs from a related one
TOGETHER = 5  # probes that are timed in turns, so that a host's slow minute falls on all alike
Key = TypeVar("Key")
SECONDS = 4.0  # for each file, however many runs that is


@dataclass(frozen=True)
class Calibration:
    """What came of `calibrate`.

    Attributes:
        measured: networks, before and now.
        wanted: of them.
        errors: precision -> estimate ÷ measured of each network that was left out of the fit.
    """

    target: str
    measured: int
    wanted: int
    errors: dict[Precision, dict[str, float]]

    @property
    def summary(self) -> str:
        """A line for each precision."""
        lines = [f"{self.target}: {self.measured} of {self.wanted} networks measured"]
        for precision, by_network in self.errors.items():
            off = np.abs(np.array(list(by_network.values())) - 1)
            lines.append(
                f"{precision}: estimates of networks left out are off by {off.mean():.1%} in the "
                f"mean, {np.mean(off <= 0.1):.0%} within ±10 % (n = {len(off)})"
            )
        return "\n".join(lines)


def calibrate(
    target: str | Target,
    *,
    device: str = "local",
    related: str | None = None,
    threads: int = 1,
    minutes: float = 10.0,
) -> Calibration:
    """Measure what is missing of at most 20 small networks, in every precision, and fit.

    Rows are in the user's profile as soon as a few networks are measured: broken off, the next call
    goes on.

    Args:
        device: see `profile`. On another device whole networks are measured; on this machine every
            kernel of theirs too.
        related: a target with a profile, which 8 networks adapt to this one.
        minutes: start no other network after this.

    Raises:
        TargetError: the target's kernels are not this host's, and there is no device.
    """
    target = Target.load(target)
    here = device == "local"
    if here and not target.native_here:
        raise TargetError(
            f"{target.name} is not this host ({host_name()}); give its --device ssh://user@host"
        )
    if related is not None:
        LatencyModel.load(related, threads=threads)  # one that has none says so before all work
    probes = PROBES[:ADAPTING] if related is not None else PROBES
    version, host = get_runtime(target.runtime).version(), host_name()
    done = {
        (row.network, row.precision)
        for row in read_profile(target)
        if row.kind == "network" and row.threads == threads
        and (not here or (row.runtime_version, row.host) == (version, host))
    }  # fmt: skip
    kernels_too = here and target.runtime in READERS
    together = TOGETHER if kernels_too else 1
    precisions = runnable(target)
    missing = [
        (kind, seed, [p for p in precisions if (f"{kind}-{seed}", p) not in done])
        for kind, seed in probes
    ]
    missing = [m for m in missing if m[2]]
    began = time.monotonic()
    work = own_file(target).parent / "work" / target.name
    progress = Progress("calibrating", len(probes), done=len(probes) - len(missing))
    # a terminal shows one bar at a time, and a link has its own
    with progress if here else nullcontext():
        while missing:
            if time.monotonic() - began > 60 * minutes:
                console.print(f"calibrate: {minutes:g} minutes are over; the next call goes on")
                break
            now, missing = missing[:together], missing[together:]
            files = {
                f"{kind}-{seed}": export_probe(kind, seed, target, wanted, work / f"{kind}-{seed}")
                for kind, seed, wanted in now
            }
            if kernels_too:
                rows = measure_here(files, target, threads)
            else:
                ((name, of_one),) = files.items()
                rows = measure_there(name, of_one, target, device, threads, related)
            append_rows(own_file(target), rows)
            for file in (file for by in files.values() for file in by.values()):
                file.unlink()  # measured once: hundreds of MiB are not kept
                file.with_suffix(".bin").unlink(missing_ok=True)
            for name in files:
                progress.advance(name)
    rows = [row for row in read_profile(target) if row.threads == threads]
    networks = {row.network for row in rows if row.kind == "network"}
    return Calibration(target.name, len(networks), len(probes), leave_one_out(rows))


def runnable(target: Target) -> list[Precision]:
    """What a float network can be exported to: its float precision, and integers."""
    found: list[Precision] = [] if target.float_precision is None else [target.float_precision]
    return [*found, "int8"] if target.scheme is not None else found


def export_probe(
    kind: ProbeKind, seed: int, target: Target, precisions: Iterable[Precision], folder: Path
) -> dict[Precision, Path]:
    """A probe's files, random weights: post-training integers, from noise."""
    module, shape = probe(kind, seed)
    return export_files(Network(module.eval(), torch.zeros(1, *shape)), target, precisions, folder)


def export_files(
    net: Network, target: Target, precisions: Iterable[Precision], folder: Path
) -> dict[Precision, Path]:
    """The files that are timed; no more than shapes matter, so calibration is by 4 noise images."""
    folder.mkdir(parents=True, exist_ok=True)
    runtime = get_runtime(target.runtime)
    files: dict[Precision, Path] = {}
    for precision in precisions:
        given = net
        if precision == "int8":
            noise = torch.randn(4, *net.io.inputs[0].shape)
            given = quantize(
                net, target=target, data=[(noise,)], calibration=4, observer="minmax",
                correct_bias=False, accelerator="cpu",
            )  # fmt: skip
        files[precision] = folder / f"{target.name}-{precision}{runtime.suffix}"
        runtime.export(given, target, files[precision])
    return files


# ---- on this machine -----------------------------------------------------------------------------


def measure_here(
    files: Mapping[str, Mapping[Precision, Path]], target: Target, threads: int
) -> list[ProfileRow]:
    """Rows of networks and of their kernels; the files of all are timed in turns."""
    paths = {(n, precision): path for n, by in files.items() for precision, path in by.items()}
    graphs = {key: _nodes(files, key, target, threads) for key in paths}
    found = timed(paths, target.runtime, threads)
    rows: list[ProfileRow] = []
    for (name, precision), path in paths.items():
        # what disturbed a layer before seldom does so again
        again = {n.name: n.p50_ms for n in _nodes(files, (name, precision), target, threads)}
        nodes = [
            node.model_copy(update={"p50_ms": min(node.p50_ms, again.get(node.name, node.p50_ms))})
            for node in graphs[name, precision]
        ]
        rows += rows_of(
            name, precision, nodes, found[name, precision], target=target, threads=threads,
            sha256=fingerprint(path)[0],
        )  # fmt: skip
    return rows


def _nodes(
    files: Mapping[str, Mapping[Precision, Path]],
    key: tuple[str, Precision],
    target: Target,
    threads: int,
) -> list[RuntimeNode]:
    return runtime_nodes(target.runtime, files[key[0]][key[1]], threads)


def one_run(session: Session) -> Callable[[], Arrays]:
    """One run of batch 1 on fixed random inputs."""
    draw = np.random.default_rng(0)
    inputs = [draw.standard_normal(shape, dtype=np.float32) for shape in session.input_shapes]
    return lambda: session(inputs)


class Timed(NamedTuple):
    """ms of each run, what an undisturbed one takes, and the reference network in the same turns.

    Of one thread CPU time, else by the wall clock.
    """

    samples: Sequence[float]
    quiet_ms: float
    reference_ms: float


def timed(paths: Mapping[Key, Path], runtime: str, threads: int) -> dict[Key, Timed]:
    """Files of one runtime, and the reference network, timed in turns; COPIES of each.

    Others disturb a host for seconds at a time, and small networks are over in a millisecond: so it
    is the time that ends their turns, not how many runs there were.
    """
    load = get_runtime(runtime).load
    with TemporaryDirectory() as folder:
        reference = Path(folder) / pace.NEAR.file
        pace.write_reference(reference)
        models = [
            [one_run(load(path, threads=threads)) for _ in range(COPIES)]
            for path in (*paths.values(), reference)
        ]
    with Watch(in_process=True) as watch:
        found = time_in_turns(
            models, MOST_RUNS, SECONDS * len(paths), threads, watch, restless=lambda _: True
        )
    samples = [each[f"{_clock(threads)}_ms"] for each in found]
    *quiets, slow = [quiet(each, COPIES) for each in samples]
    return {
        key: Timed(each, ms, slow) for key, each, ms in zip(paths, samples, quiets, strict=False)
    }


def _clock(threads: int) -> Clock:
    return "cpu" if threads == 1 and has_cpu_clock() else "wall"


def rows_of(
    network: str,
    precision: Precision,
    nodes: Sequence[RuntimeNode],
    timed: Timed,
    *,
    target: Target,
    threads: int,
    sha256: str,
) -> list[ProfileRow]:
    """The rows of one measured file."""
    low, high = median_interval(timed.samples)
    conditions = "batch 1, in turns; kernels: the lesser of two profiled passes"
    common = ProfileRow(
        kind="network", network=network, precision=precision, threads=threads,
        p50_ms=float(np.median(timed.samples)), low_ms=low, high_ms=high, quiet_ms=timed.quiet_ms,
        reference_ms=timed.reference_ms, runs=len(timed.samples),
        clock=_clock(threads),
        runtime=target.runtime, runtime_version=get_runtime(target.runtime).version(),
        host=host_name(), instruction_set=host_instruction_set(), conditions=conditions,
        date=today(), origin="host", sha256=sha256,
    )  # fmt: skip
    rows = [common]
    for kernel, ms in timed_kernels(target.runtime, nodes):
        rows.append(common.model_copy(update={
            "kind": "kernel", **kernel._asdict(), "macs": kernel.macs,
            "p50_ms": max(round(ms, 6), 1e-4),  # the clock may tell 0 µs
            "low_ms": None, "high_ms": None, "quiet_ms": None, "reference_ms": None, "runs": RUNS,
            "clock": "wall",
        }))  # fmt: skip
    return rows


# ---- elsewhere -----------------------------------------------------------------------------------


def measure_there(
    network: str,
    files: Mapping[Precision, Path],
    target: Target,
    device: str,
    threads: int,
    related: str | None,
) -> list[ProfileRow]:
    """Rows of whole networks, measured over a link."""
    measured = profile_together(list(files.values()), target=target, device=device, threads=threads)
    return [
        _row(network, precision, found, related)
        for precision, found in zip(files, measured, strict=True)
    ]


def _row(network: str, precision: Precision, found: Measurement, related: str | None) -> ProfileRow:
    low, high = found.p50_ci95_ms or (None, None)
    return ProfileRow(
        kind="network", network=network, precision=precision, threads=found.threads,
        p50_ms=found.p50_ms, low_ms=low, high_ms=high, runs=found.runs, clock=found.clock,
        runtime=found.runtime, runtime_version=found.runtime_version, host=found.host,
        instruction_set=found.instruction_set, conditions=found.conditions.model_dump_json(),
        date=found.date, origin=found.origin, sha256=found.sha256, related=related or "",
    )  # fmt: skip
