"""The choice under a budget, with devices made of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.choosing.choice import MARGIN, ROUNDS, Choice, choose
from edgekd.choosing.members import Candidate
from edgekd.errors import RecipeError
from edgekd.latency.model import Estimate
from edgekd.latency.tracing import Op
from edgekd.network import Network
from edgekd.recipe import StudentSection
from edgekd.target import Precision, Target

HOST = Target.load("host-onnxruntime")
NANO = Target.load("jetson-nano")


def candidate(width: int, ratio: float | None = None) -> Candidate:
    with torch.device("meta"):
        net = Network(nn.Conv2d(3, width, 3), torch.zeros(1, 3, 8, 8))
    section = StudentSection(model="test", kwargs={"width": width})
    return Candidate.of(net, f"width={width}", section, ratio)


def width_of(ops: list[Op]) -> int:
    return next(op.weight[0] for op in ops if op.kind == "convolution")


def takes_ms(ops: list[Op], precision: str = "int8") -> float:
    """What the device does: 10 µs, and 1 µs a channel; half as fast in float."""
    width = width_of(ops)
    return (10 + width) / 1000 * (1 if precision == "int8" else 2)


class Model:
    """Estimates that are off by a factor of each width's own, mended by what is measured."""

    def __init__(self, off: float = 1.0, spread: float = 0.0, factor: float = 1.0) -> None:
        self.off, self.spread, self.factor = off, spread, factor

    def estimate(self, net: list[Op], precision: str) -> float:
        width = width_of(net)
        odd = math.exp(self.spread * np.random.default_rng(width).standard_normal())
        return takes_ms(net, precision) * self.off * odd * self.factor

    def estimate_many(
        self, nets: Sequence[tuple[list[Op], None]], precision: Precision
    ) -> list[Estimate]:
        return [
            Estimate(p50_ms=(ms := self.estimate(net, precision)), low_ms=ms / 1.5,
                     high_ms=1.5 * ms, method="model", basis="arithmetic")
            for net, _ in nets
        ]  # fmt: skip

    def corrected(self, measured: Sequence[tuple[list[Op], Precision, float]]) -> Model:
        gaps = [math.log(ms / self.estimate(net, p)) for net, p, ms in measured]
        return Model(self.off, self.spread, math.exp(sum(gaps) / len(gaps)))


def chosen(
    budget_ms: float, model: Model, *, widths: Sequence[int] = range(4, 200, 4), **options: Any
) -> tuple[Choice, list[int]]:
    """The choice, and the widths that were measured."""
    tried: list[int] = []

    def measure(candidate: Candidate) -> dict[str, dict[Precision, float]]:
        tried.append(width_of(candidate.ops))
        return {HOST.name: {p: takes_ms(candidate.ops, p) for p in ("fp32", "int8")}}

    choice = choose(
        [candidate(w) for w in widths], targets=[HOST], budget_ms={HOST.name: budget_ms},
        models={HOST.name: model}, measure=measure, measurable={HOST.name}, **options,
    )  # fmt: skip
    return choice, tried


