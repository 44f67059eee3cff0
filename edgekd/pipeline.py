"""run: a recipe's tree of stages, each in a folder named by all that went into it.

    teacher ─► distill ─► [prune] ─┬─► export <target> fp32 ─┐
                                   └─► quantize <scheme> ─► export <target> int8 ─► profile <target>

A stage whose folder is done is skipped; one with a checkpoint goes on from it. Targets that want
the same integers share one quantize stage.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.fx import GraphModule

from edgekd import __version__
from edgekd.choosing.choice import Choice
from edgekd.choosing.students import choose_student, multiple, with_choice
from edgekd.data.base import Data, evaluation_batches
from edgekd.data.readers import read_data
from edgekd.errors import MissingPackageError, ModelError, RecipeError, StateError
from edgekd.files import write_atomically
from edgekd.latency.measuring import Measurement, host_name
from edgekd.latency.profiles import imported_ms, profile_sha256
from edgekd.models.build import build_module, load_weights, source_sha256, weights_sha256
from edgekd.network import Network
from edgekd.quantization.capture import capture
from edgekd.quantization.placement import describe, left_in_float
from edgekd.quantization.sensitivity import Sensitivity
from edgekd.recipe import PruneSection, Recipe, StudentSection, TeacherSection
from edgekd.reporting.progress import console
from edgekd.reporting.report import (
    ArtifactRow,
    BudgetRow,
    ControlRow,
    DataRow,
    Latency,
    Report,
    SampleRow,
    StageRow,
    TeacherRow,
)
from edgekd.rundir import RunDir
from edgekd.runtimes.base import Artifact, Session, get_runtime, verifying_runtime
from edgekd.runtimes.openvino import nncf_post_training
from edgekd.stages.distill import distill
from edgekd.stages.export import export
from edgekd.stages.profile import profile_together
from edgekd.stages.prune import prune
from edgekd.stages.quantize import calibration_inputs, quantize
from edgekd.stages.verify import Parity, verify, verifying_session
from edgekd.target import QuantScheme, Target, host_instruction_set
from edgekd.tasks.base import Curves, Difference, Score, Task, get_task
from edgekd.training import evaluate, fabric, gather, predict

SAMPLES = 3  # test images that the report shows
# raised when a stage's meaning changes, so that folders of older versions are not taken for it
STAGE_VERSIONS = {"choice": 1, "teacher": 1, "distill": 1, "prune": 1, "quantize": 3, "export": 4}
_SAMPLE_ROWS = TypeAdapter(tuple[SampleRow, ...])
TEACHER_REMEDY = (
    "give teacher.model with teacher.weights (a trained state dict) or teacher.epochs (to train it "
    "here)"
)


@dataclass(frozen=True)
class Node:
    """A finished stage with a network: what it gave, and the key that stands for it."""

    key: str
    net: Network
    score: Score


def run(recipe: Recipe | str | Path, *, out: str | Path = "runs", fresh: bool = False) -> Report:
    """Carry out a recipe; continue it where an earlier call ended.

    Args:
        recipe: a Recipe, a file, or the name of a shipped one.
        out: the folder of runs; this one's is `out/<name>`.
        fresh: do everything again; what the same inputs gave before is deleted.

    Returns:
        The report, which is also in `out/<name>/report/report.json`. `passed` is False if a gate
        failed or could not be checked.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if os.environ.get("LT_CLI_USED"):
        raise RecipeError(
            "a recipe runs in one process; call edgekd.distill from your own script "
            "to train on several devices"
        )
    if what := recipe.needs_budget:
        raise RecipeError(
            f"{what} is chosen under a budget: give budget.latency_ms, or --latency 5ms"
        )
    targets = [Target.load(name) for name in recipe.targets]
    for target in targets:
        get_runtime(target.runtime).version()  # a missing package is found before any training
    folder = Path(out) / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        return _Run(recipe, targets, folder, fresh).report()


