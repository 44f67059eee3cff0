from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.errors import TargetError
from edgekd.latency import calibrate as module
from edgekd.latency import runtime_graph
from edgekd.latency.calibrate import calibrate, timed
from edgekd.latency.profiles import own_file, read_profile
from edgekd.runtimes.on_device.measure import TURN_RUNS


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path))
    monkeypatch.setattr("edgekd.latency.profiles.data_folders", lambda kind: [tmp_path / kind])
    monkeypatch.setattr(module, "PROBES", (("transformer", 3), ("dense", 5)))
    monkeypatch.setattr(runtime_graph, "RUNS", 6)
    monkeypatch.setattr(module, "TOGETHER", 1)
    monkeypatch.setattr(module, "SECONDS", 0.2)
    return tmp_path


def test_it_goes_on_where_it_was_broken_off(home, monkeypatch):
    measured = []
    whole = module.measure_here

    def interrupted(files, target, threads):
        if measured:
            raise KeyboardInterrupt
        measured.append(files)
        return whole(files, target, threads)

    monkeypatch.setattr(module, "measure_here", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate("host-onnxruntime")
    rows = read_profile("host-onnxruntime")
    networks = [row for row in rows if row.kind == "network"]
    assert [(r.network, r.precision) for r in networks] == [
        ("transformer-3", "fp32"), ("transformer-3", "int8"),
    ]  # fmt: skip
    for row in networks:
        assert row.low_ms <= row.p50_ms <= row.high_ms
        assert row.quiet_ms <= row.p50_ms
        assert (row.origin, row.threads, row.clock) == ("host", 1, "cpu")
        assert sum(r.kind == "kernel" and r.sha256 == row.sha256 for r in rows) > 50
    monkeypatch.setattr(module, "measure_here", lambda *_: [])
    assert calibrate("host-onnxruntime").measured == 1
    assert not list(own_file("host-onnxruntime").parent.rglob("*.onnx"))
    monkeypatch.setattr(module, "export_probe", None)  # nothing is exported once the time is up
    assert calibrate("host-onnxruntime", minutes=-1).wanted == 2


def test_what_cannot_be_measured_is_said_first(home):
    with pytest.raises(TargetError, match="jetson-nano is not this host"):
        calibrate("jetson-nano")
    with pytest.raises(TargetError, match="raspberry-pi-5: no network was measured"):
        calibrate("host-onnxruntime", related="raspberry-pi-5")


def test_networks_are_timed_in_turns_with_the_reference(tmp_path, monkeypatch):
    order: list[str] = []

    class Runtime:
        @staticmethod
        def load(path: Path, *, threads: int) -> str:
            assert threads == 2
            return path.stem

    monkeypatch.setattr(module, "get_runtime", lambda name: Runtime)
    monkeypatch.setattr(module, "one_run", lambda name: lambda: order.append(name))
    found = timed({name: tmp_path / f"{name}.onnx" for name in ("a", "b")}, "onnxruntime", 2)
    assert len(found["a"].samples) == len(found["b"].samples) == module.MOST_RUNS
    each = TURN_RUNS + 1
    last = [order[-each * n : len(order) - each * (n - 1)] for n in (3, 2, 1)]
    assert sorted(last) == [["a"] * each, ["b"] * each, ["reference"] * each]
