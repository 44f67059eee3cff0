"""Held-out accuracy of the latency model on this host.

python tools/bench_latency_model.py --measure profiled    # 20 networks, every kernel timed
python tools/bench_latency_model.py --measure test --minutes 60
python tools/bench_latency_model.py                       # the tables, from what there is
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.calibrate import one_run
from edgekd.latency.measuring import host_name, today
from edgekd.latency.probes import ProbeKind, probe
from edgekd.latency.runtime_graph import runtime_nodes
from edgekd.runtimes.base import fingerprint, get_runtime
from edgekd.target import Target

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "bench" / "latency_model"
TARGETS = ("host-onnxruntime", "intel-cpu")
TEST_SEED = 20261124
KINDS: tuple[ProbeKind, ...] = ("dense", "depthwise", "transformer")
# name -> side in pixels
NAMED = {
    "torchvision/resnet18": 160, "torchvision/mobilenet_v2": 192,
    "timm/vit_tiny_patch16_224": 224, "torchvision/shufflenet_v2_x1_0": 224,
    "torchvision/resnet50": 128, "torchvision/mobilenet_v3_large": 160,
    "timm/mobilenetv4_conv_small": 224, "torchvision/squeezenet1_1": 160,
    "timm/lcnet_050": 224, "torchvision/efficientnet_b0": 160,
    "timm/convnext_atto": 128, "torchvision/regnet_x_400mf": 160,
    "timm/efficientnet_lite0": 160, "torchvision/mnasnet0_5": 224,
    "timm/repvgg_a0": 128, "torchvision/mobilenet_v3_small": 224,
    "timm/ghostnet_050": 160, "torchvision/regnet_y_400mf": 160,
    "timm/mixer_s32_224": 224, "torchvision/googlenet": 160,
}  # fmt: skip
RUNS, LONGEST_S, TURN = 200, 12.0, 10
NETWORK_LIMIT_S = 240


def named(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of a library, random weights."""
    library, _, model = name.partition("/")
    side = NAMED[name]
    if library == "timm":
        import timm

        return timm.create_model(model, pretrained=False), (3, side, side)
    from torchvision import models

    options = {"init_weights": False} if model == "googlenet" else {}
    return models.get_model(model, weights=None, **options), (3, side, side)


def names_of(which: str) -> list[str]:
    """Of the profiled or the test networks, in the order of measuring."""
    if which == "profiled":
        counts = {"dense": 7, "depthwise": 7, "transformer": 6}
        return [f"{kind}-{seed}" for kind, n in counts.items() for seed in range(n)]
    random = [f"{kind}-{TEST_SEED + i}" for i in range(20) for kind in KINDS]
    mixed: list[str] = []
    for index, name in enumerate(NAMED):
        mixed += [*random[3 * index : 3 * index + 3], name]
    return mixed


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The network of that name and the shape of a sample."""
    if "/" in name:
        return named(name)
    kind, _, seed = name.partition("-")
    return probe(kind, int(seed))  # type: ignore[arg-type]  # a kind by construction


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """In turns, by the process' CPU time: median and its 95 % interval, ms."""
    for call in calls.values():
        began = time.monotonic()
        while time.monotonic() - began < 0.3:
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    began = time.monotonic()
    for done in range(0, RUNS, TURN):
        if done >= 20 and time.monotonic() - began > LONGEST_S:
            break
        for name, call in calls.items():
            call()
            for _ in range(TURN):
                start = time.process_time_ns()
                call()
                samples[name].append((time.process_time_ns() - start) / 1e6)
    found = {}
    for name, values in samples.items():
        ordered = np.sort(values)
        n = len(ordered)
        spread = 1.96 * n**0.5 / 2
        low, high = ordered[max(0, int(n / 2 - spread))], ordered[min(n - 1, int(n / 2 + spread))]
        quarter = float(np.quantile(ordered, 0.25))
        found[name] = {"p50_ms": float(np.median(ordered)), "low_ms": float(low),
                       "high_ms": float(high), "p25_ms": quarter,
                       "p10_ms": float(np.quantile(ordered, 0.1)), "runs": n}  # fmt: skip
    return found


