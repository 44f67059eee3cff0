"""When are hints worth their time, and why not where they are not? After tools/bench_classifier.py.

    python tools/bench_hints.py        # about 20 minutes on one core; killed, it goes on

Two answers on Fashion-MNIST, of the same teacher and student:

    unexplained  share of the teacher's maps that no affine map of the student's explains, on test
                 images, for the bench's arms with and without hints (of the seeds that are here)
    few          the gain of hints by the number of training images and their weight, three seeds

Figures go to docs/bench/hints.json.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from bench_classifier import ROOT, RUNS, SEEDS, STUDENT, TEACHER, arm, data, new, task, teacher
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
WEIGHTS = (0.0, 0.3, 1.0)


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


def few(images: int, weight: float, seed: int) -> Tensor:
    """Which test images are right, for a student distilled from `images` of the training images."""
    some = data.subset(train=images)

    def make(run: RunDir) -> edgekd.Network:
        return edgekd.distill(
            new(STUDENT, seed), task=task, data=some, teacher=teacher().net, run=run, seed=seed,
            epochs=IMAGES[images], cache=RUNS / "cache", hints="auto" if weight else (),
            hint_weight=weight or 1.0,
        )  # fmt: skip

    return torch.from_numpy(arm(f"few-{images}-{weight:g}-{seed}", make).hits).double()


def main() -> None:
    """Both answers; the second is written as far as it has come."""
    taught = teacher().net
    result: dict[str, Any] = {
        "host": host_name(), "date": today(), "teacher": TEACHER, "student": STUDENT,
        "unexplained": {
            name: {
                path.name.rpartition("-")[2]: unexplained(edgekd.Network.load(path), taught)
                for path in sorted(RUNS.glob(f"{name}-?"))
            }
            for name in ("alone", "distilled", "hints")
        },
        "few": [],
    }  # fmt: skip
    for images, epochs in IMAGES.items():
        without = [few(images, 0.0, seed) for seed in SEEDS]
        for weight in WEIGHTS[1:]:
            hits = [few(images, weight, seed) for seed in SEEDS]
            each = [paired_difference(a, b) for a, b in zip(hits, without, strict=True)]
            whole = paired_difference(torch.stack(hits).mean(0), torch.stack(without).mean(0))
            result["few"].append(
                {"images": images, "epochs": epochs, "weight": weight,
                 "without": float(torch.stack(without).mean()), "difference": whole.value,
                 "ci95": whole.ci95, "seeds": [d.value for d in each]}
            )  # fmt: skip
            write_atomically(RESULT, json.dumps(result, indent=1))
            print(result["few"][-1], file=sys.stderr)


if __name__ == "__main__":
    main()