def task_and_data(recipe: Recipe) -> tuple[Task, Data]:
    """What a recipe's sections of these names say."""
    options = recipe.task.model_dump(exclude_unset=True, exclude={"name"})
    task = get_task(recipe.task.name, **options)
    normalised = recipe.data.model_dump(include={"mean", "std"}, exclude_none=True)
    data = read_data(**recipe.data.model_dump(exclude={"mean", "std"}))
    if normalised:
        known = data.preprocessing.model_copy(update=normalised)
        data = replace(data, preprocessing=known)
    return task, data


def new_network(section: StudentSection, data: Data, recipe: Recipe) -> Network:
    """Built by its name for the data, seeded, with the section's weights if it has any."""
    build = section.build()
    known = {"num_classes": len(data.classes)}
    if build.model.startswith("edgekd/"):
        known["in_channels"] = data.image_shape[0]
    if ":" not in build.model:
        build = build.model_copy(update={"kwargs": known | build.kwargs})
    torch.manual_seed(recipe.seed)
    # the recipe's author named the callable: that is the trust it needs
    module = build_module(build, trust=True, origin=f"recipe {recipe.name}")
    if section.weights is not None:
        load_weights(module, section.weights)
    return Network(
        module,
        torch.zeros(1, *data.image_shape),
        preprocessing=data.preprocessing,
        labels=data.classes,
        build=build.without_fetching(),
    )


def trainable(net: Network, task: Task, name: str) -> Network:
    """`net`, if its outputs are the task's, in evaluation and in training.

    Raises:
        ModelError: they are not; `name` is what the message calls it.
    """
    trial = net.copy()
    for mode in ("evaluation", "training"):
        trial.train_mode(mode == "training")
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=()):
                task.check(trial.module(*trial.io.example(2)), net.io)
        except Exception as error:  # a module may fail in any way
            raise ModelError(f"{name}, in {mode}: {str(error).strip()}") from error
    return net


