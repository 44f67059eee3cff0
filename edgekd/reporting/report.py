"""Report: the answer, as a value, a terminal table and JSON."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgekd.choosing.choice import Choice, Priced
from edgekd.files import write_atomically
from edgekd.latency.measuring import Measurement
from edgekd.latency.model import Estimate
from edgekd.quantization.sensitivity import Sensitivity
from edgekd.runtimes.base import CompileCheck
from edgekd.runtimes.local_parity import LocalParity
from edgekd.stages.verify import Gate
from edgekd.tasks.base import Curves, Mark

SCHEMA_VERSION = 5
LARGEST_SAMPLE = 320  # pixels of its longer side
Interval = tuple[float, float]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageRow(_Row):
    """A network on the way: metric on the test split, size, and what was done.

    Attributes:
        metric_by_class: in the order of the data's classes; None where a class has no samples.
        history: of its training: epoch, step, and the mean of each term of the loss.
        sensitivity: what each layer's integers cost, where `quantize` had a `max_drop`.
    """

    name: str
    metric: float
    metric_ci95: Interval
    n: int
    params: int
    macs: int
    note: str = ""
    metric_by_class: tuple[float | None, ...] = ()
    history: tuple[dict[str, float], ...] = ()
    sensitivity: Sensitivity | None = None


class ControlRow(StageRow):
    """The same without one thing, and how much more the stage `against` scores, paired."""

    against: str
    difference: float
    difference_ci95: Interval


class Latency(_Row):
    """Of one FP32 network on one target's runtime."""

    target: str
    latency_p50_ms: float


class TeacherRow(StageRow):
    """The teacher, and its FP32 latency beside the artifacts."""

    latency: tuple[Latency, ...]


class ArtifactRow(_Row):
    """One exported file: is it right, how large, how fast; does it ship, and why."""

    target: str
    precision: str
    path: str
    size_bytes: int
    sha256: str
    verifier: str | None
    metric: float | None
    metric_ci95: Interval | None
    n: int
    agreement: float | None
    max_steps: float | None
    mean_steps: float | None
    relative_error: float | None
    integer_share: float | None
    gate: Gate
    reasons: tuple[str, ...]
    local: LocalParity | None
    compiled: CompileCheck | None
    latency_p50_ms: float | None
    measurement: Measurement | None
    ships: bool
    why: str

    @property
    def took(self) -> str:
        """The median, and how it was measured; for tables."""
        if self.latency_p50_ms is None:
            return "not measured"
        if (m := self.measurement) is None:
            return f"{self.latency_p50_ms:.3f} ms (imported)"
        where = "" if m.device == "local" else f", {m.device}"
        threads = f"{m.threads} thread{'s' if m.threads > 1 else ''}"
        return f"{m.p50_ms:.3f} ms ({m.clock}, {threads}{where})"

    @property
    def where(self) -> str:
        """What was measured where; for captions."""
        if (m := self.measurement) is None:
            return "imported from a measurement on the device"
        if m.origin == "host":
            return f"measured here, on {m.host}"
        return f"measured on {m.host}, over {m.device}"


class BudgetRow(_Row):
    """A target's latency budget, and what ships there against it.

    Attributes:
        estimate: by which the student was chosen, as measured candidates had corrected it.
        within_budget: None where nothing was measured: an estimate certifies no budget.
    """

    target: str
    budget_ms: float
    estimate: Estimate
    measured_ms: float | None
    within_budget: bool | None

    @property
    def summary(self) -> str:
        """In one sentence."""
        said = f"budget {self.budget_ms:g} ms, {self.estimate}"
        if self.measured_ms is None:
            return (
                f"{said}, not measured: run `python measure.py` from the bundle on the device, "
                "then `edgekd profile --import measurement.json`"
            )
        kept = "kept" if self.within_budget else "MISSED"
        share = self.measured_ms / self.budget_ms
        return f"{said}, measured {self.measured_ms:.3g} ms: {kept}, {share:.0%} of it"


@dataclass(frozen=True)
class Answer:
    """What one target gets: nothing, or an artifact beside the teacher.

    Attributes:
        times_faster: than the teacher's float artifact; None where they are not measured.
        points: of the metric, more than the teacher's.
    """

    target: str
    ships: ArtifactRow | None
    times_faster: float | None
    points: float | None


