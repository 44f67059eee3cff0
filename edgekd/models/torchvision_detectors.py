"""torchvision's detectors as cores: image to raw heads, in a static size, pure tensors.

What torchvision does around the core is left to data (resizing), to `Preprocessing` (mean and
standard deviation) and to the decoding (anchors, suppression), which gives the same detections.

Any other detector fits through a module of these few lines:

    class Core(nn.Module):
        def __init__(self, theirs):
            super().__init__()
            self.theirs = theirs

        def forward(self, x):                       # (N, C, H, W), normalised
            maps = self.theirs.heads(x)             # per level (N, K + 4, H / s, W / s), say
            flat = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
            return {"classes": flat[..., 4:], "boxes": flat[..., :4]}

        def box_decoding(self, height, width):
            levels = tuple(
                Level(grid=(height // s, width // s), stride=(s, s), sizes=((s, s),))
                for s in (8, 16, 32)
            )
            return Decoding(image=(height, width), levels=levels, boxes="distance")

    net = edgekd.Network(Core(theirs), torch.zeros(1, 3, 320, 320), labels=(...))

What each option of `Level` and `Decoding` means is in `edgekd.tasks.decoding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d

from edgekd.errors import ModelError
from edgekd.network import Network, Preprocessing, eval_mode
from edgekd.tasks.decoding import Decoding, Level

ALTERNATIVE = "take torchvision/retinanet_resnet50_fpn: the same backbone and pyramid in one stage"
WITH_BACKGROUND = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")  # num_classes counts it


class Core(nn.Module):
    """Backbone and heads of one of torchvision's detectors, under their names there.

    Args:
        module: an SSD, RetinaNet or FCOS; it is not changed, but for its tensors, which are shared.

    Raises:
        ModelError: another detector; the nearest one that has a core is named.
    """

    head_path = "head"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if isinstance(module, GeneralizedRCNN):
            raise ModelError(
                f"{type(module).__name__} has no core of tensors alone: between its two stages "
                "proposals are chosen and cut out (RoIAlign, which TensorRT 8.2 does not have); "
                "whole, it is a teacher, or a file for ONNX Runtime and OpenVINO: "
                f"edgekd.models.two_stage.TwoStage; for less than that {ALTERNATIVE}"
            )
        if not isinstance(module, SSD | RetinaNet | FCOS):
            raise ModelError(
                f"{type(module).__name__} is none of torchvision's SSD, RetinaNet and FCOS; write "
                "a module with box_decoding(height, width), as edgekd.models.torchvision_detectors "
                "shows"
            )
        parts: Any = module
        self.backbone: nn.Module = _thawed(parts.backbone)
        self.head: nn.Module = parts.head
        self.anchors: nn.Module = parts.anchor_generator
        self._facts = _facts(parts)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> classes (N, A, K), boxes (N, A, 4) and, of FCOS, quality (N, A, 1)."""
        found = self.head(self._maps(x))
        ends = {"classes": found["cls_logits"], "boxes": found["bbox_regression"]}
        return ends | ({"quality": found["bbox_ctrness"]} if "bbox_ctrness" in found else {})

    def _maps(self, x: Tensor) -> list[Tensor]:
        return list(self.backbone(x).values())

    def box_decoding(self, height: int, width: int) -> Decoding:
        """torchvision's own anchors, thresholds and limits, for images of that size."""
        device = next(self.parameters()).device
        with eval_mode(self), torch.no_grad():
            maps = self._maps(torch.zeros(1, 3, height, width, device=device))
        grids = [(m.shape[2], m.shape[3]) for m in maps]
        place = _default_boxes if isinstance(self.anchors, DefaultBoxGenerator) else _grid_anchors
        levels = place(self.anchors, grids, height, width)
        return Decoding(image=(height, width), levels=levels, **self._facts)


