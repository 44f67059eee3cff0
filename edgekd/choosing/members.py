"""The students that a recipe allows: every combination of its model's arguments, and named models.

A member is described by shapes alone: its module lives on the meta device, without any weights,
unless it is pruned, which needs some.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from edgekd.errors import ModelError, RecipeError
from edgekd.latency.fusion import kernels_of
from edgekd.latency.model import traced
from edgekd.latency.tracing import Op
from edgekd.models.build import SPACES
from edgekd.network import Network
from edgekd.recipe import ChosenSection, PruneSection, StudentSection
from edgekd.stages.prune import narrowed

AUTO_RATIOS = (0.125, 0.25, 0.375, 0.5)

Builder = Callable[[StudentSection], Network]


class Member(BaseModel):
    """One student, as it would be trained.

    Attributes:
        name: the model, and the arguments that other members have otherwise.
        ratio: of pruning, where that is chosen too.
        params, macs: once it is pruned as the recipe says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    section: StudentSection
    ratio: float | None = None
    params: int
    macs: int

    @property
    def title(self) -> str:
        """The name, and the ratio."""
        return self.name + (f", pruned by {self.ratio:g}" if self.ratio else "")

    @property
    def capacity(self) -> float:
        """What the expected accuracy rises with: the geometric mean of parameters and MACs.

        Either alone misleads: few parameters at a high resolution, or many at a low one. Compound
        scaling balances them (Tan and Le 2019, arXiv:1905.11946 §3.3).
        """
        return float((self.params * self.macs) ** 0.5)


@dataclass(frozen=True)
class Candidate:
    """A member with what the latency model sees of it.

    Attributes:
        architecture: of its network, see `Network.architecture`.
    """

    member: Member
    ops: list[Op]
    architecture: str | None = None

    @staticmethod
    def of(net: Network, name: str, section: StudentSection, ratio: float | None) -> Candidate:
        """The member that is this network, by its shapes alone."""
        ops = traced(net)
        macs = sum(kernel.macs for kernel in kernels_of(ops, "openvino", None))
        member = Member(name=name, section=section, ratio=ratio, params=net.params, macs=macs)
        return Candidate(member, ops, net.architecture)


def candidates(
    student: ChosenSection, prune: PruneSection | None, *, build: Builder, side: int, round_to: int
) -> Iterator[Candidate]:
    """Every different member, pruned by the recipe's goal; by no ratio yet where that is "auto".

    Args:
        build: the network of a section, for the recipe's data.
        side: pixels of the data's images.
        round_to: multiple of the channels that pruning keeps.

    Raises:
        RecipeError: `space` has an argument that the model does not take, or no member is left.
    """
    seen: set[str] = set()
    found = False
    fixed = prune is not None and prune.ratio != "auto"
    for name, section in _sections(student, side):
        with torch.device("cpu" if fixed else "meta"):
            net = build(section.model_copy(update={"weights": None}))
        if (structure := _structure(net.module)) in seen:
            continue
        seen.add(structure)
        if fixed:
            assert prune is not None
            net = _pruned(net, prune, prune.ratio, round_to)
            if not net.resized:
                continue  # prune refuses what it cannot make narrower
        found = True
        yield Candidate.of(net, name, section, None)
    if not found:
        raise RecipeError(
            "student: no member is left; pruning makes none of them narrower: a larger goal in "
            "[prune], or wider members"
        )


def pruned_variants(
    candidate: Candidate, prune: PruneSection, *, build: Builder, round_to: int
) -> Iterator[Candidate]:
    """A member pruned by each of AUTO_RATIOS that leaves something else than the one before."""
    member = candidate.member
    whole, before = build(member.section), member.params
    for ratio in AUTO_RATIOS:
        net = _pruned(whole, prune, ratio, round_to)
        if net.params < before:
            before = net.params
            yield Candidate.of(net, member.name, member.section, ratio)


def _structure(module: nn.Module) -> str:
    """The plain values and the shapes that tell a module from others."""
    plain = (bool, int, float, str, tuple)
    values = [
        (path, {k: v for k, v in vars(each).items() if isinstance(v, plain)})
        for path, each in module.named_modules()
    ]
    return repr((values, [(name, tuple(p.shape)) for name, p in module.named_parameters()]))


def _pruned(net: Network, prune: PruneSection, ratio: Any, round_to: int) -> Network:
    goals = {"ratio": ratio, "macs": prune.macs, "params": prune.params}
    try:
        return narrowed(net, goals, round_to=round_to, ignore=prune.ignore)
    except (ModelError, RecipeError):  # it has nothing to remove, or not as much
        return net


def _sections(student: ChosenSection, side: int) -> Iterator[tuple[str, StudentSection]]:
    """(name, section) of all combinations, then of the further models."""
    space: Mapping[str, Sequence[Any]] = student.space or {}
    if student.space is None and student.weights is None and student.model in SPACES:
        space = SPACES[student.model](student.kwargs, side)
    for values in itertools.product(*space.values()):
        chosen = dict(zip(space, values, strict=True))
        kwargs = student.kwargs | {k: v for k, v in chosen.items() if v is not None}
        section = StudentSection(model=student.model, kwargs=kwargs, weights=student.weights)
        yield _name(student.model, chosen), section
    for section in student.models:
        yield _name(section.model, section.kwargs), section


def _name(model: str, kwargs: dict[str, Any]) -> str:
    said = (f"{key}={_short(value)}" for key, value in kwargs.items() if value is not None)
    return " ".join([model, *said])


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "-".join(map(str, value))
    return str(value)
