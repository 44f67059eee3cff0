"""Phone formats beyond ONNX: are they integers throughout, and what was quantized?

    pip install 'edgekd[litert,executorch]'
    python tools/bench_phone_formats.py --photos photos.zip      # 12 minutes beside other work

EfficientNet-Lite0 (its real ImageNet weights), MobileNetV2 and ResNet-18 (random weights, BatchNorm
calibrated) at 96 px, quantized post-training on photographs, once for `android-litert` and
`android-executorch`, which take the same integers, and once for `android-arm64`, whose bundle has
the `.ort`. Outputs beside the quantized network's, element by element, in steps of the output's
quantizer: computed by torch in float32, and in the runtime's own integer arithmetic. Operator by
operator where the runtime shows inner tensors. The control is the same network in float64 beside
itself in float32: so far does rounding alone move its outputs. Nothing is timed but the conversion.
Figures go to docs/bench/phone_formats.json.
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
import onnxruntime as ort
import torch
from bench_int8 import networks, photos
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.runtimes.base import Arrays, get_runtime
from edgekd.runtimes.local_parity import local_parity
from edgekd.stages.verify import output_step

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "phone_formats.json"
SIZE, CALIBRATION, SAMPLES = 96, 96, 32
# format -> target, and its kernels by what they are called: whether as written
FORMATS = {
    "tflite": ("android-litert", {"reference": True, "XNNPACK": False}),
    "pte": ("android-executorch", {"XNNPACK": False}),
    "ort": ("android-arm64", {"MLAS": False}),
}


class OrtFile:
    """A `.ort` file, which is no ONNX, as far as a comparison needs it."""

    def __init__(self, path: Path) -> None:
        self._session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Arrays) -> Arrays:
        """One batch: arrays of (N, ...)."""
        names = [each.name for each in self._session.get_inputs()]
        outputs: Arrays = self._session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs


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
        made: dict[str, edgekd.Network] = {}  # by scheme
        for format_, (target, kernels) in FORMATS.items():
            scheme = repr(edgekd.Target.load(target).scheme)
            if scheme not in made:
                made[scheme] = edgekd.quantize(net, target=target, data=[*known.split(16)])
                with torch.no_grad():
                    ours = made[scheme](x).numpy()
                    double = copy.deepcopy(made[scheme].module).double()(x.double()).numpy()
                control = beside(double, ours, output_step(ours, made[scheme]))
                rows.append(
                    {"network": name, "format": f"as {format_}", "kernels": "float64"} | control
                )
            quantized = made[scheme]
            runtime = get_runtime(edgekd.Target.load(target).runtime)
            with TemporaryDirectory() as folder:
                began = time.perf_counter()
                artifact = edgekd.export(quantized, target=target, out=folder)
                seconds = time.perf_counter() - began
                parity = edgekd.verify(artifact, quantized, data=[x])
                found = parity.local.passes.get("as written") if parity.local else None
                for kind, written in kernels.items():
                    loaded = runtime.load(artifact.path, threads=1, emulated=written)
                    integer, matrix = loaded.integer_share()
                    session: Any = loaded
                    if format_ == "ort":
                        session = OrtFile(artifact.path.with_suffix(".ort"))
                    whole = None if written else local_parity(
                        quantized, [x], written=None, shipped=None, whole=session,
                        rounding=runtime.rounding,
                    ).as_a_whole  # fmt: skip
                    rows.append(
                        {
                            "network": name, "format": format_, "kernels": kind,
                            **beside(session([x.numpy()])[0], ours, output_step(ours, quantized)),
                            "integer_arithmetic": None if whole is None else whole.model_dump(),
                            "integer": integer, "matrix_operators": matrix,
                            "agreement": parity.agreement, "operators_exact": found and found.exact,
                            "operators_max_steps": found and found.max_steps,
                            "tensors_shown": found and f"{found.tensors} of {found.of}",
                            "size_bytes": artifact.size_bytes, "convert_s": round(seconds, 1),
                        }
                    )  # fmt: skip
                    print(rows[-1], flush=True)
    packages = ("torch", "torchao", "litert-torch", "ai-edge-litert", "executorch", "onnxruntime")
    result = {
        "host": host_name(), "date": today(), "px": SIZE, "n": SAMPLES, "seed": 0,
        "versions": {package: version(package) for package in packages}, "rows": rows,
    }  # fmt: skip
    write_atomically(RESULT, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
