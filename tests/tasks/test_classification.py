"""Classification: loss, score and agreement, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.errors import RecipeError
from edgekd.tasks.base import get_task, paired_difference, top1_agreement, wilson_interval
from edgekd.tasks.classification import Classification

RNG = np.random.default_rng(0)
SCORES = RNG.normal(0, 2, (200, 7))
LABELS = RNG.integers(0, 7, 200)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_loss_is_cross_entropy_with_smoothed_labels(smoothing):
    wanted = np.full((200, 7), smoothing / 7)
    wanted[np.arange(200), LABELS] += 1 - smoothing
    by_hand = -(wanted * log_softmax(SCORES)).sum(1).mean()
    task = Classification(label_smoothing=smoothing)
    loss = task.loss(torch.from_numpy(SCORES), (torch.from_numpy(LABELS),))
    assert float(loss) == pytest.approx(by_hand, rel=1e-9)


def test_what_is_drawn_is_the_surest_class_and_the_label():
    marks = Classification().marks(torch.from_numpy(SCORES))
    chances = np.exp(log_softmax(SCORES))
    assert [mark.label for (mark,) in marks] == SCORES.argmax(1).tolist()
    np.testing.assert_allclose([m.score for (m,) in marks], chances.max(1), atol=5.1e-4)
    truth = Classification().truth((torch.from_numpy(LABELS),))
    assert [mark.label for (mark,) in truth] == LABELS.tolist()
    assert all(m.box is None for (m,) in marks) and all(m.score is None for (m,) in truth)
    scored = Classification().score(torch.from_numpy(SCORES), (torch.from_numpy(LABELS),))
    assert scored.curves is None


def test_distillation_uses_the_tasks_temperature():
    teacher = RNG.normal(0, 2, (200, 7))
    for temperature in (1.0, 6.0):
        p, q = log_softmax(SCORES / temperature), log_softmax(teacher / temperature)
        by_hand = temperature**2 * (np.exp(q) * (q - p)).sum(1).mean()
        task = Classification(temperature=temperature)
        loss = task.distillation(torch.from_numpy(SCORES), torch.from_numpy(teacher))
        assert float(loss) == pytest.approx(by_hand, rel=1e-9)


def test_score_is_top1_accuracy():
    score = Classification().score(torch.from_numpy(SCORES), (torch.from_numpy(LABELS),))
    hits = int((SCORES.argmax(1) == LABELS).sum())
    assert 0 < hits < 200
    assert (score.value, score.n) == (hits / 200, 200)
    assert score.ci95 == wilson_interval(hits, 200)
    assert score.ci95[0] < score.value < score.ci95[1]


def test_score_by_class_is_the_share_found_of_its_images():
    labels = np.where(LABELS == 1, 0, LABELS)  # none of class 1
    score = Classification().score(torch.from_numpy(SCORES), (torch.from_numpy(labels),))
    answers = SCORES.argmax(1)
    for label, value in enumerate(score.by_class):
        if label == 1:
            assert value is None
        else:
            assert value == pytest.approx((answers[labels == label] == label).mean())
    assert len(score.by_class) == SCORES.shape[1]


def test_agreement_counts_equal_answers():
    other = SCORES.copy()
    other[:30] = -other[:30]  # the largest becomes the smallest
    a, b = torch.from_numpy(SCORES), torch.from_numpy(other)
    assert Classification().agreement(a, b) == pytest.approx(170 / 200)
    assert Classification().agreement(a, 3 * a + 1) == 1.0


def test_agreement_of_maps_counts_places():
    a = torch.zeros(2, 3, 4, 4)
    a[:, 1] = 1
    b = a.clone()
    b[0, 2, 0, 0] = 5
    assert top1_agreement(a, b) == pytest.approx(31 / 32)


def test_tasks_by_name():
    task = get_task("classification", temperature=2.0, label_smoothing=0.1)
    assert task == Classification(temperature=2.0, label_smoothing=0.1)
    with pytest.raises(RecipeError, match="no task 'clasification'; did you mean 'classification'"):
        get_task("clasification")


# ---- the interval ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # z² / (n + z²)
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Stat. Med. 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_intervals(hits, n, low, high):
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("n", [1, 3, 17, 10_000])
def test_interval_solves_the_score_equation(n):
    # (p − hits/n)² = z² p (1 − p) / n, as a quadratic in p
    z2 = 1.959963984540054**2
    for hits in {0, 1, n // 3, n - 1, n}:
        share = hits / n
        roots = np.roots([1 + z2 / n, -(2 * share + z2 / n), share**2])
        assert wilson_interval(hits, n) == pytest.approx(np.sort(roots.real), abs=1e-6)
        low, high = wilson_interval(hits, n)
        assert 0 <= low <= share <= high <= 1


def test_paired_differences_are_numpys():
    rng = np.random.default_rng(0)
    a, b = rng.random(500) < 0.8, rng.random(500) < 0.7
    found = paired_difference(torch.from_numpy(a), torch.from_numpy(b))
    gaps = a.astype(float) - b
    half = 1.959964 * gaps.std(ddof=1) / 500**0.5
    assert found.value == pytest.approx(gaps.mean())
    assert found.ci95 == pytest.approx((gaps.mean() - half, gaps.mean() + half))
