"""The kernels of OpenVINO's CPU plugin: its fusions and layouts, as rules.

Found by reading the graphs that OpenVINO 2026.4 executes on x86 with AVX-512, and checked against
them by tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgekd.latency.exported import (
    MOVING,
    NAMES,
    SUMS,
    TO_FIRST,
    TO_LAST,
    Placement,
    activation,
    convolution,
    elementwise,
    is_spatial_mean,
    plain_kernel,
)
from edgekd.latency.kernels import EXP, TURN, Kernel, moves_elements, of_tensor
from edgekd.latency.tracing import Op, count_users
from edgekd.target import QuantScheme

OPENVINO = {
    "linear": "FullyConnected", "matmul": "MatMul", "scaled": "MatMul", "max_pool2d": "Pooling",
    "avg_pool2d": "Pooling", "softmax": "Softmax", "layer_norm": "MVN", "group_norm": "MVN",
    "mean": "Reduce", "sum": "Reduce", "transpose": "Transpose", "permute": "Transpose",
    "cat": "Concatenation", "split": "Split", "slice": "StridedSlice", "batch_norm": "Eltwise",
    "addcmul": "Eltwise", "clamp_min": "Eltwise", "view": "", "unsqueeze": "", "squeeze": "",
    "upsample_nearest2d": "Interpolate", "upsample_bilinear2d": "Interpolate",
    "part": "", "select": "", "input": "", "output": "", "constant": "",
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

    def lies_in_bytes(self, op: Op) -> bool:
        """Whether `op` gives bytes, made or moved."""
        turned = False
        while op.kind in MOVING and op.kind != "max_pool2d":
            turned |= _turns(op)
            op = op.inputs[0]
        made = op.kind == "matmul" or self.integer(op)  # an attention in float quantizes too
        return made and (turned or not (op.kind in ("linear", "matmul") and self._turned(op)))

    def _turned(self, op: Op) -> bool:
        """Whether all that read `op` permute it first, see `quantize_behind_turns`."""
        return bool(op.users) and all(
            self.place is not None
            and self.place.kind(user) == "pass"
            and (_turns(user) or self._turned(user))
            for user in op.users
        )

    def emit(self, op: Op, kernel: Kernel) -> None:
        self.open[id(op)] = len(self.kernels)
        self.kernels.append(kernel)

    def maker(self, op: Op) -> str:
        """The kind of the kernel that gives `op` and still takes more along; empty if none does."""
        place = self.open.get(id(op))
        return "" if place is None else self.kernels[place].op

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
        if what == "exp" and kernel.op == "Eltwise":
            kernel = kernel._replace(op=EXP)
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
            self.kernels.append(elementwise("Eltwise", source.shape, source.size))

    def stays_float(self, op: Op) -> bool:
        """Whether a pooling reads `op` as its activation gives it: no quantizer is behind that."""
        if self.place is None:
            return False
        if op.kind == "cat":
            return any(map(self.stays_float, op.inputs))
        return op.kind in self.place.scheme.fused_activations

    def quantize_apart(self, source: Op) -> None:
        """For its other readers `source` is quantized, by a kernel of its own."""
        if self.maker(source) not in ("Eltwise", EXP):
            self.kernels.append(elementwise("Eltwise", source.shape, source.size))


def _turns(op: Op) -> bool:
    """A permutation that is none of a map's layouts."""
    axes = op.options.get("axes")
    return op.kind in ("permute", "transpose") and axes not in (TO_FIRST, TO_LAST)


def _quantized_inside(op: Op) -> bool:
    """Whether those that read `op`, moved or not, quantize it in their own kernels."""
    return all(
        user.kind in (*SUMS, "unbind") or (user.kind in MOVING and _quantized_inside(user))
        for user in op.users
    )


def _other(op: Op, chains: _Chains) -> None:
    reads = sum(i.size for i in op.inputs if i.kind != "constant")
    if op.kind == "input":
        chains.rows.add(id(op))
        return
    if op.kind in ("linear", "matmul", "max_pool2d", "avg_pool2d"):
        for source in op.inputs:
            chains.lay(source, False)
        floating = op.kind == "avg_pool2d" and chains.stays_float(op.inputs[0])
        if floating:
            chains.quantize_apart(op.inputs[0])
        for kernel in plain_kernel(op, OPENVINO):
            chains.emit(op, kernel._replace(kernel=1, stride=1) if "pool" in op.kind else kernel)
        if floating:
            chains.kernels.append(elementwise("FakeQuantize", op.shape, op.size))
        return
    name = OPENVINO.get(op.kind, op.kind)
    if op.kind in ("view", "select", "squeeze", "unsqueeze") and op.inputs:
        chains.lay(op.inputs[0], True)
        chains.rows.add(id(op))
        alone = len(op.inputs[0].users) == 1
        if alone and chains.maker(op.inputs[0]) == "FullyConnected" and chains.place is None:
            chains.open[id(op)] = chains.open[id(op.inputs[0])]
        return
    if op.kind in ("part",):
        if id(op.inputs[0]) in chains.rows:
            chains.rows.add(id(op))
        return
    if name:
        chains.tensor(op, name, reads)


