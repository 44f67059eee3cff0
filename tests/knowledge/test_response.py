"""The response loss, against NumPy, Hinton's limit and values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgekd.knowledge.response import Response


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def tempered_kl(student: np.ndarray, teacher: np.ndarray, t: float) -> float:
    """T² Σ_k q_k ln(q_k / p_k), mean over samples, in float64."""
    p, q = softmax(student / t), softmax(teacher / t)
    return float(t * t * (q * np.log(q / p)).sum(1).mean())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (32, 100)])
def test_against_numpy(temperature, shape):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (2, *shape))
    loss = Response(temperature)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert loss.shape == ()
    assert float(loss) == pytest.approx(tempered_kl(student, teacher, temperature), rel=1e-10)


def test_values_worked_out_by_hand():
    zero = torch.zeros(1, 2, dtype=torch.float64)
    # teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(Response(1.0)(zero, teacher)) == pytest.approx(by_hand, rel=1e-12)
    assert by_hand == pytest.approx(0.130812, abs=1e-6)
    # the same shares at T = 2 need twice the scores; T² makes the loss four times as large
    assert float(Response(2.0)(zero, 2 * teacher)) == pytest.approx(4 * by_hand, rel=1e-12)
    # two samples, the second without a difference: half of it
    both = torch.cat([teacher, zero])
    assert float(Response(1.0)(torch.zeros_like(both), both)) == pytest.approx(
        by_hand / 2, rel=1e-12
    )


def test_direction_is_from_the_teacher():
    a = torch.tensor([[2.0, 0.0, 0.0]])
    b = torch.tensor([[0.0, 1.0, 0.0]])
    loss = float(Response(1.0)(a, b))
    assert loss == pytest.approx(tempered_kl(a.double().numpy(), b.double().numpy(), 1.0), rel=1e-6)
    assert loss != pytest.approx(float(Response(1.0)(b, a)), rel=1e-2)


def test_gradient_at_high_temperature_is_half_of_squared_difference():
    # Hinton et al. 2015 eq. 4: T² dC/dz_i -> (z_i − v_i) / K for scores of mean zero
    rng = np.random.default_rng(1)
    z, v = (x - x.mean(1, keepdims=True) for x in rng.normal(0, 2, (2, 5, 8)))
    student = torch.tensor(z, requires_grad=True)
    Response(1e4)(student, torch.from_numpy(v)).backward()
    assert np.allclose(student.grad.numpy(), (z - v) / 8 / 5, rtol=1e-3, atol=1e-5)


def test_gradient_is_t_times_the_difference_of_shares():
    # d/dz of T² · KL = T · (p − q), by hand
    rng = np.random.default_rng(2)
    z, v = rng.normal(0, 2, (2, 5, 8))
    student = torch.tensor(z, requires_grad=True)
    Response(3.0)(student, torch.from_numpy(v)).backward()
    assert np.allclose(student.grad.numpy(), 3 * (softmax(z / 3) - softmax(v / 3)) / 5, atol=1e-12)


def test_equal_scores_cost_nothing_and_a_shift_does_not_count():
    scores = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(Response(4.0)(scores, scores + 7)) == pytest.approx(0, abs=1e-12)


def test_large_scores_stay_finite():
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = Response(1.0)(student, torch.tensor([[-1e4, 1e4]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2e4)
    assert student.grad.isfinite().all()
