"""Learning from the outputs of other detectors.

Heads over the same anchors are compared anchor by anchor (`densely`). Others, whatever their
strides, their anchors or their number, meet in boxes: those of all teachers are joined (`joined`),
and the student learns them as it learns labels, each as far as its teachers are sure of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss

from edgekd.tasks.decoding import Decoding, boxes_of, edges_of, scores_of

TEMPERATURE = 10.0  # of the edges' distributions, LD §5.1
SAME = 0.55  # least IoU of boxes that are one, WBF §3


@dataclass(frozen=True)
class Dense:
    """What heads say at every anchor.

    Attributes:
        classes: (N, A, K) logits; with a background K + 1.
        boxes: (N, A, 4): left, top, right, bottom in pixels of the input.
        quality: (N, A, 1) logits, or None.
        edges: (N, A, 4, bins) logits of each edge's distance, or None.
        foreground: (N, A): its largest score.
    """

    classes: Tensor
    boxes: Tensor
    quality: Tensor | None
    edges: Tensor | None
    foreground: Tensor

    @classmethod
    def of(cls, decoding: Decoding, found: Sequence[Tensor]) -> Dense:
        """Of raw heads, in the order of `edgekd.tasks.decoding.heads`."""
        classes, regression, *quality = found
        edges = edges_of(decoding, regression) if decoding.bins else None
        scores = scores_of(decoding, classes)
        return cls(
            classes, boxes_of(decoding, regression), next(iter(quality), None), edges,
            scores.amax(-1),
        )  # fmt: skip


def comparable(a: Decoding, b: Decoding) -> bool:
    """Whether heads with these decodings can be compared anchor by anchor."""
    return all(getattr(a, name) == getattr(b, name) for name in ("levels", "scores", "quality"))


def densely(
    ours: Dense,
    theirs: Sequence[Dense],
    *,
    background: bool,
    class_weight: float,
    box_weight: float,
    distribution_weight: float,
) -> Tensor:
    """Weighted sum of the terms at each anchor, a scalar; 0 for a student like its teacher.

    All are weighted by how much of a foreground the teachers see there, so the many anchors of
    nothing do not drown the few of something (Wang et al. 2019, arXiv:1906.03609, by boxes):

    - KL divergence of the classes, and of the quality;
    - 1 − GIoU of the boxes (Rezatofighi et al. 2019, arXiv:1902.09630);
    - localization distillation, where both give distributions of as many bins: the edges' KL
      divergence at temperature 10, times its square (LD, Zheng et al. 2021, arXiv:2102.12252
      §3.2), mean over edges and bins.

    Several teachers are averaged: their probabilities, and their boxes by how much of a foreground
    each of them sees.
    """
    of_classes = [t.classes.softmax(-1) if background else t.classes.sigmoid() for t in theirs]
    wanted = torch.stack(of_classes).mean(0)
    seen = torch.stack([t.foreground for t in theirs])
    weight = seen.mean(0)
    total = weight.sum().clamp(min=1)
    goal = (torch.stack([t.boxes for t in theirs]) * seen[..., None]).sum(0)
    goal = goal / seen.sum(0)[..., None].clamp(min=1e-12)
    classes = (
        F.kl_div(ours.classes.log_softmax(-1), wanted, reduction="none")
        if background
        else bernoulli_divergence(ours.classes, wanted)
    ).sum(-1)
    apart = generalized_box_iou_loss(ours.boxes, goal)
    loss: Tensor = class_weight * (weight * classes).sum() / total
    loss = loss + box_weight * (weight * apart).sum() / total
    if ours.quality is not None:
        qualities = [t.quality.sigmoid() for t in theirs if t.quality is not None]
        each = bernoulli_divergence(ours.quality, torch.stack(qualities).mean(0))[..., 0]
        loss = loss + class_weight * (weight * each).sum() / total
    alike = [
        t.edges for t in theirs
        if ours.edges is not None and t.edges is not None and t.edges.shape == ours.edges.shape
    ]  # fmt: skip
    if ours.edges is not None and alike:
        shares = torch.stack([(edges / TEMPERATURE).softmax(-1) for edges in alike]).mean(0)
        log_shares = (ours.edges / TEMPERATURE).log_softmax(-1)
        each = F.kl_div(log_shares, shares, reduction="none").mean((-2, -1)) * TEMPERATURE**2
        loss = loss + distribution_weight * (weight * each).sum() / total
    return loss


def bernoulli_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy less the entropy of what is wanted, which no student can undercut."""
    cross = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return cross - F.binary_cross_entropy(wanted, wanted, reduction="none")


def joined(detections: Sequence[Tensor]) -> Tensor:
    """(N, D, 6) detections of several detectors as those of one: weighted boxes fusion.

    Boxes of a class that overlap become their mean, weighted by their scores; its score is the sum
    of theirs over the number of detectors, so that what one alone sees counts less (WBF, Solovyev
    et al. 2019, arXiv:1910.13302 §3).

    Args:
        detections: (N, D, 6) of each: left, top, right, bottom, score, class; class −1: none.
    """
    if len(detections) == 1:
        return detections[0]
    every = torch.cat(list(detections), 1)
    found = torch.full_like(every, -1.0)
    for image, rows in enumerate(every):
        rows = rows[rows[:, 5] >= 0]
        if not len(rows):
            continue
        leads = rows[batched_nms(rows[:, :4], rows[:, 4], rows[:, 5], SAME)]
        overlap = box_iou(leads[:, :4], rows[:, :4])
        overlap = overlap.masked_fill(leads[:, None, 5] != rows[None, :, 5], -1)
        given = overlap == overlap.amax(0)  # leads are told apart by their overlap with themselves
        weight = given * rows[:, 4]
        sums = weight.sum(1, keepdim=True)
        score = (sums / len(detections)).clamp(max=1)
        found[image, : len(leads)] = torch.cat([
            weight @ rows[:, :4] / sums.clamp(min=1e-12), score, leads[:, 5:]
        ], 1)  # fmt: skip
    return found
