"""Held-out accuracy of the latency model on this host, beside three baselines.

    python tools/bench_latency_model.py --export --minutes 60    # each file once, in runs/
    python tools/bench_latency_model.py --measure --minutes 60   # what is exported, not yet timed
    python tools/bench_latency_model.py                          # docs/latency_model.md

60 random networks of the kinds that `edgekd calibrate` measures, by seeds that development did not
use, and 20 of torchvision and timm; FP32 and INT8, ONNX Runtime and OpenVINO. What estimates them
was fitted to the 20 networks of the shipped profiles. One file a network is kept in
docs/bench/latency_model/. Exports may run while others do, `--part 0/2` and `--part 1/2` at once;
measure alone, on a host as quiet as it gets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.optimize import nnls
from sklearn.ensemble import RandomForestRegressor
from torch import nn

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.calibrate import (
    PROBES,
    TOGETHER,
    export_files,
    runnable,
    timed,
)
from edgekd.latency.fusion import kernels_of
from edgekd.latency.kernels import Kernel
from edgekd.latency.measuring import host_name, today
from edgekd.latency.model import LatencyModel, MeasuredNetwork, measured_networks
from edgekd.latency.probes import ProbeKind, probe
from edgekd.latency.profiles import read_profile
from edgekd.latency.tracing import Op, blank, trace
from edgekd.runtimes.base import fingerprint, get_runtime
from edgekd.runtimes.on_device.measure import median_interval
from edgekd.target import Target

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "bench" / "latency_model"
# target -> seed of its random networks: a new one whenever its files' kernels become others
SEEDS = {"host-onnxruntime": 20261800, "intel-cpu": 20261800}
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
NETWORK_LIMIT_S = 400


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


def test_names(target: str) -> list[str]:
    """In the order of measuring: all kinds from the start."""
    random = [f"{kind}-{SEEDS[target] + i}" for i in range(20) for kind in KINDS]
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


def export_one(name: str, target: Target, folder: Path) -> None:
    """In all precisions."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, shape = build(name)
    net = edgekd.Network(module.eval(), torch.zeros(1, *shape))
    export_files(net, target, runnable(target), files_of(name, folder))
    write_atomically(done(name, target, folder), "")


def measure(names: Sequence[str], target: Target, folder: Path) -> None:
    """The files of networks that a runtime runs, in turns with the reference network."""
    suffix = get_runtime(target.runtime).suffix
    paths = {
        (name, p): files_of(name, folder) / f"{target.name}-{p}{suffix}"
        for name in names for p in runnable(target)
    }  # fmt: skip
    measured: dict[str, dict[str, Any]] = {name: {} for name in names}
    for (name, precision), found in timed(paths, target.runtime, 1).items():
        low, high = median_interval(found.samples)
        measured[name][f"{target.name} {precision}"] = {
            "quiet_ms": found.quiet_ms, "reference_ms": found.reference_ms,
            "p50_ms": float(np.median(found.samples)), "low_ms": low, "high_ms": high,
            "runs": len(found.samples), "sha256": fingerprint(paths[name, precision])[0],
            "date": today(), "version": get_runtime(target.runtime).version(),
        }  # fmt: skip
    for name in names:
        module, shape = build(name)
        net = edgekd.Network(module.eval(), torch.zeros(1, *shape))
        record = {
            "network": name, "shape": shape, "params": net.params, "macs": net.macs,
            "host": host_name(), "clock": "cpu", "threads": 1,
            "measured": read(name) | measured[name],
        }  # fmt: skip
        write_atomically(kept(name), json.dumps(record, indent=1))


def done(name: str, target: Target, folder: Path) -> Path:
    """What is there once a network's files are."""
    return files_of(name, folder) / f"{target.name}.done"


def read(name: str) -> dict[str, Any]:
    """What was measured of a network, by target and precision."""
    found: dict[str, Any] = json.loads(kept(name).read_text()) if kept(name).exists() else {}
    return dict(found.get("measured", {}))


def files_of(name: str, folder: Path) -> Path:
    """Where a network's exported files are."""
    return folder / name.replace("/", "-")


def kept(name: str) -> Path:
    """Where a network's figures are."""
    return KEPT / f"{name.replace('/', '-')}.json"


def in_child(what: str, name: str, work: Callable[[], None]) -> None:
    """In a fork, which takes its memory with it; what fails is said, and left out."""
    child = os.fork()
    if child == 0:
        signal.alarm(NETWORK_LIMIT_S)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed = os.waitpid(child, 0)[1]
    print(f"{time.strftime('%H:%M:%S')} {what} {name}: {'failed' if failed else 'done'}",
          flush=True)  # fmt: skip


