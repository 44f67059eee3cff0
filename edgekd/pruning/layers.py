"""Layers of another width: which attributes and which axes of which tensors count channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from edgekd.errors import StateError

Side = Literal["in", "out"]
Resized = Mapping[str, Mapping[str, int]]  # module path -> attribute -> its new value

Kept = Mapping[str, Mapping[Side, Tensor]]  # module path -> side -> channels that stay, ascending


@dataclass(frozen=True)
class Layout:
    """Of one layer.

    Attributes:
        attributes: name of an attribute -> the side whose channels it counts.
        axes: name of a tensor -> the side that each of its axes counts; None: neither.
    """

    attributes: Mapping[str, Side]
    axes: Mapping[str, tuple[Side | None, ...]]


_CONV = Layout(
    {"out_channels": "out", "in_channels": "in"}, {"weight": ("out", "in"), "bias": ("out",)}
)
_TRANSPOSED = Layout(_CONV.attributes, {"weight": ("in", "out"), "bias": ("out",)})
# input and output channels of a grouped convolution go together, a whole group at a time
_GROUPED = Layout(
    {"out_channels": "out", "in_channels": "out"}, {"weight": ("out", None), "bias": ("out",)}
)
_LINEAR = Layout({"out_features": "out", "in_features": "in"}, _CONV.axes)
_NORM = Layout(
    {"num_features": "out"},
    {name: ("out",) for name in ("weight", "bias", "running_mean", "running_var")},
)
_PRELU = Layout({"num_parameters": "out"}, {"weight": ("out",)})


def layout_of(layer: nn.Module) -> Layout | None:
    """How `layer` is resized; None where its channels cannot be removed one by one.

    Normalisation over channels (LayerNorm, GroupNorm) is among those: without some of its
    channels the others would change. So is a layer with tensors that are not of its kind
    (a parametrization, a gain of its own).
    """
    if is_parametrized(layer):
        return None
    if isinstance(layer, _ConvNd):
        layout = _TRANSPOSED if layer.transposed else _CONV
        if layer.groups > 1:
            if layer.in_channels != layer.out_channels:
                return None
            layout = _GROUPED
    elif isinstance(layer, nn.Linear):
        layout = _LINEAR
    elif isinstance(layer, _NormBase):
        layout = _NORM
    elif isinstance(layer, nn.PReLU):
        layout = _PRELU
    else:
        return None
    own = {name for name, tensor in _tensors(layer) if tensor.dim()}
    return layout if own <= layout.axes.keys() else None


def width(layer: nn.Module, side: Side) -> int:
    """Channels that `layer`, which has a layout, counts on that side."""
    layout = layout_of(layer)
    assert layout is not None
    count: int = getattr(layer, next(a for a, s in layout.attributes.items() if s == side))
    return count


def group_width(layer: nn.Module) -> int:
    """Channels in each group of a grouped convolution; 1 for every other layer."""
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return layer.out_channels // layer.groups
    return 1


def select(layer: nn.Module, kept: Mapping[Side, Tensor]) -> dict[str, int]:
    """Keep only the channels `kept` of each side, in place; the attributes that changed.

    Args:
        layer: with a layout.
        kept: side -> ascending indices of channels; a side that is absent stays whole.
    """
    layout = layout_of(layer)
    assert layout is not None
    for name, tensor in _tensors(layer):
        value = tensor.detach()
        for axis, side in enumerate(layout.axes.get(name, ())):
            if side is not None and side in kept:
                value = value.index_select(axis, kept[side].to(value.device))
        _replace(layer, name, value)
    changed = {name: len(kept[side]) for name, side in layout.attributes.items() if side in kept}
    if layout is _GROUPED:
        changed["groups"] = len(kept["out"]) // group_width(layer)
    for name, count in changed.items():
        setattr(layer, name, count)
    return changed


def resize(module: nn.Module, resized: Resized, origin: str) -> None:
    """Give layers the widths of a network that `select` made; their tensors become zeros.

    Args:
        origin: where `resized` was found, for messages.

    Raises:
        StateError: a layer that is not there, or attributes that are not of its kind.
    """
    for path, attributes in resized.items():
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            raise StateError(
                f"{origin}: resized names {path!r}; {type(module).__name__} has no such layer"
            ) from None
        before = layout_of(layer)
        known = () if before is None else (*before.attributes, "groups")
        for name, value in attributes.items():
            if name not in known or value < 1:
                raise StateError(
                    f"{origin}: resized gives {path} {name} = {value!r}; a {type(layer).__name__} "
                    f"takes {', '.join(known) or 'no other width'}, whole numbers from 1 on"
                )
            setattr(layer, name, value)
        layout = layout_of(layer)  # a grouped convolution may have a single group left
        if layout is None:
            raise StateError(f"{origin}: resized gives {path} {dict(attributes)}: no such layer")
        for name, tensor in _tensors(layer):
            shape = list(tensor.shape)
            for axis, side in enumerate(layout.axes.get(name, ())):
                if side is not None:
                    shape[axis] = width(layer, side)
            _replace(layer, name, tensor.new_zeros(shape))


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from list(layer.named_parameters(recurse=False))
    yield from list(layer.named_buffers(recurse=False))


def _replace(layer: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(layer, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    with torch.no_grad():
        setattr(layer, name, value)
