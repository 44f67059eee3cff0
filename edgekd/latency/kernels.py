"""Kernels as the latency model sees them: what kind, how large, fused with what."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
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

    @property
    def steps(self) -> float:
        """What a kernel does one by one, beside its arithmetic.

        Of a convolution the taps that it may gather into rows, of pooling its taps; of a product
        with a number for each channel its rows, where the channels come last.
        """
        if self.op in CONVOLUTIONS:
            return self.cin * self.height * self.width * self.kernel**2 * (self.kernel > 1)
        if "Pool" in self.op and not self.op.startswith("Global"):
            # OpenVINO does not tell the window; it is 3 × 3 nearly always
            return self.writes * (self.kernel**2 if self.kernel > 1 else 9)
        if not self.macs and self.writes < self.reads < 2 * self.writes:
            return self.writes / (self.reads - self.writes)
        return 0.0

    @property
    def inside(self) -> float:
        """The share of a convolution's taps that lie in the map, if its edges are padded alike."""
        if self.op not in CONVOLUTIONS or self.kernel == 1:
            return 1.0
        height, width = (_inside(n, self.kernel, self.stride) for n in (self.height, self.width))
        return height * width

    @property
    def padding(self) -> float:
        """How many channels are computed for each that is wanted: vectors hold 16, of one group.

        In a blocked layout those of the input too, but for the image's. Gathered ones that are
        alone come in 8s, and what fills none singly.
        """
        if self.gathered and 1 < self.groups == self.cin:
            return 1 + SINGLY * (self.cin % 8) / self.cin
        grouped = 1 < self.groups < self.cin and self.op in CONVOLUTIONS
        padded = _padded(self.cout // self.groups if grouped else self.cout)
        if self.op == "Conv.nchwc" and self.groups == 1 and self.cin > IMAGE:
            padded *= _padded(self.cin)
        return padded

    @property
    def gathered(self) -> bool:
        """Whether a convolution in integers gathers its taps into rows before it multiplies.

        The direct kernels of ONNX Runtime on x86 take channels in 16s where each is alone, else
        in 4s, and at least 16 that come out (`mlas/lib/convsym.cpp`).
        """
        if self.op != "QLinearConv":
            return False
        if self.groups > 1:
            return self.groups < self.cin or self.cin % 16 > 0
        return self.cout < 16 or self.cin % 4 > 0 or self.cout % 4 > 0

    @property
    def activated(self) -> tuple[int, int]:
        """Elements that pass a fused activation: one with an exponential, one of products only."""
        if self.op == "Subgraph":  # an attention: its softmax
            return self.groups * self.height * self.cout, 0
        fused = set(self.fused.split("+"))
        return self.writes * bool(fused & EXPONENTIAL), self.writes * bool(fused & HARD)


def _padded(channels: int) -> float:
    return -(-channels // 16) * 16 / channels


@cache
def _inside(side: int, kernel: int, stride: int) -> float:
    """Along one axis of `side` pixels that are computed; patches, of an even side, have no pad."""
    pad, size = kernel // 2 * (kernel % 2), side * stride
    firsts = [i * stride - pad for i in range(side)]
    taps = sum(min(first + kernel, size) - max(first, 0) for first in firsts)
    return taps / (side * kernel)


SINGLY = 11.0  # what a channel takes alone more than in a vector, in channels of a vector
IMAGE = 4  # channels of an image at most
EXPONENTIAL, HARD = {"exp", "sigmoid", "tanh"}, {"hardswish", "hardsigmoid", "clip"}
CONVOLUTIONS = {"Conv", "Conv.nchwc", "FusedConv", "QLinearConv", "Convolution", "ConvTranspose"}
MATRIX = CONVOLUTIONS | {
    "Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "FullyConnected", "QLinearMatMul",
    "Subgraph",
}  # fmt: skip
# OpenVINO's that do no work, or that on a handful of numbers
FREE = {"Const", "Input", "Output", "Reshape", "ShapeOf", "Broadcast", "Range", "Gather"}
SLOW_NAMES = re.compile("silu|gelu|sigmoid|swish|tanh|mish")
HARD_NAMES = re.compile("hardswish|hardsigmoid")
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
    # an image turns pixel by pixel, whichever layout it comes from
    if op in ("Reorder", "Transpose") and len(shape) == 4:
        op += ".image" * (sum(side <= IMAGE for side in shape[1:]) == 1)
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
EXP = "Eltwise.exp"  # a GELU, a SiLU, ...
VECTOR = 64  # bytes


def moves_elements(before: Dims, after: Dims, size: int) -> bool:
    """Whether a transposition moves elements of `size` bytes one by one.

    It moves the last axis, or rows shorter than a vector, or it shuffles channels; it is ten times
    slower than one that moves whole rows.
    """
    n, *rest = before
    moved = before[-1] != after[-1] or len(before) == 3 or before[-1] * size < VECTOR
    if len(before) == 4:
        return moved or after in ((n, *rest[1:], rest[0]), (n, rest[2], *rest[:2]))
    return moved or (len(before) == 5 and after == (n, rest[1], rest[0], *rest[2:]))


def of_openvino(node: RuntimeNode) -> Kernel:
    """The kernel that this node is."""
    op = node.operator
    out = node.outputs[0]
    channels, height, width = by_place(out)
    names = node.attributes.get("originalLayersNames", "").lower()
    if op == "Subgraph" and "softmax" not in names:  # a chain of operators; else an attention
        op = "Eltwise"
    slow = SLOW_NAMES.search(HARD_NAMES.sub("", names))
    act = "exp" if slow else "hardswish" if "hardswish" in names else ""
    if op == "Convolution":
        weight = node.inputs[1]
        groups = weight[0] if len(weight) == 5 else 1
        cin = weight[-3] * groups
        stride = max(1, round(node.inputs[0][2] / out[2])) if len(out) == 4 else 1
        adds = len([i for i in node.inputs[2:] if i == out]) > 0
        reads = math.prod(node.inputs[0]) + adds * math.prod(out)
        fused = "+".join(filter(None, ["add" * adds, act]))
        return Kernel(op, cin, channels, weight[-1], stride, groups, height, width, fused, reads,
                      math.prod(out))  # fmt: skip
    size = 1 if node.types[0] in ("u8", "i8") else 4
    if op == "Transpose" and moves_elements(node.inputs[0], out, size):
        op = TURN
    if op == "Eltwise" and slow:
        op = EXP
    elif op == "Eltwise" and node.inputs[-1] == (*out[:-1], 1) != out and math.prod(out[:-1]) > 1:
        op = "Eltwise.rows"
    reads = sum(math.prod(i) for i in node.inputs if len(i) > 1)
    writes = sum(map(math.prod, node.outputs))
    if op == "FullyConnected":
        return Kernel(op, node.inputs[0][-1], out[-1], height=math.prod(out[:-1]), fused=act,
                      reads=math.prod(node.inputs[0]), writes=writes)  # fmt: skip
    if op == "Subgraph":
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
