"""Measured latencies of a target: one CSV, one row a measurement, its conditions in each row.

Shipped rows are in `profiles/<target>.csv`. A user's own are in `$EDGEKD_HOME/profiles`, or in
`~/.edgekd/profiles` where that is not set, and come behind the shipped ones.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgekd.errors import StateError, describe_invalid
from edgekd.latency.measuring import RawMeasurement
from edgekd.target import Precision, Target, data_folders

Positive = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(gt=0)]


class ProfileRow(BaseModel):
    """One measurement of a network, or of a fused kernel inside it.

    Attributes:
        kind: "network", or "kernel": then `network` is the one that it was timed in.
        op, cin, cout, kernel, stride, groups, height, width, fused, reads, writes, macs: of a
            kernel, see `Kernel`.
        p50_ms, low_ms, high_ms: the median and its 95 % interval. Of a kernel: its mean over the
            network's quickest runs, without an interval.
        quiet_ms, reference_ms: of a network, and of the reference network in the same turns, what
            a run takes that others hardly disturb, by `clock`; see `pace.py`.
        runs: timed.
        clock: see `Measurement`.
        host: the machine.
        conditions: in words.
        origin: "device", or "host": measured where edgekd ran, which is not the device.
        sha256: of the artifact.
        related: the target whose model these measurements adapt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["network", "kernel"]
    network: str
    op: str = ""
    cin: Positive = 1
    cout: Positive = 1
    kernel: Positive = 1
    stride: Positive = 1
    groups: Positive = 1
    height: Positive = 1
    width: Positive = 1
    fused: str = ""
    reads: Annotated[int, Field(ge=0)] = 0
    writes: Annotated[int, Field(ge=0)] = 0
    macs: Annotated[int, Field(ge=0)] = 0
    precision: Precision
    threads: Positive
    p50_ms: Milliseconds
    low_ms: Milliseconds | None = None
    high_ms: Milliseconds | None = None
    quiet_ms: Milliseconds | None = None
    reference_ms: Milliseconds | None = None
    runs: Positive
    clock: Literal["wall", "cpu"]
    runtime: str
    runtime_version: str
    host: str
    instruction_set: str
    conditions: str
    date: str
    origin: Literal["device", "host"]
    sha256: str
    related: str = ""


COLUMNS = tuple(ProfileRow.model_fields)


def own_folder() -> Path:
    """Where this user's own are: `$EDGEKD_HOME`, or `~/.edgekd`."""
    return Path(os.environ.get("EDGEKD_HOME") or "~/.edgekd").expanduser()


def own_file(target: str | Target) -> Path:
    """Where this user's rows of a target are."""
    name = target if isinstance(target, str) else target.name
    return own_folder() / "profiles" / f"{name}.csv"


def read_profile(target: str | Target) -> list[ProfileRow]:
    """All rows of a target: the shipped ones, then the user's own; none where there are none.

    Raises:
        StateError: a row that is torn, or of another format; it names the file and the line.
    """
    name = target if isinstance(target, str) else target.name
    shipped = [folder / f"{name}.csv" for folder in reversed(data_folders("profiles"))]
    paths = dict.fromkeys([*shipped, own_file(name)])
    return [row for path in paths if path.is_file() for row in read_rows(path)]


def profile_sha256(target: str | Target) -> str:
    """Of all rows of a target: what its latency model is fitted to."""
    text = "\n".join(row.model_dump_json() for row in read_profile(target))
    return hashlib.sha256(text.encode()).hexdigest()


def read_rows(path: Path) -> list[ProfileRow]:
    """The rows of one file; see `read_profile`."""
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise StateError(f"{path} is not text: {error}; move it away") from None
    if text and not text.endswith("\n"):
        count = text.count("\n") + 1
        raise StateError(f"{path}, line {count}: it is torn; remove this line")
    rows = csv.reader(io.StringIO(text, newline=""))
    header = tuple(next(rows, ()))
    if not header:
        return []
    if header != COLUMNS:
        odd = sorted(set(header) ^ set(COLUMNS)) or ["their order"]
        raise StateError(
            f"{path}, line 1: the columns differ from this version's in {', '.join(odd[:5])}; "
            "move the file away, and calibrate again"
        )
    found = []
    for cells in rows:
        where = f"{path}, line {rows.line_num}"
        if len(cells) != len(COLUMNS):
            raise StateError(
                f"{where}: {len(cells)} values; there must be {len(COLUMNS)}: remove this line"
            )
        given = {key: cell for key, cell in zip(COLUMNS, cells, strict=True) if cell}
        try:
            found.append(ProfileRow.model_validate(given))
        except ValidationError as error:
            raise StateError(
                f"{where}: {describe_invalid(error, ProfileRow)}; remove this line"
            ) from None
    return found


def append_rows(path: Path, rows: Iterable[ProfileRow]) -> None:
    """Append, whole or not at all; writers wait for each other.

    Raises:
        StateError: the file there is torn or of another format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        read_rows(path)
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            writer.writerow(COLUMNS)
        for row in rows:
            values = row.model_dump(mode="json")
            writer.writerow(["" if values[key] is None else values[key] for key in COLUMNS])
        try:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError:  # a full disk: what was there before stays
            file.truncate(end)
            raise


# ---- measured by hand ----------------------------------------------------------------------------


def import_measurement(path: Path) -> Path:
    """Append what `measure.py` wrote on a device to this user's rows; returns their file.

    The same file again changes nothing.

    Raises:
        StateError: it is not what `measure.py` writes for a bundle.
        TargetError: it names no known target.
    """
    raw = RawMeasurement.read(path)
    Target.load(raw.target)
    if raw.precision is None:
        raise StateError(
            f"{path} does not say which precision was measured; run measure.py from a bundle"
        )
    own = own_file(raw.target)
    there = read_rows(own) if own.is_file() else []
    rows = [
        ProfileRow(
            kind="network", network=raw.network or file.file, precision=raw.precision,
            threads=m.threads, p50_ms=m.p50_ms, low_ms=low, high_ms=high, runs=m.runs,
            clock=m.clock, runtime=m.runtime, runtime_version=m.runtime_version, host=m.host,
            instruction_set=m.instruction_set, conditions=f"measure.py by hand, {m.trust}",
            date=m.date, origin="device", sha256=m.sha256,
        )
        for file, m in zip(raw.files, raw.measurements(device="by hand"), strict=True)
        for low, high in [m.p50_ci95_ms or (None, None)]
    ]  # fmt: skip
    append_rows(own, [row for row in rows if row not in there])
    return own


def device_rows(target: str | Target) -> list[ProfileRow]:
    """Whole networks that were measured on the device itself."""
    rows = read_profile(target)
    return [row for row in rows if row.kind == "network" and row.origin == "device"]


def imported_ms(target: str | Target, sha256: str) -> float | None:
    """p50 of an artifact that was measured on the device; None if it was not."""
    took = [row.p50_ms for row in device_rows(target) if row.sha256 == sha256]
    return took[-1] if took else None
