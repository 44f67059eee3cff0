"""Phone formats beyond ONNX: are they integers throughout, and what was quantized?

    pip install 'edgekd[litert,executorch]'
    python tools/bench_phone_formats.py --photos photos.zip      # 12 minutes beside other work

EfficientNet-Lite0 (its real ImageNet weights), MobileNetV2 and ResNet-18 (random weights, BatchNorm
calibrated) at 96 px, quantized post-training on photographs, once for `android-litert` and
`android-executorch`, which take the same integers. Outputs beside the quantized network's, element
by element, in steps of the output's quantizer; operator by operator where the runtime shows inner
tensors. The control is the same network in float64: what float32 rounds otherwise moves its
outputs as well, and no file can be nearer than that. Nothing is timed but the conversion. Figures
go to docs/bench/phone_formats.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bench_int8 import networks, photos
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.runtimes.base import get_runtime

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "phone_formats.json"
SIZE, CALIBRATION, SAMPLES = 96, 96, 32
# format -> target, and its kernels by what they are called: whether as written
FORMATS = {
    "tflite": ("android-litert", {"reference": True, "XNNPACK": False}),
    "pte": ("android-executorch", {"XNNPACK": False}),
}


def modules(x: Tensor) -> dict[str, nn.Module]:
    """By name; `x` calibrates the BatchNorm of those with random weights."""
    torch.manual_seed(0)
    made = networks() | {"MobileNetV2": mobilenet_v2()}
    for name in ("ResNet-18", "MobileNetV2"):
        made[name].train()
        with torch.no_grad():
            for batch in x.split(16):
                made[name](batch)
        made[name].eval()
    return made


def beside(theirs: NDArray[Any], ours: NDArray[Any], step: float) -> dict[str, Any]:
    """How near the outputs are."""
    off = np.abs(theirs - ours) / step
    return {
        "elements": off.size, "within_one_step": float((off < 1.01).mean()),
        "equal": float((off < 0.5).mean()), "max_steps": round(float(off.max())),
    }  # fmt: skip


def main() -> None:
    """Each network in each format by each kind of kernels."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="zip of 256 × 256 JPEGs")
    torch.set_num_threads(1)
    whole = torch.cat(photos(parser.parse_args().photos))
    whole = nn.functional.interpolate(whole, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    known, x = whole[:CALIBRATION], whole[CALIBRATION : CALIBRATION + SAMPLES]
    rows: list[dict[str, Any]] = []
    for name, module in modules(known).items():
        net = edgekd.Network(module, x[:1])
        quantized = edgekd.quantize(net, target="android-litert", data=[*known.split(16)])
        (end,) = quantized.module.graph.output_node().all_input_nodes
        step = quantized.module.get_submodule(str(end.target)).scale.item()
        with torch.no_grad():
            ours = quantized(x).numpy()
            double = copy.deepcopy(quantized.module).double()(x.double()).numpy()
        control = beside(double, ours, step)
        rows.append({"network": name, "format": "none", "kernels": "float64"} | control)
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
                    theirs = session([x.numpy()])[0]
                    integer, matrix = session.integer_share()
                    rows.append(
                        {
                            "network": name, "format": format_, "kernels": kind,
                            **beside(theirs, ours, step),
                            "integer": integer, "matrix_operators": matrix,
                            "agreement": parity.agreement, "operators_exact": found and found.exact,
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
