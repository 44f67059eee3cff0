"""A recipe carried out: the report, what is done once, what is done again, and being killed."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from edgekd import pipeline
from edgekd.cli import app
from edgekd.errors import MissingPackageError, ModelError, RecipeError, StateError
from edgekd.latency.measuring import Measurement, host_name
from edgekd.latency.profiles import import_measurement
from edgekd.models.resnet import resnet
from edgekd.network import Network
from edgekd.recipe import Recipe
from edgekd.reporting.page import page
from edgekd.reporting.report import Report
from edgekd.rundir import RunDir
from edgekd.runtimes.base import Artifact
from edgekd.stages.export import export
from edgekd.stages.verify import Parity, verify
from edgekd.target import Target

try:
    import openvino  # noqa: F401
except ImportError:
    NATIVE = ("host-onnxruntime",)
else:
    NATIVE = ("host-onnxruntime", "intel-cpu")
EMULATED = "android-arm64"
NANO = "jetson-nano"  # emulated too, with peak figures for a roofline
VERBS = ("distill", "quantize", "export", "verify", "profile_together")
TRAINED = ("teacher", "distill", "quantize")

SOURCE = '''
"""Twelve by twelve pixels of noise; the brightest quadrant is the class."""

import numpy as np
import torch
from torch import nn

from edgekd import Data, Preprocessing
from edgekd.data.base import InMemory


def images(count, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 100, (count, 1, 12, 12), dtype=np.uint8)
    labels = np.arange(count) % 4
    for image, label in zip(pixels, labels):
        row, column = 6 * (label // 2), 6 * (label % 2)
        image[0, row : row + 6, column : column + 6] += 120
    return InMemory(torch.from_numpy(pixels), torch.from_numpy(labels))


def quadrants():
    splits = {"train": images(192, 0), "test": images(96, 1)}
    preprocessing = Preprocessing(mean=(0.4,), std=(0.25,))
    return Data("quadrants", splits, ("nw", "ne", "sw", "se"), preprocessing)


def plain(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 4),
    )


class Auxiliary(nn.Module):
    """Two outputs in training, as GoogLeNet has them."""

    def __init__(self):
        super().__init__()
        self.net = plain(4)

    def forward(self, x):
        y = self.net(x)
        return (y, y) if self.training else y


class Fixed(Auxiliary):
    """A batch that only Python knows."""

    def forward(self, x):
        return self.net(x).view(int(x.shape[0]), -1)
'''
RECIPE = """
name = "tiny"
seed = 1
targets = ["host-onnxruntime"]

[data]
source = "quadrants_source:quadrants"
augment = ["crop"]

[teacher]
model = "quadrants_source:plain"
kwargs = { width = 16 }
epochs = 4
batch_size = 32
lr = 0.05

[student]
model = "edgekd/resnet"
kwargs = { widths = [8, 16] }

[distill]
epochs = 6
batch_size = 32
lr = 0.1

[quantize]
epochs = 2
batch_size = 32
calibration = 128

[verify]
agreement = 0.97
metric_gap = 0.03

[profile]
runs = 20
"""
TARGET = """
name = "{name}"
title = "{name}"
runtime = "onnxruntime"
runtime_version = "1.31"
opset = 18
verifier = "emulated"
precisions = ["fp32", "int8"]
channel_multiple = {{ value = 8, source = "default" }}

[scheme]
activation_dtype = "uint8"
activation_symmetric = false
weight_bits = {bits}
weight_granularity = "channel"
bias = "int32"
add_inputs = "both"
outputs = true
ops = {ops}
"""
ALL_OPS = '["conv", "linear", "add", "concat", "pool"]'
POST_TRAINING = ("quantize.epochs=0", "teacher.epochs=2", "distill.epochs=4")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Path]:
    """A folder with the data's module, on `sys.path`, the recipe, and three targets."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "quadrants_source.py").write_text(SOURCE)
    (folder / "tiny.toml").write_text(RECIPE)
    (folder / "targets").mkdir()
    for name, bits, ops in (
        ("board", 8, ALL_OPS),
        ("sister", 8, ALL_OPS),
        ("other", 7, ALL_OPS),
        ("half", 8, '["conv", "add"]'),
    ):
        text = TARGET.format(name=name, bits=bits, ops=ops)
        (folder / "targets" / f"{name}.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("EDGEKD_HOME", str(folder))
        yield folder


def load(project: Path, *changes: str, targets: tuple[str, ...] = ()) -> Recipe:
    return Recipe.load(project / "tiny.toml", changes=changes, targets=targets)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(project, out) -> Report:
    """The recipe for every target of this host and one that is not this host."""
    return pipeline.run(load(project, targets=(*NATIVE, EMULATED)), out=out)


def cheap_export(net: Network, *, target: Target, out: Path, examples: Any = None) -> Artifact:
    """A file of its own for each network, in no time."""
    digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in net.state().values()))
    Path(out).mkdir(exist_ok=True)
    (out / "model.bin").write_bytes(digest.digest())
    precision = target.float_precision if net.scheme is None else "int8"
    return Artifact.of(out / "model.bin", target=target, precision=precision, versions={})


def cheap_verify(artifact: Artifact, net: Network, **_: Any) -> Parity:
    """Passed."""
    return Parity(
        target=artifact.target, precision=artifact.precision, verifier="native", gate="passed"
    )


