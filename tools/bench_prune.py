"""Prune networks of many families and check each by independent means.

`edgekd.prune(net, ratio=0.3, round_to=8)`, random weights with settled BatchNorms, 64 px: does it
run forward and backward, is it smaller, is it the same after saving and loading in a fresh
process, and is its FP32 export equal in ONNX Runtime? Then the latency there, before and after.

    .venv/bin/python tools/bench_prune.py --families        # about 5 minutes on one core

Writes docs/bench/prune_families.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import edgekd
from edgekd.errors import EdgekdError
from edgekd.latency.measuring import host_name
from edgekd.models.build import Build, build_module
from edgekd.runtimes.base import get_runtime
from edgekd.stages.profile import profile_together

AUXILIARY = {"aux_logits": False, "init_weights": False}
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("vgg11_bn", {}, 64),
    "residual": ("resnet18", {}, 64),
    "grouped": ("resnext50_32x4d", {}, 64),
    "dense": ("densenet121", {}, 64),
    "inverted residual": ("mobilenet_v2", {}, 64),
    "squeeze-excite": ("mobilenet_v3_small", {}, 64),
    "compound-scaled": ("efficientnet_b0", {}, 64),
    "inception": ("googlenet", AUXILIARY, 64),
    "inception, factorized": ("inception_v3", AUXILIARY, 96),
    "fire": ("squeezenet1_1", {}, 64),
    "searched": ("mnasnet0_5", {}, 64),
    "grouped with squeeze-excite": ("regnet_y_400mf", {}, 64),
    "layer-normalised": ("convnext_tiny", {}, 64),
    "dilated, two outputs": ("segmentation/lraspp_mobilenet_v3_large", {}, 64),
    "shuffled": ("shufflenet_v2_x0_5", {}, 64),
}
FRESH = """
import sys, edgekd
from safetensors.torch import load_file, save_file
net = edgekd.Network.load(sys.argv[1])
net.train_mode(False)
out = net(load_file(sys.argv[2])["x"])
save_file({str(i): y.detach() for i, y in enumerate(out.values() if isinstance(out, dict) else
           [out])}, sys.argv[3])
"""


def network(name: str, kwargs: dict[str, Any], size: int) -> edgekd.Network:
    """Random weights; BatchNorms have seen noise, as untrained ones hide what pruning does."""
    torch.manual_seed(0)
    if name.startswith("segmentation/"):
        kwargs = kwargs | {"weights_backbone": None}
    build = Build(model=f"torchvision/{name.removeprefix('segmentation/')}", kwargs=kwargs)
    module = build_module(build, trust=False, origin=name)
    with torch.no_grad():
        for _ in range(3):
            module.train()(torch.randn(8, 3, size, size))
    return edgekd.Network(module.eval(), torch.zeros(1, 3, size, size), build=build)


def tensors(out: Any) -> list[torch.Tensor]:
    """A network's outputs as a list."""
    return list(out.values()) if isinstance(out, dict) else [out]


def examine(name: str, kwargs: dict[str, Any], size: int) -> dict[str, Any]:
    """One family: what held, and the figures."""
    net = network(name, kwargs, size)
    row: dict[str, Any] = {"model": f"torchvision/{name}", "px": size}
    start = time.perf_counter()
    try:
        pruned = edgekd.prune(net, ratio=0.3, round_to=8)
    except EdgekdError as error:
        return row | {"error": str(error)}
    row["prune_s"] = round(time.perf_counter() - start, 2)
    row |= {"params": net.params, "params_pruned": pruned.params}
    row |= {"macs": net.macs, "macs_pruned": pruned.macs}
    convolutions = [m for m in pruned.module.modules() if isinstance(m, torch.nn.Conv2d)]
    row["convolutions"] = len(convolutions)
    row["of_odd_width"] = sum(m.out_channels % 8 > 0 for m in convolutions)
    x = torch.randn(4, 3, size, size)
    pruned.train_mode(True)
    sum(y.square().mean() for y in tensors(pruned(x))).backward()
    row["backward"] = all(p.grad is not None for p in pruned.module.parameters())
    pruned.train_mode(False)
    with torch.no_grad():
        expected = tensors(pruned(x)), tensors(net(x))
    with TemporaryDirectory() as folder:
        pruned.save(f"{folder}/net")
        save_file({"x": x}, f"{folder}/x")
        arguments = [f"{folder}/net", f"{folder}/x", f"{folder}/y"]
        subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True)
        again = load_file(f"{folder}/y")
        row["fresh_process_bit_equal"] = all(
            torch.equal(again[str(i)], y) for i, y in enumerate(expected[0])
        )
        start = time.perf_counter()
        artifacts = [
            edgekd.export(one, target="host-onnxruntime", out=f"{folder}/{which}")
            for which, one in (("before", net), ("after", pruned))
        ]
        row["export_s"] = round((time.perf_counter() - start) / 2, 1)
        session = get_runtime("onnxruntime").load(artifacts[1].path, threads=1)
        theirs = session([x.numpy()])
        row["onnxruntime_relative_error"] = max(
            float(np.abs(a - b.numpy()).max() / b.abs().max())
            for a, b in zip(theirs, expected[0], strict=True)
        )
        timed = profile_together(artifacts, target="host-onnxruntime", runs=100)
        row["latency_p50_ms"] = [round(m.p50_ms, 3) for m in timed]
    return row


def main() -> None:
    """Every family in turn; the figures are printed and written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", action="store_true", required=True)
    parser.add_argument("--only", nargs="*", help="models; without it, all")
    parser.add_argument("--out", type=Path, default=Path("docs/bench/prune_families.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family, (name, kwargs, size) in FAMILIES.items():
        if arguments.only and name not in arguments.only:
            continue
        rows.append({"family": family} | examine(name, kwargs, size))
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "host": host_name(),
        "date": datetime.date.today().isoformat(),
        "options": {"ratio": 0.3, "round_to": 8, "batch": 1, "threads": 1, "runs": 100, "seed": 0},
        "versions": {p: version(p) for p in ("torch", "torch-pruning", "onnxruntime")},
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
