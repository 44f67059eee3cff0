"""The kernels of ONNX Runtime's CPU provider: its fusions and layouts, as rules.

Found by reading the graphs that ONNX Runtime 1.32 executes on x86 with AVX-512, and checked against
them by tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

from edgekd.latency.exported import (
    CLIPS,
    MOVING,
    NAMES,
    TO_FIRST,
    TO_LAST,
    Placement,
    activation,
    convolution,
    elementwise,
    is_spatial_mean,
    plain_kernel,
    split_silu,
)
from edgekd.latency.kernels import Kernel
from edgekd.latency.tracing import Dims, Op, count_users
from edgekd.target import QuantScheme

BLOCK = 16  # channels side by side in the blocked layout NCHWc, with AVX-512
ALIGNED = 4
FUSED_INTO_CONV = {"relu", "clip", "sigmoid", "tanh", "leakyrelu", "hardsigmoid"}
FUSED_BLOCKED = FUSED_INTO_CONV | {"hardswish"}
# elementwise operators that run on blocked maps as they are
BLOCKED_UNARY = {"relu", "sigmoid", "tanh", "quickgelu", "gelu"}
RESIZING = ("upsample_nearest2d", "upsample_bilinear2d")
ONNX = {
    "relu": "Relu", "clip": "Clip", "sigmoid": "Sigmoid", "tanh": "Tanh", "quickgelu": "QuickGelu",
    "gelu": "Gelu", "leakyrelu": "LeakyRelu", "hardsigmoid": "HardSigmoid", "elu": "Elu",
    "mish": "Mish",
}  # fmt: skip


def up(channels: int) -> int:
    """Rounded up to whole blocks."""
    return -(-channels // BLOCK) * BLOCK


ORT = {
    "linear": "Gemm", "matmul": "MatMul", "scaled": "FusedMatMul",
    "max_pool2d": "MaxPool", "avg_pool2d": "AveragePool",
    "add": "Add", "mul": "Mul", "sub": "Sub", "div": "Div", "softmax": "Softmax",
    "layer_norm": "LayerNormalization", "view": "Reshape", "transpose": "Transpose",
    "permute": "Transpose", "cat": "Concat", "split": "Split", "unbind": "Split", "part": "",
    "select": "Gather", "slice": "Slice", "mean": "ReduceMean", "unsqueeze": "Unsqueeze",
    "squeeze": "Squeeze", "batch_norm": "BatchNormalization", "input": "", "output": "",
    "constant": "", **dict.fromkeys(RESIZING, "Resize"),
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
            op="FusedConv" if kernel.op == "Conv" else kernel.op,
            fused="+".join([*taken, what]), reads=kernel.reads + more,
        )  # fmt: skip
        self.convolutions[id(op)] = place
        if id(source) in self.blocked:
            self.blocked[id(op)] = self.blocked[id(source)]
        return True


def onnxruntime_floats(ops: Sequence[Op], scheme: QuantScheme | None) -> list[Kernel]:
    """Of ONNX Runtime's CPU provider in FP32, x86."""
    state = _Blocked()
    for op in ops:
        _RULES.get(op.kind, _any)(op, state)
    return state.kernels


def _unbind(op: Op, state: _Blocked) -> None:
    state.need_plain(op.inputs[0])
    state.kernels += unbind_kernels(op)


def unbind_kernels(op: Op) -> list[Kernel]:
    """Parts of a permuted tensor: the permutation goes behind the split, part by part.

    Where a part is transposed anyway, the two become one.
    """
    permuted = op.inputs[0]
    before = permuted.inputs[0].shape if permuted.kind == "permute" else permuted.shape
    axis = permuted.options["axes"][op.options["axis"]] if permuted.kind == "permute" else 0
    kernels = [elementwise("Split", before, permuted.size)]
    for part in op.users:
        moved = tuple(1 if i == axis else n for i, n in enumerate(before))
        reader = part.users[0] if len(part.users) == 1 else part
        if permuted.kind == "permute" and reader.kind == "transpose":
            squeezed = moved[:axis] + moved[axis + 1 :]
            kernels += [elementwise("Squeeze", squeezed, part.size),
                        elementwise("Transpose", reader.shape, part.size)]  # fmt: skip
        else:
            if permuted.kind == "permute":
                shape = tuple(moved[a] for a in permuted.options["axes"])
                kernels.append(elementwise("Transpose", shape, part.size))
            kernels.append(elementwise("Squeeze", part.shape, part.size))
    return kernels


