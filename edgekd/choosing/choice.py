"""The student under a latency budget: priced by the latency model, measured, corrected, chosen.

Before any long training. The largest member that the model holds to be inside the budget is built
as it will ship (pruned, in integers, exported; its weights untrained, as shapes set latency) and
measured. What is measured corrects the model, and the choice is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from edgekd.choosing.members import Candidate, Member
from edgekd.errors import RecipeError
from edgekd.latency.model import Estimate, LatencyModel
from edgekd.reporting.progress import console
from edgekd.target import Precision, Target

ROUNDS = 5
MARGIN = 0.03  # of the budget: what repeats of a measurement differ by on a busy host
CAUTION = 0.97  # of it, for each corrected estimate that was too low
USED = 0.85  # of the budget: below, larger members are measured that are estimated somewhat over
HOPEFUL = 1.1
LARGEST_OVER = 3.0  # times the budget: what half the channels of every layer may still mend
MOST_PRUNED = 60  # members that "auto" prunes to price them
NEAREST_LEFT_OUT = 10  # members that a report names

# target -> precision -> p50 in ms, of one candidate as it would ship
Measured = Mapping[str, Mapping[Precision, float]]


class Price(BaseModel):
    """One member on one target: the faster of the precisions that would ship.

    Attributes:
        estimate: of the model as it was corrected at last.
        measured_ms: None where it was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    target: str
    precision: Precision
    estimate: Estimate
    measured_ms: float | None = None

    @property
    def best_ms(self) -> float:
        """Measured, or else estimated."""
        return self.estimate.p50_ms if self.measured_ms is None else self.measured_ms

    @property
    def said(self) -> str:
        """For tables: the estimate, and what was measured."""
        measured = "" if self.measured_ms is None else f", measured {self.measured_ms:.3g} ms"
        return f"{self.estimate}{measured}"


class Priced(BaseModel):
    """A member, and what it costs on each target that has a budget."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    member: Member
    prices: tuple[Price, ...]


class Choice(BaseModel):
    """The chosen member, how it came about, and the members beside it.

    Attributes:
        budget_ms: by target.
        rounds: the members that were measured, in turn, with the estimates made before.
        left_out: the nearest in size of those that were not chosen, the largest first.
        considered: how many members were priced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    chosen: Priced
    budget_ms: dict[str, float]
    rounds: tuple[Priced, ...]
    left_out: tuple[Priced, ...]
    considered: int

    @property
    def rows(self) -> list[tuple[str, Priced]]:
        """(what became of it, member), for tables."""
        tried = [p for p in self.rounds if p.member != self.chosen.member]
        known = [priced.member for priced in tried]
        return [
            ("chosen", self.chosen),
            *(("tried", priced) for priced in tried),
            *(("left out", p) for p in self.left_out if p.member not in known),
        ]


def choose(
    found: Sequence[Candidate],
    *,
    targets: Sequence[Target],
    budget_ms: Mapping[str, float],
    models: Mapping[str, LatencyModel],
    measure: Callable[[Candidate], Measured] | None,
    measurable: Collection[str],
    variants: Callable[[Candidate], Iterable[Candidate]] | None = None,
    known: Callable[[Candidate], Measured] = lambda _: {},
) -> Choice:
    """The largest candidate by expected accuracy inside every target's budget.

    Args:
        found: at least one.
        targets: those with a budget.
        models: of each target.
        measure: what a candidate takes on the targets in `measurable`; at most ROUNDS times.
        measurable: targets that can be measured; on the others the upper bound of the estimate
            has to be inside the budget.
        variants: of one candidate, smaller ones; those of candidates somewhat over the budget are
            considered too.
        known: what a candidate took on the other targets when it was measured there before.

    Raises:
        RecipeError: no candidate is inside; the fastest one's latency is named.
    """
    found = list(found)
    if variants is not None:
        for index in _somewhat_over(price(found, targets, models), budget_ms):
            found += variants(found[index])
    measured = {i: took for i, candidate in enumerate(found) if (took := known(candidate))}
    tried: set[int] = set()
    rounds: list[Priced] = []
    while True:
        prices = _prices(found, targets, _corrected(models, found, measured), measured)
        # corrected estimates that were too low all the same make the next choice more careful
        share = (1 - MARGIN) * CAUTION ** sum(_share(r, budget_ms) > 1 for r in rounds[1:])
        inside = [i for i, p in enumerate(prices) if _fits(p, budget_ms, measurable, share)]
        if inside:
            best = max(inside, key=lambda i: found[i].member.capacity)
        else:
            best = min(range(len(found)), key=lambda i: _share(prices[i], budget_ms))
        if not measurable or len(rounds) == ROUNDS:
            break
        if best in tried:
            larger = [
                i for i, p in enumerate(prices)
                if i not in tried and found[i].member.capacity > found[best].member.capacity
                and _share(p, budget_ms) <= HOPEFUL
            ]  # fmt: skip
            if not inside or _share(prices[best], budget_ms) >= USED or not larger:
                break
            best = min(larger, key=lambda i: _share(prices[i], budget_ms))
        assert measure is not None
        measured[best] = {**measured.get(best, {}), **measure(found[best])}
        tried.add(best)
        rounds.append(_prices([found[best]], targets, models, {0: measured[best]})[0])
        console.print(f"  {_in_words(rounds[-1])}", markup=False)
    sure = [i for i in inside if i in tried or not measurable]
    if not sure:
        nearest = min(tried or [best], key=lambda i: _share(prices[i], budget_ms))
        raise RecipeError(_out_of_reach(prices[nearest], budget_ms, len(found)))
    best = max(sure, key=lambda i: found[i].member.capacity)
    by_size = sorted(
        (p for i, p in enumerate(prices) if i != best),
        key=lambda p: abs(math.log(p.member.capacity / found[best].member.capacity)),
    )
    left_out = sorted(
        by_size[:NEAREST_LEFT_OUT], key=lambda p: p.member.capacity, reverse=True
    )  # fmt: skip
    return Choice(
        chosen=prices[best], budget_ms=dict(budget_ms), rounds=tuple(rounds),
        left_out=tuple(left_out), considered=len(found),
    )  # fmt: skip


