"""Object detection: raw heads per anchor, padded boxes as targets.

Targets are the tensors that detection data yields behind the images:

    boxes (N, M, 5)  class, left, top, right, bottom in pixels of the input; what is learnt
    truth (N, M, 7)  the same in pixels of the original image, area, and whether it is a crowd
    frame (N, 6)     width and height of the original, scale in x and y, left and top border

Class −1 is padding. With boxes alone, they are the truth too, and no image has a crowd.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from edgekd.errors import DataError, ModelError
from edgekd.network import IO
from edgekd.tasks.average_precision import (
    SIZES,
    Floats,
    Matches,
    interval,
    match,
    mean,
    partners,
    resampled,
)
from edgekd.tasks.base import Curves, Difference, Mark, Score
from edgekd.tasks.decoding import Decoding, anchors, boxes_of, detect, heads, scores_of

ALPHA, BETA = 1.0, 6.0  # of the alignment, TOOD §3.2: score^α · IoU^β
SLACK = 0.1  # of the score, see `partners`


@dataclass(frozen=True)
class Detection:
    """Task-aligned assignment, cross-entropy and GIoU against boxes; COCO's mean AP.

    Args:
        class_weight: of the classes' term of the loss.
        box_weight: of the boxes' term.
        candidates: anchors that may be given to each box.
        shown: least score of the detections that `agreement` asks for and `marks` gives.
        overlap: least IoU of two detections that are the same one.
        decoding: how outputs are coded; `of` takes it from a network.
        classes: K; 0 until `of` knows it: as many as occur.
    """

    class_weight: float = 1.0
    box_weight: float = 2.5
    candidates: int = 13
    shown: float = 0.3
    overlap: float = 0.9
    decoding: Decoding | None = None
    classes: int = 0
    metric_name: str = "mAP@[.5:.95]"

    def of(self, io: IO) -> Detection:
        """This task for a network's own heads.

        Raises:
            ModelError: the network does not say how its outputs become boxes.
        """
        return replace(self, decoding=_known(io.decoding), classes=len(io.labels))

    def answers(self, outputs: Any) -> Tensor:
        """(N, D, 6) detections, see `edgekd.tasks.decoding.detect`."""
        with torch.no_grad():
            return detect(_known(self.decoding), outputs)

    def loss(self, outputs: Any, targets: tuple[Tensor, ...]) -> Tensor:
        """Weighted sum of the classes', the boxes' and, where there is one, the quality's term.

        Each anchor learns the alignment of its box as the score of its class, 0 for all others
        (Feng et al. 2021, TOOD, arXiv:2108.07755 §3.2), and 1 − GIoU of its box (Rezatofighi et
        al. 2019, arXiv:1902.09630), weighted by that score; a quality learns the IoU of the box.
        All are sums over the sum of those scores.
        """
        decoding = _known(self.decoding)
        classes, regression, *quality = heads(outputs, decoding)
        truth = targets[0].to(regression.dtype)
        used = (truth[..., 0] >= 0).any(0)
        used[0] = True
        truth = truth[:, used]  # most images have fewer boxes than the padding has room for
        boxes = boxes_of(decoding, regression)
        known = classes.shape[-1] - decoding.background
        if int(truth[..., 0].max()) >= known:
            raise DataError(
                f"a box of class {int(truth[..., 0].max())}; the network has {known} classes, so "
                f"they go from 0 to {known - 1}"
            )
        with torch.no_grad():
            scores = scores_of(decoding, classes, *quality)
            given, aligned, overlap = self._assign(decoding, scores, boxes, truth)
        chosen = given >= 0
        row = given.clamp(min=0)
        kind = truth[..., 0].gather(1, row).long().clamp(min=0)
        wanted = torch.zeros_like(scores).scatter(-1, kind[..., None], aligned[..., None])
        total = aligned.sum().clamp(min=1)
        loss: Tensor = self.class_weight * _class_loss(decoding, classes, wanted).sum() / total
        goal = truth[..., 1:].gather(1, row[..., None].expand(-1, -1, 4))
        apart = generalized_box_iou_loss(boxes[chosen], goal[chosen])
        loss = loss + self.box_weight * (aligned[chosen] * apart).sum() / total
        for logit in quality:
            each = F.binary_cross_entropy_with_logits(
                logit[chosen][:, 0], overlap[chosen], reduction="none"
            )
            loss = loss + self.class_weight * (aligned[chosen] * each).sum() / total
        return loss

    def _assign(
        self, decoding: Decoding, scores: Tensor, boxes: Tensor, truth: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For every anchor the row of its box or −1, the score it should have, and its IoU.

        Anchors whose centre lies within a box, and the one nearest to its middle, compete for it by
        score^α · IoU^β; the best `candidates` get it, and of several boxes each takes the one it
        overlaps most.

        Args:
            scores: (N, A, K).
            boxes: (N, A, 4).
            truth: (N, M, 5).

        Returns:
            (N, A) each.
        """
        at = anchors(decoding).to(boxes.device)
        centres = (at[:, :2] + at[:, 2:]) / 2
        there = truth[..., 0] >= 0
        of_class = scores.transpose(1, 2).gather(
            1, truth[..., :1].long().clamp(min=0).expand(-1, -1, len(at))
        )
        iou = pairwise_iou(truth[..., 1:], boxes)
        low, high = truth[:, :, None, 1:3], truth[:, :, None, 3:5]
        within = ((centres > low) & (centres < high)).all(-1)
        nearest = (centres - (low + high) / 2).square().sum(-1).argmin(-1, keepdim=True)
        within = within.scatter(-1, nearest, True) & there[..., None]
        aligned = of_class**ALPHA * iou**BETA
        best = aligned.masked_fill(~within, -1).topk(min(self.candidates, len(at)), -1).indices
        picked = torch.zeros_like(within).scatter(-1, best, True) & within
        given = iou.masked_fill(~picked, -1).max(1)
        row = given.indices.masked_fill(given.values < 0, -1)
        # the best anchor of a box is to score the box's largest IoU, the others in proportion
        mine = row[:, None] == torch.arange(truth.shape[1], device=row.device)[:, None]
        top = (aligned * mine).amax(-1, keepdim=True).clamp(min=1e-12)
        score = (aligned * mine / top * (iou * mine).amax(-1, keepdim=True)).amax(1)
        return row, score, given.values.clamp(min=0)

    def distillation(self, outputs: Any, teacher_outputs: Any) -> Tensor:
        """From a teacher with heads of the same shapes: its scores, and its boxes as targets.

        Both terms are weighted by how much of a foreground the teacher sees at each anchor: its
        largest score. KL divergence of the classes, 0 at the teacher's scores; 1 − GIoU of boxes.

        Raises:
            ModelError: heads of other shapes.
        """
        decoding = _known(self.decoding)
        ours, theirs = heads(outputs, decoding), heads(teacher_outputs, decoding)
        shapes = [[tuple(t.shape) for t in found] for found in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"the student's heads are {shapes[0]}, the teacher's {shapes[1]}; a detector "
                "learns from one of the same strides, anchors and classes: choose such a student"
            )
        scores = scores_of(decoding, theirs[0])
        weight = scores.amax(-1)
        total = weight.sum().clamp(min=1)
        wanted = theirs[0].softmax(-1) if decoding.background else scores
        classes = _divergence(decoding, ours[0], wanted)
        boxes, goal = (boxes_of(decoding, found[1]) for found in (ours, theirs))
        apart = generalized_box_iou_loss(boxes, goal)
        loss: Tensor = self.class_weight * (weight * classes).sum() / total
        loss = loss + self.box_weight * (weight * apart).sum() / total
        for mine, its in zip(ours[2:], theirs[2:], strict=True):
            each = _bernoulli_divergence(mine[..., 0], its[..., 0].sigmoid())
            loss = loss + self.class_weight * (weight * each).sum() / total
        return loss

    def score(self, answers: Tensor, targets: tuple[Tensor, ...]) -> Score:
        """COCO's mean average precision, with a bootstrap interval over images.

        `parts`: mAP50, and the mean by the size of the truth in the original image (small below
        32² pixels, large from 96² on). `curves`: precision over recall at IoU 0.5, interpolated as
        COCO does: at each of 101 recalls the largest precision from there on; their mean is mAP50.
        """
        detections, truth = original_pixels(answers, targets)
        found = match(detections, truth, self._classes(detections, truth))
        precision = found.precision()
        value = mean(precision[..., 0])
        by_class = tuple(mean(precision[:, :, k, 0]) for k in range(precision.shape[2]))
        sizes = {size: mean(precision[..., i]) for i, size in enumerate(SIZES) if size != "all"}
        return Score(
            value=value or 0.0, ci95=interval(resampled(found)), n=len(answers), by_class=by_class,
            parts={"mAP50": mean(precision[0, ..., 0])} | sizes,
            curves=None if value is None else _precision_curves(found, precision),
        )  # fmt: skip

    def difference(self, a: Tensor, b: Tensor, targets: tuple[Tensor, ...]) -> Difference:
        """Of the mean average precisions; the interval draws the same images for both."""
        pairs = [original_pixels(answers, targets) for answers in (a, b)]
        classes = max(self._classes(*pair) for pair in pairs)
        found = [match(*pair, classes) for pair in pairs]
        ours, theirs = (mean(m.precision()[..., 0]) or 0.0 for m in found)
        gaps = [x - y for x, y in zip(*map(resampled, found), strict=True)]
        return Difference(value=ours - theirs, ci95=interval(gaps))

    def _classes(self, detections: Tensor, truth: Tensor) -> int:
        occurring = max(int(detections[..., 5].max()), int(truth[..., 0].max())) + 1
        return max(self.classes, occurring, 1)

    def agreement(self, a: Tensor, b: Tensor) -> float:
        """Share of the detections of two networks that both show.

        Every detection with a score of `shown` or more is to have one of its own in the other's
        answer: of the same class, with an IoU of `overlap` or more, and a score that is not more
        than 0.1 below `shown`. 1 if there are none. Of detections, not of images: with a dozen in
        each, one step of the integers moves one of them past a limit in every thirtieth image
        (BCCD, 87 images, INT8 in ONNX Runtime against the network it came from).
        """
        pairs = [
            partners(x, y, score=self.shown, slack=SLACK, iou=self.overlap)
            for x, y in zip(a, b, strict=True)
        ]
        found, total = (sum(column) for column in zip(*pairs, strict=True))
        return found / total if total else 1.0

    def marks(self, answers: Tensor) -> list[list[Mark]]:
        """Detections with a score of `shown` or more."""
        return [
            [
                Mark(label=int(kind), score=round(score, 3), box=_corners(box))
                for *box, score, kind in image.tolist()
                if score >= self.shown
            ]
            for image in answers
        ]

    def truth(self, targets: tuple[Tensor, ...]) -> list[list[Mark]]:
        """Boxes; no crowds."""
        return [
            [Mark(label=int(kind), box=_corners(box)) for kind, *box in image.tolist() if kind >= 0]
            for image in targets[0]
        ]


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """(N, M, A) IoU of boxes (N, M, 4) with boxes (N, A, 4)."""
    low = torch.maximum(a[:, :, None, :2], b[:, None, :, :2])
    high = torch.minimum(a[:, :, None, 2:], b[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b)]
    return shared / (areas[0][:, :, None] + areas[1][:, None] - shared).clamp(min=1e-9)


