"""Which kernels a runtime makes of a traced module: its fusions and layouts, as rules.

Found by reading the graphs that the runtimes execute (ONNX Runtime 1.32 and OpenVINO 2026.4 on
x86 with AVX-512), and checked against them by tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgekd.latency.kernels import Kernel, by_place
from edgekd.latency.tracing import Dims, Op
from edgekd.target import QuantScheme

BLOCK = 16  # channels side by side in ONNX Runtime's NCHWc layout with AVX-512
ALIGNED = 4
FUSED_INTO_CONV = {"relu", "clip", "sigmoid", "tanh", "leakyrelu", "hardsigmoid"}
FUSED_BLOCKED = FUSED_INTO_CONV | {"hardswish"}
# elementwise operators that ONNX Runtime runs on blocked maps as they are
BLOCKED_UNARY = {"relu", "sigmoid", "tanh", "quickgelu"}
NAMES = {
    "relu": "relu", "clamp": "clip", "hardswish": "hardswish", "hardsigmoid": "hardsigmoid",
    "sigmoid": "sigmoid", "silu": "quickgelu", "gelu": "gelu", "tanh": "tanh",
    "leaky_relu": "leakyrelu", "elu": "elu", "mish": "mish",
}  # fmt: skip
ONNX = {
    "relu": "Relu", "clip": "Clip", "sigmoid": "Sigmoid", "tanh": "Tanh", "quickgelu": "QuickGelu",
    "gelu": "Gelu", "leakyrelu": "LeakyRelu", "hardsigmoid": "HardSigmoid", "elu": "Elu",
    "mish": "Mish",
}  # fmt: skip


def activation(op: Op) -> str:
    """What kind of activation this is; empty if none."""
    return NAMES.get(op.kind, "")


def is_spatial_mean(op: Op) -> bool:
    """A mean over height and width."""
    return op.kind == "mean" and len(op.inputs[0].shape) == 4 and sorted(op.options["axes"]) == [2, 3]


def elementwise(name: str, shape: Dims, reads: int, writes: int | None = None) -> Kernel:
    """A kernel that touches each element once."""
    channels, height, width = by_place(shape)
    return Kernel(name, channels, channels, 1, 1, 1, height, width, "", reads,
                  math.prod(shape) if writes is None else writes)  # fmt: skip


def plain_kernel(op: Op, names: dict[str, str]) -> list[Kernel]:
    """Of an operator that fuses with nothing, in the names of a runtime."""
    reads = sum(i.size for i in op.inputs if i.kind != "constant" and len(i.shape) > 1)
    if op.kind == "linear":
        kind = names["linear"]
        return [Kernel(kind, op.weight[1] if op.weight else op.inputs[0].shape[-1], op.shape[-1],
                       height=math.prod(op.shape[:-1]), reads=reads, writes=op.size)]  # fmt: skip
    if op.kind in ("bmm", "matmul"):
        return [Kernel(names["matmul"], op.inputs[0].shape[-1], op.shape[-1],
                       groups=math.prod(op.shape[:-2]), height=op.shape[-2], reads=reads,
                       writes=op.size)]  # fmt: skip
    if op.kind in ("max_pool2d", "avg_pool2d"):
        channels, height, width = by_place(op.shape)
        return [Kernel(names[op.kind], channels, channels, op.options["kernel"][0],
                       op.options["stride"][0], 1, height, width, "", reads, op.size)]  # fmt: skip
    name = names.get(op.kind, op.kind)
    if not name:
        return []
    return [elementwise(name, op.shape, reads, op.size)]


def convolution(op: Op, name: str, cin: int, cout: int, fused: str, adds: bool) -> Kernel:
    """The kernel of a convolution, of these channels."""
    k, groups = op.weight[2], op.options["groups"]
    if groups > 1 and op.weight[1] == 1:
        groups = cout
    height, width = op.shape[2:]
    reads = cin * math.prod(op.inputs[0].shape[2:]) + adds * cout * height * width
    return Kernel(name, cin, cout, k, op.options["stride"][0], groups, height, width,
                  "+".join(["add"] * adds + ([fused] if fused else [])), reads,
                  cout * height * width)  # fmt: skip


def up(channels: int) -> int:
    """Rounded up to whole blocks."""
    return -(-channels // BLOCK) * BLOCK


ORT = {
    "linear": "Gemm", "matmul": "MatMul", "max_pool2d": "MaxPool", "avg_pool2d": "AveragePool",
    "add": "Add", "mul": "Mul", "sub": "Sub", "div": "Div", "softmax": "Softmax",
    "layer_norm": "LayerNormalization", "view": "Reshape", "transpose": "Transpose",
    "permute": "Transpose", "cat": "Concat", "split": "Split", "unbind": "Split", "part": "",
    "select": "Gather", "slice": "Slice", "mean": "ReduceMean", "unsqueeze": "Unsqueeze",
    "squeeze": "Squeeze", "batch_norm": "BatchNormalization", "input": "", "output": "",
    "constant": "",
}  # fmt: skip


class _Blocked:
    """ONNX Runtime's blocked layout: which values have it, and the reorders between."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.blocked: dict[int, int] = {}  # value -> its channels, padded
        self.reordered: dict[int, int] = {}  # those whose blocks are a copy
        self.plain: set[int] = set()
        self.convolutions: dict[int, int] = {}  # value -> place of the kernel that made it

    def need_plain(self, op: Op) -> None:
        """Reorder out of blocks, once."""
        if id(op) in self.blocked and id(op) not in self.plain:
            self.plain.add(id(op))
            padded = self.blocked[id(op)]
            reads = padded * math.prod(op.shape[2:])
            self.kernels.append(elementwise("ReorderOutput.nchwc", op.shape, reads))

    def need_blocked(self, op: Op) -> int:
        """Reorder into blocks, once; channels there."""
        if id(op) in self.blocked:
            return self.blocked[id(op)]
        if id(op) not in self.reordered:
            self.reordered[id(op)] = padded = up(op.shape[1])
            shape = (1, padded, *op.shape[2:])
            self.kernels.append(elementwise("ReorderInput.nchwc", shape, op.size))
        return self.reordered[id(op)]

    def emit(self, kernel: Kernel, op: Op, channels: int | None) -> None:
        """`op` is made by this kernel, in blocks of so many channels."""
        if channels is not None:
            self.blocked[id(op)] = channels
        self.kernels.append(kernel)

    def fuse(self, source: Op, op: Op, what: str) -> bool:
        """Let the convolution that made `source`, read by `op` alone, take `op` along."""
        place = self.convolutions.get(id(source))
        if place is None or len(source.users) > 1:
            return False
        kernel = self.kernels[place]
        taken = kernel.fused.split("+") if kernel.fused else []
        if any(t != "add" for t in taken) or (what == "add" and "add" in taken):
            return False
        more = kernel.cout * kernel.height * kernel.width if what == "add" else 0
        self.kernels[place] = kernel._replace(
            fused="+".join([*taken, what]), reads=kernel.reads + more
        )
        self.convolutions[id(op)] = place
        if id(source) in self.blocked:
            self.blocked[id(op)] = self.blocked[id(source)]
        return True


