"""Cores of torchvision's detectors against torchvision's own detections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d

import edgekd
from edgekd.errors import ModelError
from edgekd.models.build import Build, build_module
from edgekd.models.torchvision_detectors import Core, as_network
from edgekd.network import Network
from edgekd.tasks.decoding import Decoding, Level
from edgekd.tasks.detection import Detection

UNTRAINED = {"weights": None, "weights_backbone": None, "num_classes": 4}
CASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "ssd300_vgg16": ((300, 300), {}),
    "ssdlite320_mobilenet_v3_large": ((320, 320), {}),
    "fcos_resnet50_fpn": ((96, 128), {"min_size": 96, "max_size": 128, "score_thresh": 0.05}),
    "retinanet_resnet50_fpn": ((96, 128), {"min_size": 96, "max_size": 128}),
}


def lively(module: Any, size: tuple[int, int]) -> Any:
    """Untrained heads give every anchor the same score: statistics and a scale tell them apart."""
    core, known = Core(module), module.transform
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (known.image_mean, known.image_std))
    norms = [part for part in core.modules() if isinstance(part, nn.BatchNorm2d)]
    x = (torch.rand(2 if norms else 1, 3, *size) - mean) / std
    head = module.head.classification_head
    parts = [head.cls_logits] if hasattr(head, "cls_logits") else head.module_list
    lasts = [[p for p in part.modules() if isinstance(p, nn.Conv2d)][-1] for part in parts]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0  # statistics of the last batch
        if norms:
            core.train()(x)
        for conv in lasts:
            conv.bias.zero_()
        logits = core.eval()(x)["classes"]
        for conv in lasts:
            conv.weight.mul_(4 / logits.abs().max())
    return module.eval()


def assert_same_detections(module: Any, size: tuple[int, int], background: int) -> None:
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = module([*x])
    net = as_network(module, size)
    net.train_mode(False)
    known = net.io.preprocessing
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (known.mean, known.std))
    with torch.no_grad():
        ours = Detection().of(net.io).answers(net((x - mean) / std))
    for wanted, found in zip(theirs, ours, strict=True):
        count = len(wanted["scores"])
        assert count >= 20
        assert wanted["scores"].unique().numel() >= 20
        assert (found[count:] == -1).all()
        torch.testing.assert_close(found[:count, :4], wanted["boxes"], atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(found[:count, 4], wanted["scores"], atol=1e-6, rtol=1e-5)
        assert torch.equal(found[:count, 5].long(), wanted["labels"] - background)


@pytest.mark.parametrize("name", CASES)
def test_detections_are_torchvisions(name):
    torch.manual_seed(0)
    size, options = CASES[name]
    module = lively(get_model(name, **UNTRAINED, **options), size)
    assert_same_detections(module, size, background=int(name.startswith("ssd")))


def test_frozen_normalisation_thaws_into_one_that_folds():
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d
    )
    generator = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((1.0,),) * 5)
    module = FCOS(backbone, 3, anchor_generator=generator, min_size=64, max_size=64,
                  score_thresh=0.01)  # fmt: skip
    for part in module.modules():
        if isinstance(part, FrozenBatchNorm2d):
            part.running_var.uniform_(0.5, 2)
            part.weight.uniform_(0.5, 1.5)
    assert_same_detections(lively(module, (64, 64)), (64, 64), background=0)
    kinds = {type(part) for part in Core(module).modules()}
    assert FrozenBatchNorm2d not in kinds
    assert nn.BatchNorm2d in kinds


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_two_stages_are_refused_and_the_nearest_alternative_named(name):
    build = Build(model=f"torchvision/{name}", kwargs={"num_classes": 3})
    with pytest.raises(ModelError, match=r"RoIAlign.* take torchvision/retinanet_resnet50_fpn"):
        build_module(build, trust=False, origin="here")


def test_a_module_that_is_none_of_them_is_refused():
    with pytest.raises(ModelError, match="Conv2d is none of torchvision's SSD, RetinaNet and FCOS"):
        Core(nn.Conv2d(3, 4, 1))


def test_a_core_is_built_by_name_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    name = "torchvision/ssdlite320_mobilenet_v3_large"
    build = Build(model=name, kwargs={"num_classes": 3})  # without the background
    module = build_module(build, trust=False, origin="here")
    net = Network(module, torch.zeros(1, 3, 96, 96), build=build, labels=("a", "b", "c"))
    assert net.io.outputs == ("classes", "boxes")
    assert net.io.decoding is not None and net.io.decoding.scores == "softmax"
    net.save(tmp_path)
    again = Network.load(tmp_path)
    assert again.io == net.io
    x = torch.rand(1, 3, 96, 96)
    for one in (net, again):
        one.train_mode(False)
    with torch.no_grad():
        first, second = net(x), again(x)
    assert first["classes"].shape[2] == 4
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_weights_of_torchvision_fit_its_core():
    module = get_model("fcos_resnet50_fpn", **UNTRAINED)
    missing, extra = Core(module).load_state_dict(module.state_dict(), strict=False)
    assert not missing and not extra


# ---- any other detector, as the module's head documents it -------------------------------


class Theirs(nn.Module):
    """Somebody's detector: per level one map of left, top, right, bottom and class logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 8, 1)
        self.next = nn.ModuleList(nn.Conv2d(16, 16, 3, 2, 1) for _ in range(2))
        self.last = nn.ModuleList(nn.Conv2d(16, 4 + 5, 1) for _ in range(3))

    def heads(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x).relu()]
        for layer in self.next:
            maps.append(layer(maps[-1]).relu())
        return [last(m) for last, m in zip(self.last, maps, strict=True)]


