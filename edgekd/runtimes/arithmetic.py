"""The trained graph in integers, rounded as a runtime's kernels round.

Computed in float32, a deep network moves by itself: a sum that lies between two integers rounds to
either, and one such element fills the output. Kernels leave no such choice. They add products of
8-bit integers in int32, which float64 holds exactly, and how they come back to 8 bits is written
down:

    convolution, linear layer, mean     round(float32(sum) · float32(factor)), half to even
    sum or product of two tensors       each runtime its own way, see `Rounding`

The factor is the scale of the sum over that of the output, each operation in float32. So the whole
network can be compared with a device's answers, bit for bit. Sources: XNNPACK's
`src/microparams-init.c`; ONNX Runtime's `mlas/lib/intrinsics/avx2/qladd_avx2.cpp` and, for Arm,
`mlas/lib/qladd.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate, map_arg

from edgekd.quantization.canonical import ACTIVATIONS
from edgekd.quantization.capture import WEIGHTED, arguments
from edgekd.quantization.fake_quant import FakeQuant, along
from edgekd.quantization.layers import quantizer_at
from edgekd.quantization.placement import (
    MOVING,
    WHOLE_POOL,
    fused_activation,
    operator_name,
    upper_bound,
)

aten = torch.ops.aten
# of 256 integers each: none of the results lies between two. LiteRT's HardSwish has 16 bits inside.
POINTWISE = {
    *ACTIVATIONS, aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default,
} - {aten.hardswish.default}  # fmt: skip
PAIRS: dict[Any, int] = {aten.add.Tensor: 1, aten.sub.Tensor: -1, aten.mul.Tensor: 0}


class Terms(NamedTuple):
    """Two quantized tensors that are added, and what their sum is quantized to.

    Attributes:
        a, b: in steps less their zero points.
        factors: the scale of each over that of the sum, in float32.
        zeros: zero points of `a`, `b` and the sum.
    """

    a: Tensor
    b: Tensor
    factors: tuple[Tensor, Tensor]
    zeros: tuple[int, int, int]


def in_fixed_point(terms: Terms, *, bits: int, away: bool) -> Tensor:
    """(a · A + b · B) / 2ⁿ, the larger of A and B of so many bits; half goes up, or away from 0."""
    first, second = (float(factor) for factor in terms.factors)
    shift = bits - math.frexp(max(abs(first), abs(second)))[1]
    left, right = (round(math.ldexp(factor, shift)) for factor in (first, second))
    total = math.ldexp(1, -shift) * (terms.a * left + terms.b * right)
    return total.sign() * (total.abs() + 0.5).floor() if away else (total + 0.5).floor()


def in_fused_products(terms: Terms) -> Tensor:
    """Two fused multiply-adds in float32, all zero points taken out beforehand.

    As compiled, the first of the zero points' products is fused as well.
    """

    def fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (x.double() * y.double() + z.double()).float()

    zeros = [torch.tensor(float(zero)) for zero in terms.zeros]
    first, second = terms.factors
    start = (zeros[2].double() - fused(first, zeros[0], second * zeros[1]).double()).float()
    total = fused(terms.a + zeros[0], first, fused(terms.b + zeros[1], second, start))
    return total.round().double() - zeros[2]


class Rounding(NamedTuple):
    """What a runtime's kernels do otherwise than the others'.

    Attributes:
        add: of two tensors: the sum in its steps, less its zero point.
        subtracts: the same kernel gives differences.
        zero_first: to a product of two tensors its zero point is added before it is rounded.
    """

    add: Callable[[Terms], Tensor]
    subtracts: bool
    zero_first: bool


XNNPACK = Rounding(partial(in_fixed_point, bits=21, away=False), subtracts=True, zero_first=False)
# ONNX Runtime's kernels, on x86 and on Arm
MLAS_X86 = Rounding(in_fused_products, subtracts=False, zero_first=True)
MLAS_ARM = MLAS_X86._replace(add=partial(in_fixed_point, bits=22, away=True))


class IntegerGraph(Interpreter):
    """The trained graph in float64, between quantizers whose integers are exact.

    Args:
        rounding: the runtime's; None: each quantizer rounds the real number once.

    Attributes:
        ends: node and value of each output.
        shapes: of all tensors.
        unknown: operators, by name, that have no rule here: theirs are real numbers, rounded once.
    """

    def __init__(self, graph: GraphModule, rounding: Rounding | None) -> None:
        super().__init__(graph)
        self.rounding = rounding
        self.ends: list[tuple[Node, Tensor]] = []
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self.unknown: set[str] = set()
        self._pairs: dict[Node, list[Tensor]] = {}  # what a sum or product reads, in steps

    def run_node(self, n: Node) -> Any:
        """The node's value; of the end, where the values of the outputs come from."""
        if n.op == "output":
            map_arg(n.args, lambda end: self.ends.append((end, self.env[end])))
        if self.rounding is not None and n.target in PAIRS:
            self._keep_pair(n)
        value: Any = self.quantized(n) if n.op == "call_module" else super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A weight or constant, in float64."""
        value = super().get_attr(target, args, kwargs)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Casts to float32 are to float64 here; scalars are as the network computes with them."""

        def widened(value: Any) -> Any:
            if isinstance(value, float):
                return torch.tensor(value).item()
            return torch.float64 if value is torch.float32 else value

        return super().call_function(
            target, map_aggregate(args, widened), map_aggregate(kwargs, widened)
        )

    def quantizer(self, node: Any) -> FakeQuant:
        """The one that `node` calls."""
        quantizer = self.module.get_submodule(str(node.target))
        assert isinstance(quantizer, FakeQuant)
        return quantizer

    def quantized(self, node: Node) -> Tensor:
        """The weight or activation in front of a quantizer, as it is behind."""
        quantizer, source = self.quantizer(node), arguments(node)[0]
        scale: Tensor = quantizer.scale.double()
        if source.op == "get_attr":
            # in float32, as weights are converted to integers
            weight: Tensor = quantizer(self.env[source].float()).double()
            scale = along(scale, weight, quantizer.ch_axis) if scale.dim() else scale
            return (weight / scale).round() * scale
        zero = int(quantizer.zero_point)
        steps = self._rounded(source, quantizer)
        own = steps.clamp(quantizer.low - zero, quantizer.high - zero)
        return self.given(source, own, scale) * scale

    def given(self, source: Node, own: Tensor, scale: Tensor) -> Tensor:
        """What goes on behind `source`'s quantizer, in steps less the zero point: `own`."""
        return own

    # ---- rounding --------------------------------------------------------------------------------

    def _quantizer_of(self, node: Any) -> FakeQuant | None:
        """That made the integers in `node`; None where it has floats."""
        while isinstance(node, Node) and node.target in MOVING:
            node = arguments(node)[0]
        assert isinstance(self.module, GraphModule)
        return quantizer_at(self.module, node) if isinstance(node, Node) else None

    def _keep_pair(self, node: Node) -> None:
        """The integers that a sum or product of two quantized tensors reads, for its quantizer."""
        assert self.rounding is not None
        sides = arguments(node)[:2]
        quantizers: list[Any] = [self._quantizer_of(side) for side in sides]
        quantizes = any(user.op == "call_module" for user in fused_activation(node).users)
        known = PAIRS[node.target] >= 0 or self.rounding.subtracts
        if known and quantizes and not node.kwargs and None not in quantizers:
            self._pairs[node] = [
                (self.env[side] / quantizer.scale.double()).round()
                for side, quantizer in zip(sides, quantizers, strict=True)
            ]

    def _rounded(self, source: Node, quantizer: FakeQuant) -> Tensor:
        """What a kernel that gives `source` to `quantizer` gives, in steps, not clamped."""
        x: Tensor = self.env[source]
        scale = quantizer.scale.detach()
        if source.op == "placeholder":
            return (x.float() / scale).round().double()
        real = (x / scale.double()).round()
        if self.rounding is None:
            return real
        # a clip and a rounding may change places: the ends of the clip are whole steps
        made = source if upper_bound(source) is None else arguments(source)[0]
        inputs: list[Any] = [self._quantizer_of(side) for side in arguments(made)[:2]]
        if made in self._pairs:
            return self._paired(made, inputs, quantizer)
        if made.target in WEIGHTED and None not in inputs:
            axis = x.dim() - 1 if made.target is aten.linear.default else 1

            def spread(scales: Tensor) -> Tensor:
                return along(scales, x, axis) if scales.numel() > 1 else scales

            first, second = (side.scale.detach() for side in inputs)
            exact = spread(first.double() * second.double())
            return self._scaled(x / exact, spread(first * second / scale))
        whole = made.target is aten.mean.dim or (
            made.target is WHOLE_POOL and math.prod(self.shapes[made][2:]) == 1
        )
        if whole and inputs[0] is not None:
            first = inputs[0].scale.detach()
            count = math.prod(self.shapes[arguments(made)[0]]) // math.prod(self.shapes[made])
            return self._scaled(x * count / first.double(), first / (scale * count))
        if not self._alike(source, scale):
            self.unknown.add(operator_name(made))
        return real

    def _scaled(self, total: Tensor, factor: Tensor, zero: int = 0) -> Tensor:
        """An integer sum times a factor in float32."""
        steps: Tensor = (total.round().float() * factor + zero).round().double() - zero
        return steps

    def _paired(self, made: Node, inputs: list[FakeQuant], output: FakeQuant) -> Tensor:
        """Sum, difference or product of two tensors' integers."""
        assert self.rounding is not None
        a, b = self._pairs.pop(made)
        first, second = (side.scale.detach() for side in inputs)
        scale, zero, sign = output.scale.detach(), int(output.zero_point), PAIRS[made.target]
        if not sign:
            return self._scaled(
                a * b, first * second / scale, zero if self.rounding.zero_first else 0
            )
        zero_a, zero_b = (int(side.zero_point) for side in inputs)
        factors = first / scale, sign * second / scale
        return self.rounding.add(Terms(a, b, factors, (zero_a, zero_b, zero)))

    def _alike(self, source: Node, scale: Tensor) -> bool:
        """Whether each value of `source` is of one integer: moved, or looked up."""
        ahead = [source]
        while ahead:
            node = ahead.pop()
            if node.op == "call_module":
                continue
            if node.target is aten.cat.default:
                parts = arguments(node)[0]
                made = [self._quantizer_of(part) for part in parts]
                if any(each is None or each.scale != scale for each in made):
                    return False
            elif node.target in MOVING or node.target in POINTWISE or upper_bound(node) is not None:
                ahead.append(arguments(node)[0])
            else:
                return False
        return True
