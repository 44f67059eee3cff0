"""Detectors through the stages, which know nothing of them."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

import edgekd
from edgekd import pipeline
from edgekd.data.base import Data
from edgekd.data.detection import AUGMENTATIONS, Boxed, Labelled, letterboxed
from edgekd.knowledge.taps import pair_hints
from edgekd.models.build import Build, build_module
from edgekd.models.torchvision_detectors import as_network
from edgekd.network import Network, Preprocessing
from edgekd.tasks import average_precision
from edgekd.tasks.detection import Detection, original_pixels
from edgekd.training import evaluate, fabric, gather, predict

SIZE = 64
CLASSES = ("red", "green", "blue")
TASK = Detection()
OPTIONS: dict[str, Any] = {"task": TASK, "batch_size": 8, "accelerator": "cpu"}


def squares(count: int, size: int, seed: int) -> Boxed:
    """One or two squares of a class's colour on dark noise."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 60, (count, 3, size, size), dtype=np.uint8)
    boxes = np.full((count, 2, 5), -1.0, np.float32)
    for image in range(count):
        for row in range(1 + image % 2):
            kind, side = int(rng.integers(3)), int(rng.integers(size // 4, size // 2))
            left, top = (int(v) for v in rng.integers(0, size - side, 2))
            x[image, :, top : top + side, left : left + side] //= 4
            x[image, kind, top : top + side, left : left + side] = 220
            boxes[image, row] = [kind, left, top, left + side, top + side]
    return Boxed(torch.from_numpy(x), torch.from_numpy(boxes))


def data_of(size: int = SIZE, train: int = 48, augment: tuple[str, ...] = ()) -> Data:
    splits = {"train": squares(train, size, 0), "test": squares(12, size, 1)}
    known = Preprocessing(mean=(0.2,) * 3, std=(0.3,) * 3, fit="letterbox")
    return Data("squares", splits, CLASSES, known, augment, AUGMENTATIONS)


DATA = data_of()


def data() -> Data:
    """For a recipe, which names it as a callable."""
    return DATA


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(average_precision, "RESAMPLES", 20)


def new_detector(**kwargs: Any) -> Network:
    torch.manual_seed(0)
    small = {"num_classes": 3, "widths": [16, 16, 32, 32], "neck": 32}
    build = Build(model="edgekd/detector", kwargs=small | kwargs)
    return Network(
        build_module(build, trust=False, origin="test"), torch.zeros(1, 3, SIZE, SIZE),
        preprocessing=DATA.preprocessing, labels=CLASSES, build=build,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> Network:
    return edgekd.distill(new_detector(), data=DATA, epochs=25, lr=0.03, **OPTIONS)


@pytest.fixture(scope="module")
def pruned(trained: Network) -> Network:
    return edgekd.prune(
        trained, ratio=0.3, round_to=8, data=DATA, teacher=trained, epochs=6, alpha=0.5, lr=0.02,
        **OPTIONS,
    )  # fmt: skip


def score(net: Network, of: Data = DATA) -> edgekd.tasks.base.Score:
    return evaluate(net, task=TASK, data=of, on=fabric("cpu"))


def test_a_detector_learns_from_scratch_what_is_where(trained):
    found = score(trained)
    assert found.value > 0.5
    assert found.parts["mAP50"] > 0.85
    assert found.n == 12 and len(found.by_class) == 3


def test_augmented_batches_are_learnt_from():
    batches = replace(DATA, augment=AUGMENTATIONS.names)
    net = edgekd.distill(new_detector(), data=batches, epochs=12, lr=0.03, **OPTIONS)
    assert score(net).parts["mAP50"] > 0.4


def test_a_pruned_detector_is_narrower_saved_and_loaded(trained, pruned, tmp_path):
    assert pruned.params < 0.65 * trained.params
    assert pruned.io == trained.io
    assert score(pruned).parts["mAP50"] > 0.8
    pruned.save(tmp_path)
    again = Network.load(tmp_path)
    assert again.io.decoding == trained.io.decoding
    assert score(again) == score(pruned)


def test_a_teacher_of_the_same_heads_teaches_without_labels(trained):
    """Half as wide a student learns from the teacher alone."""
    student = edgekd.distill(
        new_detector(scale=0.5), data=UNLABELLED, teacher=trained, alpha=1.0, epochs=25, lr=0.03,
        **OPTIONS,
    )  # fmt: skip
    assert student.params < 0.3 * trained.params
    assert score(student).parts["mAP50"] > 0.6


UNLABELLED = [
    (x, torch.full_like(boxes, -1))
    for x, boxes, *_ in edgekd.data.base.evaluation_batches(DATA, split="train", batch_size=8)
]


def test_a_teacher_of_another_family_teaches_without_labels(trained, fcos):
    """Strides 8, 16 and 32, to strides 8 and 16 with a quality: by boxes alone."""
    student = edgekd.distill(
        new_fcos(), data=DATA, teacher=trained, alpha=1.0, epochs=15, lr=0.05, **OPTIONS
    )
    assert score(student).parts["mAP50"] > 0.6 * score(fcos).parts["mAP50"] > 0.1


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_black_box_teaches_as_the_network_in_it(trained, tmp_path):
    artifact = edgekd.export(trained, target="host-onnxruntime", out=tmp_path / "bundle")
    black_box = edgekd.OnnxTeacher(artifact.path)  # what it is is in the manifest beside it
    assert black_box.io.decoding == trained.io.decoding
    terms = []
    for name, teacher in (("box", black_box), ("network", trained)):
        run = edgekd.rundir.RunDir(tmp_path / name)
        edgekd.distill(new_detector(scale=0.5), data=DATA, teacher=teacher, epochs=1, lr=1e-3,
                       run=run, **OPTIONS)  # fmt: skip
        terms.append(logged(run.path)[0]["teacher"])
    assert terms[0] == pytest.approx(terms[1], rel=1e-4)


@pytest.mark.parametrize("loss", ["fitnets", "pkd", "fgd"])
def test_hints_come_from_the_pyramid(trained, loss, tmp_path):
    student = new_detector(scale=0.5)
    pairs = pair_hints("auto", student.module, trained.module, student.io.example(2))
    assert [ours for ours, _ in pairs] == ["stages.0", "up.0", "down.0", "down.1"]
    run = edgekd.rundir.RunDir(tmp_path)
    edgekd.distill(student, data=DATA, teacher=trained, epochs=4, lr=0.03, hints="auto",
                   hint_loss=loss, run=run, **OPTIONS)  # fmt: skip
    terms = [row["hints"] for row in logged(tmp_path)]
    assert terms[-1] < 0.95 * terms[0]


def test_edges_as_distributions_are_learnt_and_distilled(tmp_path):
    teacher = edgekd.distill(new_detector(bins=8), data=DATA, epochs=15, lr=0.03, **OPTIONS)
    assert score(teacher).parts["mAP50"] > 0.5
    run = edgekd.rundir.RunDir(tmp_path / "run")
    student = edgekd.distill(
        new_detector(bins=8, scale=0.5), data=DATA, teacher=teacher, alpha=0.5, epochs=8, lr=0.03,
        run=run, **OPTIONS,
    )  # fmt: skip
    assert logged(run.path)[-1]["teacher"] < 0.7 * logged(run.path)[0]["teacher"]
    net = edgekd.quantize(student, target="host-onnxruntime", data=DATA, accelerator="cpu")
    artifact = edgekd.export(net, target="host-onnxruntime", out=tmp_path / "bundle")
    parity = edgekd.verify(artifact, net, data=DATA, task=TASK, metric_gap=0.02)
    assert parity.gate == "passed", parity.reasons


@pytest.mark.parametrize("target", ["host-onnxruntime", "jetson-orin-nano"])
def test_a_pruned_detector_runs_in_integers(pruned, target, tmp_path):
    net = edgekd.quantize(pruned, target=target, data=DATA, accelerator="cpu")
    assert net.io.decoding == pruned.io.decoding
    assert abs(score(net).value - score(pruned).value) < 0.1
    artifact = edgekd.export(net, target=target, out=tmp_path)
    parity = edgekd.verify(artifact, net, data=DATA, task=TASK, metric_gap=0.01)
    assert parity.gate == "passed", parity.reasons
    assert parity.agreement == 1.0 and parity.integer_share == 1.0
    assert parity.metric is not None and parity.metric.parts["mAP50"] > 0.7
    if target == "jetson-orin-nano":
        assert parity.compiled is not None and parity.compiled.error is None
        assert parity.compiled.integer == parity.compiled.total > 20
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["io"]["decoding"]["boxes"] == "log_distance"
    assert manifest["io"]["preprocessing"]["fit"] == "letterbox"


def test_quantized_training_goes_through_the_loop_too(pruned):
    net = edgekd.quantize(
        pruned, target="host-onnxruntime", data=DATA, teacher=pruned, epochs=1, **OPTIONS
    )
    assert score(net).parts["mAP50"] > 0.7


def test_a_jetson_nano_gets_opset_13_with_named_heads(pruned, tmp_path):
    artifact = edgekd.export(pruned, target="jetson-nano", out=tmp_path)
    parity = edgekd.verify(artifact, pruned, data=DATA, task=TASK)
    assert parity.gate == "passed", parity.reasons
    assert parity.half_agreement == 1.0
    model = onnx.load(artifact.path)
    assert {o.version for o in model.opset_import if o.domain in ("", "ai.onnx")} == {13}
    assert [o.name for o in model.graph.output] == ["classes", "boxes"]
    kinds = {node.op_type for node in model.graph.node}
    assert kinds <= {"Conv", "Relu", "Add", "Resize", "Transpose", "Reshape", "Concat"}
    assert edgekd.check(artifact.path, target="jetson-nano").passed


def test_detections_of_the_file_are_those_of_the_network(pruned, tmp_path):
    """Raw heads out of ONNX Runtime, decoded: no part of edgekd's sessions in between."""
    artifact = edgekd.export(pruned, target="host-onnxruntime", out=tmp_path)
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    (x, *_), *_ = edgekd.data.base.evaluation_batches(DATA)
    outputs = [torch.from_numpy(y) for y in session.run(["classes", "boxes"], {"input": x.numpy()})]
    task = TASK.of(pruned.io)
    with torch.no_grad():
        ours, theirs = task.answers(pruned(x)), task.answers(outputs)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    assert int((ours[..., 4] > 0.3).sum()) >= 12


def test_the_bundle_finds_in_image_files_what_evaluation_finds(pruned, tmp_path):
    """infer.py, by itself in another process, on images of other sizes than the input."""
    artifact = edgekd.export(pruned, target="host-onnxruntime", out=tmp_path / "bundle")
    images, _, _, _ = DATA.splits["test"].take(torch.arange(4))
    paths = []
    for index, x in enumerate(images):
        image = PIL.Image.fromarray(x.permute(1, 2, 0).numpy()).resize((150 + 30 * index, 110))
        paths.append(tmp_path / f"{index}.png")
        image.save(paths[-1])
    infer = str(artifact.path.with_name("infer.py"))
    command = [sys.executable, "-W", "error", infer, "--json", "--score", "0.1", *map(str, paths)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [Path(line["image"]) for line in lines] == paths
    records = [Labelled(path, 110, 150 + 30 * index, ()) for index, path in enumerate(paths)]
    read = letterboxed(records, (3, SIZE, SIZE), "test", in_memory=True)
    of = replace(DATA, splits={"train": DATA.splits["train"], "test": read})
    answers, targets = gather(predict(pruned, of, on=fabric("cpu"), task=TASK))
    wanted, _ = original_pixels(answers, targets)
    total = 0
    for line, rows in zip(lines, wanted, strict=True):
        rows = rows[rows[:, 4] >= 0.1]
        np.testing.assert_allclose(np.array(line["boxes"]).reshape(-1, 6), rows, atol=2e-2)
        total += len(rows)
    assert total >= 4
    said = subprocess.run(
        [sys.executable, "-W", "error", infer, str(paths[0])], capture_output=True, text=True
    ).stdout
    assert any(name in said for name in CLASSES)
    assert not list(artifact.path.parent.glob("Classifier*"))


# ---- torchvision's -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ssdlite() -> Network:
    """torchvision's own, at 96 pixels; a few epochs give its layers statistics."""
    torch.manual_seed(0)
    module = get_model(
        "ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4,
        norm_layer=nn.BatchNorm2d,
    )  # fmt: skip
    net = as_network(module, (96, 96), labels=CLASSES)
    return edgekd.distill(net, data=data_of(96, 24), epochs=8, lr=0.02, **OPTIONS)


def test_ssdlite_is_pruned_and_runs_in_integers_on_an_orin(ssdlite, tmp_path):
    of = data_of(96, 24)
    pruned = edgekd.prune(ssdlite, ratio=0.3, round_to=8)
    assert pruned.params < 0.6 * ssdlite.params
    net = edgekd.quantize(pruned, target="jetson-orin-nano", data=of, accelerator="cpu")
    artifact = edgekd.export(net, target="jetson-orin-nano", out=tmp_path)
    # hardly trained, its scores lie close together: the metric may differ
    parity = edgekd.verify(artifact, net, data=of, task=TASK, metric_gap=0.05)
    assert parity.gate == "passed", parity.reasons
    assert parity.integer_share == 1.0
    assert parity.compiled is not None and parity.compiled.integer == parity.compiled.total > 90


class Backbone(nn.Module):
    """Two maps, as FCOS expects them."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 32
        self.fine = nn.Sequential(nn.Conv2d(3, 32, 3, 8, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return {"0": fine, "1": self.coarse(fine)}


def new_fcos() -> Network:
    torch.manual_seed(0)
    module = FCOS(
        Backbone(), 3, anchor_generator=AnchorGenerator(((8,), (16,)), ((1.0,),) * 2),
        head=FCOSHead(32, 1, 3, num_convs=1), score_thresh=0.05,
    )  # fmt: skip
    return as_network(module, (SIZE, SIZE), labels=CLASSES)


@pytest.fixture(scope="module")
def fcos() -> Network:
    return edgekd.distill(new_fcos(), data=DATA, epochs=15, lr=0.05, **OPTIONS)


@pytest.mark.parametrize("target", ["host-onnxruntime", "jetson-orin-nano", "jetson-nano"])
def test_fcos_runs_on_all_kinds_of_targets(fcos, target, tmp_path):
    net = fcos
    if target != "jetson-nano":
        net = edgekd.quantize(fcos, target=target, data=DATA, accelerator="cpu")
    artifact = edgekd.export(net, target=target, out=tmp_path)
    parity = edgekd.verify(artifact, net, data=DATA, task=TASK, metric_gap=0.02)
    assert parity.gate == "passed", parity.reasons
    assert [o.name for o in onnx.load(artifact.path).graph.output] == [
        "classes",
        "boxes",
        "quality",
    ]


# ---- a recipe ----------------------------------------------------------------------------------

RECIPE = """
name = "squares"
targets = ["host-onnxruntime"]
controls = true
task.name = "detection"
data.source = "squares_source:data"
data.augment = ["flip"]
teacher = { model = "edgekd/detector", kwargs = { widths = [16, 16, 32, 32], neck = 32 }, epochs = 14, batch_size = 8, lr = 0.03 }
student = { model = "edgekd/detector", kwargs = { widths = [8, 8, 16, 16], neck = 16 } }
distill = { epochs = 10, batch_size = 8, lr = 0.03, alpha = 0.5 }
quantize = { calibration = 48 }
verify = { metric_gap = 0.02 }
profile = { runs = 10 }
"""  # noqa: E501


def test_a_recipe_carries_a_detector_to_a_device(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "squares_source", sys.modules[__name__])
    (tmp_path / "recipe.toml").write_text(RECIPE)
    report = edgekd.run(tmp_path / "recipe.toml", out=tmp_path / "runs")
    assert report.metric_name == "mAP@[.5:.95]"
    assert report.passed, [row.reasons for row in report.artifacts]
    assert {row.precision for row in report.artifacts} == {"fp32", "int8"}
    assert report.teacher.metric > 0.3
    (control,) = (row for row in report.controls if row.name == "without a teacher")
    low, high = control.difference_ci95
    assert low <= control.difference <= high
    _curves_and_samples_are_those_of(report)
    monkeypatch.setattr(pipeline, "predict", None)  # what the page shows is kept
    again = edgekd.run(tmp_path / "recipe.toml", out=tmp_path / "runs")
    assert again == report


def _curves_and_samples_are_those_of(report: edgekd.Report) -> None:
    """Of the teacher, the student and the artifact that ships, run here by ONNX Runtime."""
    row = next(row for row in report.artifacts if row.ships)
    shown = ["teacher", "student fp32", f"{row.target} {row.precision}"]
    assert list(report.curves) == shown
    targets = DATA.splits["test"].targets
    two = [i for i, boxes in enumerate(targets[0]) if len({*boxes[:, 0].tolist()} - {-1}) == 2]
    assert len(two) >= 3
    session = onnxruntime.InferenceSession(row.path)
    for sample, index in zip(report.samples, two, strict=False):
        assert list(sample.marks) == ["truth", *shown] and sample.size == (SIZE, SIZE)
        truth = [(mark.label, mark.score, mark.box) for mark in sample.marks["truth"]]
        assert truth == [(int(k), None, tuple(box)) for k, *box in targets[0][index].tolist()]
        pixels, *_ = DATA.splits["test"].take(torch.tensor([index]))
        image = PIL.Image.open(io.BytesIO(base64.b64decode(sample.image)))
        near = np.asarray(image, float) - pixels[0].permute(1, 2, 0).numpy()
        assert np.abs(near).mean() < 6  # JPEG
        x = ((pixels.numpy() / 255 - 0.2) / 0.3).astype(np.float32)
        heads = session.run(None, {session.get_inputs()[0].name: x})
        task = TASK.of(new_detector().io)
        (found,) = task.answers(tuple(map(torch.from_numpy, heads)))
        sure = found[found[:, 4] >= 0.3]
        marks = sample.marks[shown[-1]]
        assert [mark.label for mark in marks] == sure[:, 5].tolist()
        np.testing.assert_allclose([mark.score for mark in marks], sure[:, 4], atol=2e-3)
        boxes = np.array([mark.box for mark in marks]).reshape(-1, 4)
        np.testing.assert_allclose(boxes, sure[:, :4], atol=0.05)
