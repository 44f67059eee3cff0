"""How well `profile` repeats on a busy host, and whether layers add up to the whole.

    python tools/bench_repeatability.py

Two networks in two runtimes: the layers beside the whole; then, while another process keeps a core
busy, measured again and again, each time in a process of its own: the spread of what `profile`
calls quiet (the median of CPU time, turn by turn at the pace of a reference network), of the
medians of CPU time as they are, and of those by the wall clock. Figures go to
docs/bench/repeatability.json. About fifteen minutes.
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

import torch
from torchvision import models

import edgekd
from edgekd.devices.local import LocalDevice
from edgekd.devices.measure import measure_on
from edgekd.files import write_atomically
from edgekd.latency.measuring import RawFile, host_name, today
from edgekd.latency.pace import least_ever, quietest, reference_for

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "repeatability.json"
TARGETS = ("host-onnxruntime", "intel-cpu")
NETWORKS = {"mobilenet_v2": models.mobilenet_v2, "resnet18": models.resnet18}
SPINNING = "while True: pass"


def medians(artifact: edgekd.Artifact, runs: int) -> dict[str, Any]:
    """One measurement, as `profile` makes it: the medians, in ms and as a share of the pace."""
    target = edgekd.Target.load(artifact.target)
    reference = reference_for([artifact.size_bytes])
    raw = measure_on(
        LocalDevice(), {artifact.sha256: artifact.path}, target=target, runs=runs, threads=1,
        layers=False, lock_clocks=False, reference=reference,
        quietest_ms=quietest(target.runtime, host_name(), reference),
    )  # fmt: skip
    file: RawFile = raw.files[0]
    assert raw.conditions.reference_ms is not None
    least_ever(
        raw.conditions.reference_ms, f"{raw.runtime} {raw.runtime_version}", host_name(), reference
    )
    return {
        "cpu_p50_ms": float(torch.tensor(file.cpu_ms).median()),
        "wall_p50_ms": float(torch.tensor(file.wall_ms).median()),
        "reference": reference.file,
        "reference_ms": raw.conditions.reference_ms,
        "per_reference": file.per_reference,
        "runs": len(file.wall_ms),
    }


def spread(values: list[float]) -> float:
    """(largest − smallest) ÷ median."""
    return (max(values) - min(values)) / float(torch.tensor(values).median())


def repeatability(artifact: edgekd.Artifact, repeats: int, runs: int) -> dict[str, Any]:
    """Measurements one after another beside a process that never rests."""
    with subprocess.Popen([sys.executable, "-c", SPINNING]) as busy:
        try:
            found = [medians(artifact, runs) for _ in range(repeats)]
        finally:
            busy.kill()
    return {
        "target": artifact.target, "n": repeats, "measurements": found,
        "quiet_spread": spread([x["per_reference"] for x in found]),
        "cpu_spread": spread([x["cpu_p50_ms"] for x in found]),
        "wall_spread": spread([x["wall_p50_ms"] for x in found]),
    }  # fmt: skip


def layers(artifact: edgekd.Artifact, runs: int) -> dict[str, Any]:
    """The sum over the layers beside the whole."""
    m = edgekd.profile(artifact, target=artifact.target, runs=runs, layers=True)
    assert m.rest_ms is not None and m.profiled_p50_ms is not None
    total = sum(layer.p50_ms for layer in m.layers)
    return {
        "target": m.target, "layers": len(m.layers), "p50_ms": m.p50_ms, "clock": m.clock,
        "sum_ms": total, "rest_ms": m.rest_ms, "rest_share": m.rest_ms / m.p50_ms,
        "profiled_p50_ms": m.profiled_p50_ms,
        "rest_share_while_profiling": 1 - total / m.profiled_p50_ms, "rest": m.rest,
        "runs": m.runs, "trust": m.trust, "repeats": m.repeats,
        "runtime_version": m.runtime_version,
    }  # fmt: skip


def main() -> None:
    """Both questions, for each network and runtime."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=6, help="measurements of each file")
    parser.add_argument("--runs", type=int, default=5000, help="timed runs, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, Any]]] = {"repeatability": [], "layers": []}
    load = os.getloadavg()[0]
    with TemporaryDirectory() as folder:
        for name, make in NETWORKS.items():
            torch.manual_seed(0)
            net = edgekd.Network(make(weights=None), torch.zeros(1, 3, 224, 224))
            for target in TARGETS:
                artifact = edgekd.export(net, target=target, out=Path(folder) / name / target)
                rows["layers"].append({"network": name, **layers(artifact, options.runs)})
                print(rows["layers"][-1], flush=True)
                found = repeatability(artifact, options.repeats, options.runs)
                rows["repeatability"].append({"network": name, **found})
                print(rows["repeatability"][-1], flush=True)
    result = {
        "host": host_name(), "cores": os.cpu_count(), "load_average_before": load,
        "threads": 1, "precision": "fp32", "input": [1, 3, 224, 224], "seed": 0, "date": today(),
        "note": "shared machine: others' jobs ran beside it, see load_average_before", **rows,
    }  # fmt: skip
    write_atomically(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
