"""Calibration over a link: a real OpenSSH server, a real ONNX Runtime."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from edgekd.latency import calibrate as module
from edgekd.latency.calibrate import calibrate
from edgekd.latency.model import LatencyModel
from edgekd.latency.probes import probe
from edgekd.latency.profiles import read_profile


def test_a_related_target_adapts_to_a_device(server: Any, tmp_path, monkeypatch):
    server.program("python3", f'exec {sys.executable} "$@"\n')
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "PROBES", (("transformer", 3),))
    done = calibrate("android-arm64", device=server.address, related="host-onnxruntime")
    assert (done.measured, done.wanted, done.errors) == (1, 1, {})
    rows = read_profile("android-arm64")
    assert [(r.kind, r.precision, r.origin, r.related) for r in rows] == [
        ("network", precision, "device", "host-onnxruntime") for precision in ("fp32", "int8")
    ]
    model = LatencyModel.load("android-arm64")
    with torch.device("meta"):
        net, shape = probe("transformer", 3)
    for row in rows:
        found = model.estimate(net, row.precision, [shape])
        assert found.p50_ms == pytest.approx(row.p50_ms, rel=0.02)
        assert found.low_ms < row.p50_ms < found.high_ms