def _ov_convolution(op: Op, chains: _Chains) -> None:
    source = op.inputs[0]
    chains.quantize(source)
    chains.lay(source, False)
    chains.emit(op, convolution(op, "Convolution", source.shape[1], op.shape[1]))


def _ov_activation(op: Op, chains: _Chains) -> None:
    source, kind = op.inputs[0], activation(op)
    if kind == "hardsigmoid":
        reorder = elementwise("Reorder", op.shape, op.size)
        chains.kernels += [reorder, elementwise("Math", op.shape, op.size), reorder]
        return
    taken = "exp" if kind in SLOW else "hardswish" if kind == "hardswish" else ""
    if not chains.take(source, op, taken):
        chains.tensor(op, EXP if kind in SLOW else "Eltwise", op.size)


def _ov_binary(op: Op, chains: _Chains) -> None:
    if op.kind == "mul" and any(i.kind == "constant" for i in op.inputs):
        (source,) = (i for i in op.inputs if i.kind != "constant")
        if chains.take(source, op, ""):
            return
    if op.kind in SUMS and all(i.kind != "constant" for i in op.inputs):
        for term in _sum_takers(op, chains):
            if chains.take(term, op, "add"):
                return
    reads = sum(i.size for i in op.inputs if i.kind != "constant")
    chains.tensor(op, "Eltwise", reads)
    if all(id(i) in chains.rows for i in op.inputs):
        chains.rows.add(id(op))


def _sum_takers(op: Op, chains: _Chains) -> list[Op]:
    """Terms of the sum `op` whose convolution may add the others, the likeliest first.

    None adds what it reads itself. In integers it adds what has a quantizer, if one is behind the
    sum too; else nothing that another layer reads. One behind an activation may in integers only,
    where no convolution reads what it would add.
    """
    place = chains.place
    bare = [
        term for term in op.inputs
        if not activation(term) and not any(i in op.inputs for i in term.inputs)
    ]  # fmt: skip
    if place is None:
        return bare
    last = op.users[0] if place.absorbed(op) else op
    joining = [term for term in bare if place.joins(term) and term.kind == "convolution"]
    if joining and chains.integer(last):
        return joining
    if any(len(i.users) > 1 or chains.maker(i) != "Convolution" for i in op.inputs):
        return []
    activated = [
        term for term in op.inputs if activation(term)
        and not any(u.kind == "convolution" for i in op.inputs if i is not term for u in i.users)
    ]  # fmt: skip
    return sorted([*bare, *activated], key=lambda term: not place.joins(term))


def _ov_norm(op: Op, chains: _Chains) -> None:
    if len(op.shape) != 4:
        if chains.integer(op.inputs[0]):
            chains.quantize_apart(op.inputs[0])
        chains.tensor(op, "MVN", op.size)
        return
    mean = (*op.shape[:-1], 1)
    chains.kernels += [
        elementwise("Reduce", mean, op.size),
        elementwise("Eltwise.rows", op.shape, op.size + math.prod(mean)),
    ]
    if id(op.inputs[0]) not in chains.rows:
        chains.kernels.append(elementwise("Reorder", op.shape, op.size))
    chains.tensor(op, "RMS", op.size)
    chains.rows.add(id(op))
    if chains.place is not None and any(chains.place.kind(u) for u in op.users):
        chains.kernels.append(elementwise("Eltwise", op.shape, op.size))


def _ov_channel_norm(op: Op, chains: _Chains) -> None:
    """Its two means, and the passes between them."""
    mean = (1, 1, *op.shape[2:])
    read = op.size + math.prod(mean)
    chains.kernels += [
        elementwise("Reduce", mean, op.size),
        elementwise("Eltwise", op.shape, read, 2 * op.size),
        elementwise("Reduce", mean, op.size)
        if math.prod(mean) > 1
        else elementwise("RMS", op.shape, op.size),
    ]
    chains.tensor(op, "Eltwise", read)


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
    lies_first = axes == TO_LAST and id(source) in chains.rows
    if len(op.shape) != 4 or axes not in (TO_FIRST, TO_LAST) or lies_first:
        chains.rows.add(id(op))
    if all(u.kind == "matmul" for u in op.users) or source.kind == "matmul":
        attends = source.kind == "matmul" and source.inputs[0].kind == "softmax"
        if chains.place is None or not attends:
            return  # inside the attention
        if chains.place.kind(source) is None:
            chains.tensor(op, "Eltwise", op.size)  # its quantizer; the rest is inside
            return
    if axes == TO_FIRST and all(_reads_last(user, op, chains) for user in op.users):
        chains.tensor(op, "Reorder", op.size)
        return
    if source.kind == "view" and len(source.inputs[0].shape) == 4 and len(op.users) == 1:
        if chains.place is not None and op.users[0].kind == "cat":
            chains.tensor(op, "Eltwise", op.size)
        return  # a map becomes tokens by the reorder in front of the view
    size = 1 if chains.lies_in_bytes(source) else 4
    name = TURN if moves_elements(source.shape, op.shape, size) else "Transpose"
    chains.tensor(op, name, op.size)
    if chains.lies_in_bytes(op) and not chains.lies_in_bytes(source) and not _quantized_inside(op):
        chains.tensor(op, "Eltwise", op.size)  # its quantizer
    if axes == TO_FIRST:
        chains.rows.add(id(op))


