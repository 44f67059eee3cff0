"""profile: the latency of artifacts on the device in question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgekd.devices.base import Device, get_device
from edgekd.devices.measure import measure_on
from edgekd.errors import TargetError
from edgekd.latency.measuring import Measurement, host_name
from edgekd.latency.pace import has_pace, least_ever, quietest, reference_for
from edgekd.reporting.progress import console
from edgekd.runtimes.base import Artifact, fingerprint, get_runtime
from edgekd.runtimes.on_device.measure import MOST_RUNS
from edgekd.target import Target

REPEATS = 2  # of a measurement that is not steady


def profile(
    artifact: Artifact | str | Path,
    *,
    target: str | Target,
    device: str | Device = "local",
    runs: int = MOST_RUNS,
    threads: int = 1,
    layers: bool = False,
    lock_clocks: bool = False,
) -> Measurement:
    """Measure one artifact, batch 1.

    Args:
        artifact: an Artifact, or a path to a file of the target's format.
        device: "local", or a link's address: ssh://user@host:port, adb://serial; or the link.
        runs: at most; fewer where the median is known within 1 % and the host is about as fast as
            it ever was (see `latency/pace.py`), or 20 seconds are over.
        threads: of the runtime.
        layers: time each layer too, in a pass of its own.
        lock_clocks: of a Jetson, while it is measured; it takes root there.

    Raises:
        TargetError: `device` is "local", and the target's verifier is not native: a number from
            this host would not be that device's.
        DeviceError: the device cannot be reached, or lacks something; the next call goes on.
    """
    return profile_together(
        [artifact], target=target, device=device, runs=runs, threads=threads, layers=layers,
        lock_clocks=lock_clocks,
    )[0]  # fmt: skip


def profile_together(
    artifacts: Sequence[Artifact | str | Path],
    *,
    target: str | Target,
    device: str | Device = "local",
    runs: int = MOST_RUNS,
    threads: int = 1,
    layers: bool = False,
    lock_clocks: bool = False,
) -> list[Measurement]:
    """Measure several artifacts in turns, so that their ratios hold on a noisy host.

    Where one of them is not steady, all are measured again, twice at most.
    """
    target = Target.load(target)
    link = get_device(device) if isinstance(device, str) else device
    if link.address == "local":
        if not target.native_here:
            raise TargetError(
                f"{target.name} is not this host ({host_name()}): a latency measured here would "
                "not be that device's. Give its --device, or run measure.py from the bundle there"
            )
        get_runtime(target.runtime).version()  # a missing package names its extra
    paths = [a.path if isinstance(a, Artifact) else Path(a) for a in artifacts]
    hashes, sizes = zip(*map(fingerprint, paths), strict=True)
    reference = reference_for(sizes) if has_pace(target, threads) else None
    where = host_name() if link.address == "local" else link.address
    for repeats in range(REPEATS + 1):
        raw = measure_on(
            link, dict(zip(hashes, paths, strict=True)), target=target, runs=runs,
            threads=threads, layers=layers, lock_clocks=lock_clocks,
            reference=reference,
            quietest_ms=reference and quietest(target.runtime, where, reference),
        )  # fmt: skip
        now, version = raw.conditions.reference_ms, f"{raw.runtime} {raw.runtime_version}"
        least = now and reference and least_ever(now, version, where, reference)
        measured = raw.measurements(device=link.address, repeats=repeats, quietest_ms=least)
        found = {m.sha256: m for m in measured}
        if all(m.trust == "steady" for m in found.values()):
            break
        if repeats < REPEATS:
            console.print(f"{target.name}: {_unsteady(list(found.values()))}; measuring again")
    asked = {"compared": hashes, "runs_asked": runs}
    return [found[digest].model_copy(update=asked) for digest in hashes]


def _unsteady(measured: list[Measurement]) -> str:
    kinds = {m.trust for m in measured}
    return (
        "the clocks fell or it got hotter, and it got slower" if "throttled" in kinds
        else "the first and the last runs differ"
    )  # fmt: skip
