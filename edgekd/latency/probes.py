"""Small networks that span what vision networks are made of, drawn by seed.

Hardly a layer is like another: each network tells of as many kernels as it has. Weights are
random; they set no latency.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ProbeKind = Literal["dense", "depthwise", "transformer", "mixed"]
Shape = tuple[int, ...]

RESOLUTIONS = (64, 80, 96, 112, 128, 160, 192, 224)
CLASSES = (10, 100, 1000)


def probe(kind: ProbeKind, seed: int) -> tuple[nn.Module, Shape]:
    """One network, and the shape of one sample of its input.

    Example:
        >>> module, shape = probe("dense", 0)
        >>> len(shape)
        3
    """
    draw = random.Random(f"{kind} {seed}")
    made = {"dense": _dense, "depthwise": _depthwise, "transformer": _transformer, "mixed": _mixed}
    return made[kind](draw)


def is_probe(name: str) -> bool:
    """Whether a network's name is that of a probe: its kind and its seed."""
    kind, _, seed = name.partition("-")
    return kind in get_args(ProbeKind) and seed.isdigit()


# ---- blocks --------------------------------------------------------------------------------------


class Residual(nn.Module):
    """The sum of a branch and its input, or a projection of it, and perhaps an activation."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.last = branch, shortcut, last

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C', ...)."""
        out: Tensor = self.last(self.branch(x) + self.shortcut(x))
        return out