def price(
    found: Sequence[Candidate], targets: Sequence[Target], models: Mapping[str, LatencyModel]
) -> list[Priced]:
    """What each candidate is estimated to take on each target."""
    return _prices(found, targets, models, {})


def _corrected(
    models: Mapping[str, LatencyModel],
    found: Sequence[Candidate],
    measured: Mapping[int, Measured],
) -> dict[str, LatencyModel]:
    """The models, each with what was measured on its target."""
    corrected = {}
    for name, model in models.items():
        known = [
            (found[i].ops, precision, p50_ms)
            for i, of_targets in measured.items()
            for precision, p50_ms in of_targets.get(name, {}).items()
        ]
        corrected[name] = model.corrected(known) if known else model
    return corrected


def _prices(
    found: Sequence[Candidate],
    targets: Sequence[Target],
    models: Mapping[str, LatencyModel],
    measured: Mapping[int, Measured],
) -> list[Priced]:
    nets = [(candidate.ops, None) for candidate in found]
    prices: list[list[Price]] = [[] for _ in found]
    for target in targets:
        ships = [p for p in (target.float_precision, "int8" if target.scheme else None) if p]
        estimates = {p: models[target.name].estimate_many(nets, p) for p in ships}
        for index, into in enumerate(prices):
            known = measured.get(index, {}).get(target.name, {})
            ms = known or {p: estimates[p][index].p50_ms for p in ships}
            faster = min(ms, key=ms.__getitem__)
            into.append(
                Price(
                    target=target.name, precision=faster, estimate=estimates[faster][index],
                    measured_ms=known.get(faster),
                )
            )  # fmt: skip
    return [
        Priced(member=candidate.member, prices=tuple(of_targets))
        for candidate, of_targets in zip(found, prices, strict=True)
    ]


def _fits(
    priced: Priced, budget_ms: Mapping[str, float], measurable: Collection[str], share: float
) -> bool:
    """Inside every budget; an estimate that will be measured, inside that share of it."""

    def fits(price: Price) -> bool:
        budget = budget_ms[price.target]
        if price.measured_ms is not None:
            return price.measured_ms <= (1 - MARGIN) * budget
        if price.target in measurable:
            return price.estimate.p50_ms <= share * budget
        return price.estimate.high_ms <= budget

    return all(map(fits, priced.prices))


def _share(priced: Priced, budget_ms: Mapping[str, float]) -> float:
    """Of the budget, on the target where it is the largest."""
    return max(p.best_ms / budget_ms[p.target] for p in priced.prices)


def _somewhat_over(prices: Sequence[Priced], budget_ms: Mapping[str, float]) -> list[int]:
    """Those that pruning may bring inside, spread evenly over their sizes."""
    shares = [(_share(priced, budget_ms), i) for i, priced in enumerate(prices)]
    over = [i for share, i in sorted(shares) if 1 < share < LARGEST_OVER]
    return over[:: math.ceil(len(over) / MOST_PRUNED) or 1]


def _in_words(priced: Priced) -> str:
    costs = "; ".join(f"{p.target} {p.precision} {p.said}" for p in priced.prices)
    return f"{priced.member.title}: {costs}"


def _out_of_reach(fastest: Priced, budget_ms: Mapping[str, float], count: int) -> str:
    worst = max(fastest.prices, key=lambda p: p.best_ms / budget_ms[p.target])
    if worst.measured_ms is None:
        bounds = f"{worst.estimate.low_ms:.3g} to {worst.estimate.high_ms:.3g}"
        takes = f"is estimated at {worst.estimate.p50_ms:.3g} ms ({bounds})"
    else:
        takes = f"takes {worst.measured_ms:.3g} ms, measured"
    return (
        f"budget.latency_ms = {budget_ms[worst.target]:g} on {worst.target} is out of reach: the "
        f"nearest of {count} members ({fastest.member.title}) {takes}; raise the budget, or allow "
        "smaller members in student.space"
    )
