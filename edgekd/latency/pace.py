"""How fast this host runs at the moment: a small network, timed in turns with what is measured.

Others on the same machine take caches, memory bandwidth and half of a core: for seconds or minutes
everything takes a tenth longer. A network that runs in turns with another takes as much longer, so
that their ratio holds where neither's own time does. If it is alike: what others take of the last
cache reaches weights that only that one keeps, and neither smaller ones nor those it cannot keep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from pydantic import RootModel, ValidationError

from edgekd.errors import StateError
from edgekd.files import write_atomically
from edgekd.latency.profiles import own_folder
from edgekd.target import Target


class Reference(NamedTuple):
    """A small CNN of 2 to 5 ms on a desktop.

    Attributes:
        side: of its images.
        blocks: channels in and out, and stride, of each block of a pointwise, a depthwise and a
            pointwise convolution.
    """

    file: str
    side: int
    blocks: tuple[tuple[int, int, int], ...]


NEAR = Reference(
    "reference.onnx", 96, ((32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
)
# of 12 MB of weights
FAR = Reference(
    "far_reference.onnx", 56,
    ((32, 160, 2), *[(160, 160, 1)] * 3, (160, 320, 2), *[(320, 320, 1)] * 2),
)  # fmt: skip
IN_LAST_CACHE = (2e6, 32e6)  # bytes of a file whose weights only a last cache keeps
RUNTIMES = ("onnxruntime", "openvino")  # that read it


def has_pace(target: Target, threads: int) -> bool:
    """Whether the reference tells of it: one thread, and all of a run on the CPU, by CPU time."""
    on_cpu = target.device == "CPU" and not target.providers
    return target.runtime in RUNTIMES and on_cpu and threads == 1


def reference_for(sizes: Sequence[int]) -> Reference:
    """That for files of so many bytes, which are timed in turns: one for all of a comparison."""
    low, high = IN_LAST_CACHE
    return FAR if any(low <= size <= high for size in sizes) else NEAR


def least_ever(reference_ms: float, runtime: str, host: str, reference: Reference) -> float:
    """What the reference took when this host was quietest, now or before, in ms.

    It is kept in `$EDGEKD_HOME/pace.json`, from measurement to measurement.

    Args:
        reference_ms: what it took now, see `quiet` in measure.py.
        runtime: with its version.

    Raises:
        StateError: that file is not what this wrote.
    """
    known, key = _kept(), f"{runtime}{_on(host, reference)}"
    least = min(reference_ms, known.get(key, reference_ms))
    if known.get(key) != least:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known | {key: least}, indent=1) + "\n")
    return least


def quietest(runtime: str, host: str, reference: Reference) -> float | None:
    """What the reference took when this host was quietest, with any version of the runtime.

    None where it was never measured there.
    """
    took = [
        ms for key, ms in _kept().items()
        if key.startswith(f"{runtime} ") and key.endswith(_on(host, reference))
    ]  # fmt: skip
    return min(took, default=None)


def _on(host: str, reference: Reference) -> str:
    return f" on {host}{' (far)' if reference is FAR else ''}"


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


def write_reference(path: Path, reference: Reference = NEAR) -> None:
    """The reference network, the same bytes everywhere."""
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
    for cin, cout, stride in reference.blocks:
        wide = 3 * cin
        y = unary("Relu", conv(x, cin, wide, 1))
        y = unary("Relu", conv(y, wide, wide, 3, stride, groups=wide))
        y = conv(y, wide, cout, 1)
        x = unary("Add", x, y) if cin == cout else y
    x = unary("Relu", conv(x, cout, cout, 3))
    unary("GlobalAveragePool", x, name="output")
    ends = {"input": [1, 3, reference.side, reference.side], "output": [1, cout, 1, 1]}
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in ends.items()
    )
    graph = helper.make_graph(nodes, "reference", [given], [made], weights)
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