def cheap_profile(
    artifacts: list[Artifact], *, target: Target, layers: bool, **options: Any
) -> Any:
    """One millisecond each."""
    hashes = tuple(artifact.sha256 for artifact in artifacts)
    return [
        Measurement(
            target=target.name, sha256=digest, p50_ms=1, p90_ms=1, p99_ms=1, clock="cpu",
            warm_up_runs=0, load_ms=1, peak_memory_mib=None, runtime="", runtime_version="",
            host=host_name(), instruction_set="", date="", compared=hashes, **options,
        )
        for digest in hashes
    ]  # fmt: skip


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often the pipeline calls each verb; the slow ones, tested elsewhere, are stood in for."""
    count = dict.fromkeys(VERBS, 0)
    cheap = {"export": cheap_export, "verify": cheap_verify, "profile_together": cheap_profile}

    def counted(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            count[verb] += 1
            return function(*args, **options)

        return call

    for verb in VERBS:
        function = cheap.get(verb, getattr(pipeline, verb))
        monkeypatch.setattr(pipeline, verb, counted(verb, function))
    return count


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """(inode, time) of each file, the report aside."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and path.parent.name != "report"
    }


def weights(folder: Path) -> dict[str, bytes]:
    """Stage folder -> its weights, byte by byte."""
    return {p.parent.name: p.read_bytes() for p in sorted(folder.glob("*/weights.safetensors"))}


def stages(folder: Path) -> dict[str, int]:
    """Kind of stage -> number of its folders."""
    kinds = [p.name.rpartition("-")[0] for p in folder.glob("*-*") if p.is_dir()]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


# ---- a budget ----------------------------------------------------------------------------------

SPACE = (
    "student.space={scale=[0.5, 1.0, 2.0], depths=[1, 2]}", "distill.epochs=1",
    "teacher.epochs=1", "quantize.epochs=0",
)  # fmt: skip


def budgeted(project: Path, latency: str, *changes: str, targets: tuple[str, ...] = ()) -> Recipe:
    return Recipe.load(
        project / "tiny.toml", changes=(*SPACE, *changes), targets=targets, latency=[latency]
    )


@pytest.fixture(scope="module")
def under_budget(project, tmp_path_factory) -> tuple[Path, Report]:
    """With a budget that the largest member keeps."""
    folder = tmp_path_factory.mktemp("budget")
    return folder, pipeline.run(budgeted(project, "1s"), out=folder)


def test_the_student_is_chosen_measured_and_trained(under_budget):
    _, report = under_budget
    assert report.choice is not None
    chosen = report.choice.chosen
    assert chosen.member.section.kwargs["scale"] == 2.0
    assert chosen.member.section.kwargs["depths"] == 2
    assert report.choice.considered == 6
    assert {p.member.name for p in report.choice.left_out} | {chosen.member.name} == {
        f"edgekd/resnet scale={scale} depths={depths}"
        for scale in (0.5, 1.0, 2.0) for depths in (1, 2)
    }  # fmt: skip
    student = next(stage for stage in report.stages if stage.name == "student")
    assert (student.params, student.macs) == (chosen.member.params, chosen.member.macs)
    (budget,) = report.budgets
    ships = next(row for row in report.artifacts if row.ships)
    assert (budget.target, budget.budget_ms) == ("host-onnxruntime", 1000.0)
    assert budget.measured_ms == ships.latency_p50_ms
    assert budget.within_budget is True
    shown = io.StringIO()
    report.print(Console(file=shown, width=200))
    assert "chosen of 6 under host-onnxruntime 1000 ms" in shown.getvalue()
    assert "budget 1000 ms" in shown.getvalue() and "kept" in shown.getvalue()
    assert "chosen" in report.page_path.read_text()


def test_a_choice_is_made_once(project, under_budget, monkeypatch):
    folder, report = under_budget
    before = snapshot(folder)
    monkeypatch.setattr(pipeline, "choose_student", None)
    again = pipeline.run(budgeted(project, "1s"), out=folder)
    assert snapshot(folder) == before
    assert again.choice == report.choice


