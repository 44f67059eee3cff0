"""What each stage is worth to a detector: BCCD, two teachers, three seeds of student.

    python tools/bench_detection.py bccd-coco.zip --tune        # choices, on a fifth of train
    python tools/bench_detection.py bccd-coco.zip               # the arms that are missing
    python tools/bench_detection.py bccd-coco.zip --seeds 1     # of one seed; processes share them
    python tools/bench_detection.py bccd-coco.zip --artifacts   # then, on a quiet machine

Every arm is a folder in runs/bench-detection ($BENCH_RUNS): killed and started again, the same
command goes on. Each is scored on val and test together, once: choices are made on a fifth of
train, by teachers that have not seen it either. Figures go to docs/bench/detection.json, their
tables to docs/detection.md. The teachers are trained once, on labels; the arms of one seed:

    alone          the student on labels only
    distilled      the same, from `wide`'s heads too
    from-deep      the same, from `deep`'s
    ensemble       the same, from both
    hints          `distilled`, from `wide`'s feature maps too
    pruned         `hints`, a quarter of the channels removed, retrained likewise
    ptq            `pruned` in integers, post-training
    qad            `pruned` in integers, distilled from `wide`
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgekd
from edgekd.data.base import Chosen
from edgekd.data.readers import read_data
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.models.build import Build, build_module
from edgekd.rundir import RunDir
from edgekd.stages.profile import profile_together
from edgekd.tasks import average_precision
from edgekd.tasks.detection import original_pixels
from edgekd.training import fabric, gather, predict

ROOT = Path(__file__).parents[1]
RUNS = Path(os.environ.get("BENCH_RUNS", ROOT / "runs" / "bench-detection"))
RESULT = ROOT / "docs" / "bench" / "detection.json"
PAGE = ROOT / "docs" / "detection.md"
SEEDS = (0, 1, 2)
TEACHERS: dict[str, dict[str, Any]] = {
    "wide": {"scale": 2.0},
    "deep": {"scale": 1.25, "depths": 2, "head_depth": 2},
}
STUDENT = {"scale": 0.625}
TEACHER_EPOCHS, EPOCHS, RETRAINED, QUANTIZED = 60, 40, 20, 4
TRAINING: dict[str, Any] = {"batch_size": 8, "lr": 0.02}
HINTS: dict[str, Any] = {"hints": "auto", "hint_loss": "pkd", "hint_weight": 1.0}
TARGET = "host-onnxruntime"
TARGETS = ("host-onnxruntime", "intel-cpu", "android-arm64", "jetson-nano", "jetson-orin-nano")
METRICS = ("mAP50", "mAP")
# what the second arm has and the first has not
QUESTIONS = {
    "distillation": ("alone", "distilled"),
    "hints": ("distilled", "hints"),
    "both": ("alone", "hints"),
    "a second teacher": ("distilled", "ensemble"),
    "a second teacher, beside the other one alone": ("from-deep", "ensemble"),
    "pruning": ("hints", "pruned"),
    "integers, post-training": ("pruned", "ptq"),
    "integers, distilled": ("pruned", "qad"),
    "quantization-aware distillation": ("ptq", "qad"),
    "what ships beside the teacher": ("wide", "qad"),
}

task = edgekd.get_task("detection")


@cache
def everything(root: Path) -> edgekd.Data:
    """All splits, letterboxed."""
    return read_data(source="coco", root=root, size=(192, 256), augment=("flip", "scale"))


def tuning(data: edgekd.Data) -> edgekd.Data:
    """Four fifths of train, and the last fifth to choose by."""
    train = data.splits["train"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    count = len(train) // 5
    return replace(
        data, splits={"train": Chosen(train, order[count:]), "test": Chosen(train, order[:count])}
    )


def new(kwargs: dict[str, Any], seed: int, data: edgekd.Data) -> edgekd.Network:
    """A network of our family, not trained."""
    build = Build(model="edgekd/detector", kwargs={"num_classes": len(data.classes)} | kwargs)
    torch.manual_seed(seed)
    return edgekd.Network(
        build_module(build, trust=False, origin="bench"), torch.zeros(1, *data.image_shape),
        preprocessing=data.preprocessing, labels=data.classes, build=build,
    )  # fmt: skip


def detections(net: edgekd.Network, data: edgekd.Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all splits but train, in pixels of the original images: (N, D, 6) and truth (N, M, 7)."""
    parts = []
    for split in sorted(data.splits.keys() - {"train"}):
        one = replace(data, splits={"train": data.splits["train"], "test": data.splits[split]})
        parts.append(original_pixels(*gather(predict(net, one, on=fabric(), task=task))))
    most = max(truth.shape[1] for _, truth in parts)
    padded = [
        torch.nn.functional.pad(truth, (0, 0, 0, most - truth.shape[1]), value=-1)
        for _, truth in parts
    ]
    return torch.cat([found for found, _ in parts]), torch.cat(padded)


