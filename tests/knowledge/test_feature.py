"""Hints against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.errors import ModelError
from edgekd.knowledge.feature import Hint

RNG = np.random.default_rng(0)


def features(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(1, 2, shape)).float()


def by_hand(hint: Hint, student: np.ndarray, teacher: np.ndarray) -> float:
    """Features with the channels last."""
    weight, bias = (p.detach().double().numpy() for p in hint.regressor.parameters())
    error = student @ weight.T + bias - teacher
    return float((error**2).mean() / teacher.var(ddof=1))


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 8)])
def test_maps_through_the_regressor_the_finer_averaged_to_the_coarser(sizes):
    ours, theirs = features(3, 5, sizes[0], sizes[0]), features(3, 7, sizes[1], sizes[1])
    hint = Hint(ours, theirs)

    def coarse(x: torch.Tensor) -> np.ndarray:
        n, c, size, _ = x.shape
        blocks = x.double().numpy().reshape(n, c, 4, size // 4, 4, size // 4)
        return blocks.mean((3, 5)).transpose(0, 2, 3, 1)

    wanted = by_hand(hint, coarse(ours), coarse(theirs))
    assert hint(ours, theirs).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 5)])
def test_tokens_and_vectors(shape):
    ours, theirs = features(*shape), features(*shape[:-1], 9)
    hint = Hint(ours, theirs)
    wanted = by_hand(hint, ours.double().numpy(), theirs.double().numpy())
    assert hint(ours, theirs).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "ours, theirs", [((2, 3, 4, 4), (2, 3)), ((2, 5, 3), (2, 6, 3)), ((2,), (2,))]
)
def test_axes_that_do_not_go_together_are_refused(ours, theirs):
    with pytest.raises(ModelError, match="name other modules"):
        Hint(features(*ours), features(*theirs))


def test_a_regressor_that_learns_brings_the_loss_down_to_what_a_linear_map_can_do():
    ours = features(16, 6, 4, 4)
    mix = torch.from_numpy(RNG.normal(size=(3, 6))).float()
    theirs = torch.einsum("ij,njhw->nihw", mix, ours)
    hint = Hint(ours, theirs)
    optimizer = torch.optim.LBFGS(hint.parameters(), max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = hint(ours, theirs)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert hint(ours, theirs).item() < 1e-4
