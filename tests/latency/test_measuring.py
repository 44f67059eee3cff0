"""From a device's samples to measurements."""

from __future__ import annotations

import json
import math
import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import StateError
from edgekd.latency.measuring import (
    Conditions,
    Measurement,
    RawMeasurement,
    host_name,
    today,
    trust,
)
from edgekd.runtimes.on_device.measure import median_interval
from edgekd.target import host_instruction_set


def raw(clock: str = "wall", **changes: Any) -> dict[str, Any]:
    """What measure.py writes of one file of 100 runs."""
    costs = [float(c) for c in np.random.default_rng(0).permutation(100) + 1]
    file = {
        "file": "model.onnx", "sha256": "abc", "size_bytes": 10, "warm_up_runs": 20,
        "warm_up_steady": True, "wall_ms": costs, "cpu_ms": [c / 2 for c in costs], "load_ms": 3.0,
        "load_memory_mib": 1.0, "peak_memory_mib": 2.0,
    }  # fmt: skip
    return {
        "format": 1, "target": "host-onnxruntime", "runtime": "onnxruntime",
        "runtime_version": "1", "threads": 1, "clock": clock, "date": "2026-01-01",
        "machine": {"node": "n", "machine": "aarch64", "python": "3.6.9", "model": "Nano"},
        "conditions": {"cpu_mhz_before": 1000.0, "rails": ["VDD_IN"]},
        "files": [file | changes],
    }  # fmt: skip


def measured(raw: dict[str, Any], device: str = "ssh://nano") -> Measurement:
    return RawMeasurement.model_validate(raw).measurements(device=device)[0]


@pytest.mark.parametrize(("clock", "scale"), [("wall", 1), ("cpu", 0.5)])
def test_percentiles_are_numpys(clock: str, scale: float):
    m = measured(raw(clock))
    costs = np.arange(1, 101) * scale
    assert (m.p50_ms, m.p90_ms, m.p99_ms) == pytest.approx(np.percentile(costs, [50, 90, 99]))
    assert m.throughput_per_s == pytest.approx(1000 / costs.mean())
    assert (m.clock, m.runs, m.warm_up_runs) == (clock, 100, 20)
    assert Measurement.model_validate_json(m.model_dump_json()) == m


def test_a_measurement_says_whose_it_is():
    m = measured(raw())
    assert (m.origin, m.device, m.host) == ("device", "ssh://nano", "Nano (aarch64)")
    assert m.instruction_set == "neon"
    m = measured(raw(), device="local")
    assert (m.origin, m.host) == ("host", host_name())
    assert m.instruction_set == host_instruction_set()


@pytest.mark.parametrize("count", [20, 50, 51, 100, 300, 1000])
def test_the_medians_interval_holds_it_in_95_of_100(count: int):
    low, high = median_interval(list(range(1, count + 1)))  # the ranks themselves
    # the median is below the k-th smallest sample where fewer than k samples are below it
    inside = sum(math.comb(count, below) for below in range(low, high)) / 2**count
    assert 0.945 < inside < 0.98
    assert median_interval([4.0]) == (4.0, 4.0)


def test_trust():
    noise = np.random.default_rng(1).normal(0, 0.01, 300)
    steady = list(1 + noise)
    slower = list(1 + noise + np.linspace(0, 0.2, 300))
    cold, hot = Conditions(), Conditions(temperature_c_before=50, temperature_c_after=60)
    fell = Conditions(cpu_mhz_before=2000, cpu_mhz_after=1500)
    assert trust(steady, cold) == trust(steady, hot) == "steady"
    assert trust(slower, cold) == "drift"
    assert trust(slower, hot) == trust(slower, fell) == "throttled"
    assert trust(slower[::-1], hot) == "drift"  # it got faster
    noisy = list(1 + 50 * noise)
    assert trust(noisy, cold) == "steady"  # a change that is less than the noise
    assert trust([1.0, 2.0], cold) == "steady"


LAYERS = [("conv", "Conv", 30.0), ("relu", "Relu", 18.5)]


def profile_of(layers: list[tuple[str, str, float]]) -> dict[str, Any]:
    events = [
        {"cat": "Node", "name": f"{n}_kernel_time", "dur": ms * 1e3, "args": {"op_name": op}}
        for n, op, ms in layers
    ]
    text = json.dumps([*events, {"cat": "Session", "name": "model_run", "dur": 1, "args": {}}])
    return {"format": "onnxruntime", "text": text, "info": None, "wall_ms": 52.0, "cpu_ms": 26.0}


def test_the_rest_is_what_the_layers_do_not_tell():
    m = measured(raw(layers=profile_of(LAYERS)))
    assert [(layer.name, layer.operator) for layer in m.layers] == [x[:2] for x in LAYERS]
    assert m.rest_ms == pytest.approx(m.p50_ms - 48.5)
    assert m.rest.startswith("4.0% of the median is outside the layers")
    assert m.profiled_p50_ms == 52
    assert "a run took 52.000 ms while profiling" in m.rest and "busy" not in m.rest
    busy = measured(raw("cpu", layers=profile_of([("conv", "Conv", 20.0)])))
    assert "26.000 ms while profiling; the host was busy" in busy.rest
    copies = measured(raw(layers=profile_of(LAYERS), compute_ms=[c - 0.5 for c in range(1, 101)],
                          wall_ms=[float(c) for c in range(1, 101)]))  # fmt: skip
    assert "copies to and from the GPU take 0.500 ms" in copies.rest
    over = measured(raw(layers=profile_of([("conv", "Conv", 60.0)])))
    assert over.rest_ms == pytest.approx(over.p50_ms - 60)
    assert "more than the median: profiling costs time" in over.rest
    assert (measured(raw()).layers, measured(raw()).rest_ms) == ((), None)


def test_what_is_not_measure_pys_is_refused(tmp_path: Path):
    path = tmp_path / "measurement.json"
    path.write_text(json.dumps(raw()))
    assert RawMeasurement.read(path).files[0].sha256 == "abc"
    for text, said in (
        ("{", "Invalid JSON"),
        (json.dumps(raw() | {"format": 2}), "format"),
        (json.dumps(raw(wall_ms=[])), "wall_ms"),
        (json.dumps(raw() | {"files": []}), "files"),
    ):
        path.write_text(text)
        with pytest.raises(StateError, match=rf"is not what measure.py writes: .*{said}"):
            RawMeasurement.read(path)


def test_the_host_and_the_date_are_named(monkeypatch):
    kind = f"({host_instruction_set()})"
    assert host_name().endswith(kind)
    for said, name in (
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\n", f"AMD EPYC 25-17 {kind}"),
        (
            "Model\t\t: Raspberry Pi 5 Model B\n",
            f"{platform.processor() or platform.machine()} {kind}",
        ),
    ):
        monkeypatch.setattr("edgekd.latency.measuring.Path.read_text", lambda _, said=said: said)
        assert host_name() == name
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", today())
    assert abs((date.fromisoformat(today()) - date.today()).days) <= 1
