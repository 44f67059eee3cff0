"""Distilling into integers without labels: how many epochs, and how fast, over several splits.

    python tools/bench_label_free.py --photos photos.zip --accelerator cuda --processes 5

EfficientNet-Lite0 with its real weights; in each split, 200 photos to learn from and the others to
count top-1 answers of the trained graph that differ from FP32's. Split 0 is that of bench_ptq.py;
its 300 photos alone give an interval of three points. What ran is kept, one file a split and
target in docs/bench/label_free/. On one CPU core an epoch takes 40 seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_int8 import SIZE, networks, photos
from bench_ptq import BATCH, CALIBRATION, LEARNT, OPENVINO, ORT, as_data
from torch import Tensor

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.network import Network
from edgekd.tasks.base import wilson_interval
from edgekd.training import fabric, predict

KEPT = Path(__file__).parents[1] / "docs" / "bench" / "label_free"
# epochs and learning rate; none: post-training
RECIPES = {
    "post-training": (0, 0.0), "4 x 1e-4": (4, 1e-4), "12 x 1e-4": (12, 1e-4),
    "36 x 5e-4": (36, 5e-4),
}  # fmt: skip
TARGETS = (ORT, OPENVINO)


def divided(images: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Photos to learn from, and the others."""
    if split:
        generator = torch.Generator().manual_seed(split)
        images = images[torch.randperm(len(images), generator=generator)]
    return images[:LEARNT], images[LEARNT:]


def run(path: Path, split: int, target: str, accelerator: str, recipes: list[str]) -> None:
    """What is missing of one split and target; the file is written after each recipe."""
    file = KEPT / f"{split}-{target}.json"
    learnt, held_out = divided(torch.cat(photos(path)), split)
    net = Network(networks()["EfficientNet-Lite0"], torch.zeros(1, 3, SIZE, SIZE))
    on = fabric(accelerator)

    def answers(network: Network) -> Tensor:
        batches = [*torch.split(held_out, 50)]
        return torch.cat([y for y, _ in predict(network, batches, on=on)]).argmax(1)

    wanted = answers(net)
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for recipe in recipes:
        if recipe in {row["recipe"] for row in rows}:
            continue
        epochs, lr = RECIPES[recipe]
        options: dict[str, Any] = {"data": [*torch.split(learnt[:CALIBRATION], BATCH)]}
        if epochs:
            options = {
                "data": as_data([*torch.split(learnt, BATCH)]), "teacher": net, "epochs": epochs,
                "batch_size": BATCH, "lr": lr,
            }  # fmt: skip
        quantized = edgekd.quantize(
            net, target=target, calibration=CALIBRATION, accelerator=accelerator, **options
        )
        differ = int((answers(quantized) != wanted).sum())
        rows.append(
            {"split": split, "target": target, "recipe": recipe, "differ": differ,
             "n": len(held_out), "date": today(),
             "host": host_name() if accelerator == "cpu" else torch.cuda.get_device_name()}
        )  # fmt: skip
        print(rows[-1], flush=True)
        write_atomically(file, json.dumps(rows, indent=1))


def table() -> None:
    """All splits together."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(KEPT.glob("*.json")):
        for row in json.loads(file.read_text()):
            found[row["target"], row["recipe"]].append(row)
    for (target, recipe), rows in sorted(found.items()):
        n, differ = (sum(row[key] for row in rows) for key in ("n", "differ"))
        low, high = wilson_interval(n - differ, n)
        each = ", ".join(str(row["differ"]) for row in rows)
        print(f"{target}, {recipe}: {1 - differ / n:.2%} ({low:.2%} to {high:.2%}) of {n}; {each}")


def main() -> None:
    """Splits side by side; then the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="zip of 256 × 256 JPEGs")
    parser.add_argument("--splits", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    if options.child:
        split, target = options.child
        run(options.photos, int(split), target, options.accelerator, options.recipes)
        return

    def one(job: tuple[int, str]) -> None:
        subprocess.run(
            [sys.executable, __file__, "--photos", str(options.photos), "--accelerator",
             options.accelerator, "--recipes", *options.recipes, "--child", str(job[0]), job[1]],
            check=True,
        )  # fmt: skip

    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(one, [(split, target) for split in options.splits for target in TARGETS]))
    table()


if __name__ == "__main__":
    main()
