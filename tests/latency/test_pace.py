"""The reference network, and what comes of it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from edgekd.errors import StateError
from edgekd.latency.pace import RUNTIMES, has_pace, slower_than_quiet, write_reference
from edgekd.runtimes.base import get_runtime
from edgekd.runtimes.on_device.measure import TURN_RUNS, quiet
from edgekd.target import Target, target_names


def test_all_its_runtimes_compute_the_reference_alike(tmp_path):
    path = tmp_path / "reference.onnx"
    write_reference(path)
    onnx.checker.check_model(str(path), full_check=True)
    first = path.read_bytes()
    write_reference(path)
    assert path.read_bytes() == first
    image = [np.random.default_rng(0).standard_normal((1, 3, 96, 96), dtype=np.float32)]
    a, b = (get_runtime(name).load(path, threads=1)(image)[0] for name in RUNTIMES)
    assert np.abs(a).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_only_what_runs_on_a_cpu_has_a_pace():
    paced = {name for name in target_names() if has_pace(Target.load(name), 1)}
    assert {"host-onnxruntime", "intel-cpu", "raspberry-pi-4"} <= paced
    # their CPU only waits, and what it waits for is no CPU time
    assert not paced & {"intel-igpu", "intel-npu", "ios-coreml-ort", "jetson-nano"}
    assert not has_pace(Target.load("intel-cpu"), 2)


def test_the_least_ever_seen_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path))
    seen = [slower_than_quiet(ms, "onnxruntime 1.31", "here") for ms in (3.0, 2.0, 2.5)]
    assert seen == [1.0, 1.0, 1.25]
    assert slower_than_quiet(9.0, "openvino 2026.4", "here") == 1.0  # another's
    assert slower_than_quiet(9.0, "onnxruntime 1.31", "ssh://pi") == 1.0
    assert json.loads((tmp_path / "pace.json").read_text())["onnxruntime 1.31 on here"] == 2.0


def test_a_broken_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path))
    (tmp_path / "pace.json").write_text('{"a": "quick"}')
    with pytest.raises(StateError, match=r"pace\.json .* remove it"):
        slower_than_quiet(1.0, "onnxruntime", "here")


def test_copies_count_alike_whichever_is_fast():
    # turns of two copies, of which one is always slower; each of its own disturbed runs
    turns = [[1.0 + copy] * (TURN_RUNS - 1) + [9.0] for _ in range(10) for copy in (0, 1)]
    assert quiet([ms for turn in turns for ms in turn], 2) == pytest.approx(1.5)
    assert quiet([4.0, 2.0, 3.0]) == 2.0