def test_a_broken_off_choice_goes_on_with_what_was_measured(project, tmp_path, monkeypatch):
    from edgekd.choosing import students

    asked = []

    def profiled(artifacts: Any, **options: Any) -> Any:
        if asked:
            raise KeyboardInterrupt
        asked.append(len(artifacts))
        return [types.SimpleNamespace(p50_ms=900.0) for _ in artifacts]

    monkeypatch.setattr(students, "profile_together", profiled)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(budgeted(project, "800ms"), out=tmp_path)
    (kept,) = tmp_path.glob("tiny/choice-*/*.json")
    assert json.loads(kept.read_text()) == {"host-onnxruntime": {"fp32": 900.0, "int8": 900.0}}
    built = []
    monkeypatch.setattr(students, "quantize", lambda *a, **k: built.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the next member, not the first again
        pipeline.run(budgeted(project, "800ms"), out=tmp_path)
    assert built == [1]
    assert list(tmp_path.glob("tiny/choice-*/*.json")) == [kept]


def test_a_budget_out_of_reach_ends_before_any_training(project, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(pipeline, "trainable", None)  # members are priced, and not run
    with pytest.raises(RecipeError, match=r"0\.0001 on host-onnxruntime is out of reach"):
        pipeline.run(budgeted(project, "0.1us"), out=tmp_path)
    assert calls["distill"] == 0


def test_what_is_not_measured_is_not_within_a_budget(project, tmp_path, calls):
    """An estimate chooses; `require_measured` makes it fail."""
    recipe = budgeted(project, "1s", targets=(NANO,))
    report = pipeline.run(recipe, out=tmp_path)
    (budget,) = report.budgets
    assert (budget.measured_ms, budget.within_budget) == (None, None)
    assert "edgekd profile --import measurement.json" in budget.summary
    assert report.passed and report.choice is not None and report.choice.rounds == ()
    strict = budgeted(
        project, "1s", "budget.require_measured=true", targets=(NANO,)
    )  # fmt: skip
    assert not pipeline.run(strict, out=tmp_path).passed


def test_a_measurement_by_hand_decides_and_corrects_the_choice(
    project, tmp_path, calls, monkeypatch
):
    """Estimated at first; measured too slow by hand, the next run takes a smaller student."""
    for name in ("targets", "quadrants_source.py"):
        (tmp_path / "home").mkdir(exist_ok=True)
        (tmp_path / "home" / name).symlink_to(project / name)
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    recipe = budgeted(project, "50ms", targets=(NANO,))
    first = pipeline.run(recipe, out=tmp_path)
    (budget,) = first.budgets
    assert budget.within_budget is None
    ships = next(row for row in first.artifacts if row.ships)
    (student,) = (tmp_path / "tiny").glob("distill-*")

    def by_hand(ms: float) -> None:
        raw = {
            "format": 1, "target": NANO, "runtime": "tensorrt", "runtime_version": "8.2",
            "threads": 1, "clock": "wall", "date": "2026-01-01", "conditions": {},
            "machine": {"node": "phone", "machine": "aarch64"}, "precision": ships.precision,
            "network": Network.load(student, trust=True).architecture,
            "files": [{"file": "model.onnx", "sha256": ships.sha256, "size_bytes": 1,
                       "warm_up_runs": 1, "wall_ms": [ms] * 20}],
        }  # fmt: skip
        (tmp_path / "measurement.json").write_text(json.dumps(raw))
        import_measurement(tmp_path / "measurement.json")

    by_hand(10.0)
    second = pipeline.run(recipe, out=tmp_path)
    assert second.choice is not None and first.choice is not None
    assert second.choice.chosen.member == first.choice.chosen.member
    assert second.choice.chosen.prices[0].measured_ms == 10.0
    (budget,) = second.budgets
    assert (budget.measured_ms, budget.within_budget) == (10.0, True)
    by_hand(52.0)
    third = pipeline.run(recipe, out=tmp_path)
    assert third.choice is not None
    assert third.choice.chosen.member.params < first.choice.chosen.member.params


def test_a_budget_of_other_targets_chooses_nothing(project, tmp_path, calls):
    recipe = load(project, "budget.latency_ms={}", targets=(EMULATED,))
    report = pipeline.run(recipe, out=tmp_path)
    assert (report.choice, report.budgets) == (None, ())
    assert report.passed


def test_a_choice_without_a_budget_is_refused(project, tmp_path):
    with pytest.raises(RecipeError, match=r"student\.space or student\.models is chosen under"):
        pipeline.run(load(project, *SPACE), out=tmp_path)


# ---- the report --------------------------------------------------------------------------------


def test_the_report_has_the_fields_that_others_read(first):
    written = json.loads(Path(first.path).read_text())
    assert written.keys() >= {
        "metric_name", "stages", "artifacts", "teacher", "controls", "seed", "versions",
        "schema_version",
    }  # fmt: skip
    for stage in (written["teacher"], *written["stages"]):
        assert stage.keys() >= {"name", "metric", "metric_ci95", "params", "macs"}
        low, high = stage["metric_ci95"]
        assert 0 <= low <= stage["metric"] <= high <= 1
        assert isinstance(stage["params"], int)
        assert isinstance(stage["macs"], int)
    for artifact in written["artifacts"]:
        assert artifact.keys() >= {
            "target", "precision", "path", "size_bytes", "sha256", "verifier", "metric",
            "metric_ci95", "n", "agreement", "max_steps", "integer_share", "gate",
            "latency_p50_ms",
        }  # fmt: skip
    assert written["seed"] == 1
    assert isinstance(written["schema_version"], int)
    assert isinstance(written["controls"], list)
    assert written["versions"]["torch"] == torch.__version__
    assert written["versions"]["onnxruntime"] == onnxruntime.__version__
    assert Report.load(first.path) == first


def test_every_target_has_both_precisions_and_one_that_ships(first):
    rows = [(row.target, row.precision) for row in first.artifacts]
    assert rows == [(t, p) for t in (*NATIVE, EMULATED) for p in ("fp32", "int8")]
    for target in (*NATIVE, EMULATED):
        shipping = [row for row in first.artifacts if row.target == target and row.ships]
        assert len(shipping) == 1
        assert shipping[0].why
    assert first.passed
    assert all(row.gate == "passed" and row.n == 96 for row in first.artifacts)


def test_only_this_hosts_targets_are_timed(first):
    for row in first.artifacts:
        if row.target == EMULATED:
            assert row.verifier == "emulated"
            assert row.latency_p50_ms is None
            assert row.measurement is None
        else:
            assert row.verifier == "native"
            assert row.latency_p50_ms > 0
            assert row.measurement.runs == 20
    assert [latency.target for latency in first.teacher.latency] == list(NATIVE)


def test_figures_depend_on_the_precision(first):
    for row in first.artifacts:
        if row.precision == "int8":
            assert row.integer_share == 1
            assert row.max_steps >= row.mean_steps >= 0
            assert row.relative_error is None
        else:
            assert row.max_steps is row.integer_share is None
            assert 0 <= row.relative_error < 1e-3


def test_sizes_are_the_networks(first):
    student = resnet(num_classes=4, in_channels=1, widths=(8, 16))
    assert [stage.name for stage in first.stages][:2] == ["student", "quantized"]
    assert first.stages[0].params == sum(p.numel() for p in student.parameters())
    assert first.teacher.params == 16 * 9 + 16 + 2 * 16 + 4 * 64 + 4
    # stride 2: 6 × 6 outputs of 16 · 9 products, then 64 · 4
    assert first.teacher.macs == 36 * 16 * 9 + 64 * 4


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_artifacts_are_what_the_report_says(project, first, precision):
    import quadrants_source

    test = quadrants_source.quadrants().splits["test"]
    x = ((test.images.numpy() / 255 - 0.4) / 0.25).astype(np.float32)
    for row in first.artifacts:
        if row.precision != precision or row.target not in ("host-onnxruntime", EMULATED):
            continue
        content = Path(row.path).read_bytes()
        assert row.sha256 == hashlib.sha256(content).hexdigest()
        assert row.size_bytes == len(content)
        options = onnxruntime.SessionOptions()
        if row.verifier == "emulated":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(content, options)
        (scores,) = session.run(None, {session.get_inputs()[0].name: x})
        right = (scores.argmax(1) == test.labels.numpy()).mean()
        assert row.metric == pytest.approx(right)
        assert row.metric > 0.9


def test_test_images_are_shown_with_what_each_says_of_them(project, out, first):
    import quadrants_source

    test = quadrants_source.quadrants().splits["test"]
    report = pipeline.run(load(project, targets=(EMULATED,)), out=out)
    row = next(row for row in report.artifacts if row.ships)
    x = ((test.images[:3].numpy() / 255 - 0.4) / 0.25).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(row.path, options)
    (scores,) = session.run(None, {session.get_inputs()[0].name: x})
    assert len(report.samples) == 3
    for sample, wanted, label in zip(report.samples, scores, test.labels, strict=False):
        names = ["truth", "teacher", "student fp32", f"{EMULATED} int8 (emulated)"]
        assert list(sample.marks) == names and sample.size == (12, 12)
        assert [mark.label for mark in sample.marks["truth"]] == [label]
        (mark,) = sample.marks[names[-1]]
        assert mark.label == wanted.argmax()
        chance = np.exp(wanted - wanted.max()) / np.exp(wanted - wanted.max()).sum()
        assert mark.score == pytest.approx(chance.max(), abs=2e-3)
    assert report.curves == {}


def test_what_is_timed_here_is_timed_by_layer(first):
    for row in first.artifacts:
        if row.measurement is not None:
            assert row.measurement.layers
    text = page(first)
    assert "slowest layers of" in text and "measured here, on" in text


# ---- done once ---------------------------------------------------------------------------------


def test_a_second_run_does_nothing_twice(project, out, first, monkeypatch):
    before = snapshot(out / "tiny")
    assert {name.rpartition("-")[0] for name in before} >= {"teacher", "distill", "quantize"}

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("done already")

    for verb in (*VERBS, "predict"):
        monkeypatch.setattr(pipeline, verb, refused)
    second = pipeline.run(load(project, targets=(*NATIVE, EMULATED)), out=out)
    assert second == first
    assert snapshot(out / "tiny") == before


def test_fewer_targets_need_nothing_new(project, out, first, calls):
    report = pipeline.run(load(project), out=out)
    assert [row.target for row in report.artifacts] == ["host-onnxruntime"] * 2
    assert calls == dict.fromkeys(VERBS, 0)
    by_hash = {row.sha256: row for row in first.artifacts if row.target == "host-onnxruntime"}
    assert [by_hash[row.sha256] for row in report.artifacts] == list(report.artifacts)


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ("note=another", {}),
        ("profile.threads=2", {"profile_together": 1}),
        ("profile.runs=30", {"profile_together": 1}),
        # the same files, exported again: an export is keyed by its gates
        ("verify.agreement=0.96", {"export": 2, "verify": 2, "profile_together": 1}),
        ("quantize.lr=0.02", {"quantize": 1, "export": 1, "verify": 1, "profile_together": 1}),
        (
            "distill.alpha=0.8",
            {"distill": 1, "quantize": 1, "export": 2, "verify": 2, "profile_together": 1},
        ),
        (
            "teacher.lr=0.06",
            {"distill": 2, "quantize": 1, "export": 3, "verify": 2, "profile_together": 1},
        ),
    ],
)
def test_a_changed_option_redoes_its_stage_and_what_follows(
    project, out, first, calls, change, redone
):
    before = snapshot(out / "tiny")
    pipeline.run(load(project, change), out=out)
    assert calls == dict.fromkeys(VERBS, 0) | redone
    after = snapshot(out / "tiny")
    moved = [n for n in before if after[n] != before[n] and not n.endswith("measurement.json")]
    assert not moved