def _reads_last(user: Op, op: Op, chains: _Chains) -> bool:
    """Whether `user` takes the map `op` with its channels last, as what it is added to lies."""
    others = [i for i in user.inputs if i is not op]
    return user.kind == "convolution" or (
        user.kind in SUMS and all(
            i.kind == "convolution" or (id(i) in chains.open and id(i) not in chains.rows)
            for i in others
        )
    )  # fmt: skip


def _ov_unbind(op: Op, chains: _Chains) -> None:
    chains.kernels.append(elementwise("Split", op.inputs[0].shape, op.inputs[0].size))


def _ov_matmul(op: Op, chains: _Chains) -> None:
    first = op.inputs[0]
    chains.rows.add(id(op))
    if first.kind == "softmax":
        return  # with the product before it
    if len(op.users) == 1 and op.users[0].kind == "softmax":
        for _ in range(3 if chains.lies_in_bytes(op.inputs[1]) else 1):
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
    if shuffles and (chains.place is None or "concat" in chains.place.scheme.shared_scales):
        chains.tensor(turn, "ShuffleChannels", op.size)
        chains.shuffled |= {id(turn), *map(id, turn.users)}
    elif id(op) not in chains.shuffled:
        _other(op, chains)


RULE: dict[str, Callable[[Op, _Chains], None]] = {
    "convolution": _ov_convolution, "view": _ov_shuffle, "add": _ov_binary, "mul": _ov_binary,
    "sub": _ov_binary, "div": _ov_binary, "layer_norm": _ov_norm, "mean": _ov_mean,
    "channel_norm": _ov_channel_norm, "permute": _ov_permute, "transpose": _ov_permute,
    "unbind": _ov_unbind, "matmul": _ov_matmul, "softmax": lambda op, chains: (
        None if op.inputs[0].kind == "matmul" else _other(op, chains)
    ),
    **dict.fromkeys(NAMES, _ov_activation),
}  # fmt: skip


def _turn_maps(ops: Sequence[Op]) -> list[Op]:
    """With channels first what the export computes so, see `runtimes/openvino_graph.py`."""
    stands: dict[int, Op] = {}
    for end in ops:
        if _permutes(end, TO_FIRST) and (region := _between(end)):
            batch, height, width, _ = end.inputs[0].shape
            for op in (*region, end):
                if op.kind in ("permute", "view"):
                    stands[id(op)] = op.inputs[0]
                    continue
                op.shape = (batch, op.shape[-1], height, width)
                if op.kind == "layer_norm":
                    op.kind = "channel_norm"
                elif op.kind == "linear":
                    op.kind, op.weight = "convolution", (*op.weight, 1, 1)
                    op.options |= {"stride": (1, 1), "groups": 1, "transposed": False}
    for op in ops:
        for place, source in enumerate(op.inputs):
            while id(source) in stands:
                source = stands[id(source)]
            op.inputs[place] = source
    kept = [op for op in ops if id(op) not in stands]
    count_users(kept)
    return kept


def _between(end: Op) -> list[Op]:
    """What stands between permutations to channels last and back, and is read nowhere else."""
    region = [end.inputs[0]]
    for op in region:
        if not _permutes(op, TO_LAST):
            if op.kind not in ("layer_norm", "linear", "view", *NAMES):
                return []
            region += [source for source in op.inputs if source not in region]
    inside = all(user in region or _permutes(user, TO_FIRST) for op in region for user in op.users)
    return region if inside else []


def _permutes(op: Op, axes: tuple[int, ...]) -> bool:
    return op.kind == "permute" and op.options["axes"] == axes


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
    if scheme is None or scheme.linear_as_conv:
        ops = _turn_maps(ops)
    if scheme is None:
        _move_strides(ops)
    return _Chains(ops, scheme).kernels
