"""A student learns: teacher, hints and cache are made ready, and the one loop runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from edgekd.data.base import BatchSource, Data
from edgekd.errors import ModelError, RecipeError, nearest
from edgekd.knowledge.cache import cached_teacher
from edgekd.knowledge.feature import HINT_LOSSES, Hint, HintLoss
from edgekd.knowledge.taps import Hints, pair_hints, tapped
from edgekd.knowledge.teachers import (
    Teacher,
    TeacherLike,
    as_teacher,
    first_module,
    io_of,
    members,
)
from edgekd.knowledge.terms import LearningTerms
from edgekd.network import Network, eval_mode
from edgekd.rundir import RunDir
from edgekd.tasks.base import Task
from edgekd.training import fit


def learn(
    student: Network,
    *,
    original: nn.Module,
    task: Task | None,
    data: BatchSource,
    teacher: TeacherLike | Sequence[TeacherLike] | None,
    alpha: float,
    hints: Hints,
    hint_weight: float,
    hint_loss: HintLoss,
    cache: Path | None,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
    on: Fabric,
    label: str,
    run: RunDir | None,
    freeze_scales: float = 1.0,
    batchnorm: float = 0.0,
) -> None:
    """Train `student` in place; the keywords are those of `distill`.

    Args:
        original: the eager module that the student is, or was captured from.

    Raises:
        RecipeError: hints without a teacher.
        ModelError: hints that name no module, or maps that do not go together.
    """
    ios = [] if teacher is None else [io_of(member) for member in members(teacher)]
    task = None if task is None else task.of(student.io, ios)
    made: dict[tuple[str, str], Hint] = {}
    if hints:
        if teacher is None:
            raise RecipeError("hints come from a teacher; give one, or leave the hints out")
        torch.manual_seed(seed)
        made = _hints(hints, hint_loss, original, teacher, student.io.example(2))
    ask: Teacher | None = None
    keyed = False
    if teacher is not None:
        taps = list(dict.fromkeys(theirs for _, theirs in made))
        seen = data.preprocessing if isinstance(data, Data) else student.io.preprocessing
        if cache is not None:
            ask = cached_teacher(
                teacher, data, folder=cache, device=on.device, taps=taps, seen=seen
            )
            keyed = ask is not None
        ask = ask or as_teacher(teacher, on.device, taps, seen)
    with tapped(student.module, [ours for ours, _ in made]) as features:
        terms = LearningTerms(
            task, ask, alpha, hints=made, hint_weight=hint_weight, features=features, keyed=keyed
        )
        fit(
            student, terms=terms, data=data, keyed=keyed, epochs=epochs, batch_size=batch_size,
            lr=lr, weight_decay=weight_decay, freeze_scales=freeze_scales, batchnorm=batchnorm,
            seed=seed, on=on,
            label=label, run=run,
        )  # fmt: skip


def _hints(
    hints: Hints,
    loss: HintLoss,
    original: nn.Module,
    teacher: TeacherLike | Sequence[TeacherLike],
    example: tuple[Tensor, ...],
) -> dict[tuple[str, str], Hint]:
    """For each pair of paths a term, with new regressors of the right widths."""
    if loss not in HINT_LOSSES:
        raise RecipeError(f"no hint_loss {loss!r}{nearest(loss, HINT_LOSSES)}")
    module = first_module(teacher)
    if module is None:
        raise ModelError(
            "hints come out of inner layers; give a Network or module as the teacher, or the first "
            "of them that there is among several, not callables alone; or leave the hints out"
        )
    pairs = pair_hints(hints, original, module, example)
    ours, theirs = zip(*pairs, strict=True)
    with (
        torch.no_grad(), eval_mode(original), tapped(original, ours) as student_features,
        tapped(module, theirs) as teacher_features,
    ):  # fmt: skip
        original(*example)
        module(*example)
    kind = HINT_LOSSES[loss]
    return {(a, b): kind(student_features[a], teacher_features[b]) for a, b in pairs}
