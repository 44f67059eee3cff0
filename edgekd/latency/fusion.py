"""Which kernels a runtime makes of a traced module: its fusions and layouts, as rules.

Found by reading the graphs that the runtimes execute (ONNX Runtime 1.32 and OpenVINO 2026.4 on
x86 with AVX-512), and checked against them by tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from edgekd.errors import TargetError, nearest
from edgekd.latency.kernels import TURN, Kernel, by_place, moves_channels, of_tensor
from edgekd.latency.tracing import Dims, Op, alive, count_users
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


def as_exported(ops: Sequence[Op]) -> list[Op]:
    """As the exporter writes it: products of any rank, and one scale for queries and keys."""
    stands: dict[int, Op] = {}
    merged: dict[int, Op] = {}  # a view into three axes -> what it viewed
    kept: list[Op] = []
    for op in copied(ops):
        op.inputs = [stands.get(id(i), i) for i in op.inputs]
        if op.kind == "view" and len(op.shape) == 3 and all(u.kind == "bmm" for u in op.users):
            source = op.inputs[0]
            if source.shape[-2:] == op.shape[-2:]:
                merged[id(op)] = source
                continue
        if op.kind == "bmm":
            op.inputs = [merged.get(id(i), i) for i in op.inputs]
            left, right = op.inputs
            if scaled(left) and scaled(right):
                op.inputs = [left.inputs[0], right.inputs[0]]
                op.options["scaled"] = True
            op.kind = "matmul"
            view = op.users[0]
            if len(left.shape) > 3 and len(op.users) == 1 and view.kind == "view":
                stands[id(view)] = op
                op.shape = view.shape
        if id(op) not in stands:
            kept.append(op)
    return alive(kept)


def copied(ops: Sequence[Op]) -> list[Op]:
    """The same graph, to be changed."""
    copies = {id(op): replace(op, options=dict(op.options)) for op in ops}
    for op in ops:
        for i in op.inputs:  # constants are in no list
            copies.setdefault(id(i), replace(i, users=[]))
    for copy in copies.values():
        copy.inputs = [copies[id(i)] for i in copy.inputs]
    made = [copies[id(op)] for op in ops]
    count_users(made)
    return made


def scaled(op: Op) -> bool:
    """A product with a number."""
    return op.kind == "mul" and "scalar" in op.options


def kernels_of(ops: Sequence[Op], runtime: str, scheme: QuantScheme | None) -> list[Kernel]:
    """The kernels that a runtime makes of a traced module.

    Args:
        scheme: of the integers; None: in float.

    Raises:
        TargetError: there are no rules for this runtime.
    """
    key = runtime, scheme is not None
    if key not in RULES:
        known = {name for name, _ in RULES}
        raise TargetError(f"no fusion rules for runtime {runtime!r}{nearest(runtime, known)}")
    return RULES[key](as_exported(ops), scheme)


def activation(op: Op) -> str:
    """What kind of activation this is; empty if none."""
    return NAMES.get(op.kind, "")


def is_spatial_mean(op: Op) -> bool:
    """A mean over height and width."""
    return (
        op.kind == "mean" and len(op.inputs[0].shape) == 4 and sorted(op.options["axes"]) == [2, 3]
    )


def elementwise(name: str, shape: Dims, reads: int, writes: int | None = None) -> Kernel:
    """A kernel that touches each element once."""
    return of_tensor(name, shape, reads, math.prod(shape) if writes is None else writes)


def plain_kernel(op: Op, names: dict[str, str]) -> list[Kernel]:
    """Of an operator that fuses with nothing, in the names of a runtime."""
    reads = sum(i.size for i in op.inputs if i.kind != "constant" and len(i.shape) > 1)
    if op.kind == "linear":
        kind = names["linear"]
        return [Kernel(kind, op.weight[1] if op.weight else op.inputs[0].shape[-1], op.shape[-1],
                       height=math.prod(op.shape[:-1]), reads=reads, writes=op.size)]  # fmt: skip
    if op.kind in ("bmm", "matmul"):
        name = "FusedMatMul" if "scaled" in op.options and names is ORT else names["matmul"]
        return [Kernel(name, op.inputs[0].shape[-1], op.shape[-1],
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


def onnxruntime_floats(ops: Sequence[Op], scheme: QuantScheme | None) -> list[Kernel]:
    """Of ONNX Runtime's CPU provider in FP32, x86."""
    state = _Blocked()
    for op in ops:
        _RULES.get(op.kind, _any)(op, state)
    return state.kernels


