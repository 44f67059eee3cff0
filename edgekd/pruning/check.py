"""Does the pruned module compute what the original does without those channels?"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.pruning.layers import Kept, Side, layout_of

TOLERANCE = 1e-4  # of a layer's largest output; float32 in another order differs by 1e-6


def check(original: nn.Module, pruned: nn.Module, kept: Kept, inputs: Sequence[Tensor]) -> None:
    """Compare layer by layer, in eval mode, on `inputs`; then see whether `pruned` trains.

    The reference is `original` with zeros for the weights that read a removed channel: what is in
    those channels cannot matter then. Neither module is changed.

    Raises:
        ModelError: a channel count stands in the model's code, or torch-pruning mistook an
            operation; it names the first layer or the line, and what to do.
    """
    reference = copy.deepcopy(original).eval()
    for path, sides in kept.items():
        _silence(reference.get_submodule(path), sides)
    expected, _, _ = _run(reference, inputs)
    found, where, error = _run(copy.deepcopy(pruned).eval(), inputs)
    if error is not None:
        raise _failure(where, error, found)
    last = ""
    for path, outputs in expected.items():
        out = kept.get(path, {}).get("out")
        for ours, theirs in zip(found.get(path, []), outputs, strict=True):
            layer = reference.get_submodule(path) if path else None
            if out is not None:
                theirs = theirs.index_select(-1 if isinstance(layer, nn.Linear) else 1, out)
            limit = TOLERANCE * float(theirs.abs().max()) + 1e-6 if theirs.numel() else 0.0
            if ours.shape != theirs.shape or not float((ours - theirs).abs().max()) <= limit:
                raise ModelError(
                    f"after pruning, {path or 'the output'} no longer computes what it did "
                    "without the removed channels: torch-pruning mistook an operation before it. "
                    + _remedy(path, last)
                )
        last = path
    found, where, error = _run(copy.deepcopy(pruned).train(), inputs)
    if error is not None and _run(copy.deepcopy(original).train(), inputs)[2] is None:
        raise _failure(where, error, found, "in training mode ")


def _silence(layer: nn.Module, sides: Mapping[Side, Tensor]) -> None:
    layout = layout_of(layer)
    if layout is None or "in" not in sides or "in" not in layout.axes["weight"]:
        return
    axis = layout.axes["weight"].index("in")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    removed = torch.ones(weight.shape[axis], dtype=torch.bool)
    removed[sides["in"]] = False
    with torch.no_grad():
        weight.index_fill_(axis, removed.nonzero().flatten(), 0.0)


def _run(
    module: nn.Module, inputs: Sequence[Tensor]
) -> tuple[dict[str, list[Tensor]], str, Exception | None]:
    """(outputs of each layer in order of execution, the module that failed, its error).

    The network's own outputs stand under the empty path.
    """
    outputs: dict[str, list[Tensor]] = {}
    entered: list[str] = []

    def leave(path: str, layer: nn.Module, out: Any) -> None:
        entered.pop()
        if layout_of(layer) is not None:
            outputs.setdefault(path, []).append(out.clone())  # the next may work in place

    for path, layer in module.named_modules():
        layer.register_forward_pre_hook(lambda _, __, path=path: entered.append(path))
        layer.register_forward_hook(lambda m, _, out, path=path: leave(path, m, out))
    try:
        with torch.no_grad():
            out = module(*inputs)
    except Exception as error:  # whatever the model's code raises
        return outputs, entered[-1] if entered else "", error
    ends = out.values() if isinstance(out, Mapping) else [out] if isinstance(out, Tensor) else out
    outputs[""] = list(ends)
    return outputs, "", None


def _failure(
    path: str, error: Exception, run: dict[str, list[Tensor]], mode: str = ""
) -> ModelError:
    """The model's own line is the last one outside of torch."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    line = f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return ModelError(
        f"the pruned network fails {mode}in {path or 'its own forward'}{line}: {error}. "
        "It may expect a fixed number of channels. " + _remedy(path, next(reversed(run), ""))
    )


def _remedy(path: str, last: str) -> str:
    """Name the module at fault, and the layer that ran before it if that is not within it."""
    names = [path] if path and last.startswith(f"{path}.") else [path, last]
    return f"Keep the layers there whole: ignore={tuple(name for name in names if name)!r}"
