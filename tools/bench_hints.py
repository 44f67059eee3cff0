"""When are hints worth their time, and why not where they are not?

    python tools/bench_hints.py        # about 20 minutes on one core; killed, it goes on

The gain of hints on Fashion-MNIST by the number of training images and their weight: the teacher
and the student of the classifier's bench, three seeds. And of the first seed's students the share
of the teacher's maps that no affine map of the student's explains, on test images: what is left to
learn. Only the bench's teacher is needed. Figures go to docs/bench/hints.json.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from bench_classifier import ROOT, RUNS, SEEDS, STUDENT, TEACHER, Arm, arm, data, new, task, teacher
from torch import Tensor

import edgekd
from edgekd.data.base import evaluation_batches
from edgekd.files import write_atomically
from edgekd.knowledge.feature import relative_error
from edgekd.knowledge.taps import pair_hints, tapped
from edgekd.latency.measuring import host_name, today
from edgekd.network import eval_mode
from edgekd.rundir import RunDir
from edgekd.tasks.base import paired_difference

RESULT = ROOT / "docs" / "bench" / "hints.json"
IMAGES = {1000: 32, 4000: 16}  # training images -> epochs
WEIGHTS = (0.3, 1.0)


def maps(net: edgekd.Network, path: str, split: str, count: int = 2000) -> Tensor:
    """(positions, channels) of one feature map over `count` images."""
    found = []
    with torch.no_grad(), eval_mode(net.module), tapped(net.module, [path]) as features:
        some = data.subset(**{split: count})
        for x, _ in evaluation_batches(some, split=split, batch_size=250):
            net(x)
            found.append(features[path].movedim(1, -1).flatten(0, -2))
    return torch.cat(found)


def unexplained(student: edgekd.Network, taught: edgekd.Network) -> dict[str, float]:
    """For each pair of taps: relative error, on test images, of the best affine map on training."""
    errors = {}
    for ours, theirs in pair_hints("auto", student.module, taught.module, student.io.example(2)):
        x, y = maps(student, ours, "train").double(), maps(taught, theirs, "train").double()
        one = torch.ones(len(x), 1, dtype=x.dtype)
        solved = torch.linalg.lstsq(torch.cat([x, one], 1), y).solution
        x, y = maps(student, ours, "test").double(), maps(taught, theirs, "test").double()
        one = torch.ones(len(x), 1, dtype=x.dtype)
        errors[theirs] = float(relative_error(torch.cat([x, one], 1) @ solved, y))
    return errors


def student(images: int, weight: float, seed: int) -> Arm:
    """Distilled from `images` of the training images, with hints of `weight`."""
    some = data.subset(train=images)

    def make(run: RunDir) -> edgekd.Network:
        return edgekd.distill(
            new(STUDENT, seed), task=task, data=some, teacher=teacher().net, run=run, seed=seed,
            epochs=IMAGES[images], cache=RUNS / "cache", hints="auto" if weight else (),
            hint_weight=weight or 1.0,
        )  # fmt: skip

    return arm(f"few-{images}-{weight:g}-{seed}", make)


def row(images: int, weight: float) -> dict[str, Any]:
    """Students with hints of `weight` beside the same without."""
    ours, theirs = ([student(images, w, seed) for seed in SEEDS] for w in (weight, 0.0))
    hits = [[torch.from_numpy(a.hits).double() for a in arms] for arms in (ours, theirs)]
    each = [paired_difference(a, b) for a, b in zip(*hits, strict=True)]
    whole = paired_difference(*(torch.stack(side).mean(0) for side in hits))
    taught = teacher().net
    return {
        "images": images, "epochs": IMAGES[images], "weight": weight,
        "without": float(torch.stack(hits[1]).mean()), "difference": whole.value,
        "ci95": whole.ci95, "seeds": [d.value for d in each],
        "unexplained": unexplained(ours[0].net, taught),
        "unexplained_without": unexplained(theirs[0].net, taught),
    }  # fmt: skip


def main() -> None:
    """A row at a time; the file is written as far as it has come."""
    result: dict[str, Any] = {
        "host": host_name(), "date": today(), "teacher": TEACHER, "student": STUDENT, "rows": []
    }  # fmt: skip
    for images in IMAGES:
        for weight in WEIGHTS:
            result["rows"].append(row(images, weight))
            write_atomically(RESULT, json.dumps(result, indent=1))
            print(result["rows"][-1], file=sys.stderr)


if __name__ == "__main__":
    main()
