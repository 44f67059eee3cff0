"""The command line's questions: targets, a file for one of them, a run, and this machine."""

from __future__ import annotations

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgekd.errors import RecipeError, StateError

if TYPE_CHECKING:
    from edgekd.runtimes.rule import Finding
    from edgekd.stages.check import Check

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
# package -> what it is for, and the extra that brings it; None: edgekd does not run without it
PACKAGES: dict[str, tuple[str, str | None]] = {
    "torch": ("networks and training", None),
    "torchvision": ("models and data by name", None),
    "torchao": ("conversion to integers", None),
    "torch-pruning": ("groups of channels", None),
    "lightning-fabric": ("the training loop", None),
    "onnx": ("the exported file", None),
    "onnxscript": ("export", None),
    "onnxruntime": ("host-onnxruntime, and every emulated check", None),
    "openvino": ("intel-cpu", "openvino"),
    "tensorrt-rtx": ("the compile check of Jetson Orin artifacts", "tensorrt"),
    "litert-torch": ("android-litert", "litert"),
    "ai-edge-litert": ("the check of android-litert artifacts", "litert"),
    "executorch": ("android-executorch", "executorch"),
    "timm": ("models by name", "timm"),
    "faster-coco-eval": ("detection", "detection"),
    "nncf": ("a baseline in benchmarks", "nncf"),
}


def targets(
    name: Annotated[str | None, typer.Argument(help="One target, with its sources.")] = None,
    as_json: Json = False,
) -> None:
    """The devices that edgekd knows, and how each is checked here.

    Example: edgekd targets jetson-orin-nano
    """
    from edgekd.target import Target, target_names

    known = [Target.load(n) for n in ([name] if name else target_names())]
    if as_json:
        values = [target.model_dump(mode="json") for target in known]
        print(json.dumps(values[0] if name else values, indent=1))
        return
    table = Table(title=known[0].title if name else "targets")
    if name:
        table.add_column("fact")
        table.add_column("value", overflow="fold")
        for key, value in known[0].model_dump(exclude={"source", "title"}).items():
            if value not in (None, "", {}, ()):
                table.add_row(key, str(value))
        for source in known[0].source:
            table.add_row("source", f"{source.fact}: {source.url}")
    else:
        for heading in ("name", "device", "runtime", "precisions", "checked here"):
            table.add_column(heading, overflow="fold")
        for t in known:
            here = "native" if t.native_here else "emulated" if t.verifier == "emulated" else "no"
            here += f", compiled for {t.compile_check}" if t.compile_check else ""
            table.add_row(
                t.name, t.title, f"{t.runtime} {t.runtime_version}", ", ".join(t.precisions), here
            )
    Console(width=None if Console().is_terminal else 140).print(table)


def check(
    file: Annotated[Path, typer.Argument(help="An ONNX file, whoever wrote it.")],
    target: Annotated[
        list[str], typer.Option(help="A target's name (edgekd targets); repeatable.")
    ],
    as_json: Json = False,
) -> None:
    """Say what a device cannot hold of an ONNX file: where, why, and what to do.

    An error: it refuses the file, or computes something else. A warning: it runs, but not as it is
    meant. Exits 1 on errors, 2 on bad input.

    Example: edgekd check model.onnx --target jetson-orin-nano --target jetson-nano
    """
    from edgekd.stages.check import check as verb

    checks = [verb(file, target=name) for name in target]
    if as_json:
        print(json.dumps([c.model_dump(mode="json") for c in checks], indent=1))
    else:
        for done in checks:
            _print_check(done)
    if not all(done.passed for done in checks):
        raise typer.Exit(1)