def arm(name: str, data: edgekd.Data, make: Callable[[RunDir], edgekd.Network]) -> edgekd.Network:
    """Made, or loaded if its folder is done."""
    run = RunDir(RUNS / name)
    if run.done() is None:
        print(f"{name} …", flush=True)
        net = make(run)
        net.save(run.path)
        found, truth = detections(net, data)
        np.savez_compressed(run.path / "found.npz", found=found, truth=truth)
        score = scores(matches(name))
        run.finish(score | {"params": net.params, "macs": net.macs, "images": len(found)})
        print(f"{name}: mAP50 {score['mAP50']:.2%}, mAP {score['mAP']:.2%}", flush=True)
    return edgekd.Network.load(run.path)


# ---- arms ----------------------------------------------------------------------------------------


def teacher(name: str, data: edgekd.Data, prefix: str = "") -> edgekd.Network:
    """Trained on labels."""
    return arm(
        f"{prefix}{name}", data,
        lambda run: edgekd.distill(
            new(TEACHERS[name], 0, data), task=task, data=data, run=run, epochs=TEACHER_EPOCHS,
            **TRAINING,
        ),
    )  # fmt: skip


def arms(seed: int, data: edgekd.Data, last: str | None) -> None:
    """All arms of one seed, in the order in which they need one another."""
    wide, deep = (teacher(name, data) for name in TEACHERS)
    common: dict[str, Any] = {"task": task, "data": data, "seed": seed}
    learning = common | TRAINING | {"epochs": EPOCHS, "alpha": 0.5}

    def student(**options: Any) -> Callable[[RunDir], edgekd.Network]:
        net = new(STUDENT, seed, data)
        return lambda run: edgekd.distill(net, run=run, **learning | options)

    arm(f"alone-{seed}", data, student())
    arm(f"distilled-{seed}", data, student(teacher=wide))
    arm(f"from-deep-{seed}", data, student(teacher=deep))
    arm(f"ensemble-{seed}", data, student(teacher=[wide, deep]))
    if last == "ensemble":
        return
    hinted = arm(f"hints-{seed}", data, student(teacher=wide, **HINTS))
    pruned = arm(
        f"pruned-{seed}", data,
        lambda run: edgekd.prune(
            hinted, ratio=0.25, round_to=8, run=run,
            **learning | HINTS | {"teacher": wide, "epochs": RETRAINED, "lr": TRAINING["lr"] / 2},
        ),
    )  # fmt: skip
    arm(f"ptq-{seed}", data, lambda _: edgekd.quantize(pruned, target=TARGET, data=data))
    arm(f"qad-{seed}", data, integers(pruned, wide, TARGET, seed, data))


def integers(
    pruned: edgekd.Network, wide: edgekd.Network, target: str, seed: int, data: edgekd.Data
) -> Callable[[RunDir], edgekd.Network]:
    """`pruned`, distilled in the target's integers."""
    return lambda run: edgekd.quantize(
        pruned, target=target, teacher=wide, task=task, data=data, seed=seed, run=run,
        epochs=QUANTIZED, batch_size=TRAINING["batch_size"], alpha=0.5,
    )  # fmt: skip


def tune(data: edgekd.Data) -> None:
    """What to learn from a teacher, one seed, on the fifth of train that no arm here has seen."""
    data = tuning(data)
    wide = teacher("wide", data, "tune-")
    for loss in (None, "response", "fitnets", "pkd", "fgd"):
        hints = {"hints": "auto", "hint_loss": loss} if loss not in (None, "response") else {}
        arm(
            f"tune-{loss or 'alone'}", data,
            lambda run, loss=loss, hints=hints: edgekd.distill(
                new(STUDENT, 0, data), task=task, data=data, run=run, epochs=EPOCHS, alpha=0.5,
                teacher=wide if loss else None, **TRAINING, **hints,
            ),
        )  # fmt: skip


# ---- figures -------------------------------------------------------------------------------------


@cache
def matches(name: str) -> average_precision.Matches:
    """Of an arm's detections with the truth."""
    kept = np.load(RUNS / name / "found.npz")
    found, truth = (torch.from_numpy(kept[key]) for key in ("found", "truth"))
    classes = int(truth[..., 0].max()) + 1
    return average_precision.match(found, truth, classes).only("all")


def scores(found: average_precision.Matches, draw: Any = None) -> dict[str, float]:
    """mAP50 and mAP."""
    precision = found.precision(draw)
    of = {"mAP50": precision[:1], "mAP": precision}
    return {name: average_precision.mean(part) or 0.0 for name, part in of.items()}