GELU = ("Div", "Erf", "Add", "Mul", "Mul")


def _gelu(op: Op, state: _Blocked) -> None:
    state.need_plain(op.inputs[0])
    state.kernels += gelu_kernels(op)


def gelu_kernels(op: Op) -> list[Kernel]:
    """x / 2 · (1 + erf(x / √2)), which no fusion finds in this form."""
    return [elementwise(name, op.shape, op.size * (1 + (i == 4))) for i, name in enumerate(GELU)]


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
    cout = op.weight[0]
    source, takes = op.inputs[0], takes_blocks(op)
    if takes == "no":
        state.need_plain(source)
        state.convolutions[id(op)] = len(state.kernels)
        state.kernels.append(convolution(op, "Conv", source.shape[1], cout, "", False))
        return
    if takes == "plain":
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
    if len(op.shape) != 4 or op.shape[1] % BLOCK:
        _any(op, state)
        return
    channels = state.need_blocked(source)
    (kernel,) = plain_kernel(op, ORT)
    state.emit(kernel._replace(op=kernel.op + ".nchwc"), op, channels)


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
    "add": _binary, "mul": _binary, "sub": _binary,
    "max_pool2d": _pool, "avg_pool2d": _pool, "mean": _mean, "cat": _concat,
    "unbind": _unbind, "permute": _permute, "transpose": _permute, "layer_norm": _layer_norm,
    "part": lambda op, state: None,
    **dict.fromkeys(NAMES, _activation), "gelu": _gelu,
}  # fmt: skip


# ---- integers ------------------------------------------------------------------------------------

KINDS = {
    "convolution": "conv", "linear": "linear", "add": "add", "mul": "mul", "cat": "concat",
    "avg_pool2d": "pool", "matmul": "matmul",
    **dict.fromkeys(
        ("max_pool2d", "view", "permute", "transpose", "slice", "select", "squeeze", "unsqueeze",
         "split", "part", "unbind", "pixel_shuffle", "constant_pad_nd"), "pass",
    ),
}  # fmt: skip
CLIPS = ("relu", "clip")


class Placement:
    """Which operators of a traced module run in integers, see `quantization/placement.py`."""

    def __init__(self, ops: Sequence[Op], scheme: QuantScheme) -> None:
        self.scheme = scheme
        self._kinds: dict[int, str | None] = {}
        for op in ops:
            self.kind(op)

    def kind(self, op: Op) -> str | None:
        """Of an operator in integers; None: it stays in float."""
        if id(op) not in self._kinds:
            self._kinds[id(op)] = None  # where there is a circle, there is none
            self._kinds[id(op)] = self._decide(op)
        return self._kinds[id(op)]

    def _decide(self, op: Op) -> str | None:
        kind = "pool" if is_spatial_mean(op) else KINDS.get(op.kind)
        if kind == "pass":
            return "pass" if any(self.kind(user) for user in op.users) else None
        if kind is None or kind not in self.scheme.ops:
            return None
        if kind in ("conv", "linear"):
            return kind if op.weight else None
        if kind == "matmul":
            return kind
        # a constant that is joined to a map is repeated for each image, so it is not one
        if scaled(op) or (kind != "concat" and any(i.kind == "constant" for i in op.inputs)):
            return None
        return kind if any(self.kind(self.source(i)) for i in op.inputs) else None

    def source(self, op: Op) -> Op:
        """The operator whose numbers `op` passes on."""
        while op.inputs:
            clips = activation(op) in CLIPS and self.clipped(op.inputs[0])
            if not (KINDS.get(op.kind) == "pass" or clips):
                break
            op = op.inputs[0]
        return op

    def clipped(self, op: Op) -> bool:
        """Whether the activation behind `op` is in its kernel."""
        fusing = KINDS.get(op.kind) in ("conv", "linear", "add")
        return fusing and len(op.users) == 1

    def joins(self, op: Op) -> bool:
        """A convolution that the sum behind it is fused into, see `placement.py`."""
        if self.scheme.add_inputs != "skip" or len(op.users) != 1:
            return False
        (add,) = op.users
        if self.kind(add) != "add":
            return False
        ends = (t for t in add.inputs if self.kind(t) == "conv" and len(t.users) == 1)
        return next(ends, None) is op

    def gives_integers(self, op: Op) -> bool:
        """Whether a quantizer stands behind `op` for all that read it."""
        kind = self.kind(op)
        if kind is None:
            clips = activation(op) in CLIPS and op.inputs[0].users == [op]
            made = op.inputs[0] if clips else None
            return (
                made is not None and self.kind(made) in ("conv", "linear", "add")
                and self._quantized(op, self.kind(made))
            )  # fmt: skip
        if kind == "pass":
            return True
        if self.absorbed(op):
            return False
        return self._quantized(op, kind)

    def _quantized(self, last: Op, kind: str | None) -> bool:
        leaves = kind == "linear" and all(map(ends, last.users))
        return self.scheme.outputs and not leaves and not self.joins(last)

    def absorbed(self, op: Op) -> bool:
        """Whether a ReLU or clip behind `op` stands in for it."""
        return self.clipped(op) and activation(op.users[0]) in CLIPS