def _permute(op: Op, state: _Blocked) -> None:
    source = op.inputs[0]
    axes = op.options["axes"]
    if goes_with_unbind(op):
        state.need_plain(source)
        return
    if axes == (0, 2, 3, 1) and id(source) in state.blocked:
        reads = state.blocked[id(source)] * math.prod(source.shape[2:])
        state.kernels.append(elementwise("ReorderOutput.nchwc", source.shape, reads))
        return
    if axes == (0, 3, 1, 2) and all(
        u.kind == "convolution" and takes_blocks(u) == "reordered" for u in op.users
    ):  # fmt: skip
        return  # the reorder into blocks reads either layout
    _any(op, state)


def _layer_norm(op: Op, state: _Blocked) -> None:
    source = op.inputs[0]
    for term in op.inputs:
        state.need_plain(term)
    if skips(source) and state.kernels and state.kernels[-1].op == "Add":
        state.kernels[-1] = elementwise("SkipLayerNormalization", op.shape, 2 * op.size)
        return
    state.kernels.append(elementwise("LayerNormalization", op.shape, op.size))


def skips(op: Op) -> bool:
    """A sum that only the LayerNorm behind it reads."""
    varying = [i for i in op.inputs if i.kind != "constant"]
    return op.kind == "add" and len(op.users) == 1 and len(varying) == 2


def _any(op: Op, state: _Blocked) -> None:
    for source in op.inputs:
        state.need_plain(source)
    if op.kind == "mean" and is_spatial_mean(op):
        _global_pool(op, state)
        return
    state.kernels += plain_kernel(op, ORT)


def takes_blocks(op: Op) -> Literal["no", "plain", "reordered"]:
    """Whether a convolution runs in blocks, and whether its input must be reordered for it."""
    cout, per_group, *sides = op.weight
    groups = op.options["groups"]
    if len(sides) != 2 or op.options["transposed"]:
        return "no"
    if groups > 1:
        whole = per_group % BLOCK == 0 and (cout // groups) % BLOCK == 0
        depthwise = per_group == 1 and cout == groups and cout % ALIGNED == 0
        return "reordered" if whole or depthwise else "no"
    if per_group < BLOCK:
        return "plain"
    return "no" if per_group % ALIGNED else "reordered"


def _conv(op: Op, state: _Blocked) -> None:
    cout = op.shape[1]
    source, takes = op.inputs[0], takes_blocks(op)
    if takes == "no":
        state.need_plain(source)
        state.convolutions[id(op)] = len(state.kernels)
        state.kernels.append(convolution(op, "Conv", source.shape[1], cout))
        return
    if takes == "plain":
        state.need_plain(source)
        cin = source.shape[1]
    else:
        cin = state.need_blocked(source)
    state.convolutions[id(op)] = len(state.kernels)
    state.emit(convolution(op, "Conv.nchwc", cin, up(cout)), op, up(cout))


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
    if len(op.shape) != 4 or op.shape[1] % BLOCK:
        _any(op, state)
        return
    channels = state.need_blocked(source)
    (kernel,) = plain_kernel(op, ORT)
    state.emit(kernel._replace(op=kernel.op + ".nchwc"), op, channels)


def _resize(op: Op, state: _Blocked) -> None:
    source = op.inputs[0]
    whole = all(a % b == 0 for a, b in zip(op.shape[2:], source.shape[2:], strict=True))
    if id(source) not in state.blocked or not whole:
        _any(op, state)
        return
    channels = state.blocked[id(source)]
    shape = (1, channels, *op.shape[2:])
    reads = channels * math.prod(source.shape[2:])
    state.emit(elementwise("Upsample.nchwc", shape, reads), op, channels)


def _global_pool(op: Op, state: _Blocked) -> None:
    source = op.inputs[0]
    shape = (1, source.shape[1], 1, 1)
    if source.shape[1] % BLOCK == 0 and id(source) in state.blocked:
        state.kernels.append(elementwise("GlobalAveragePool.nchwc", shape, source.size))
        pooled = op if op.options["keepdim"] else Op("pooled", [], shape)
        state.blocked[id(pooled)] = source.shape[1]
        if pooled is not op:
            state.need_plain(pooled)
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


def class_token(op: Op) -> list[Kernel]:
    """A constant as many times as there are images: its shape is worked out in the graph."""
    return [elementwise("Shape", (1,), 0), elementwise("Concat", (len(op.shape),), 0),
            elementwise("Expand", op.shape, op.size)]  # fmt: skip


def _concat(op: Op, state: _Blocked) -> None:
    parts = op.inputs
    for constant in (i for i in parts if i.kind == "constant"):
        state.kernels += class_token(constant)
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
    "add": _binary, "mul": _binary,
    "max_pool2d": _pool, "avg_pool2d": _pool, "mean": _mean, "cat": _concat,
    "unbind": _unbind, "permute": _permute, "transpose": _permute, "layer_norm": _layer_norm,
    "part": lambda op, state: None,
    **dict.fromkeys(RESIZING, _resize),
    **dict.fromkeys(NAMES, _activation),
}  # fmt: skip


