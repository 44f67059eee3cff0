"""Detection: mean AP against pycocotools, assignment and losses against NumPy."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from edgekd.errors import DataError, MissingPackageError, ModelError, RecipeError
from edgekd.knowledge.detection import joined
from edgekd.models.detector import detector
from edgekd.network import IO, Network
from edgekd.tasks import average_precision
from edgekd.tasks.base import get_task
from edgekd.tasks.decoding import Decoding, Level, anchors, boxes_of, detect, scores_of
from edgekd.tasks.detection import Detection, pairwise_iou

DECODING = Decoding(
    image=(64, 64), boxes="log_distance",
    levels=(
        Level(grid=(8, 8), stride=(8, 8), sizes=((8, 8),)),
        Level(grid=(4, 4), stride=(16, 16), sizes=((16, 16),)),
    ),
)  # fmt: skip
A, K = 80, 3
TASK = Detection(decoding=DECODING, classes=K)


# ---- mean AP -----------------------------------------------------------------------------------


def random_answers(seed: int, *, images: int = 12, crowds: bool = True) -> tuple[Tensor, Tensor]:
    """(detections, truth): noise around the truth, some of it wrong, sizes of all kinds."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    truth = torch.full((images, 9, 7), -1.0)
    sides = 4 * 2 ** (uniform(images, 9, 2) * 5.5)
    corner = uniform(images, 9, 2) * 200
    truth[..., 1:3], truth[..., 3:5] = corner, corner + sides
    truth[..., 0] = torch.randint(4, (images, 9), generator=generator).float()
    truth[..., 5] = sides.prod(-1) * (0.6 + 0.4 * uniform(images, 9))  # as of segmentations
    truth[..., 6] = (uniform(images, 9) < 0.1).float() if crowds else 0.0
    truth[uniform(images, 9) < 0.3] = -1
    source = torch.randint(9, (images, 40), generator=generator)
    boxes = truth[..., 1:5].gather(1, source[..., None].expand(-1, -1, 4))
    boxes = (boxes + torch.randn(images, 40, 4, generator=generator) * 3).clamp(min=0)
    kind = truth[..., 0].gather(1, source)
    other = torch.randint(5, (images, 40), generator=generator).float()  # class 4 has no truth
    kind = torch.where(uniform(images, 40) < 0.7, kind, other)
    score = (uniform(images, 40) * 50).round() / 50  # with ties
    answers = torch.cat([boxes, score[..., None], kind[..., None]], -1)
    answers[(boxes[..., 2:] <= boxes[..., :2]).any(-1) | (kind < 0)] = -1
    answers[3] = -1
    return answers, truth


