"""The terms of the loss and their shares, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.errors import RecipeError
from edgekd.knowledge.terms import LearningTerms, match_outputs
from edgekd.tasks.classification import Classification

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(0, 2, (6, 5)) for _ in range(2))
LABELS = np.array([0, 1, 2, 3, 4, 0])
TASK = Classification(temperature=2.0)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def cross_entropy() -> float:
    return float(-log_softmax(STUDENT)[np.arange(6), LABELS].mean())


def tempered_kl() -> float:
    p, q = log_softmax(STUDENT / 2), log_softmax(TEACHER / 2)
    return float(4 * (np.exp(q) * (q - p)).sum(1).mean())


def teacher(inputs: tuple[torch.Tensor, ...], keys: torch.Tensor | None):
    assert len(inputs) == 1  # a teacher sees no labels
    return [torch.from_numpy(TEACHER)], {}


def terms(task, ask, alpha: float) -> dict[str, float]:
    inputs, targets = (torch.zeros(6, 1),), (torch.from_numpy(LABELS),)
    found = LearningTerms(task, ask, alpha)(inputs, targets, torch.from_numpy(STUDENT))
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_labels_and_teacher_share_the_loss(alpha):
    assert terms(TASK, teacher, alpha) == {
        "supervised": pytest.approx((1 - alpha) * cross_entropy(), rel=1e-6),
        "teacher": pytest.approx(alpha * tempered_kl(), rel=1e-6),
    }


def test_all_of_the_loss_is_the_teachers():
    assert terms(TASK, teacher, 1.0) == {"teacher": pytest.approx(tempered_kl(), rel=1e-6)}


def test_none_of_the_loss_is_the_teachers():
    found = terms(TASK, teacher, 0.0)
    assert found == {"supervised": pytest.approx(cross_entropy(), rel=1e-6), "teacher": 0.0}


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_without_a_teacher_labels_have_it_all(alpha):
    assert terms(TASK, None, alpha) == {"supervised": pytest.approx(cross_entropy(), rel=1e-6)}


def test_without_a_task_the_outputs_are_matched():
    wanted = ((STUDENT - TEACHER) ** 2).mean() / TEACHER.var(ddof=1)
    assert terms(None, teacher, 0.9) == {"teacher": pytest.approx(wanted, rel=1e-6)}


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_alpha_is_a_share(alpha):
    with pytest.raises(RecipeError, match=f"alpha is {alpha}; .* from 0 to 1"):
        LearningTerms(TASK, teacher, alpha)


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(RecipeError, match=r"give a task .*, a teacher, or both"):
        LearningTerms(None, None, 0.5)


def test_matching_several_outputs_is_the_mean_of_each():
    parts = [(STUDENT, TEACHER), (RNG.normal(5, 3, (6, 2, 3)), RNG.normal(-1, 0.1, (6, 2, 3)))]
    wanted = np.mean([((a - b) ** 2).mean() / b.var(ddof=1) for a, b in parts])
    ours, theirs = (tuple(torch.from_numpy(x) for x in side) for side in zip(*parts, strict=True))
    assert float(match_outputs(ours, theirs)) == pytest.approx(wanted, rel=1e-9)
    named = [dict(zip("ab", side, strict=True)) for side in (ours, theirs)]
    assert float(match_outputs(*named)) == pytest.approx(wanted, rel=1e-9)


def test_matching_does_not_depend_on_the_unit_of_the_outputs():
    a, b = torch.from_numpy(STUDENT), torch.from_numpy(TEACHER)
    loss = float(match_outputs(a, b))
    assert float(match_outputs(1000 * a, 1000 * b)) == pytest.approx(loss, rel=1e-9)
    assert float(match_outputs(b, b)) == 0


def test_a_teacher_with_another_number_of_outputs_is_refused():
    a = torch.from_numpy(STUDENT)
    with pytest.raises(ValueError, match="zip"):
        match_outputs((a, a), a)


def test_a_teacher_that_is_constant_gives_a_finite_loss():
    a = torch.from_numpy(STUDENT)
    assert match_outputs(a, torch.ones_like(a)).isfinite()