MOVING = {k for k, v in KINDS.items() if v == "pass"}


def ends(op: Op) -> bool:
    """Whether what `op` gives only moves on its way out of the network."""
    return op.kind == "output" or (op.kind in MOVING and all(map(ends, op.users)))


LAST = {"QLinearConv", "NhwcMaxPool", "QLinearGlobalAveragePool", "QLinearAveragePool"}
AGNOSTIC = {
    "QuantizeLinear", "DequantizeLinear", "Add", "Mul", "Sub", "Div", "Erf", "QLinearAdd",
    "QLinearMul", "QLinearSigmoid", "QLinearConcat", *ONNX.values(), "add", "mul", "sub", "div",
    "cat", "split", "part",
}  # fmt: skip
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


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
                 "concat": "QLinearConcat", "pool": "QLinearAveragePool"}  # fmt: skip
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
        if kind == "sigmoid" and id(sources[0]) in self.integers and all(
            self.place.kind(u) not in (None, "pass") for u in op.users
        ):  # fmt: skip
            self.integers[id(op)] = self.node("QLinearSigmoid", [self.integer(sources[0])], op)
            return
        if kind == "quickgelu" and id(sources[0]) not in self.floats:
            first, second = self.float(sources[0]), self.float(sources[0])
            made = self.node("Mul", [second, self.node("Sigmoid", [first], op)], op)
        elif kind == "hardswish":
            x = self.float(sources[0])
            made = self.node("Mul", [x, self.node("HardSigmoid", [x], op)], op)
        elif kind == "gelu":
            x, made = self.float(sources[0]), self.float(sources[0])
            for name in GELU[:-1]:
                made = self.node(name, [made], op)
            made = self.node("Mul", [x, made], op)
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
        return [convolution(node, "QLinearConv", source.shape[1], node.shape[1], "", False)]
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


# ---- OpenVINO ------------------------------------------------------------------------------------

OPENVINO = {
    "linear": "FullyConnected", "matmul": "MatMul", "max_pool2d": "Pooling",
    "avg_pool2d": "Pooling", "softmax": "Softmax", "layer_norm": "MVN", "mean": "Reduce",
    "transpose": "Transpose", "permute": "Transpose", "cat": "Concatenation", "split": "Split",
    "slice": "StridedSlice", "view": "", "unsqueeze": "", "squeeze": "", "part": "", "select": "",
    "input": "", "output": "", "constant": "",
}  # fmt: skip
SLOW = {"quickgelu", "gelu", "sigmoid", "tanh", "mish", "elu"}  # with an exponential in them


class _Chains:
    """OpenVINO's CPU plugin: what stands behind a convolution or a linear layer runs inside it."""

    def __init__(self, ops: Sequence[Op], scheme: QuantScheme | None) -> None:
        self.place = None if scheme is None else Placement(ops, scheme)
        self.kernels: list[Kernel] = []
        self.open: dict[int, int] = {}  # value -> place of the kernel that still takes more along
        self.rows: set[int] = set()  # maps that lie channels first
        self.turned: set[tuple[int, bool]] = set()
        self.quantized: set[int] = set()
        self.shuffled: set[int] = set()
        for op in ops:
            RULE.get(op.kind, _other)(op, self)

    def integer(self, op: Op) -> bool:
        return self.place is not None and self.place.gives_integers(op)

    def emit(self, op: Op, kernel: Kernel) -> None:
        self.open[id(op)] = len(self.kernels)
        self.kernels.append(kernel)

    def tensor(self, op: Op, name: str, reads: int) -> None:
        self.emit(op, of_tensor(name, op.shape, reads, op.size))

    def take(self, source: Op, op: Op, what: str) -> bool:
        """`op` runs inside the kernel of `source`, which nothing else reads."""
        place = self.open.get(id(source))
        if place is None or len(source.users) > 1:
            return False
        kernel = self.kernels[place]
        taken = [t for t in kernel.fused.split("+") if t]
        if what == "add":
            if kernel.op != "Convolution" or "add" in taken:
                return False
            kernel = kernel._replace(reads=kernel.reads + op.size)
        if what and what not in taken and kernel.op in ("Convolution", "FullyConnected"):
            kernel = kernel._replace(fused="+".join(sorted([*taken, what])))
        self.kernels[place] = kernel
        self.open[id(op)] = place
        if id(source) in self.rows:
            self.rows.add(id(op))
        return True

    def lay(self, source: Op, rows: bool) -> None:
        """Reorder a map to channels first (`rows`) or last, once."""
        if len(source.shape) != 4 or (id(source) in self.rows) == rows:
            return
        if (id(source), rows) not in self.turned and source.kind != "constant":
            self.turned.add((id(source), rows))
            self.kernels.append(elementwise("Reorder", source.shape, source.size))

    def quantize(self, source: Op) -> None:
        """A quantizer where no kernel before gives integers."""
        if self.place is None or id(source) in self.quantized or self.integer(source):
            return
        self.quantized.add(id(source))
        if source.kind == "input":
            self.kernels.append(elementwise("FakeQuantize", source.shape, source.size))


