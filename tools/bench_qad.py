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
from collections.abc import Callable, Sequence
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


def arms(seed: int, targets: Sequence[str]) -> dict[str, Arm]:
    """All of one seed; in integers `kind target`."""
    floats = arm(f"alone-{seed}", partial(in_float, seed))  # bench_classifier's own
    done = {"fp32": floats}
    for name in targets:
        ways: dict[str, Callable[[RunDir], edgekd.Network]] = {
            "ptq": lambda run, name=name: edgekd.quantize(floats.net, target=name, data=data),
            "qad": partial(distilled, floats.net, name, seed),
        }
        for kind, make in ways.items():
            done[f"{kind} {name}"] = arm(f"{kind}-{name}-{seed}", make, RUNS)
    return done


def compared(done: dict[int, dict[str, Arm]], targets: Sequence[str]) -> dict[str, Any]:
    """Each target with those that share its scheme, and the answer to each question."""
    rows: dict[str, Any] = {}
    for name in targets:
        rows[name] = {"targets": schemes()[name]}
        for question in QUESTIONS:
            keys = [kind if kind == "fp32" else f"{kind} {name}" for kind in question]
            pairs = [[of[key].hits for key in keys] for of in done.values()]
            rows[name][" − ".join(question)] = over_seeds(list(done), pairs)
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown for the docs."""
    asked = [" − ".join(question) for question in QUESTIONS]
    lines = [
        f"Fashion-MNIST, {result['test_images']:,} test images, seeds: {result['seeds']}.", "",
        "| targets | " + " | ".join(f"`{question}`" for question in asked) + " |",
        "|---" * (len(asked) + 1) + "|",
    ]  # fmt: skip
    for row in result["schemes"].values():
        lines.append(
            f"| {', '.join(row['targets'])} | " + " | ".join(points(row[q]) for q in asked) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """The arms that are missing, and what the seeds that are asked for show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="whose arms to make")
    parser.add_argument(
        "--targets", nargs="*", default=list(schemes()), choices=list(schemes()),
        help="the first target of each scheme that is wanted",
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {seed: arms(seed, options.targets) for seed in options.seeds}
    result = {
        "test_images": len(data.splits["test"]), "seeds": f"{len(done)} of {len(SEEDS)}",
        "targets": f"{len(options.targets)} of {len(schemes())}", "epochs": EPOCHS,
        "host": host_name(), "date": today(), "teacher": float(teacher().hits.mean()),
        "accuracy": {
            f"{key} {seed}": float(arm.hits.mean())
            for seed, of in done.items() for key, arm in of.items()
        },
        "schemes": compared(done, options.targets),
    }  # fmt: skip
    print(table(result))
    if len(done) == len(SEEDS):
        write_atomically(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