def build_core(name: str, **kwargs: Any) -> Core:
    """The core of torchvision's detector of that name.

    Args:
        kwargs: torchvision's, but that `num_classes` never counts a background, and that
            `weights_backbone` is None where it is not given: nothing is fetched unasked.
    """
    kwargs = {"weights_backbone": None} | kwargs
    if name in WITH_BACKGROUND and "num_classes" in kwargs:
        kwargs["num_classes"] += 1
    return Core(get_model(name, **kwargs))


def is_detector(name: str) -> bool:
    """Whether torchvision's model of that name is a detector."""
    from torchvision.models import list_models

    return name in list_models(module=detection)


def as_network(module: nn.Module, size: tuple[int, int], *, labels: Sequence[str] = ()) -> Network:
    """One of torchvision's detectors as a Network, with its own normalisation.

    It has no factory: saved, it is loaded with `Network.load(path, module=Core(...))`. Trained
    SSDs saw images stretched to their size; letterboxed ones differ from that.

    Args:
        size: height and width of the input.

    Raises:
        ModelError: see `Core`.
    """
    known = own_preprocessing(module)
    return Network(Core(module), torch.zeros(1, 3, *size), preprocessing=known, labels=labels)


def own_preprocessing(module: nn.Module) -> Preprocessing:
    """The normalisation of one of torchvision's detectors, of letterboxed images."""
    transform = cast(Any, module).transform
    mean, std = (tuple(values) for values in (transform.image_mean, transform.image_std))
    return Preprocessing(mean=mean, std=std, fit="letterbox")


def _facts(theirs: Any) -> dict[str, Any]:
    """What a Decoding says of a detector, whatever the size of its images."""
    facts: dict[str, Any] = {
        "score_threshold": theirs.score_thresh,
        "candidates": theirs.topk_candidates,
        "nms_threshold": theirs.nms_thresh,
        "detections": theirs.detections_per_img,
    }
    if isinstance(theirs, FCOS):
        return facts | {"boxes": "distance", "quality": True}
    coder = theirs.box_coder
    facts |= {"boxes": "offset", "weights": coder.weights, "largest": coder.bbox_xform_clip}
    if isinstance(theirs, SSD):
        facts |= {"scores": "softmax", "candidates_of": "class"}
    return facts


def _thawed(module: nn.Module) -> nn.Module:
    """With BatchNorm2d in the place of FrozenBatchNorm2d, which nothing can fold or prune."""
    for name, inner in module.named_children():
        if isinstance(inner, FrozenBatchNorm2d):
            norm = nn.BatchNorm2d(len(inner.weight), eps=inner.eps)
            norm.load_state_dict(inner.state_dict(), strict=False)  # it counts no batches
            setattr(module, name, norm)
        else:
            _thawed(inner)
    return module


def _grid_anchors(
    generator: Any, grids: Sequence[tuple[int, int]], height: int, width: int
) -> tuple[Level, ...]:
    """Of `AnchorGenerator`: centres in the corners of cells, whole strides, rounded boxes."""
    return tuple(
        Level(
            grid=grid, stride=(height // grid[0], width // grid[1]), offset=0.0,
            sizes=tuple((right - left, bottom - top) for left, top, right, bottom in cell.tolist()),
        )
        for grid, cell in zip(grids, generator.cell_anchors, strict=True)
    )  # fmt: skip


def _default_boxes(
    generator: Any, grids: Sequence[tuple[int, int]], height: int, width: int
) -> tuple[Level, ...]:
    """Of `DefaultBoxGenerator`: centres in the middle of cells, shares of the image."""
    steps = generator.steps or [None] * len(grids)
    levels = []
    for grid, step, pairs in zip(grids, steps, generator._wh_pairs, strict=True):
        shares = pairs.clamp(0, 1) if generator.clip else pairs
        sizes = tuple((wide * width, high * height) for wide, high in shares.tolist())
        stride = (step, step) if step else (height / grid[0], width / grid[1])
        levels.append(Level(grid=grid, stride=stride, sizes=sizes))
    return tuple(levels)
