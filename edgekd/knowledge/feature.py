"""Learning from a teacher's inner tensors."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from edgekd.errors import ModelError


class Hint(nn.Module):
    """‖r(s) − t‖² / ‖t − t̄‖²: the student's feature, through a regressor, against the teacher's.

    FitNets (Romero et al. 2015 §2.2 eq. 3, arXiv:1412.6550), here at the same time as the other
    terms; over the teacher's variance, so that the weight means the same at every layer. The
    regressor r is a 1×1 convolution, written as a linear layer over the channels.

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

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The features of one batch; returns a scalar. The finer map is averaged to the coarser."""
        if student.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
            (height, width), (h, w) = student.shape[2:], teacher.shape[2:]
            size = min(height, h), min(width, w)
            student, teacher = (adaptive_avg_pool2d(x, size) for x in (student, teacher))
        return relative_error(self.regressor(_channels_last(student)), _channels_last(teacher))


def relative_error(ours: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over the variance of what is wanted; 1 for its mean."""
    return ((ours - wanted) ** 2).mean() / wanted.var().clamp(min=1e-12)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1) if x.dim() == 4 else x
