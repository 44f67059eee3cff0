"""The terms that a student learns from: its labels, its teacher, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgekd.errors import DataError, RecipeError
from edgekd.knowledge.teachers import Teacher
from edgekd.tasks.base import Task
from edgekd.training import Terms


def learning_terms(task: Task | None, teacher: Teacher | None, alpha: float) -> Terms:
    """(1 − α) · supervised loss + α · distillation term, as far as there are labels and teacher.

    Args:
        task: gives both terms. Without one, the student matches the teacher's outputs.
        teacher: without one, training is plain.
        alpha: share of the teacher, 0 to 1 (λ in Hinton et al. 2015 §2 is 1 − α).
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(f"alpha is {alpha}; it is the teacher's share of the loss, from 0 to 1")
    if task is None and teacher is None:
        raise RecipeError("nothing to learn from: give a task (labels), a teacher, or both")

    def terms(batch: tuple[Tensor, ...], outputs: Any) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        share = 1.0 if teacher is None else 1 - alpha
        if task is not None and share > 0:
            if len(batch) < 2:
                raise DataError(
                    "the task learns from labels, and batches are inputs alone; give batches "
                    "(x, labels), or alpha=1 to learn from the teacher only"
                )
            values["supervised"] = share * task.loss(outputs, batch[1:])
        if teacher is not None:
            wanted = teacher(batch[:1])
            if task is None:
                values["teacher"] = match_outputs(outputs, wanted)
            else:
                values["teacher"] = alpha * task.distillation(outputs, wanted)
        return values

    return terms


def match_outputs(outputs: Any, teacher_outputs: Any) -> Tensor:
    """Mean squared error over the teacher's variance, mean over outputs; needs no task."""
    pairs = list(zip(_flat(outputs), _flat(teacher_outputs), strict=True))
    errors = [((a - b) ** 2).mean() / b.var().clamp(min=1e-12) for a, b in pairs]
    return torch.stack(errors).mean()


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, dict) else outputs)
