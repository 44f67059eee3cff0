"""Our integers beside the peers': agreement with FP32, and latency on the same runtime.

    pip install nncf                               # in an environment of the bench's own
    python tools/bench_ptq.py --photos photos.zip --agreement      # 20 minutes on one core
    python tools/bench_ptq.py --latency                            # then, on a quiet machine
    python tools/bench_ptq.py --latency --networks resnet18 swin_t --targets intel-cpu-vnni

Agreement: EfficientNet-Lite0 with its real weights; photos are split once, by photo: 200 to learn
from (the first 100 calibrate, for every arm), the others to count top-1 answers that differ from
FP32's. Our arms are post-training and label-free distillation (`quantize` with the
float network as the teacher and no task), on OpenVINO with seven bits in a weight and, where the
processor has VNNI, with eight as NNCF has. Peers: ONNX Runtime's static quantization (U8S8, Q/DQ,
per channel, min-max) and NNCF's, on OpenVINO.

Latency: the twelve networks of matrix.py, batch 1, one thread, files of all arms in turns; the
figure is our p50 over that of the fastest peer whose file runs. Peers start from our FP32 file for
that runtime, OpenVINO's of fixed shapes as ours. Figures go to docs/bench/ptq.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from bench_int8 import SIZE, networks, photos
from matrix import NETWORKS, network
from torch import Tensor

import edgekd
from edgekd.data.base import Data, InMemory
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.network import Network, Preprocessing
from edgekd.runtimes.base import get_runtime
from edgekd.runtimes.openvino import nncf_post_training
from edgekd.stages.profile import profile_together
from edgekd.tasks.base import wilson_interval

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "ptq.json"
CALIBRATION, LEARNT = 100, 200
EPOCHS, BATCH, LR = 4, 20, 1e-4  # the best of bench_label_free.py
ORT, OPENVINO, VNNI = "host-onnxruntime", "intel-cpu", "intel-cpu-vnni"


# ---- peers ---------------------------------------------------------------------------------------


def onnxruntime_static(fp32: Path, batches: list[Tensor], out: Path) -> Path:
    """ONNX Runtime's own tool, as its guide says for CPUs."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(fp32).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows: Iterator[dict[str, Any]] = iter({name: x.numpy()} for x in batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rows, None)

    prepared = out.with_name("prepared.onnx")
    quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(out), Reader(), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return out


def nncf_openvino(fp32: Path, batches: list[Tensor], out: Path) -> Path:
    """NNCF's post-training quantization of an OpenVINO model, its defaults."""
    return nncf_post_training(fp32, [x.numpy() for x in batches], out)


Peer = Callable[[Path, list[Tensor], Path], Path]
PEERS: dict[str, dict[str, tuple[Peer, str]]] = {
    ORT: {"ONNX Runtime static": (onnxruntime_static, "static.onnx")},
    OPENVINO: {"NNCF": (nncf_openvino, "nncf.xml")},
}


# ---- agreement -----------------------------------------------------------------------------------


def disagreements(path: Path, target: str, batches: list[Tensor], wanted: list[Any]) -> int:
    """How many answers are not the wanted ones."""
    session = get_runtime(edgekd.Target.load(target).runtime).load(path, threads=1)
    answers = [session([x.numpy()])[0].argmax(1) for x in batches]
    return int((np.concatenate(answers) != np.concatenate(wanted)).sum())


