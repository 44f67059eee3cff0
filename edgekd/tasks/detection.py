"""Object detection: raw heads per anchor, padded boxes as targets.

Targets are the tensors that detection data yields behind the images:

    boxes (N, M, 5)  class, left, top, right, bottom in pixels of the input; what is learnt
    truth (N, M, 7)  the same in pixels of the original image, area, and whether it is a crowd
    frame (N, 6)     width and height of the original, scale in x and y, left and top border

Class −1 is padding. With boxes alone, they are the truth too, and no image has a crowd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from edgekd.errors import DataError, ModelError, nearest
from edgekd.knowledge.detection import Dense, comparable, densely, joined
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
from edgekd.tasks.decoding import (
    Decoding,
    anchors,
    boxes_of,
    detect,
    distances,
    edges_of,
    heads,
    scores_of,
)

ALPHA, BETA = 1.0, 6.0  # of the alignment, TOOD §3.2: score^α · IoU^β
SLACK = 0.1  # of the score, see `partners`
LEAST = 0.1  # score of a teacher's box that is learnt from


@dataclass(frozen=True)
class Taught:
    """How a teacher's outputs are read.

    Attributes:
        decoding: of its heads; None: as the student's, or its outputs are detections.
        columns: for each of the student's classes the teacher's index of it; None: the same.
    """

    decoding: Decoding | None = None
    columns: tuple[int, ...] | None = None

    @classmethod
    def by(cls, io: IO | None, labels: tuple[str, ...], student: Decoding) -> Taught:
        """From what is known of the teacher, and the student's labels and decoding."""
        if io is None:
            return cls()
        if io.decoding is not None and io.decoding.image != student.image:
            raise ModelError(
                f"the teacher's boxes are for images of {io.decoding.image}, the student's for "
                f"{student.image}; make the teacher's Network with an example of that size"
            )
        if not io.labels or not labels or io.labels == labels:
            return cls(io.decoding)
        if unknown := [label for label in labels if label not in io.labels]:
            raise ModelError(
                f"the teacher has no class {unknown[0]!r}{nearest(unknown[0], io.labels)}; it must "
                "know all of the student's, by the same names"
            )
        return cls(io.decoding, tuple(map(io.labels.index, labels)))

    def is_dense(self, student: Decoding, outputs: Any) -> bool:
        """Whether its outputs can be compared with the student's anchor by anchor."""
        return not isinstance(outputs, Tensor) and comparable(student, self.decoding or student)

    def dense(self, student: Decoding, outputs: Any) -> Dense:
        """Its heads at every anchor, with the student's classes."""
        decoding = self.decoding or student
        scores, *rest = heads(outputs, decoding)
        if self.columns is not None:
            kept = [0] * decoding.background + [k + decoding.background for k in self.columns]
            scores = scores[..., kept]
        return Dense.of(decoding, (scores, *rest))

    def detections(self, student: Decoding, outputs: Any) -> Tensor:
        """(N, D, 6) with the student's classes; its others are left out."""
        found = outputs
        if not isinstance(found, Tensor):
            found = detect(self.decoding or student, outputs)
        if found.dim() != 3 or found.shape[-1] != 6:
            raise ModelError(
                f"a teacher's single output is {tuple(found.shape)}; detections are (N, D, 6): "
                "left, top, right, bottom, score, class. Give raw heads as a Network with a "
                "decoding, or let a function turn its outputs into detections"
            )
        if self.columns is None:
            return found
        translated = torch.full_like(found[..., 5], -1)
        for ours, theirs in enumerate(self.columns):
            translated[found[..., 5] == theirs] = ours
        return torch.cat([found[..., :5], translated[..., None]], -1)


