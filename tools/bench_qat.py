"""What a step of quantization-aware training costs, beside a plain one and beside peers.

    python tools/bench_qat.py                     # ours; peers that are installed beside it
    pip install nvidia-modelopt nncf              # in an environment of the bench's own

Every arm is trained by the same loop on the same batches of 64, one thread, in turns; the figure is
process time, the ratio that of medians to the plain step of the same round. Ours learns from labels
and from an FP32 teacher whose answers are cached; peers learn from labels alone.
Figures go to docs/bench/qat.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torchvision.models import mobilenet_v2

import edgekd
from edgekd.data.base import Data, InMemory
from edgekd.files import write_atomically
from edgekd.knowledge.cache import cached_teacher
from edgekd.knowledge.terms import LearningTerms
from edgekd.latency.measuring import host_name, today
from edgekd.models.resnet import resnet
from edgekd.network import Network, Preprocessing
from edgekd.training import Terms, fabric, fit

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "qat.json"
BATCH, STEPS = 64, 6
CLASSES = 10
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20": (
        lambda: resnet(num_classes=CLASSES, widths=[16, 32, 64], depths=[3, 3, 3]), 32
    ),
    "MobileNetV2": (lambda: mobilenet_v2(num_classes=CLASSES), 64),
}  # fmt: skip
task = edgekd.get_task("classification")


def noise(size: int) -> Data:
    """Random images: a step costs the same whatever they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH * STEPS, 3, size, size), generator=generator)
    labels = torch.randint(CLASSES, (BATCH * STEPS,), generator=generator)
    split = InMemory(images.byte(), labels)
    names = tuple(f"class {i}" for i in range(CLASSES))
    half = (0.5, 0.5, 0.5)
    return Data("noise", {"train": split, "test": split}, names, Preprocessing(mean=half, std=half))


def modelopt(module: nn.Module, x: torch.Tensor) -> nn.Module:
    """NVIDIA Model Optimizer, its default INT8."""
    import modelopt.torch.quantization as mtq

    return mtq.quantize(module, mtq.INT8_DEFAULT_CFG, lambda m: m(x))


def nncf_quantized(module: nn.Module, x: torch.Tensor) -> nn.Module:
    """NNCF's quantize, whose result is trainable."""
    import nncf

    return nncf.quantize(module.eval(), nncf.Dataset([x[:8]]), subset_size=1)


def torch_ao(module: nn.Module, x: torch.Tensor) -> nn.Module:
    """torch.ao's FX graph mode."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(module.train(), get_default_qat_qconfig_mapping("x86"), (x,))


PEERS = {
    "nvidia-modelopt": modelopt,
    "nncf": nncf_quantized,
    "torch.ao": torch_ao,
}


Arm = tuple[Network, Terms, bool]


def arms(make: Callable[[], nn.Module], size: int, cache: Path) -> dict[str, Arm]:
    """(network, terms, keyed) of each arm that can be had here."""
    data, example = noise(size), torch.zeros(1, 3, size, size)
    plain = Network(make(), example)
    quantized = edgekd.quantize(plain, target="host-onnxruntime", data=data, calibration=64)
    ask = cached_teacher(plain, data, folder=cache, device=torch.device("cpu"))
    found: dict[str, Arm] = {
        "plain": (plain, LearningTerms(task, None, 0.9), False),
        "edgekd": (quantized, LearningTerms(task, ask, 0.9, keyed=True), True),
    }
    for name, peer in PEERS.items():
        try:
            module = peer(make(), torch.randn(BATCH, 3, size, size))
        except Exception as error:  # not installed, or does not take the network: say which
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        found[name] = Network(module, example), LearningTerms(task, None, 0.9), False
    return found


def bench(name: str, rounds: int) -> dict[str, Any]:
    """All arms of one network, in turns."""
    make, size = NETWORKS[name]
    data = noise(size)
    with TemporaryDirectory() as folder:
        made = arms(make, size, Path(folder))

        def step_s(arm: str) -> float:
            net, terms, keyed = made[arm]
            began = time.process_time()
            fit(
                net, terms=terms, data=data, keyed=keyed, epochs=1, batch_size=BATCH, lr=1e-4,
                weight_decay=0.0, seed=0, on=fabric("cpu"), label=arm, run=None,
            )  # fmt: skip
            return (time.process_time() - began) / STEPS

        for arm in list(made):  # warm up
            try:
                step_s(arm)
            except RuntimeError as error:
                print(f"{arm} cannot be trained: {str(error).splitlines()[0]}")
                del made[arm]
        rows = [{arm: step_s(arm) for arm in made} for _ in range(rounds)]
    seconds = {arm: [row[arm] for row in rows] for arm in made}
    ratios = {
        arm: [a / b for a, b in zip(times, seconds["plain"], strict=True)]
        for arm, times in seconds.items()
    }
    return {
        "network": name, "size": size, "batch": BATCH, "rounds": rounds, "steps": STEPS,
        "step_s": {arm: median(times) for arm, times in seconds.items()},
        "ratio": {arm: median(each) for arm, each in ratios.items()},
        "ratio_range": {arm: [min(each), max(each)] for arm, each in ratios.items()},
    }  # fmt: skip


def main() -> None:
    """Each network; the figures, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = [bench(name, options.rounds) for name in options.networks]
    installed = {}
    for package in ("torch", "nvidia-modelopt", "nncf"):
        try:
            installed[package] = version(package)
        except ImportError:
            continue
    result = {"host": host_name(), "date": today(), "versions": installed, "rows": rows}
    write_atomically(RESULT, json.dumps(result, indent=1))
    for row in rows:
        print(f"\n{row['network']}, {row['size']} px, batch {BATCH}:")
        for arm, ratio in row["ratio"].items():
            low, high = row["ratio_range"][arm]
            print(f"  {arm:16} {row['step_s'][arm]:.3f} s, {ratio:.2f} ({low:.2f}–{high:.2f})")


if __name__ == "__main__":
    main()
