"""prune: a narrower network, with whole channels removed."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from edgekd.data.base import BatchSource
from edgekd.errors import ModelError, RecipeError, nearest
from edgekd.knowledge.feature import HintLoss
from edgekd.knowledge.taps import Hints
from edgekd.knowledge.teachers import TeacherLike
from edgekd.network import Network
from edgekd.pruning.check import check
from edgekd.pruning.groups import Group, find_groups, kept_channels
from edgekd.pruning.layers import Kept, select
from edgekd.reporting.progress import console
from edgekd.rundir import RunDir
from edgekd.stages.distill import distill
from edgekd.target import Target
from edgekd.tasks.base import Task

DEFAULT_MULTIPLE = 8


def prune(
    net: Network,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    round_to: int | None = None,
    target: str | Target | None = None,
    ignore: Iterable[str] = (),
    task: Task | None = None,
    data: BatchSource | None = None,
    teacher: TeacherLike | Sequence[TeacherLike] | None = None,
    epochs: int = 0,
    alpha: float = 0.9,
    hints: Hints = (),
    hint_weight: float = 1.0,
    hint_loss: HintLoss = "fitnets",
    cache: Path | None = None,
    batch_size: int = 128,
    lr: float = 0.05,
    weight_decay: float = 5e-4,
    seed: int = 0,
    accelerator: str = "auto",
    run: RunDir | None = None,
) -> Network:
    """A copy of `net` with whole channels removed, retrained if `epochs`.

    Every group of tied channels loses the same share, the least important ones first: importances
    of different groups have no common scale, and after rounding a network-wide ranking starves the
    narrow layers. Widths are multiples, because kernels take odd ones no faster. Layers that cannot
    be narrower are named on the terminal.

    Args:
        net: a float network.
        ratio: share of the channels to remove, 0 to 1. Give this, `macs` or `params`.
        macs: multiply-accumulates of one sample to keep at most: a count, or, as a float up to
            1.0, a share of those there are. The widest network that meets it is taken.
        params: weights and biases to keep at most, likewise.
        round_to: channels are kept in multiples of this; 8 if neither it nor `target` is given.
        target: a Target or its name, for its `channel_multiple`.
        ignore: module paths; the layers there keep all their channels, inputs included.
        task, data, teacher, alpha, hints, hint_weight, hint_loss, cache, batch_size, lr,
            weight_decay, seed, accelerator, run: of the retraining, see `distill`.
        epochs: of retraining; 0 leaves it out.

    Raises:
        RecipeError: not one goal, a value out of range, a goal that cannot be reached, or epochs
            without task and data.
        ModelError: `net` is quantized, nothing in it can be removed, or its code does not work
            with fewer channels; what to `ignore` is named.

    Example:
        >>> import torch, edgekd
        >>> module = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 4, 3))
        >>> net = edgekd.Network(module, torch.zeros(1, 3, 16, 16))
        >>> edgekd.prune(net, ratio=0.5, round_to=8).resized
        {'0': {'out_channels': 16}, '1': {'in_channels': 16}}
    """
    if net.scheme is not None:
        raise ModelError("prune takes a float network; this one is quantized: prune it before")
    if epochs and (task is None or data is None):
        raise RecipeError(f"prune: epochs = {epochs} retrains; give task and data, or epochs=0")
    if round_to is None:
        given = None if target is None else Target.load(target).channel_multiple.value
        round_to = given or DEFAULT_MULTIPLE
    elif round_to < 1:
        raise RecipeError(f"prune: round_to is {round_to}; give 1 or more")
    goals = {"ratio": ratio, "macs": macs, "params": params}
    groups, ratio, kept = _plan(net, goals, round_to, ignore)
    _name_whole(groups, ratio, round_to)
    if ratio and not kept:
        raise ModelError(
            f"prune: a ratio of {ratio:g} in multiples of {round_to} removes nothing from "
            f"{net!r}; give a larger ratio or a smaller round_to"
        )
    pruned = _narrowed(net, kept)
    check(net.module, pruned.module, kept, _example(net))
    console.print(
        f"prune: {net.params:,} to {pruned.params:,} parameters, "
        f"{net.macs / 1e6:.2f} to {pruned.macs / 1e6:.2f} M MACs"
    )
    if epochs:
        assert task is not None and data is not None
        pruned = distill(
            pruned, task=task, data=data, teacher=teacher, epochs=epochs, alpha=alpha,
            hints=hints, hint_weight=hint_weight, hint_loss=hint_loss, cache=cache,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed,
            accelerator=accelerator, run=run,
        )  # fmt: skip
    return pruned


def narrowed(
    net: Network, goals: Mapping[str, float | None], *, round_to: int, ignore: Iterable[str] = ()
) -> Network:
    """What `prune` would leave of `net`: to price it, so unchecked and without a word.

    Args:
        goals: `ratio`, `macs` and `params`; one of them is not None.
    """
    return _narrowed(net, _plan(net, goals, round_to, ignore)[2])


def _plan(
    net: Network, goals: Mapping[str, float | None], round_to: int, ignore: Iterable[str]
) -> tuple[list[Group], float, Kept]:
    """(groups of channels, share of each to remove, what stays)."""
    check_goal(**goals)
    groups = _groups(net, ignore)
    ratio = goals["ratio"]
    if ratio is None:
        ratio = _ratio_for(net, groups, goals, round_to)
    return groups, ratio, kept_channels(net.module, groups, ratio, round_to)


def check_goal(ratio: float | None, macs: float | None, params: float | None) -> None:
    """Refuse anything but one goal within its range.

    Raises:
        RecipeError: none or several given, a ratio outside 0 to 1, or a goal of nothing.
    """
    goals = {"ratio": ratio, "macs": macs, "params": params}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        got = ", ".join(f"{name} = {value:g}" for name, value in given.items()) or "none"
        raise RecipeError(f"prune: give one of ratio, macs and params; got {got}")
    if ratio is not None and not 0 <= ratio < 1:
        raise RecipeError(f"prune: ratio is {ratio:g}; it is the share removed: 0 to below 1")
    name, value = next(iter(given.items()))
    if name != "ratio" and not value > 0:
        raise RecipeError(
            f"prune: {name} is {value:g}; give a count, or a float up to 1.0: the share to keep"
        )


def _groups(net: Network, ignore: Iterable[str]) -> list[Group]:
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    paths = [path for path, _ in net.module.named_modules()]
    for path in ignore:
        if path not in paths:
            raise RecipeError(f"prune: ignore names no module {path!r}{nearest(path, paths)}")
    return find_groups(net.copy().module, _example(net), ignore)


def _example(net: Network) -> list[Tensor]:
    """Noise in a batch of two, the same each time: zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x
        for x in net.io.example(2)
    ]


