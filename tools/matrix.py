"""Networks × targets × precision: what each device would make of each file, as seen from here.

    python tools/matrix.py                             # what is missing, the smallest first
    python tools/matrix.py --networks resnet18 --again jetson-nano
    python tools/matrix.py --tables                    # docs/matrix.md from what there is

Weights are random but for EfficientNet-Lite0's, BatchNorm is calibrated on noise (as in zoo.py),
integers are post-training. A cell is the most that this host can say:

    executed   the target's own runtime ran the file here, with the device's kind of kernels
    compiled   `tensorrt-rtx` built an engine of it for SM 8.6, every intended operator in Int8
    checked    operators, types and opset are in the device's table; ONNX Runtime, OpenVINO or
               LiteRT gave the trained network's numbers
    refused    edgekd, or a runtime, does not take it; with the reason
    failed     a gate is not passed

The gate is: every operator that the scheme wants in integers is; operator by operator no tensor is
off by more than a step. End to end the figure is shown, not judged: a random network moves by
itself. Targets that take the same file (Orin Nano, NX and AGX) share a run. Where FP32 and INT8 are
both executed, they are timed in turns. One file a network is kept in docs/bench/matrix/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from zoo import build, calibrate_norms, noise

import edgekd
from edgekd.errors import EdgekdError
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.stages.profile import profile_together
from edgekd.target import Target, target_names

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "bench" / "matrix"
# name -> (library, side in pixels), the smallest first
NETWORKS = {
    "edgekd/resnet": ("edgekd", 32),
    "shufflenet_v2_x1_0": ("torchvision", 224),
    "mobilenet_v2": ("torchvision", 224),
    "regnet_y_400mf": ("torchvision", 224),
    "efficientnet_lite0": ("real", 224),
    "efficientnet_b0": ("torchvision", 224),
    "mobilenet_v3_large": ("torchvision", 224),
    "vit_tiny_patch16_224": ("timm", 224),
    "resnet18": ("torchvision", 224),
    "resnet50": ("torchvision", 224),
    "swin_t": ("torchvision", 224),
    "convnext_tiny": ("torchvision", 224),
}
CALIBRATION, TESTED = 16, 4
# an export takes minutes; tools/bench_phone_formats.py has its figures
LEFT_OUT = {"android-executorch"}
TARGETS = sorted(set(target_names()) - LEFT_OUT)
# what two targets may differ in and still take the same file
APART = {"name", "title", "memory_mib", "peak", "source", "channel_multiple", "no_integers"}


def network(name: str) -> edgekd.Network:
    """Random weights with BatchNorm calibrated, or real ones."""
    library, size = NETWORKS[name]
    if library == "real":
        from bench_int8 import networks

        module = networks()["EfficientNet-Lite0"]
    elif library == "edgekd":
        from edgekd.models.build import Build, build_module

        kwargs = {"num_classes": 10, "widths": [16, 32, 64]}
        module = build_module(Build(model=name, kwargs=kwargs), trust=False, origin="matrix")
    else:
        module = build(library, name)
    if library != "real":
        calibrate_norms(module, size)
    return edgekd.Network(module, torch.zeros(1, 3, size, size))


def level(target: Target, parity: edgekd.Parity) -> str:
    """What a passed gate amounts to."""
    if parity.compiled is not None:
        return "compiled"
    return "executed" if target.native_here else "checked"


def forms(
    net: edgekd.Network,
    target: Target,
    calibration: list[Any],
    quantized: dict[str, edgekd.Network | str],
) -> Iterator[tuple[str, edgekd.Network | str]]:
    """(precision, the network in it, or why there is none), of those that the target ships.

    Args:
        calibration: batches.
        quantized: scheme -> what it gave before.
    """
    if target.float_precision:
        yield target.float_precision, net
    if target.scheme is None or "int8" not in target.precisions:
        return
    scheme = target.scheme.model_dump_json()
    if scheme not in quantized:
        try:
            quantized[scheme] = edgekd.quantize(
                net,
                target=target,
                data=calibration,
                calibration=sum(len(x) for (x,) in calibration),
            )
        except EdgekdError as error:
            quantized[scheme] = str(error)
    yield "int8", quantized[scheme]


def cell(
    net: edgekd.Network, target: Target, folder: Path, batches: list[Any]
) -> tuple[dict[str, Any], edgekd.Artifact | None]:
    """One network in one precision on one target."""
    began = time.monotonic()
    found: dict[str, Any] = {"precision": target.float_precision if net.scheme is None else "int8"}
    artifact = None
    try:
        artifact = edgekd.export(net, target=target, out=folder)
        parity = edgekd.verify(artifact, net, data=batches, agreement=0.0, mean_steps=1e9)
        plain = parity.model_dump(mode="json", exclude={"local", "agreement"}, exclude_none=True)
        found |= plain
        found["size_bytes"] = artifact.size_bytes
        if parity.local is not None and parity.local.passes:
            found["local_exact"] = min(p.exact for p in parity.local.passes.values())
        found["level"] = {"passed": level(target, parity), "failed": "failed"}.get(
            parity.gate, "unchecked"
        )
        if artifact.path.suffix == ".onnx":
            wrong = edgekd.check(artifact.path, target=target).errors
            if wrong:
                found["level"] = "failed"
                found["reasons"] = [f"{w.rule}: {w.found}" for w in wrong[:3]]
    except EdgekdError as error:
        found |= {"level": "refused", "reasons": [str(error)[:300]]}
    except Exception as error:  # a runtime may fail in any way; it is the result
        found |= {"level": "failed", "reasons": [f"{type(error).__name__}: {error}"[:300]]}
    found["seconds"] = round(time.monotonic() - began, 1)
    return found, artifact


def one(name: str, path: Path, again: list[str]) -> None:
    """Every target of one network, or those to do again; kept after each: what is done stays."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "network": name, "host": host_name(), "date": today(), "cells": {}, "latency": {},
    }  # fmt: skip
    if path.exists():
        record |= json.loads(path.read_text())
    net = network(name)
    record["params"] = net.params
    side = NETWORKS[name][1]
    calibration = [(noise(CALIBRATION // 2, side, 10 + i),) for i in range(2)]
    tested = [(noise(TESTED, side, 20),)]
    quantized: dict[str, edgekd.Network | str] = {}
    done: dict[str, tuple[str, dict[str, Any]]] = {}
    with TemporaryDirectory() as folder:
        for target in map(Target.load, TARGETS):
            file = target.model_dump_json(exclude=APART)
            if target.name in record["cells"] and target.name not in again:
                done.setdefault(file, (target.name, record["cells"][target.name]))
                continue
            if file in done:
                first, cells = done[file]
                record["cells"][target.name] = {**cells, "as": first}
                write_atomically(path, json.dumps(record, indent=1))
                continue
            cells = {}
            timed = []
            for precision, given in forms(net, target, calibration, quantized):
                if isinstance(given, str):
                    cells[precision] = {"level": "refused", "reasons": [given]}
                    continue
                place = Path(folder) / f"{target.name}-{precision}"
                cells[precision], artifact = cell(given, target, place, tested)
                if cells[precision]["level"] == "executed" and artifact is not None:
                    timed.append((precision, artifact))
                print(f"{name} {target.name} {precision}: {cells[precision]['level']}", flush=True)
            if len(timed) == 2 and target.native_here:
                measured = profile_together([a for _, a in timed], target=target, runs=100)
                record["latency"][target.name] = {
                    p: m.model_dump(include={"p50_ms", "clock", "runs"})
                    for (p, _), m in zip(timed, measured, strict=True)
                }
            done[file] = target.name, cells
            record["cells"][target.name] = cells
            write_atomically(path, json.dumps(record, indent=1))


# ---- the tables ----------------------------------------------------------------------------------


def shown(found: dict[str, Any]) -> str:
    """A cell in words."""
    said = [found["level"]]
    if (share := found.get("integer_share")) is not None:
        said.append(f"integers {share:.0%}")
    if (exact := found.get("local_exact")) is not None:
        said.append(f"exact {exact:.3%}")
    if (steps := found.get("mean_steps")) is not None:
        said.append(f"{steps:.2f} steps")
    elif (relative := found.get("relative_error")) is not None:
        said.append(f"{relative:.0e}")
    if (half := found.get("half_relative_error")) is not None:
        said.append(f"in half precision {half:.0e}")
    if found["level"] in ("refused", "failed", "unchecked"):
        said = [found["level"] + ": " + "; ".join(found.get("reasons", []))[:160]]
    return ", ".join(said).replace("|", "/")


def write_tables() -> None:
    """docs/matrix.md."""
    header = (__doc__ or "").split("\n\n", 2)[2]
    lines = [
        "# Networks × targets", "", "Made by `tools/matrix.py`.", "", "```", header.strip(), "```",
        "",
    ]  # fmt: skip
    records = [
        json.loads((KEPT / f"{name.replace('/', '-')}.json").read_text())
        for name in NETWORKS
        if (KEPT / f"{name.replace('/', '-')}.json").exists()
    ]
    whole = sum(r["cells"].keys() >= set(TARGETS) for r in records)
    lines += [f"{whole} of {len(NETWORKS)} networks run, {len(TARGETS)} targets.", ""]
    count: dict[str, int] = {}
    for record in records:
        for cells in record["cells"].values():
            for precision, found in cells.items():
                if precision != "as":
                    count[found["level"]] = count.get(found["level"], 0) + 1
    lines += [", ".join(f"{n} {kind}" for kind, n in sorted(count.items())) + ".", ""]
    lines += ["## INT8 beside FP32 on this host", "",
              "p50 of batch 1, one thread, in turns.", "",
              "| network | target | FP32 ms | INT8 ms | FP32 ÷ INT8 | host |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for record in records:
        for target, by in record["latency"].items():
            fp32, int8 = by["fp32"], by["int8"]
            lines.append(
                f"| {record['network']} | {target} | {fp32['p50_ms']:.3f} | {int8['p50_ms']:.3f} | "
                f"{fp32['p50_ms'] / int8['p50_ms']:.2f} | {record['host']} |"
            )
    for record in records:
        lines += ["", f"## {record['network']}", "", f"{record['params'] / 1e6:.1f} M parameters, "
                  f"{record['host']}, {record['date']}.", "",
                  "| target | float | INT8 |", "|---|---|---|"]  # fmt: skip
        for target, cells in record["cells"].items():
            kinds = [p for p in cells if p not in ("as", "int8")]
            floating = ", ".join(f"{p.upper()}: {shown(cells[p])}" for p in kinds)
            integer = shown(cells["int8"]) if "int8" in cells else "no integers"
            same = f" (as {cells['as']})" if "as" in cells else ""
            lines.append(f"| {target}{same} | {floating} | {integer} |")
    write_atomically(ROOT / "docs" / "matrix.md", "\n".join(lines) + "\n")


def launch(name: str, minutes: float, again: list[str]) -> None:
    """One network in a process of its own; the log is in runs/matrix."""
    log = ROOT / "runs" / "matrix" / f"{name.replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        try:
            subprocess.run(
                [sys.executable, __file__, "--child", name, "--again", *again], stdout=file,
                stderr=file, timeout=60 * minutes, check=False,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{name}: not done in {minutes:g} minutes", flush=True)


def main() -> None:
    """Run what is missing; write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, help="only these")
    parser.add_argument("--again", nargs="*", default=[], help="targets to do again")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=75, help="start no other after this")
    parser.add_argument("--tables", action="store_true", help="only write docs/matrix.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    if options.child:
        one(options.child, KEPT / f"{options.child.replace('/', '-')}.json", options.again)
        return
    if not options.tables:
        began = time.monotonic()

        def job(name: str) -> None:
            left = options.minutes - (time.monotonic() - began) / 60
            if left > 0:
                launch(name, left, options.again)

        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(job, options.networks or NETWORKS))
    write_tables()


if __name__ == "__main__":
    main()
