"""A slice of the zoo, and that a fault is one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import zoo

zoo.SIZES = (96, *zoo.SIZES)  # a fifth of the work

SLICE = (
    ("torchvision", "squeezenet1_1", "host-onnxruntime"),
    ("torchvision", "resnet18", "host-onnxruntime"),
    ("torchvision", "mobilenet_v3_small", "jetson-orin-nano"),
    ("torchvision", "shufflenet_v2_x0_5", "jetson-orin-nano"),
    ("timm", "mobilevit_xxs", "jetson-orin-nano"),
    ("timm", "mnasnet_small", "host-onnxruntime"),
)
pytestmark = pytest.mark.timeout(900)  # half a minute each on an idle machine


@pytest.fixture(scope="module", params=SLICE, ids="-".join)
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    library, name, scheme = request.param
    found = {"scheme": scheme, "params": zoo.parameters(library, name)}
    zoo.one(library, name, scheme, found)
    return found


def test_a_network_of_the_zoo_passes(record: dict[str, Any]):
    assert record["stage"] == "done"
    assert zoo.faults(record) == []
    assert record["intended"] > 10
    whole = record["parity"]["local"]["as_a_whole"]
    assert (whole is None) == (record["scheme"] == "jetson-orin-nano")
    assert whole is None or whole["exact"] == 1.0
    assert record["float64_mean_steps"] < 1e-9


def test_faults_are_found(record: dict[str, Any]):
    worse = copy.deepcopy(record)
    worse["parity"]["integer_share"] = 0.9
    worse["parity"]["local"]["as_written"] |= {"exact": 0.99, "first": "relu"}
    worse["float64_mean_steps"] = float("nan")
    assert len(zoo.faults(worse)) == 3
    del worse["float64_mean_steps"]  # as kept before it was computed
    assert len(zoo.faults(worse | {"plain_mean_steps": 0.6})) == 3
    assert zoo.faults(record | {"error": "TargetError: no"}) == ["done: TargetError: no"]
