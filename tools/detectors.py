"""torchvision's detectors: wrapped, pruned by 30 %, quantized, exported and run, target by target.

    python tools/detectors.py                          # what is missing, each in its own process
    python tools/detectors.py --detectors ssd300_vgg16 --again jetson-nano
    python tools/detectors.py --tables                 # docs/detectors.md from what there is

Weights are random: BatchNorm is settled on noise and the class heads are scaled, so that scores
differ. Integers are post-training. Levels and gates are those of tools/matrix.py; `same` is the
share of the network's own detections (torch, its raw heads) that come out of the artifact as well:
of the same class, with an IoU of 0.5 or more. What the artifact's are made by is told: its file
with decoding and suppression inside, or its raw heads and detect.py. For TensorRT's targets it is
the latter, in ONNX Runtime. Faster R-CNN has no core: it is exported whole, where that is possible.
One file a detector is kept in docs/bench/detectors/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matrix import APART, ROOT, TARGETS, cell, forms, shown
from torch import nn
from torchvision.models import get_model
from torchvision.ops import box_iou
from zoo import calibrate_norms, noise

import edgekd
from edgekd.errors import EdgekdError
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.models.torchvision_detectors import Core, as_network
from edgekd.models.two_stage import TwoStage
from edgekd.runtimes.base import Artifact, verifying_runtime
from edgekd.runtimes.on_device import detect as on_device
from edgekd.target import Target
from edgekd.tasks.decoding import detect

KEPT = ROOT / "docs" / "bench" / "detectors"
# name -> side in pixels; of the last two the smallest that leaves their coarsest map 2 × 2
SIDES = {
    "ssdlite320_mobilenet_v3_large": 320,
    "ssd300_vgg16": 300,
    "fcos_resnet50_fpn": 256,
    "retinanet_resnet50_fpn": 256,
}
WHOLE = {"fasterrcnn_resnet50_fpn": 256}
CALIBRATION, TESTED, RATIO = 8, 2, 0.3


def network(name: str) -> edgekd.Network:
    """Pruned, with random weights under which scores differ from anchor to anchor."""
    torch.manual_seed(0)
    module, side = get_model(name, weights=None, weights_backbone=None), SIDES[name]
    calibrate_norms(Core(module), side)
    net = edgekd.prune(as_network(module, (side, side)), ratio=RATIO, round_to=8)
    net.train_mode(False)
    core: Any = net.module
    head = core.head.classification_head
    parts = [head.cls_logits] if hasattr(head, "cls_logits") else head.module_list
    with torch.no_grad():
        lasts = [[p for p in part.modules() if isinstance(p, nn.Conv2d)][-1] for part in parts]
        for conv in lasts:
            conv.bias.zero_()
        largest = net(noise(2, side, 3))["classes"].abs().max()
        for conv in lasts:
            conv.weight.mul_(6 / largest)
    return net


def whole(name: str) -> TwoStage:
    """A detector of two stages, with random weights under which scores differ."""
    torch.manual_seed(0)
    module, side = get_model(name, weights=None, weights_backbone=None), WHOLE[name]
    net = TwoStage(module, (side, side))
    calibrate_norms(net, side)
    for head in (module.rpn.head.cls_logits, module.roi_heads.box_predictor.cls_score):
        logits: list[torch.Tensor] = []
        hook = head.register_forward_hook(lambda _, __, given, to=logits: to.append(given))
        with torch.no_grad():
            net(noise(2, side, 3))
            head.weight.mul_(2 / torch.cat([x.flatten() for x in logits]).std())
        hook.remove()
    return net


def whole_cell(net: TwoStage, target: Target, folder: Path) -> dict[str, Any]:
    """Its file on one target, beside the network's own detections."""
    side = net.io.inputs[0].shape[-1]
    x = noise(TESTED, side, 20)
    try:
        artifact = edgekd.export(net, target=target, out=folder, examples=noise(TESTED, side, 10))
    except EdgekdError as error:
        return {"level": "refused", "reasons": [str(error)]}
    session = verifying_runtime(target).load(artifact.path, threads=1)
    found = np.concatenate([session([x[i : i + 1].numpy()])[0] for i in range(len(x))])
    with torch.no_grad():
        wanted = net(x)
    level = "executed" if target.native_here else "checked"
    return {"level": level, "size_bytes": artifact.size_bytes} | met(found, wanted, "its file")


def ran(net: edgekd.Network, target: Target, artifact: Artifact, x: torch.Tensor) -> dict[str, Any]:
    """What comes out of the artifact, beside the network's own detections."""
    decoding, whole = net.io.decoding, artifact.path.with_suffix(".detections.onnx")
    assert decoding is not None
    net.train_mode(False)
    with torch.no_grad():
        wanted = detect(decoding, net(x))
    runtime = verifying_runtime(target)
    if target.runtime != "tensorrt" and whole.exists():
        by, session = whole.name, runtime.load(whole, threads=1)
        found = np.concatenate([session([x[i : i + 1].numpy()])[0] for i in range(len(x))])
    else:
        by, session = "detect.py", runtime.load(artifact.path, threads=1)
        found = np.full(wanted.shape, -1, np.float32)
        for index in range(len(x)):
            raw = session([x[index : index + 1].numpy()])
            rows = on_device.detect(decoding.model_dump(mode="json"), raw)
            found[index, : len(rows)] = rows
    return met(found, wanted, by)


