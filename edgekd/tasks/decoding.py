"""From a detector's raw heads to boxes: anchors, decoding, and suppression of duplicates, in float.

A detector's core gives two tensors, three with a quality, in this order: classes (N, A, K), boxes
(N, A, 4·B) and quality (N, A, 1), where B is 1 but for distributions, and A counts the anchors of
all feature maps, level by level, row by row, and at each location in the order of `Level.sizes`.
What turns them into boxes is a `Decoding`: plain values in the network's IO, which any language can
repeat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from edgekd.errors import ModelError


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Level(_Frozen):
    """The anchors of one feature map.

    Attributes:
        grid: rows and columns.
        stride: pixels of the input from row to row, and from column to column.
        offset: the anchors of row i and column j have their centre at (i + offset) · stride.
        sizes: (width, height) in pixels of each anchor at a location.
    """

    grid: tuple[int, int]
    stride: tuple[float, float]
    offset: float = 0.5
    sizes: tuple[tuple[float, float], ...]

    @property
    def anchors(self) -> int:
        """How many there are."""
        return self.grid[0] * self.grid[1] * len(self.sizes)


class Decoding(_Frozen):
    """How a detector's raw heads become boxes, for one size of the input.

    Attributes:
        image: height and width of the input in pixels; boxes are clipped to it.
        levels: feature maps, in the order of the outputs.
        boxes: what the four numbers of an anchor (centre c, size s) are:
            "distance": from its centre to the left, top, right and bottom edge, over its size
                (FCOS, Tian et al. 2019, arXiv:1904.01355 §3.1);
            "log_distance": the logarithms of these;
            "distribution": the distances again, each as `bins` logits of 0, 1, … sizes, of which
                the mean is taken (GFL, Li et al. 2020, arXiv:2006.04388 §3.2);
            "offset": (c' − c) / s and log(s' / s) of the box (c', s'), times `weights`
                (R-CNN, Girshick et al. 2014, arXiv:1311.2524 appendix C).
        bins: of "distribution", 2 or more; 0 of all others.
        weights: of "offset", for x, y, width and height.
        largest: logarithms are clipped to this from above before exp.
        scores: "sigmoid" of each class, or "softmax" over the classes and a background, which is
            column 0 and no class.
        quality: whether there is a third head; the score is then √(σ(class) · σ(quality)).
        score_threshold: a detection's score is above it.
        candidates: most detections before the suppression, by score, of each level or each class.
        nms_threshold: of two boxes of a class with a larger IoU the one with the lower score goes.
        detections: most detections of an image.
    """

    image: tuple[int, int]
    levels: tuple[Level, ...]
    boxes: Literal["distance", "log_distance", "distribution", "offset"]
    bins: int = 0
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    largest: float = math.log(1000 / 16)
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    quality: bool = False
    score_threshold: float = 0.01
    candidates: int = 1000
    candidates_of: Literal["level", "class"] = "level"
    nms_threshold: float = 0.6
    detections: int = 100

    @model_validator(mode="after")
    def _bins_of_distributions(self) -> Decoding:
        if (self.boxes == "distribution") != (self.bins > 1):
            raise ValueError(
                f'bins is {self.bins} with boxes = "{self.boxes}"; a distribution has 2 or more, '
                "the others 0"
            )
        return self

    @property
    def background(self) -> int:
        """Columns of the classes' head that are no class."""
        return int(self.scores == "softmax")


def heads(outputs: Any, decoding: Decoding) -> tuple[Tensor, ...]:
    """The raw heads of a core's outputs: a dict, or a sequence in the same order.

    Raises:
        ModelError: not as many tensors, or not of the shapes that the decoding describes.
    """
    found = tuple(outputs.values() if isinstance(outputs, Mapping) else outputs)
    total = sum(level.anchors for level in decoding.levels)
    widths = [None, 4 * max(decoding.bins, 1), 1][: 2 + decoding.quality]
    fits = len(found) == len(widths) and all(
        t.dim() == 3 and t.shape[1] == total and width in (None, t.shape[2])
        for t, width in zip(found, widths, strict=True)
    )
    if not fits:
        wanted = ["(N, A, K)", f"(N, A, {widths[1]})", "(N, A, 1)"][: len(widths)]
        raise ModelError(
            f"a detector's heads are {', '.join(wanted)} with A = {total} anchors; this one gives "
            f"{[tuple(t.shape) for t in found]}: let its `box_decoding` describe them"
        )
    return found


