"""The command line's `profile`: what it is given, and the tables it prints."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgekd.errors import RecipeError, StateError
from edgekd.runtimes.on_device.measure import MOST_RUNS

LAYERS_SHOWN = 10


class _Row(NamedTuple):
    """One measured file."""

    name: str
    measured: Any


def profile(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model files, folders of artifacts, a run's (runs/NAME), or with --shape a model "
            "by name or package.module:callable. All are timed in turns."
        ),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="A target's name; repeatable.")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TARGET=]LINK",
            help="ssh://user@host:port or adb://serial, where it is not this machine; repeatable.",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Another model, as a ratio to the first; repeatable.")
    ] = None,
    runs: Annotated[
        int, typer.Option(min=1, help="Timed runs of each, at most, within 20 s.")
    ] = MOST_RUNS,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    layers: Annotated[
        str, typer.Option(metavar="N|all", help="Layers to show, the slowest first; 0: none.")
    ] = str(LAYERS_SHOWN),
    shape: Annotated[
        str | None, typer.Option(metavar="1x3x224x224", help="A Python module's input.")
    ] = None,
    lock_clocks: Annotated[
        bool, typer.Option("--lock-clocks", help="Of a Jetson, meanwhile; takes root there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run a model's factory from outside edgekd.")
    ] = False,
    imported: Annotated[
        list[Path] | None,
        typer.Option("--import", help="Take in what measure.py wrote on a device; repeatable."),
    ] = None,
) -> None:
    """Measure latency, batch 1: on this machine, or on a device.

    Example: edgekd profile model.onnx artifact --target host-onnxruntime

    Example: edgekd profile runs/my --target jetson-nano --device ssh://me@nano --layers all

    Example: edgekd profile my.nets:small --shape 1x3x96x96 --target intel-cpu --trust

    Example: edgekd profile q --target host-onnxruntime --compare theirs.onnx --json

    Example: edgekd profile --import measurement.json
    """
    from edgekd.devices.base import get_device
    from edgekd.latency.profiles import import_measurement
    from edgekd.recipe import by_target
    from edgekd.reporting.progress import console
    from edgekd.stages.profile import profile_together
    from edgekd.target import Target

    for path in imported or []:
        print(f"{path}: in {import_measurement(path)}; the next run chooses by it")
    if imported and not models:
        return
    if not models or not target:
        raise RecipeError("give model files and a --target, or --import measurement.json")
    shown = _count(layers)
    at = dict.fromkeys(target, "local") | dict(by_target("--device", device or (), target))
    links = {name: get_device(address) for name, address in at.items()}
    rows: list[_Row] = []
    with tempfile.TemporaryDirectory() as made:
        for name in target:
            known = Target.load(name)
            found = [
                file
                for model in [*models, *(compare or [])]
                for file in _files(model, known, Path(made) / name, shape, trust)
            ]
            link = links[name]
            if not as_json:
                console.print(f"measuring {len(found)} file(s) for {name} on {link.address}")
            measured = profile_together(
                [path for _, path in found], target=known, device=link, runs=runs,
                threads=threads, layers=shown != 0, lock_clocks=lock_clocks,
            )  # fmt: skip
            rows += [_Row(said, m) for (said, _), m in zip(found, measured, strict=True)]
    if as_json:
        print(json.dumps([row.measured.model_dump(mode="json") for row in rows], indent=1))
        return
    out = Console()
    out.print(*_tables(rows, ratios=bool(compare)))
    for line in _conditions(rows):
        out.print(escape(line), soft_wrap=True)
    for row in rows:
        if m := row.measured.layers:
            count = len(m) if shown is None else min(shown, len(m))
            said = f"\n{row.name} ({row.measured.target}): the slowest {count} of {len(m)} layers"
            out.print(escape(said), soft_wrap=True)
            out.print(_layer_table(m, count))
            said = f"rest: {row.measured.rest_ms:.3f} ms; {row.measured.rest}"
            out.print(escape(said), soft_wrap=True)


# ---- what is given -------------------------------------------------------------------------------


def _count(layers: str) -> int | None:
    """None: all."""
    if layers == "all":
        return None
    if not layers.isdigit():
        raise RecipeError(f"--layers {layers}: give a number, or all")
    return int(layers)


def _files(
    model: str, target: Any, made: Path, shape: str | None, trust: bool
) -> list[tuple[str, Path]]:
    """(name, path) of the files for `target` that `model` stands for."""
    from edgekd.rundir import exports
    from edgekd.runtimes.base import Artifact

    place = Path(model)
    if place.is_file():
        return [(model, place)]
    if (place / "artifact.json").is_file():
        artifact = Artifact.load(place)
        if artifact.target != target.name:
            raise StateError(f"{place} is for {artifact.target}, not for {target.name}")
        return [(model, artifact.path)]
    if place.is_dir():
        artifacts = [Artifact.load(folder) for folder in exports(place, target)]
        return [(f"{a.path.parent} {a.precision}", a.path) for a in artifacts]
    if shape is None:
        raise StateError(
            f"{model} does not exist; give a model file, an artifact's folder or a run's, or a "
            "Python module as package.module:callable with --shape"
        )
    return [(model, _exported(model, target, made, shape, trust))]


def _exported(model: str, target: Any, made: Path, shape: str, trust: bool) -> Path:
    """The file of a new, untrained network, in float."""
    import torch

    from edgekd.models.build import Build, build_module
    from edgekd.network import Network
    from edgekd.stages.export import export

    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise RecipeError(f"--shape {shape}: give it as 1x3x224x224")
    build = Build(model=model)
    module = build_module(build, trust=trust, origin="edgekd profile")
    net = Network(module, torch.zeros(tuple(map(int, shape.split("x")))), build=build)
    return export(net, target=target, out=made / re.sub(r"\W", "_", model)).path


# ---- what is printed -----------------------------------------------------------------------------


def _tables(rows: Sequence[_Row], *, ratios: bool) -> list[Table]:
    """How fast, and what else it takes; a terminal is too narrow for both in one."""
    several = len({row.measured.target for row in rows}) > 1
    energy = any(row.measured.energy_mj is not None for row in rows)
    paced = any(row.measured.quiet_ms is not None for row in rows)
    names = [*(["target"] if several else []), "file"]
    fast = [
        "p50 ms", "± %", "p90 ms", "p99 ms", *(["quiet ms"] if paced else []), "per s",
        *(["× first"] if ratios else []), "trust",
    ]  # fmt: skip
    takes = ["load ms", "file KiB", "loaded MiB", "peak MiB", *(["mJ"] if energy else [])]
    tables = [Table(title="latency, batch 1"), Table(title="what else it takes")]
    for table, figures in zip(tables, (fast, takes), strict=True):
        for heading in names:
            table.add_column(heading)
        for heading in figures:
            table.add_column(heading, justify="right")
    first: dict[str, float] = {}
    for name, m in rows:
        first.setdefault(m.target, m.p50_ms)
        named = [*([m.target] if several else []), escape(name)]
        low, high = m.p50_ci95_ms
        tables[0].add_row(
            *named, f"{m.p50_ms:.3f}", f"{50 * (high - low) / m.p50_ms:.1f}", f"{m.p90_ms:.3f}",
            f"{m.p99_ms:.3f}", *([_figure(m.quiet_ms, 3)] if paced else []),
            f"{m.throughput_per_s:.1f}",
            *([f"{m.p50_ms / first[m.target]:.2f}"] if ratios else []), m.trust,
        )  # fmt: skip
        tables[1].add_row(
            *named, _figure(m.load_ms), f"{m.size_bytes / 1024:.0f}", _figure(m.load_memory_mib),
            _figure(m.peak_memory_mib), *([_figure(m.energy_mj)] if energy else []),
        )  # fmt: skip
    return tables


def _figure(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _conditions(rows: Sequence[_Row]) -> list[str]:
    """One line for each target, and what is to be said of trust and clocks."""
    lines = []
    by_target = {row.measured.target: row.measured for row in rows}
    for target, m in by_target.items():
        c = m.conditions
        parts = [
            f"{m.runtime} {m.runtime_version} on {m.host}, {m.device}", f"{m.threads} thread(s)",
            f"{'CPU time' if m.clock == 'cpu' else 'wall clock'}, batch 1",
            f"{m.runs} runs after {m.warm_up_runs} to warm up"
            + ("" if m.warm_up_steady else ", which did not get steady"),
            "no run thrown away",
            "± is half of the median's 95 % interval",
            "quiet: the median without what others on the machine take, by a reference network in "
            "its turns"
            if m.quiet_ms is not None else "",
            _change("CPU", c.cpu_mhz_before, c.cpu_mhz_after, "MHz"),
            _change("GPU", c.gpu_mhz_before, c.gpu_mhz_after, "MHz"),
            _change("temperature", c.temperature_c_before, c.temperature_c_after, "°C"),
            f"governor {c.governor}" if c.governor else "",
            f"power mode {c.power_mode}" if c.power_mode else "",
            "clocks locked" if c.clocks_locked else "",
            f"load {c.load_average:.1f}" if c.load_average is not None else "",
            f"energy at {' + '.join(c.rails)}" if c.rails else "", m.date,
        ]  # fmt: skip
        lines.append(f"{target}: {'; '.join(filter(None, parts))}")
        if m.repeats:
            lines.append(f"{target}: measured {m.repeats + 1} times, the last of them is shown")
    for name, m in rows:
        if m.trust != "steady":
            lines.append(f"{name} ({m.target}): {m.trust}: do not rely on its figures")
    if len({m.clock for m in by_target.values()}) > 1:
        said = ", ".join(f"{target}: {m.clock}" for target, m in by_target.items())
        lines.append(f"the targets' clocks differ ({said}): do not compare across them")
    return lines


def _change(what: str, before: float | None, after: float | None, unit: str) -> str:
    if before is None or after is None:
        return ""
    return f"{what} {before:.0f} to {after:.0f} {unit}"


def _layer_table(layers: Sequence[Any], count: int) -> Table:
    table = Table()
    for heading in ("layer", "operator", "p50 ms", "share"):
        table.add_column(heading, justify="left" if heading in ("layer", "operator") else "right")
    for layer in sorted(layers, key=lambda layer: layer.p50_ms, reverse=True)[:count]:
        table.add_row(
            escape(layer.name), layer.operator, f"{layer.p50_ms:.3f}", f"{layer.share:.1%}"
        )
    return table