@pytest.mark.parametrize("off", [0.5, 0.8, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("budget_ms", [0.02, 0.05, 0.1, 0.15])
def test_what_is_chosen_was_measured_inside_and_uses_the_budget(off: float, budget_ms: float):
    choice, tried = chosen(budget_ms, Model(off, spread=0.05))
    (price,) = choice.chosen.prices
    assert price.measured_ms is not None
    assert 0.85 * budget_ms <= price.measured_ms <= (1 - MARGIN) * budget_ms
    assert price.precision == "int8"
    assert len(tried) == len(set(tried)) == len(choice.rounds) <= ROUNDS
    assert choice.considered == 49
    assert choice.chosen.member not in [p.member for p in choice.left_out]


def test_the_largest_member_is_reached():
    choice, tried = chosen(10.0, Model())
    assert choice.chosen.member.section.kwargs == {"width": 196}
    assert tried == [196]


def test_a_budget_out_of_reach_names_the_fastest_member_and_what_it_took():
    with pytest.raises(
        RecipeError,
        match=r"budget\.latency_ms = 0\.005 on host-onnxruntime is out of reach: the nearest of 49 "
        r"members \(width=4\) takes 0\.014 ms, measured",
    ):
        chosen(0.005, Model(off=0.7))


def test_a_model_that_says_too_much_does_not_hide_what_is_inside():
    choice, _ = chosen(0.015, Model(off=3.0))
    assert choice.chosen.member.section.kwargs == {"width": 4}


def test_without_a_device_the_upper_bound_has_to_be_inside():
    choice = choose(
        [candidate(w) for w in range(4, 200, 4)], targets=[NANO], budget_ms={NANO.name: 0.3},
        models={NANO.name: Model()}, measure=None, measurable=(),
    )  # fmt: skip
    (price,) = choice.chosen.prices
    # 1.5 × 2 × (10 + 88) µs is inside, with four channels more it is not
    assert choice.chosen.member.section.kwargs == {"width": 88}
    assert (price.precision, price.measured_ms, choice.rounds) == ("fp16", None, ())
    with pytest.raises(RecipeError, match=r"is estimated at 0\.028 ms \(0\.0187 to 0\.042\)"):
        choose(
            [candidate(w) for w in (4, 8)], targets=[NANO], budget_ms={NANO.name: 0.01},
            models={NANO.name: Model()}, measure=None, measurable=(),
        )  # fmt: skip


def test_every_budget_counts():
    def measure(candidate: Candidate) -> dict[str, dict[Precision, float]]:
        return {HOST.name: {"int8": takes_ms(candidate.ops)}}

    choice = choose(
        [candidate(w) for w in range(4, 200, 4)], targets=[HOST, NANO],
        budget_ms={HOST.name: 0.1, NANO.name: 0.12},
        models={HOST.name: Model(), NANO.name: Model()}, measure=measure, measurable={HOST.name},
    )  # fmt: skip
    assert choice.chosen.member.section.kwargs == {"width": 28}
    assert [p.measured_ms is None for p in choice.chosen.prices] == [False, True]


def test_pruned_variants_of_what_is_somewhat_over_are_considered():
    asked: list[int] = []

    def variants(whole: Candidate) -> list[Candidate]:
        width = width_of(whole.ops)
        asked.append(width)
        return [candidate(width // 2, ratio=0.5)]

    choice, _ = chosen(0.06, Model(), widths=[8, 100, 1000], variants=variants)
    assert asked == [100]  # 1000 stays over, whatever is cut off
    assert (
        choice.chosen.member.ratio is None
        or choice.chosen.member.params == candidate(50).member.params
    )
    choice, _ = chosen(0.065, Model(), widths=[8, 100, 1000], variants=variants)
    assert (choice.chosen.member.ratio, choice.chosen.member.section.kwargs) == (0.5, {"width": 50})


def test_what_a_device_took_before_corrects_the_choice():
    def known(candidate: Candidate) -> dict[str, dict[Precision, float]]:
        if candidate.member.section.kwargs != {"width": 88}:
            return {}
        return {NANO.name: {"fp16": 0.4}}

    options: dict[str, Any] = {
        "targets": [NANO], "budget_ms": {NANO.name: 0.3}, "models": {NANO.name: Model()},
        "measure": None, "measurable": (),
    }  # fmt: skip
    found = [candidate(w) for w in range(4, 200, 4)]
    choice = choose(found, **options, known=known)
    # estimates are now 0.4 / 0.196 times as high
    assert choice.chosen.member.section.kwargs == {"width": 36}
    kept = choose(found, **options | {"budget_ms": {NANO.name: 0.42}}, known=known)
    assert kept.chosen.prices[0].measured_ms == 0.4
    assert kept.chosen.member.section.kwargs == {"width": 88}
