"""How fast this host runs at the moment: a small network, timed in turns with what is measured.

Others on the same machine take caches, memory bandwidth and half of a core: for seconds or minutes
everything takes a tenth longer. A network that runs in turns with another takes as much longer, so
that their ratio holds where neither's own time does.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from pydantic import RootModel, ValidationError

from edgekd.errors import StateError
from edgekd.files import write_atomically
from edgekd.latency.profiles import own_folder
from edgekd.target import Target

FILE = "reference.onnx"
SIDE = 96
# blocks of a pointwise, a depthwise and a pointwise convolution: channels in and out, stride
BLOCKS = ((32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
RUNTIMES = ("onnxruntime", "openvino")  # that read it


def has_pace(target: Target, threads: int) -> bool:
    """Whether the reference tells of it: one thread, and all of a run on the CPU, by CPU time."""
    on_cpu = target.device == "CPU" and not target.providers
    return target.runtime in RUNTIMES and on_cpu and threads == 1


def slower_than_quiet(reference_ms: float, runtime: str, host: str) -> float:
    """How many times as long the reference takes now as when this host was quietest.

    What is quietest is kept in `$EDGEKD_HOME/pace.json`, from measurement to measurement.

    Args:
        reference_ms: what it took now, see `quiet` in measure.py.
        runtime: with its version.

    Raises:
        StateError: that file is not what this wrote.
    """
    known, key = _kept(), f"{runtime} on {host}"
    least = min(reference_ms, known.get(key, reference_ms))
    if known.get(key) != least:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known | {key: least}, indent=1) + "\n")
    return reference_ms / least


def quietest(runtime: str, host: str) -> float | None:
    """What the reference took when this host was quietest, with any version of the runtime.

    None where it was never measured there.
    """
    took = [
        ms for key, ms in _kept().items()
        if key.startswith(f"{runtime} ") and key.endswith(f" on {host}")
    ]  # fmt: skip
    return min(took, default=None)


def _file() -> Path:
    return own_folder() / "pace.json"


def _kept() -> dict[str, float]:
    path = _file()
    try:
        return _Known.model_validate_json(path.read_bytes()).root if path.is_file() else {}
    except ValidationError:
        raise StateError(f"{path} does not hold what networks took; remove it") from None


class _Known(RootModel[dict[str, float]]):
    """runtime and host -> ms."""


def write_reference(path: Path) -> None:
    """The reference network, the same bytes everywhere: a small CNN of 2 ms or so on a desktop."""
    draw = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, values: NDArray[np.float64]) -> str:
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(x: str, cin: int, cout: int, k: int, stride: int = 1, *, groups: int = 1) -> str:
        index = len(nodes)
        shape = (cout, cin // groups, k, k)
        kaiming = draw.standard_normal(shape) * (2 * cout / np.prod(shape)) ** 0.5
        weight, bias = constant(f"w{index}", kaiming), constant(f"b{index}", np.zeros(cout))
        nodes.append(helper.make_node(
            "Conv", [x, weight, bias], [f"conv{index}"], kernel_shape=[k, k], strides=[stride] * 2,
            pads=[k // 2] * 4, group=groups,
        ))  # fmt: skip
        return f"conv{index}"

    def unary(op: str, *inputs: str, name: str = "") -> str:
        name = name or f"{op.lower()}{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name]))
        return name

    x = unary("Relu", conv("input", 3, 32, 3, 2))
    for cin, cout, stride in BLOCKS:
        wide = 3 * cin
        y = unary("Relu", conv(x, cin, wide, 1))
        y = unary("Relu", conv(y, wide, wide, 3, stride, groups=wide))
        y = conv(y, wide, cout, 1)
        x = unary("Add", x, y) if cin == cout else y
    x = unary("Relu", conv(x, cout, cout, 3))
    unary("GlobalAveragePool", x, name="output")
    ends = {"input": [1, 3, SIDE, SIDE], "output": [1, cout, 1, 1]}
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in ends.items()
    )
    graph = helper.make_graph(nodes, "reference", [given], [made], weights)
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
