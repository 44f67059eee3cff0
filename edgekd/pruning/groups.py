"""Which channels stand and fall together, what they are worth, and how many of them stay.

torch-pruning's dependency graph (Fang et al. 2023, DepGraph, arXiv:2301.12900) says which channels
of which layers are tied by the operations between them; the rest is here. All groups are read off
the whole network once, and the chosen channels are removed at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgekd.errors import ModelError
from edgekd.pruning.layers import Kept, Side, group_width, layout_of, width


@dataclass(frozen=True)
class Member:
    """One side of one layer: its channel `indices[k]` is the group's channel `channels[k]`."""

    path: str
    side: Side
    indices: Tensor
    channels: Tensor


@dataclass(frozen=True)
class _Sizes:
    """Of what a reshape reads."""

    _saved_self_sizes: tuple[int, ...]


@dataclass
class Group:
    """Channels that the network's operations tie across layers.

    Attributes:
        path: the layer that produces them.
        members: every layer side that holds them.
        importance: (C,) of each channel: how large it is made times how much of it is read.
        unit: (C,) channels with the same number go together: those that share a group of a
            grouped convolution.
        fixed: why none of them can be removed; empty if they can.
    """

    path: str
    members: list[Member] = field(default_factory=list)
    importance: Tensor = field(default_factory=lambda: torch.zeros(0))
    unit: Tensor = field(default_factory=lambda: torch.zeros(0))
    fixed: str = ""

    @property
    def channels(self) -> int:
        """C."""
        return len(self.unit)

    def step(self, multiple: int) -> int:
        """Channels are kept in multiples of this."""
        return math.lcm(multiple, self.channels // len(set(self.unit.tolist())))

    def turning_points(self, multiple: int) -> list[float]:
        """Ratios above which one step fewer is kept."""
        if self.fixed:
            return []
        step = self.step(multiple)
        sizes = [*range(step, self.channels, step), self.channels]
        return [1 - (a + b) / 2 / self.channels for a, b in pairwise(sizes)]

    def size(self, ratio: float, multiple: int) -> int:
        """Channels to keep: the nearest whole step, at least one; or all of them."""
        passed = sum(ratio > point for point in self.turning_points(multiple))
        if not passed:
            return self.channels
        step = self.step(multiple)
        return (math.ceil(self.channels / step) - passed) * step

    def removed(self, ratio: float, multiple: int) -> Tensor:
        """The least important channels, whole units of them."""
        drop = self.channels - self.size(ratio, multiple)
        if not drop:
            return torch.zeros(0, dtype=torch.long)
        names, unit = np.unique(self.unit, return_inverse=True)
        worth = np.bincount(unit, self.importance)
        units = worth.argsort(kind="stable")[: drop * len(names) // self.channels]
        return torch.from_numpy(np.isin(unit, units)).nonzero().flatten()


def find_groups(module: nn.Module, inputs: Sequence[Tensor], ignore: Iterable[str]) -> list[Group]:
    """All groups of channels; a layer that the outputs do not depend on is a fixed one.

    Args:
        module: put in eval mode; its parameters and `inputs` get to require gradients.
        inputs: an example.
        ignore: module paths; the layers there stay as they are.
    """
    graph, starts = _trace(module, inputs)
    paths = {id(m): path for path, m in module.named_modules()}
    untouchable = {
        id(m): f"{path} is in ignore"
        for path in ignore
        for m in module.get_submodule(path).modules()
    } | _tied(module)
    groups: list[Group] = []
    covered: dict[int, set[int]] = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            continue
        if layer not in graph.module2node:
            groups.append(Group(path, fixed="the outputs in eval mode do not depend on it"))
            continue
        pruner = graph.get_pruner_of_module(layer)
        rest = sorted(set(range(pruner.get_out_channels(layer))) - covered.get(id(layer), set()))
        if not rest:
            continue
        # torch-pruning spreads each flattened channel over all its elements, once more for every
        # reshape behind it: minutes for the heads of a detector, which are outputs anyway
        if _leaves(graph, graph.module2node[layer]):
            unit = torch.arange(len(rest))
            groups.append(Group(path, unit=unit, fixed="outputs of the network"))
            continue
        tied = graph.get_pruning_group(layer, pruner.prune_out_channels, rest)
        for dep, indices in tied:
            covered.setdefault(id(dep.target.module), set()).update(
                indices if _side(graph, dep) == "out" else ()
            )
        groups.append(_group(graph, tied, rest, path, paths, starts, untouchable))
    return groups


def kept_channels(module: nn.Module, groups: list[Group], ratio: float, multiple: int) -> Kept:
    """What `select` keeps of every layer of `module` that gets narrower."""
    gone: dict[tuple[str, Side], list[Tensor]] = {}
    for group in groups:
        removed = group.removed(ratio, multiple)
        for member in group.members if len(removed) else ():
            indices = member.indices[torch.isin(member.channels, removed)]
            gone.setdefault((member.path, member.side), []).append(indices)
    kept: dict[str, dict[Side, Tensor]] = {}
    for (path, side), parts in gone.items():
        stays = torch.ones(width(module.get_submodule(path), side), dtype=torch.bool)
        stays[torch.cat(parts)] = False
        kept.setdefault(path, {})[side] = stays.nonzero().flatten()
    return kept


def _trace(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Any, set[Any]]:
    """The dependency graph, and the autograd nodes of the network's inputs."""
    import torch_pruning  # takes a second

    class Graph(torch_pruning.DependencyGraph):  # type: ignore[misc]
        """Grouped convolutions lose whole groups, as depthwise ones do.

        torch-pruning would thin out every group alike. That leaves odd group widths, and a
        multiple of 8 only where the number of groups is one (RegNet's 13 groups never are).

        A reshaped map of one pixel has its channels as they were, in front of a Concat too.
        torch-pruning would see that by the sizes, which it looks for where torch 1 had them, and
        takes all that the Concat gives for the elements of the map.
        """

        def _build_dependency(self, module2node: Any) -> None:
            for node in module2node.values():
                sizes = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
                if node.type == self.ops.OPTYPE.RESHAPE and len(sizes) == 4 and sizes[2:] == (1, 1):
                    node.grad_fn = _Sizes(sizes)
            super()._build_dependency(module2node)

        def get_pruner_of_module(self, module: Any) -> Any:
            if isinstance(module, _ConvNd) and module.groups > 1:
                return self.REGISTERED_PRUNERS[self.ops.OPTYPE.DEPTHWISE_CONV]
            return super().get_pruner_of_module(module)

    module.eval().requires_grad_()
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    starts: set[Any] = set()

    def forward(module: nn.Module, _: Any) -> list[Tensor]:
        # times one: inputs and outputs become operations of their own, which groups then touch
        xs = [x * 1 if x.requires_grad else x for x in leaves]
        starts.update(x.grad_fn for x in xs if x.grad_fn is not None)
        outputs = torch_pruning.utils.flatten_as_list(module(*xs))
        return [y * 1 for y in outputs if y.requires_grad]

    try:
        with torch.enable_grad():
            graph = Graph().build_dependency(module, inputs, forward_fn=forward, verbose=False)
    except Exception as error:  # a ZeroDivisionError, say, at ShuffleNet's channel shuffle
        raise ModelError(
            f"torch-pruning {version('torch-pruning')} cannot follow {type(module).__name__}: "
            f"{type(error).__name__}: {error}. Shuffled or regrouped channels are beyond it; "
            "choose a narrower network of the family instead"
        ) from error
    return graph, starts


def _side(graph: Any, dep: Any) -> Side:
    reads = dep.handler == graph.get_pruner_of_module(dep.target.module).prune_in_channels
    return "in" if reads and not _through(graph, dep.target.module) else "out"


def _leaves(graph: Any, node: Any) -> bool:
    """Whether a node's channels reach an output through nothing that has others of its own."""
    ahead, seen = list(node.outputs), set()
    while ahead:
        node = ahead.pop()
        if node.type == graph.ops.OPTYPE.OUTPUT:
            return True
        if id(node) not in seen:
            seen.add(id(node))
            ahead += node.outputs if _through(graph, node.module) else []
    return False


def _through(graph: Any, layer: Any) -> bool:
    """Whether its outputs are the channels of its inputs."""
    pruner = graph.get_pruner_of_module(layer)
    same: bool = pruner.prune_in_channels == pruner.prune_out_channels
    return same


def _group(
    graph: Any,
    tied: Any,
    channels: list[int],
    path: str,
    paths: dict[int, str],
    starts: set[Any],
    untouchable: dict[int, str],
) -> Group:
    """Our own view of torch-pruning's group of `channels` of the layer at `path`."""
    n = len(channels)
    group = Group(path, unit=torch.arange(n), importance=torch.zeros(n))
    position = {channel: k for k, channel in enumerate(channels)}
    worth: dict[Side, Tensor] = {"out": torch.zeros(n), "in": torch.zeros(n)}
    blocks: list[tuple[Tensor, Tensor, int]] = []
    for item in tied:
        node, layer = item.dep.target, item.dep.target.module
        if node.type == graph.ops.OPTYPE.OUTPUT:
            group.fixed = "outputs of the network"
        elif node.grad_fn in starts:
            group.fixed = "tied to the network's inputs"
        elif id(layer) in untouchable:
            group.fixed = untouchable[id(layer)]
        elif not isinstance(layer, nn.Parameter) and graph.get_out_channels(node) is None:
            continue  # an operation without channels of its own
        elif isinstance(layer, nn.Parameter) or layout_of(layer) is None:
            name = paths.get(id(layer)) or graph._param_to_name.get(layer, "")
            group.fixed = f"tied to {name}, a {type(layer).__name__} that cannot be resized"
        if group.fixed:
            return group
        side = _side(graph, item.dep)
        indices = torch.tensor(item.idxs)
        at = torch.tensor([position[root] for root in item.root_idxs])
        group.members.append(Member(paths[id(layer)], side, indices, at))
        blocks.append((indices, at, group_width(layer)))
        if (norms := _squared_norms(node, side)) is not None:
            # every layer has the same say, whatever the size of its weights
            added = torch.zeros(n).index_add(0, at, norms[indices])
            worth[side] += added / added.mean().clamp(min=1e-30)
    if not _bind(group, blocks):
        group.fixed = "a grouped convolution ties them to channels from elsewhere"
    # a channel that is not produced, or that nobody reads, is worth nothing
    made, read = (w if w.any() else torch.ones(n) for w in worth.values())
    group.importance = made * read
    return group


def _squared_norms(node: Any, side: Side) -> Tensor | None:
    """Squared L2 norm of each channel's weights, (channels of the layer,).

    A layer that a BatchNorm follows counts as if that were folded: the norm of its filters
    alone says nothing, because the BatchNorm undoes it (Li et al. 2017, arXiv:1608.08710, prune by
    the filter's norm; Liu et al. 2017, arXiv:1708.06519, by BatchNorm's scale).
    """
    layer = node.module
    layout = layout_of(layer)
    assert layout is not None
    weight = getattr(layer, "weight", None)
    folded = isinstance(layer, _BatchNorm) and _feeds(node.inputs, (_ConvNd, nn.Linear))
    if weight is None or folded or isinstance(layer, nn.PReLU):
        return None
    axis = layout.axes["weight"].index(side)
    rows = weight.detach().float().transpose(0, axis).reshape(weight.shape[axis], -1)
    norms: Tensor = rows.square().sum(1)
    if (
        isinstance(layer, (_ConvNd, nn.Linear))
        and side == "out"
        and _feeds(node.outputs, _BatchNorm)
    ):
        norm = node.outputs[0].module
        if norm.running_var is not None:
            norms = norms / (norm.running_var + norm.eps)
        if norm.weight is not None:
            norms = norms * norm.weight.detach().square()
    return norms


def _feeds(neighbours: list[Any], kind: type | tuple[type, ...]) -> bool:
    """Whether there is one neighbour alone, of that kind."""
    return len(neighbours) == 1 and isinstance(neighbours[0].module, kind)


def _bind(group: Group, blocks: list[tuple[Tensor, Tensor, int]]) -> bool:
    """Give channels that share a group of a grouped convolution one unit; False: not possible."""
    grouped = [(indices // width, at, width) for indices, at, width in blocks if width > 1]
    if any(set(Counter(block.tolist()).values()) != {width} for block, _, width in grouped):
        return False
    previous = torch.zeros(0)
    while not torch.equal(previous, group.unit):
        previous = group.unit.clone()
        for block, at, _ in grouped:
            first = torch.full((int(block.max()) + 1,), group.channels)
            first.scatter_reduce_(0, block, group.unit[at], "amin")
            group.unit[at] = first[block]
    return len(set(Counter(group.unit.tolist()).values())) == 1


def _tied(module: nn.Module) -> dict[int, str]:
    """Layers whose tensors other layers use too."""
    owners: dict[int, set[int]] = {}
    names: dict[int, str] = {}
    for path, layer in module.named_modules():
        for tensor in layer.parameters(recurse=False):
            owners.setdefault(id(tensor), set()).add(id(layer))
            names[id(layer)] = path
    return {
        layer: f"{names[layer]} shares its weights with another layer"
        for layers in owners.values() if len(layers) > 1 for layer in layers
    }  # fmt: skip
