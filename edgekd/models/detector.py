"""An anchor-free detector family: width, depth, neck, heads and resolution are free.

A residual backbone (`edgekd/resnet`'s blocks) gives maps at strides 8, 16 and 32; a feature
pyramid (Lin et al. 2017, arXiv:1612.03144 §3) with a path back down (Liu et al. 2018, PANet,
arXiv:1803.01534 §3.1) joins them by addition; each has its own decoupled heads for classes and
boxes (Ge et al. 2021, YOLOX, arXiv:2107.08430 §2.1), one anchor point a location (Tian et al.
2019, FCOS, arXiv:1904.01355). Its operators (convolution, addition, ReLU, nearest upsampling,
concatenation) run in integers or pass them on, and are in TensorRT 8.2 at opset 13. Exponentials
and sigmoids are left to the decoding, in float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.models.resnet import BasicBlock
from edgekd.tasks.decoding import Decoding, Level

STRIDES = (8, 16, 32)
PRIOR = 0.01  # the score of every class before training, RetinaNet §3.3, arXiv:1708.02002


def _convolution(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Head(nn.Module):
    """Towers for classes and for boxes over one map, and what they predict at each location."""

    def __init__(self, channels: int, depth: int, classes: int, bins: int) -> None:
        super().__init__()

        def tower(outputs: int) -> nn.Sequential:
            layers = [_convolution(channels, channels, 3) for _ in range(depth)]
            return nn.Sequential(*layers, nn.Conv2d(channels, outputs, 1))

        self.classes, self.boxes = tower(classes), tower(4 * max(bins, 1))
        with torch.no_grad():
            self.classes[-1].bias.fill_(-math.log((1 - PRIOR) / PRIOR))  # type: ignore[operator]
            # 4 strides wide; of a distribution all bins alike
            self.boxes[-1].bias.fill_(0 if bins else math.log(2))  # type: ignore[operator]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) -> (N, HW, K) logits, and (N, HW, 4·B) of what the boxes are coded in."""
        maps = self.classes(x), self.boxes(x)
        logits, distances = (m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps)
        return logits, distances


class Detector(nn.Module):
    """See `detector`."""

    head_path = "heads"

    def __init__(
        self,
        in_channels: int,
        classes: int,
        widths: Sequence[int],
        depths: Sequence[int],
        neck: int,
        head_depth: int,
        bins: int,
    ) -> None:
        super().__init__()
        self.bins = bins
        self.stem = _convolution(in_channels, widths[0], 3, 2)
        stages, previous = [], widths[0]
        for width, depth in zip(widths, depths, strict=True):
            blocks = [BasicBlock(previous if not i else width, width, 1 if i else 2)
                      for i in range(depth)]  # fmt: skip
            stages.append(nn.Sequential(*blocks))
            previous = width
        self.stages = nn.ModuleList(stages)
        self.lateral = nn.ModuleList(_convolution(width, neck, 1) for width in widths[-3:])
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.up = nn.ModuleList(_convolution(neck, neck, 3) for _ in STRIDES[1:])
        self.shrink = nn.ModuleList(_convolution(neck, neck, 3, 2) for _ in STRIDES[1:])
        self.down = nn.ModuleList(_convolution(neck, neck, 3) for _ in STRIDES[1:])
        self.heads = nn.ModuleList(Head(neck, head_depth, classes, bins) for _ in STRIDES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> classes (N, A, K) and boxes (N, A, 4·B), see `box_decoding`."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        fine, middle, coarse = (
            lateral(each) for lateral, each in zip(self.lateral, maps[-3:], strict=True)
        )
        middle = self.up[1](middle + self.upsample(coarse))
        fine = self.up[0](fine + self.upsample(middle))
        middle = self.down[0](middle + self.shrink[0](fine))
        coarse = self.down[1](coarse + self.shrink[1](middle))
        found = [head(each) for head, each in zip(self.heads, (fine, middle, coarse), strict=True)]
        logits, distances = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return {"classes": logits, "boxes": distances}

    def box_decoding(self, height: int, width: int) -> Decoding:
        """How the outputs for images of that size become boxes.

        Raises:
            ModelError: a size that is no multiple of 32.
        """
        if height % STRIDES[-1] or width % STRIDES[-1]:
            raise ModelError(
                f"the input is {height}×{width}; edgekd/detector takes multiples of {STRIDES[-1]}"
            )
        levels = (
            Level(grid=(height // s, width // s), stride=(s, s), sizes=((s, s),)) for s in STRIDES
        )
        return Decoding(
            image=(height, width), levels=tuple(levels), bins=self.bins,
            boxes="distribution" if self.bins else "log_distance",
        )  # fmt: skip


def detector(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 64, 128),
    depths: Sequence[int] | int = 1,
    neck: int = 64,
    head_depth: int = 1,
    bins: int = 0,
    scale: float = 1.0,
    round_to: int = 8,
) -> Detector:
    """A detector of the family.

    Args:
        num_classes: K, without a background.
        in_channels: channels of the image.
        widths: channels of the backbone at strides 4, 8, 16 and 32, before scaling.
        depths: blocks of each stage, or one number for all.
        neck: channels of the pyramid and the heads, before scaling.
        head_depth: 3×3 convolutions of each head in front of the last one.
        bins: of the distribution that each distance to an edge is given as, which teaches more
            than a number does; 0 gives numbers. An edge is then at most bins − 1 strides away.
        scale: multiplies every width (0.5 gives about a quarter of the parameters).
        round_to: widths are rounded to a multiple of this, and are never less.

    Example:
        >>> import torch, edgekd
        >>> net = edgekd.Network(detector(num_classes=3), torch.zeros(1, 3, 64, 64))
        >>> net.io.outputs, net(torch.zeros(2, 3, 64, 64))["boxes"].shape
        (('classes', 'boxes'), torch.Size([2, 84, 4]))
    """
    *scaled, joined = [
        max(round_to, round(w * scale / round_to) * round_to) for w in (*widths, neck)
    ]
    counts = [depths] * len(scaled) if isinstance(depths, int) else list(depths)
    if len(scaled) != 4 or len(counts) != 4 or min([*counts, num_classes, in_channels]) < 1:
        raise TypeError(f"widths {tuple(widths)} and depths {depths} must be four each, all >= 1")
    if head_depth < 0:
        raise TypeError(f"head_depth is {head_depth}; it must be 0 or more")
    if bins < 0 or bins == 1:
        raise TypeError(f"bins is {bins}; it must be 0, or 2 and more")
    return Detector(in_channels, num_classes, scaled, counts, joined, head_depth, bins)


def detector_space(kwargs: dict[str, Any], side: int) -> dict[str, list[Any]]:
    """Values of the family's arguments to choose among: depth and width.

    Args:
        kwargs: what the recipe gives.
        side: pixels of the data's images; their size is the data's.
    """
    return {"depths": [1, 2], "scale": [0.25 * i for i in range(1, 13)]}
