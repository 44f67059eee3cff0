"""What OpenVINO's compiler makes of a file whose batch is open, beside one of batch 1.

    python tools/bench_batch.py

The networks of matrix.py in FP32 and INT8, as `export` writes them and with the batch open, one
image, one thread, in turns. Figures go to docs/bench/batch.json, and the table to docs/export.md
by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import openvino
import torch
from matrix import NETWORKS, network

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.calibrate import export_files, runnable
from edgekd.latency.measuring import host_name, today
from edgekd.stages.profile import profile_together

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "batch.json"


def opened(path: Path) -> Path:
    """The same file with an open batch."""
    model = openvino.Core().read_model(path)
    shapes = {port: port.partial_shape for port in model.inputs}
    for shape in shapes.values():
        shape[0] = -1
    model.reshape(shapes)
    openvino.save_model(model, path.with_stem(f"{path.stem}-open"), compress_to_fp16=False)
    return path.with_stem(f"{path.stem}-open")


def rows_of(name: str, target: edgekd.Target, rounds: int) -> list[dict[str, Any]]:
    """A row for each precision."""
    net, side = network(name), NETWORKS[name][1]
    rows = []
    with TemporaryDirectory() as folder:
        for precision, path in export_files(net, target, runnable(target), Path(folder)).items():
            files = [path, opened(path)]
            timed = [profile_together(files, target=target, runs=60) for _ in range(rounds)]
            each = [fixed.p50_ms / dynamic.p50_ms for fixed, dynamic in timed]
            rows.append({
                "network": name, "px": side, "precision": precision, "rounds": rounds,
                "p50_ms": [median(m.p50_ms for m in of) for of in zip(*timed, strict=True)],
                "ratio": median(each), "ratio_range": [min(each), max(each)],
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Each network; those that have figures stay."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = edgekd.Target.load("intel-cpu")
    kept = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for name in options.networks:
        kept = [row for row in kept if row["network"] != name]
        kept += rows_of(name, target, options.rounds)
        result = {"rows": kept, "target": target.name, "host": host_name(), "date": today()}
        write_atomically(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
