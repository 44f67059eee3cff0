"""torchvision's two-stage detectors, whole: as teachers, and as files that nothing made smaller.

Between the stages proposals are chosen and cut out (RoIAlign), as many as the image has: there is
no core of tensors alone to prune or to quantize.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from edgekd.errors import ModelError
from edgekd.models.torchvision_detectors import own_preprocessing
from edgekd.network import IO, Input


class TwoStage(nn.Module):
    """A Faster R-CNN from images to detections, for `distill` as a teacher and for `export`.

    Args:
        module: of torchvision; it is shared, and in eval mode from now on.
        size: height and width of the images: the student's.
        labels: names of its classes, without the background.

    Raises:
        ModelError: another module.

    Example:
        teacher = TwoStage(fasterrcnn_resnet50_fpn(weights="DEFAULT"), (320, 320), labels=names)
        edgekd.distill(student, teacher=teacher, task=task, data=data, epochs=40)
        edgekd.export(teacher, target="intel-cpu", out="whole")
    """

    def __init__(
        self, module: nn.Module, size: tuple[int, int], *, labels: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if not isinstance(module, FasterRCNN):
            raise ModelError(
                f"{type(module).__name__} is no Faster R-CNN of torchvision; a detector of one "
                "stage has a core: edgekd.models.torchvision_detectors.as_network"
            )
        self.module: Any = module
        self.io = IO(
            inputs=(Input(name="input", shape=(3, *size)),), outputs=("detections",),
            preprocessing=own_preprocessing(module), labels=tuple(labels),
        )  # fmt: skip
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), normalised, to (N, D, 6): left, top, right, bottom, score, class.

        D is the module's `box_detections_per_img`; what is absent is −1 throughout.
        """
        size = (x.shape[2], x.shape[3])
        maps = self.module.backbone(x)
        proposals, _ = self.module.rpn(ImageList(x, [size] * len(x)), maps)
        found, _ = self.module.roi_heads(maps, proposals, [size] * len(x))
        count = self.module.roi_heads.detections_per_img
        images = []
        for each in found:
            kind = (each["labels"] - 1).to(x.dtype)
            rows = torch.cat([each["boxes"], each["scores"][:, None], kind[:, None]], 1)
            images.append(torch.cat([rows, x.new_full((count, 6), -1.0)])[:count])
        return torch.stack(images)
