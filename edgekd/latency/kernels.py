"""Kernels as the latency model sees them: what kind, how large, fused with what."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from edgekd.latency.runtime_graph import Dims, RuntimeNode


class Kernel(NamedTuple):
    """One kernel, batch 1. Layouts do not show: channels are channels wherever they stand.

    Attributes:
        op: the runtime's name of it ("QLinearConv"); "Conv.nchwc" in a blocked layout.
        cin, cout: channels; of a matrix product the length of its sums and of its rows.
        kernel, stride, groups: of a convolution or pooling; of a product, `groups` is its batch.
        height, width: of the output; of a product, `height` counts its rows.
        fused: what it takes along, in order: "relu", "add", ...
        reads, writes: elements of activations.
    """

    op: str
    cin: int = 1
    cout: int = 1
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    height: int = 1
    width: int = 1
    fused: str = ""
    reads: int = 0
    writes: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a matrix operator; 0 of others."""
        if self.op not in MATRIX:
            return 0
        each = self.cin // self.groups if self.op in CONVOLUTIONS else self.cin * self.groups
        return self.cout * self.height * self.width * each * self.kernel**2

    @property
    def weights(self) -> int:
        """Elements of the weight of a matrix operator."""
        if self.op not in MATRIX or self.op.endswith("MatMul") or self.op == "Subgraph":
            return 0
        return self.cin * self.cout * self.kernel**2 // self.groups


CONVOLUTIONS = {"Conv", "Conv.nchwc", "FusedConv", "QLinearConv", "Convolution", "ConvTranspose"}
MATRIX = CONVOLUTIONS | {
    "Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "FullyConnected", "QLinearMatMul",
    "Subgraph",
}  # fmt: skip
# OpenVINO's that do no work, or that on a handful of numbers
FREE = {"Const", "Input", "Output", "Reshape", "ShapeOf", "Broadcast", "Range", "Gather"}
SLOW_NAMES = re.compile("silu|gelu|sigmoid|swish|tanh|mish", re.IGNORECASE)
SHORT = {"com.microsoft.nchwc": ".nchwc", "com.microsoft": "", "": ""}


def by_place(shape: Dims, channels_last: bool = False) -> tuple[int, int, int]:
    """(channels, height, width) of a map, of tokens (1, T, C), of a vector or of heads."""
    if len(shape) == 4:
        _, a, b, c = shape
        return (c, a, b) if channels_last else (a, b, c)
    if len(shape) == 3:
        return shape[2], shape[1], 1
    if len(shape) == 2:
        return shape[1], shape[0], 1
    return (shape[-1] if shape else 1), math.prod(shape[:-1]), 1


# kernels whose time depends on where the elements are
PLACED = MATRIX | {
    "MaxPool", "MaxPool.nchwc", "NhwcMaxPool", "AveragePool", "AveragePool.nchwc", "Pooling",
    "QLinearAveragePool", "LayerNormalization", "SkipLayerNormalization", "Softmax", "SoftMax",
}  # fmt: skip


def of_tensor(op: str, shape: Dims, reads: int, writes: int) -> Kernel:
    """A kernel without a window, that gives a tensor of `shape`; of most only the size counts."""
    channels, height, width = by_place(shape) if op in PLACED else (1, math.prod(shape), 1)
    if op.endswith(("LayerNormalization", "oftmax", "oftMax")):  # rows of the last axis
        channels, height, width = shape[-1], math.prod(shape[:-1]), 1
    return Kernel(op, channels, channels, 1, 1, 1, height, width, "", reads, writes)