def onnxruntime_floats(ops: Sequence[Op]) -> list[Kernel]:
    """Of ONNX Runtime's CPU provider in FP32, x86."""
    state = _Blocked()
    for op in ops:
        _RULES.get(op.kind, _any)(op, state)
    return state.kernels


def _any(op: Op, state: _Blocked) -> None:
    for source in op.inputs:
        state.need_plain(source)
    if op.kind == "mean" and is_spatial_mean(op):
        _global_pool(op, state)
        return
    state.kernels += plain_kernel(op, ORT)


def _conv(op: Op, state: _Blocked) -> None:
    cout, per_group = op.weight[:2]
    groups, source = op.options["groups"], op.inputs[0]
    blocked, direct = len(op.weight) == 4 and not op.options["transposed"], False
    if groups > 1 and per_group == 1 and cout == groups:
        blocked &= cout % ALIGNED == 0
    elif groups > 1:
        blocked &= per_group % BLOCK == 0 and (cout // groups) % BLOCK == 0
    else:
        direct = per_group < BLOCK
        blocked &= direct or per_group % ALIGNED == 0
    if not blocked:
        state.need_plain(source)
        state.convolutions[id(op)] = len(state.kernels)
        state.kernels.append(convolution(op, "Conv", source.shape[1], cout, "", False))
        return
    if direct:
        state.need_plain(source)
        cin = source.shape[1]
    else:
        cin = state.need_blocked(source)
    state.convolutions[id(op)] = len(state.kernels)
    state.emit(convolution(op, "Conv.nchwc", cin, up(cout), "", False), op, up(cout))


def _activation(op: Op, state: _Blocked) -> None:
    source, kind = op.inputs[0], activation(op)
    blocked = id(source) in state.blocked
    fusing = FUSED_BLOCKED if blocked else FUSED_INTO_CONV
    if kind in fusing and state.fuse(source, op, kind):
        return
    parts = ["HardSigmoid", "Mul"] if kind == "hardswish" else [ONNX[kind]]
    inside = blocked and kind in BLOCKED_UNARY
    if not inside:
        state.need_plain(source)
    shape = (1, state.blocked[id(source)], *op.shape[2:]) if inside else op.shape
    for index, part in enumerate(parts):
        kernel = elementwise(part, shape, math.prod(shape) * (index + 1))
        state.emit(kernel, op, shape[1] if inside else None)


def _binary(op: Op, state: _Blocked) -> None:
    terms = [i for i in op.inputs if i.kind != "constant"]
    inside = all(id(t) in state.blocked for t in terms)
    if inside and len(terms) == 2 and terms[0].shape == terms[1].shape:
        if op.kind == "add":
            for term in terms:
                if state.fuse(term, op, "add"):
                    return
        channels = state.blocked[id(terms[0])]
        shape = (1, channels, *op.shape[2:])
        state.emit(elementwise(ORT[op.kind], shape, 2 * math.prod(shape)), op, channels)
        return
    _any(op, state)


def _pool(op: Op, state: _Blocked) -> None:
    source = op.inputs[0]
    if op.shape[1] % BLOCK:
        _any(op, state)
        return
    channels = state.need_blocked(source)
    (kernel,) = plain_kernel(op, ORT)
    state.emit(kernel._replace(op=kernel.op + ".nchwc"), op, channels)


def _global_pool(op: Op, state: _Blocked) -> None:
    source = op.inputs[0]
    shape = (1, source.shape[1], 1, 1)
    if source.shape[1] % BLOCK == 0:
        state.need_blocked(source)
        state.kernels.append(elementwise("GlobalAveragePool.nchwc", shape, source.size))
        pooled = op if op.options["keepdim"] else Op("pooled", [], shape)
        state.blocked[id(pooled)] = source.shape[1]
        state.need_plain(pooled) if pooled is not op else None
    else:
        state.need_plain(source)
        state.kernels.append(elementwise("GlobalAveragePool", shape, source.size))
    if not op.options["keepdim"]:
        state.kernels.append(elementwise("Reshape", op.shape, op.size))


def _mean(op: Op, state: _Blocked) -> None:
    if is_spatial_mean(op):
        _global_pool(op, state)
    else:
        _any(op, state)


def _concat(op: Op, state: _Blocked) -> None:
    parts = op.inputs
    if op.options["axis"] == 1 and all(
        id(p) in state.blocked and p.shape[1] % BLOCK == 0 for p in parts
    ):  # fmt: skip
        channels = sum(state.blocked[id(p)] for p in parts)
        (kernel,) = plain_kernel(op, ORT)
        state.emit(kernel, op, channels)
        return
    _any(op, state)


_RULES: dict[str, Callable[[Op, _Blocked], None]] = {
    "convolution": _conv,
    "add": _binary, "mul": _binary, "sub": _binary,
    "max_pool2d": _pool, "avg_pool2d": _pool, "mean": _mean, "cat": _concat,
    **dict.fromkeys(NAMES, _activation),
}  # fmt: skip
