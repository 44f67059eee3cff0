"""Learning from a teacher's inner tensors: one term a pair of features, chosen by name.

Every term is relative to what it is asked to match, so that a weight means the same at every layer
and, roughly, for every term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from edgekd.errors import ModelError

# of a map's (h, w): (N, h, w) how much of an object each cell is, see `Task.foreground`, or None
Foreground = Callable[[tuple[int, int]], Tensor | None]
HintLoss = Literal["fitnets", "pkd", "fgd"]


class Hint(nn.Module):
    """‖r(s) − t‖² / ‖t − t̄‖²: the student's feature, through a regressor, against the teacher's.

    FitNets (Romero et al. 2015 §2.2 eq. 3, arXiv:1412.6550), here at the same time as the other
    terms. The regressor r is a 1×1 convolution, written as a linear layer over the channels.

    Args:
        student: a feature of the student, of (N, C, H, W), (N, T, C) or (N, C).
        teacher: the teacher's, with as many axes.

    Raises:
        ModelError: the axes do not match.
    """

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        mismatch = student.dim() == 3 and student.shape[1] != teacher.shape[1]
        if student.dim() != teacher.dim() or student.dim() not in (2, 3, 4) or mismatch:
            raise ModelError(
                f"a hint from {tuple(teacher.shape)} to {tuple(student.shape)}: both must be "
                "(N, C, H, W), (N, T, C) with one T, or (N, C); name other modules"
            )
        self.regressor = nn.Linear(_channels_last(student).shape[-1],
                                   _channels_last(teacher).shape[-1])  # fmt: skip

    def forward(
        self, student: Tensor, teacher: Tensor, foreground: Foreground | None = None
    ) -> Tensor:
        """The features of one batch; returns a scalar. The finer map is averaged to the coarser."""
        return relative_error(*self.matched(student, teacher))

    def matched(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (N, ..., C), of one size and as wide as the teacher's."""
        if student.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
            (height, width), (h, w) = student.shape[2:], teacher.shape[2:]
            size = min(height, h), min(width, w)
            student, teacher = (adaptive_avg_pool2d(x, size) for x in (student, teacher))
        return self.regressor(_channels_last(student)), _channels_last(teacher)


class Correlation(Hint):
    """1 − Pearson correlation, mean over channels: where features are high, not how high they are.

    PKD (Cao et al. 2022, arXiv:2207.02039 §3.2 eq. 4): a teacher of another family, whose features
    have another magnitude, teaches too. A regressor only where widths differ.
    """

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        super().__init__(student, teacher)
        if self.regressor.in_features == self.regressor.out_features:
            self.regressor = nn.Identity()  # type: ignore[assignment]

    def forward(
        self, student: Tensor, teacher: Tensor, foreground: Foreground | None = None
    ) -> Tensor:
        """The features of one batch; returns a scalar from 0 to 2."""
        ours, theirs = (_normalised(x) for x in self.matched(student, teacher))
        return (ours - theirs).square().mean() / 2


class FocalGlobal(Hint):
    """Objects and background apart, by the teacher's attention; and what relates all cells.

    FGD (Yang et al. 2022, arXiv:2111.11837 §3): the error of every cell and channel counts as the
    teacher attends to it (eq. 2, 3), that of objects, each as much as any other, once, that of the
    background half (eq. 8 with α = 2β as there); the attentions themselves (eq. 9); and the maps
    with their global context added (GcBlock, eq. 10). Means over what the paper sums.

    Raises:
        ModelError: features that are no maps.
    """

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        super().__init__(student, teacher)
        if teacher.dim() != 4:
            raise ModelError(
                f'a hint of {tuple(teacher.shape)}: "fgd" takes maps, (N, C, H, W); name other '
                'modules, or take "fitnets" or "pkd"'
            )
        self.ours, self.theirs = (_Context(teacher.shape[1]) for _ in range(2))

    def forward(
        self, student: Tensor, teacher: Tensor, foreground: Foreground | None = None
    ) -> Tensor:
        """The maps of one batch; returns a scalar.

        Raises:
            ModelError: nothing tells objects from the background.
        """
        ours, theirs = self.matched(student, teacher)
        objects = None if foreground is None else foreground((theirs.shape[1], theirs.shape[2]))
        if objects is None:
            raise ModelError(
                'hint_loss = "fgd" tells objects from the background by their boxes; this task, or '
                'batches without labels, have none: take "fitnets" or "pkd"'
            )
        (place, channel), mine = _attention(theirs), _attention(ours)
        error = (ours - theirs).square() * channel[:, None, None] / theirs.var().clamp(min=1e-12)
        error = error.mean(-1) * place
        rest = (objects == 0).to(error.dtype)
        parts = [(error * each).sum() / each.sum().clamp(min=1) for each in (objects, rest)]
        apart = [(a - b).abs().mean() for a, b in zip(mine, (place, channel), strict=True)]
        context = relative_error(self.ours(ours), self.theirs(theirs))
        return parts[0] + parts[1] / 2 + apart[0] + apart[1] + context


class _Context(nn.Module):
    """A map with a summary of all its cells added to each (GCNet, arXiv:1904.11492 §3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(1, channels // 2)
        self.key = nn.Linear(channels, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, narrow), nn.LayerNorm(narrow), nn.ReLU(),
            nn.Linear(narrow, channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C), both."""
        cells = x.flatten(1, 2)
        shares = self.key(cells).softmax(1)
        added: Tensor = self.transform((shares * cells).sum(1))
        return x + added[:, None, None]


HINT_LOSSES: dict[HintLoss, type[Hint]] = {
    "fitnets": Hint, "pkd": Correlation, "fgd": FocalGlobal
}  # fmt: skip


def relative_error(ours: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over the variance of what is wanted; 1 for its mean."""
    return ((ours - wanted) ** 2).mean() / wanted.var().clamp(min=1e-12)


def _attention(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of (N, H, W, C): (N, H, W) of the cells and (N, C) of the channels, both of mean 1.

    Softmax of the mean magnitude at temperature 0.5, times their number (FGD §3.1 eq. 2, 3).
    """
    size = x.abs()
    cells, channels = size.mean(-1), size.mean((1, 2))
    place = (cells.flatten(1) / 0.5).softmax(1) * cells[0].numel()
    return place.view_as(cells), (channels / 0.5).softmax(1) * channels.shape[1]


def _normalised(x: Tensor) -> Tensor:
    """Each channel of (..., C) with mean 0 and variance 1 over all else."""
    flat = x.flatten(0, -2)
    deviation = flat.std(0, correction=0).clamp(min=1e-6)
    return (flat - flat.mean(0)) / deviation


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1) if x.dim() == 4 else x
