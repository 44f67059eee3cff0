"""What a step of quantization-aware training costs, beside a plain one and beside peers.

    python tools/bench_qat.py                     # ours; peers that are installed beside it
    pip install nvidia-modelopt nncf              # in an environment of the bench's own
    python tools/bench_qat.py --accelerator cuda

Every arm is trained by the same loop on the same batches of 64, one thread, in turns; the figure is
process time (on a GPU wall time, until all is computed), the ratio that of medians to the plain
step of the same round. Ours learns from labels and from an FP32 teacher whose answers are cached;
peers learn from labels alone. Figures go to docs/bench/qat.json, of a GPU to qat_cuda.json.
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
from lightning_fabric import Fabric
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

RESULTS = Path(__file__).parents[1] / "docs" / "bench"
BATCH, STEPS = 64, {"cpu": 6, "cuda": 40}
CLASSES = 10
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20": (
        lambda: resnet(num_classes=CLASSES, widths=[16, 32, 64], depths=[3, 3, 3]), 32
    ),
    "MobileNetV2": (lambda: mobilenet_v2(num_classes=CLASSES), 64),
}  # fmt: skip
task = edgekd.get_task("classification")


def noise(size: int, steps: int) -> Data:
    """Random images: a step costs the same whatever they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH * steps, 3, size, size), generator=generator)
    labels = torch.randint(CLASSES, (BATCH * steps,), generator=generator)
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


def arms(
    make: Callable[[], nn.Module], size: int, data: Data, cache: Path, on: Fabric
) -> dict[str, Arm]:
    """(network, terms, keyed) of each arm that can be had here."""
    example = torch.zeros(1, 3, size, size)
    plain = Network(make(), example)
    quantized = edgekd.quantize(plain, target="host-onnxruntime", data=data, calibration=64)
    ask = cached_teacher(plain, data, folder=cache, device=on.device)
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


def bench(name: str, rounds: int, accelerator: str) -> dict[str, Any]:
    """All arms of one network, in turns."""
    make, size = NETWORKS[name]
    on, steps = fabric(accelerator), STEPS[accelerator]
    clock = time.perf_counter if accelerator == "cuda" else time.process_time
    data = noise(size, steps)
    with TemporaryDirectory() as folder:
        made = arms(make, size, data, Path(folder), on)

        def step_s(arm: str) -> float:
            net, terms, keyed = made[arm]
            began = clock()
            fit(  # at its end the weights come back to the host: all is computed
                net, terms=terms, data=data, keyed=keyed, epochs=1, batch_size=BATCH, lr=1e-4,
                weight_decay=0.0, seed=0, on=on, label=arm, run=None,
            )  # fmt: skip
            return (clock() - began) / steps

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
        "network": name, "size": size, "batch": BATCH, "rounds": rounds, "steps": steps,
        "step_s": {arm: median(times) for arm, times in seconds.items()},
        "ratio": {arm: median(each) for arm, each in ratios.items()},
        "ratio_range": {arm: [min(each), max(each)] for arm, each in ratios.items()},
    }  # fmt: skip


def main() -> None:
    """Each network; the figures, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--accelerator", choices=STEPS, default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = [bench(name, options.rounds, options.accelerator) for name in options.networks]
    installed = {}
    for package in ("torch", "nvidia-modelopt", "nncf"):
        try:
            installed[package] = version(package)
        except ImportError:
            continue
    on_gpu = options.accelerator == "cuda"
    host = torch.cuda.get_device_name() if on_gpu else host_name()
    result = {"host": host, "date": today(), "versions": installed, "rows": rows}
    write_atomically(
        RESULTS / ("qat_cuda.json" if on_gpu else "qat.json"), json.dumps(result, indent=1)
    )
    for row in rows:
        print(f"\n{row['network']}, {row['size']} px, batch {BATCH}:")
        for arm, ratio in row["ratio"].items():
            low, high = row["ratio_range"][arm]
            print(f"  {arm:16} {row['step_s'][arm]:.4f} s, {ratio:.2f} ({low:.2f}–{high:.2f})")


if __name__ == "__main__":
    main()
