"""What a task is: the loss, the default distillation term, the metric and the agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.utils._pytree import tree_leaves

from edgekd.errors import RecipeError, nearest
from edgekd.network import IO


class Curves(BaseModel):
    """What a metric sums up: a quantity over another one, a line for each class.

    Attributes:
        x_name, y_name: of the axes.
        x: (P,) the same for all lines; rising shares of 1.
        by_class: (P,) each, shares of 1, in the order of the labels; None where it has no samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    x_name: str
    y_name: str
    x: tuple[float, ...]
    by_class: tuple[tuple[float, ...] | None, ...]


class Mark(BaseModel):
    """One thing that an answer, or the truth, says of an image.

    Attributes:
        label: index of its class.
        score: 0 to 1; None of the truth.
        box: left, top, right, bottom in pixels of the input; None: the image as a whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    label: int
    score: float | None = None
    box: tuple[float, float, float, float] | None = None


class Score(BaseModel):
    """A metric with its 95 % confidence interval, as shares of 1.

    Attributes:
        by_class: of each class alone, in the order of the labels; None where it has no samples.
        parts: further figures by name, as shares of 1; None where there are no samples.
        curves: what the metric was taken from, where that can be drawn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    ci95: tuple[float, float]
    n: int
    by_class: tuple[float | None, ...] = ()
    parts: dict[str, float | None] = {}
    curves: Curves | None = None


class Difference(BaseModel):
    """How much more one network scores than another on the same samples, with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    ci95: tuple[float, float]


class Task(Protocol):
    """Stateless; stages never ask which task it is.

    Networks of one task may code their outputs in different ways, as detectors do: `of` gives the
    task for the outputs of one. Answers are what all of them say in the same way.
    """

    @property
    def metric_name(self) -> str:
        """What `score` counts, for tables."""

    def of(self, io: IO, teachers: Sequence[IO | None] = ()) -> Task:
        """This task for the outputs of networks with that IO, taught by those with theirs."""

    def check(self, outputs: Any, io: IO) -> None:
        """Raise a ModelError if a batch of outputs is none of this task, for the labels of `io`."""

    def answers(self, outputs: Any) -> Any:
        """What a batch of outputs says, without gradient: a tensor, a tuple or a dict of them."""

    def loss(self, outputs: Any, targets: tuple[Tensor, ...]) -> Tensor:
        """Supervised loss, a scalar."""

    def distillation(self, outputs: Any, *teacher_outputs: Any) -> Tensor:
        """The term on the outputs of one or more teachers, a scalar; theirs carry no gradient."""

    def foreground(self, targets: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor | None:
        """(N, h, w): what each cell of a feature map counts as part of an object; 0 for none.

        None where a task tells no objects from the rest.
        """

    def score(self, answers: Any, targets: tuple[Tensor, ...]) -> Score:
        """The metric over a whole split: answers and targets of all its samples."""

    def difference(self, a: Any, b: Any, targets: tuple[Tensor, ...]) -> Difference:
        """The metric of answers `a` less that of `b`, on the same samples of a whole split."""

    def agreement(self, a: Any, b: Any) -> float:
        """Share of samples, or of what is found in them, for which two networks' answers agree."""

    def marks(self, answers: Any) -> list[list[Mark]]:
        """What is to be drawn of the answers, for each sample."""

    def truth(self, targets: tuple[Tensor, ...]) -> list[list[Mark]]:
        """What is to be drawn of the targets, for each sample."""


def get_task(name: str, **options: Any) -> Task:
    """The task of that name, with its options (temperature, label smoothing, ...).

    Raises:
        RecipeError: no such task, or an option that it does not have.
    """
    from edgekd.tasks.classification import Classification
    from edgekd.tasks.detection import Detection

    tasks: dict[str, type[Classification | Detection]] = {
        "classification": Classification, "detection": Detection
    }  # fmt: skip
    if name not in tasks:
        raise RecipeError(f"no task {name!r}{nearest(name, tasks)}")
    known = [field.name for field in fields(tasks[name])]
    for option in options:
        if option not in known:
            raise RecipeError(f"{name} has no option {option!r}{nearest(option, known)}")
    return tasks[name](**options)


def described(outputs: Any) -> str:
    """What a network gave, for messages."""
    if isinstance(outputs, Tensor):
        return f"a tensor of {tuple(outputs.shape)}, {str(outputs.dtype).removeprefix('torch.')}"
    found = tree_leaves(outputs)
    shapes = [str(tuple(y.shape)) if isinstance(y, Tensor) else type(y).__name__ for y in found]
    return f"a {type(outputs).__name__} of {', '.join(shapes) or 'nothing'}"


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
