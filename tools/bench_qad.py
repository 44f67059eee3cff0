"""What quantization-aware distillation gives a student that had no teacher.

    python tools/bench_qad.py                    # the arms that are missing, then the table
    python tools/bench_qad.py --seeds 1          # of one seed; processes may share them
    python tools/bench_qad.py --targets intel-cpu

The teacher and the student of `bench_classifier` that learnt from labels only. The student is put
in the integers of a target: post-training, and distilled from the teacher for as many epochs as it
was trained, with batch normalisation for four fifths of them. Every arm is a folder in runs/:
killed and started again, the same command goes on. Figures go to docs/bench/qad.json, shares of the
same 10,000 test images with 95 % intervals over them of the mean of the seeds; targets that share a
scheme share its arms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_classifier import (
    EPOCHS,
    SEEDS,
    STUDENT,
    Arm,
    arm,
    data,
    new,
    over_seeds,
    points,
    task,
    teacher,
)

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.rundir import RunDir
from edgekd.target import Target, target_names

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench-qad"
RESULT = ROOT / "docs" / "bench" / "qad.json"
# what the first arm gets right more than the second
QUESTIONS = (("ptq", "fp32"), ("qad", "ptq"), ("qad", "fp32"))


def schemes() -> dict[str, list[str]]:
    """The first target of each scheme -> all that have it."""
    found: dict[str, list[str]] = {}
    for name in target_names():
        target = Target.load(name)
        if target.scheme is not None and "int8" in target.precisions:
            found.setdefault(target.scheme.model_dump_json(), []).append(name)
    return {names[0]: names for names in found.values()}


def in_float(seed: int, run: RunDir) -> edgekd.Network:
    """The student on labels only."""
    return edgekd.distill(
        new(STUDENT, seed), task=task, data=data, epochs=EPOCHS, seed=seed, run=run
    )


def distilled(net: edgekd.Network, target: str, seed: int, run: RunDir) -> edgekd.Network:
    """In the target's integers, from the teacher."""
    return edgekd.quantize(
        net, target=target, task=task, data=data, teacher=teacher().net, epochs=EPOCHS, lr=1e-2,
        batchnorm=0.8, cache=RUNS / "cache", seed=seed, run=run,
    )  # fmt: skip


def arms(seed: int, name: str) -> dict[str, Arm]:
    """Of one seed and target, made or loaded; in float it is bench_classifier's own."""
    floats = arm(f"alone-{seed}", partial(in_float, seed))
    ways: dict[str, Callable[[RunDir], edgekd.Network]] = {
        "ptq": lambda run: edgekd.quantize(floats.net, target=name, data=data),
        "qad": partial(distilled, floats.net, name, seed),
    }
    made = {kind: arm(f"{kind}-{name}-{seed}", make, RUNS) for kind, make in ways.items()}
    return {"fp32": floats, **made}


def figures() -> dict[str, Any]:
    """Of every arm that is done, of each scheme by its first target."""
    rows: dict[str, Any] = {}
    for name, targets in schemes().items():
        seeds = [seed for seed in SEEDS if RunDir(RUNS / f"qad-{name}-{seed}").done()]
        if not seeds:
            continue
        done = {seed: arms(seed, name) for seed in seeds}
        rows[name] = {
            "targets": targets, "seeds": f"{len(seeds)} of {len(SEEDS)}",
            "accuracy": {
                seed: {kind: float(arm.hits.mean()) for kind, arm in of.items()}
                for seed, of in done.items()
            },
        }  # fmt: skip
        for question in QUESTIONS:
            pairs = [[of[kind].hits for kind in question] for of in done.values()]
            rows[name][" − ".join(question)] = over_seeds(seeds, pairs)
    return {
        "test_images": len(data.splits["test"]), "epochs": EPOCHS,
        "teacher": float(teacher().hits.mean()), "schemes": rows,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Markdown for the docs."""
    asked = [" − ".join(question) for question in QUESTIONS]
    lines = [
        f"Fashion-MNIST, {result['test_images']:,} test images, {len(result['schemes'])} of "
        f"{len(schemes())} schemes.", "",
        "| targets | seeds | " + " | ".join(f"`{question}`" for question in asked) + " |",
        "|---" * (len(asked) + 2) + "|",
    ]  # fmt: skip
    for row in result["schemes"].values():
        cells = [", ".join(row["targets"]), row["seeds"], *(points(row[q]) for q in asked)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The arms that are missing, and what all of them show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="whose arms to make")
    parser.add_argument(
        "--targets", nargs="*", default=list(schemes()), choices=list(schemes()),
        help="the first target of each scheme that is wanted",
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.targets:
            arms(seed, name)
    result = figures() | {"host": host_name(), "date": today()}
    print(table(result))
    write_atomically(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
