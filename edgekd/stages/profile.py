"""profile: the latency of artifacts on the device in question."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgekd.errors import TargetError
from edgekd.latency.measuring import (
    Measurement,
    host_name,
    time_in_turns,
    today,
)
from edgekd.latency.memory import memory_of
from edgekd.runtimes.base import Arrays, Artifact, Session, fingerprint, get_runtime
from edgekd.target import Target, host_instruction_set


def profile(
    artifact: Artifact | str | Path,
    *,
    target: str | Target,
    device: str = "local",
    runs: int = 300,
    threads: int = 1,
) -> Measurement:
    """Measure one artifact, batch 1.

    Args:
        artifact: an Artifact, or a path to a file of the target's format.
        device: "local"; the target must be one whose kernels this host has.
        runs: at most; fewer where they would take over 20 seconds.
        threads: of the runtime.

    Raises:
        TargetError: `device` is not "local", or the target's verifier is not native: a number
            from this host would not be that device's.
    """
    return profile_together([artifact], target=target, device=device, runs=runs, threads=threads)[0]


def profile_together(
    artifacts: Sequence[Artifact | str | Path],
    *,
    target: str | Target,
    device: str = "local",
    runs: int = 300,
    threads: int = 1,
) -> list[Measurement]:
    """Measure several artifacts in turns, so that their ratios hold on a noisy host."""
    target = Target.load(target)
    if device != "local":
        raise TargetError(f"device {device!r}: only 'local' can be measured by this version")
    if not target.native_here:
        raise TargetError(
            f"{target.name} is not this host ({host_name()}): a latency measured here would not "
            "be that device's. Copy the artifact there and measure it with its runtime"
        )
    runtime = get_runtime(target.runtime)
    paths = [a.path if isinstance(a, Artifact) else Path(a) for a in artifacts]
    hashes = [fingerprint(path)[0] for path in paths]
    calls: dict[str, Callable[[], object]] = {}
    loads: dict[str, float] = {}
    different = list(dict.fromkeys(paths))
    for path in different:
        began = time.perf_counter()
        session = runtime.load(path, threads=threads)
        loads[str(path)] = (time.perf_counter() - began) * 1e3
        calls[str(path)] = one_run(session)
        calls[str(path)]()
    held = dict(zip(different, memory_of(runtime.name, different, threads=threads), strict=True))
    timings = time_in_turns(calls, runs=runs, threads=threads)
    return [
        Measurement(
            **timings[str(path)].model_dump(),
            target=target.name,
            sha256=digest,
            threads=threads,
            load_ms=loads[str(path)],
            load_memory_mib=held[path][0],
            peak_memory_mib=held[path][1],
            runtime=runtime.name,
            runtime_version=runtime.version(),
            host=host_name(),
            instruction_set=host_instruction_set(),
            date=today(),
            compared=tuple(hashes),
        )
        for path, digest in zip(paths, hashes, strict=True)
    ]


def one_run(session: Session) -> Callable[[], Arrays]:
    """One run of batch 1 on fixed random inputs."""
    random = np.random.default_rng(0)
    inputs: Arrays = [
        random.standard_normal(shape, dtype=np.float32) if kind == "float32"
        else random.integers(np.iinfo(kind).min, np.iinfo(kind).max, shape, np.dtype(kind))
        for shape, kind in zip(session.input_shapes, session.input_types, strict=True)
    ]  # fmt: skip
    return lambda: session(inputs)
