"""Memory: in a process of its own, so that order and company do not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.latency.memory import memory_of


def product(path: Path, mib: int) -> Path:
    """A product by a matrix of `mib` MiB."""
    rows = mib * 2**20 // 4 // 1024
    weight = numpy_helper.from_array(np.ones((rows, 1024), np.float32), "w")
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1024]),
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight]
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_each_artifact_is_measured_by_itself(tmp_path: Path):
    small, large = product(tmp_path / "small.onnx", 1), product(tmp_path / "large.onnx", 64)
    found = memory_of("onnxruntime", [large, small, large], threads=1)
    if found[0][0] is None:
        pytest.skip("this system does not tell memory")
    held = [pair[0] or 0.0 for pair in found]
    assert held[0] >= 60  # the weights at least
    assert held[1] < held[0] / 2  # though what the large one had is free
    assert held[2] == pytest.approx(held[0], rel=0.1)
    assert all(peak is not None and peak >= h for h, (_, peak) in zip(held, found, strict=True))


def test_what_cannot_be_loaded_has_none(tmp_path: Path):
    broken = tmp_path / "broken.onnx"
    broken.write_text("no model")
    good = product(tmp_path / "good.onnx", 1)
    first, second = memory_of("onnxruntime", [broken, good], threads=1)
    assert first == (None, None)
    assert second[0] is None or second[0] >= 0  # the others are measured all the same
    assert memory_of("onnxruntime", [], threads=1) == []
