"""The measuring protocol, on functions whose cost is known in relation to each other."""

from __future__ import annotations

import re
import time
from datetime import date

import numpy as np
import pytest

from edgekd.latency import measuring
from edgekd.latency.measuring import PeakMemory, host_name, time_in_turns, today
from edgekd.target import host_instruction_set


def work(steps: int) -> object:
    """Computes without a pause, in proportion to `steps`."""
    total = 0
    for i in range(steps):
        total += i * i
    return total


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "WARM_UP_SECONDS", 0.01)


def test_candidates_come_out_in_the_order_of_their_cost():
    timings = time_in_turns(
        {"slow": lambda: work(30_000), "fast": lambda: work(3_000)}, runs=25, threads=1
    )
    assert list(timings) == ["slow", "fast"]
    # ten times the work; the machine may be busy, so a third of that is enough
    assert timings["slow"].p50_ms > 3 * timings["fast"].p50_ms
    for timing in timings.values():
        assert 0 < timing.p50_ms <= timing.p90_ms <= timing.p99_ms
        assert (timing.runs, timing.warm_up_runs >= 10) == (25, True)


def test_candidates_run_in_turns():
    calls: list[str] = []
    time_in_turns({n: lambda n=n: calls.append(n) for n in "ab"}, runs=30, threads=1)
    each = 1 + measuring.TURN_RUNS  # the first of a turn is not timed
    turns = 30 // measuring.TURN_RUNS
    assert calls[-2 * each * turns :] == (["a"] * each + ["b"] * each) * turns
    assert {"a", "b"} == set(calls[: -2 * each * turns])  # both were warmed up before


class Clocks:
    """Stands in for `time`: a call takes as much wall and CPU time as it is told."""

    def __init__(self) -> None:
        self.wall_ns = self.cpu_ns = 0

    def spend(self, wall_ms: float, cpu_ms: float) -> None:
        self.wall_ns += round(wall_ms * 1e6)
        self.cpu_ns += round(cpu_ms * 1e6)

    def perf_counter_ns(self) -> int:
        return self.wall_ns

    def process_time_ns(self) -> int:
        return self.cpu_ns

    def monotonic(self) -> float:
        return self.wall_ns / 1e9


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(measuring, "time", made)
    return made


def test_percentiles_are_numpys(clocks: Clocks):
    costs = [float(c) for c in np.random.default_rng(0).permutation(100) + 1]
    turns = np.reshape(costs, (-1, measuring.TURN_RUNS))
    untimed = np.full((len(turns), 1), 300)  # the first of each turn
    queue = iter([1.0] * 10 + list(np.hstack([untimed, turns]).flat))  # first the warm-up

    def call() -> None:
        cost = next(queue)
        clocks.spend(cost, cost)

    timing = time_in_turns({"a": call}, runs=100, threads=1)["a"]
    wanted = np.percentile(costs, [50, 90, 99])
    assert (timing.p50_ms, timing.p90_ms, timing.p99_ms) == pytest.approx(tuple(wanted))
    assert (timing.clock, timing.runs, timing.warm_up_runs) == ("wall", 100, 10)


@pytest.mark.parametrize(
    ("threads", "wall_ms", "clock", "p50_ms"),
    [
        (1, 2.0, "wall", 2.0),  # an idle host: wall and CPU time are the same
        (1, 2.05, "wall", 2.05),
        (1, 7.0, "cpu", 2.0),  # a busy one: the wall clock counts others' work too
        (4, 7.0, "wall", 7.0),  # CPU time of several threads is no latency
    ],
)
def test_cpu_time_stands_in_for_the_wall_clock_of_one_thread_on_a_busy_host(
    clocks: Clocks, threads: int, wall_ms: float, clock: str, p50_ms: float
):
    timings = time_in_turns(
        {"busy": lambda: clocks.spend(wall_ms, 2.0), "quiet": lambda: clocks.spend(1.0, 1.0)},
        runs=20, threads=threads,
    )  # fmt: skip
    # one clock for all of a comparison
    assert {t.clock for t in timings.values()} == {clock}
    assert timings["busy"].p50_ms == pytest.approx(p50_ms)
    assert timings["quiet"].p50_ms == pytest.approx(1.0)


def test_a_function_that_sleeps_is_timed_by_its_cpu_time():
    timing = time_in_turns({"a": lambda: time.sleep(0.005)}, runs=10, threads=1)["a"]
    assert timing.clock == "cpu"
    assert timing.p50_ms < 5


def test_slow_candidates_end_early_but_not_before_twenty_runs(clocks: Clocks):
    slow = time_in_turns({"a": lambda: clocks.spend(3000, 3000)}, runs=300, threads=1)["a"]
    assert slow.runs == 20
    # 3 s a turn: the first turn that begins more than 20 s after the start is not run
    middling = time_in_turns({"a": lambda: clocks.spend(500, 500)}, runs=300, threads=1)["a"]
    assert middling.runs == 35
    fast = time_in_turns({"a": lambda: clocks.spend(1, 1)}, runs=300, threads=1)["a"]
    assert fast.runs == 300


def test_peak_memory_sees_what_was_held_for_a_moment():
    with PeakMemory() as small:
        pass
    with PeakMemory() as large:
        block = np.ones(64 * 1024 * 1024 // 8)  # 64 MiB
        del block
    if large.mib is None:
        pytest.skip("this system does not tell peak memory")
    assert small.mib is not None
    assert large.mib - small.mib > 48


def test_the_host_and_the_date_are_named():
    assert host_name().endswith(f"({host_instruction_set()})")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", today())
    assert abs((date.fromisoformat(today()) - date.today()).days) <= 1
