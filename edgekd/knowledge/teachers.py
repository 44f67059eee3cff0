"""A teacher is anything that turns a batch into outputs: one function makes them all alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.knowledge.taps import Features, tapped
from edgekd.network import Network

TeacherLike = Network | nn.Module | Callable[..., Any]
# (inputs, keys of the samples or None) -> outputs, and the features that hints want
Teacher = Callable[[tuple[Tensor, ...], Tensor | None], tuple[Any, Features]]


def as_teacher(
    teacher: TeacherLike | Sequence[TeacherLike], device: torch.device, taps: Sequence[str] = ()
) -> Teacher:
    """A function from inputs to outputs and features, without gradient, in eval mode.

    Args:
        teacher: a Network, a module, a callable, or several of these: their outputs are
            averaged (the ensemble of Hinton et al. 2015 §4), and must be single tensors.
        device: where inputs are, and the features will be.
        taps: module paths of a single Network or module.

    Raises:
        ModelError: an empty list.
    """
    module = module_of(teacher)
    if module is None:
        members = teacher if isinstance(teacher, Sequence) else [teacher]
        if not members:
            raise ModelError("the list of teachers is empty; give at least one, or None")
        if len(members) > 1:
            each = [as_teacher(member, device) for member in members]
            return lambda inputs, _: (torch.stack([t(inputs, None)[0] for t in each]).mean(0), {})
        function: Any = members[0]
    else:
        function = module.to(device).to(memory_format=torch.channels_last)

    def answer(inputs: tuple[Tensor, ...], _: Tensor | None) -> tuple[Any, Features]:
        if not taps:
            with torch.no_grad():
                return function(*inputs), {}
        with torch.no_grad(), tapped(function, taps) as features:
            return function(*inputs), features

    return answer


def module_of(teacher: TeacherLike | Sequence[TeacherLike] | None) -> nn.Module | None:
    """A copy of a single teacher's module, in eval mode; None of a callable or of several."""
    if isinstance(teacher, Sequence) and len(teacher) == 1:
        teacher = teacher[0]
    if isinstance(teacher, Network):
        net = teacher.copy()
        net.train_mode(False)
        return net.module
    if isinstance(teacher, nn.Module):
        return copy.deepcopy(teacher).eval()
    return None
