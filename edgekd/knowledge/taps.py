"""Taps: inner tensors of a network, named by the module paths of the original."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from edgekd.errors import ModelError, nearest
from edgekd.network import eval_mode

Features = dict[str, Tensor]
# "auto", or for each hint (student's path, teacher's path); one path alone stands for both
Hints = Literal["auto"] | Sequence[str | tuple[str, str]]


@contextlib.contextmanager
def tapped(module: nn.Module, paths: Iterable[str]) -> Iterator[Features]:
    """Within the block, each forward pass leaves the output of every path in the dictionary.

    Eager modules get forward hooks. Hooks do not survive capture: in a captured graph an identity
    is put behind the last node that carries the path, and taken away again afterwards.

    Raises:
        ModelError: no such module, or its output is not a single tensor.
    """
    features: Features = {}
    handles = []
    placed: list[Node] = []
    try:
        for path in dict.fromkeys(paths):
            inner = _find(module, path, placed)
            handles.append(inner.register_forward_hook(_keep(features, path)))
        yield features
    finally:
        for handle in handles:
            handle.remove()
        for node in placed:
            assert isinstance(module, GraphModule)
            module.graph.erase_node(node)
            module.delete_submodule(str(node.target))
            module.recompile()


def _keep(features: Features, path: str) -> Any:
    def keep(_: nn.Module, __: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise ModelError(
                f"the output of {path!r} is a {type(out).__name__}; a hint needs a single tensor: "
                "give the path of a module inside it"
            )
        features[path] = out

    return keep


def _find(module: nn.Module, path: str, placed: list[Node]) -> nn.Module:
    """What to hook for `path`; in a captured graph an identity that is put there."""
    if not isinstance(module, GraphModule):
        modules: dict[str, nn.Module] = dict(module.named_modules())
        if path not in modules:
            raise ModelError(f"no module {path!r} to take a hint from{nearest(path, modules)}")
        return modules[path]
    carriers = {
        name: node
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
        for name, _ in (node.meta.get("nn_module_stack") or {}).values()
    }
    if path not in carriers:
        raise ModelError(
            f"no operator of the captured network belongs to {path!r}{nearest(path, carriers)}"
        )
    name, tap = f"tap_{len(placed)}", nn.Identity()
    module.add_submodule(name, tap)
    with module.graph.inserting_after(carriers[path]):
        placed.append(module.graph.call_module(name, (carriers[path],)))
    module.recompile()
    return tap


def pair_hints(
    hints: Hints, student: nn.Module, teacher: nn.Module, example: Sequence[Tensor]
) -> list[tuple[str, str]]:
    """(student's path, teacher's path) of each hint.

    "auto" takes, for every resolution that both have behind the first one and above 1×1, the last
    module of each that gives it: the ends of corresponding stages. What lies below a module's
    `head_path`, if it has one, is left out: there maps turn into answers.

    Args:
        example: inputs of both, (N, ...).

    Raises:
        ModelError: "auto" finds no common resolution.
    """
    if hints != "auto":
        return [(hint, hint) if isinstance(hint, str) else (hint[0], hint[1]) for hint in hints]
    ours, theirs = (_ends_of_stages(net, example) for net in (student, teacher))
    shared = [size for size in ours if size in theirs]
    if not shared:
        raise ModelError(
            "hints = 'auto' looks for feature maps of equal height and width; the student has "
            f"{sorted(ours)}, the teacher {sorted(theirs)}: name the modules instead"
        )
    return [(ours[size], theirs[size]) for size in (shared[1:] or shared)]


def _ends_of_stages(module: nn.Module, example: Sequence[Tensor]) -> dict[tuple[int, int], str]:
    """(H, W) of feature maps, the largest first -> the last module that gives it."""
    calls: list[tuple[str, tuple[int, int]]] = []

    def keep(path: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.dim() == 4 and max(out.shape[2:]) > 1:
                calls.append((path, (out.shape[2], out.shape[3])))

        return hook

    head = getattr(module, "head_path", None)
    handles = [
        inner.register_forward_hook(keep(path))
        for path, inner in module.named_modules()
        if path and not (head and f"{path}.".startswith(f"{head}."))
    ]
    try:
        with eval_mode(module), torch.no_grad():
            module(*example)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {path: {size for p, size in calls if p == path} for path, _ in calls}
    # a module that is called at several resolutions is none's
    ends = {size: path for path, size in calls if len(sizes[path]) == 1}
    return dict(sorted(ends.items(), reverse=True))