def of_onnxruntime(node: RuntimeNode) -> Kernel:
    """The kernel that this node is."""
    domain, _, kind = node.operator.rpartition(":")
    op = kind + SHORT.get(domain, "")
    a = node.attributes
    inputs = node.inputs
    constants = [tuple(c) for c in a["constants"]]
    out = node.outputs[0]
    last = kind == "NhwcMaxPool" or (bool(a.get("channels_last")) and kind != "ReorderInput")
    channels, height, width = by_place(out, last)
    reads = sum(math.prod(i) for i in inputs if len(i) > 1 and i not in constants)
    writes = sum(map(math.prod, node.outputs))
    activation = str(a.get("activation", "")).lower()
    if op in CONVOLUTIONS:
        weight = next(c for c in constants if len(c) == 4)
        # the map and its weight, and what is added
        adds = op == "Conv.nchwc" and len([i for i in inputs if len(i) == 4]) > 2
        groups = int(a.get("group", 1))
        return Kernel(
            op, weight[1] * groups, channels, weight[2], a.get("strides", [1])[0], groups, height,
            width, "+".join(["add"] * adds + ([activation] if activation else [])), reads, writes,
        )  # fmt: skip
    if op in ("Gemm", "FusedGemm", "QGemm"):
        return Kernel(op, inputs[0][-1], out[-1], height=out[0], fused=activation, reads=reads,
                      writes=writes)  # fmt: skip
    if op.endswith("MatMul"):
        return Kernel(op, inputs[0][-1], out[-1], groups=math.prod(out[:-2]), height=out[-2],
                      reads=reads, writes=writes)  # fmt: skip
    if "kernel_shape" in a:
        return Kernel(op, channels, channels, a["kernel_shape"][0], a["strides"][0], 1, height,
                      width, "", reads, writes)  # fmt: skip
    return of_tensor(op, inputs[0] if kind == "Split" else out, reads, writes)


TURN = "Transpose.map"


def moves_channels(before: Dims, after: Dims) -> bool:
    """Whether a transposition takes a map's channels to its end or back, or shuffles them.

    It reads or writes far apart, and is ten times slower than one that moves whole rows.
    """
    if len(before) == 5:
        return after == (before[0], before[2], before[1], *before[3:])
    n, *rest = before
    return len(rest) == 3 and after in ((n, *rest[1:], rest[0]), (n, rest[2], *rest[:2]))


def of_openvino(node: RuntimeNode) -> Kernel:
    """The kernel that this node is."""
    op = node.operator
    out = node.outputs[0]
    channels, height, width = by_place(out)
    slow = SLOW_NAMES.search(node.attributes.get("originalLayersNames", "").replace("hard", ""))
    exp = "exp" if slow else ""
    if op == "Convolution":
        weight = node.inputs[1]
        groups = weight[0] if len(weight) == 5 else 1
        cin = weight[-3] * groups
        stride = max(1, round(node.inputs[0][2] / out[2])) if len(out) == 4 else 1
        adds = len([i for i in node.inputs[2:] if i == out]) > 0
        reads = math.prod(node.inputs[0]) + adds * math.prod(out)
        fused = "+".join(filter(None, ["add" * adds, exp]))
        return Kernel(op, cin, channels, weight[-1], stride, groups, height, width, fused, reads,
                      math.prod(out))  # fmt: skip
    if op == "Transpose" and moves_channels(node.inputs[0], out):
        op = TURN
    if op == "Eltwise" and node.inputs[-1] == (*out[:-1], 1) != out and math.prod(out[:-1]) > 1:
        op = "Eltwise.rows"
    reads = sum(math.prod(i) for i in node.inputs if len(i) > 1)
    writes = sum(map(math.prod, node.outputs))
    if op == "FullyConnected":
        return Kernel(op, node.inputs[0][-1], out[-1], height=math.prod(out[:-1]), fused=exp,
                      reads=math.prod(node.inputs[0]), writes=writes)  # fmt: skip
    if op == "Subgraph" and len(node.inputs) == 3:  # attention
        _, heads, rows, depth = node.inputs[0]
        return Kernel(op, 2 * depth, node.inputs[1][2], groups=heads, height=rows, reads=reads,
                      writes=writes)  # fmt: skip
    if op == "MatMul":
        return Kernel(op, node.inputs[0][-1], out[-1], groups=math.prod(out[:-2]), height=out[-2],
                      reads=reads, writes=writes)  # fmt: skip
    return of_tensor(op, node.inputs[0] if op == "Split" else out, reads, writes)


def timed_kernels(runtime: str, nodes: Sequence[RuntimeNode]) -> list[tuple[Kernel, float]]:
    """The kernels of a runtime's graph with the ms of each, without what does no work."""
    if runtime == "onnxruntime":
        return [(of_onnxruntime(node), node.p50_ms) for node in nodes]
    return [(of_openvino(node), node.p50_ms) for node in nodes if works(node)]


def works(node: RuntimeNode) -> bool:
    """Whether an OpenVINO node computes more than shapes."""
    return node.operator not in FREE and len(node.outputs[0]) > 1