def _narrowed(net: Network, kept: Kept) -> Network:
    other = net.copy()
    resized = {path: dict(attributes) for path, attributes in net.resized.items()}
    for path, sides in kept.items():
        changed = select(other.module.get_submodule(path), sides)
        resized[path] = resized.get(path, {}) | changed
    other.resized = resized
    return other


def _ratio_for(
    net: Network, groups: list[Group], goals: Mapping[str, float | None], round_to: int
) -> float:
    """The smallest ratio whose network meets the goal.

    Rounding makes few distinct networks of all ratios, each one inside the one before: bisection
    over them is exact.
    """
    name, goal = next((name, goal) for name, goal in goals.items() if goal is not None)
    whole: int = getattr(net, name)
    limit = goal * whole if isinstance(goal, float) and goal <= 1 else goal
    if whole <= limit:
        return 0.0
    points = sorted({point for group in groups for point in group.turning_points(round_to)})
    ratios = [(a + b) / 2 for a, b in pairwise([*points, 1.0])]

    def size(ratio: float) -> int:
        kept = kept_channels(net.module, groups, ratio, round_to)
        figure: int = getattr(_narrowed(net, kept), name)
        return figure

    found = bisect.bisect_left(ratios, True, key=lambda ratio: size(ratio) <= limit)
    if found == len(ratios):
        smallest = size(ratios[-1]) if ratios else whole
        raise RecipeError(
            f"prune: {name} = {goal:g} asks for {limit:,.0f}; the fewest in multiples of "
            f"{round_to} are {smallest:,} of {whole:,} ({smallest / whole:.3f}): raise {name}, or "
            "give a smaller round_to"
        )
    return ratios[found]


def _name_whole(groups: list[Group], ratio: float, round_to: int) -> None:
    """Say which layers keep all their channels, and why."""
    whole: dict[str, list[str]] = {}
    for group in groups:
        if group.size(ratio, round_to) == group.channels:
            reason = group.fixed or f"multiples of {round_to} leave nothing to remove"
            whole.setdefault(reason, []).append(group.path)
    for reason, paths in whole.items():
        console.print(f"prune: kept whole: {', '.join(paths)} ({reason})", markup=False)