# ---- integers ------------------------------------------------------------------------------------

LAST = {"QLinearConv", "NhwcMaxPool", "QLinearGlobalAveragePool", "QLinearAveragePool"}
AGNOSTIC = {
    "QuantizeLinear", "DequantizeLinear", "Add", "Mul", "Sub", "Div", "QLinearAdd",
    "QLinearMul", "QLinearSigmoid", "QLinearConcat", *ONNX.values(), "add", "mul", "sub", "div",
    "cat", "split", "part", *RESIZING,
}  # fmt: skip


class _Quantized:
    """A traced module with ONNX Runtime's integer operators in the place of its own.

    A value exists in float, in integers, or in both: a quantizer serves all that read it, of
    dequantizers each reader has its own.
    """

    def __init__(self, ops: Sequence[Op], scheme: QuantScheme) -> None:
        self.place = Placement(ops, scheme)
        self.nodes: list[Op] = []
        self.floats: dict[int, Op] = {}
        self.integers: dict[int, Op] = {}
        for op in ops:
            self.lower(op)

    def node(self, kind: str, inputs: list[Op], like: Op, shape: Dims | None = None) -> Op:
        shape = like.shape if shape is None else shape
        made = Op(kind, inputs, shape, like.weight, like.options)
        self.nodes.append(made)
        return made

    def integer(self, op: Op) -> Op:
        if id(op) not in self.integers:
            self.integers[id(op)] = self.node("QuantizeLinear", [self.floats[id(op)]], plain(op))
        return self.integers[id(op)]

    def float(self, op: Op) -> Op:
        if op.kind == "constant":
            return op
        if id(op) in self.floats:
            return self.floats[id(op)]
        return self.node("DequantizeLinear", [self.integers[id(op)]], plain(op))

    def lower(self, op: Op) -> None:
        kind = self.place.kind(op)
        moves = op.kind in MOVING and op.inputs and id(op.inputs[0]) not in self.floats
        if op.kind in ("input", "constant"):
            self.floats[id(op)] = self.node(op.kind, [], op)
        elif kind == "pass" or (moves and op.kind != "max_pool2d"):
            self.integers[id(op)] = self.move(op, self.integer(op.inputs[0]))
        elif kind is not None:
            self.compute(op, kind)
        elif activation(op) in CLIPS and self.place.gives_integers(op):
            self.integers[id(op)] = self.integers[id(op.inputs[0])]
        else:
            self.floating(op)

    def move(self, op: Op, source: Op) -> Op:
        if op.kind == "max_pool2d":
            return self.node("NhwcMaxPool", [source], op)
        if op.options.get("twice") and any(u.kind == "linear" for u in op.users):
            source = self.node("view", [source], op)
        return self.node(op.kind, [source], op)

    def compute(self, op: Op, kind: str) -> None:
        names = {"conv": "QLinearConv", "linear": "QGemm", "add": "QLinearAdd", "mul": "QLinearMul",
                 "sigmoid": "QLinearSigmoid", "concat": "QLinearConcat",
                 "pool": "QLinearAveragePool"}  # fmt: skip
        if kind == "concat":
            for constant in (i for i in op.inputs if i.kind == "constant"):
                self.floats[id(constant)] = self.node("class_token", [], constant)
        inputs = [self.integer(i) for i in op.inputs]
        if is_spatial_mean(op):
            shape = (1, op.inputs[0].shape[1], 1, 1)
            made = self.node("QLinearGlobalAveragePool", inputs, op, shape)
            if not op.options["keepdim"]:
                made = self.node("view", [made], plain(op))
        else:
            made = self.node(names[kind], inputs, op)
        integer = self.place.gives_integers(op) or self.place.absorbed(op)
        (self.integers if integer else self.floats)[id(op)] = made

    def floating(self, op: Op) -> None:
        sources = op.inputs
        kind = activation(op)
        if kind == "quickgelu" and id(sources[0]) not in self.floats:
            first, second = self.float(sources[0]), self.float(sources[0])
            made = self.node("Mul", [second, self.node("Sigmoid", [first], op)], op)
        elif kind == "hardswish":
            x = self.float(sources[0])
            made = self.node("Mul", [x, self.node("HardSigmoid", [x], op)], op)
        elif kind in CLIPS and all(map(self.place.kind, op.users)):
            made = self.float(sources[0])  # the quantizer behind it clips
        elif kind:
            made = self.node(ONNX[kind], [self.float(sources[0])], op)
        elif is_spatial_mean(op):
            shape = (1, sources[0].shape[1], 1, 1)
            made = self.node("GlobalAveragePool", [self.float(sources[0])], op, shape)
            if not op.options["keepdim"]:
                made = self.node("view", [made], plain(op))
        else:
            made = self.node(op.kind, [self.float(i) for i in sources], op)
        self.floats[id(op)] = made


