"""What quantization-aware distillation is worth to a student that had no teacher before.

    python tools/bench_qad.py               # the arms that are missing
    python tools/bench_qad.py --seeds 1     # of one seed; processes may share them

Fashion-MNIST. A teacher and MobileNetV2 at a quarter of its width are trained on the labels; then
the latter is put in the integers of each target that has a scheme of its own: post-training, and
distilled from the teacher. Every arm is a folder in runs/bench-qad: killed and started again, the
same command goes on. Figures go to docs/bench/qad.json: differences of accuracy on the same 10,000
test images, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_classifier import Arm, arm, data, difference, new, over_seeds, task
from torchvision.models import mobilenet_v2

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.rundir import RunDir
from edgekd.target import Target, target_names

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench-qad"
RESULT = ROOT / "docs" / "bench" / "qad.json"
SEEDS = (0, 1, 2)
TEACHER, WIDTH = [16, 24, 48, 96], 0.25
TEACHER_EPOCHS, EPOCHS, QUANTIZED_EPOCHS = 4, 5, 1
QUESTIONS = (("ptq", "fp32"), ("qad", "fp32"), ("qad", "ptq"))


def student(seed: int) -> edgekd.Network:
    """Not trained; its stem keeps all 28 px."""
    torch.manual_seed(seed)
    module = mobilenet_v2(width_mult=WIDTH, num_classes=len(data.classes))
    stem = module.features[0]
    stem[0] = torch.nn.Conv2d(1, stem[0].out_channels, 3, padding=1, bias=False)
    return edgekd.Network(
        module, torch.zeros(1, *data.image_shape), preprocessing=data.preprocessing,
        labels=data.classes,
    )  # fmt: skip


def schemes() -> dict[str, list[str]]:
    """The first target of each scheme -> all that have it."""
    found: dict[str, list[str]] = {}
    for name in target_names():
        target = Target.load(name)
        if target.scheme is not None and "int8" in target.precisions:
            found.setdefault(target.scheme.model_dump_json(), []).append(name)
    return {names[0]: names for names in found.values()}


def trained(net: edgekd.Network, epochs: int, seed: int, run: RunDir) -> edgekd.Network:
    """On the labels."""
    return edgekd.distill(net, task=task, data=data, epochs=epochs, seed=seed, run=run)


def post_training(net: edgekd.Network, target: str, run: RunDir) -> edgekd.Network:
    """In a target's integers."""
    return edgekd.quantize(net, target=target, data=data)


def distilled(
    net: edgekd.Network, target: str, taught: edgekd.Network, seed: int, run: RunDir
) -> edgekd.Network:
    """In a target's integers, from a teacher in float32."""
    return edgekd.quantize(
        net, target=target, task=task, data=data, teacher=taught, epochs=QUANTIZED_EPOCHS,
        cache=RUNS / "cache", seed=seed, run=run,
    )  # fmt: skip


def teacher() -> Arm:
    """Trained once."""
    return arm("teacher", partial(trained, new(TEACHER, 0), TEACHER_EPOCHS, 0), RUNS)


def in_float(seed: int) -> Arm:
    """The student."""
    return arm(f"fp32-{seed}", partial(trained, student(seed), EPOCHS, seed), RUNS)


def arms(seed: int) -> dict[str, Arm]:
    """All of one seed; in integers `kind target`."""
    done = {"fp32": (floats := in_float(seed))}
    for name in schemes():
        ways = {
            "ptq": partial(post_training, floats.net, name),
            "qad": partial(distilled, floats.net, name, teacher().net, seed),
        }
        for kind, make in ways.items():
            done[f"{kind} {name}"] = arm(f"{kind}-{name}-{seed}", make, RUNS)
    return done


def main() -> None:
    """The arms that are missing, and what the seeds that are asked for show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="whose arms to make")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {seed: arms(seed) for seed in options.seeds}
    rows: dict[str, dict[str, Any]] = {}
    print(
        "| targets | " + " | ".join(f"{a} − {b}" for a, b in QUESTIONS) + " |\n" + "|---" * 4 + "|"
    )
    for name, names in schemes().items():
        rows[name] = {"targets": names}
        for ours, theirs in QUESTIONS:
            keys = [kind if kind == "fp32" else f"{kind} {name}" for kind in (ours, theirs)]
            pairs = {seed: [of[key].hits for key in keys] for seed, of in done.items()}
            rows[name][f"{ours} - {theirs}"] = over_seeds(pairs)
        shown = [difference(rows[name][f"{a} - {b}"]) for a, b in QUESTIONS]
        print("| " + " | ".join([", ".join(names), *shown]) + " |")
    accuracy = {f"{k} {s}": float(a.hits.mean()) for s, of in done.items() for k, a in of.items()}
    result = {
        "teacher": f"edgekd/resnet {TEACHER}", "student": f"torchvision/mobilenet_v2 x {WIDTH}",
        "epochs": {"teacher": TEACHER_EPOCHS, "fp32": EPOCHS, "qad": QUANTIZED_EPOCHS},
        "test_images": len(data.splits["test"]), "seeds": f"{len(done)} of {len(SEEDS)}",
        "host": host_name(), "date": today(),
        "accuracy": accuracy | {"teacher": float(teacher().hits.mean())}, "schemes": rows,
    }  # fmt: skip
    write_atomically(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
