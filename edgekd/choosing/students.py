"""A recipe's students: found, priced, tried and chosen."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import TypeAdapter

from edgekd.choosing.choice import Choice, Priced, choose, price
from edgekd.choosing.members import Builder, Candidate, candidates, pruned_variants
from edgekd.data.base import Data
from edgekd.files import write_atomically
from edgekd.latency.model import LatencyModel
from edgekd.latency.profiles import device_rows
from edgekd.network import Network
from edgekd.recipe import PruneSection, Recipe
from edgekd.reporting.progress import Progress, console
from edgekd.stages.export import export
from edgekd.stages.profile import profile_together
from edgekd.stages.prune import prune
from edgekd.stages.quantize import quantize
from edgekd.target import Precision, QuantScheme, Target

CALIBRATION = 64  # samples: the scales of untrained weights are good for nothing but their number
Trial = dict[str, dict[Precision, float]]


def priced_students(
    recipe: Recipe, targets: Sequence[Target], *, data: Data, build: Builder
) -> list[Priced]:
    """Every member that the recipe allows, with its estimated latency; the largest first.

    Args:
        build: the network of a section, for `data`.
    """
    found = _found(recipe, targets, data, build)
    priced = price(found, targets, _models(recipe, targets))
    return sorted(priced, key=lambda p: p.member.capacity, reverse=True)


def choose_student(
    recipe: Recipe, targets: Sequence[Target], *, data: Data, build: Builder, folder: Path
) -> Choice:
    """The recipe's student under its budget, see `choose`.

    Args:
        folder: what is measured is kept there, so that a broken-off choice goes on.

    Raises:
        RecipeError: no member is inside the budget.
        TargetError: nothing is known of a target's latency.
    """
    budgeted = [target for target in targets if target.name in recipe.budget_ms]
    can = [t for t in budgeted if t.native_here or t.name in recipe.devices]
    section, round_to = recipe.prune, multiple(recipe, targets)

    def measure(candidate: Candidate) -> Trial:
        member = candidate.member
        digest = hashlib.sha256(member.model_dump_json().encode()).hexdigest()[:12]
        kept, format_ = folder / f"{digest}.json", TypeAdapter(Trial)
        if not kept.is_file():
            console.print(f"choose: building and measuring {member.name}", markup=False)
            net = build(member.section)
            if section is not None and (section.ratio != "auto" or member.ratio):
                net = prune(net, **_goals(section, member.ratio), round_to=round_to)
            found = _tried(net, can, recipe, data)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, format_.dump_json(found))
        return format_.validate_json(kept.read_bytes())

    # measured by hand on devices that no link reaches, see `edgekd profile --import`
    took: dict[str | None, dict[str, dict[Precision, float]]] = {}
    for target in budgeted:
        for row in () if target in can else device_rows(target):
            known = took.setdefault(row.network, {}).setdefault(target.name, {})
            known[row.precision] = row.p50_ms
    auto = section is not None and section.ratio == "auto"
    return choose(
        _found(recipe, targets, data, build),
        targets=budgeted,
        budget_ms=recipe.budget_ms,
        models=_models(recipe, budgeted),
        measure=measure if can else None,
        measurable={target.name for target in can},
        variants=(lambda c: pruned_variants(c, section, build=build, round_to=round_to))
        if auto and section is not None else None,
        known=lambda c: took.get(c.architecture, {}),
    )  # fmt: skip


def multiple(recipe: Recipe, targets: Sequence[Target]) -> int:
    """Of the channels that pruning keeps: the recipe's, or what all targets take."""
    given = recipe.prune.round_to if recipe.prune else None
    return given or math.lcm(*(target.channel_multiple.value for target in targets))


def with_choice(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe as it would have been written for the chosen member."""
    member = choice.chosen.member
    student = recipe.student.model_copy(
        update={**dict(member.section), "space": None, "models": ()}
    )  # fmt: skip
    section = recipe.prune
    if section is not None and section.ratio == "auto":
        ratio = member.ratio
        section = section.model_copy(update={"ratio": ratio}) if ratio else None
    return recipe.model_copy(update={"student": student, "prune": section})


def _found(
    recipe: Recipe, targets: Sequence[Target], data: Data, build: Builder
) -> list[Candidate]:
    found = []
    with Progress("students", None) as progress:
        for candidate in candidates(
            recipe.student, recipe.prune, build=build, side=data.image_shape[-1],
            round_to=multiple(recipe, targets),
        ):  # fmt: skip
            found.append(candidate)
            progress.advance(candidate.member.name)
    return found


def _models(recipe: Recipe, targets: Sequence[Target]) -> dict[str, LatencyModel]:
    threads = recipe.profile.threads
    return {target.name: LatencyModel.load(target, threads=threads) for target in targets}


def _goals(section: PruneSection, ratio: float | None) -> dict[str, Any]:
    goals = section.model_dump(include={"ratio", "macs", "params", "ignore"})
    return goals | ({"ratio": ratio} if section.ratio == "auto" else {})


def _tried(net: Network, targets: Sequence[Target], recipe: Recipe, data: Data) -> Trial:
    """p50 in ms of what would ship of `net`, its weights as they are."""
    quantized: dict[QuantScheme, Network] = {}
    found: Trial = {}
    for target in targets:
        nets = [net] if target.float_precision else []
        if target.scheme is not None:
            if target.scheme not in quantized:
                quantized[target.scheme] = quantize(
                    net, target=target, data=data, calibration=CALIBRATION, observer="minmax",
                    correct_bias=False,
                )  # fmt: skip
            nets.append(quantized[target.scheme])
        with TemporaryDirectory() as folder:
            artifacts = [
                export(each, target=target, out=Path(folder) / str(i))
                for i, each in enumerate(nets)
            ]
            measured = profile_together(
                artifacts, target=target, device=recipe.devices.get(target.name, "local"),
                **recipe.profile.model_dump(),
            )  # fmt: skip
        found[target.name] = {
            artifact.precision: m.p50_ms for artifact, m in zip(artifacts, measured, strict=True)
        }
    return found