def _precision_curves(matches: Matches, precision: Floats) -> Curves:
    """Of each class at the first IoU; with few digits, since they are kept in text."""
    lines = precision[0, ..., 0].round(6).T.tolist()
    return Curves(
        x_name="recall", y_name="precision at IoU 0.5", x=matches.params.recThrs.round(6).tolist(),
        by_class=tuple(None if line[0] < 0 else tuple(line) for line in lines),
    )  # fmt: skip


def _corners(box: list[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (round(edge, 2) for edge in box)
    return left, top, right, bottom


def _known(decoding: Decoding | None) -> Decoding:
    if decoding is None:
        raise ModelError(
            "this network does not say how its outputs become boxes; give Network(decoding=...), "
            "or its module a method box_decoding(height, width)"
        )
    return decoding


def _class_loss(decoding: Decoding, classes: Tensor, wanted: Tensor) -> Tensor:
    """(N, A) cross-entropy with the scores `wanted` (N, A, K); the background gets the rest."""
    if decoding.background:
        whole = torch.cat([1 - wanted.sum(-1, keepdim=True), wanted], -1)
        return -(whole * classes.log_softmax(-1)).sum(-1)
    return F.binary_cross_entropy_with_logits(classes, wanted, reduction="none").sum(-1)


def _divergence(decoding: Decoding, classes: Tensor, wanted: Tensor) -> Tensor:
    """(N, A) KL of the classes' distribution, or sum of those of each class by itself."""
    if decoding.background:
        return F.kl_div(classes.log_softmax(-1), wanted, reduction="none").sum(-1)
    return _bernoulli_divergence(classes, wanted).sum(-1)


def _bernoulli_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy less the entropy of what is wanted, which no student can undercut."""
    cross = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return cross - F.binary_cross_entropy(wanted, wanted, reduction="none")


def original_pixels(answers: Tensor, targets: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Detections and truth in pixels of the original images, (N, D, 6) and (N, M, 7)."""
    boxes, *rest = targets
    if not rest:
        sides = boxes[..., 3:] - boxes[..., 1:3]
        more = torch.stack([sides.prod(-1), torch.zeros_like(sides[..., 0])], -1)
        return answers, torch.cat([boxes, more], -1)
    truth, frame = rest
    limits, scale, border = (part.repeat(1, 1, 2) for part in frame[:, None].chunk(3, -1))
    edges = torch.minimum(((answers[..., :4] - border) / scale).clamp(min=0), limits)
    return torch.cat([edges, answers[..., 4:]], -1), truth
