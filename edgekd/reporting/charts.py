"""The report's figures."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from edgekd.latency.measuring import Measurement
from edgekd.reporting.report import Interval, Report, SampleRow, StageRow
from edgekd.tasks.base import Curves, Mark

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#97bbf5", "#9c6b4e", "#3ca951")
GREY, WRONG = "#9498a0", "#c33333"
SLOWEST = 15  # layers that are drawn each by itself
PANELS, COLUMNS = 8, 4  # of curves: at most, and side by side
LONGEST_NAME = 40
LARGEST_BYTES = 110_000  # of a JPEG: 147 KB as a data URL


def stage_chart(networks: Sequence[StageRow]) -> Figure:
    """Metric with its interval, parameters and MACs of each network."""
    figure = Figure(figsize=(10, 0.9 + 0.35 * len(networks)), layout="constrained")
    metric, params, macs = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    places = range(len(networks))
    values = [100 * row.metric for row in networks]
    ends = _reaches([row.metric for row in networks], [row.metric_ci95 for row in networks])
    metric.errorbar(values, places, xerr=ends, fmt="o", color=COLOURS[0], capsize=3)
    metric.set_title("metric, % (95 % interval)")
    metric.set_yticks(places, [row.name for row in networks])
    metric.invert_yaxis()
    _bars(params, [row.params / 1e3 for row in networks], "parameters, thousands")
    _bars(macs, [row.macs / 1e6 for row in networks], "MACs, millions")
    return figure


def loss_chart(row: StageRow) -> Figure:
    """The terms of the loss by epoch."""
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    axes = figure.subplots()
    epochs = [record["epoch"] for record in row.history]
    terms = [name for name in row.history[0] if name not in ("epoch", "step")]
    highest = max(record[name] for record in row.history for name in terms)
    for name, colour in zip(terms, COLOURS * len(terms), strict=False):
        values = [record[name] for record in row.history]
        axes.plot(epochs, values, marker=".", label=name, color=colour)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.set_ylim(0, 1.1 * highest or 1)
    axes.set_xlabel("epoch")
    axes.set_ylabel("share of the loss")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    return figure


# ---- latency -----------------------------------------------------------------------------------


class Timed(NamedTuple):
    """A network whose latency on a target is known."""

    name: str
    p50_ms: float
    metric: float | None
    metric_ci95: Interval | None


def timed(report: Report, target: str) -> list[Timed]:
    """The teacher and each artifact whose latency on `target` is known."""
    teacher = report.teacher
    found = [
        Timed("teacher fp32", latency.latency_p50_ms, teacher.metric, teacher.metric_ci95)
        for latency in teacher.latency
        if latency.target == target
    ]
    for row in report.artifacts:
        if row.target == target and row.latency_p50_ms is not None:
            name = f"student {row.precision}{' (ships)' if row.ships else ''}"
            found.append(Timed(name, row.latency_p50_ms, row.metric, row.metric_ci95))
    return found


def latency_chart(points: Sequence[Timed]) -> Figure:
    """p50 of each."""
    figure = Figure(figsize=(5.2, 0.8 + 0.35 * len(points)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, [point.p50_ms for point in points], "p50, ms")
    axes.set_yticks(range(len(points)), [point.name for point in points])
    axes.invert_yaxis()
    return figure


def metric_against_latency(points: Sequence[Timed], metric_name: str) -> Figure:
    """A point with its interval for each that has a metric."""
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.subplots()
    times = [point.p50_ms for point in points]
    for point, colour, marker in zip(points, COLOURS * len(points), "osD^v<>" * 9, strict=False):
        if point.metric is None or point.metric_ci95 is None:
            continue
        axes.errorbar(
            [point.p50_ms], [100 * point.metric], fmt=marker, color=colour, capsize=3,
            yerr=_reaches([point.metric], [point.metric_ci95]), label=point.name,
        )  # fmt: skip
    if max(times) > 3 * min(times):
        axes.set_xscale("log")
        axes.set_xlim(min(times) / 1.5, max(times) * 1.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.2, y=0.2)
    axes.set_xlabel("p50 latency, ms")
    axes.set_ylabel(f"{metric_name}, %")
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    return figure


def layer_chart(measured: Measurement) -> Figure:
    """The slowest layers, all others together, and the time outside the layers."""
    slowest = sorted(measured.layers, key=lambda layer: -layer.p50_ms)
    others = slowest[SLOWEST:]
    bars = [(_short(layer.name), layer.p50_ms, layer.operator) for layer in slowest[:SLOWEST]]
    if others:
        bars.append((f"{len(others)} other layers", sum(layer.p50_ms for layer in others), ""))
    if measured.rest_ms is not None and measured.rest_ms > 0:
        bars.append(("outside the layers", measured.rest_ms, ""))
    figure = Figure(figsize=(9, 0.9 + 0.26 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colours = [COLOURS[0] if i < len(slowest[:SLOWEST]) else GREY for i in range(len(bars))]
    names, times, operators = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), times, color=colours, height=0.7)
    said = [
        f"{ms:.3f} · {ms / measured.p50_ms:.0%}{f' · {operator}' if operator else ''}"
        for ms, operator in zip(times, operators, strict=True)
    ]
    axes.bar_label(drawn, said, padding=3, fontsize="small")
    axes.set_yticks(range(len(bars)), names, fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.3, y=0.02)
    axes.set_xlabel("ms · share of the median run · operator")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _short(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


# ---- what networks say -------------------------------------------------------------------------


def curve_chart(curves: dict[str, Curves], classes: Sequence[str]) -> Figure:
    """A panel for the mean of all classes and one for each, as many as there is room for.

    Classes that the last network is worst at, beside the first, come first.
    """
    networks = list(curves.values())
    lines = [[_line(line) for line in network.by_class] for network in networks]
    there = [k for k in range(len(classes)) if all(k < len(x) and x[k].size for x in lines)]
    there.sort(key=lambda k: lines[-1][k].mean() - lines[0][k].mean())
    panels = [(classes[k], [network[k] for network in lines]) for k in there]
    if len(there) > 1:
        means = [np.mean([network[k] for k in there], 0) for network in lines]
        panels.insert(0, (f"mean of {len(there)} classes", means))
    panels = panels[:PANELS]
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(0.6 + 2.7 * columns, 0.4 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (title, drawn) in zip(grid, panels, strict=False):
        styles = zip(curves, drawn, COLOURS, ("-", "-", "--"), strict=False)
        for name, line, colour, style in styles:
            axes.plot(
                networks[0].x, line, style, color=colour, drawstyle="steps-pre",
                label=f"{100 * line.mean():.1f} {name}",
            )  # fmt: skip
        axes.set_title(title, fontsize="medium")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.03)
        axes.grid(True, alpha=0.3)
        axes.legend(loc="lower left", fontsize="x-small")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(networks[0].x_name, fontsize="medium")
    figure.supylabel(networks[0].y_name, fontsize="medium")
    return figure


def _line(values: Sequence[float] | None) -> NDArray[np.float64]:
    return np.array(() if values is None else values)


def sample_chart(sample: SampleRow, classes: Sequence[str]) -> Figure:
    """The image once for the truth and once for each network, with what they say of it.

    Boxes are in their class' colour, those of the truth dashed; a class of the whole image stands
    below it, in red where it is not the truth's.
    """
    image = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(sample.image))))
    width, height = sample.size
    boxed = any(mark.box is not None for marks in sample.marks.values() for mark in marks)
    across = (3.2 if boxed else 1.7) * width / max(width, height)
    figure = Figure(
        figsize=(across * len(sample.marks), across * height / width + (0.65 if boxed else 0.75)),
        layout="constrained",
    )  # fmt: skip
    panels = figure.subplots(1, len(sample.marks), squeeze=False)[0]
    truth = {mark.label for mark in sample.marks.get("truth", ())}
    shown = sorted({mark.label for marks in sample.marks.values() for mark in marks})
    colours = dict(zip(shown, COLOURS * len(shown), strict=False))
    for axes, (name, marks) in zip(panels, sample.marks.items(), strict=True):
        axes.imshow(image, extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=255)
        axes.set_title(name if boxed else "\n".join(name.rsplit(" ", 1)), fontsize="medium")
        axes.set_xticks(())
        axes.set_yticks(())
        # the surest last, on top
        for mark in sorted(marks, key=lambda mark: mark.score or 0.0):
            if mark.box is None:
                said = f"{_name(mark.label, classes)}{_score(mark, ' ')}"
                right = mark.label in truth
                axes.set_xlabel(textwrap.fill(said, 20), color="black" if right else WRONG)
            else:
                _box(axes, mark, mark.box, colours[mark.label])
    if boxed:
        handles = [Patch(color=colours[label], label=_name(label, classes)) for label in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)
    return figure


def _box(axes: Axes, mark: Mark, box: tuple[float, float, float, float], colour: str) -> None:
    left, top, right, bottom = box
    style = "--" if mark.score is None else "-"
    axes.add_patch(
        Rectangle(
            (left, top), right - left, bottom - top, fill=False, color=colour, linestyle=style,
            linewidth=1.6,
        )
    )  # fmt: skip
    if mark.score is not None:
        axes.text(
            left, top, _score(mark), fontsize=7, color="white", va="top", clip_on=True,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


def _score(mark: Mark, before: str = "") -> str:
    """In per cent."""
    return "" if mark.score is None else f"{before}{100 * mark.score:.0f}"


def _name(label: int, classes: Sequence[str]) -> str:
    """A network may know classes that the data does not."""
    return classes[label] if label < len(classes) else f"class {label}"


# ---- parts -------------------------------------------------------------------------------------


def _reaches(values: Sequence[float], intervals: Sequence[Interval]) -> NDArray[np.float64]:
    """(2, n) how far each interval goes to either side, in per cent."""
    reaches: NDArray[np.float64] = 100 * np.abs(np.transpose(intervals) - np.array(values))
    return reaches


def _bars(axes: Axes, values: list[float], title: str) -> None:
    drawn = axes.barh(range(len(values)), values, color=COLOURS[0], height=0.6)
    axes.bar_label(drawn, fmt="{:.3g}", padding=2, fontsize="small")
    axes.set_title(title)
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def svg(figure: Figure) -> str:
    """A data URL."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue().encode()).decode()}"


def jpeg(figure: Figure) -> str:
    """A data URL, of the best quality that LARGEST_BYTES allow."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=100)
    drawn = PIL.Image.open(raw).convert("RGB")
    for quality in range(85, 0, -15):
        file = io.BytesIO()
        drawn.save(file, "JPEG", quality=quality)
        if file.tell() <= LARGEST_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