def test_targets_with_one_scheme_share_one_quantized_network(project, tmp_path, calls):
    recipe = load(project, *POST_TRAINING, targets=("board", "sister", "other"))
    report = pipeline.run(recipe, out=tmp_path)
    assert calls == {
        "distill": 2, "quantize": 2, "export": 6, "verify": 6, "profile_together": 0,
    }  # fmt: skip
    assert stages(tmp_path / "tiny") == {
        "distill": 1, "export-board": 2, "export-other": 2, "export-sister": 2, "quantize": 2,
        "teacher": 1,
    }  # fmt: skip
    hashes = {(row.target, row.precision): row.sha256 for row in report.artifacts}
    assert hashes["board", "int8"] == hashes["sister", "int8"] != hashes["other", "int8"]
    assert [stage.name for stage in report.stages] == ["student", "quantized", "quantized 2"]


def test_what_stays_in_float_is_in_the_report(project, out, first, calls):
    recipe = load(project, "quantize.epochs=0", "quantize.max_drop=0.9", targets=(EMULATED,))
    kept = recipe.quantize.model_copy(update={"float_layers": ("head",)})
    report = pipeline.run(recipe.model_copy(update={"quantize": kept}), out=out)
    row = report.stages[-1]
    assert row.note == "post-training; 1 linear in float (layers head)"
    table = row.sensitivity
    assert table is not None
    assert (table.metric_name, table.split, table.n) == ("top-1 accuracy", "test", 96)
    assert len(table.layers) == 6  # the head was given
    assert table.in_float == ()
    assert Report.load(report.path) == report
    assert first.stages[-1].sensitivity is None