class SampleRow(_Row):
    """A test image, and what is said of it.

    Attributes:
        image: JPEG in base64, of LARGEST_SAMPLE a side or less.
        size: width and height of the input, in whose pixels the boxes are.
        marks: by who says it: the truth, then the networks.
    """

    image: str
    size: tuple[int, int]
    marks: dict[str, tuple[Mark, ...]]

    @staticmethod
    def of(pixels: NDArray[np.uint8], marks: dict[str, tuple[Mark, ...]]) -> SampleRow:
        """Of (C, H, W) pixels; in grey, by the first channel, if they are not three."""
        shown = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
        image, file = PIL.Image.fromarray(np.ascontiguousarray(shown)), io.BytesIO()
        size = image.size
        image.thumbnail((LARGEST_SAMPLE, LARGEST_SAMPLE))
        image.save(file, "JPEG", quality=95, subsampling=0)
        return SampleRow(image=base64.b64encode(file.getvalue()).decode(), size=size, marks=marks)


class DataRow(_Row):
    """The data that figures come from."""

    name: str
    fingerprint: str
    train: int
    test: int
    classes: tuple[str, ...]


class Report(_Row):
    """See the project's README for how to read it; `schema_version` changes with its fields.

    Attributes:
        curves: what the metric was taken from, by network.
        samples: test images; the same networks.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    note: str
    metric_name: str
    passed: bool
    seed: int
    data: DataRow
    teacher: TeacherRow
    stages: tuple[StageRow, ...]
    artifacts: tuple[ArtifactRow, ...]
    budgets: tuple[BudgetRow, ...] = ()
    choice: Choice | None = None
    controls: tuple[ControlRow, ...]
    curves: dict[str, Curves] = {}
    samples: tuple[SampleRow, ...] = ()
    host: str
    versions: dict[str, str]
    path: str

    @staticmethod
    def load(path: str | Path) -> Report:
        """Read a `report.json`."""
        return Report.model_validate_json(Path(path).read_text())

    def save(self) -> None:
        """Write `report.json` at `path`, and the page `report.html` beside it."""
        from edgekd.reporting.page import page

        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.model_dump_json(indent=1))
        write_atomically(self.page_path, page(self))

    @property
    def page_path(self) -> Path:
        """Where the page is."""
        return Path(self.path).with_suffix(".html")

    @property
    def answers(self) -> list[Answer]:
        """What each target gets, beside the teacher; first of all that users ask for."""
        latency = {row.target: row.latency_p50_ms for row in self.teacher.latency}
        found = []
        for target in dict.fromkeys(row.target for row in self.artifacts):
            ships = next((r for r in self.artifacts if r.target == target and r.ships), None)
            times = None
            if ships and ships.latency_p50_ms and target in latency:
                times = latency[target] / ships.latency_p50_ms
            points = None
            if ships and ships.metric is not None:
                points = 100 * (ships.metric - self.teacher.metric)
            found.append(Answer(target, ships, times, points))
        return found

    @property
    def smaller(self) -> float:
        """Parameters of the teacher, for each of the last stage's."""
        return self.teacher.params / self.stages[-1].params

    def print(self, console: Console) -> None:
        """The tables and the verdict, for people."""
        console.print(self._stage_table())
        for stage in self.stages:
            if stage.sensitivity is not None:
                console.print(f"{stage.name}: {escape(stage.sensitivity.summary)}")
        if self.choice is not None:
            console.print(self._choice_table(self.choice))
        if self.controls:
            console.print(self._control_table())
        console.print(self._artifact_table())
        for row in self.artifacts:
            if row.ships:
                console.print(f"{row.target}: ships {row.precision}, {escape(row.why)}")
        for row in self.artifacts:
            if (check := row.compiled) is not None and check.error is None:
                console.print(f"{row.target} {row.precision}: {escape(check.summary)}")
            for what, said in row.local.summaries.items() if row.local else ():
                console.print(f"{row.target} {row.precision}, {what}: {said}")
            for reason in row.reasons:
                console.print(f"{row.target} {row.precision} [bold]{row.gate}[/]: {escape(reason)}")
        for budget in self.budgets:
            console.print(f"{budget.target}: {escape(budget.summary)}")
        console.print(f"{'all gates passed' if self.passed else 'NOT all gates passed'}")
        console.print(f"report: {escape(str(self.page_path))}", soft_wrap=True)

    def _stage_table(self) -> Table:
        note = f", {escape(self.note)}" if self.note else ""
        table = Table(
            title=f"{self.name}{note}: {self.metric_name} on {self.data.test:,} test images "
            f"(95 % interval), seed {self.seed}"
        )
        for heading in ("network", self.metric_name, "parameters", "MACs", "how"):
            table.add_column(heading, justify="left" if heading in ("network", "how") else "right")
        for row in (self.teacher, *self.stages):
            table.add_row(
                row.name, _percent(row.metric, row.metric_ci95), f"{row.params:,}",
                f"{row.macs / 1e6:.2f} M", escape(row.note),
            )  # fmt: skip
        return table

    def _choice_table(self, choice: Choice) -> Table:
        budgets = ", ".join(f"{target} {ms:g} ms" for target, ms in choice.budget_ms.items())
        how = f"student, chosen of {choice.considered} under {budgets}"
        return member_table(how, choice.rows)

    def _control_table(self) -> Table:
        table = Table(title="controls: the same student without one thing")
        for heading in ("control", self.metric_name, "stage", "points more (95 % interval)"):
            table.add_column(
                heading, justify="left" if heading in ("control", "stage") else "right"
            )
        for row in self.controls:
            table.add_row(
                row.name, _percent(row.metric, row.metric_ci95), row.against,
                signed(row.difference, row.difference_ci95),
            )  # fmt: skip
        return table

    def _artifact_table(self) -> Table:
        table = Table(title=f"artifacts; latency of batch 1, on {self.host} unless it is said")
        for heading, justify in ARTIFACT_COLUMNS:
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for latency in self.teacher.latency:
            table.add_row(
                latency.target,
                "fp32",
                "teacher",
                "",
                "",
                "",
                "",
                f"{latency.latency_p50_ms:.3f} ms",
            )
        for row in self.artifacts:
            table.add_row(
                row.target,
                row.precision,
                "yes" if row.ships else "",
                f"{row.size_bytes / 1024:.0f} KiB",
                _percent(row.metric, row.metric_ci95) if row.metric_ci95 else "",
                "" if row.agreement is None else f"{row.agreement:.2%}",
                f"{row.gate}, {row.verifier}" if row.verifier else row.gate,
                row.took,
            )  # fmt: skip
        return table


