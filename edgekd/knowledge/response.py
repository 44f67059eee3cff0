"""Learning from a teacher's outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Response(nn.Module):
    """Tempered KL divergence, T² · KL(softmax(t / T) ‖ softmax(s / T)), mean over samples.

    Hinton et al. 2015 §2, arXiv:1503.02531. T² keeps the gradient's scale as T changes.

    Args:
        temperature: T > 0; larger shows more of the teacher's small scores.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scores of (N, K) before softmax, both; returns a scalar."""
        t = self.temperature
        log_p = F.log_softmax(student / t, dim=1)
        log_q = F.log_softmax(teacher / t, dim=1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * t**2