class Joined(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, sum of the branches' channels, H', W')."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class Shuffled(nn.Module):
    """Half of the channels pass, the other half is computed, and the two are shuffled.

    ShuffleNetV2's unit: Ma et al. 2018, arXiv:1807.11164, figure 3c.
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        left, right = x.chunk(2, dim=1)
        joined = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = joined.shape
        return joined.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Ghost(nn.Module):
    """Some channels, and as many more that a cheap depthwise convolution makes of them.

    GhostNet's module: Han et al. 2019, arXiv:1911.11907, §3.1.
    """

    def __init__(self, primary: nn.Module, cheap: nn.Module) -> None:
        super().__init__()
        self.primary, self.cheap = primary, cheap

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 2 C', H, W)."""
        made = self.primary(x)
        return torch.cat([made, self.cheap(made)], 1)


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole map holds: Hu et al. 2017, arXiv:1709.01507."""

    def __init__(self, channels: int, squeezed: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), act,
            nn.Conv2d(squeezed, channels, 1), gate,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        out: Tensor = x * self.layers(x)
        return out


class Attention(nn.Module):
    """Self-attention over tokens: Vaswani et al. 2017, arXiv:1706.03762, §3.2."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(n, t, c))
        return mixed


class ByPixel(nn.Module):
    """A map's pixels as the last axis' vectors, as ConvNeXt has it (arXiv:2201.03545)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        out: Tensor = self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class Tokens(nn.Module):
    """A map as tokens with a learnt position, behind a class token if wanted."""

    def __init__(self, channels: int, count: int, class_token: bool) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, channels)) if class_token else None
        # not zeros: a runtime may see that they add nothing
        self.position = nn.Parameter(0.02 * torch.randn(1, count + class_token, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, C)."""
        tokens = x.flatten(2).transpose(1, 2)
        if self.cls is not None:
            tokens = torch.cat([self.cls.expand(tokens.shape[0], -1, -1), tokens], 1)
        return tokens + self.position


class TokenHead(nn.Module):
    """Scores from the class token or from the mean of all."""

    def __init__(self, dim: int, classes: int, class_token: bool) -> None:
        super().__init__()
        self.class_token = class_token
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, K)."""
        x = self.norm(x)
        out: Tensor = self.head(x[:, 0] if self.class_token else x.mean(1))
        return out


def _conv(
    cin: int, cout: int, k: int, act: nn.Module | None, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(cout),
    ]  # fmt: skip
    return nn.Sequential(*layers, *([act] if act is not None else []))


def _multiple(value: float, of: int = 8) -> int:
    """The nearest one; of 8, as pruning leaves widths."""
    return max(of, round(value / of) * of)


def _shortcut(cin: int, cout: int, stride: int) -> nn.Module:
    return nn.Identity() if cin == cout and stride == 1 else _conv(cin, cout, 1, None, stride)


# ---- families ------------------------------------------------------------------------------------


def _stem(draw: random.Random, width: int, act: nn.Module) -> tuple[list[nn.Module], int]:
    """The first layers and by how much they shrink the map."""
    layers: list[nn.Module] = [_conv(3, width, draw.choice((3, 3, 5, 7)), act, 2)]
    if draw.random() < 0.4:
        return [*layers, nn.MaxPool2d(3, 2, 1)], 4
    return layers, 2


def _head(draw: random.Random, channels: int, act: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = []
    if draw.random() < 0.3:
        wide = _multiple(channels * draw.uniform(1.5, 4))
        layers, channels = [_conv(channels, wide, 1, act)], wide
    return [
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, draw.choice(CLASSES)),
    ]


def _staged(
    draw: random.Random,
    act: Callable[[], nn.Module],
    block: Callable[[int, int, int], nn.Module],
    *,
    width: int,
    growth: tuple[float, float],
    depth: tuple[int, int],
) -> tuple[nn.Module, Shape]:
    """A stem, stages that each halve the map, and a head."""
    size = draw.choice(RESOLUTIONS)
    layers, shrunk = _stem(draw, width, act())
    channels = width
    for stage in range(draw.choice((3, 4))):
        wide = _multiple(channels * draw.uniform(*growth))
        for index in range(draw.randint(*depth)):
            stride = 2 if index == 0 and (stage > 0 or shrunk == 2) and size // shrunk > 4 else 1
            shrunk *= stride
            layers.append(block(channels, wide, stride))
            channels = wide
    return nn.Sequential(*layers, *_head(draw, channels, act())), (3, size, size)


def _dense(draw: random.Random) -> tuple[nn.Module, Shape]:
    act = draw.choice((nn.ReLU, nn.ReLU, nn.ReLU, nn.SiLU, nn.Hardswish, nn.ReLU6))

    def block(cin: int, cout: int, stride: int) -> nn.Module:
        kind = draw.choice(("plain", "plain", "basic", "basic", "bottleneck", "grouped", "joined"))
        if kind == "plain":
            return _conv(cin, cout, draw.choice((1, 3, 3, 5)), act(), stride)
        if kind == "basic":
            branch = nn.Sequential(_conv(cin, cout, 3, act(), stride), _conv(cout, cout, 3, None))
            return Residual(branch, _shortcut(cin, cout, stride), act())
        if kind == "joined":
            narrow, wide = _multiple(cout * 0.25), _multiple(cout * 0.5)
            rest = cout - narrow - wide
            if rest <= 0:
                return _conv(cin, cout, 3, act(), stride)
            return Joined([
                _conv(cin, narrow, 1, act(), stride),
                nn.Sequential(_conv(cin, wide, 1, act()), _conv(wide, wide, 3, act(), stride)),
                nn.Sequential(nn.AvgPool2d(3, stride, 1), _conv(cin, rest, 1, act())),
            ])  # fmt: skip
        inner = _multiple(cout * draw.choice((0.25, 0.5)))
        groups = 1
        if kind == "grouped":
            group_width = draw.choice((8, 16, 32))
            inner = max(group_width, round(inner * 1.5 / group_width) * group_width)
            groups = inner // group_width
        branch = nn.Sequential(
            _conv(cin, inner, 1, act()), _conv(inner, inner, 3, act(), stride, groups),
            _conv(inner, cout, 1, None),
        )  # fmt: skip
        return Residual(branch, _shortcut(cin, cout, stride), act())

    width = 8 * draw.randint(2, 7)
    return _staged(draw, act, block, width=width, growth=(1.2, 2.1), depth=(1, 3))


def _depthwise(draw: random.Random) -> tuple[nn.Module, Shape]:
    act = draw.choice((nn.ReLU, nn.ReLU6, nn.ReLU6, nn.SiLU, nn.Hardswish))
    excites = draw.choice((0.0, 0.0, 0.5, 1.0))

    def block(cin: int, cout: int, stride: int) -> nn.Module:
        k = draw.choice((3, 3, 3, 5, 5, 7))
        kind = draw.choice(("inverted", "inverted", "inverted", "separable", "shuffled"))
        if kind == "shuffled" and stride == 1 and cin == cout:
            half = cin // 2
            return Shuffled(nn.Sequential(
                _conv(half, half, 1, act()), _conv(half, half, k, None, 1, half),
                _conv(half, half, 1, act()),
            ))  # fmt: skip
        if kind == "separable":
            return nn.Sequential(_conv(cin, cin, k, act(), stride, cin), _conv(cin, cout, 1, act()))
        wide = _multiple(cin * draw.uniform(2, 6))
        layers: list[nn.Module] = [
            _conv(cin, wide, 1, act()), _conv(wide, wide, k, act(), stride, wide),
        ]  # fmt: skip
        if draw.random() < excites:
            gate = nn.Hardsigmoid() if act is nn.Hardswish else nn.Sigmoid()
            squeezed = _multiple(draw.choice((cin, wide)) / 4)
            inner = nn.ReLU() if act is not nn.SiLU else nn.SiLU()
            layers.append(SqueezeExcite(wide, squeezed, inner, gate))
        branch = nn.Sequential(*layers, _conv(wide, cout, 1, None))
        if cin == cout and stride == 1:
            return Residual(branch, nn.Identity(), nn.Identity())
        return branch

    width = 8 * draw.randint(1, 5)
    return _staged(draw, act, block, width=width, growth=(1.2, 1.9), depth=(1, 4))


MOST_MACS, WIDEST = 12e6, 768  # of a layer of a mixed network


def _mixed(draw: random.Random) -> tuple[nn.Module, Shape]:
    """Blocks of all kinds, in any order and of any width: layers that do not follow from others.

    A network as people build them tells of few shapes, each several times; this one spans them.
    """
    acts = (nn.ReLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Identity)
    size, channels = draw.choice(RESOLUTIONS), 8 * draw.randint(1, 8)
    layers, shrunk = _stem(draw, channels, nn.ReLU())
    for _ in range(draw.randint(16, 22)):
        stride = 2 if size // shrunk > 4 and draw.random() < 0.25 else 1
        shrunk *= stride
        block, channels = _varied(draw, channels, (size // shrunk) ** 2, stride, draw.choice(acts))
        layers.append(block)
    return nn.Sequential(*layers, *_large_head(draw, channels)), (3, size, size)


def _large_head(draw: random.Random, channels: int) -> list[nn.Module]:
    """More weights than the caches near the core hold, each read once: as ImageNet's heads have."""
    wide = draw.choice((1024, 1280, 1536))
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if draw.random() < 0.5:
        layers = [_conv(channels, wide, 1, nn.ReLU()), *pool]
    else:
        layers = [*pool, nn.Linear(channels, wide), nn.Hardswish()]
    return [*layers, nn.Linear(wide, 1000)]