def plain(op: Op) -> Op:
    """`op`'s shape without what its kernel depends on."""
    return Op("plain", [], op.shape)


def onnxruntime_integers(ops: Sequence[Op], scheme: QuantScheme | None) -> list[Kernel]:
    """Of ONNX Runtime's CPU provider in INT8, x86: kernels that want channels last, and turns."""
    assert scheme is not None
    if "sigmoid" in scheme.ops:
        ops = split_silu(ops)
    nodes = _Quantized(ops, scheme).nodes
    count_users(nodes)
    leads: dict[int, bool] = {}  # to a kernel that wants channels last
    for node in reversed(nodes):
        leads[id(node)] = len(node.shape) == 4 and any(map(partial(_leads, leads), node.users))
    kernels: list[Kernel] = []
    last: set[int] = set()
    turned: set[int] = set()  # values that have both layouts
    for node in nodes:
        axes = node.options.get("axes") if node.kind in ("permute", "transpose") else None
        if axes == TO_LAST and id(node.inputs[0]) in last:
            continue
        if axes == TO_FIRST and leads[id(node)]:
            last.add(id(node))
            continue
        if node.kind == "part":
            last |= {id(node)} if id(node.inputs[0]) in last else set()
            continue
        maps = [i for i in node.inputs if len(i.shape) == 4 and i.kind != "constant"]
        keeps = node.kind in AGNOSTIC and bool(maps) and _worth(node, maps, last, leads)
        to_last = wants_last(node) or keeps
        for source in maps:
            if (id(source) in last) != to_last and id(source) not in turned:
                turned.add(id(source))
                kernels.append(elementwise("Transpose", source.shape, source.size))
        kernels += integer_kernels(node)
        if to_last and len(node.shape) == 4:
            last.add(id(node))
    return kernels


def _leads(leads: Mapping[int, bool], user: Op) -> bool:
    """Whether `user` wants channels last, or hands them on to one that does."""
    passes_on = user.kind in AGNOSTIC and leads[id(user)]
    return wants_last(user) or passes_on or user.options.get("axes") == TO_LAST


def _worth(node: Op, maps: Sequence[Op], last: set[int], leads: Mapping[int, bool]) -> bool:
    """Whether a transposition in front of `node` goes behind it.

    One that only `node` reads goes away, one that others read too stays, and each input without
    one would get one. Where that evens out it is worth it if all of them will meet another.
    """
    there = [i for i in maps if id(i) in last]
    cost = len(maps) - len(there) - sum(len(i.users) == 1 for i in there)
    if cost or len(there) < len(maps):
        return cost < 0
    return leads[id(node)] and all(_leads(leads, user) for i in there for user in i.users)


def wants_last(node: Op) -> bool:
    """Whether this kernel takes channels last."""
    return node.kind in LAST and len(node.inputs[0].shape) == 4


def integer_kernels(node: Op) -> list[Kernel]:
    """Of one node of `_Quantized`."""
    if node.kind == "QLinearConv":
        source = node.inputs[0]
        return [convolution(node, "QLinearConv", source.shape[1], node.shape[1])]
    if node.kind == "NhwcMaxPool" or (node.kind == "QLinearAveragePool"):
        (kernel,) = plain_kernel(Op("max_pool2d", node.inputs, node.shape, (), node.options), ORT)
        return [kernel._replace(op=node.kind)]
    if node.kind == "class_token":
        return class_token(node)
    if node.kind == "QGemm":
        (kernel,) = plain_kernel(Op("linear", node.inputs, node.shape, node.weight), ORT)
        return [kernel._replace(op="QGemm")]
    if node.kind == "unbind":
        return unbind_kernels(node)
    if node.kind in ("permute", "transpose") and goes_with_unbind(node):
        return []
    if node.kind == "avg_pool2d" and node.shape[1] % BLOCK == 0:
        (kernel,) = plain_kernel(node, ORT)
        return [elementwise("ReorderInput.nchwc", node.inputs[0].shape, node.inputs[0].size),
                kernel._replace(op="AveragePool.nchwc"),
                elementwise("ReorderOutput.nchwc", node.shape, node.size)]  # fmt: skip
    return plain_kernel(node, ORT)


def goes_with_unbind(op: Op) -> bool:
    """A permutation that `unbind_kernels` puts behind the split."""
    if op.users and all(u.kind == "unbind" for u in op.users):
        return True
    source = op.inputs[0]
    return source.kind == "part" and source.inputs[0].kind == "unbind" and len(source.users) == 1