def test_fresh_does_everything_again_with_the_same_result(project, tmp_path, calls):
    recipe = load(project, *POST_TRAINING, targets=("board",))
    pipeline.run(recipe, out=tmp_path)
    files, bits = snapshot(tmp_path / "tiny"), weights(tmp_path / "tiny")
    once = dict(calls)
    report = pipeline.run(recipe, out=tmp_path, fresh=True)
    assert calls == {verb: 2 * count for verb, count in once.items()}
    assert report.passed
    assert weights(tmp_path / "tiny") == bits
    again = snapshot(tmp_path / "tiny")
    assert again.keys() == files.keys()
    assert all(again[name] != files[name] for name in files)


def test_one_process_at_a_time(project, tmp_path, calls):
    folder = tmp_path / "tiny"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StateError, match=f"another edgekd is at work in {folder}"):
            pipeline.run(load(project), out=tmp_path)
    assert not any(calls.values())


# ---- the teacher -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_state(project) -> dict[str, torch.Tensor]:
    import quadrants_source

    torch.manual_seed(0)
    return quadrants_source.plain(16).state_dict()


def with_teacher(project: Path, path: Path) -> Recipe:
    return load(project, f"teacher.weights={path}", "teacher.epochs=0", *POST_TRAINING[:1])


@pytest.mark.parametrize("form", ["teacher.pt", "teacher.safetensors"])
def test_a_teacher_comes_with_its_weights(project, tmp_path, calls, teacher_state, form):
    path = tmp_path / form
    if form.endswith(".pt"):
        torch.save({"state_dict": teacher_state}, path)
    else:
        save_file(teacher_state, path)
    report = pipeline.run(with_teacher(project, path), out=tmp_path)
    assert calls["distill"] == 1  # the student alone
    (folder,) = (tmp_path / "tiny").glob("teacher-*")
    kept = Network.load(folder, trust=True).module.state_dict()
    assert kept.keys() == teacher_state.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in teacher_state.items())
    assert str(path) in report.teacher.note


def test_other_weights_are_another_teacher(project, tmp_path, calls, teacher_state):
    path = tmp_path / "teacher.safetensors"
    save_file(teacher_state, path)
    pipeline.run(with_teacher(project, path), out=tmp_path)
    save_file({name: tensor + 1 for name, tensor in teacher_state.items()}, path)
    pipeline.run(with_teacher(project, path), out=tmp_path)
    assert calls["distill"] == 2
    assert stages(tmp_path / "tiny")["teacher"] == 2