def measure(name: str, raw: Path) -> dict[str, Any]:
    """One network on all targets in all precisions; its kernels go to `raw`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, shape = build(name)
    began = time.monotonic()
    net = edgekd.Network(module.eval(), torch.zeros(1, *shape))
    images = torch.randn(4, *shape)
    record: dict[str, Any] = {
        "network": name, "shape": shape, "params": net.params, "macs": net.macs,
        "host": host_name(), "date": today(), "clock": "cpu", "threads": 1, "measured": {},
    }  # fmt: skip
    nodes: dict[str, Any] = {}
    with TemporaryDirectory() as place:
        calls: dict[str, Callable[[], object]] = {}
        for target in map(Target.load, TARGETS):
            runtime = get_runtime(target.runtime)
            for precision in target.precisions:
                given = net
                if precision == "int8":
                    given = edgekd.quantize(
                        net, target=target, data=[(images,)], calibration=4, observer="minmax",
                        correct_bias=False, accelerator="cpu",
                    )  # fmt: skip
                key = f"{target.name} {precision}"
                path = Path(place) / f"{target.name}-{precision}{runtime.suffix}"
                runtime.export(given, target, path)
                nodes[key] = [
                    n.model_dump(mode="json") for n in runtime_nodes(runtime.name, path, 1)
                ]
                calls[key] = one_run(runtime.load(path, threads=1))
                record["measured"][key] = {
                    "sha256": fingerprint(path)[0],
                    "runtime_version": runtime.version(),
                }
        record["export_s"] = round(time.monotonic() - began, 1)
        reference = raw / "reference.onnx"
        if reference.exists():
            calls["reference"] = one_run(get_runtime("onnxruntime").load(reference, threads=1))
            record["measured"]["reference"] = {}
        for key, figures in timed(calls).items():
            record["measured"][key] |= figures
        if name in names_of("profiled"):
            shutil.copytree(place, raw / "artifacts" / name, dirs_exist_ok=True)
        if not reference.exists():
            write_atomically(reference, (Path(place) / "host-onnxruntime-fp32.onnx").read_bytes())
    record["seconds"] = round(time.monotonic() - began, 1)
    with gzip.open(raw / f"{name.replace('/', '-')}.json.gz", "wt") as file:
        json.dump(nodes, file)
    return record


def time_again(name: str, raw: Path) -> None:
    """The kept artifacts of a profiled network, timed once more."""
    folder = raw / "artifacts" / name
    path = KEPT / f"{name}.json"
    record = json.loads(path.read_text())
    nodes: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    for target in map(Target.load, TARGETS):
        runtime = get_runtime(target.runtime)
        for precision in target.precisions:
            file = folder / f"{target.name}-{precision}{runtime.suffix}"
            key = f"{target.name} {precision}"
            nodes[key] = [n.model_dump(mode="json") for n in runtime_nodes(runtime.name, file, 1)]
            calls[key] = one_run(runtime.load(file, threads=1))
    if os.environ.get("TIMES"):
        for key, figures in timed(calls).items():
            record["measured"].setdefault(key, {}).update(figures)
    with gzip.open(raw / f"{name}.json.gz", "wt") as file:
        json.dump(nodes, file)
    write_atomically(path, json.dumps(record, indent=1))


def in_child(name: str, path: Path, raw: Path) -> None:
    """Measure in a fork, which takes its memory with it."""
    child = os.fork()
    if child == 0:
        signal.alarm(NETWORK_LIMIT_S)
        try:
            write_atomically(path, json.dumps(measure(name, raw), indent=1))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitpid(child, 0)[1]
    print(f"{time.strftime('%H:%M:%S')} {name}: {'done' if code == 0 else f'failed {code}'}",
          flush=True)  # fmt: skip


def measure_all(which: str, minutes: float, raw: Path) -> None:
    """What is missing."""
    KEPT.mkdir(parents=True, exist_ok=True)
    raw.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if which == "again":
        for name in names_of("profiled"):
            time_again(name, raw)
            print(f"{time.strftime('%H:%M:%S')} {name}: timed again", flush=True)
        return
    for name in names_of(which):
        path = KEPT / f"{name.replace('/', '-')}.json"
        if not path.exists() and time.monotonic() - began < 60 * minutes:
            in_child(name, path, raw)


def main() -> None:
    """Measure what is missing, or write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", choices=("profiled", "again", "test"))
    parser.add_argument("--minutes", type=float, default=60, help="start no other after this")
    parser.add_argument("--raw", type=Path, default=ROOT / "runs" / "latency_model")
    options = parser.parse_args()
    if options.measure:
        import onnxruntime  # noqa: F401  # once, not in every child
        import openvino  # noqa: F401
        import timm  # noqa: F401
        import torch._dynamo
        import torch.onnx  # noqa: F401
        import torchvision  # noqa: F401

        measure_all(options.measure, options.minutes, options.raw)


if __name__ == "__main__":
    sys.exit(main())
