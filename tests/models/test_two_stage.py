"""Faster R-CNN, whole: torchvision's own detections, a teacher, a file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import edgekd
from edgekd.errors import ModelError, TargetError
from edgekd.models.two_stage import TwoStage
from edgekd.runtimes.base import get_runtime
from edgekd.stages import whole
from edgekd.tasks.detection import Detection
from tests.models.test_torchvision_detectors import Adapter, Maps, Theirs

SIZE = (64, 96)
LABELS = ("a", "b", "c")


@pytest.fixture(scope="module")
def module() -> Any:
    """Untrained, but with scores that differ from box to box."""
    torch.manual_seed(0)
    backbone: Any = Maps()
    backbone.out_channels = 16
    found: Any = FasterRCNN(
        backbone, min_size=SIZE[0], max_size=SIZE[1], box_score_thresh=0.3,
        rpn_anchor_generator=AnchorGenerator(((24, 48),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2), box_head=TwoMLPHead(16 * 49, 32),
        box_predictor=FastRCNNPredictor(32, 4), box_detections_per_img=20,
    )  # fmt: skip
    x = (torch.rand(4, 3, *SIZE) - 0.45) / 0.226
    with torch.no_grad():
        for head in (found.rpn.head.cls_logits, found.roi_heads.box_predictor.cls_score):
            logits: list[torch.Tensor] = []
            hook = head.register_forward_hook(lambda _, __, given, to=logits: to.append(given))
            TwoStage(found, SIZE)(x)
            hook.remove()
            head.weight.div_(torch.cat([x.flatten() for x in logits]).std())
            head.bias.zero_()
    return found.eval()


@pytest.fixture
def net(module: Any) -> TwoStage:
    return TwoStage(module, SIZE, labels=LABELS)


def images(net: TwoStage, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """From 0 to 1, and normalised as the network wants them."""
    x = torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    known = net.io.preprocessing
    assert known is not None
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (known.mean, known.std))
    return x, (x - mean) / std


def test_detections_are_torchvisions(module: Any, net: TwoStage):
    plain, x = images(net)
    with torch.no_grad():
        theirs, ours = module([*plain]), net(x)
    assert ours.shape == (3, 20, 6)
    for wanted, found in zip(theirs, ours, strict=True):
        count = len(wanted["scores"])
        assert count >= 5
        assert wanted["scores"].unique().numel() >= 5
        torch.testing.assert_close(found[:count, :4], wanted["boxes"], atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(found[:count, 4], wanted["scores"])
        assert torch.equal(found[:count, 5].long(), wanted["labels"] - 1)
        assert (found[count:] == -1).all()


@pytest.mark.parametrize("target", ["host-onnxruntime", "intel-cpu", "intel-igpu"])
def test_the_file_has_the_same_detections(net: TwoStage, target: str, tmp_path: Any):
    _, x = images(net)
    artifact = edgekd.export(net, target=target, out=tmp_path, examples=x[:1])
    assert artifact.precision == ("fp16" if target == "intel-igpu" else "fp32")
    runtime = get_runtime(edgekd.Target.load(target).runtime)
    session = runtime.load(artifact.path, threads=1)
    found = torch.cat([torch.from_numpy(session([one[None].numpy()])[0]) for one in x])
    with torch.no_grad():
        wanted = net(x)
    assert Detection(shown=0.3).agreement(wanted, found) >= 0.95
    assert Detection(shown=0.3).agreement(found, wanted) >= 0.95


def test_an_image_of_nothing_gives_nothing(net: TwoStage, module: Any, tmp_path: Any):
    _, x = images(net, 1)
    module.roi_heads.score_thresh, before = 1.0, module.roi_heads.score_thresh
    try:
        artifact = edgekd.export(net, target="host-onnxruntime", out=tmp_path, examples=x)
    finally:
        module.roi_heads.score_thresh = before
    found = get_runtime("onnxruntime").load(artifact.path, threads=1)([x.numpy()])[0]
    assert found.shape == (1, 20, 6)
    assert (found == -1).all()


def test_a_file_with_other_detections_is_refused(
    net: TwoStage, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    class Nothing:
        def load(self, *_: Any, **__: Any) -> Any:
            return lambda given: [torch.full((1, 20, 6), -1.0).numpy()]

    monkeypatch.setattr(whole, "verifying_runtime", lambda target: Nothing())
    with pytest.raises(TargetError, match=r"has 0\.0% of the network's detections on 3 images"):
        edgekd.export(net, target="host-onnxruntime", out=tmp_path, examples=images(net)[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["jetson-nano", "jetson-orin-nano", "android-litert"])
def test_other_runtimes_are_refused_and_the_nearest_alternative_named(
    net: TwoStage, target: str, tmp_path: Any
):
    with pytest.raises(TargetError, match=rf"{target} takes no FasterRCNN .RoIAlign.*retinanet"):
        edgekd.export(net, target=target, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_none_is_refused(tmp_path: Any):
    with pytest.raises(ModelError, match="Conv2d is no Faster R-CNN"):
        TwoStage(nn.Conv2d(3, 4, 1), SIZE)
    neither: Any = nn.Conv2d(3, 4, 1)
    with pytest.raises(ModelError, match=r"not Conv2d: edgekd.Network\(module, example_inputs\)"):
        edgekd.export(neither, target="host-onnxruntime", out=tmp_path)


@pytest.mark.parametrize("form", ["module", "file"])
def test_a_student_of_one_stage_learns_from_it(net: TwoStage, form: str, tmp_path: Any):
    torch.manual_seed(0)
    student = edgekd.Network(
        Adapter(Theirs()), torch.zeros(1, 3, *SIZE), labels=("c", "a"),
        preprocessing=net.io.preprocessing,
    )  # fmt: skip
    _, x = images(net)
    teacher: Any = net
    if form == "file":
        artifact = edgekd.export(net, target="host-onnxruntime", out=tmp_path, examples=x)
        teacher = edgekd.OnnxTeacher(artifact.path)
        assert (teacher.io.labels, teacher.io.decoding) == (LABELS, None)
        assert teacher.io.preprocessing == net.io.preprocessing
    # of the teacher's boxes those of the student's two classes, by name
    with torch.no_grad():
        task, found = Detection().of(student.io, [net.io]), net(x)
        before = float(task.distillation(student(x), found))
    nothing = torch.full((3, 1, 5), -1.0)
    trained = edgekd.distill(
        student, task=Detection(), teacher=teacher, data=[(x, nothing)] * 4, epochs=20, alpha=1.0,
        lr=0.02, accelerator="cpu",
    )  # fmt: skip
    with torch.no_grad():
        after = float(task.distillation(trained(x), found))
    assert after < 0.8 * before
