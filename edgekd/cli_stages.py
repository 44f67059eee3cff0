"""The command line's single stages: one verb on one network, with a recipe for its data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from edgekd.cli_profile import profile
from edgekd.errors import RecipeError, StateError

Folder = Annotated[
    Path, typer.Argument(help="A network: a folder with spec.json, as stages write.")
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", help="A recipe file or a shipped name: data, task and options.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; repeatable."),
]
Out = Annotated[Path, typer.Option(help="The folder to write to.")]
TargetOption = Annotated[str, typer.Option(help="A target's name (edgekd targets).")]
TeacherOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="A network to learn from, or an ONNX file; repeatable: an ensemble; none: labels only."
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Run a model's factory outside edgekd, torchvision, timm.")
]


@dataclass(frozen=True)
class _Given:
    """What a recipe says, loaded."""

    recipe: Any
    task: Any
    data: Any

    @property
    def learning(self) -> dict[str, Any]:
        return {"task": self.task, "data": self.data, "seed": self.recipe.seed}


def _given(recipe: str, changes: list[str] | None) -> _Given:
    from edgekd.pipeline import task_and_data
    from edgekd.recipe import Recipe

    loaded = Recipe.load(recipe, changes=changes or ())
    return _Given(loaded, *task_and_data(loaded))


def _load(folder: Path, trust: bool) -> Any:
    from edgekd.network import Network

    return Network.load(folder, trust=trust)


def _teachers(paths: list[Path] | None, trust: bool) -> Any:
    from edgekd.knowledge.teachers import OnnxTeacher

    return [
        OnnxTeacher(path) if path.suffix == ".onnx" else _load(path, trust) for path in paths or ()
    ] or None


def _contents(path: Path) -> dict[str, str]:
    """File -> SHA-256 of a network's folder, or of an ONNX file: they may change in place."""
    from edgekd.models.build import weights_sha256

    onnx = path.suffix == ".onnx"
    files = [path] if onnx else [path / "spec.json", path / "weights.safetensors"]
    return {str(file): weights_sha256(file) for file in files}


