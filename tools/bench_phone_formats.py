"""Phone formats beyond ONNX: are they integers throughout, and what was trained?

    pip install 'edgekd[litert,executorch]'
    python tools/bench_phone_formats.py                   # about 3 minutes

MobileNetV2 and ResNet-18 of torchvision (random weights, BatchNorm calibrated, 96 px), quantized
post-training once for `android-litert` and `android-executorch`, which take the same integers.
Outputs beside the quantized network's, element by element, in steps of the output's quantizer;
operator by operator where the runtime shows inner tensors. Numbers only: nothing is timed but the
conversion. Figures go to docs/bench/phone_formats.json.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.runtimes.base import get_runtime

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "phone_formats.json"
SIZE, CLASSES, SAMPLES = 96, 100, 64
# format -> target, and its kernels by what they are called: whether as written
FORMATS = {
    "tflite": ("android-litert", {"reference": True, "XNNPACK": False}),
    "pte": ("android-executorch", {"XNNPACK": False}),
}


def images(count: int, seed: int) -> Tensor:
    """(N, 3, H, W) of smooth noise, as photographs are smooth."""
    coarse = torch.randn(
        count, 3, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed)
    )
    return torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")


def network(name: str) -> edgekd.Network:
    """Random weights, BatchNorm's statistics from noise."""
    torch.manual_seed(0)
    module = getattr(torchvision.models, name)(num_classes=CLASSES).train()
    with torch.no_grad():
        for seed in range(10):
            module(images(16, seed))
    return edgekd.Network(module.eval(), torch.zeros(1, 3, SIZE, SIZE))


def main() -> None:
    """Each network in each format by each kind of kernels."""
    torch.set_num_threads(1)
    x = images(SAMPLES, 100)
    rows: list[dict[str, Any]] = []
    for name in ("mobilenet_v2", "resnet18"):
        net = network(name)
        data = [images(16, seed) for seed in range(20, 26)]
        quantized = edgekd.quantize(net, target="android-litert", data=data)
        with torch.no_grad():
            ours = quantized(x).numpy()
        (end,) = quantized.module.graph.output_node().all_input_nodes
        step = quantized.module.get_submodule(str(end.target)).scale.item()
        for format_, (target, kernels) in FORMATS.items():
            runtime = get_runtime(edgekd.Target.load(target).runtime)
            with TemporaryDirectory() as folder:
                began = time.perf_counter()
                artifact = edgekd.export(quantized, target=target, out=folder)
                seconds = time.perf_counter() - began
                parity = edgekd.verify(artifact, quantized, data=[x])
                found = parity.local.passes.get("as written") if parity.local else None
                for kind, emulated in kernels.items():
                    session = runtime.load(artifact.path, threads=1, emulated=emulated)
                    off = np.abs(session([x.numpy()])[0] - ours) / step
                    integer, matrix = session.integer_share()
                    rows.append(
                        {
                            "network": name, "format": format_, "kernels": kind,
                            "elements": off.size, "within_one_step": float((off < 1.01).mean()),
                            "equal": float((off < 0.5).mean()), "max_steps": float(off.max()),
                            "integer": integer, "matrix_operators": matrix,
                            "gate": parity.gate, "operators_exact": found and found.exact,
                            "operators_max_steps": found and found.max_steps,
                            "tensors_shown": found and f"{found.tensors} of {found.of}",
                            "size_bytes": artifact.size_bytes, "convert_s": round(seconds, 1),
                        }
                    )  # fmt: skip
                    print(rows[-1], flush=True)
    packages = ("torch", "torchao", "litert-torch", "ai-edge-litert", "executorch")
    result = {
        "host": host_name(), "date": today(), "px": SIZE, "n": SAMPLES, "seed": 0,
        "versions": {package: version(package) for package in packages}, "rows": rows,
    }  # fmt: skip
    write_atomically(RESULT, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