def by_pycocotools(answers: Tensor, truth: Tensor, classes: int) -> Any:
    def rows(values: Tensor, kind: int) -> list[tuple[int, list[float]]]:
        return [
            (image, row) for image, of in enumerate(values.double().tolist())
            for row in of if row[kind] >= 0
        ]  # fmt: skip

    reference, found = COCO(), COCO()
    for coco in (reference, found):
        coco.dataset = {
            "images": [{"id": i} for i in range(len(truth))],
            "categories": [{"id": k} for k in range(classes)],
        }
    reference.dataset["annotations"] = [
        {"id": n + 1, "image_id": image, "category_id": int(k), "area": area, "iscrowd": int(crowd),
         "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for n, (image, (k, x1, y1, x2, y2, area, crowd)) in enumerate(rows(truth, 0))
    ]  # fmt: skip
    found.dataset["annotations"] = [
        {"id": n + 1, "image_id": image, "category_id": int(k), "score": score, "iscrowd": 0,
         "area": (x2 - x1) * (y2 - y1), "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for n, (image, (x1, y1, x2, y2, score, k)) in enumerate(rows(answers, 5))
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        reference.createIndex()
        found.createIndex()
        evaluation = COCOeval(reference, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(average_precision, "RESAMPLES", 40)


@pytest.mark.parametrize(("seed", "crowds"), [(0, True), (1, True), (2, False), (3, True)])
def test_mean_ap_is_that_of_pycocotools(seed, crowds):
    answers, truth = random_answers(seed, crowds=crowds)
    theirs = by_pycocotools(answers, truth, 5)
    ours = Detection().score(answers, (truth[..., :5], truth, whole(len(truth))))
    ap, ap50, _, small, medium, large, *_ = theirs.stats
    assert 0.05 < ap < 0.95
    wanted = [ap, ap50, small, medium, large]
    got = [ours.value, *(ours.parts[k] for k in ("mAP50", "small", "medium", "large"))]
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert ours.n == 12
    for k, value in enumerate(ours.by_class):
        precision = theirs.eval["precision"][:, :, k, 0, -1]
        if (precision > -1).any():
            assert value == pytest.approx(precision[precision > -1].mean(), abs=1e-6)
        else:
            assert (k, value) == (4, None)
    assert len(ours.by_class) == 5
    assert ours.ci95[0] < ours.value < ours.ci95[1]


@pytest.mark.parametrize("seed", [0, 2])
def test_curves_are_pycocotools_precision_at_the_first_iou(seed):
    answers, truth = random_answers(seed)
    theirs = by_pycocotools(answers, truth, 5)
    ours = Detection().score(answers, (truth[..., :5], truth, whole(len(truth))))
    curves = ours.curves
    assert curves is not None
    assert (curves.x_name, curves.y_name) == ("recall", "precision at IoU 0.5")
    np.testing.assert_allclose(curves.x, theirs.params.recThrs, atol=1e-6)
    assert curves.by_class[4] is None  # there is no truth of it
    for k, line in enumerate(curves.by_class[:4]):
        np.testing.assert_allclose(line, theirs.eval["precision"][0, :, k, 0, -1], atol=1e-6)
    drawn = [line for line in curves.by_class if line is not None]
    assert np.mean(drawn) == pytest.approx(ours.parts["mAP50"], abs=1e-6)
    assert np.mean(drawn) == pytest.approx(theirs.stats[1], abs=1e-6)


def whole(images: int) -> Tensor:
    """The frame of images that are the input as they are."""
    return torch.tensor([[1000.0, 1000, 1, 1, 0, 0]]).repeat(images, 1)


def test_a_resample_is_the_score_of_the_images_drawn():
    answers, truth = random_answers(4)
    draw = np.array([0, 0, 5, 7, 7, 7, 2, 3, 9, 11, 1, 1])
    found = average_precision.match(answers, truth, 5).only("all").precision(draw)
    theirs = by_pycocotools(answers[draw], truth[draw], 5)
    assert average_precision.mean(found) == pytest.approx(theirs.stats[0], abs=1e-6)


def test_detections_are_mapped_back_through_the_letterbox():
    answers, truth = random_answers(5)
    frame = torch.tensor([[500.0, 400, 0.5, 0.25, 12, 3]]).repeat(12, 1)
    scale, border = torch.tensor([0.5, 0.25, 0.5, 0.25]), torch.tensor([12.0, 3, 12, 3])
    there = answers[..., 5:] >= 0
    kept = torch.minimum(answers[..., :4].clamp(min=0), torch.tensor([500.0, 400, 500, 400]))
    boxed = torch.where(there, answers[..., :4] * scale + border, -1.0)
    inside = torch.cat([torch.where(there, kept, -1.0), answers[..., 4:]], -1)
    in_input = torch.cat([boxed, answers[..., 4:]], -1)
    ours = Detection().score(in_input, (truth[..., :5], truth, frame))
    assert ours.value == pytest.approx(by_pycocotools(inside, truth, 5).stats[0], abs=1e-4)


def test_with_boxes_alone_they_are_the_truth():
    answers, truth = random_answers(6, crowds=False)
    truth[..., 5] = (truth[..., 3:5] - truth[..., 1:3]).prod(-1)
    alone = Detection().score(answers, (truth[..., :5],))
    assert alone == Detection().score(answers, (truth[..., :5], truth, whole(12)))


def test_a_perfect_answer_scores_one_and_none_at_all_zero():
    _, truth = random_answers(7, crowds=False)
    perfect = torch.cat([truth[..., 1:5], truth[..., :1] * 0 + 1, truth[..., :1]], -1)
    perfect[truth[..., 0] < 0] = -1
    targets = (truth[..., :5], truth, whole(12))
    best = Detection().score(perfect, targets)
    assert (best.value, best.ci95) == (pytest.approx(1.0), (pytest.approx(1.0), pytest.approx(1.0)))
    none = torch.full((12, 5, 6), -1.0)
    assert Detection().score(none, targets).value == 0
    empty = torch.full((12, 5, 5), -1.0)
    assert Detection().score(none, (empty,)).curves is None
    gap = Detection().difference(perfect, none, targets)
    assert (gap.value, gap.ci95) == (pytest.approx(1.0), (pytest.approx(1.0), pytest.approx(1.0)))


def test_a_difference_draws_the_same_images_for_both():
    answers, truth = random_answers(8)
    targets = (truth[..., :5], truth, whole(12))
    task = Detection()
    same = task.difference(answers, answers, targets)
    assert (same.value, same.ci95) == (0.0, (0.0, 0.0))
    worse = answers.clone()
    worse[..., :4] += 2 * (worse[..., 5:] >= 0)
    gap = task.difference(answers, worse, targets)
    scores = [task.score(each, targets) for each in (answers, worse)]
    assert gap.value == pytest.approx(scores[0].value - scores[1].value)
    assert gap.ci95[0] < gap.value < gap.ci95[1]
    alone = [score.ci95[1] - score.ci95[0] for score in scores]
    assert gap.ci95[1] - gap.ci95[0] < sum(alone)


def test_without_faster_coco_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    answers, truth = random_answers(0)
    with pytest.raises(MissingPackageError, match=r"edgekd\[detection\]"):
        Detection().score(answers, (truth[..., :5],))


# ---- agreement ---------------------------------------------------------------------------------


def answer(*rows: tuple[float, ...]) -> Tensor:
    found = torch.full((1, 5, 6), -1.0)
    for index, row in enumerate(rows):
        found[0, index] = torch.tensor(row)
    return found


@pytest.mark.parametrize(
    ("other", "share"),
    [
        ([(0, 0, 20, 20, 0.8, 1)], 1),
        ([(0, 0, 20, 19.5, 0.5, 1)], 1),
        ([(0, 0, 20, 17, 0.8, 1)], 0),  # IoU 0.85
        ([(0, 0, 20, 20, 0.8, 2)], 0),  # another class
        ([(0, 0, 20, 20, 0.22, 1)], 1),  # below what is shown, but near it
        ([(0, 0, 20, 20, 0.15, 1)], 0),
        ([], 0),
        ([(0, 0, 20, 20, 0.8, 1), (0, 0, 20, 20, 0.7, 1)], 2 / 3),  # the second has no partner
        ([(0, 0, 20, 20, 0.8, 1), (5, 5, 9, 9, 0.29, 1)], 1),  # not shown
    ],
)
def test_agreement_is_the_share_of_detections_with_a_partner_of_their_own(other, share):
    one = answer((0, 0, 20, 20, 0.8, 1))
    assert Detection().agreement(one, answer(*other)) == pytest.approx(share)
    assert Detection().agreement(answer(*other), one) == pytest.approx(share)
    none = answer()
    assert Detection().agreement(none, none) == 1
    shown = sum(row[4] >= 0.3 for row in other)
    both = Detection().agreement(torch.cat([one, one]), torch.cat([one, answer(*other)]))
    assert both == pytest.approx((2 + share * (1 + shown)) / (3 + shown))


# ---- marks -------------------------------------------------------------------------------------


def test_what_is_drawn_are_the_sure_detections_and_the_boxes_of_the_truth():
    found = answer((1, 2, 30.126, 40, 0.5, 2), (0, 0, 5, 5, 0.31, 0), (0, 0, 9, 9, 0.29, 1))
    (marks,) = Detection().marks(found)
    assert [(mark.label, mark.score) for mark in marks] == [(2, 0.5), (0, 0.31)]
    assert marks[0].box == (1, 2, 30.13, 40)
    of_image = Detection().truth((truths(), torch.zeros(3, 1, 7), whole(3)))
    assert [[(m.label, m.score, m.box) for m in marks] for marks in of_image] == [
        [(0, None, (4, 4, 30, 28)), (2, None, (10, 12, 44, 50))], [(1, None, (33, 33, 35, 35))], [],
    ]  # fmt: skip


# ---- loss --------------------------------------------------------------------------------------


def truths() -> Tensor:
    """(3, 3, 5): overlapping boxes, one between all anchors' centres, none."""
    rows = torch.full((3, 3, 5), -1.0)
    rows[0, 0] = torch.tensor([0, 4, 4, 30, 28.0])
    rows[0, 1] = torch.tensor([2, 10, 12, 44, 50.0])
    rows[1, 0] = torch.tensor([1, 33, 33, 35, 35.0])
    return rows


def outputs(seed: int = 0, k: int = K) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, A, k, generator=generator, dtype=torch.float64),
        torch.randn(3, A, 4, generator=generator, dtype=torch.float64) * 0.3 + 0.7,
    )


def overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(IoU, GIoU) of two boxes."""
    inner = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    outer = np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])
    shared = np.prod(inner.clip(0))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared
    return shared / union, shared / union - (np.prod(outer) - union) / np.prod(outer)


def by_hand(
    scores: np.ndarray, boxes: np.ndarray, truth: np.ndarray, candidates: int
) -> list[dict[int, tuple[int, float, float, float]]]:
    """For each image: anchor -> (class, score it should have, IoU, GIoU); TOOD §3.2, in loops."""
    at = anchors(DECODING).double().numpy()
    centres = (at[:, :2] + at[:, 2:]) / 2
    found = []
    for s, b, rows in zip(scores, boxes, truth, strict=True):
        real = [row for row in rows if row[0] >= 0]
        chosen: dict[int, list[tuple[float, int]]] = {}
        align: dict[tuple[int, int], float] = {}
        for m, (k, *box) in enumerate(real):
            box = np.array(box)
            inside = [
                a for a, c in enumerate(centres) if (c > box[:2]).all() and (c < box[2:]).all()
            ]
            near = int(((centres - (box[:2] + box[2:]) / 2) ** 2).sum(1).argmin())
            inside = sorted({*inside, near})
            for a in inside:
                align[m, a] = s[a, int(k)] * overlap(b[a], box)[0] ** 6
            for a in sorted(inside, key=lambda a, m=m: -align[m, a])[:candidates]:
                chosen.setdefault(a, []).append((overlap(b[a], box)[0], m))
        owner = {a: max(choices)[1] for a, choices in chosen.items()}
        rows_of = {}
        for a, m in owner.items():
            mine = [x for x, y in owner.items() if y == m]
            top = max(align[m, x] for x in mine)
            best = max(overlap(b[x], np.array(real[m][1:]))[0] for x in mine)
            iou, giou = overlap(b[a], np.array(real[m][1:]))
            score = align[m, a] / max(top, 1e-12) * best
            rows_of[a] = (int(real[m][0]), score, iou, giou)
        found.append(rows_of)
    return found


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("candidates", [3, 13])
def test_loss_is_that_of_a_plain_reference(scores, candidates):
    rules = DECODING.model_copy(update={"scores": scores})
    softmax = scores == "softmax"
    classes, numbers = outputs(k=K + softmax)
    task = Detection(decoding=rules, candidates=candidates, class_weight=0.5, box_weight=2.0)
    loss = task.loss((classes, numbers), (truths(),))
    p, boxes = scores_of(rules, classes).numpy(), boxes_of(rules, numbers).numpy()
    assigned = by_hand(p, boxes, truths().double().numpy(), candidates)
    assert [len(rows) > 0 for rows in assigned] == [True, True, False]
    wanted = np.zeros((3, A, K))
    total, apart = 0.0, 0.0
    for image, rows in enumerate(assigned):
        for a, (k, score, _, giou) in rows.items():
            wanted[image, a, k] = score
            total, apart = total + score, apart + score * (1 - giou)
    z = classes.numpy()
    if softmax:
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        whole_ = np.concatenate([1 - wanted.sum(-1, keepdims=True), wanted], -1)
        entropy = -(whole_ * log_p).sum()
    else:
        entropy = -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p)).sum()
    total = max(total, 1.0)
    assert float(loss) == pytest.approx((0.5 * entropy + 2.0 * apart) / total, rel=1e-6)


def test_a_quality_learns_the_iou_of_its_box():
    rules = DECODING.model_copy(update={"quality": True})
    classes, numbers = outputs()
    quality = outputs(1)[0][..., :1]
    task = Detection(decoding=rules)
    with_quality = float(task.loss((classes, numbers, quality), (truths(),)))
    p = scores_of(rules, classes, quality).numpy()
    boxes = boxes_of(rules, numbers).numpy()
    assigned = by_hand(p, boxes, truths().double().numpy(), 13)
    rows = [(image, a, *row) for image, of in enumerate(assigned) for a, row in of.items()]
    total = max(1.0, sum(row[3] for row in rows))
    q = 1 / (1 + np.exp(-quality[..., 0].numpy()))
    wanted, box_term, quality_term = np.zeros((3, A, K)), 0.0, 0.0
    for image, a, k, score, iou, giou in rows:
        wanted[image, a, k] = score
        box_term += score * (1 - giou)
        quality_term -= score * (iou * np.log(q[image, a]) + (1 - iou) * np.log(1 - q[image, a]))
    s = 1 / (1 + np.exp(-classes.numpy()))
    entropy = -(wanted * np.log(s) + (1 - wanted) * np.log(1 - s)).sum()
    by_reference = (entropy + 2.5 * box_term + quality_term) / total
    assert with_quality == pytest.approx(by_reference, rel=1e-6)


def test_an_image_without_boxes_teaches_background_alone():
    classes, numbers = (t.requires_grad_() for t in outputs())
    loss = TASK.loss((classes, numbers), (torch.full((3, 2, 5), -1.0),))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(
        float(-torch.log(1 - classes.detach().sigmoid()).sum()), rel=1e-6
    )
    assert (classes.grad > 0).all()
    assert numbers.grad is None or (numbers.grad == 0).all()


def test_no_box_in_a_whole_batch_is_nothing_to_find():
    padded, none = torch.full((3, 2, 5), -1.0), torch.zeros(3, 0, 5)
    assert float(TASK.loss(outputs(), (none,))) == float(TASK.loss(outputs(), (padded,)))
    found = TASK.foreground((none,), (4, 4))
    assert found is not None and found.shape == (3, 4, 4) and not found.any()
    nothing = TASK.distillation(outputs(), torch.zeros(3, 0, 6))
    assert float(nothing) == float(TASK.distillation(outputs(), torch.full((3, 5, 6), -1.0)))


def test_a_class_that_the_network_lacks_is_refused():
    wrong = truths()
    wrong[0, 0, 0] = 3
    with pytest.raises(DataError, match="a box of class 3; the network has 3 classes"):
        TASK.loss(outputs(), (wrong,))


def test_iou_is_that_of_torchvision():
    from torchvision.ops import box_iou

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, n, 4, generator=generator).sort(-1).values * 50 for n in (5, 7))
    a, b = (x[..., [0, 1, 2, 3]] for x in (a, b))
    for image in range(2):
        torch.testing.assert_close(pairwise_iou(a, b)[image], box_iou(a[image], b[image]))


# ---- distillation ------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_distillation_weighs_by_the_teachers_foreground(scores):
    softmax = scores == "softmax"
    rules = DECODING.model_copy(update={"scores": scores})
    ours, theirs = outputs(0, K + softmax), outputs(1, K + softmax)
    task = Detection(decoding=rules, class_weight=0.7, box_weight=1.3)
    loss = float(task.distillation(ours, theirs))
    p, q = (scores_of(rules, x[0]).numpy() for x in (ours, theirs))
    weight = q.max(-1)
    if softmax:
        s, t = (np.exp(x[0].numpy()) for x in (ours, theirs))
        s, t = (x / x.sum(-1, keepdims=True) for x in (s, t))
        kl = (t * np.log(t / s)).sum(-1)
    else:
        kl = (q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).sum(-1)
    a, b = (boxes_of(rules, x[1]).numpy().reshape(-1, 4) for x in (ours, theirs))
    giou = np.array([overlap(x, y)[1] for x, y in zip(a, b, strict=True)]).reshape(3, A)
    wanted = (weight * (0.7 * kl + 1.3 * (1 - giou))).sum() / weight.sum()
    assert loss == pytest.approx(wanted, rel=1e-6)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    ours = tuple(t.requires_grad_() for t in outputs())
    loss = TASK.distillation(ours, tuple(t.detach() for t in ours))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(ours[0].grad.abs().max()) < 1e-6


def test_a_teacher_with_other_classes_is_refused():
    with pytest.raises(ModelError, match=r"classes are \(3, 80, 3\), the teacher's \(3, 80, 5\)"):
        TASK.distillation(outputs(), outputs(k=5))


def test_teachers_are_averaged_anchor_by_anchor():
    ours, first, second = (outputs(seed) for seed in range(3))
    loss = float(TASK.distillation(ours, first, second))
    p = ours[0].sigmoid().numpy()
    q = [x[0].sigmoid().numpy() for x in (first, second)]
    each = [x.max(-1) for x in q]
    mean, weight = (q[0] + q[1]) / 2, (each[0] + each[1]) / 2
    kl = (mean * np.log(mean / p) + (1 - mean) * np.log((1 - mean) / (1 - p))).sum(-1)
    a, *b = (boxes_of(DECODING, x[1]).numpy() for x in (ours, first, second))
    goal = sum(w[..., None] * box for w, box in zip(each, b, strict=True))
    goal = (goal / sum(each)[..., None]).reshape(-1, 4)
    pairs = zip(a.reshape(-1, 4), goal, strict=True)
    giou = np.array([overlap(x, y)[1] for x, y in pairs]).reshape(3, A)
    assert loss == pytest.approx((weight * (kl + 2.5 * (1 - giou))).sum() / weight.sum(), rel=1e-6)
    assert float(TASK.distillation(ours, first, first)) == pytest.approx(
        float(TASK.distillation(ours, first))
    )


def test_classes_are_found_by_their_names():
    io = IO(inputs=(), outputs=(), labels=("cat", "dog", "owl"), decoding=DECODING)
    theirs = io.model_copy(update={"labels": ("owl", "ant", "cat", "dog")})
    task = Detection().of(io, [theirs])
    ours, wide = outputs(0), outputs(1, 4)
    loss = task.distillation(ours, wide)
    same = TASK.distillation(ours, (wide[0][..., [2, 3, 0]], wide[1]))
    assert float(loss) == pytest.approx(float(same))
    found = answer((0, 0, 8, 8, 0.9, 0), (0, 0, 9, 9, 0.8, 1), (1, 1, 8, 8, 0.7, 3))
    translated = task.teachers[0].detections(DECODING, found)
    assert translated[0, :3, 5].tolist() == [2, -1, 1]
    with pytest.raises(ModelError, match="no class 'owl'"):
        Detection().of(io, [io.model_copy(update={"labels": ("cat", "dog", "ow")})])


def test_a_teacher_of_another_size_of_images_is_refused():
    io = IO(inputs=(), outputs=(), decoding=DECODING)
    other = io.model_copy(update={"decoding": DECODING.model_copy(update={"image": (32, 64)})})
    with pytest.raises(ModelError, match=r"for images of \(32, 64\), the student's for \(64, 64\)"):
        Detection().of(io, [other])


# ---- distributions of edges --------------------------------------------------------------------

EDGES = DECODING.model_copy(update={"boxes": "distribution", "bins": 6})


def edges(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, A, 24, generator=generator, dtype=torch.float64)
    return outputs(seed)[0], 2 * logits


def shares_of(logits: Tensor, temperature: float = 1.0) -> np.ndarray:
    e = np.exp(logits.numpy().reshape(3, A, 4, 6) / temperature)
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("boxes", "bins"), [("distribution", 0), ("distribution", 1), ("offset", 4)]
)
def test_bins_go_with_distributions(boxes, bins):
    with pytest.raises(ValueError, match=f"bins is {bins} with boxes"):
        Decoding(image=(8, 8), levels=DECODING.levels, boxes=boxes, bins=bins)


def test_a_distribution_learns_the_two_bins_around_its_distance():
    classes, logits = edges()
    task = Detection(decoding=EDGES, distribution_weight=0.25)
    with_term = float(task.loss((classes, logits), (truths(),)))
    without = float(Detection(decoding=EDGES, distribution_weight=0).loss((classes, logits),
                                                                          (truths(),)))  # fmt: skip
    boxes = boxes_of(EDGES, logits).numpy()
    assigned = by_hand(classes.sigmoid().numpy(), boxes, truths().double().numpy(), 13)
    shares, at, term, total = shares_of(logits), anchors(EDGES).double().numpy(), 0.0, 0.0
    for image, rows in enumerate(assigned):
        real = [row for row in truths()[image].double().numpy() if row[0] >= 0]
        for a, (_, score, iou, _) in rows.items():
            total += score
            (box,) = (r[1:] for r in real if overlap(boxes[image, a], r[1:])[0] == iou)
            centre, size = (at[a, :2] + at[a, 2:]) / 2, at[a, 2:] - at[a, :2]
            for side in range(4):
                edge = box[side]
                away = (centre[side] - edge if side < 2 else edge - centre[side - 2]) / size[
                    side % 2
                ]
                away = min(max(away, 0), 5)
                low = min(int(away), 4)
                p = shares[image, a, side]
                term -= score / 4 * ((low + 1 - away) * np.log(p[low])
                                     + (away - low) * np.log(p[low + 1]))  # fmt: skip
    assert with_term - without == pytest.approx(0.25 * term / max(total, 1), rel=1e-5)


def test_edges_are_distilled_at_a_temperature():
    ours, theirs = edges(0), edges(1)
    term = float(Detection(decoding=EDGES, classes=K).distillation(ours, theirs)) - float(
        Detection(decoding=EDGES, classes=K, distribution_weight=0).distillation(ours, theirs)
    )
    s, t = (shares_of(x[1], 10.0) for x in (ours, theirs))
    weight = theirs[0].sigmoid().numpy().max(-1)
    kl = 100 * (t * np.log(t / s)).mean((-2, -1))
    assert term == pytest.approx(0.25 * (weight * kl).sum() / weight.sum(), rel=1e-5)


def test_numbers_teach_distributions_by_boxes_alone():
    numbers = IO(inputs=(), outputs=(), decoding=DECODING)
    task = Detection().of(numbers.model_copy(update={"decoding": EDGES}), [numbers])
    ours, theirs = edges(0), outputs(1)
    loss = task.distillation(ours, theirs)
    assert float(loss) == pytest.approx(
        float(replace(task, distribution_weight=9.0).distillation(ours, theirs))
    )
    assert float(loss) > 0


# ---- teachers with other heads -----------------------------------------------------------------


def test_boxes_of_a_teacher_are_learnt_as_far_as_it_is_sure():
    found = torch.full((3, 100, 6), -1.0)
    sure = torch.tensor([[0.9, 0.4, -1], [0.7, -1, -1], [-1, -1, -1]])
    found[:, :3] = torch.cat([truths()[..., 1:], sure[..., None], truths()[..., :1]], -1)
    found[2, 0] = torch.tensor([3, 3, 30, 30, 0.05, 1.0])  # less than is learnt from
    loss = float(TASK.distillation(outputs(), found))
    classes, numbers = outputs()
    p, boxes = classes.sigmoid().numpy(), boxes_of(DECODING, numbers).numpy()
    assigned = by_hand(p, boxes, truths().double().numpy(), 13)
    wanted, apart, total = np.zeros((3, A, K)), 0.0, 0.0
    for image, rows in enumerate(assigned):
        for a, (k, score, iou, giou) in rows.items():
            real = truths()[image].double().numpy()
            ious = [overlap(boxes[image, a], each[1:])[0] for each in real[:2]]
            row = next(r for r in range(2) if real[r, 0] == k and ious[r] == iou)
            share = score * float(sure[image, row])
            wanted[image, a, k] = share
            apart, total = apart + share * (1 - giou), total + share
    entropy = -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p)).sum()
    assert loss == pytest.approx((entropy + 2.5 * apart) / max(total, 1), rel=1e-5)


def test_a_teacher_with_other_strides_and_scores_teaches_by_its_boxes():
    theirs = Decoding(
        image=(64, 64), boxes="offset", scores="softmax",
        levels=(Level(grid=(6, 6), stride=(11, 11), sizes=((20, 20), (30, 15))),),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    classes = 3 * torch.randn(3, 72, K + 1, generator=generator)
    raw = (classes, torch.randn(3, 72, 4, generator=generator) * 0.1)
    io = IO(inputs=(), outputs=(), decoding=DECODING)
    task = Detection().of(io, [io.model_copy(update={"decoding": theirs})])
    loss = float(task.distillation(outputs(), raw))
    assert loss == pytest.approx(float(TASK.distillation(outputs(), detect(theirs, raw))))
    both = Detection().of(io, [io, io.model_copy(update={"decoding": theirs})])
    dense = outputs(1)
    fused = joined([detect(DECODING, dense).float(), detect(theirs, raw)])
    assert float(both.distillation(outputs(), dense, raw)) == pytest.approx(
        float(TASK.distillation(outputs(), fused)), rel=1e-4
    )


def test_a_single_output_that_is_no_detections_is_refused():
    with pytest.raises(ModelError, match=r"single output is \(3, 80, 7\); detections are"):
        TASK.distillation(outputs(), torch.zeros(3, 80, 7))


def test_boxes_that_several_see_are_joined():
    one = answer((10, 10, 30, 30, 0.8, 1), (40, 40, 60, 60, 0.6, 0))
    two = answer((12, 10, 32, 30, 0.4, 1), (40, 40, 60, 60, 0.5, 2))
    found = joined([one, two])
    assert found.shape == (1, 10, 6)
    rows = {int(row[5]): row[:5].tolist() for row in found[0] if row[5] >= 0}
    assert rows == {
        1: pytest.approx([10 + 2 / 3, 10, 30 + 2 / 3, 30, 0.6]),
        0: pytest.approx([40, 40, 60, 60, 0.3]),
        2: pytest.approx([40, 40, 60, 60, 0.25]),
    }
    assert joined([one]) is one


# ---- objects and background --------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (5, 3)])
def test_every_object_counts_once_over_its_cells(size):
    found = TASK.foreground((truths(),), size)
    assert found is not None
    wanted = np.zeros((3, *size))
    for image, rows in enumerate(truths().double().numpy()):
        for kind, left, top, right, bottom in rows:
            if kind < 0:
                continue
            y, x = size[0] / 64, size[1] / 64
            ends = [math.floor(top * y), math.ceil(bottom * y),
                    math.floor(left * x), math.ceil(right * x)]  # fmt: skip
            cells = (ends[1] - ends[0]) * (ends[3] - ends[2])
            part = wanted[image, ends[0] : ends[1], ends[2] : ends[3]]
            np.maximum(part, 1 / cells, out=part)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found[2].max() == 0 < found[1].max()


# ---- the task of a network ---------------------------------------------------------------------


def test_a_network_says_how_its_outputs_are_read():
    net = Network(detector(num_classes=2, widths=(8, 8, 8, 8), neck=8), torch.zeros(1, 3, 64, 32))
    assert net.io.decoding is not None and net.io.decoding.image == (64, 32)
    assert IO.model_validate_json(net.io.model_dump_json()) == net.io
    task = get_task("detection", box_weight=1.0).of(net.io)
    net.train_mode(False)
    assert task.answers(net(torch.zeros(2, 3, 64, 32))).shape == (2, 100, 6)


def test_a_network_that_does_not_say_so_is_refused():
    net = Network(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        ModelError, match=r"give Network\(decoding=\.\.\.\), or its module a method"
    ):
        Detection().of(net.io)


def test_unknown_options_are_refused():
    with pytest.raises(RecipeError, match="no option 'box_wieght'; did you mean 'box_weight'"):
        get_task("detection", box_wieght=1.0)