@cache
def resampled(name: str) -> dict[str, list[float]]:
    """Both metrics of an arm for each draw of images."""
    found = matches(name)
    drawn = [scores(found, draw) for draw in average_precision.draws(found.images)]
    return {metric: [each[metric] for each in drawn] for metric in METRICS}


def figures() -> dict[str, Any]:
    """Of all arms that are done: scores with intervals, and the answer to each question."""
    done = {path.parent.name: RunDir(path.parent).done() for path in RUNS.glob("*/done.json")}
    rows = {
        name: row | {f"{m} ci95": average_precision.interval(resampled(name)[m]) for m in METRICS}
        for name, row in sorted(done.items()) if row is not None
    }  # fmt: skip
    answers = {}
    for question, (control, name) in QUESTIONS.items():
        seeds = [s for s in SEEDS if f"{control}-{s}" in rows and f"{name}-{s}" in rows]
        if not seeds:
            continue
        answer: dict[str, Any] = {"arms": [name, control], "seeds": seeds}
        for metric in METRICS:
            each = [rows[f"{name}-{s}"][metric] - rows[f"{control}-{s}"][metric] for s in seeds]
            drawn = np.mean([
                np.subtract(resampled(f"{name}-{s}")[metric], resampled(f"{control}-{s}")[metric])
                for s in seeds
            ], 0)  # fmt: skip
            answer[metric] = {
                "each": each, "mean": float(np.mean(each)),
                "ci95": average_precision.interval(drawn.tolist()),
            }  # fmt: skip
        answers[question] = answer
    whole = [s for s in SEEDS if f"ensemble-{s}" in rows]
    return {
        "epochs": {
            "teacher": TEACHER_EPOCHS, "arm": EPOCHS, "retrained": RETRAINED, "quantized": QUANTIZED
        },
        "resamples": average_precision.RESAMPLES, "seeds": f"{len(whole)} of {len(SEEDS)}",
        "arms": rows, "differences": answers,
    }  # fmt: skip


# ---- artifacts -----------------------------------------------------------------------------------


def artifacts(data: edgekd.Data, seed: int = 0) -> dict[str, Any]:
    """What ships of one seed: verified on every target, timed here beside the teacher."""
    wide, pruned = (edgekd.Network.load(RUNS / f"{name}-{seed}") for name in ("wide", "pruned"))
    quantized: dict[Any, edgekd.Network] = {}
    rows = []
    for name in TARGETS:
        target = edgekd.Target.load(name)
        nets = [pruned]
        if target.scheme is not None:
            if target.scheme not in quantized:
                own = "qad" if name == TARGET else f"qad-{name}"
                make = integers(pruned, wide, name, seed, data)
                quantized[target.scheme] = arm(f"{own}-{seed}", data, make)
            nets.append(quantized[target.scheme])
        for net in nets:
            folder = RUNS / "artifacts" / name / ("float" if net.scheme is None else "int8")
            made = edgekd.export(net, target=target, out=folder)
            parity = edgekd.verify(made, net, data=data, task=task, metric_gap=0.002)
            row = json.loads(parity.model_dump_json())
            if target.native_here:
                row["infer.py"] = by_infer(folder, data)
            rows.append(row)
            print(name, made.precision, parity.gate, parity.agreement, *parity.reasons, flush=True)
    exported = [edgekd.export(wide, target=TARGET, out=RUNS / "artifacts" / "teacher")]
    for kind in ("float", "int8"):
        exported.append(edgekd.Artifact.load(RUNS / "artifacts" / TARGET / kind))
    timed = [profile_together(exported, target=TARGET, runs=300) for _ in range(3)]
    names = ("teacher fp32", "pruned fp32", "qad int8")
    return {
        "rows": rows,
        "latency": {
            "target": TARGET, "host": host_name(), "date": today(), "threads": 1, "runs": 300,
            "clock": sorted({m.clock for row in timed for m in row}),
            "p50_ms": {n: [row[i].p50_ms for row in timed] for i, n in enumerate(names)},
        },
    }  # fmt: skip


def by_infer(folder: Path, data: edgekd.Data) -> dict[str, float]:
    """mAP of the bundle's own `infer.py` over the test images, beside evaluation's."""
    raise NotImplementedError


def main() -> None:
    """Each piece that is asked for; the figures of what is done so far."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path, help="BCCD: a folder or a zip in COCO's format")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="whose arms to make")
    parser.add_argument("--tune", action="store_true", help="the choices alone")
    parser.add_argument("--artifacts", action="store_true", help="export, verify and time seed 0")
    parser.add_argument("--last", choices=["ensemble"], help="stop before what --tune decides")
    options = parser.parse_args()
    data = everything(options.root)
    if options.tune:
        return tune(data)
    for seed in options.seeds:
        arms(seed, data, options.last)


if __name__ == "__main__":
    main()