class _Run:
    """One recipe being carried out."""

    def __init__(self, recipe: Recipe, targets: list[Target], folder: Path, fresh: bool) -> None:
        self.recipe, self.targets, self.folder, self.fresh = recipe, targets, folder, fresh
        self._asked: set[Path] = set()  # folders that this run has named: fresh empties each once
        self.task, self.data = task_and_data(recipe)
        self._learning: dict[str, Any] = {
            "task": self.task, "data": self.data, "seed": recipe.seed, "cache": folder / "cache"
        }  # fmt: skip
        self.versions = {
            "edgekd": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("torchao", "onnx", "onnxruntime")},
        }

    def report(self) -> Report:
        """Every stage in order, then the report."""
        choice = self._chosen()
        teacher, *others = self.teachers()
        taught = [teacher, *others]
        distilled = student = self.student(taught)
        stages = [
            self._row(f"teacher {number}", other, self._teacher_note(number - 1))
            for number, other in enumerate(others, 2)
        ]
        source = "the teachers" if others else "the teacher"
        stages.append(self._row("student", student, f"distilled from {source}"))
        if self.recipe.prune is not None:
            student = self.pruned(self.recipe.prune, student, taught)
            stages.append(self._row("pruned", student, self._prune_note(self.recipe.prune)))
        quantized: dict[QuantScheme, Node] = {}
        controls: list[ControlRow] = []
        if self.recipe.controls:
            controls = self.controls(taught, distilled, student)
        for target in self.targets:
            scheme = target.scheme
            if scheme is None:
                console.print(f"{target.name}: quantize is skipped{target.why_float}")
            if scheme is None or scheme in quantized:
                continue
            quantized[scheme] = node = self.quantized(target, student, taught)
            name = f"quantized{'' if len(quantized) == 1 else f' {len(quantized)}'}"
            stages.append(self._row(name, node, self._quantize_note(node)))
            if self.recipe.controls and self.recipe.quantize.epochs:
                plain = self.quantized(target, student, taught, epochs=0)
                controls.append(self._control("post-training only", plain, name, node))
            if self.recipe.controls and target.runtime == "openvino":
                controls += self._nncf(target, student, name, node)
        rows: list[ArtifactRow] = []
        latencies: list[Latency] = []
        for target in self.targets:
            nodes = [student] if target.float_precision else []
            nodes += [quantized[target.scheme]] if target.scheme else []
            of_target, of_teacher = self.artifacts(target, nodes, teacher)
            rows += of_target
            latencies += of_teacher
        budgets = [] if choice is None else self._budgets(choice, rows)
        teacher_row = TeacherRow(
            **self._row("teacher", teacher, self._teacher_note(0)).model_dump(),
            latency=tuple(latencies),
        )
        curves, samples = self._compared(teacher, student, rows)
        report = Report(
            name=self.recipe.name,
            note=self.recipe.note,
            metric_name=self.task.metric_name,
            passed=all(row.gate == "passed" for row in rows) and all(map(self._kept, budgets)),
            seed=self.recipe.seed,
            data=DataRow(
                name=self.data.name,
                fingerprint=self.data.fingerprint,
                train=len(self.data.splits["train"]),
                test=len(self.data.splits["test"]),
                classes=tuple(self.data.classes),
            ),
            teacher=teacher_row,
            stages=tuple(stages),
            artifacts=tuple(rows),
            budgets=tuple(budgets),
            choice=choice,
            controls=tuple(controls),
            curves=curves,
            samples=samples,
            host=host_name(),
            versions=self.versions,
            path=str(self.folder / "report" / "report.json"),
        )
        report.save()
        return report

    def _chosen(self) -> Choice | None:
        """Where the recipe has a budget: its student, which takes the place of the section."""
        recipe = self.recipe
        if not recipe.budget_ms:
            return None
        inputs = {
            "student": recipe.student.model_dump(mode="json"),
            "prune": None if recipe.prune is None else recipe.prune.model_dump(mode="json"),
            "profile": recipe.profile.model_dump(),
            "budget_ms": recipe.budget_ms,
            "targets": [target.model_dump(mode="json") for target in self.targets],
            "devices": recipe.devices,
            "host": host_name(),
            "image": self.data.image_shape,
            "known": {name: profile_sha256(name) for name in recipe.budget_ms},
            "runtimes": {t.runtime: get_runtime(t.runtime).version() for t in self.targets},
        }
        folder = self._folder("choice", "choice", inputs)
        place, kept = RunDir(folder), folder / "choice.json"
        if place.done() is None:
            self._say(folder)
            choice = choose_student(  # hundreds of members: the chosen one alone is looked at
                recipe, self.targets, data=self.data, folder=folder,
                build=lambda section: new_network(section, self.data, recipe),
            )  # fmt: skip
            folder.mkdir(exist_ok=True)
            write_atomically(kept, choice.model_dump_json(indent=1))
            place.finish({"member": choice.chosen.member.name})
        choice = Choice.model_validate_json(kept.read_text())
        self.recipe = with_choice(recipe, choice)
        return choice

    # ---- networks ----------------------------------------------------------------------------

    @property
    def _teacher_sections(self) -> list[TeacherSection]:
        first = self.recipe.teacher
        return [*([] if first is None else [first]), *self.recipe.teachers]

    def teachers(self) -> list[Node]:
        """At least one."""
        if not (sections := self._teacher_sections):
            raise RecipeError(f"teacher: there is none; {TEACHER_REMEDY}")
        return [self.teacher(section) for section in sections]

    def teacher(self, section: TeacherSection) -> Node:
        """Given by its weights, trained further if `epochs`; or trained from scratch."""
        if not (section.weights or section.epochs or section.brings_weights):
            raise RecipeError(f"teacher: {section.model} is not trained; {TEACHER_REMEDY}")
        options = section.model_dump(include={"epochs", "batch_size", "lr", "weight_decay"})

        def make(run: RunDir) -> Network:
            net = self._network(section)
            if section.weights or section.brings_weights:
                console.print(self._normalisation, markup=False)
            if not section.epochs:
                return net
            for later in self._teacher_sections:  # what is wrong shows before any training
                if later is not section:
                    self._network(later)
            self._new_student()
            return distill(
                net, task=self.task, data=self.data, seed=self.recipe.seed, run=run, **options
            )

        return self._stage("teacher", self._inputs(section, options), make)

    @property
    def _normalisation(self) -> str:
        known = self.data.preprocessing
        said = f"  images are normalised by mean {known.mean}, std {known.std}"
        if self.recipe.data.mean is None:
            said += ", the data's; weights trained with others want data.mean and data.std"
        return said

    def student(self, teachers: list[Node], **changes: Any) -> Node:
        """Distilled from the teachers; with `changes`, or without one, a control arm."""
        section, options = self.recipe.student, self.recipe.distill.model_dump() | changes

        def make(run: RunDir) -> Network:
            return distill(
                self._new_student(), teacher=_nets(teachers) or None, run=run,
                **self._learning, **options,
            )  # fmt: skip

        inputs = self._inputs(section, options) | {"teachers": _keys(teachers)}
        return self._stage("distill", inputs, make)

    def pruned(self, section: PruneSection, student: Node, teachers: list[Node]) -> Node:
        """Narrowed to widths that all targets take, and retrained if `epochs`."""
        options = section.model_dump() | {"round_to": multiple(self.recipe, self.targets)}

        def make(run: RunDir) -> Network:
            return prune(student.net, teacher=_nets(teachers), run=run, **self._learning, **options)

        inputs = {
            "student": student.key,
            "teachers": _keys(teachers),
            "options": options,
            "torch-pruning": version("torch-pruning"),
        }
        return self._stage("prune", inputs, make)

    def quantized(
        self, target: Target, student: Node, teachers: list[Node], **changes: Any
    ) -> Node:
        """Quantized for the target's scheme; trained with the teachers if `epochs`."""
        options = self.recipe.quantize.model_dump() | changes
        assert target.scheme is not None

        def make(run: RunDir) -> Network:
            return quantize(
                student.net, target=target, teacher=_nets(teachers), run=run,
                **self._learning, **options,
            )  # fmt: skip

        inputs = {
            "student": student.key,
            "teachers": _keys(teachers),
            "scheme": target.scheme.model_dump(mode="json"),
            "options": options,
        }
        if options["max_drop"] is not None:  # latencies have a part in the choice of layers
            inputs["known"] = profile_sha256(target)
        return self._stage("quantize", inputs, make)

    def controls(self, teachers: list[Node], distilled: Node, student: Node) -> list[ControlRow]:
        """Float stages beside the same without what each is for, on the same images."""
        alone = self.student([], hints=())
        rows = [self._control("without a teacher", alone, "student", distilled)]
        if self.recipe.distill.hints:
            plain = self.student(teachers, hints=())
            rows.append(self._control("without hints", plain, "student", distilled))
        if len(teachers) > 1:
            single = self.student(teachers[:1])
            rows.append(self._control("the first teacher alone", single, "student", distilled))
        if student is not distilled:
            rows.append(self._control("not pruned", distilled, "pruned", student))
        return rows

    def _nncf(
        self, target: Target, student: Node, against: str, stage: Node
    ) -> Iterator[ControlRow]:
        """NNCF's post-training integers of the same float file, with OpenVINO's kernels."""
        floats, artifact, _ = self._exported(target, student)
        out = floats / "nncf" / "model.xml"
        out.parent.mkdir(exist_ok=True)
        inputs = calibration_inputs(student.net.io, self.data, self.recipe.quantize.calibration)
        try:
            if not out.with_suffix(".bin").exists():  # written last
                nncf_post_training(artifact.path, [x.numpy() for (x,) in inputs], out)
        except MissingPackageError as error:
            console.print(f"{target.name}: no baseline of NNCF's: {error}", markup=False)
            return
        session = get_runtime(target.runtime).load(out, threads=torch.get_num_threads())
        net = _running(session, student.net)
        score = evaluate(net, task=self.task, data=self.data, on=fabric())
        control = Node(f"nncf-{student.key}", student.net, score)
        yield self._control("NNCF post-training", control, against, stage, net)

    def _control(
        self, name: str, control: Node, against: str, stage: Node, net: Network | None = None
    ) -> ControlRow:
        """How much more `stage` scores than `control`; kept, as both are keyed by their inputs.

        Args:
            net: what gives the control's outputs, if not its own network.
        """
        kept = self.folder / "controls" / f"{stage.key}-{control.key}.json"
        if not kept.exists():
            ours, targets = gather(predict(stage.net, self.data, on=fabric(), task=self.task))
            theirs, _ = gather(predict(net or control.net, self.data, on=fabric(), task=self.task))
            kept.parent.mkdir(exist_ok=True)
            write_atomically(kept, self.task.difference(ours, theirs, targets).model_dump_json())
        gap = Difference.model_validate_json(kept.read_text())
        return ControlRow(
            **self._row(name, control, "").model_dump(),
            against=against, difference=gap.value, difference_ci95=gap.ci95,
        )  # fmt: skip

    def _network(self, section: StudentSection) -> Network:
        return trainable(
            new_network(section, self.data, self.recipe), self.task, f"model {section.model}"
        )

    def _new_student(self) -> Network:
        """Not trained; what no exporter could capture is refused."""
        net = self._network(self.recipe.student)
        capture(net.module, net.io.example(2))
        return net

    def _inputs(self, section: StudentSection, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "build": section.build().model_dump(mode="json"),
            "source": source_sha256(section.build()),
            "weights": None if section.weights is None else weights_sha256(section.weights),
            "options": options,
        }

    # ---- one target --------------------------------------------------------------------------

    def artifacts(
        self, target: Target, nodes: list[Node], teacher: Node
    ) -> tuple[list[ArtifactRow], list[Latency]]:
        """Export, verify, measure here or over the target's link, and choose what ships."""
        done = [self._exported(target, node) for node in nodes]
        measured: list[Measurement | None] = [None] * len(done)
        latencies = []
        link = self.recipe.devices.get(target.name, "local")
        if link != "local" or (target.native_here and all(p.verifier for _, _, p in done)):
            folders = [folder for folder, _, _ in done]
            if target.float_precision:
                folders.append(self._exported(target, teacher, checked=False)[0])
            timed = self._measured(target, folders, link)
            measured = list(timed[: len(done)])
            for of_teacher in timed[len(done) :]:
                latencies.append(Latency(target=target.name, latency_p50_ms=of_teacher.p50_ms))
        took = [
            imported_ms(target, artifact.sha256) if m is None else m.p50_ms
            for (_, artifact, _), m in zip(done, measured, strict=True)
        ]
        ships, why = _choose(target, [parity for _, _, parity in done], took)
        rows = []
        for index, (folder, artifact, parity) in enumerate(done):
            measurement = measured[index]
            metric = parity.metric
            rows.append(
                ArtifactRow(
                    **artifact.model_dump(include={"target", "precision", "size_bytes", "sha256"}),
                    **parity.model_dump(
                        include={
                            "verifier", "n", "agreement", "max_steps", "mean_steps",
                            "relative_error", "integer_share", "gate", "reasons", "compiled",
                        }
                    ),
                    path=str(folder / artifact.path.name),
                    metric=None if metric is None else metric.value,
                    metric_ci95=None if metric is None else metric.ci95,
                    local=parity.local,
                    latency_p50_ms=took[index],
                    measurement=measurement,
                    ships=index == ships,
                    why=why if index == ships else "",
                )
            )  # fmt: skip
        return rows, latencies

    def _exported(
        self, target: Target, node: Node, *, checked: bool = True
    ) -> tuple[Path, Artifact, Parity]:
        """(folder, artifact, parity) of one network on one target."""
        gates = self.recipe.verify.model_dump() if checked else None
        runtime = verifying_runtime(target)
        folder = self._folder(
            f"export-{target.name}",
            "export",
            {
                "network": node.key,
                "target": target.model_dump(mode="json"),
                "gates": gates,
                "runtime": runtime.version(),
                # what compiles for the device, if anything does
                "compiler": get_runtime(target.runtime).version() if target.compile_check else None,
                # native kernels differ from CPU to CPU; the emulated check does not
                "instructions": host_instruction_set() if target.verifier == "native" else None,
            },
        )
        place = RunDir(folder)
        if place.done() is not None:
            artifact = Artifact.load(folder)
            return folder, artifact, _kept_parity(folder)
        self._say(folder)
        images = next(evaluation_batches(self.data))[0]
        artifact = export(node.net, target=target, out=folder, examples=images)
        if gates is None:
            parity = Parity(
                target=target.name, precision=artifact.precision, verifier=target.verifier,
                gate="unchecked", reasons=("exported for its latency only",),
            )  # fmt: skip
        else:
            parity = verify(artifact, node.net, data=self.data, task=self.task, **gates)
        write_atomically(folder / "parity.json", parity.model_dump_json(indent=1))
        place.finish({"gate": parity.gate})
        return folder, artifact, parity

    def _measured(self, target: Target, folders: list[Path], link: str) -> list[Measurement]:
        """Latencies of the artifacts in `folders`, timed in turns; kept beside each."""
        artifacts = [Artifact.load(folder) for folder in folders]
        hashes = tuple(artifact.sha256 for artifact in artifacts)
        kept = [_kept_measurement(folder / "measurement.json") for folder in folders]
        options = self.recipe.profile.model_dump()
        if all(
            m is not None
            and (m.compared, m.device, m.threads) == (hashes, link, options["threads"])
            and (m.runs_asked or m.runs) >= options["runs"]
            and (link != "local" or m.host == host_name())
            for m in kept
        ):
            return [m for m in kept if m is not None]
        console.print(f"profile {target.name}: {len(folders)} artifacts in turns")
        measured = profile_together(artifacts, target=target, device=link, layers=True, **options)
        for folder, measurement in zip(folders, measured, strict=True):
            write_atomically(folder / "measurement.json", measurement.model_dump_json(indent=1))
        return measured

    # ---- for the page ------------------------------------------------------------------------

    def _compared(
        self, teacher: Node, student: Node, rows: list[ArtifactRow]
    ) -> tuple[dict[str, Curves], tuple[SampleRow, ...]]:
        """Curves and sample images of the teacher, the float student and an artifact that ships.

        The artifact is one in integers, where any such ships. The images are the first ones with
        the most classes of a first batch; what is said of them is kept by the keys of all.
        """
        scores: dict[str, Score | None] = {
            "teacher": teacher.score, "student fp32": student.score
        }  # fmt: skip
        keys = [teacher.key, student.key]
        ships = [row for row in rows if row.ships and row.metric is not None]
        row = min(ships, key=lambda row: row.precision != "int8", default=None)
        if row is not None:
            folder = Path(row.path).parent
            name = f"{row.target} {row.precision}"
            name += " (emulated)" if row.verifier == "emulated" else ""
            scores[name] = _kept_parity(folder).metric
            keys.append(folder.name)
        kept = self.folder / "samples" / f"{'-'.join(keys)}.json"
        if self.fresh or not kept.is_file():
            nets = [teacher.net, student.net]
            if row is not None:
                target = next(target for target in self.targets if target.name == row.target)
                session = verifying_session(Artifact.load(folder), target)
                nets.append(_running(session, student.net))
            samples = self._samples(dict(zip(scores, nets, strict=True)))
            kept.parent.mkdir(exist_ok=True)
            write_atomically(kept, _SAMPLE_ROWS.dump_json(samples, indent=1))
        curves = {
            name: score.curves for name, score in scores.items()
            if score is not None and score.curves is not None
        }  # fmt: skip
        return curves, _SAMPLE_ROWS.validate_json(kept.read_text())

    def _samples(self, nets: dict[str, Network]) -> tuple[SampleRow, ...]:
        """The truth and what each network says of a few test images."""
        x, *targets = next(evaluation_batches(self.data))
        truth = self.task.truth(tuple(targets))
        classes = [len({mark.label for mark in marks}) for marks in truth]
        chosen = sorted(range(len(truth)), key=lambda i: -classes[i])[:SAMPLES]
        batch = (x[chosen], *(target[chosen] for target in targets))
        said = {"truth": [truth[i] for i in chosen]}
        for name, net in nets.items():
            answers, _ = gather(predict(net, [batch], on=fabric(), task=self.task))
            said[name] = self.task.marks(answers)
        pixels, *_ = self.data.splits["test"].take(torch.tensor(chosen))
        return tuple(
            SampleRow.of(image, {name: tuple(marks[i]) for name, marks in said.items()})
            for i, image in enumerate(pixels.numpy())
        )

    # ---- the budget --------------------------------------------------------------------------

    def _budgets(self, choice: Choice, rows: list[ArtifactRow]) -> list[BudgetRow]:
        """What ships, against each budget."""
        found = []
        for price in choice.chosen.prices:
            ships = next((r for r in rows if r.target == price.target and r.ships), None)
            took = None if ships is None else ships.latency_p50_ms
            budget = choice.budget_ms[price.target]
            found.append(
                BudgetRow(
                    target=price.target, budget_ms=budget, estimate=price.estimate,
                    measured_ms=took, within_budget=None if took is None else took <= budget,
                )
            )  # fmt: skip
        return found

    def _kept(self, budget: BudgetRow) -> bool:
        """An estimate keeps a budget too, unless the recipe wants it measured."""
        assert self.recipe.budget is not None
        if budget.within_budget is None:
            return not self.recipe.budget.require_measured
        return budget.within_budget

    # ---- folders -----------------------------------------------------------------------------

    def _stage(self, stage: str, inputs: dict[str, Any], make: Callable[[RunDir], Network]) -> Node:
        """The stage's network: loaded if its folder is done, made otherwise."""
        everything = {
            "data": self.data.fingerprint,
            "task": self.recipe.task.model_dump(),
            "seed": self.recipe.seed,
            **inputs,
        }
        folder = self._folder(stage, stage, everything)
        place = RunDir(folder)
        key = folder.name
        if (record := place.done()) is not None:
            net = Network.load(folder, trust=True)
            return Node(key, net, Score(**record["score"]))
        self._say(folder)
        net = make(place)
        score = evaluate(net, task=self.task, data=self.data, on=fabric())
        net.save(folder)
        place.finish({"score": score.model_dump(mode="json")})
        console.print(f"  {self.task.metric_name} {score.value:.2%}")
        return Node(key, net, score)

    def _folder(self, prefix: str, stage: str, inputs: dict[str, Any]) -> Path:
        everything = inputs | {
            "stage": [stage, STAGE_VERSIONS[stage]],
            "torch": torch.__version__,
            "torchao": version("torchao"),
        }
        text = json.dumps(everything, sort_keys=True, default=str)
        folder = self.folder / f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if self.fresh and folder.exists() and folder not in self._asked:
            shutil.rmtree(folder)
        self._asked.add(folder)
        return folder

    def _say(self, folder: Path) -> None:
        verb = "continue" if (folder / "last.ckpt").exists() else "start"
        console.print(f"{verb} {folder}", soft_wrap=True)

    # ---- words -------------------------------------------------------------------------------

    def _row(self, name: str, node: Node, note: str) -> StageRow:
        score = node.score
        table = self.folder / node.key / "sensitivity.json"
        return StageRow(
            name=name, metric=score.value, metric_ci95=score.ci95, n=score.n,
            metric_by_class=score.by_class, params=node.net.params, macs=node.net.macs, note=note,
            history=tuple(RunDir(self.folder / node.key).history()),
            sensitivity=Sensitivity.model_validate_json(table.read_text())
            if table.is_file() else None,
        )  # fmt: skip

    def _teacher_note(self, index: int) -> str:
        section = self._teacher_sections[index]
        trained = f"trained here for {section.epochs} epochs" if section.epochs else ""
        given = f"weights from {section.weights}" if section.weights else ""
        return ", then ".join(part for part in (given, trained) if part)

    def _prune_note(self, section: PruneSection) -> str:
        goals = section.model_dump(include={"ratio", "macs", "params"}, exclude_none=True)
        goal = ", ".join(f"{name} = {value:g}" for name, value in goals.items())
        retrained = f"retrained for {section.epochs} epochs" if section.epochs else "not retrained"
        return f"{goal}, {retrained}"

    def _quantize_note(self, node: Node) -> str:
        epochs = self.recipe.quantize.epochs
        note = f"distilled in integers for {epochs} epochs" if epochs else "post-training"
        assert isinstance(node.net.module, GraphModule)
        floating = left_in_float(node.net.module)
        kept = ", ".join(node.net.float_layers)
        note += f"; {describe(floating)} in float" if floating else ""
        return note + (f" (layers {kept})" if kept else "")


