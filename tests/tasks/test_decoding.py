"""Decoding: anchors, boxes and suppression against NumPy; shapes that do not fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgekd.errors import ModelError
from edgekd.tasks.decoding import Decoding, Level, anchors, boxes_of, detect, heads, scores_of

LEVELS = (
    Level(grid=(2, 3), stride=(8, 16), sizes=((8, 8), (4, 20))),
    Level(grid=(1, 1), stride=(16, 48), offset=0.0, sizes=((48, 16),)),
)
IMAGE = (16, 48)
A = 13


def decoding(**changes) -> Decoding:
    return Decoding(**({"image": IMAGE, "levels": LEVELS, "boxes": "distance"} | changes))


def anchors_by_hand() -> np.ndarray:
    found = []
    for level in LEVELS:
        for row in range(level.grid[0]):
            for column in range(level.grid[1]):
                y = (row + level.offset) * level.stride[0]
                x = (column + level.offset) * level.stride[1]
                for w, h in level.sizes:
                    found.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return np.array(found)


def raw(k: int = 3, *, seed: int = 0, n: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, (n, A, k)), rng.normal(0, 0.5, (n, A, 4))


def test_anchors_go_level_by_level_row_by_row():
    np.testing.assert_allclose(anchors(decoding()).numpy(), anchors_by_hand())


@pytest.mark.parametrize("kind", ["distance", "log_distance", "distribution", "offset"])
def test_boxes_are_those_of_the_papers(kind):
    at, numbers = anchors_by_hand(), raw()[1]
    numbers[0, 0] = [0.1, 0.2, 9, 9]  # beyond the clip of logarithms
    size, centre = at[:, 2:] - at[:, :2], (at[:, :2] + at[:, 2:]) / 2
    if kind == "offset":
        middle = numbers[..., :2] / 10 * size + centre
        sides = np.exp(np.minimum(numbers[..., 2:] / 5, 1.5)) * size
        wanted = np.concatenate([middle - sides / 2, middle + sides / 2], -1)
    else:
        apart = np.exp(np.minimum(numbers, 1.5)) if kind == "log_distance" else numbers
        if kind == "distribution":
            numbers = np.random.default_rng(1).normal(0, 2, (*numbers.shape[:2], 4 * 5))
            shares = np.exp(numbers.reshape(*numbers.shape[:2], 4, 5))
            apart = (shares * np.arange(5)).sum(-1) / shares.sum(-1)
        wanted = np.concatenate(
            [centre - apart[..., :2] * size, centre + apart[..., 2:] * size], -1
        )
    bins = 5 if kind == "distribution" else 0
    rules = decoding(boxes=kind, bins=bins, weights=(10, 10, 5, 5), largest=1.5)
    np.testing.assert_allclose(boxes_of(rules, torch.from_numpy(numbers)), wanted, rtol=1e-6)


def test_scores_are_sigmoids_or_a_softmax_without_its_background():
    logits, quality = raw()[0], raw(seed=1)[1][..., :1]
    p, q = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-quality))
    classes = torch.from_numpy(logits)
    np.testing.assert_allclose(scores_of(decoding(), classes), p)
    together = scores_of(decoding(quality=True), classes, torch.from_numpy(quality))
    np.testing.assert_allclose(together, np.sqrt(p * q))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(scores_of(decoding(scores="softmax"), classes), shares[..., 1:])


def detect_by_hand(rules: Decoding, scores: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """One image: threshold, best of each level, greedy suppression in each class."""
    height, width = rules.image
    boxes = boxes.clip(0, [width, height, width, height])
    parts, first = [], 0
    for count in [level.anchors for level in rules.levels]:
        rows = [
            (scores[a, k], a, k)
            for a in range(first, first + count) for k in range(scores.shape[1])
            if scores[a, k] > rules.score_threshold
        ]  # fmt: skip
        parts += sorted(rows, reverse=True)[: rules.candidates]
        first += count
    kept: list[tuple[float, int, int]] = []
    for score, a, k in sorted(parts, reverse=True):
        if all(k != c or iou(boxes[a], boxes[b]) <= rules.nms_threshold for _, b, c in kept):
            kept.append((score, a, k))
    return np.array([[*boxes[a], score, k] for score, a, k in kept[: rules.detections]])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(sides.clip(0)))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


@pytest.mark.parametrize("limits", [{}, {"candidates": 3}, {"detections": 4}, {"nms_threshold": 0}])
def test_detections_are_those_of_greedy_suppression_by_hand(limits):
    rules = decoding(boxes="log_distance", score_threshold=0.3, **limits)
    classes, numbers = (torch.from_numpy(t).float() for t in raw())
    found = detect(rules, {"classes": classes, "boxes": numbers})
    assert found.shape == (2, rules.detections, 6)
    for image in range(2):
        wanted = detect_by_hand(
            rules, classes[image].sigmoid().numpy(), boxes_of(rules, numbers)[image].numpy()
        )
        count = len(wanted)
        assert 0 < count <= rules.detections
        np.testing.assert_allclose(found[image, :count], wanted, rtol=1e-5, atol=1e-5)
        assert (found[image, count:] == -1).all()


def test_nothing_is_detected_below_the_threshold():
    outputs = torch.full((1, A, 3), -20.0), torch.zeros(1, A, 4)
    assert (detect(decoding(), outputs) == -1).all()
    outputs[0][:] = math.nan
    assert (detect(decoding(), outputs) == -1).all()


@pytest.mark.parametrize(
    "outputs",
    [
        (torch.zeros(2, A, 3),),
        (torch.zeros(2, A, 3), torch.zeros(2, A, 4), torch.zeros(2, A, 1)),
        (torch.zeros(2, A - 1, 3), torch.zeros(2, A - 1, 4)),
        {"boxes": torch.zeros(2, A, 4), "classes": torch.zeros(2, A, 3)},
    ],
)
def test_other_heads_are_refused(outputs):
    with pytest.raises(ModelError, match=r"\(N, A, K\), \(N, A, 4\) with A = 13 anchors; this one"):
        heads(outputs, decoding())
