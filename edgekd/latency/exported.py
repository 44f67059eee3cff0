"""A traced module as it is exported, and what the rules of all runtimes share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from edgekd.latency.kernels import Kernel, by_place, of_tensor
from edgekd.latency.tracing import Dims, Op, alive, count_users
from edgekd.target import QuantScheme

NAMES = {
    "relu": "relu", "clamp": "clip", "hardswish": "hardswish", "hardsigmoid": "hardsigmoid",
    "sigmoid": "sigmoid", "silu": "quickgelu", "gelu": "gelu", "tanh": "tanh",
    "leaky_relu": "leakyrelu", "elu": "elu", "mish": "mish",
}  # fmt: skip
BESIDE_LINEAR = ("gelu", "hardswish", "relu", "clip", "quickgelu")
# permutations of a map's axes, channels to the end and back
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def as_exported(ops: Sequence[Op]) -> list[Op]:
    """As the exporter writes it: products of any rank, and one scale for queries and keys.

    A linear layer over tokens is one over rows, and so is the activation behind it, see
    `quantization/canonical.py`.
    """
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
        if op.kind == "view" and op.inputs[0].kind == "view":
            rows = op.inputs[0].inputs[0]
            if rows.shape == op.shape and activation(rows) and rows.inputs[0].kind == "linear":
                stands[id(op)] = rows
                continue
        if activation(op) in BESIDE_LINEAR and op.inputs[0].kind == "view":
            view = op.inputs[0]
            linear = view.inputs[0]
            if linear.kind == "linear" and len(view.users) == len(linear.users) == 1:
                shaped = Op("view", [op], op.shape)
                op.inputs, op.shape = [linear], linear.shape
                stands[id(op)] = shaped
                kept += [op, shaped]
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


def split_silu(ops: Sequence[Op]) -> list[Op]:
    """Each SiLU as x · σ(x), see `quantization/canonical.py`; `ops` are changed."""
    kept = []
    for op in ops:
        if op.kind == "silu":
            kept.append(Op("sigmoid", list(op.inputs), op.shape))
            op.kind, op.inputs = "mul", [*op.inputs, kept[-1]]
        kept.append(op)
    count_users(kept)
    return kept


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
        name = names["scaled" if "scaled" in op.options else "matmul"]
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


def convolution(op: Op, name: str, cin: int, cout: int) -> Kernel:
    """The kernel of a convolution, of these channels; it takes nothing along yet.

    A transposed one works once for each pixel that it reads. Of one or three dimensions, all but
    the first count as the width.
    """
    groups = op.options["groups"]
    if groups > 1 and op.weight[1] == 1:
        groups = cout  # padded as they are
    before = op.inputs[0].shape[2:]
    sides = before if op.options["transposed"] else op.shape[2:]
    return Kernel(
        name, cin, cout, op.weight[2], op.options["stride"][0], groups, sides[0],
        math.prod(sides[1:]), "", cin * math.prod(before), cout * math.prod(op.shape[2:]),
    )  # fmt: skip


# ---- integers ------------------------------------------------------------------------------------

KINDS = {
    "convolution": "conv", "linear": "linear", "add": "add", "sub": "sub", "mul": "mul",
    "sigmoid": "sigmoid", "cat": "concat",
    "avg_pool2d": "pool", "matmul": "matmul",
    **dict.fromkeys(
        ("max_pool2d", "view", "permute", "transpose", "slice", "select", "squeeze", "unsqueeze",
         "split", "part", "unbind", "pixel_shuffle", "constant_pad_nd", "upsample_nearest2d"),
        "pass",
    ),
}  # fmt: skip
CLIPS = ("relu", "clip")
SUMS = ("add", "sub")
FUSING = ("conv", "linear", *SUMS)


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
        return KINDS.get(op.kind) in FUSING and len(op.users) == 1

    def joins(self, op: Op) -> bool:
        """A convolution, or its ReLU, that the sum behind it is fused into, see `placement.py`."""
        if self.scheme.add_inputs == "both" or len(op.users) != 1:
            return False
        (add,) = op.users
        if self.kind(add) not in SUMS:
            return False
        return next(filter(self._takes_sum, add.inputs), None) is op

    def _takes_sum(self, op: Op) -> bool:
        activated = self.scheme.add_inputs == "skip-activated" and activation(op) in CLIPS
        made = op.inputs[0] if activated else op
        return self.kind(made) == "conv" and len(op.users) == len(made.users) == 1

    def gives_integers(self, op: Op) -> bool:
        """Whether a quantizer stands behind `op` for all that read it."""
        kind = self.kind(op)
        if kind is None:
            clips = activation(op) in CLIPS and op.inputs[0].users == [op]
            made = op.inputs[0] if clips else None
            return (
                made is not None and self.kind(made) in FUSING
                and self._quantized(op, self.kind(made))
            )  # fmt: skip
        if kind == "pass":
            return True
        if self.absorbed(op):
            return False
        return self._quantized(op, kind)

    def _quantized(self, last: Op, kind: str | None) -> bool:
        floats = self.scheme.linear_gives_float and last.kind == "linear"
        read = map(self.kind, last.users) if floats else (not ends(user) for user in last.users)
        leaves = kind == "linear" and not any(read)
        return self.scheme.outputs and not leaves and not self.joins(last)

    def absorbed(self, op: Op) -> bool:
        """Whether a ReLU or clip behind `op` stands in for it."""
        return self.clipped(op) and activation(op.users[0]) in CLIPS


MOVING = {k for k, v in KINDS.items() if v == "pass"}


def ends(op: Op) -> bool:
    """Whether what `op` gives only moves on its way out of the network."""
    return op.kind == "output" or (op.kind in MOVING and all(map(ends, op.users)))
