"""A residual family for small images: its width, depth and number of stages are free.

Basic blocks with post-activation as in He et al. 2015, arXiv:1512.03385 §4.2; every stage after
the first halves the resolution. Its operators (convolution, addition, ReLU, global average pool,
linear) run in integers on every target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, 1×1 where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """See `resnet`."""

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        in_channels: int,
        num_classes: int,
        resolution: int | None,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        stages, previous = [], widths[0]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for block in range(depth):
                blocks.append(BasicBlock(previous, width, 2 if index and not block else 1))
                previous = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(previous, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, K) scores."""
        if self.resolution is not None:
            x = interpolate(x, (self.resolution, self.resolution), mode="bilinear")
        out: Tensor = self.head(self.flatten(self.pool(self.stages(self.stem(x)))))
        return out


def resnet(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    depths: Sequence[int] | int = 1,
    scale: float = 1.0,
    resolution: int | None = None,
    round_to: int = 8,
) -> ResNet:
    """A residual network of the family.

    Args:
        num_classes: K.
        in_channels: channels of the image.
        widths: channels of each stage, before scaling.
        depths: blocks of each stage, or one number for all.
        scale: multiplies every width (0.5 gives about a quarter of the parameters).
        resolution: pixels of a side that images are resized to, bilinearly, before all else; None
            takes them as they come.
        round_to: widths are rounded to a multiple of this, and are never less.
    """
    scaled = [max(round_to, round(w * scale / round_to) * round_to) for w in widths]
    counts = [depths] * len(scaled) if isinstance(depths, int) else list(depths)
    if not scaled or len(counts) != len(scaled) or min([*counts, num_classes, in_channels]) < 1:
        raise TypeError(f"widths {tuple(widths)} and depths {depths} must be as many, all >= 1")
    if resolution is not None and resolution < 1:
        raise TypeError(f"resolution is {resolution}; give 1 pixel or more, or leave it out")
    return ResNet(scaled, counts, in_channels, num_classes, resolution)


def resnet_space(kwargs: dict[str, Any], side: int) -> dict[str, list[Any]]:
    """Values of the family's arguments to choose among: depth, width and resolution.

    Args:
        kwargs: what the recipe gives; its widths, and fewer of them, are the stages.
        side: pixels of the data's images.
    """
    widths = list(kwargs.get("widths", (16, 32, 64)))
    return {
        # one stage alone sees a few pixels at a time
        "widths": [widths[:count] for count in range(min(2, len(widths)), len(widths) + 1)],
        "depths": [1, 2, 3],
        # steps of a tenth or so in latency: a budget is to be used
        "scale": [*(0.25 * i for i in range(2, 13)), *(0.5 * i for i in range(7, 13)), 7.0, 8.0],
        "resolution": [None, *(round(side * share) for share in (0.75, 0.5))],
    }