def member_table(title: str, rows: Iterable[tuple[str, Priced]]) -> Table:
    """Members of a student's family with what they cost on each target."""
    table, rows = Table(title=escape(title)), list(rows)
    for heading in ("", "member", "parameters", "MACs"):
        table.add_column(heading, justify="left" if heading in ("", "member") else "right")
    for price in rows[0][1].prices:
        table.add_column(escape(price.target), justify="right")
    for note, priced in rows:
        member = priced.member
        table.add_row(
            note, escape(member.title), f"{member.params:,}", f"{member.macs / 1e6:.2f} M",
            *(f"{p.precision} {p.said}" for p in priced.prices),
        )  # fmt: skip
    return table


ARTIFACT_COLUMNS = (
    ("target", "left"), ("precision", "left"), ("ships", "left"), ("size", "right"),
    ("metric of the artifact", "right"), ("agreement", "right"), ("gate", "left"),
    ("p50", "right"),
)  # fmt: skip


def interval(ci95: Interval) -> str:
    """An interval of shares, in per cent."""
    return f"{100 * ci95[0]:.2f}–{100 * ci95[1]:.2f}"


def signed(value: float, ci95: Interval) -> str:
    """A difference of shares in points, with its interval."""
    low, high = (100 * x for x in ci95)
    return f"{100 * value:+.2f} ({low:+.2f} to {high:+.2f})"


def _percent(value: float | None, ci95: Interval | None) -> str:
    if value is None or ci95 is None:
        return ""
    return f"{100 * value:.2f} ({interval(ci95)})"
