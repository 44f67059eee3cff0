"""What each stage is worth: Fashion-MNIST, one teacher, three seeds of student.

    python tools/bench_classifier.py                       # the arms that are missing
    python tools/bench_classifier.py --seeds 1             # of one seed; processes may share them
    python tools/bench_classifier.py --latency --gates     # then, on a quiet machine

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgekd
from edgekd.data.readers import read_data
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.models.build import Build, build_module
from edgekd.rundir import RunDir
from edgekd.stages.profile import profile_together
from edgekd.tasks.base import paired_difference
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
TARGETS = ("host-onnxruntime", "intel-cpu", "android-arm64", "jetson-nano", "jetson-orin-nano")
# what the second arm has and the first has not
QUESTIONS = {
    "distillation": ("alone", "distilled"),
    "hints": ("distilled", "hints"),
    "pruning a larger one": ("direct", "pruned"),
    "integers, post-training": ("pruned", "ptq"),
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
    """A network of our family, not trained."""
    build = Build(
        model="edgekd/resnet", kwargs={"num_classes": 10, "in_channels": 1, "widths": widths}
    )
    torch.manual_seed(seed)
    return edgekd.Network(
        build_module(build, trust=False, origin="bench"), torch.zeros(1, *data.image_shape),
        preprocessing=data.preprocessing, labels=data.classes, build=build,
    )  # fmt: skip


def arm(name: str, make: Callable[[RunDir], edgekd.Network], runs: Path = RUNS) -> Arm:
    """Made, or loaded if its folder is done."""
    run = RunDir(runs / name)
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
    """Trained once."""
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


def over_seeds(seeds: Sequence[int], pairs: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    """What the first of each seed's pair gets right more than the second: each, and the mean."""
    tensors = [[torch.from_numpy(hits) for hits in pair] for pair in pairs]
    ours, theirs = (torch.stack(side).double().mean(0) for side in zip(*tensors, strict=True))
    whole = paired_difference(ours, theirs)
    return {
        "seeds": {
            seed: paired_difference(*pair).value
            for seed, pair in zip(seeds, tensors, strict=True)
        },
        "mean": whole.value, "ci95": whole.ci95,
    }  # fmt: skip


def points(answer: dict[str, Any]) -> str:
    """Of `over_seeds`, in points: the mean with its interval."""
    low, high = (100 * x for x in answer["ci95"])
    return f"{100 * answer['mean']:+.2f} ({low:+.2f} to {high:+.2f})"


def figures() -> dict[str, Any]:
    """Of all arms that are done: accuracies, and the answer to each question."""
    done = {path.parent.name: RunDir(path.parent).done() for path in RUNS.glob("*/done.json")}
    hits = {name: np.load(RUNS / name / "hits.npy") for name in sorted(done)}
    seeds = [seed for seed in SEEDS if f"alone-{seed}" in hits]  # the last arm of a seed
    answers = {}
    for question, (control, arm_name) in QUESTIONS.items():
        pairs = [
            [hits[name if name == "teacher" else f"{name}-{seed}"] for name in (arm_name, control)]
            for seed in seeds
        ]
        if not pairs:
            continue
        answers[question] = {"arms": [arm_name, control]} | over_seeds(seeds, pairs)
    return {
        "epochs": {"teacher": TEACHER_EPOCHS, "arm": EPOCHS, "quantized": QUANTIZED_EPOCHS},
        "test_images": len(data.splits["test"]),
        "seeds": f"{len(seeds)} of {len(SEEDS)}",
        "arms": done,
        "differences": answers,
    }


def latencies(rounds: int = 3) -> dict[str, Any]:
    """The teacher in FP32 and what was pruned in both precisions, in turns, one thread."""
    nets = {"teacher fp32": "teacher", "pruned fp32": "pruned-0", "qad int8": "qad-0"}
    artifacts = [
        edgekd.export(
            edgekd.Network.load(RUNS / folder), target=TARGET, out=RUNS / "latency" / folder
        )
        for folder in nets.values()
    ]
    timed = [profile_together(artifacts, target=TARGET, runs=500) for _ in range(rounds)]
    return {
        "target": TARGET, "host": host_name(), "date": today(), "threads": 1, "runs": 500,
        "clock": sorted({m.clock for row in timed for m in row}),
        "p50_ms": {
            name: [row[index].p50_ms for row in timed] for index, name in enumerate(nets)
        },
    }  # fmt: skip


