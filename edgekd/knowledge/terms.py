"""The terms that a student learns from: its labels, its teacher's outputs, its teacher's inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import DataError, RecipeError
from edgekd.knowledge.feature import Hint, relative_error
from edgekd.knowledge.taps import Features
from edgekd.knowledge.teachers import Teacher
from edgekd.tasks.base import Task


class LearningTerms(nn.Module):
    """(1 − α) · supervised loss + α · distillation term + w · mean of the hints.

    As far as there are labels, a teacher and hints. The regressors of the hints are its
    parameters; they are trained along, and not part of any network.

    Args:
        task: gives the first two terms. Without one, the student matches the teacher's outputs.
        teacher: without one, training is plain.
        alpha: share of the teacher, 0 to 1 (λ in Hinton et al. 2015 §2 is 1 − α).
        hints: (student's path, teacher's path) -> the hint between the two.
        hint_weight: w.
        features: where the student's features of the current batch are found.
        keyed: whether the last of the targets is the keys of the samples.

    Raises:
        RecipeError: a weight out of range, or nothing to learn from.
    """

    def __init__(
        self,
        task: Task | None,
        teacher: Teacher | None,
        alpha: float,
        *,
        hints: Mapping[tuple[str, str], Hint] | None = None,
        hint_weight: float = 1.0,
        features: Features | None = None,
        keyed: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise RecipeError(
                f"alpha is {alpha}; it is the teacher's share of the loss, from 0 to 1"
            )
        if not 0 <= hint_weight < float("inf"):
            raise RecipeError(f"hint_weight is {hint_weight}; give 0 or more")
        if task is None and teacher is None:
            raise RecipeError("nothing to learn from: give a task (labels), a teacher, or both")
        self.task, self.teacher, self.alpha = task, teacher, alpha
        self.pairs = list(hints or {})
        self.hints = nn.ModuleList((hints or {}).values())
        self.hint_weight, self.keyed = hint_weight, keyed
        # not a copy: it is empty until the first batch
        self.features = {} if features is None else features

    def forward(
        self, inputs: tuple[Tensor, ...], targets: tuple[Tensor, ...], outputs: Any
    ) -> dict[str, Tensor]:
        """Weighted terms by name; `outputs` are the student's of this batch."""
        keys = targets[-1] if self.keyed else None
        labels = targets[:-1] if self.keyed else targets
        values: dict[str, Tensor] = {}
        share = 1.0 if self.teacher is None else 1 - self.alpha
        if self.task is not None and share > 0:
            if not labels:
                raise DataError(
                    "the task learns from labels, and batches are inputs alone; give batches "
                    "(x, labels), or alpha=1 to learn from the teacher only"
                )
            values["supervised"] = share * self.task.loss(outputs, labels)
        if self.teacher is not None:
            wanted, theirs = self.teacher(inputs, keys)
            if self.task is None:
                each = [match_outputs(outputs, one) for one in wanted]
                values["teacher"] = torch.stack(each).mean()
            else:
                values["teacher"] = self.alpha * self.task.distillation(outputs, *wanted)
            if self.pairs:

                def foreground(size: tuple[int, int]) -> Tensor | None:
                    return self.task.foreground(labels, size) if self.task and labels else None

                each = [
                    hint(self.features[ours], theirs[path], foreground)
                    for (ours, path), hint in zip(self.pairs, self.hints, strict=True)
                ]
                values["hints"] = self.hint_weight * torch.stack(each).mean()
        return values


def match_outputs(outputs: Any, teacher_outputs: Any) -> Tensor:
    """Mean squared error over the teacher's variance, mean over outputs; needs no task."""
    pairs = list(zip(flat(outputs), flat(teacher_outputs), strict=True))
    return torch.stack([relative_error(a, b) for a, b in pairs]).mean()


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of a network's outputs: of a dict, a sequence, or the one that there is."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, dict) else outputs)