def met(found: np.ndarray, wanted: torch.Tensor, by: str) -> dict[str, Any]:
    """How many of the detections `wanted`, (N, D, 6) as `found` is, were found."""
    hits = total = 0
    for ours, theirs in zip(torch.from_numpy(found), wanted, strict=True):
        ours, theirs = (rows[rows[:, 5] >= 0] for rows in (ours, theirs))
        meets = box_iou(theirs[:, :4], ours[:, :4]) >= 0.5
        meets &= theirs[:, 5, None] == ours[None, :, 5]
        hits, total = hits + int(meets.any(1).sum()), total + len(theirs)
    return {"by": by, "detections": int((found[..., 5] >= 0).sum()), "wanted": total,
            "same": hits / max(total, 1)}  # fmt: skip


def settle(found: dict[str, Any], target: Target) -> None:
    """`verify` compares no detections without a task; `ran` did."""
    left = [reason for reason in found["reasons"] if not reason.startswith("agreement:")]
    found["reasons"] = left
    if found["level"] == "unchecked" and not left:
        executed = "executed" if target.native_here else "checked"
        found["level"] = "compiled" if "compiled" in found else executed


def one(name: str, path: Path, again: list[str]) -> None:
    """Every target of one detector, or those to do again; kept after each."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "detector": name, "host": host_name(), "date": today(), "cells": {},
    }  # fmt: skip
    if path.exists():
        record |= json.loads(path.read_text())
    if name in WHOLE:
        two = whole(name)
        record |= {"params": sum(p.numel() for p in two.parameters()), "side": WHOLE[name]}
        for target in map(Target.load, TARGETS):
            with TemporaryDirectory() as folder:
                precision = target.float_precision or "fp32"
                record["cells"][target.name] = {precision: whole_cell(two, target, Path(folder))}
            print(f"{name} {target.name}: {record['cells'][target.name]}", flush=True)
        write_atomically(path, json.dumps(record, indent=1))
        return
    net, side = network(name), SIDES[name]
    record |= {"params": net.params, "side": side}
    calibration, tested = [(noise(CALIBRATION, side, 10),)], noise(TESTED, side, 20)
    quantized: dict[str, edgekd.Network | str] = {}
    done: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        for target in map(Target.load, TARGETS):
            file = target.model_dump_json(exclude=APART)
            if target.name in record["cells"] and target.name not in again:
                done.setdefault(file, target.name)
                continue
            if file in done:
                record["cells"][target.name] = record["cells"][done[file]] | {"as": done[file]}
                write_atomically(path, json.dumps(record, indent=1))
                continue
            cells: dict[str, Any] = {}
            for precision, given in forms(net, target, calibration, quantized):
                if isinstance(given, str):
                    cells[precision] = {"level": "refused", "reasons": [given]}
                    continue
                place = Path(folder) / f"{target.name}-{precision}"
                cells[precision], artifact = cell(given, target, place, [(tested,)])
                if "is not installed" in str(cells[precision].get("reasons")):
                    cells[precision]["level"] = "not run"
                if artifact is not None:
                    cells[precision] |= ran(given, target, artifact, tested)
                    settle(cells[precision], target)
                print(f"{name} {target.name} {precision}: {cells[precision]}", flush=True)
            done[file] = target.name
            record["cells"][target.name] = cells
            write_atomically(path, json.dumps(record, indent=1))


# ---- the table -----------------------------------------------------------------------------------


def said(found: dict[str, Any]) -> str:
    """A cell in words."""
    if "by" not in found:
        return shown(found)
    return f"{shown(found)}; same {found['same']:.1%} of {found['wanted']} by {found['by']}"


def write_tables() -> None:
    """docs/detectors.md."""
    header = (__doc__ or "").split("\n\n", 2)[2]
    lines = ["# Detectors × targets", "", "Made by `tools/detectors.py`.", "", header.strip()]
    for name in (*SIDES, *WHOLE):
        path = KEPT / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        lines += ["", f"## {name}", ""]
        form = "whole" if name in WHOLE else "once pruned"
        lines += [f"{record['params'] / 1e6:.1f} M parameters {form}, {record['side']} px, "
                  f"{record['host']}, {record['date']}.", "",
                  "| target | float | INT8 |", "|---|---|---|"]  # fmt: skip
        for target, cells in record["cells"].items():
            floating = ", ".join(
                f"{p.upper()}: {said(c)}" for p, c in cells.items() if p not in ("as", "int8")
            )
            integer = said(cells["int8"]) if "int8" in cells else "no integers"
            same = f" (as {cells['as']})" if "as" in cells else ""
            lines.append(f"| {target}{same} | {floating} | {integer} |")
    write_atomically(ROOT / "docs" / "detectors.md", "\n".join(lines) + "\n")


def main() -> None:
    """Run what is missing; write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    known = (*SIDES, *WHOLE)
    parser.add_argument("--detectors", nargs="*", choices=known, default=known, help="only these")
    parser.add_argument("--again", nargs="*", default=[], help="targets to do again")
    parser.add_argument("--tables", action="store_true", help="only write docs/detectors.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    if options.child:
        one(options.child, KEPT / f"{options.child}.json", options.again)
        return
    for name in () if options.tables else options.detectors:
        subprocess.run(
            [sys.executable, __file__, "--child", name, "--again", *options.again], check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    write_tables()


if __name__ == "__main__":
    main()