def _other(op: Op, chains: _Chains) -> None:
    reads = sum(i.size for i in op.inputs if i.kind != "constant")
    if op.kind == "input":
        chains.rows.add(id(op))
        return
    if op.kind in ("linear", "matmul", "max_pool2d", "avg_pool2d"):
        for source in op.inputs:
            chains.lay(source, False)
        for kernel in plain_kernel(op, OPENVINO):
            chains.emit(op, kernel._replace(kernel=1, stride=1) if "pool" in op.kind else kernel)
        return
    name = OPENVINO.get(op.kind, op.kind)
    if op.kind in ("view", "select", "squeeze", "unsqueeze") and op.inputs:
        chains.lay(op.inputs[0], True)
        chains.rows.add(id(op))
        if id(op.inputs[0]) in chains.open and len(op.inputs[0].users) == 1:
            place = chains.open[id(op.inputs[0])]
            if chains.kernels[place].op == "FullyConnected" and chains.place is None:
                chains.open[id(op)] = place
        return
    if op.kind in ("part",):
        if id(op.inputs[0]) in chains.rows:
            chains.rows.add(id(op))
        return
    if op.kind == "cat":
        for constant in (i for i in op.inputs if i.kind == "constant"):
            chains.kernels.append(elementwise("Eltwise", constant.shape, constant.size + 1))
    if name:
        chains.tensor(op, name, reads)


def _ov_convolution(op: Op, chains: _Chains) -> None:
    source = op.inputs[0]
    chains.quantize(source)
    chains.lay(source, False)
    chains.emit(op, convolution(op, "Convolution", source.shape[1], op.shape[1], "", False))


def _ov_activation(op: Op, chains: _Chains) -> None:
    source, kind = op.inputs[0], activation(op)
    if not chains.take(source, op, "exp" if kind in SLOW else ""):
        chains.tensor(op, "Eltwise", op.size)


def _ov_binary(op: Op, chains: _Chains) -> None:
    if op.kind == "mul" and any(i.kind == "constant" for i in op.inputs):
        (source,) = (i for i in op.inputs if i.kind != "constant")
        if chains.take(source, op, ""):
            return
    if op.kind == "add" and all(i.kind != "constant" for i in op.inputs):
        for term in op.inputs:
            if chains.take(term, op, "add"):
                return
    reads = sum(i.size for i in op.inputs if i.kind != "constant")
    chains.tensor(op, "Eltwise", reads)


def _ov_norm(op: Op, chains: _Chains) -> None:
    if len(op.shape) != 4:
        if chains.integer(op.inputs[0]):
            chains.kernels.append(elementwise("Eltwise", op.shape, op.size))
        chains.tensor(op, "MVN", op.size)
        return
    mean = (*op.shape[:-1], 1)
    chains.kernels += [
        elementwise("Reduce", mean, op.size),
        elementwise("Eltwise.rows", op.shape, op.size + math.prod(mean)),
        elementwise("Reorder", op.shape, op.size),
    ]
    chains.tensor(op, "RMS", op.size)
    if chains.place is not None and any(chains.place.kind(u) for u in op.users):
        chains.kernels.append(elementwise("FakeQuantize", op.shape, op.size))


