"""The report as one HTML file that needs nothing else: no script, no font, no request."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import zip_longest

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from edgekd.reporting.report import Report, StageRow, interval, signed

LARGEST_CLASS_TABLE = 30
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9498a0", "#a463f2")


def page(report: Report) -> str:
    """The page's HTML; every text from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("edgekd.reporting", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"svg": _data_url, "interval": interval, "signed": signed}
    networks = (report.teacher, *report.stages)
    # the same report gives the same bytes; text stays text, and a user's dollar a dollar
    with rc_context({"svg.hashsalt": "edgekd", "svg.fonttype": "none", "text.parse_math": False}):
        return environment.get_template("page.html.jinja").render(
            report=report,
            networks=networks,
            stage_chart=_stage_chart(networks),
            latency_charts=_latency_charts(report),
            curves=[(row.name, _curves(row)) for row in _trained((*networks, *report.controls))],
            classes=_classes(report, networks),
            class_limit=LARGEST_CLASS_TABLE,
        )


def _classes(
    report: Report, networks: Sequence[StageRow]
) -> list[tuple[str, list[tuple[float | None, float]]]]:
    """(class, (metric, points more than the teacher's) of each network); the worst losses first."""
    rows = []
    by_network = [row.metric_by_class for row in networks]
    for name, values in zip(report.data.classes, zip_longest(*by_network), strict=False):
        first = values[0]
        gaps = [0.0 if v is None or first is None else 100 * (v - first) for v in values]
        rows.append((name, list(zip(values, gaps, strict=True))))
    if not any(by_network):
        return []
    return sorted(rows, key=lambda row: row[1][-1][1])


def _trained(rows: Sequence[StageRow]) -> list[StageRow]:
    """Those with a history, each once: the unpruned control is the student itself."""
    once: list[StageRow] = []
    for row in rows:
        if row.history and all(row.history != other.history for other in once):
            once.append(row)
    return once


# ---- charts ------------------------------------------------------------------------------------


def _stage_chart(networks: Sequence[StageRow]) -> Figure:
    """Metric with its interval, parameters and MACs of each network."""
    figure = Figure(figsize=(10, 0.9 + 0.35 * len(networks)), layout="constrained")
    metric, params, macs = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    places = range(len(networks))
    values = [100 * row.metric for row in networks]
    ends = [
        [100 * abs(row.metric - row.metric_ci95[end]) for row in networks] for end in (0, 1)
    ]  # fmt: skip
    metric.errorbar(values, places, xerr=ends, fmt="o", color=COLOURS[0], capsize=3)
    metric.set_title("metric, % (95 % interval)")
    metric.set_yticks(places, [row.name for row in networks])
    metric.invert_yaxis()
    _bars(params, [row.params / 1e3 for row in networks], "parameters, thousands")
    _bars(macs, [row.macs / 1e6 for row in networks], "MACs, millions")
    return figure


def _latency_charts(report: Report) -> list[tuple[str, Figure]]:
    """(target, p50 of the teacher and of each precision) of what could be measured here."""
    charts = []
    for teacher in report.teacher.latency:
        bars = {"teacher fp32": teacher.latency_p50_ms}
        for row in report.artifacts:
            if row.target == teacher.target and row.latency_p50_ms is not None:
                bars[row.precision + (" (ships)" if row.ships else "")] = row.latency_p50_ms
        figure = Figure(figsize=(6, 0.8 + 0.35 * len(bars)), layout="constrained")
        axes = figure.subplots()
        _bars(axes, list(bars.values()), "p50, ms")
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        charts.append((teacher.target, figure))
    return charts


def _curves(row: StageRow) -> Figure:
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


def _bars(axes: Axes, values: list[float], title: str) -> None:
    drawn = axes.barh(range(len(values)), values, color=COLOURS[0], height=0.6)
    axes.bar_label(drawn, fmt="{:.3g}", padding=2, fontsize="small")
    axes.set_title(title)
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _data_url(figure: Figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue().encode()).decode()