def run(what: str, target: Target, part: str, minutes: float, folder: Path) -> None:
    """Export or measure what is missing."""
    import onnxruntime  # noqa: F401  # once, not in every child
    import openvino  # noqa: F401
    import timm  # noqa: F401
    import torch._dynamo
    import torch.onnx  # noqa: F401
    import torchvision  # noqa: F401

    KEPT.mkdir(parents=True, exist_ok=True)
    index, parts = map(int, part.split("/"))
    began = time.monotonic()
    names = test_names(target.name)
    exported = {name for name in names if done(name, target, folder).exists()}
    if what == "export":
        missing = [[name] for name in names[index::parts] if name not in exported]
    else:
        untimed = [n for n in names if n in exported and f"{target.name} fp32" not in read(n)]
        missing = [untimed[i : i + TOGETHER] for i in range(0, len(untimed), TOGETHER)]
    for group in missing:
        if time.monotonic() - began > 60 * minutes:
            break
        work = (
            partial(export_one, group[0], target, folder) if what == "export"
            else partial(measure, group, target, folder)
        )  # fmt: skip
        in_child(f"{what} {target.name}", ", ".join(group), work)


# ---- the tables ----------------------------------------------------------------------------------


def op_units(ops: Sequence[Op]) -> Counter[str]:
    """Of an unfused network, each operator's multiply-accumulates, or the elements it gives."""
    units: Counter[str] = Counter()
    for op in ops:
        if op.kind == "convolution":
            kind = "depthwise" if op.weight[1] == 1 else f"convolution {op.weight[2]}"
            units[kind] += op.size * math.prod(op.weight[1:])
        elif op.kind in ("linear", "bmm"):
            units[op.kind] += op.size * op.inputs[0].shape[-1]
        elif op.kind not in ("input", "output", "view", "part", "constant"):
            units["elementwise"] += op.size
    return units


class Baselines:
    """FLOPs, a table of unfused operators, and a random forest a kernel (nn-Meter's), fitted alike.

    Zhang et al. 2021, doi:10.1145/3458864.3467882, §5: one regressor for each kind of kernel, over
    its shape; a network is the sum.
    """

    def __init__(
        self, networks: Sequence[MeasuredNetwork], traces: Mapping[str, Sequence[Op]]
    ) -> None:
        totals = np.array([n.total_ms for n in networks])
        macs = np.array([[1.0, sum(k.macs for k in n.kernels)] for n in networks])
        self.flops = nnls(macs / totals[:, None], np.ones(len(totals)))[0]
        counted = [op_units(traces[n.name]) for n in networks]
        self.kinds = sorted({kind for units in counted for kind in units})
        table = np.array([[units[kind] for kind in self.kinds] for units in counted], dtype=float)
        self.table = nnls(table / totals[:, None], np.ones(len(totals)))[0]
        by_op: dict[str, list[tuple[Kernel, float]]] = {}
        for net in networks:
            for kernel, ms in zip(net.kernels, net.times, strict=True):
                by_op.setdefault(kernel.op, []).append((kernel, float(ms)))
        self.forests = {}
        for op, seen in by_op.items():
            forest = RandomForestRegressor(100, random_state=0)
            self.forests[op] = forest.fit([shape_of(k) for k, _ in seen], [t for _, t in seen])

    def estimate(self, kernels: Sequence[Kernel], ops: Sequence[Op]) -> dict[str, float]:
        """ms, by baseline."""
        units = op_units(ops)
        by_op: dict[str, list[Kernel]] = {}
        for kernel in kernels:
            by_op.setdefault(kernel.op, []).append(kernel)
        return {
            "FLOPs": float(self.flops @ [1.0, sum(k.macs for k in kernels)]),
            "operators": float(self.table @ [units[kind] for kind in self.kinds]),
            "nn-Meter": sum(
                float(self.forests[op].predict([shape_of(k) for k in same]).sum())
                for op, same in by_op.items() if op in self.forests
            ),
        }  # fmt: skip


def shape_of(kernel: Kernel) -> list[float]:
    """What nn-Meter's regressors see."""
    return [
        kernel.height, kernel.width, kernel.cin, kernel.cout, kernel.kernel, kernel.stride,
        kernel.groups, kernel.macs, kernel.weights, kernel.reads, kernel.writes,
    ]  # fmt: skip


METHODS = ("edgekd", "nn-Meter", "operators", "FLOPs")


def kind_of(name: str) -> str:
    """Which row of the table a network counts in."""
    return "named" if "/" in name else name.partition("-")[0]