def _ov_mean(op: Op, chains: _Chains) -> None:
    source = op.inputs[0]
    if not is_spatial_mean(op):
        chains.tensor(op, "Reduce", source.size)
        return
    chains.lay(source, False)
    shape = (1, source.shape[1], 1, 1)
    chains.emit(op, of_tensor("Reduce", shape, source.size, source.shape[1]))
    if not op.options["keepdim"]:
        chains.kernels.append(elementwise("Reorder", shape, op.size))


def _ov_permute(op: Op, chains: _Chains) -> None:
    source, axes = op.inputs[0], op.options["axes"]
    if id(op) in chains.shuffled:
        return
    if len(op.shape) != 4 or axes not in (TO_FIRST, TO_LAST):
        chains.rows.add(id(op))
    if all(u.kind == "matmul" for u in op.users) or source.kind == "matmul":
        attends = source.kind == "matmul" and source.inputs[0].kind == "softmax"
        if not (attends and chains.place is not None):
            return  # inside the attention
    name = TURN if moves_channels(source.shape, op.shape) else "Transpose"
    chains.tensor(op, name, op.size)
    if axes == TO_FIRST:
        chains.rows.add(id(op))


def _ov_unbind(op: Op, chains: _Chains) -> None:
    chains.kernels.append(elementwise("Split", op.inputs[0].shape, op.inputs[0].size))


def _ov_matmul(op: Op, chains: _Chains) -> None:
    first = op.inputs[0]
    chains.rows.add(id(op))
    if first.kind == "softmax":
        return  # with the product before it
    if len(op.users) == 1 and op.users[0].kind == "softmax":
        integer = chains.place is not None
        for _ in range(3 if integer else 1):
            chains.kernels.append(elementwise("Eltwise", first.shape, first.size))
        batch, rows = math.prod(op.shape[:-2]), op.shape[-2]
        chains.emit(op, Kernel("Subgraph", 2 * first.shape[-1], op.shape[-1], groups=batch,
                               height=rows, reads=3 * first.size, writes=first.size))  # fmt: skip
        return
    _other(op, chains)


def _ov_shuffle(op: Op, chains: _Chains) -> None:
    """A view into groups, their transposition, and the view back."""
    turn = op.users[0] if len(op.users) == 1 else op
    shuffles = len(op.shape) == 5 and turn.options.get("axes") == (0, 2, 1, 3, 4)
    if shuffles and chains.place is None:
        chains.tensor(turn, "ShuffleChannels", op.size)
        chains.shuffled |= {id(turn), *map(id, turn.users)}
    elif id(op) not in chains.shuffled:
        _other(op, chains)


RULE: dict[str, Callable[[Op, _Chains], None]] = {
    "convolution": _ov_convolution, "view": _ov_shuffle, "add": _ov_binary, "mul": _ov_binary,
    "sub": _ov_binary, "layer_norm": _ov_norm, "mean": _ov_mean, "permute": _ov_permute,
    "transpose": _ov_permute,
    "unbind": _ov_unbind, "matmul": _ov_matmul, "softmax": lambda op, chains: (
        None if op.inputs[0].kind == "matmul" else _other(op, chains)
    ),
    **dict.fromkeys(NAMES, _ov_activation),
}  # fmt: skip


def _move_strides(ops: Sequence[Op]) -> None:
    """A strided 1×1 convolution reads one pixel of four: the layer before computes no others."""
    for op in reversed(ops):
        if op.kind != "convolution" or op.weight[2:] != (1, 1) or max(op.options["stride"]) == 1:
            continue
        chain, source = [op], op.inputs[0]
        while activation(source) and len(source.users) == 1:
            chain.append(source)
            source = source.inputs[0]
        if source.kind == "convolution" and len(source.users) == 1:
            step = op.options["stride"]
            source.options["stride"] = tuple(
                a * b for a, b in zip(source.options["stride"], step, strict=True)
            )
            op.options["stride"] = (1, 1)
            for moved in (*chain[1:], source):
                moved.shape = (*moved.shape[:2], *op.shape[2:])


def openvino_kernels(ops: Sequence[Op], scheme: QuantScheme | None) -> list[Kernel]:
    """Of OpenVINO's CPU plugin, x86, in FP32 or INT8."""
    if scheme is None:
        _move_strides(ops)
    return _Chains(ops, scheme).kernels


RULES: dict[tuple[str, bool], Callable[[Sequence[Op], QuantScheme | None], list[Kernel]]] = {
    ("onnxruntime", False): onnxruntime_floats,
    ("onnxruntime", True): onnxruntime_integers,
    ("openvino", False): openvino_kernels,
    ("openvino", True): openvino_kernels,
}
