"""What a module computes, operator by operator with shapes, without computing it.

The module runs once on meta tensors, which have shapes and no values. Most shapes are worked out
here: PyTorch's own functions for them take up to a millisecond a convolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgekd.errors import ModelError
from edgekd.network import eval_mode

aten = torch.ops.aten
Dims = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Op:
    """One operator of a traced module, batch 1.

    Attributes:
        kind: PyTorch's name of it, in one form: "relu" of relu_ too; "linear" of addmm and mm.
        inputs: what it reads, but for weights.
        shape: of its output.
        weight: shape of its weight, if it has one.
        options: strides, axes, ...
        users: what reads it.
        layer: path of the module that owns the weight.
    """

    kind: str
    inputs: list[Op]
    shape: Dims
    weight: Dims = ()
    options: dict[str, Any] = field(default_factory=dict)
    users: list[Op] = field(default_factory=list)
    layer: str = ""

    @property
    def size(self) -> int:
        """Elements of the output."""
        return math.prod(self.shape)


def trace(module: nn.Module, input_shapes: Sequence[Dims]) -> list[Op]:
    """The operators of `module` in eval mode, in the order they run in.

    BatchNorm is folded where a convolution or linear layer takes it; operators that do nothing
    are left out. The last is of kind "output".

    Args:
        module: on the meta device, or with values: then it is copied there.
        input_shapes: of one sample, without the batch.

    Raises:
        ModelError: it does not run on meta tensors.
    """
    if any(t.device.type != "meta" for t in (*module.parameters(), *module.buffers())):
        module = blank(module)
    recorder = _Recorder(module)
    inputs = [torch.empty((1, *shape), device="meta") for shape in input_shapes]
    for x in inputs:
        recorder.add(x, Op("input", [], tuple(x.shape)))
    try:
        with eval_mode(module), torch.no_grad(), recorder:
            result = module(*inputs)
    except Exception as error:  # a module may fail in any way
        raise ModelError(
            f"{type(module).__name__} does not run without values, on shapes "
            f"{[tuple(x.shape) for x in inputs]}: {error}; its latency can only be measured"
        ) from error
    flat = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
    recorder.ops.append(Op("output", [recorder.op(t) for t in flat], ()))
    return _simplified(recorder.ops)


def blank(module: nn.Module) -> nn.Module:
    """A copy of `module` on the meta device; no value of it is copied."""
    import copy

    empty: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        made: Any = torch.empty_like(tensor, device="meta")
        empty[id(tensor)] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(module, empty)


# ---- shapes --------------------------------------------------------------------------------------


def _same(x: Tensor, *_: Any, **__: Any) -> Sequence[int]:
    return x.shape


def _broadcast(x: Any, y: Any, *_: Any, **__: Any) -> Sequence[int]:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        tensor: Tensor = x if isinstance(x, Tensor) else y
        return tensor.shape
    shapes = itertools.zip_longest(reversed(x.shape), reversed(y.shape), fillvalue=1)
    return [max(a, b) if a and b else 0 for a, b in shapes][::-1]


def _sides(
    sides: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:  # fmt: skip
    ones = len(sides)
    stride, padding, dilation, kernel = (
        [*v, *[v[-1]] * (ones - len(v))] for v in (stride, padding, dilation, kernel)
    )
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(sides, kernel, stride, padding, dilation, strict=True)
    ]


def _convolution(
    x: Tensor, w: Tensor, _: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    *__: Any,
) -> Sequence[int] | None:  # fmt: skip
    if transposed:
        return None
    return [
        x.shape[0],
        w.shape[0],
        *_sides(x.shape[2:], w.shape[2:], stride, padding, dilation),
    ]


def _pool(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = (0,), dilation: Any = (1,),
    ceil: bool = False, *_: Any,
) -> Sequence[int] | None:  # fmt: skip
    if ceil:
        return None
    return [*x.shape[:-2], *_sides(x.shape[-2:], kernel, stride or kernel, padding, dilation)]


def _average(x: Tensor, kernel: Any, stride: Any = (), padding: Any = (0,), *rest: Any) -> Any:
    return _pool(x, kernel, stride, padding, (1,), *rest[:1])


def _cat(tensors: Sequence[Tensor], axis: int = 0) -> Sequence[int]:
    shape = list(tensors[0].shape)
    shape[axis] = sum(t.shape[axis] for t in tensors)
    return shape


def _mean(x: Tensor, axes: Any, keepdim: bool = False, **_: Any) -> Sequence[int]:
    gone = {a % x.dim() for a in axes} if axes else set(range(x.dim()))
    return [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]


def _view(x: Tensor, sizes: Sequence[int]) -> Sequence[int]:
    if -1 not in sizes:
        return sizes
    known = -math.prod(sizes)
    return [x.numel() // known if n == -1 else n for n in sizes]


def _resized(x: Tensor, sides: Sequence[int] | None, *_: Any) -> Sequence[int] | None:
    return None if sides is None else [*x.shape[:2], *sides]


def _transpose(x: Tensor, a: int, b: int) -> Sequence[int]:
    shape = list(x.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return shape


# of the output; None where PyTorch has to work it out
SHAPES: dict[Any, Callable[..., Sequence[int] | None]] = {
    aten.convolution.default: _convolution,
    aten.add.Tensor: _broadcast,
    aten.sub.Tensor: _broadcast,
    aten.mul.Tensor: _broadcast,
    aten.div.Tensor: _broadcast,
    aten.mul.Scalar: _same,
    aten.max_pool2d_with_indices.default: _pool,
    aten.avg_pool2d.default: _average,
    aten.cat.default: _cat,
    aten.mean.dim: _mean,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.transpose.int: _transpose,
    aten.upsample_bilinear2d.vec: _resized,
    aten.upsample_bilinear2d.default: _resized,
    aten.upsample_nearest2d.vec: _resized,
    aten.upsample_nearest2d.default: _resized,
    aten.t.default: lambda x: x.shape[::-1],
    aten.permute.default: lambda x, axes: [x.shape[a] for a in axes],
    aten.addmm.default: lambda b, x, y, **_: (x.shape[0], y.shape[1]),
    aten.mm.default: lambda x, y: (x.shape[0], y.shape[1]),
    aten.bmm.default: lambda x, y: (*x.shape[:2], y.shape[2]),
    **dict.fromkeys(
        (
            aten.relu.default, aten.hardtanh.default, aten.hardswish.default, aten.sigmoid.default,
            aten.hardsigmoid.default, aten.silu.default, aten.gelu.default, aten.tanh.default,
            aten.clone.default, aten._softmax.default, aten._safe_softmax.default,
            aten.leaky_relu.default, aten.elu.default, aten.detach.default, aten.alias.default,
            aten.clamp.default, aten.mish.default, aten.dropout.default,
        ),
        _same,
    ),
}  # fmt: skip
# several outputs, of which the first alone is read
FIRST_OF = {
    aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default,
    aten.native_layer_norm.default, aten.max_pool2d_with_indices.default,
    aten.native_group_norm.default,
}  # fmt: skip
IN_PLACE = {
    aten.relu_.default, aten.hardtanh_.default, aten.hardswish_.default, aten.sigmoid_.default,
    aten.hardsigmoid_.default, aten.silu_.default, aten.add_.Tensor, aten.mul_.Tensor,
    aten.sub_.Tensor, aten.div_.Tensor, aten.leaky_relu_.default, aten.elu_.default,
    aten.clamp_.default, aten.gelu_.default, aten.mish_.default,
}  # fmt: skip
NAMES = {"native_batch_norm": "batch_norm", "_native_batch_norm_legit_no_training": "batch_norm",
         "native_layer_norm": "layer_norm", "max_pool2d_with_indices": "max_pool2d",
         "split_with_sizes": "split", "_unsafe_view": "view", "addmm": "linear", "mm": "linear",
         "_softmax": "softmax", "_safe_softmax": "softmax", "hardtanh": "clamp",
         "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
         "native_group_norm": "group_norm"}  # fmt: skip


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types it not
    """Keeps an Op of each call that depends on an input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = {id(p): name.rpartition(".")[0] for name, p in module.named_parameters()}
        self.ops: list[Op] = []
        self._made: dict[int, Op] = {}
        self._alive: list[Any] = []  # an id is one tensor's as long as that lives

    def add(self, tensor: Tensor, op: Op) -> None:
        self.ops.append(op)
        self._made[id(tensor)] = op
        self._alive.append(tensor)

    def op(self, tensor: Tensor) -> Op:
        """That made this tensor; a new one of a constant."""
        if id(tensor) not in self._made:
            self._made[id(tensor)] = Op("constant", [], tuple(tensor.shape))
            self._alive.append(tensor)
        return self._made[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        given = (
            [a for a in args if isinstance(a, Tensor)] if func is not aten.cat.default else args[0]
        )
        reads = [a for a in given if id(a) in self._made]
        if not reads or not any(self._made[id(a)].kind != "constant" for a in reads):
            # of constants alone: the exporter computes it beforehand
            if func is aten.t.default:
                made = torch.empty(args[0].shape[::-1], device="meta")
                if layer := self.layers.get(id(args[0])):
                    self.layers[id(made)] = layer
                    self._alive.append(made)
                return made
            return func(*args, **kwargs)
        result = self._result(func, args, kwargs)
        self._record(func, args, kwargs, given, result)
        return result

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in IN_PLACE:
            return args[0]
        if func in FIRST_OF and func is not aten.max_pool2d_with_indices.default:
            made = torch.empty(args[0].shape, device="meta")
            return made, made.new_empty(0), made.new_empty(0)
        try:
            shape = SHAPES[func](*args, **kwargs) if func in SHAPES else None
        except (IndexError, TypeError):  # a form of its arguments that is not foreseen
            shape = None
        if shape is None:
            return func(*args, **kwargs)
        made = torch.empty(tuple(shape), device="meta")
        return (made, made) if func in FIRST_OF else made

    def _record(self, func: Any, args: Any, kwargs: Any, given: Any, result: Any) -> None:
        name = str(func).split(".")[1].rstrip("_")
        name = NAMES.get(name, name)
        options, weight = _options(name, args, kwargs)
        skip = 1 if weight else None
        inputs = [self.op(a) for a in given]
        if name == "linear":
            x, y = given[-2:]
            inputs = [self.op(x)] if self.op(y).kind == "constant" else [self.op(x), self.op(y)]
        elif skip:
            inputs = inputs[:1]
        outputs = result if isinstance(result, (list, tuple)) else [result]
        if func in FIRST_OF:
            outputs = outputs[:1]
        if len(outputs) == 1:
            made = Op(name, inputs, tuple(outputs[0].shape), weight, options)
            if weight:
                made.layer = self.layers.get(id(args[-1 if name == "linear" else 1]), "")
            self.add(outputs[0], made)
            return
        whole = Op(name, inputs, inputs[0].shape, weight, options)
        self.ops.append(whole)
        for index, part in enumerate(outputs):
            self.add(part, Op("part", [whole], tuple(part.shape), (), {"index": index}))


def _options(name: str, args: Any, kwargs: Any) -> tuple[dict[str, Any], Dims]:
    """What the kernel depends on besides shapes, and the weight's shape."""
    if name == "convolution":
        return {
            "stride": tuple(args[3]), "padding": tuple(args[4]), "dilation": tuple(args[5]),
            "transposed": args[6], "groups": args[8],
        }, tuple(args[1].shape)  # fmt: skip
    if name == "linear":
        return {"bias": len(args) > 2}, tuple(args[-1].shape[::-1])
    if name in ("max_pool2d", "avg_pool2d"):
        kernel = tuple(args[1])
        return {
            "kernel": kernel,
            "stride": tuple(args[2]) if len(args) > 2 and args[2] else kernel,
        }, ()
    if name in ("batch_norm", "layer_norm", "group_norm"):
        return {}, (1,)
    if name == "permute":
        return {"axes": tuple(a % args[0].dim() for a in args[1])}, ()
    if name == "transpose":
        axes = list(range(args[0].dim()))
        a, b = args[1], args[2]
        axes[a], axes[b] = axes[b], axes[a]
        return {"axes": tuple(axes)}, ()
    if name in ("add", "mul", "sub", "div"):
        scalars = [a for a in args[:2] if not isinstance(a, Tensor)]
        return {"scalar": scalars[0]} if scalars else {}, ()
    if name == "clamp":
        low, high = (*args[1:3], None, None)[:2]
        return {"low": -1 if len(args) < 2 else low, "high": 1 if len(args) < 3 else high}, ()
    if name == "mean":
        return {"axes": tuple(a % args[0].dim() for a in args[1] or range(args[0].dim())),
                "keepdim": len(args) > 2 and args[2]}, ()  # fmt: skip
    if name == "cat":
        axis = args[1] if len(args) > 1 else 0
        return {"axis": axis % args[0][0].dim()}, ()
    if name in ("split", "unbind", "select", "slice", "softmax", "chunk"):
        place = 1 if name in ("unbind", "select", "slice", "softmax") else 2
        axis = args[place] if len(args) > place else 0
        found = {"axis": axis % args[0].dim()}
        if name in ("select", "slice"):
            found["rest"] = tuple(args[2:])
        return found, ()
    return {}, ()


# ---- one form ------------------------------------------------------------------------------------

IDENTITY = {"clone", "detach", "alias", "dropout", "contiguous", "_to_copy", "lift_fresh"}


def _simplified(ops: list[Op]) -> list[Op]:
    """Without what does nothing and what nobody reads; users known; BatchNorm folded."""
    stands: dict[int, Op] = {}
    kept: list[Op] = []
    for op in ops:
        op.inputs = [stands.get(id(i), i) for i in op.inputs]
        same = op.inputs[0].shape if op.inputs else None
        idle = op.kind in IDENTITY or (
            op.kind in ("view", "expand", "permute", "slice", "transpose") and op.shape == same
            and op.options.get("axes", range(len(op.shape))) == (tuple(range(len(op.shape)))
            if "axes" in op.options else range(len(op.shape)))
        )  # fmt: skip
        if idle:
            stands[id(op)] = op.inputs[0]
        elif op.kind == "view" and op.inputs[0].kind == "view":
            op.options["twice"] = True
            op.inputs = op.inputs[0].inputs[:]
            kept.append(op)
        else:
            kept.append(op)
    count_users(kept)
    folded: list[Op] = []
    stands = {}
    for op in kept:
        op.inputs = [stands.get(id(i), i) for i in op.inputs]
        before = op.inputs[0] if op.inputs else None
        if (
            op.kind == "batch_norm" and before is not None
            and before.kind in ("convolution", "linear") and len(before.users) == 1
        ):  # fmt: skip
            stands[id(op)] = before
        elif (scaled := _scaled(op)) is not None:
            stands[id(op)] = scaled
        else:
            folded.append(op)
    return alive(folded)


def _scaled(op: Op) -> Op | None:
    """What a factor for each channel multiplies, where it is folded into the layer before."""
    factors = [i for i in op.inputs if i.kind == "constant"]
    if op.kind != "mul" or len(op.inputs) != 2 or len(factors) != 1:
        return None
    (moved,) = (i for i in op.inputs if i is not factors[0])
    layer = moved
    while layer.kind in ("view", "permute", "transpose") and len(layer.users) == 1:
        layer = layer.inputs[0]
    if layer.kind not in ("convolution", "linear") or len(layer.users) > 1 or not layer.weight:
        return None
    channels = layer.shape[1 if layer.kind == "convolution" else -1]
    return moved if channels == factors[0].size == max(factors[0].shape) else None


def alive(ops: list[Op]) -> list[Op]:
    """Those that the output depends on, with their users."""
    wanted: set[int] = set()
    stack = [ops[-1]]
    while stack:
        op = stack.pop()
        if id(op) not in wanted:
            wanted.add(id(op))
            stack += op.inputs
    alive = [op for op in ops if id(op) in wanted]
    count_users(alive)
    return alive


def count_users(ops: Sequence[Op]) -> None:
    """Tell each operator what reads it."""
    for op in ops:
        op.users = []
    for op in ops:
        for source in op.inputs:
            source.users.append(op)