class Malicious:
    """Pickled: a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_a_teachers_file_runs_no_code(project, tmp_path, calls, teacher_state):
    proof, path = tmp_path / "executed", tmp_path / "teacher.pt"
    torch.save({"state_dict": teacher_state, "hook": Malicious(proof)}, path)
    with pytest.raises(ModelError, match="holds more than tensors; loading it would run code"):
        pipeline.run(with_teacher(project, path), out=tmp_path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the file would do it
    assert proof.exists()


def test_missing_weights_are_named(project, tmp_path, calls):
    with pytest.raises(ModelError, match=r"weights .*nowhere\.pt do not exist"):
        pipeline.run(with_teacher(project, tmp_path / "nowhere.pt"), out=tmp_path)


def test_missing_weights_are_named_where_a_teacher_without_them_is_done(project, tmp_path, calls):
    pipeline.run(load(project, *POST_TRAINING), out=tmp_path)
    with pytest.raises(ModelError, match=r"weights .*nowhere\.pt do not exist"):
        pipeline.run(load(project, *POST_TRAINING, "teacher.weights=nowhere.pt"), out=tmp_path)


def test_another_source_of_a_model_is_another_teacher(project, tmp_path, calls, monkeypatch):
    pipeline.run(load(project, *POST_TRAINING), out=tmp_path)
    monkeypatch.setattr(pipeline, "source_sha256", lambda build: "as if the file were edited")
    pipeline.run(load(project, *POST_TRAINING), out=tmp_path)
    assert stages(tmp_path / "tiny")["teacher"] == 2


def test_a_missing_package_is_found_before_any_training(project, tmp_path, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # what makes its import fail
    with pytest.raises(MissingPackageError, match=r"edgekd\[openvino\]"):
        pipeline.run(load(project, targets=("host-onnxruntime", "intel-cpu")), out=tmp_path)
    assert calls["distill"] == 0


@pytest.mark.parametrize("form", ["teacher.pt", "teacher.safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.9])
def test_damaged_weights_are_named(project, tmp_path, calls, teacher_state, form, kept):
    path = tmp_path / form
    (torch.save if form.endswith(".pt") else save_file)(teacher_state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ModelError, match=f"{form} "):
        pipeline.run(with_teacher(project, path), out=tmp_path)


def test_weights_of_another_shape_are_named(project, tmp_path, calls, teacher_state):
    path = tmp_path / "teacher.pt"
    torch.save({**teacher_state, "5.weight": torch.zeros(4, 3)}, path)
    with pytest.raises(ModelError, match=r"(?s)teacher\.pt does not fit Sequential: .*5\.weight"):
        pipeline.run(with_teacher(project, path), out=tmp_path)
    torch.save({k: v for k, v in teacher_state.items() if k != "5.bias"}, path)
    with pytest.raises(ModelError, match=r"(?s)does not fit Sequential: .*5\.bias"):
        pipeline.run(with_teacher(project, path), out=tmp_path)


def test_given_weights_get_images_as_the_recipe_normalises_them(
    project, tmp_path, calls, teacher_state, capsys
):
    path = tmp_path / "teacher.safetensors"
    save_file(teacher_state, path)
    recipe = with_teacher(project, path)
    pipeline.run(recipe, out=tmp_path / "data's")
    said = " ".join(capsys.readouterr().err.split())
    assert "images are normalised by mean (0.4,), std (0.25,), the data's" in said
    other = Recipe.load(
        project / "tiny.toml",
        changes=("data.mean=[0.5]", "data.std=[0.1]", f"teacher.weights={path}",
                 "teacher.epochs=0", *POST_TRAINING[:1]),
    )  # fmt: skip
    pipeline.run(other, out=tmp_path / "own")
    assert "mean (0.5,), std (0.1,)" in " ".join(capsys.readouterr().err.split())
    for folder in (tmp_path / "own" / "tiny").glob("*/spec.json"):
        known = Network.load(folder.parent, trust=True).io.preprocessing
        assert known is not None
        assert (known.mean, known.std) == ((0.5,), (0.1,))
    with pytest.raises(RecipeError, match="mean and std go together"):
        load(project, "data.mean=[0.5]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["student.kwargs.num_classes=5"], r"edgekd/resnet, in evaluation: it gives 5 scores; the "
         "data has 4 classes"),
        (["student.model=quadrants_source:Auxiliary", "student.kwargs={}"],
         r"Auxiliary, in training: it gives a tuple of \(2, 4\), \(2, 4\); a classifier gives one"),
        (["student.model=quadrants_source:Fixed", "student.kwargs={}"],
         r"Fixed fixes the batch at 2 \(by int"),
        (["student.model=edgekd/resmet"], r"no model 'edgekd/resmet'"),
        (["student.weights=nowhere.pt"], r"weights .*nowhere\.pt do not exist"),
    ],
)  # fmt: skip
def test_a_student_that_will_not_do_is_found_before_the_teacher_is_trained(
    project, tmp_path, calls, changes, message
):
    with pytest.raises(ModelError, match=message):
        pipeline.run(load(project, *changes), out=tmp_path)
    assert calls["distill"] == 0


def test_a_recipe_without_a_teacher_is_refused(project, tmp_path, calls):
    with pytest.raises(RecipeError, match=r"give teacher\.model with teacher\.weights .* or"):
        pipeline.run(load(project, "teacher.epochs=0"), out=tmp_path)


# ---- gates -------------------------------------------------------------------------------------


def test_a_failed_gate_is_the_reports_and_the_exit_codes(project, tmp_path):
    # `half` runs no linear layer in integers: that one is not missed, and outputs are near but off
    arguments = ["run", str(project / "tiny.toml"), "--out", str(tmp_path), "--target", "half"]
    for change in (*POST_TRAINING, "verify.mean_steps=1e-9"):
        arguments += ["--set", change]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    report = Report.load(tmp_path / "tiny" / "report" / "report.json")
    assert not report.passed
    fp32, int8 = report.artifacts
    assert (fp32.gate, fp32.ships) == ("passed", True)
    assert (int8.gate, int8.ships) == ("failed", False)
    assert int8.integer_share == 1
    assert any("steps in the mean; 1e-09 is allowed" in reason for reason in int8.reasons)
    # each operator by itself is right all the same
    assert int8.local is not None and int8.local.as_written.first is None
    assert "int8, operator by operator, as written" in result.output
    assert "NOT all gates passed" in result.output


def test_what_could_not_be_checked_has_not_passed(project, tmp_path, calls, monkeypatch):
    def unchecked(artifact: Artifact, net: Network, **_: Any) -> Parity:
        return cheap_verify(artifact, net).model_copy(
            update={"gate": "unchecked", "verifier": None, "reasons": ("edgekd[openvino]",)}
        )

    monkeypatch.setattr(pipeline, "verify", unchecked)
    report = pipeline.run(load(project, *POST_TRAINING), out=tmp_path)
    assert not report.passed
    assert not any(row.ships for row in report.artifacts)
    assert calls["profile_together"] == 0
    with Console(file=io.StringIO(), width=200) as console:
        report.print(console)
    assert "unchecked: edgekd[openvino]" in console.file.getvalue()


# ---- killed ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(project, tmp_path_factory) -> dict[str, bytes]:
    """Weights of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "export", cheap_export)
        patch.setattr(pipeline, "verify", cheap_verify)
        pipeline.run(load(project, targets=("board",)), out=out)
    return weights(out / "tiny")