def _nets(teachers: list[Node]) -> list[Network]:
    return [teacher.net for teacher in teachers]


def _keys(teachers: list[Node]) -> list[str]:
    return [teacher.key for teacher in teachers]


def _choose(
    target: Target, parities: list[Parity], took_ms: list[float | None]
) -> tuple[int | None, str]:
    """Index of what ships, and why: the faster where measured, else what the target prefers."""
    sound = [i for i, parity in enumerate(parities) if parity.gate == "passed"]
    if not sound:
        return None, "no artifact passed its gate"
    timed = {i: ms for i in sound if (ms := took_ms[i]) is not None}
    if len(timed) == len(sound) > 1:
        ranked = sorted(timed, key=lambda i: timed[i])
        best, other = ranked[0], ranked[1]
        return best, (
            f"{timed[other] / timed[best]:.2f}× the speed of {parities[other].precision} "
            f"({timed[best]:.3f} against {timed[other]:.3f} ms)"
        )
    preferred = max(sound, key=lambda i: target.precisions.index(parities[i].precision))
    how = "not measured: not this host" if target.verifier == "emulated" else "the only one sound"
    return preferred, f"{target.name} prefers it ({how})"


def _running(session: Session, net: Network) -> Network:
    """A copy of `net` whose outputs are those of a loaded artifact."""
    net = net.copy()
    net.module = _OfSession(session)
    return net


class _OfSession(nn.Module):
    """A loaded artifact where a module is wanted."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, x: torch.Tensor) -> Any:
        found = [torch.from_numpy(y) for y in self.session([x.cpu().numpy()])]
        return found[0] if len(found) == 1 else tuple(found)


def _kept_parity(folder: Path) -> Parity:
    return Parity.model_validate_json((folder / "parity.json").read_text())


def _kept_measurement(path: Path) -> Measurement | None:
    if not path.is_file():
        return None
    with contextlib.suppress(ValidationError):  # measure.py, run by hand, writes its own there
        return Measurement.model_validate_json(path.read_text())
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in a run's folder; the lock ends with the process."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateError(f"another edgekd is at work in {folder}; wait for it") from None
        yield
