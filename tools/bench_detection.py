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
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgekd
from edgekd.data.base import Chosen
from edgekd.data.detection import unpack
from edgekd.data.readers import read_data
from edgekd.files import write_atomically
from edgekd.knowledge.feature import HINT_LOSSES
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
TUNED = tuple(f"tune-{name}" for name in ("wide", "alone", "response", *HINT_LOSSES))
TARGET = "host-onnxruntime"
TARGETS = ("host-onnxruntime", "intel-cpu", "android-arm64", "jetson-nano", "jetson-orin-nano")
SPLITS = ("test", "val")  # what is scored
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
    for split in SPLITS if "val" in data.splits else ("test",):
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
    arm(f"from-deep-{seed}", data, student(teacher=deep))


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
    for name in TUNED[1:]:
        loss = name.removeprefix("tune-")
        hints = {"hints": "auto", "hint_loss": loss} if loss in HINT_LOSSES else {}
        arm(
            name, data,
            lambda run, loss=loss, hints=hints: edgekd.distill(
                new(STUDENT, 0, data), task=task, data=data, run=run, epochs=EPOCHS, alpha=0.5,
                teacher=None if loss == "alone" else wide, **TRAINING, **hints,
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
        for name, row in sorted(done.items()) if row and not name.startswith("tune-")
    }  # fmt: skip
    answers = {}
    for question, (control, name) in QUESTIONS.items():
        pairs = {s: (f"{name}-{s}", control if control in TEACHERS else f"{control}-{s}")
                 for s in SEEDS}  # fmt: skip
        seeds = [s for s, pair in pairs.items() if all(each in rows for each in pair)]
        if not seeds:
            continue
        answer: dict[str, Any] = {"arms": [name, control], "seeds": seeds}
        for metric in METRICS:
            each = [rows[pairs[s][0]][metric] - rows[pairs[s][1]][metric] for s in seeds]
            drawn = np.mean([
                np.subtract(*(resampled(name)[metric] for name in pairs[s])) for s in seeds
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
        "tuning": {
            name.removeprefix("tune-"): row for name in TUNED if (row := done.get(name)) is not None
        },
    }  # fmt: skip


# ---- artifacts -----------------------------------------------------------------------------------


def artifacts(data: edgekd.Data, root: Path, seed: int = 0) -> dict[str, Any]:
    """What ships of one seed: verified on every target, timed here beside the teacher."""
    wide, pruned = (edgekd.Network.load(RUNS / name) for name in ("wide", f"pruned-{seed}"))
    quantized: dict[Any, tuple[str, edgekd.Network]] = {}
    rows = []
    for name in TARGETS:
        target = edgekd.Target.load(name)
        nets = [(f"pruned-{seed}", pruned)]
        if target.scheme is not None:
            if target.scheme not in quantized:
                own = f"qad-{seed}" if name == TARGET else f"qad-{name}-{seed}"
                made = arm(own, data, integers(pruned, wide, name, seed, data))
                quantized[target.scheme] = own, made
            nets.append(quantized[target.scheme])
        for own, net in nets:
            folder = RUNS / "artifacts" / name / ("float" if net.scheme is None else "int8")
            artifact = edgekd.export(net, target=target, out=folder)
            parity = edgekd.verify(artifact, net, data=data, task=task, metric_gap=0.002)
            row = json.loads(parity.model_dump_json())
            if target.native_here:
                row["infer.py"] = by_infer(folder, root, own)
            rows.append(row)
            print(
                name, artifact.precision, parity.gate, parity.agreement, *parity.reasons, flush=True
            )
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


def by_infer(folder: Path, root: Path, name: str) -> dict[str, float]:
    """What the bundle's own `infer.py` scores on the image files, beside the arm of that name."""
    place = unpack(root) if root.suffix == ".zip" else root
    files = []
    for split in SPLITS:
        content = json.loads((place / "annotations" / f"instances_{split}.json").read_text())
        files += [next(place.rglob(image["file_name"])) for image in content["images"]]
    ran = subprocess.run(
        [sys.executable, folder / "infer.py", "--json", "--score", "0", *files],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    truth = torch.from_numpy(np.load(RUNS / name / "found.npz")["truth"])
    found = torch.full((len(files), average_precision.MOST, 6), -1.0)
    for rows, line in zip(found, ran.stdout.splitlines(), strict=True):
        boxes = torch.tensor(json.loads(line)["boxes"]).reshape(-1, 6)
        rows[: len(boxes)] = boxes
    mine = average_precision.match(found, truth, int(truth[..., 0].max()) + 1).only("all")
    return {"infer.py": scores(mine)["mAP"], "evaluation": scores(matches(name))["mAP"]}


def tables(result: dict[str, Any]) -> str:
    """Markdown."""
    arms_, epochs = result["arms"], result["epochs"]
    images = next(iter(arms_.values()))["images"]
    lines = [
        "# A detector, stage by stage", "",
        "Written by `tools/bench_detection.py`, which says what the arms are. BCCD (blood cells, "
        f"205 training images), {images} images of val and test, scored once; teachers trained "
        f"once for {epochs['teacher']} epochs, students of seeds 0, 1 and 2 ({result['seeds']} "
        f"done) for {epochs['arm']}. Intervals: 95 %, from {result['resamples']} draws of the "
        "images, the same for both arms of a pair; a gain is one whose interval excludes 0. What "
        f"is pruned was trained {epochs['retrained']} epochs longer, what is in integers "
        f"{epochs['quantized']} more.",
        "", "| what is added | mAP50, points more than without | each seed | mAP, likewise | "
        "each seed |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for question, answer in result["differences"].items():
        ours, control = answer["arms"]
        cells = []
        for metric in METRICS:
            of = answer[metric]
            low, high = (100 * x for x in of["ci95"])
            cells.append(f"{100 * of['mean']:+.1f} ({low:+.1f} to {high:+.1f})")
            cells.append(", ".join(f"{100 * x:+.1f}" for x in of["each"]))
        lines.append(f"| {question} (`{ours}` − `{control}`) | {' | '.join(cells)} |")
    lines += ["", "| arm | mAP50, each seed | mAP, each seed | parameters | MACs |",
              "|---|---|---|---|---|"]  # fmt: skip
    for name in dict.fromkeys(re.sub(r"-\d$", "", name) for name in arms_):
        rows = [row for key, row in arms_.items() if re.sub(r"-\d$", "", key) == name]
        each = [", ".join(f"{100 * row[metric]:.1f}" for row in rows) for metric in METRICS]
        lines.append(
            f"| `{name}` | {each[0]} | {each[1]} | {rows[0]['params']:,} | "
            f"{rows[0]['macs'] / 1e6:.1f} M |"
        )
    if tuned := result.get("tuning"):
        count = next(iter(tuned.values()))["images"]
        lines += ["", f"What was chosen by, on {count} training images that neither these arms "
                  "nor their teacher saw (seed 0, once):", "", "| learnt from | mAP50 | mAP |",
                  "|---|---|---|"]  # fmt: skip
        lines += [f"| {name} | {100 * row['mAP50']:.1f} | {100 * row['mAP']:.1f} |"
                  for name, row in tuned.items()]  # fmt: skip
    if made := result.get("artifacts"):
        timed = made["latency"]
        medians = {name: float(np.median(ms)) for name, ms in timed["p50_ms"].items()}
        whole = medians["teacher fp32"]
        lines += ["", "## What ships of seed 0", "", "| target | precision | gate | agreement | "
                  "mean difference, steps | integers | compiled for SM 8.6 | mAP of `infer.py`, "
                  "of evaluation |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in made["rows"]:
            steps = "" if row["mean_steps"] is None else f"{row['mean_steps']:.3f}"
            share = "" if row["integer_share"] is None else f"{row['integer_share']:.0%}"
            compiled = row["compiled"]
            built = (
                ""
                if not compiled or not compiled["total"]
                else f"{compiled['integer']} of {compiled['total']} Int8"
            )
            both = row.get("infer.py", {})
            said = ", ".join(f"{100 * value:.2f}" for value in both.values())
            lines.append(
                f"| {row['target']} | {row['precision']} | {row['gate']} | "
                f"{row['agreement']:.2%} | {steps} | {share} | {built} | "
                f"{said} |"
            )
        lines += ["", f"Latency on {timed['host']} (host), {timed['target']}, one thread, batch 1, "
                  f"three rounds in turns, {', '.join(timed['clock'])} clock:", ""]  # fmt: skip
        lines += [f"- {n}: {ms:.2f} ms, {whole / ms:.1f}×" for n, ms in medians.items()]
    return "\n".join(lines) + "\n"


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
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result = kept | figures() | {"host": host_name(), "date": today()}
    if options.artifacts:
        result["artifacts"] = artifacts(data, options.root)
    write_atomically(RESULT, json.dumps(result, indent=1))
    write_atomically(PAGE, tables(result))
    return None


if __name__ == "__main__":
    main()