def _stage(
    out: Path, inputs: dict[str, Any], given: _Given | None, make: Callable[[Any], Any]
) -> None:
    """Make the network in `out`, resuming the same command, and say what came out.

    Args:
        inputs: what the network comes from besides what the recipe says, with its contents.
    """
    from edgekd.files import write_atomically
    from edgekd.rundir import RunDir
    from edgekd.training import evaluate, fabric

    run = RunDir(out)
    if run.done() is not None:
        raise StateError(f"{out} holds a finished stage; give another folder, or remove it")
    if given is not None:
        inputs |= {"recipe": given.recipe.model_dump(), "data": given.data.fingerprint}
    text = json.dumps(inputs, sort_keys=True, default=str)
    started = out / "inputs.json"
    begun = started.exists() and (out / "last.ckpt").exists()  # before it there is nothing to keep
    if begun and started.read_text() != text:
        raise StateError(
            f"{out} holds a stage that was begun with other options, networks or data; give "
            "another folder, or remove it"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(started, text)
    net = make(run)
    record: dict[str, Any] = {}
    said = f"{net.params:,} parameters, {net.macs / 1e6:.2f} M MACs"
    if given is not None:
        score = evaluate(net, task=given.task, data=given.data, on=fabric())
        record["score"] = score.model_dump(mode="json")
        low, high = score.ci95
        said = f"{given.task.metric_name} {score.value:.2%} ({low:.2%} to {high:.2%}), {said}"
    net.save(out)
    run.finish(record)
    print(f"{out}: {said}")


def distill(
    recipe: RecipeOption,
    out: Out,
    student: Annotated[
        Path | None, typer.Option(help="A network to train; none: the recipe's \\[student].")
    ] = None,
    teacher: TeacherOption = None,
    change: Changes = None,
    trust: Trust = False,
) -> None:
    """Train a float network, from a teacher or plainly.

    Example: edgekd distill --recipe my.toml --teacher runs/my/teacher-1a2b --out student

    Example: edgekd distill --recipe my.toml --teacher wide --teacher theirs.onnx --out student
    """
    from edgekd.models.build import source_sha256, weights_sha256
    from edgekd.pipeline import new_network, trainable
    from edgekd.stages.distill import distill as verb

    given = _given(recipe, change)
    options = given.recipe.distill.model_dump()
    if not teacher:
        options["hints"] = ()
    made: dict[str, Any]  # what the student is made of
    if student is not None:
        net, made = _load(student, trust), _contents(student)
    else:
        section = given.recipe.student
        net = new_network(section, given.data, given.recipe)
        made = {"source": source_sha256(section.build())}
        made["weights"] = None if section.weights is None else weights_sha256(section.weights)
    trainable(net, given.task, "the student")
    teachers = _teachers(teacher, trust)
    inputs = {"distill": made, "teacher": [_contents(path) for path in teacher or ()]}
    _stage(out, inputs, given, lambda run: verb(
        net, teacher=teachers, run=run, **given.learning, **options
    ))  # fmt: skip


def prune(
    network: Folder,
    out: Out,
    ratio: Annotated[float | None, typer.Option(help="Share of the channels to remove.")] = None,
    macs: Annotated[float | None, typer.Option(help="MACs to keep: a share or a count.")] = None,
    params: Annotated[float | None, typer.Option(help="Parameters to keep, likewise.")] = None,
    round_to: Annotated[int | None, typer.Option(help="Widths are multiples of this.")] = None,
    target: Annotated[str | None, typer.Option(help="A target, for its multiple.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help=r"With its \[prune] section: retrains too.")
    ] = None,
    teacher: TeacherOption = None,
    change: Changes = None,
    trust: Trust = False,
) -> None:
    """Remove whole channels; with a recipe, retrain.

    Example: edgekd prune runs/my/distill-1a2b --ratio 0.3 --out narrow

    Example: edgekd prune runs/my/distill-1a2b --recipe my.toml --out narrow
    """
    from edgekd.stages.prune import prune as verb

    goals = {"ratio": ratio, "macs": macs, "params": params}
    options: dict[str, Any] = {}
    given = None
    if recipe is not None:
        given = _given(recipe, change)
        if given.recipe.prune is None:
            raise RecipeError(f"{recipe} has no [prune] section; add one, or leave --recipe out")
        options = given.recipe.prune.model_dump() | given.learning
        if not teacher:
            options["hints"] = ()
    if any(goal is not None for goal in goals.values()):
        options |= goals
    if options.get("ratio") == "auto":
        raise RecipeError(
            'prune.ratio = "auto" is chosen under a budget by edgekd run; here give --ratio'
        )
    if round_to is not None:
        options["round_to"] = round_to
    net = _load(network, trust)
    teachers = _teachers(teacher, trust)
    plain = {name: value for name, value in options.items() if name not in ("task", "data")}
    inputs = {"prune": _contents(network), "teacher": [_contents(path) for path in teacher or ()],
              "target": target, "options": plain}  # fmt: skip
    _stage(out, inputs, given, lambda run: verb(
        net, target=target, teacher=teachers, run=run, **options
    ))  # fmt: skip


def quantize(
    network: Folder,
    recipe: RecipeOption,
    target: TargetOption,
    out: Out,
    teacher: TeacherOption = None,
    change: Changes = None,
    trust: Trust = False,
) -> None:
    """Turn a float network into a target's integers; trained further if quantize.epochs.

    Example: edgekd quantize runs/my/distill-1a2b --recipe my.toml --target intel-cpu --out q
    """
    from edgekd.stages.quantize import quantize as verb

    given = _given(recipe, change)
    options = given.recipe.quantize.model_dump()
    if not teacher:
        options["hints"] = ()
    net = _load(network, trust)
    teachers = _teachers(teacher, trust)
    inputs = {"quantize": _contents(network), "target": target,
              "teacher": [_contents(path) for path in teacher or ()]}  # fmt: skip
    _stage(out, inputs, given, lambda run: verb(
        net, target=target, teacher=teachers, run=run, **given.learning, **options
    ))  # fmt: skip


def export(
    network: Annotated[
        Path, typer.Argument(help="A network's folder, a run's (runs/NAME), or an ONNX file.")
    ],
    target: Annotated[list[str], typer.Option(help="A target's name; repeatable.")],
    out: Out,
    build: Annotated[bool, typer.Option("--build", help="Build and check it on --device.")] = False,
    device: Annotated[str | None, typer.Option(help="ssh://user@host:port, for --build.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT=1x3x224x224", help="Fix an ONNX file's input; repeatable."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Write what a target runs; with several, into a folder for each.

    Of a run's folder, each target gets the last network that it takes.

    With --build, exits 1 if the engine is not built, or its outputs are not the expected ones.

    Example: edgekd export runs/my/quantize-1a2b --target intel-cpu --out artifact

    Example: edgekd export runs/my --target jetson-nano --out artifact

    Example: edgekd export theirs.onnx --target jetson-nano --shape input=1x3x224x224 --out nano

    Example: edgekd export q --target jetson-orin-nano --out o --build --device ssh://me@orin
    """
    from edgekd.devices.build import build_on
    from edgekd.rundir import final_network
    from edgekd.stages.adapt import adapt
    from edgekd.stages.export import export as verb
    from edgekd.target import Target

    if build != (device is not None):
        raise RecipeError("--build and --device ssh://user@host go together; give both or none")
    if device is not None and len(target) > 1:
        raise RecipeError(f"--device is one target's; {len(target)} are given: export each alone")
    if shape and network.suffix != ".onnx":
        raise RecipeError(f"--shape is for an ONNX file; {network} has its network's shapes")
    nets: dict[Path, Any] = {}
    for name in target:
        folder, note = out if len(target) == 1 else out / name, ""
        if network.suffix == ".onnx":
            artifact, error = adapt(network, target=name, out=folder, shapes=_shapes(shape or ()))
            note = f", relative error {error:.3g} against {network}"
        else:
            place = final_network(network, Target.load(name))
            if place not in nets:
                nets[place] = _load(place, trust)
            artifact = verb(nets[place], target=name, out=folder)
        print(f"{artifact.path}: {artifact.precision}, {artifact.size_bytes:,} bytes{note}")
        if device is not None:
            built = build_on(artifact, device=device)
            print(f"{built.host}: TensorRT {built.tensorrt}, {built.result}", built.reason or "")
            if built.result == "failed":
                print(*built.tail, sep="\n")
                raise typer.Exit(1)


def _shapes(given: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Of `INPUT=1x3x224x224`."""
    shapes = {}
    for text in given:
        name, _, dims = text.rpartition("=")
        if not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims):
            raise RecipeError(f"--shape {text}: give it as INPUT=1x3x224x224")
        shapes[name] = tuple(map(int, dims.split("x")))
    return shapes


def verify(
    artifact: Annotated[Path, typer.Argument(help="The folder of an artifact.")],
    network: Folder,
    recipe: RecipeOption,
    change: Changes = None,
    trust: Trust = False,
) -> None:
    """Compare an artifact with the network it came from, over the whole test split.

    Exits 1 if the gate is not passed.

    Example: edgekd verify artifact runs/my/quantize-1a2b --recipe my.toml
    """
    from edgekd.files import write_atomically
    from edgekd.runtimes.base import Artifact
    from edgekd.stages.verify import verify as verb

    given = _given(recipe, change)
    parity = verb(
        Artifact.load(artifact), _load(network, trust), data=given.data, task=given.task,
        **given.recipe.verify.model_dump(),
    )  # fmt: skip
    write_atomically(artifact / "parity.json", parity.model_dump_json(indent=1))
    table = Table(title=f"{parity.target} {parity.precision}: {parity.gate}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    shown = parity.model_dump(exclude={"target", "precision", "gate", "local"})
    shown |= parity.local.summaries if parity.local else {}
    for name, value in shown.items():
        if value not in (None, (), []):
            table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if parity.gate != "passed":
        raise typer.Exit(1)


def calibrate(
    target: TargetOption,
    device: Annotated[
        str, typer.Option(help="local, or a link: ssh://user@host:port, adb://serial.")
    ] = "local",
    related: Annotated[
        str | None, typer.Option("--from", help="A related target whose profile adapts to it.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    minutes: Annotated[float, typer.Option(help="Start no other network after this.")] = 10.0,
) -> None:
    """Measure up to 20 small networks on a device, and fit its latency model.

    Broken off, the same command goes on. The rows are in $EDGEKD_HOME/profiles, or
    ~/.edgekd/profiles.

    Example: edgekd calibrate --target host-onnxruntime

    Example: edgekd calibrate --target jetson-orin-nano --device ssh://me@orin --from jetson-nano
    """
    from edgekd.latency.calibrate import calibrate as verb

    done = verb(target, device=device, related=related, threads=threads, minutes=minutes)
    print(done.summary)


STAGES = (distill, prune, quantize, export, verify, profile, calibrate)