class Adapter(nn.Module):
    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.theirs = theirs

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.theirs.heads(x)
        flat = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
        return {"classes": flat[..., 4:], "boxes": flat[..., :4]}

    def box_decoding(self, height: int, width: int) -> Decoding:
        levels = tuple(
            Level(grid=(height // s, width // s), stride=(s, s), sizes=((s, s),))
            for s in (8, 16, 32)
        )
        return Decoding(image=(height, width), levels=levels, boxes="distance")


def test_any_detector_fits_through_a_few_lines():
    torch.manual_seed(0)
    theirs = Theirs()
    net = edgekd.Network(Adapter(theirs), torch.zeros(1, 3, 64, 64), labels=tuple("vwxyz"))
    x = torch.rand(2, 3, 64, 64)
    task = Detection().of(net.io)
    with torch.no_grad():
        best = task.answers(net(x))[0, 0]
        logits = torch.cat([m[0, 4:].flatten(1) for m in theirs.heads(x)], 1)
    assert float(best[4]) == pytest.approx(float(logits.max().sigmoid()), rel=1e-6)
    assert int(best[5]) == int(logits.max(1).values.argmax())
    boxes = torch.tensor([[[3, 8, 8, 40, 40.0]], [[0, 16, 20, 60, 50.0]]])
    assert_learns(net, x, boxes)


def assert_learns(net: Network, x: Tensor, boxes: Tensor) -> None:
    trained = edgekd.distill(
        net, task=Detection(), data=[(x, boxes)] * 4, epochs=30, lr=0.02, accelerator="cpu"
    )
    task = Detection().of(net.io)
    with torch.no_grad():
        before, after = (float(task.loss(each(x), (boxes,))) for each in (net, trained))
    assert after < 0.7 * before


class Maps(nn.Module):
    """A backbone as torchvision's detectors expect it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.conv(x).relu()}


@pytest.mark.parametrize("family", ["ssd", "retinanet"])
def test_other_families_learn_too(family):
    """One assignment for all codings: offsets of many anchors, with a background or without."""
    torch.manual_seed(0)
    backbone: Any = Maps()
    if family == "ssd":
        boxes = DefaultBoxGenerator([[2]], scales=[0.3, 0.6])
        module: nn.Module = SSD(backbone, boxes, (64, 64), 4)
    else:
        backbone.out_channels = 16
        module = RetinaNet(backbone, 3, anchor_generator=AnchorGenerator(((24,),), ((1.0,),)))
    x = torch.rand(2, 3, 64, 64)
    truth = torch.tensor([[[2, 8, 8, 40, 40.0]], [[0, 16, 20, 60, 50.0]]])
    assert_learns(as_network(module, (64, 64)), x, truth)