@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_around_every_step_it_ends_in_the_same_weights(
    project, tmp_path, calls, whole, monkeypatch, when
):
    folder = tmp_path / "tiny"
    stops = 0

    def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
        """Dies around each place it has not died at before: a method and the folder it is for."""

        def call(*args: Any, **options: Any) -> Any:
            nonlocal stops
            place = function.__qualname__, str(options.get("out", args[0]))
            fatal = place not in seen
            seen.add(place)
            if fatal and when == "before":
                stops += 1
                raise Killed
            result = function(*args, **options)
            if fatal:
                stops += 1
                raise Killed
            return result

        return call

    seen: set[tuple[str, str]] = set()
    monkeypatch.setattr(RunDir, "finish", stopping(RunDir.finish))
    monkeypatch.setattr(RunDir, "save_checkpoint", stopping(RunDir.save_checkpoint))
    monkeypatch.setattr(Report, "save", stopping(Report.save))
    monkeypatch.setattr(pipeline, "export", stopping(pipeline.export))
    finished: dict[str, tuple[int, int]] = {}
    for _ in range(40):
        try:
            pipeline.run(load(project, targets=("board",)), out=tmp_path)
            break
        except Killed:
            now = snapshot(folder)
            assert finished.items() <= now.items()  # what is done is never done again
            done = {name.partition("/")[0] for name in now if name.endswith("done.json")}
            finished = {k: v for k, v in now.items() if k.partition("/")[0] in done}
    # three networks: a checkpoint and an end each; two exports: a file and an end each; the report
    assert stops >= 3 * 2 + 2 * 2 + 1
    assert weights(folder) == whole


def test_an_export_that_was_cut_off_is_made_again(project, tmp_path, calls, monkeypatch):
    recipe = load(project, *POST_TRAINING, targets=("board",))
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "finish", _fails_for_exports)
        with pytest.raises(Killed):
            pipeline.run(recipe, out=tmp_path)
    (folder,) = (tmp_path / "tiny").glob("export-board-*")
    (folder / "model.bin").write_bytes(b"half a model")  # killed while it was written again
    monkeypatch.setattr(pipeline, "export", export)
    monkeypatch.setattr(pipeline, "verify", verify)
    report = pipeline.run(recipe, out=tmp_path)
    assert Path(report.artifacts[0].path).suffix == ".onnx"


def _fails_for_exports(run: RunDir, record: dict[str, Any], finish: Any = RunDir.finish) -> None:
    if run.path.name.startswith("export"):
        raise Killed
    finish(run, record)


SHELL = """
import sys
from pathlib import Path

import edgekd.cli
import edgekd.training

edgekd.training.CHECKPOINT_SECONDS = 0.02
Path(sys.argv.pop()).touch()
edgekd.cli.main()
"""


def test_killed_at_any_instant_it_ends_in_the_same_bytes(project, tmp_path):
    (tmp_path / "shell.py").write_text(SHELL)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(project)}

    def start(out: str) -> subprocess.Popen[bytes]:
        """Up to where the command line begins."""
        ready = tmp_path / "ready"
        ready.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, tmp_path / "shell.py", "run", project / "tiny.toml",
             "--target", "board", "--out", tmp_path / out, ready],
            env=environment, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while not ready.exists():
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.01)
        return process

    process = start("whole")
    began = time.monotonic()
    output, _ = process.communicate()
    duration = time.monotonic() - began
    assert process.returncode == 0, output.decode()
    reference = weights(tmp_path / "whole" / "tiny")
    assert {name.rpartition("-")[0] for name in reference} == set(TRAINED)

    chance = random.Random(0)
    instants = sorted(chance.uniform(0, duration) for _ in range(5))
    finished: dict[str, tuple[int, int]] = {}
    kills = 0
    for earlier, instant in zip([0.0, *instants], instants, strict=False):
        process = start("killed")
        time.sleep(instant - earlier)
        process.kill()
        process.communicate()
        kills += process.returncode == -9
        now = snapshot(tmp_path / "killed" / "tiny")
        assert finished.items() <= now.items()  # what is done is never done again
        done = {name.partition("/")[0] for name in now if name.endswith("done.json")}
        finished = {k: v for k, v in now.items() if k.partition("/")[0] in done}
    assert kills >= 3
    process = start("killed")
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    assert finished.items() <= snapshot(tmp_path / "killed" / "tiny").items()
    assert weights(tmp_path / "killed" / "tiny") == reference
    reports = [Report.load(tmp_path / o / "tiny/report/report.json") for o in ("whole", "killed")]
    figures = [
        [(row.precision, row.sha256, row.agreement, row.metric) for row in report.artifacts]
        for report in reports
    ]
    assert figures[0] == figures[1]