def gates(seed: int = 0) -> list[dict[str, Any]]:
    """Every target: exported, verified on all test images."""
    rows = []
    pruned = edgekd.Network.load(RUNS / f"pruned-{seed}")
    quantized: dict[Any, edgekd.Network] = {}
    for name in TARGETS:
        target = edgekd.Target.load(name)
        nets = [pruned]
        if target.scheme is not None:
            if target.scheme not in quantized:
                quantized[target.scheme] = arms_for(target, seed)
            nets.append(quantized[target.scheme])
        for net in nets:
            folder = RUNS / f"export-{name}" / ("fp32" if net.scheme is None else "int8")
            artifact = edgekd.export(net, target=target, out=folder)
            parity = edgekd.verify(artifact, net, data=data, task=task)
            rows.append(json.loads(parity.model_dump_json()))
            print(name, artifact.precision, parity.gate, parity.agreement, *parity.reasons)
    return rows


def arms_for(target: edgekd.Target, seed: int) -> edgekd.Network:
    """The seed's pruned network, distilled in the target's integers."""
    if edgekd.Target.load(TARGET).scheme == target.scheme:
        return edgekd.Network.load(RUNS / f"qad-{seed}")
    return arm(
        f"qad-{target.name}-{seed}",
        lambda run: edgekd.quantize(
            edgekd.Network.load(RUNS / f"pruned-{seed}"), target=target, run=run, task=task,
            data=data, seed=seed, teacher=teacher().net, cache=RUNS / "cache", hints="auto",
            epochs=QUANTIZED_EPOCHS,
        ),
    ).net  # fmt: skip


def tables(result: dict[str, Any]) -> str:
    """Markdown for the README."""
    lines = [
        f"Fashion-MNIST, {result['test_images']:,} test images, seeds: {result['seeds']}.", "",
        "| what is added | accuracy with, points more than without (95 % interval) | each seed |",
        "|---|---|---|",
    ]  # fmt: skip
    for question, answer in result["differences"].items():
        each = ", ".join(f"{100 * d:+.2f}" for d in answer["seeds"].values())
        arm_name, control = answer["arms"]
        lines.append(f"| {question} (`{arm_name}` − `{control}`) | {points(answer)} | {each} |")
    names = dict.fromkeys(name.rpartition("-")[0] or name for name in result["arms"])
    lines += ["", "| arm | accuracy, each seed | parameters | MACs |", "|---|---|---|---|"]
    for name in names:
        of_seeds = (name, *(f"{name}-{seed}" for seed in SEEDS))
        rows = [result["arms"][key] for key in of_seeds if key in result["arms"]]
        each = ", ".join(f"{row['accuracy']:.2%}" for row in rows)
        lines.append(
            f"| `{name}` | {each} | {rows[0]['params']:,} | {rows[0]['macs'] / 1e6:.2f} M |"
        )
    if "latency" in result:
        timed = result["latency"]
        medians = {name: float(np.median(ms)) for name, ms in timed["p50_ms"].items()}
        whole = medians["teacher fp32"]
        lines += ["", f"{timed['target']}, {timed['host']}, one thread, batch 1:", ""]
        lines += [f"- {n}: {ms:.3f} ms, {whole / ms:.2f}×" for n, ms in medians.items()]
    return "\n".join(lines)


def main() -> None:
    """Each piece that is asked for; the figures of what is done so far."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="whose arms to make")
    parser.add_argument("--only", help="stop after this arm")
    parser.add_argument("--latency", action="store_true", help="time what ships (a quiet machine)")
    parser.add_argument("--gates", action="store_true", help="export and verify on all targets")
    options = parser.parse_args()
    for seed in options.seeds:
        arms(seed, options.only)
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result = kept
    if (found := figures())["seeds"] >= kept.get("seeds", ""):  # else more seeds ran elsewhere
        result |= found | {"host": host_name(), "date": today()}
    if options.latency:
        result["latency"] = latencies()
    if options.gates:
        result["gates"] = gates()
    write_atomically(RESULT, json.dumps(result, indent=1))
    print(tables(result))


if __name__ == "__main__":
    main()