@dataclass(frozen=True)
class Detection:
    """Task-aligned assignment, cross-entropy and GIoU against boxes; COCO's mean AP.

    Args:
        class_weight: of the classes' term of the loss.
        box_weight: of the boxes' term.
        distribution_weight: of the term of the edges' distributions, where heads give them.
        candidates: anchors that may be given to each box.
        shown: least score of the detections that `agreement` asks for and `marks` gives.
        overlap: least IoU of two detections that are the same one.
        decoding: how outputs are coded; `of` takes it from a network.
        classes: K; 0 until `of` knows it: as many as occur.
        teachers: what `of` knows of each.
    """

    class_weight: float = 1.0
    box_weight: float = 2.5
    distribution_weight: float = 0.25
    candidates: int = 13
    shown: float = 0.3
    overlap: float = 0.9
    decoding: Decoding | None = None
    classes: int = 0
    teachers: tuple[Taught, ...] = ()
    metric_name: str = "mAP@[.5:.95]"

    def of(self, io: IO, teachers: Sequence[IO | None] = ()) -> Detection:
        """This task for a network's own heads, taught by networks with theirs.

        Raises:
            ModelError: the network does not say how its outputs become boxes, or a teacher does
                not know its classes or its size of images.
        """
        decoding = _known(io.decoding)
        return replace(
            self, decoding=decoding, classes=len(io.labels),
            teachers=tuple(Taught.by(their, io.labels, decoding) for their in teachers),
        )  # fmt: skip

    def check(self, outputs: Any, io: IO) -> None:
        """Raw heads that the network's decoding fits, for as many classes as there are labels.

        Raises:
            ModelError: they are others.
        """
        decoding = _known(io.decoding)
        found = heads(outputs, decoding)[0].shape[-1] - decoding.background
        if io.labels and found != len(io.labels):
            raise ModelError(
                f"it has {found} classes; the data has {len(io.labels)}: give kwargs that make it "
                f"{len(io.labels)} (num_classes, mostly)"
            )

    def answers(self, outputs: Any) -> Tensor:
        """(N, D, 6) detections, see `edgekd.tasks.decoding.detect`."""
        with torch.no_grad():
            return detect(_known(self.decoding), outputs)

    def loss(self, outputs: Any, targets: tuple[Tensor, ...]) -> Tensor:
        """Weighted sum of the classes', the boxes' and, where they are, further heads' terms.

        Each anchor learns the alignment of its box as the score of its class, 0 for all others
        (Feng et al. 2021, TOOD, arXiv:2108.07755 §3.2), and 1 − GIoU of its box (Rezatofighi et
        al. 2019, arXiv:1902.09630), weighted by that score; a quality learns the IoU of the box;
        a distribution learns each distance as the mean of the two bins around it (distribution
        focal loss, Li et al. 2020, GFL, arXiv:2006.04388 §3.2 eq. 6). All are sums over the sum of
        those scores.
        """
        return self._towards(outputs, targets[0])

    def _towards(self, outputs: Any, truth: Tensor, certainty: Tensor | None = None) -> Tensor:
        """`loss` of boxes (N, M, 5), whose scores are to be `certainty` (N, M) times as high."""
        decoding = _known(self.decoding)
        classes, regression, *quality = heads(outputs, decoding)
        # most images have fewer boxes than the padding has room for; one row stays
        truth = F.pad(truth.to(regression.dtype), (0, 0, 0, 1), value=-1)
        used = F.pad((truth[:, :-1, 0] >= 0).any(0), (0, 1), value=True)
        truth = truth[:, used]
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
        if certainty is not None:
            sure = F.pad(certainty.to(aligned.dtype), (0, 1))[:, used]
            aligned = aligned * sure.gather(1, row)
        kind = truth[..., 0].gather(1, row).long().clamp(min=0)
        wanted = torch.zeros_like(scores).scatter(-1, kind[..., None], aligned[..., None])
        total = aligned.sum().clamp(min=1)
        loss: Tensor = self.class_weight * _class_loss(decoding, classes, wanted).sum() / total
        goal = truth[..., 1:].gather(1, row[..., None].expand(-1, -1, 4))
        apart = generalized_box_iou_loss(boxes[chosen], goal[chosen])
        loss = loss + self.box_weight * (aligned[chosen] * apart).sum() / total
        if decoding.bins:
            logits = edges_of(decoding, regression[chosen])
            each = _distribution_focal_loss(logits, distances(decoding, goal)[chosen])
            loss = loss + self.distribution_weight * (aligned[chosen] * each).sum() / total
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

    def distillation(self, outputs: Any, *teacher_outputs: Any) -> Tensor:
        """From one or more teachers: anchor by anchor, or else by their boxes.

        Heads over the same anchors, with the same kind of scores, are compared densely, see
        `edgekd.knowledge.detection`. Otherwise the teachers' boxes, joined, are learnt as labels
        are, each box as far as its score says.

        Args:
            teacher_outputs: raw heads, or detections (N, D, 6) as `answers` gives them.

        Raises:
            ModelError: they are neither.
        """
        decoding = _known(self.decoding)
        given = self.teachers or (Taught(),) * len(teacher_outputs)
        pairs = list(zip(given, teacher_outputs, strict=True))
        if all(taught.is_dense(decoding, theirs) for taught, theirs in pairs):
            ours = Dense.of(decoding, heads(outputs, decoding))
            dense = [taught.dense(decoding, theirs) for taught, theirs in pairs]
            for each in dense:
                if each.classes.shape != ours.classes.shape:
                    raise ModelError(
                        f"the student's classes are {tuple(ours.classes.shape)}, the teacher's "
                        f"{tuple(each.classes.shape)}; give both labels, to choose among the "
                        "teacher's by name"
                    )
            return densely(
                ours, dense, background=bool(decoding.background), class_weight=self.class_weight,
                box_weight=self.box_weight, distribution_weight=self.distribution_weight,
            )  # fmt: skip
        boxes = joined([taught.detections(decoding, theirs) for taught, theirs in pairs])
        boxes = boxes.masked_fill(boxes[..., 4:5] < LEAST, -1)
        truth = torch.cat([boxes[..., 5:], boxes[..., :4]], -1)
        return self._towards(outputs, truth, boxes[..., 4].clamp(min=0))

    def foreground(self, targets: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor | None:
        """(N, h, w) of a feature map: 1 / cells of the smallest box at each cell, 0 without one.

        So every box counts as much as any other (FGD, arXiv:2111.11837 §3.1).
        """
        boxes = F.pad(targets[0], (0, 0, 0, 1), value=-1)  # there may be none at all
        scale = [n / of for n, of in zip(size, _known(self.decoding).image, strict=True)]
        low, high = boxes[..., [2, 1]], boxes[..., [4, 3]]  # of rows and columns
        first = (low * low.new_tensor(scale)).floor()
        behind = (high * high.new_tensor(scale)).ceil()
        rows, columns = (
            (at >= first[..., axis, None]) & (at < behind[..., axis, None])
            for axis, at in enumerate(torch.arange(n, device=boxes.device) for n in size)
        )
        there = rows[..., None] & columns[..., None, :] & (boxes[..., 0] >= 0)[..., None, None]
        cells = (behind - first).prod(-1).clamp(min=1)
        found: Tensor = (there / cells[..., None, None]).amax(1)
        return found

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


def _distribution_focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """(n,) cross-entropy of (n, 4, bins) with the two bins around (n, 4) distances, mean of 4."""
    bins = logits.shape[-1]
    wanted = wanted.clamp(0, bins - 1)
    below = wanted.floor().clamp(max=bins - 2)
    above = wanted - below
    shares = logits.log_softmax(-1)
    near, far = (shares.gather(-1, (below + i).long()[..., None])[..., 0] for i in (0, 1))
    return -((1 - above) * near + above * far).mean(-1)


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