# ---- hints and controls ------------------------------------------------------------------------


LEARNING = (
    'distill.hints="auto"', "prune.ratio=0.5", "prune.epochs=1", "prune.batch_size=32",
    'prune.hints=[["stages.1", "0"]]', 'quantize.hints="auto"', 'data.augment=["flip"]',
)  # fmt: skip


def test_controls_are_the_same_without_one_thing(project, tmp_path, calls):
    recipe = load(project, *LEARNING, "controls=true", targets=("board", "other"))
    report = pipeline.run(recipe, out=tmp_path)
    rows = {(row.name, row.against): row for row in report.controls}
    assert list(rows) == [
        ("without a teacher", "student"), ("without hints", "student"), ("not pruned", "pruned"),
        ("post-training only", "quantized"), ("post-training only", "quantized 2"),
    ]  # fmt: skip
    stages_by_name = {stage.name: stage for stage in report.stages}
    for row in report.controls:
        stage = stages_by_name[row.against]
        assert row.difference == pytest.approx(stage.metric - row.metric, abs=1e-9)
        assert row.difference_ci95[0] <= row.difference <= row.difference_ci95[1]
        assert row.n == stage.n
    assert rows["not pruned", "pruned"].params > stages_by_name["pruned"].params
    assert rows["without hints", "student"].params == stages_by_name["student"].params
    # teacher, three students, the retraining inside prune (not counted here); two and two
    assert (calls["distill"], calls["quantize"]) == (4, 4)

    # again: nothing is done twice; without controls: the same stages
    before = snapshot(tmp_path / "tiny")
    assert pipeline.run(recipe, out=tmp_path).controls == report.controls
    plain = load(project, *LEARNING, targets=("board", "other"))
    assert pipeline.run(plain, out=tmp_path).stages == report.stages
    assert snapshot(tmp_path / "tiny") == before
    assert (calls["distill"], calls["quantize"]) == (4, 4)


def test_controls_without_hints_prune_and_training_are_fewer(project, tmp_path, calls):
    recipe = load(project, *POST_TRAINING, "controls=true", targets=("board",))
    assert [row.name for row in pipeline.run(recipe, out=tmp_path).controls] == [
        "without a teacher"
    ]


def test_two_teachers_are_an_ensemble_beside_the_first_alone(project, tmp_path, calls):
    second = '{ model = "quadrants_source:plain", kwargs = { width = 8 }, epochs = 1 }'
    options = ("controls=true", f"teachers=[{second}]")
    recipe = load(project, *POST_TRAINING, *options, targets=("board",))
    report = pipeline.run(recipe, out=tmp_path)
    assert [stage.name for stage in report.stages[:2]] == ["teacher 2", "student"]
    assert report.stages[0].params < report.teacher.params
    assert report.stages[1].note == "distilled from the teachers"
    assert [row.name for row in report.controls] == [
        "without a teacher", "the first teacher alone",
    ]  # fmt: skip
    assert report.controls[1].metric != report.stages[1].metric
    # two teachers, the student, and two without one of them
    assert calls["distill"] == 5
    alone = load(project, *POST_TRAINING, targets=("board",))
    assert pipeline.run(alone, out=tmp_path).stages[0].metric == report.controls[1].metric
    assert calls["distill"] == 5


@pytest.mark.skipif("intel-cpu" not in NATIVE, reason="openvino is not installed")
def test_nncfs_integers_stand_beside_ours(project, tmp_path, monkeypatch, capsys):
    """A made-up NNCF, which gives the float model back: then the difference is that of floats."""
    recipe = load(project, *POST_TRAINING, "controls=true", targets=("intel-cpu",))
    monkeypatch.setitem(sys.modules, "nncf", None)  # importing it raises ImportError
    report = pipeline.run(recipe, out=tmp_path / "without")
    assert [row.name for row in report.controls] == ["without a teacher"]
    samples: list[Any] = []

    def quantize(model: Any, dataset: Any, subset_size: int) -> Any:
        assert subset_size == len(dataset)
        samples.extend(dataset)
        return model

    made = types.ModuleType("nncf")
    made.quantize, made.Dataset = quantize, list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nncf", made)
    report = pipeline.run(recipe, out=tmp_path / "with")
    (row,) = (row for row in report.controls if row.name == "NNCF post-training")
    floats, integers = report.artifacts
    assert row.metric == floats.metric
    assert row.difference == pytest.approx(integers.metric - floats.metric, abs=1e-9)
    assert {x.shape for x in samples} == {(1, 1, 12, 12)}
    samples.clear()
    assert pipeline.run(recipe, out=tmp_path / "with").controls == report.controls
    assert not samples  # nothing is done twice


def test_the_teacher_is_asked_once_for_all_stages_with_the_same_taps(project, tmp_path, calls):
    recipe = load(project, "teacher.epochs=1", 'data.augment=["flip"]', targets=("board",))
    pipeline.run(recipe, out=tmp_path)
    (cache,) = (tmp_path / "tiny" / "cache").iterdir()
    assert (cache / "0.f16").stat().st_size == 2 * 192 * 4 * 2  # views, images, scores, bytes