@cache
def anchors(decoding: Decoding) -> Tensor:
    """(A, 4) float32: left, top, right and bottom edge of every anchor in pixels of the input."""
    parts = []
    for level in decoding.levels:
        rows, columns = (
            (torch.arange(count, dtype=torch.float64) + level.offset) * stride
            for count, stride in zip(level.grid, level.stride, strict=True)
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres = torch.stack([x, y], -1).reshape(-1, 1, 2)
        halves = torch.tensor(level.sizes, dtype=torch.float64) / 2
        parts.append(torch.cat([centres - halves, centres + halves], -1).reshape(-1, 4))
    return torch.cat(parts).float()


def boxes_of(decoding: Decoding, regression: Tensor) -> Tensor:
    """(..., A, 4·B) raw numbers to left, top, right, bottom in pixels of the input, not clipped."""
    at = anchors(decoding).to(regression.device)
    size, centre = at[:, 2:] - at[:, :2], (at[:, :2] + at[:, 2:]) / 2
    if decoding.boxes == "offset":
        moved, grown = (regression / regression.new_tensor(decoding.weights)).chunk(2, -1)
        middle = centre + moved * size
        half = grown.clamp(max=decoding.largest).exp() * size / 2
        return torch.cat([middle - half, middle + half], -1)
    if decoding.boxes == "log_distance":
        regression = regression.clamp(max=decoding.largest).exp()
    if decoding.boxes == "distribution":
        shares = edges_of(decoding, regression).softmax(-1)
        regression = shares @ torch.arange(decoding.bins, dtype=shares.dtype, device=shares.device)
    before, behind = regression.chunk(2, -1)
    return torch.cat([centre - before * size, centre + behind * size], -1)


def edges_of(decoding: Decoding, regression: Tensor) -> Tensor:
    """(..., A, 4, bins) logits of each edge's distance, of a distribution's raw numbers."""
    return regression.reshape(*regression.shape[:-1], 4, decoding.bins)


def distances(decoding: Decoding, boxes: Tensor) -> Tensor:
    """(..., A, 4) from each anchor's centre to the edges of its box, over its size."""
    at = anchors(decoding).to(boxes.device)
    size, centre = at[:, 2:] - at[:, :2], (at[:, :2] + at[:, 2:]) / 2
    return torch.cat([(centre - boxes[..., :2]) / size, (boxes[..., 2:] - centre) / size], -1)


def scores_of(decoding: Decoding, classes: Tensor, quality: Tensor | None = None) -> Tensor:
    """(..., A, K) scores from 0 to 1, without the background."""
    if decoding.scores == "softmax":
        return classes.softmax(-1)[..., 1:]
    scores = classes.sigmoid()
    return scores if quality is None else (scores * quality.sigmoid()).sqrt()


def detect(decoding: Decoding, outputs: Any) -> Tensor:
    """(N, D, 6) float32: left, top, right, bottom in pixels of the input, score, class.

    D is `decoding.detections`; by falling score, what is absent is −1 throughout.
    """
    from torchvision.ops import batched_nms  # takes a second

    classes, regression, *quality = heads(outputs, decoding)
    height, width = decoding.image
    scores = scores_of(decoding, classes, *quality)
    boxes = boxes_of(decoding, regression)
    boxes = torch.stack([boxes[..., i].clamp(0, (width, height)[i % 2]) for i in range(4)], -1)
    found = torch.full((len(scores), decoding.detections, 6), -1.0, device=scores.device)
    for image, (of_image, at) in enumerate(zip(scores, boxes, strict=True)):
        score, anchor, kind = _candidates(decoding, of_image)
        kept = batched_nms(at[anchor], score, kind, decoding.nms_threshold)[: decoding.detections]
        rows = [at[anchor[kept]], score[kept, None], kind[kept, None].float()]
        found[image, : len(kept)] = torch.cat(rows, 1)
    return found


def _candidates(decoding: Decoding, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(score, anchor, class) of the best of each level or class; scores are (A, K)."""
    classes = scores.shape[1]
    parts: Sequence[Tensor]
    if decoding.candidates_of == "level":
        parts = torch.split(scores, [level.anchors for level in decoding.levels])
    else:
        parts = torch.split(scores, 1, 1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    first = 0
    for number, part in enumerate(parts):
        flat = part.flatten()
        above = (flat > decoding.score_threshold).nonzero()[:, 0]
        score, order = flat[above].topk(min(decoding.candidates, len(above)))
        index = above[order]
        if decoding.candidates_of == "level":
            found.append((score, first + index // classes, index % classes))
            first += len(part)
        else:
            found.append((score, index, torch.full_like(index, number)))
    score, anchor, kind = (torch.cat(column) for column in zip(*found, strict=True))
    return score, anchor, kind
