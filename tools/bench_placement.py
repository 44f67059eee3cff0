"""What single rules of a scheme are worth: networks placed with them and without.

    python tools/bench_placement.py            # about 15 minutes on a quiet machine

INT8, post-training, random weights with BatchNorm calibrated; batch 1, one thread, in turns. Beside
the time, what the rule does to the noise: the change of the outputs' ratio of signal to noise, on
noise as images. On OpenVINO with eight weight bits where this processor has VNNI. Figures go to
docs/bench/placement.json, and the table to docs/quantization.md by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from zoo import build, calibrate_norms, noise

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.stages.profile import profile_together
from edgekd.target import Target

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "placement.json"
# rule -> what the scheme is without it
RULES: dict[str, dict[str, Any]] = {
    "shared_scales": {"shared_scales": ()},
    "linear_gives_float": {"linear_gives_float": False},
}
JOINING = ("squeezenet1_1", "shufflenet_v2_x1_0", "googlenet", "densenet121")
ATTENDING = ("vit_tiny_patch16_224", "pit_ti_224", "convnext_tiny", "swin_t")
CALIBRATION, TESTED = 32, 16


def signal_to_noise(ours: Tensor, floats: Tensor) -> float:
    """In dB; the signal is what differs from image to image."""
    signal = (floats - floats.mean(0)).square().sum()
    return float(10 * torch.log10(signal / (ours - floats).square().sum()))


def row_of(name: str, target: Target, rule: str, side: int, rounds: int) -> dict[str, Any]:
    """With the rule beside without."""
    assert target.scheme is not None
    module = build("timm" if name.endswith("_224") else "torchvision", name)
    calibrate_norms(module, side)
    net = edgekd.Network(module, torch.zeros(1, 3, side, side))
    known = [(x,) for x in noise(CALIBRATION, side, 1).split(8)]
    x = noise(TESTED, side, 2)
    without = target.scheme.model_copy(update=RULES[rule])
    arms = {"with": target, "without": target.model_copy(update={"scheme": without})}
    with TemporaryDirectory() as folder, torch.no_grad():
        floats, noises, files = net(x), [], []
        for arm, placed in arms.items():
            quantized = edgekd.quantize(net, target=placed, data=known, calibration=CALIBRATION)
            noises.append(signal_to_noise(quantized(x), floats))
            files.append(edgekd.export(quantized, target=placed, out=f"{folder}/{arm}").path)
        timed = [profile_together(files, target=target, runs=60) for _ in range(rounds)]
    each = [ours.p50_ms / theirs.p50_ms for ours, theirs in timed]
    return {
        "network": name, "target": target.name, "rule": rule, "px": side, "rounds": rounds,
        "ratio": median(each), "ratio_range": [min(each), max(each)],
        "signal_to_noise_db": [round(db, 2) for db in noises],
        "p50_ms": [median(m.p50_ms for m in of) for of in zip(*timed, strict=True)],
        "host": host_name(), "date": today(),
    }  # fmt: skip


def main() -> None:
    """Each network whose target has the rule."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=[*JOINING, *ATTENDING])
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vnni, plain = map(Target.load, ("intel-cpu-vnni", "intel-cpu"))
    targets = (Target.load("host-onnxruntime"), vnni if vnni.native_here else plain)
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for name in options.networks:
        rule = "shared_scales" if name in JOINING else "linear_gives_float"
        rows = [row for row in rows if row["network"] != name]
        for target in targets:
            rows.append(row_of(name, target, rule, options.px, options.rounds))
            print(rows[-1], flush=True)
            write_atomically(RESULT, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