def evaluate() -> list[dict[str, Any]]:
    """Estimate ÷ measured of each network, target, precision and method."""
    found = []
    for target in map(Target.load, SEEDS):
        model = LatencyModel.load(target)
        rows = read_profile(target)
        quietest = min(row.reference_ms for row in rows if row.reference_ms is not None)
        profiled = {f"{kind}-{seed}": build_meta(f"{kind}-{seed}") for kind, seed in PROBES}
        traces = {n: trace(m, [s]) for n, (m, s) in profiled.items()}
        for precision, networks in measured_networks(rows).items():
            baselines = Baselines(networks, traces)
            scheme = target.scheme if precision == "int8" else None
            for name in test_names(target.name):
                if (measured := read(name).get(f"{target.name} {precision}")) is None:
                    continue
                module, shape = build_meta(name)
                ops = trace(module, [shape])
                kernels = kernels_of(ops, target.runtime, scheme)
                estimate = model.estimate(module, precision, [shape])
                slower = measured["reference_ms"] / quietest
                truth = measured["quiet_ms"] / slower
                by_method = {"edgekd": estimate.p50_ms, **baselines.estimate(kernels, ops)}
                found.append({
                    "network": name, "target": target.name, "precision": precision,
                    "measured_ms": truth,
                    "inside": estimate.low_ms <= truth <= estimate.high_ms,
                    **{method: ms / truth for method, ms in by_method.items()},
                })  # fmt: skip
    return found


def build_meta(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The network without values."""
    try:
        with torch.device("meta"):
            module, shape = build(name)
    except NotImplementedError:  # it reads values while it is built
        module, shape = build(name)
        module = blank(module)
    return module.eval(), shape


def figures(ratios: Sequence[float]) -> str:
    """Mean error and the share within ±10 %."""
    off = np.abs(np.asarray(ratios) - 1)
    return f"{off.mean():.1%} / {np.mean(off <= 0.1):.0%}"


def throughput(names: Sequence[str]) -> float:
    """Networks a second of CPU time, from their class to milliseconds in one precision."""
    model = LatencyModel.load(next(iter(SEEDS)))
    began = time.process_time()
    for name in names:
        module, shape = build_meta(name)
        model.estimate(module, "int8", [shape])
    return len(names) / (time.process_time() - began)


def write_tables() -> None:
    """docs/latency_model.md."""
    found = evaluate()
    counts = {t: len({f["network"] for f in found if f["target"] == t}) for t in SEEDS}
    random = [f["network"] for f in found if "/" not in f["network"] and f["precision"] == "int8"]
    hosts = {json.loads(kept(f["network"]).read_text())["host"] for f in found}
    lines = [
        "# The latency model", "", "Made by `tools/bench_latency_model.py`.", "",
        "Networks: "
        + "; ".join(
            f"for {target} {counts[target]} of 80, 60 of them random (seed {seed}, unused in "
            f"development) and 20 named"
            for target, seed in SEEDS.items()
        )
        + f". On {', '.join(sorted(hosts))}, one thread, batch 1, fitted to the 20 networks of the "
        "shipped profiles.",
        "",
        "A figure is the mean error and the share within ±10 %. What is estimated is what a run "
        "takes on a quiet machine: the tenth percentile of the process' CPU time, corrected by a "
        "reference network in the same turns for what others on the machine did meanwhile.",
        "",
        "| target | precision | networks | n | " + " | ".join(METHODS) + " | in its 90 % |",
        "|---|---|---|---|" + "---|" * (len(METHODS) + 1),
    ]  # fmt: skip
    for target in SEEDS:
        for precision in ("fp32", "int8"):
            same = [f for f in found if (f["target"], f["precision"]) == (target, precision)]
            for group in (*KINDS, "named", "all"):
                some = [f for f in same if group in (kind_of(f["network"]), "all")]
                if some:
                    cells = [figures([f[method] for f in some]) for method in METHODS]
                    inside = np.mean([f["inside"] for f in some])
                    lines.append(
                        f"| {target} | {precision} | {group} | {len(some)} | "
                        + " | ".join(cells) + f" | {inside:.0%} |"
                    )  # fmt: skip
    lines += [
        "", f"All together: {figures([f['edgekd'] for f in found])} (n = {len(found)}); "
        f"{throughput(random):.0f} random networks a second, from their class to milliseconds "
        "(CPU time, one core).", "", "## The furthest off", "",
        "| network | target | precision | measured ms | estimate ÷ measured |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for f in sorted(found, key=lambda f: -abs(math.log(f["edgekd"])))[:15]:
        lines.append(
            f"| {f['network']} | {f['target']} | {f['precision']} | {f['measured_ms']:.3f} | "
            f"{f['edgekd']:.2f} |"
        )
    lines += ["", *NOTES.read_text().splitlines()] if NOTES.exists() else []
    write_atomically(ROOT / "docs" / "latency_model.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


NOTES = KEPT / "notes.md"


def main() -> None:
    """Measure what is missing, or write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--part", default="0/1", help="of the networks, for exports at once")
    parser.add_argument("--targets", nargs="*", default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=60, help="start no other after this")
    parser.add_argument("--files", type=Path, default=ROOT / "runs" / "latency_model")
    options = parser.parse_args()
    for what in ("export", "measure"):
        for target in map(Target.load, options.targets if getattr(options, what) else ()):
            run(what, target, options.part, options.minutes, options.files)
    if not (options.export or options.measure):
        write_tables()


if __name__ == "__main__":
    main()
