"""A teacher is anything that turns a batch into outputs: one function makes them all alike."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError, StateError
from edgekd.knowledge.taps import Features, tapped
from edgekd.network import IO, Input, Network, Preprocessing
from edgekd.quantization.capture import move
from edgekd.tasks.decoding import Decoding

TeacherLike = Network | nn.Module | Callable[..., Any]
# (inputs, keys of the samples or None) -> outputs of each, and the features that hints want
Teacher = Callable[[tuple[Tensor, ...], Tensor | None], tuple[list[Any], Features]]


class OnnxTeacher:
    """A network of which there is but an ONNX file, run by ONNX Runtime on the CPU: a black box.

    What is not given is taken from the manifest.json beside a file that edgekd wrote.

    Args:
        path: the file; it has one input, (N, C, H, W) in float32, with N free or fixed.
        decoding: how a detector's raw heads become boxes; None where its one output is detections,
            (N, D, 6): left, top, right, bottom in pixels of the input, score, class (−1: none).
        preprocessing: what its input is of; None: as the student's.
        labels: its class names; None: as the student's.

    Raises:
        StateError: the file is missing or refused.
        ModelError: it has several inputs, or one of another type.

    Example:
        teacher = edgekd.OnnxTeacher("yolo.onnx", decoding=Decoding(...), labels=names)
        edgekd.distill(student, teacher=lambda x: boxes_of(teacher(x)), ...)  # other outputs
    """

    def __init__(
        self,
        path: str | Path,
        *,
        decoding: Decoding | None = None,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        from edgekd.runtimes.base import get_runtime

        path = Path(path)
        if not path.is_file():
            raise StateError(f"{path}: no such file; a teacher's ONNX file is wanted")
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self._session = get_runtime("onnxruntime").load(path, threads=torch.get_num_threads())
        shapes, types = self._session.input_shapes, self._session.input_types
        if len(shapes) != 1 or types != ["float32"] or len(shapes[0]) != 4:
            raise ModelError(
                f"{path} takes {list(zip(types, shapes, strict=True))}; a teacher takes one "
                "float32 input of (N, C, H, W): wrap it in a function that feeds the rest"
            )
        known = _manifest_io(path)
        self.io = IO(
            inputs=(Input(name="input", shape=tuple(shapes[0][1:])),), outputs=(),
            preprocessing=preprocessing or (known.preprocessing if known else None),
            labels=tuple(labels) or (known.labels if known else ()),
            decoding=decoding or (known.decoding if known else None),
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Any:
        """(N, C, H, W) to its output, or to a tuple of them, in the file's order."""
        found = [torch.from_numpy(y).to(x.device) for y in self._session([x.cpu().numpy()])]
        return found[0] if len(found) == 1 else tuple(found)


def _manifest_io(path: Path) -> IO | None:
    """What the manifest beside a bundle's model file says of it."""
    try:
        manifest = json.loads(path.with_name("manifest.json").read_text())
        return IO.model_validate(manifest["io"]) if manifest["file"] == path.name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def members(teacher: TeacherLike | Sequence[TeacherLike]) -> list[TeacherLike]:
    """The teachers that are given: one, or several.

    Raises:
        ModelError: an empty list.
    """
    found = list(teacher) if isinstance(teacher, Sequence) else [teacher]
    if not found:
        raise ModelError("the list of teachers is empty; give at least one, or None")
    return found


def io_of(teacher: TeacherLike) -> IO | None:
    """What is known of its inputs and outputs: a Network's, or of anything with an `io`."""
    io = getattr(teacher, "io", None)
    return io if isinstance(io, IO) else None


def as_teacher(
    teacher: TeacherLike | Sequence[TeacherLike],
    device: torch.device,
    taps: Sequence[str] = (),
    seen: Preprocessing | None = None,
) -> Teacher:
    """A function from inputs to the outputs of each teacher, and features; without gradient.

    Args:
        teacher: a Network, a module, a callable, or several of these; modules in eval mode.
        device: where inputs are, and the features will be.
        taps: module paths of the first Network or module.
        seen: what inputs are of; a teacher whose own normalisation is known gets its own.

    Raises:
        ModelError: an empty list.
    """
    each, inside = [], None
    for member in members(teacher):
        module = module_of(member)
        function: Any = member
        if module is not None:
            function = move(module, device).to(memory_format=torch.channels_last)
            inside = function if inside is None else inside
        io = io_of(member)
        each.append((function, _renormalised(seen, None if io is None else io.preprocessing)))

    def answer(inputs: tuple[Tensor, ...], _: Tensor | None) -> tuple[list[Any], Features]:
        with torch.no_grad(), tapped(inside or nn.Identity(), taps) as features:
            return [function(*prepared(inputs)) for function, prepared in each], features

    return answer


def _renormalised(
    seen: Preprocessing | None, own: Preprocessing | None
) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """From inputs as `seen` normalises them to those of `own`; the first of them is the image."""
    if seen is None or own is None or (seen.mean, seen.std) == (own.mean, own.std):
        return lambda inputs: inputs
    (mean, std), (their_mean, their_std) = (
        [torch.tensor(v).view(-1, 1, 1) for v in (each.mean, each.std)] for each in (seen, own)
    )
    scale, shift = std / their_std, (mean - their_mean) / their_std

    def prepared(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        return (x * scale.to(x.device) + shift.to(x.device), *rest)

    return prepared


def first_module(teacher: TeacherLike | Sequence[TeacherLike]) -> nn.Module | None:
    """A copy of the module of the first teacher that has one; None of callables alone."""
    found = (module_of(member) for member in members(teacher))
    return next((module for module in found if module is not None), None)


def module_of(teacher: TeacherLike) -> nn.Module | None:
    """A copy of one teacher's module, in eval mode; None of a callable."""
    if isinstance(teacher, Network):
        net = teacher.copy()
        net.train_mode(False)
        return net.module
    if isinstance(teacher, nn.Module):
        return copy.deepcopy(teacher).eval()
    return None
