"""What each stage is worth: Fashion-MNIST, one teacher, three seeds of student.

    python tools/bench_classifier.py            # what is missing, then the tables
    python tools/bench_classifier.py --seeds 1  # one seed only; several processes may share the work
    python tools/bench_classifier.py --tables   # the tables of what there is, as Markdown

Every arm is a folder in runs/bench-classifier: killed and started again, the same command goes on.
Figures go to docs/bench/classifier.json. The arms of one seed differ in one thing each:

    alone      the student on labels only
    distilled  the same, from the teacher's outputs too
    hints      the same, from its feature maps too
    pruned     `hints`, a third of the channels removed behind the first stage, retrained likewise
    direct     the pruned network's size, trained likewise from scratch
    ptq        `pruned` in integers, post-training
    qad        `pruned` in integers, distilled from the teacher
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgekd
from edgekd.data.readers import read_data
from edgekd.latency.measuring import host_name, today
from edgekd.models.build import Build, build_module
from edgekd.rundir import RunDir
from edgekd.stages.profile import profile_together
from edgekd.training import fabric, gather, predict

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench-classifier"
RESULT = ROOT / "docs" / "bench" / "classifier.json"
SEEDS = (0, 1, 2)
TEACHER = [24, 56, 112, 224]
STUDENT = [16, 24, 48, 96]
PRUNED = [16, 16, 32, 64]
TEACHER_EPOCHS, EPOCHS, QUANTIZED_EPOCHS = 12, 8, 2
TARGET = "host-onnxruntime"
# what the second arm has and the first has not
QUESTIONS = {
    "distillation": ("alone", "distilled"),
    "hints": ("distilled", "hints"),
    "pruning a larger one": ("direct", "pruned"),
    "quantization-aware distillation": ("ptq", "qad"),
    "all of it beside the student alone": ("alone", "qad"),
    "what ships beside the teacher": ("teacher", "qad"),
}

task = edgekd.get_task("classification")
data = read_data(source="fashion-mnist", augment=("flip",))


@dataclass(frozen=True)
class Arm:
    """A finished network, and which of the test images it gets right."""

    net: edgekd.Network
    hits: np.ndarray


def new(widths: list[int], seed: int) -> edgekd.Network:
    build = Build(
        model="edgekd/resnet", kwargs={"num_classes": 10, "in_channels": 1, "widths": widths}
    )
    torch.manual_seed(seed)
    return edgekd.Network(
        build_module(build, trust=False, origin="bench"), torch.zeros(1, *data.image_shape),
        preprocessing=data.preprocessing, labels=data.classes, build=build,
    )  # fmt: skip


def arm(name: str, make: Callable[[RunDir], edgekd.Network]) -> Arm:
    """Made, or loaded if its folder is done."""
    run = RunDir(RUNS / name)
    if run.done() is None:
        print(f"{name} …", flush=True)
        net = make(run)
        outputs, (labels, *_) = gather(predict(net, data, on=fabric()))
        hits = (outputs.argmax(1) == labels).numpy()
        net.save(run.path)
        np.save(run.path / "hits.npy", hits)
        run.finish({"accuracy": float(hits.mean()), "params": net.params, "macs": net.macs})
        print(f"{name}: {hits.mean():.2%}", flush=True)
    return Arm(edgekd.Network.load(run.path), np.load(run.path / "hits.npy"))


def teacher() -> Arm:
    return arm(
        "teacher",
        lambda run: edgekd.distill(
            new(TEACHER, 0), task=task, data=data, epochs=TEACHER_EPOCHS, run=run
        ),
    )


def arms(seed: int, only: str | None = None) -> dict[str, Arm]:
    """All arms of one seed, in the order in which they need one another."""
    taught = teacher()
    done: dict[str, Arm] = {}
    common: dict[str, Any] = {"task": task, "data": data, "seed": seed}
    learning: dict[str, Any] = common | {
        "epochs": EPOCHS, "teacher": taught.net, "cache": RUNS / "cache"
    }  # fmt: skip
    hints = {"hints": "auto"}
    ways: dict[str, Callable[[RunDir], edgekd.Network]] = {
        "hints": lambda run: edgekd.distill(new(STUDENT, seed), run=run, **learning, **hints),
        "pruned": lambda run: edgekd.prune(
            done["hints"].net, ratio=0.34, round_to=8, ignore=["stem.0", "stages.0"], run=run,
            **learning, **hints,
        ),
        "qad": lambda run: edgekd.quantize(
            done["pruned"].net, target=TARGET, run=run,
            **learning | {"epochs": QUANTIZED_EPOCHS}, **hints,
        ),
        "ptq": lambda run: edgekd.quantize(done["pruned"].net, target=TARGET, data=data),
        "direct": lambda run: edgekd.distill(new(PRUNED, seed), run=run, **learning, **hints),
        "distilled": lambda run: edgekd.distill(new(STUDENT, seed), run=run, **learning),
        "alone": lambda run: edgekd.distill(new(STUDENT, seed), run=run, epochs=EPOCHS, **common),
    }  # fmt: skip
    for name, make in ways.items():
        done[name] = arm(f"{name}-{seed}", make)
        if name == only:
            break
    return {"teacher": taught, **done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", help="stop after this arm")
    options = parser.parse_args()
    for seed in options.seeds:
        arms(seed, options.only)


if __name__ == "__main__":
    main()
