"""The report as one HTML file that needs nothing else: no script, no font, no request."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context

from edgekd.reporting import charts
from edgekd.reporting.report import Report, StageRow, interval, signed

LARGEST_CLASS_TABLE = 30


def page(report: Report) -> str:
    """The page's HTML; every text from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("edgekd.reporting", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "svg": charts.svg, "jpeg": charts.jpeg, "interval": interval, "signed": signed
    }  # fmt: skip
    networks = (report.teacher, *report.stages)
    classes = report.data.classes
    # the same report gives the same bytes; text stays text, and a user's dollar a dollar
    with (
        rc_context({"svg.hashsalt": "edgekd", "svg.fonttype": "none", "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has others
        return environment.get_template("page.html.jinja").render(
            report=report,
            networks=networks,
            stage_chart=charts.stage_chart(networks),
            latencies=_latencies(report),
            curve_chart=charts.curve_chart(report.curves, classes) if report.curves else None,
            samples=[charts.sample_chart(sample, classes) for sample in report.samples],
            losses=[
                (row.name, charts.loss_chart(row))
                for row in _trained((*networks, *report.controls))
            ],
            classes=_classes(report, networks),
            class_limit=LARGEST_CLASS_TABLE,
            panel_limit=charts.PANELS,
        )


def _latencies(report: Report) -> list[dict[str, Any]]:
    """What is known of each target that has a latency."""
    rows = [row for row in report.artifacts if row.latency_p50_ms is not None]
    names = [latency.target for latency in report.teacher.latency]
    found = []
    for target in dict.fromkeys(names + [row.target for row in rows]):
        points = charts.timed(report, target)
        here = [row for row in rows if row.target == target]
        found.append(
            {
                "target": target,
                "where": " and ".join(dict.fromkeys(row.where for row in here)),
                "bars": charts.latency_chart(points),
                "metric": charts.metric_against_latency(points, report.metric_name)
                if any(point.metric_ci95 for point in points) else None,
                "layers": [
                    (row, charts.layer_chart(row.measurement)) for row in here
                    if row.ships and row.measurement and row.measurement.layers
                ],
            }
        )  # fmt: skip
    return found


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
