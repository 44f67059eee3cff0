"""What a task is: the loss, the default distillation term, the metric and the agreement."""

from __future__ import annotations

from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from edgekd.errors import RecipeError, nearest


class Score(BaseModel):
    """A metric with its 95 % confidence interval, as shares of 1.

    Attributes:
        by_class: of each class alone, in the order of the labels; None where it has no samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    ci95: tuple[float, float]
    n: int
    by_class: tuple[float | None, ...] = ()


class Difference(BaseModel):
    """How much more one network scores than another on the same samples, with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    ci95: tuple[float, float]


class Task(Protocol):
    """Stateless; stages never ask which task it is."""

    @property
    def metric_name(self) -> str:
        """What `score` counts, for tables."""

    def loss(self, outputs: Any, targets: tuple[Tensor, ...]) -> Tensor:
        """Supervised loss, a scalar."""

    def distillation(self, outputs: Any, teacher_outputs: Any) -> Tensor:
        """The default term on the outputs, a scalar; teacher outputs carry no gradient."""

    def score(self, outputs: Any, targets: tuple[Tensor, ...]) -> Score:
        """The metric over a whole split: outputs and targets of all its samples."""

    def difference(self, a: Any, b: Any, targets: tuple[Tensor, ...]) -> Difference:
        """The metric of `a` less that of `b`, sample by sample over a whole split."""

    def agreement(self, a: Any, b: Any) -> float:
        """Share of samples for which two networks give the same answer."""


def get_task(name: str, **options: Any) -> Task:
    """The task of that name, with its options (temperature, label smoothing, ...)."""
    from edgekd.tasks.classification import Classification

    tasks = {"classification": Classification}
    if name not in tasks:
        raise RecipeError(f"no task {name!r}{nearest(name, tasks)}")
    return tasks[name](**options)


def top1_agreement(a: Tensor, b: Tensor) -> float:
    """Share of samples whose largest score, over axis 1 of (N, K, ...), is at the same place."""
    return float((a.argmax(1) == b.argmax(1)).double().mean())


def paired_difference(a: Tensor, b: Tensor) -> Difference:
    """Mean of a − b, both (N,), one value per sample, with the normal interval of paired values."""
    gaps = a.double() - b.double()
    half = 1.959964 * float(gaps.std()) / len(gaps) ** 0.5 if len(gaps) > 1 else 1.0
    mean = float(gaps.mean())
    return Difference(value=mean, ci95=(mean - half, mean + half))


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, JASA 22): never outside [0, 1], right at 0 and 1."""
    z = 1.959964
    share, z2 = hits / n, z * z / n
    centre = (share + z2 / 2) / (1 + z2)
    half = z * ((share * (1 - share) + z2 / 4) / n) ** 0.5 / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)
