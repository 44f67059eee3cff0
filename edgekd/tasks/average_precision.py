"""Mean average precision as COCO defines it, and its intervals over images.

The numbers are those of faster-coco-eval, whose matching is that of pycocotools; the intervals
come from the same matches, accumulated for images drawn with replacement.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgekd.errors import MissingPackageError

Floats = NDArray[np.float64]

RESAMPLES = 200  # of the images, for the intervals: 3 s for 87 images of 100 detections
SEED = 0
# by the area of the truth in pixels of the original image, as COCO's areas are
SIZES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
MOST = 100  # detections of an image that count


@dataclass(frozen=True)
class Matches:
    """Detections matched with the truth, image by image.

    Attributes:
        params: of faster-coco-eval.
        images: N.
        classes: K.
        found: what it keeps of each class, size and image, in this order.
    """

    params: Any
    images: int
    classes: int
    found: list[Any]

    def precision(self, draw: NDArray[np.int64] | None = None) -> Floats:
        """(IoU thresholds, recalls, K, sizes); −1 where there is no truth of a class and size.

        Args:
            draw: (N,) the images that count, as often as they are in there; None: each once.
        """
        from faster_coco_eval import faster_eval_api_cpp as compiled

        found = self.found
        if draw is not None:
            blocks = range(0, len(found), self.images)
            found = [found[block + image] for block in blocks for image in draw.tolist()]
        made = compiled.COCOevalAccumulate(self.params, found)
        precision: Floats = np.asarray(made["precision"], np.float64)
        return precision.reshape(made["counts"])[..., -1]

    def only(self, size: str) -> Matches:
        """Of one size alone."""
        params = copy(self.params)
        index = list(SIZES).index(size)
        params.areaRng = [SIZES[size]]
        step = self.images
        starts = [(k * len(SIZES) + index) * step for k in range(self.classes)]
        found = [item for start in starts for item in self.found[start : start + step]]
        return Matches(params, self.images, self.classes, found)


def match(detections: Tensor, truth: Tensor, classes: int) -> Matches:
    """Match as COCO does, at IoU 0.50 to 0.95 in steps of 0.05.

    Args:
        detections: (N, D, 6): left, top, right, bottom, score, class; class −1: none.
        truth: (N, M, 7): class, left, top, right, bottom, area, whether it is a crowd; class −1:
            none. In the same pixels, those of the original image.
        classes: K.

    Raises:
        MissingPackageError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise MissingPackageError("faster-coco-eval", "detection") from None
    boxes, answers = truth.double().numpy(), detections.double().numpy()
    common = {
        "images": [{"id": i + 1} for i in range(len(boxes))],
        "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
    }
    evaluation = COCOeval_faster(
        COCO(common | {"annotations": [
            _annotation(n + 1, image, kind, box, area=area, iscrowd=int(crowd))
            for n, (image, (kind, *box, area, crowd)) in enumerate(_rows(boxes, 0))
        ]}),
        COCO(common | {"annotations": [
            _annotation(n + 1, image, kind, box, score=score, iscrowd=0)
            for n, (image, (*box, score, kind)) in enumerate(_rows(answers, 5))
        ]}),
        "bbox", separate_eval=True,
    )  # fmt: skip
    params = evaluation.params
    params.areaRng, params.areaRngLbl = [list(r) for r in SIZES.values()], list(SIZES)
    params.maxDets = [MOST]
    evaluation.evaluate()
    return Matches(evaluation._paramsEval, len(boxes), classes, evaluation._evalImgs_cpp)


def _rows(values: Floats, kind: int) -> list[tuple[int, list[float]]]:
    """(image, row) of all rows whose class, in column `kind`, is one."""
    images, rows = (values[..., kind] >= 0).nonzero()
    return list(zip(images.tolist(), values[images, rows].tolist(), strict=True))


def _annotation(
    number: int, image: int, kind: float, box: list[float], **rest: float
) -> dict[str, Any]:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    return {
        "id": number, "image_id": image + 1, "category_id": int(kind) + 1,
        "bbox": [left, top, width, height], "area": width * height,
    } | rest  # fmt: skip


def mean(precision: Floats) -> float | None:
    """Mean over all that there is truth of; None if there is none."""
    there = precision[precision > -1]
    return float(there.mean()) if there.size else None


def draws(images: int) -> list[NDArray[np.int64]]:
    """RESAMPLES draws of `images` images with replacement, the same each time."""
    generator = np.random.default_rng(SEED)
    return list(generator.integers(0, images, (RESAMPLES, images)))


def interval(values: list[float]) -> tuple[float, float]:
    """The middle 95 % of resampled values (percentile bootstrap, Efron 1979, AS 7 §2)."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def resampled(matches: Matches) -> list[float]:
    """The mean average precision of each draw; 0 where it holds no truth."""
    whole = matches.only("all")
    return [mean(whole.precision(draw)) or 0.0 for draw in draws(matches.images)]


def partners(a: Tensor, b: Tensor, *, score: float, slack: float, iou: float) -> tuple[int, int]:
    """(how many detections of either have a partner in the other, how many there are).

    One to one, of the same class, with an IoU of `iou` or more. Only scores from `score` on
    count; the partner's may be lower by `slack`: else one that lies at the limit would decide.

    Args:
        a, b: (D, 6), by falling score, as `detect` gives them.
    """
    found, total = 0, 0
    for ours, theirs in ((a, b), (b, a)):
        ours, theirs = ours[ours[:, 4] >= score], theirs[theirs[:, 4] >= score - slack]
        found, total = found + _matched(ours, theirs, iou), total + len(ours)
    return found, total


def _matched(ours: Tensor, theirs: Tensor, least: float) -> int:
    from torchvision.ops import box_iou

    overlaps = box_iou(ours[:, :4], theirs[:, :4])
    overlaps[ours[:, None, 5] != theirs[None, :, 5]] = 0
    count = 0
    for row in overlaps if len(theirs) else ():
        best = int(row.argmax())
        if row[best] >= least:
            overlaps[:, best] = 0
            count += 1
    return count