def as_data(batches: list[Tensor]) -> Data:
    """Images to learn from: flipped and shifted, without labels that mean anything."""
    pixels = (torch.cat(batches) * 128 + 127).round().byte()
    images = InMemory(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    half = Preprocessing(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return Data("photos", {"train": images, "test": images}, ("photo",), half, ("flip", "crop"))


def agreement(
    path: Path, arms: Sequence[str], targets: Sequence[str], kept: list[dict[str, Any]]
) -> dict[str, Any]:
    """Every arm on the held-out photos; or these alone, beside the rows `kept` of the others."""

    def asked(arm: str, target: str) -> bool:
        return (not arms or arm in arms) and (not targets or target in targets)

    batches = photos(path)
    size = len(batches[0])
    calibration, held_out = batches[: CALIBRATION // size], batches[LEARNT // size :]
    module = networks()["EfficientNet-Lite0"]
    net = Network(module, torch.zeros(1, 3, SIZE, SIZE))
    with torch.no_grad():
        wanted = [module(x).argmax(1).numpy() for x in held_out]
    common: dict[str, Any] = {"data": calibration, "calibration": CALIBRATION}
    ours: dict[str, dict[str, Any]] = {
        "edgekd, post-training": {},
        "edgekd, post-training, biases as they are": {"correct_bias": False},
        "edgekd, distilled without labels": {
            "data": as_data(batches[: LEARNT // size]), "teacher": net, "epochs": EPOCHS,
            "batch_size": BATCH, "lr": LR,
        },
    }  # fmt: skip
    rows = [row for row in kept if not asked(row["arm"], row["target"])]

    def add(arm: str, target: str, file: Path) -> None:
        n, differ = sum(map(len, held_out)), disagreements(file, target, held_out, wanted)
        rows.append(
            {"arm": arm, "target": target, "differ": differ, "n": n,
             "agreement": 1 - differ / n, "ci95": wilson_interval(n - differ, n)}
        )  # fmt: skip
        print(f"{arm}, {target}: {differ} of {n} differ from FP32", flush=True)

    with TemporaryDirectory() as name:
        folder = Path(name)
        fp32 = edgekd.export(net, target=ORT, out=folder / "fp32").path
        for target, peers in PEERS.items():
            for arm, (peer, file) in peers.items():
                if asked(arm, target):
                    add(arm, target, peer(fp32, calibration, folder / file))
        for index, (arm, options) in enumerate(ours.items()):
            for target in (ORT, OPENVINO, VNNI):
                if not asked(arm, target) or not edgekd.Target.load(target).native_here:
                    continue
                quantized = edgekd.quantize(net, target=target, **common | options)
                artifact = edgekd.export(quantized, target=target, out=folder / f"{index}-{target}")
                add(arm, target, artifact.path)
    return {
        "network": "EfficientNet-Lite0", "calibration": CALIBRATION, "learnt_from": LEARNT,
        "held_out": sum(map(len, held_out)), "epochs": EPOCHS, "lr": LR, "rows": rows,
        "host": host_name(), "date": today(),
    }  # fmt: skip


# ---- latency -------------------------------------------------------------------------------------


def latency(
    rounds: int, name: str, targets: Sequence[str], kept: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Our integers and the peers' of one network, in turns; and the rows that were kept."""
    vnni = edgekd.Target.load(VNNI).native_here  # NNCF gives eight weight bits too
    asked = {
        VNNI if target == OPENVINO and vnni else target: peers for target, peers in PEERS.items()
    }
    asked = {target: peers for target, peers in asked.items() if not targets or target in targets}
    rows = [row for row in kept if row["network"] != name or row["target"] not in asked]
    net, side = network(name), NETWORKS[name][1]
    batches = list(torch.randn(40, 3, side, side).split(20))
    with TemporaryDirectory() as text:
        folder = Path(text)
        for target, peers in asked.items():
            fp32 = edgekd.export(net, target=target, out=folder / f"{target}-fp32").path
            quantized = edgekd.quantize(net, target=target, data=batches, calibration=40)
            own = edgekd.export(quantized, target=target, out=folder / target).path
            files, refused = {"edgekd": own}, {}
            for arm, (peer, file) in peers.items():
                try:
                    files[arm] = peer(fp32, batches, folder / file)
                except Exception as error:  # what peers raise is theirs
                    refused[arm] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            timed = [
                profile_together(list(files.values()), target=target, runs=60)
                for _ in range(rounds)
            ]
            each = [row[0].p50_ms / min(m.p50_ms for m in row[1:]) for row in timed]
            rows.append(
                {
                    "network": name, "target": target, "rounds": rounds, "px": side,
                    "p50_ms": {
                        arm: median(row[index].p50_ms for row in timed)
                        for index, arm in enumerate(files)
                    },
                    "ratio": median(each), "ratio_range": [min(each), max(each)],
                    "refused": refused, "host": host_name(), "date": today(),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """What is asked for; the other figures stay."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, help="zip of 256 × 256 JPEGs")
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--arms", nargs="*", default=[], help="only these of the agreement")
    parser.add_argument("--targets", nargs="*", default=[], help="only these")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="of the latency")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if options.agreement:
        kept = result.get("agreement", {}).get("rows", [])
        result["agreement"] = agreement(options.photos, options.arms, options.targets, kept)
        write_atomically(RESULT, json.dumps(result, indent=1))
    for name in options.networks if options.latency else ():
        kept = result.get("latency", {}).get("rows", [])
        rows = latency(options.rounds, name, options.targets, kept)
        result["latency"] = {"rows": rows, "threads": 1}
        write_atomically(RESULT, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
