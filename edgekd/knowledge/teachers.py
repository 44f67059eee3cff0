"""A teacher is anything that turns a batch into outputs: one function makes them all alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.network import Network

TeacherLike = Network | nn.Module | Callable[..., Any]
Teacher = Callable[[tuple[Tensor, ...]], Any]


def as_teacher(teacher: TeacherLike | Sequence[TeacherLike], device: torch.device) -> Teacher:
    """A function from inputs to outputs without gradient, in eval mode, on `device`.

    Args:
        teacher: a Network, a module, a callable, or several of these: their outputs are
            averaged (the ensemble of Hinton et al. 2015 §4), and must be single tensors.
    """
    if isinstance(teacher, Sequence):
        if not teacher:
            raise ModelError("the list of teachers is empty; give at least one, or None")
        members = [as_teacher(t, device) for t in teacher]
        return lambda inputs: torch.stack([member(inputs) for member in members]).mean(0)
    if isinstance(teacher, Network):
        teacher = teacher.copy()
        teacher.train_mode(False)
        function: Callable[..., Any] = teacher.module.to(device)
    elif isinstance(teacher, nn.Module):
        function = copy.deepcopy(teacher).to(device).eval()
    else:
        function = teacher

    def outputs(inputs: tuple[Tensor, ...]) -> Any:
        with torch.no_grad():
            return function(*inputs)

    return outputs