def _varied(
    draw: random.Random, cin: int, area: int, stride: int, act: Callable[[], nn.Module]
) -> tuple[nn.Module, int]:
    """A block, and how many channels it gives of `area` pixels."""

    def width(macs: float) -> int:
        """Of a layer that takes so many multiply-accumulates for each pixel and channel."""
        most = min(max(MOST_MACS / (macs * area), 16), WIDEST)
        return _multiple(math.exp(draw.uniform(math.log(8), math.log(most))), unit)

    unit = draw.choice((8, 4, 4))  # some layers' channels are no multiples of 8
    kinds = ["plain"] * 4 + ["depthwise", "grouped", "inverted"] * 2 + ["ghost", "joined", "basic"]
    kind, k = draw.choice(kinds), draw.choice((3, 3, 3, 5, 7))
    if kind == "plain":
        k = draw.choice((1, 1, 3, 3, 5))
        cout = width(cin * k * k)
        return _conv(cin, cout, k, act(), stride), cout
    if kind == "depthwise":
        cout = width(cin)
        shape = (_conv(cin, cin, k, act(), stride, cin), _conv(cin, cout, 1, act()))
        return nn.Sequential(*shape), cout
    if kind == "grouped":
        each = draw.choice((4, 8, 16, 24, 32))
        groups = max(2, round(width(max(cin, 9 * each)) / each))
        inner, cout = groups * each, width(groups * each)
        return nn.Sequential(
            _conv(cin, inner, 1, act()), _conv(inner, inner, 3, act(), stride, groups),
            _conv(inner, cout, 1, act()),
        ), cout  # fmt: skip
    if kind == "inverted":
        wide = width(cin)
        layers: list[nn.Module] = [
            _conv(cin, wide, 1, act()), _conv(wide, wide, k, act(), stride, wide),
        ]  # fmt: skip
        if draw.random() < 0.5:
            gate = draw.choice((nn.Hardsigmoid, nn.Sigmoid))()
            layers.append(SqueezeExcite(wide, _multiple(wide / 4, unit), nn.ReLU(), gate))
        if stride == 1 and draw.random() < 0.5:
            return Residual(nn.Sequential(*layers, _conv(wide, cin, 1, None)), nn.Identity(),
                            nn.Identity()), cin  # fmt: skip
        cout = width(wide)
        return nn.Sequential(*layers, _conv(wide, cout, 1, None)), cout
    half = width(cin)
    if kind == "ghost":
        return Ghost(_conv(cin, half, 1, act(), stride), _conv(half, half, 3, act(), 1, half)), (
            2 * half
        )
    if kind == "joined":
        other = width(cin)
        return Joined([
            _conv(cin, half, 1, act(), stride),
            nn.Sequential(nn.AvgPool2d(3, stride, 1), _conv(cin, other, 1, act())),
        ]), half + other  # fmt: skip
    cout = width(9 * cin)
    branch = nn.Sequential(_conv(cin, cout, 3, act(), stride), _conv(cout, cout, 3, None))
    return Residual(branch, _shortcut(cin, cout, stride), act()), cout


