"""What `export` changes in the graphs that OpenVINO converts, and what it is worth.

    python tools/bench_openvino.py

The networks of matrix.py in FP32 and INT8: as `export` writes them, as OpenVINO converts them with
a batch of 1 (without `turn_maps`, `quantize_behind_turns` and `bound_branches`), and as `export`
writes them but for an open batch. With eight weight bits, and attention in integers, where this
processor has VNNI. One image, one thread, in turns. Figures go to docs/bench/openvino.json, and the
table to docs/export.md by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import DEFAULT, patch

import openvino
import torch
from matrix import NETWORKS, network

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.calibrate import export_files, runnable
from edgekd.latency.measuring import host_name, today
from edgekd.runtimes import openvino as runtime
from edgekd.stages.profile import profile_together

ARMS = ("as converted", "open batch")
CHANGES = ("turn_maps", "quantize_behind_turns", "bound_branches")
RESULT = Path(__file__).parents[1] / "docs" / "bench" / "openvino.json"


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
    with TemporaryDirectory() as text:
        folder = Path(text)
        ours = export_files(net, target, runnable(target), folder / "ours")
        with patch.multiple(runtime, **dict.fromkeys(CHANGES, DEFAULT)):
            converted = export_files(net, target, runnable(target), folder / "converted")
        for precision, path in ours.items():
            files = [path, converted[precision], opened(path)]
            timed = [profile_together(files, target=target, runs=60) for _ in range(rounds)]
            row = {"network": name, "target": target.name, "px": side, "precision": precision,
                   "rounds": rounds}  # fmt: skip
            for index, arm in enumerate(ARMS, 1):
                each = [run[0].p50_ms / run[index].p50_ms for run in timed]
                row |= {arm: median(each), f"{arm} range": [min(each), max(each)]}
            p50 = [median(m.p50_ms for m in of) for of in zip(*timed, strict=True)]
            rows.append(row | {"p50_ms": p50})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Each network; those that have figures stay."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vnni, plain = map(edgekd.Target.load, ("intel-cpu-vnni", "intel-cpu"))
    target = vnni if vnni.native_here else plain
    kept = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for name in options.networks:
        kept = [row for row in kept if row["network"] != name]
        kept += rows_of(name, target, options.rounds)
        result = {"rows": kept, "host": host_name(), "date": today()}
        write_atomically(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
