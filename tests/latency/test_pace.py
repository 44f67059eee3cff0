"""The reference network, and what comes of it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from edgekd.errors import StateError
from edgekd.latency.pace import (
    FAR,
    NEAR,
    RUNTIMES,
    Reference,
    has_pace,
    least_ever,
    quietest,
    reference_for,
    write_reference,
)
from edgekd.runtimes.base import get_runtime
from edgekd.runtimes.on_device.measure import TURN_RUNS, by_turns, median, paced, quiet, settled
from edgekd.target import Target, target_names


@pytest.mark.parametrize("reference", [NEAR, FAR])
def test_all_its_runtimes_compute_the_reference_alike(tmp_path, reference: Reference):
    path = tmp_path / reference.file
    write_reference(path, reference)
    onnx.checker.check_model(str(path), full_check=True)
    first = path.read_bytes()
    write_reference(path, reference)
    assert path.read_bytes() == first
    side = reference.side
    image = [np.random.default_rng(0).standard_normal((1, 3, side, side), dtype=np.float32)]
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
    seen = [least_ever(ms, "onnxruntime 1.31", "here", NEAR) for ms in (3.0, 2.0, 2.5)]
    assert seen == [3.0, 2.0, 2.0]
    others = [("openvino 2026.4", "here", NEAR), ("onnxruntime 1.31", "ssh://pi", NEAR),
              ("onnxruntime 1.31", "here", FAR)]  # fmt: skip
    assert [least_ever(9.0 + i, *each) for i, each in enumerate(others)] == [9.0, 10.0, 11.0]
    assert least_ever(1.5, "onnxruntime 1.32", "here", NEAR) == 1.5
    assert json.loads((tmp_path / "pace.json").read_text())["onnxruntime 1.31 on here"] == 2.0
    # of any version
    assert quietest("onnxruntime", "here", NEAR) == 1.5
    assert quietest("onnxruntime", "here", FAR) == 11.0
    assert quietest("onnxruntime", "ssh://nano", NEAR) is None


def test_a_broken_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path))
    (tmp_path / "pace.json").write_text('{"a": "quick"}')
    with pytest.raises(StateError, match=r"pace\.json .* remove it"):
        least_ever(1.0, "onnxruntime", "here", NEAR)


def test_copies_count_alike_whichever_is_fast():
    # turns of two copies, of which one is always slower; each of its own disturbed runs
    turns = [[1.0 + copy] * (TURN_RUNS - 1) + [9.0] for _ in range(10) for copy in (0, 1)]
    assert quiet([ms for turn in turns for ms in turn], 2) == pytest.approx(1.5)
    assert quiet([4.0, 2.0, 3.0]) == 2.0


def test_weights_that_only_the_last_cache_keeps_have_a_reference_alike(tmp_path):
    write_reference(tmp_path / "far.onnx", FAR)
    write_reference(tmp_path / "near.onnx")
    assert reference_for([(tmp_path / "far.onnx").stat().st_size]) is FAR
    assert reference_for([(tmp_path / "near.onnx").stat().st_size]) is NEAR
    assert reference_for([45_000_000]) is NEAR
    assert reference_for([45_000_000, 11_000_000]) is FAR  # one for all of a comparison


def test_what_disturbs_both_does_not_reach_their_ratio():
    pace = np.repeat([1.0, 1.3, 1.0, 1.1, 1.6, 1.2, 1.0], TURN_RUNS)
    reference = list(2.0 * pace)
    ours = 3.0 * pace
    ours[::TURN_RUNS] *= 4  # one run of each turn was interrupted
    assert np.median(ours) > 3.3
    assert median(by_turns(list(ours), reference)) == pytest.approx(1.5)
    # the last turn may be a short one
    assert median(by_turns(list(ours[:-2]), reference[:-2])) == pytest.approx(1.5)


def test_quiet_times_are_known_once_their_share_is_and_the_host_is_quiet():
    def timed(turns: int, ms: float = 2.0) -> list[tuple[list[float], list[float]]]:
        """Ours, whose turns differ and whose runs in a turn do not; the reference beside it."""
        ours = np.repeat(np.tile([2.9, 3.1, 3.0, 2.8, 3.2], turns // 5), TURN_RUNS)
        return [([], list(ours)), ([], [ms] * len(ours))]

    assert settled(timed(40)[0][1]) and not paced(timed(40), 2.0, 1)  # by 40 turns, not 200 runs
    assert paced(timed(400), 2.0, 1)
    assert not paced(timed(400, ms=2.1), 2.0, 1)  # disturbed
    assert not paced(timed(400), None, 1)  # nothing is known of this host
