"""Hints, by each of their losses, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.errors import ModelError
from edgekd.knowledge.feature import HINT_LOSSES, Correlation, FocalGlobal, Hint

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


# ---- correlation -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 7, 3), (9, 3)])
def test_correlation_is_pearsons_of_each_channel(shape):
    ours, theirs = features(*shape), features(*shape)
    axis = 1 if len(shape) == 4 else -1
    a, b = (x.double().movedim(axis, 0).flatten(1).numpy() for x in (ours, theirs))
    wanted = np.mean([1 - np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])
    hint = Correlation(ours, theirs)
    assert hint(ours, theirs).item() == pytest.approx(wanted, rel=1e-4)
    assert not list(hint.parameters())
    # the magnitude is nothing to learn
    assert hint(7 * theirs + 3, theirs).item() == pytest.approx(0, abs=1e-5)


def test_correlation_of_other_widths_goes_through_a_regressor():
    ours, theirs = features(3, 5, 4, 4), features(3, 7, 4, 4)
    hint = Correlation(ours, theirs)
    mapped = torch.einsum("nchw,oc->nohw", ours, hint.regressor.weight)  # a bias is no correlation
    same = Correlation(theirs, theirs)(mapped, theirs)
    assert hint(ours, theirs).item() == pytest.approx(same.item(), rel=1e-4)


# ---- objects and background --------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def attention(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (N, H, W, C), FGD eq. 2 and 3."""
    n, h, w, c = x.shape
    place = h * w * softmax(np.abs(x).mean(-1).reshape(n, -1) / 0.5).reshape(n, h, w)
    return place, c * softmax(np.abs(x).mean((1, 2)) / 0.5)


def context(block: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    p = {name: t.detach().double().numpy() for name, t in block.named_parameters()}
    n, h, w, c = x.shape
    cells = x.reshape(n, h * w, c)
    share = softmax((cells @ p["key.weight"].T + p["key.bias"])[..., 0])
    summary = (share[..., None] * cells).sum(1) @ p["transform.0.weight"].T + p["transform.0.bias"]
    spread = np.sqrt(summary.var(1, keepdims=True) + 1e-5)
    summary = (summary - summary.mean(1, keepdims=True)) / spread
    summary = summary * p["transform.1.weight"] + p["transform.1.bias"]
    added = summary.clip(0) @ p["transform.3.weight"].T + p["transform.3.bias"]
    return x + added[:, None, None]


def test_objects_and_background_apart():
    ours, theirs = features(3, 5, 6, 4), features(3, 7, 6, 4)
    objects = torch.zeros(3, 6, 4)
    objects[0, 1:4, :2], objects[1, 5, 3] = 1 / 6, 1.0
    hint = FocalGlobal(ours, theirs)
    asked = []

    def foreground(size: tuple[int, int]) -> torch.Tensor:
        asked.append(size)
        return objects

    weight, bias = (p.detach().double().numpy() for p in hint.regressor.parameters())
    a, b = (x.double().numpy().transpose(0, 2, 3, 1) for x in (ours, theirs))
    a = a @ weight.T + bias
    (place, channel), mine = attention(b), attention(a)
    variance = b.var(ddof=1)
    error = ((a - b) ** 2 * channel[:, None, None]).mean(-1) * place / variance
    mask = objects.double().numpy()
    rest = mask == 0
    wanted = (error * mask).sum() / mask.sum() + error[rest].mean() / 2
    wanted += np.abs(mine[0] - place).mean() + np.abs(mine[1] - channel).mean()
    x, y = context(hint.ours, a), context(hint.theirs, b)
    wanted += ((x - y) ** 2).mean() / y.var(ddof=1)
    assert hint(ours, theirs, foreground).item() == pytest.approx(wanted, rel=1e-4)
    assert asked == [(6, 4)]


def test_what_has_no_objects_is_refused():
    ours = features(3, 5, 6, 4)
    with pytest.raises(ModelError, match="this task, or batches without labels, have none"):
        FocalGlobal(ours, ours)(ours, ours, lambda _: None)
    with pytest.raises(ModelError, match='"fgd" takes maps'):
        FocalGlobal(features(3, 5), features(3, 5))


# ---- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HINT_LOSSES)
def test_each_teaches_a_student(name):
    """Its loss goes down, through the student's features and whatever it learns along."""
    theirs = features(8, 6, 6, 6)
    ours = torch.nn.Parameter(features(8, 4, 6, 6))
    objects = torch.zeros(8, 6, 6)
    objects[:, 2:4, 2:4] = 0.25
    hint = HINT_LOSSES[name](ours, theirs)
    optimizer = torch.optim.Adam([ours, *hint.parameters()], lr=0.05)
    values = []
    for _ in range(150):
        loss = hint(ours, theirs, lambda _: objects)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
    assert all(p.grad is not None for p in (ours, *hint.parameters()))
