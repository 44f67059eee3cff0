"""Image classification: one tensor of scores (N, K), one label each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import ModelError
from edgekd.knowledge.response import Response
from edgekd.network import IO
from edgekd.tasks.base import (
    Difference,
    Mark,
    Score,
    described,
    paired_difference,
    top1_agreement,
    wilson_interval,
)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy against labels, tempered KL against a teacher, top-1 accuracy.

    Args:
        temperature: of the distillation term.
        label_smoothing: share of the label's mass spread over all classes, 0 to 1.
    """

    temperature: float = 4.0
    label_smoothing: float = 0.0
    metric_name: str = "top-1 accuracy"

    def of(self, io: IO, teachers: Sequence[IO | None] = ()) -> Classification:
        """Itself: all classifiers give scores."""
        return self

    def check(self, outputs: Any, io: IO) -> None:
        """One tensor of as many scores as there are labels.

        Raises:
            ModelError: it is another one, or none.
        """
        scores = isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.is_floating_point()
        if not scores:
            raise ModelError(
                f"it gives {described(outputs)}; a classifier gives one float tensor (N, K): wrap "
                "it in a module that returns its scores, or turn auxiliary outputs off"
            )
        if io.labels and outputs.shape[1] != len(io.labels):
            raise ModelError(
                f"it gives {outputs.shape[1]} scores; the data has {len(io.labels)} classes: give "
                f"kwargs that make it {len(io.labels)} (num_classes, mostly)"
            )

    def answers(self, outputs: Tensor) -> Tensor:
        """The (N, K) scores as they are."""
        return outputs

    def loss(self, outputs: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy of (N, K) scores and (N,) labels."""
        return F.cross_entropy(outputs, targets[0], label_smoothing=self.label_smoothing)

    def distillation(self, outputs: Tensor, *teacher_outputs: Tensor) -> Tensor:
        """Tempered KL of (N, K) scores; several teachers' are averaged (Hinton et al. 2015 §4)."""
        wanted = torch.stack(teacher_outputs).mean(0)
        loss: Tensor = Response(self.temperature)(outputs, wanted)
        return loss

    def foreground(self, targets: tuple[Tensor, ...], size: tuple[int, int]) -> None:
        """None: a label is of the whole image."""

    def score(self, answers: Tensor, targets: tuple[Tensor, ...]) -> Score:
        """Top-1 accuracy with its Wilson interval; of a class: the share found of its images."""
        right, classes = answers.argmax(1) == targets[0], answers.shape[1]
        hits, n = int(right.sum()), len(answers)
        found = torch.bincount(targets[0][right], minlength=classes).tolist()
        counts = torch.bincount(targets[0], minlength=classes).tolist()
        by_class = tuple(f / c if c else None for f, c in zip(found, counts, strict=True))
        return Score(value=hits / n, ci95=wilson_interval(hits, n), n=n, by_class=by_class)

    def difference(self, a: Tensor, b: Tensor, targets: tuple[Tensor, ...]) -> Difference:
        """Of the top-1 accuracies, image by image."""
        return paired_difference(*(outputs.argmax(1) == targets[0] for outputs in (a, b)))

    def agreement(self, a: Tensor, b: Tensor) -> float:
        """Share of samples with the same top-1 class."""
        return top1_agreement(a, b)

    def marks(self, answers: Tensor) -> list[list[Mark]]:
        """The top-1 class with its probability."""
        best = answers.double().softmax(1).max(1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[Mark(label=label, score=round(score, 3))] for label, score in pairs]

    def truth(self, targets: tuple[Tensor, ...]) -> list[list[Mark]]:
        """The label."""
        return [[Mark(label=label)] for label in targets[0].tolist()]