def _print_check(done: Check) -> None:
    """One line for each rule and operator, with the first nodes."""
    count = f"{sum(done.operators.values())} operators, opset {done.opset}"
    console = Console(width=None if Console().is_terminal else 140)
    if not done.findings:
        console.print(f"{done.path}: {done.target} takes it ({count})", highlight=False,
                      markup=False, soft_wrap=True)  # fmt: skip
        return
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in sorted(done.findings, key=lambda f: f.severity):
        groups.setdefault((finding.severity, finding.rule, finding.operator), []).append(finding)
    table = Table(title=escape(f"{done.path} on {done.target}: {count}"))
    for heading in ("", "rule", "where", "found", "limit", "remedy"):
        table.add_column(heading, overflow="fold")
    for (severity, rule, operator), found in groups.items():
        names = ", ".join(f.node for f in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        first = found[0]
        source = f" ({first.source})" if first.source else ""
        where = f"{len(found)} {operator}: {names}{more}" if operator else "the file"
        cells = (severity, rule, where, first.found, first.limit + source, first.remedy)
        table.add_row(*map(escape, cells))
    console.print(table)


def students(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    target: Annotated[
        list[str] | None, typer.Option(help="Instead of the recipe's targets; repeatable.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; repeatable."),
    ] = None,
    latency: Annotated[
        list[str] | None,
        typer.Option(help="Only members inside this budget: 5ms, or TARGET=5ms; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """The students that a recipe allows, with their estimated latency; nothing is trained.

    The largest first, by parameters and MACs: so would `edgekd run --latency` choose.

    Example: edgekd students fashion-mnist --target intel-cpu --latency 0.2ms
    """
    from edgekd.choosing.students import priced_students
    from edgekd.pipeline import new_network, task_and_data
    from edgekd.recipe import Recipe
    from edgekd.reporting.report import member_table
    from edgekd.target import Target

    loaded = Recipe.load(recipe, changes=change or (), targets=target or (), latency=latency or ())
    _, data = task_and_data(loaded)
    priced = priced_students(
        loaded, [Target.load(name) for name in loaded.targets], data=data,
        build=lambda section: new_network(section, data, loaded),
    )  # fmt: skip
    inside = [
        each for each in priced
        if all(p.estimate.p50_ms <= loaded.budget_ms.get(p.target, math.inf) for p in each.prices)
    ]  # fmt: skip
    if as_json:
        print(json.dumps([each.model_dump(mode="json") for each in inside], indent=1))
        return
    if not inside:
        raise RecipeError(f"none of {len(priced)} members is inside the budget")
    count = f"{len(inside)} of {len(priced)} members" if loaded.budget else f"{len(priced)} members"
    rows = [("", each) for each in inside]
    Console(width=None if Console().is_terminal else 140).print(
        member_table(f"{loaded.name}: {count}, estimated", rows)
    )


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder (runs/NAME), or its report.json.")],
) -> None:
    """Show the report of a run again.

    Example: edgekd report runs/fashion-mnist
    """
    from pydantic import ValidationError

    from edgekd.reporting.report import Report

    path = run if run.suffix == ".json" else run / "report" / "report.json"
    if not path.is_file():
        raise StateError(f"{path} does not exist; a run that has ended writes it (edgekd run)")
    try:
        loaded = Report.load(path)
    except (ValidationError, ValueError):
        raise StateError(
            f"{path} is damaged, or another version's; run the recipe again: what is done stays"
        ) from None
    loaded.print(Console(width=None if Console().is_terminal else 140))


def doctor(as_json: Json = False) -> None:
    """What is installed, what is missing, and the command that gets it.

    Exits 1 if edgekd cannot run.

    Example: edgekd doctor
    """
    import torch

    from edgekd.latency.measuring import host_name
    from edgekd.target import host_instruction_set

    rows = [_installed(name, *facts) for name, facts in PACKAGES.items()]
    instructions = host_instruction_set()
    exact = instructions in ("amx", "avx512_vnni", "avx_vnni", "neon")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "processor": host_name(),
        "integers": "eight-bit weights are exact" if exact else "7-bit weights: eight saturate",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "own targets": os.environ.get("EDGEKD_HOME") or "none (EDGEKD_HOME is not set)",
    }
    if as_json:
        print(json.dumps({"packages": rows, **facts}, indent=1))
    else:
        table = Table(title="packages")
        for heading in ("package", "version", "for", "to get it"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            cells = (row["name"], row["version"] or "missing", row["for"], row["remedy"])
            table.add_row(*map(escape, cells))
        console = Console(width=None if Console().is_terminal else 140)
        console.print(table)
        for name, value in facts.items():
            console.print(f"{name}: {value}", highlight=False, markup=False)
    if any(row["version"] is None and row["needed"] for row in rows):
        raise typer.Exit(1)


def _installed(name: str, purpose: str, extra: str | None) -> dict[str, Any]:
    found: str | None
    try:
        found, remedy = version(name), ""
    except PackageNotFoundError:
        package = f"'edgekd[{extra}]'" if extra else name
        found, remedy = None, f"pip install {package}"
    return {"name": name, "version": found, "for": purpose, "needed": extra is None,
            "remedy": remedy}  # fmt: skip


FACTS = (targets, check, students, report, doctor)