def _transformer(draw: random.Random) -> tuple[nn.Module, Shape]:
    kind = draw.choice(("plain", "plain", "hybrid", "convnext", "mixer"))
    size = draw.choice((64, 96, 128, 160, 192, 224))
    heads = draw.choice((2, 3, 4, 6))
    dim = heads * draw.choice((16, 32, 32, 64))
    dim = min(max(dim, 64), 320) // heads * heads

    def mlp(width: int, ratio: float) -> nn.Sequential:
        hidden = _multiple(width * ratio)
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )

    def residual(branch: nn.Module) -> Residual:
        return Residual(branch, nn.Identity(), nn.Identity())

    if kind == "convnext":
        width = 8 * draw.randint(4, 10)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), ByPixel(nn.LayerNorm(width))]
        for stage in range(3):
            if stage:
                wide = _multiple(width * draw.uniform(1.4, 2.0))
                layers += [ByPixel(nn.LayerNorm(width)), nn.Conv2d(width, wide, 2, 2)]
                width = wide
            for _ in range(draw.randint(1, 3)):
                depthwise = nn.Conv2d(width, width, 7, 1, 3, groups=width)
                if draw.random() < 0.5:
                    layers.append(residual(nn.Sequential(depthwise, ByPixel(mlp(width, 4)))))
                    continue
                hidden = _multiple(width * draw.choice((3, 4)))
                layers.append(residual(nn.Sequential(
                    depthwise, ByPixel(nn.LayerNorm(width)), nn.Conv2d(width, hidden, 1), nn.GELU(),
                    nn.Conv2d(hidden, width, 1),
                )))  # fmt: skip
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, draw.choice(CLASSES))]
        return nn.Sequential(*layers), (3, size, size)
    if kind == "hybrid":
        act = draw.choice((nn.ReLU, nn.Hardswish, nn.SiLU))
        widths = [_multiple(dim / 4), _multiple(dim / 2), dim]
        layers, cin = [], 3
        for width in widths:
            layers.append(_conv(cin, width, 3, act(), 2))
            cin = width
        layers.append(_conv(dim, dim, 3, None, 2))
        side = -(-size // 16)
    else:
        patch = draw.choice((8, 16, 16)) if size <= 128 else 16
        layers, side = [nn.Conv2d(3, dim, patch, patch)], size // patch
    class_token = kind != "mixer" and draw.random() < 0.5
    layers.append(Tokens(dim, side**2, class_token))
    for _ in range(draw.randint(2, 5)):
        ratio = draw.choice((2.0, 3.0, 4.0))
        if kind == "mixer":
            layers.append(
                residual(Turned(nn.LayerNorm(dim), mlp(side**2, draw.choice((0.5, 1.0, 2.0)))[1:]))
            )
        else:
            layers.append(residual(nn.Sequential(nn.LayerNorm(dim), Attention(dim, heads))))
        layers.append(residual(mlp(dim, ratio)))
    return nn.Sequential(*layers, TokenHead(dim, draw.choice(CLASSES), class_token)), (
        3,
        size,
        size,
    )


class Turned(nn.Module):
    """Tokens mixed by a network over their positions: Tolstikhin et al. 2021, arXiv:2105.01601."""

    def __init__(self, norm: nn.Module, mix: nn.Module) -> None:
        super().__init__()
        self.norm, self.mix = norm, mix

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        out: Tensor = self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return out
