"""What rounding its weights adds to a layer's output on average is taken out of its bias.

Nagel et al. 2019 §4.2, arXiv:1906.04721: with ε = Ŵ − W, E[ŷ] = E[y] + ε · E[x] (their eq. 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from edgekd.quantization.capture import WEIGHTED, arguments, groups_of, tensor_of
from edgekd.reporting.progress import Progress


def correct_biases(graph: GraphModule, batches: Sequence[Tensor]) -> None:
    """Subtract ε · E[x] from the bias of every quantized layer that has one.

    E[x] is that of the quantized input over `batches`, inputs of (N, ...); at borders it counts a
    padded zero as the mean. Transposed convolutions are left alone.
    """
    means = _InputMeans(graph)
    with torch.no_grad(), Progress("correcting biases", len(batches)) as progress:
        for x in batches:
            means.run(x)
            progress.advance()
        for node, (total, count) in means.found.items():
            weight, bias = arguments(node)[1:3]
            stored = tensor_of(graph, arguments(weight)[0])
            target = tensor_of(graph, bias)
            assert stored is not None and target is not None
            error = graph.get_submodule(str(weight.target))(stored) - stored
            target -= _shift(error, total / count, groups_of(node))


def _shift(error: Tensor, mean: Tensor, groups: int) -> Tensor:
    """(O,) from ε of (O, C / groups, ...) and E[x] of (C,)."""
    by_channel = error.flatten(2).sum(2) if error.dim() > 2 else error
    by_group = by_channel.view(groups, -1, by_channel.shape[1])
    return (by_group * mean.view(groups, 1, -1)).sum(2).flatten()


class _InputMeans(Interpreter):
    """Sum over positions, and their number, of each input channel of the layers to correct."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[Node, tuple[Tensor, int]] = {}

    def run_node(self, n: Node) -> Any:
        """As usual; the input of a layer to correct is summed."""
        if _corrigible(n):
            x = self.env[arguments(n)[0]]
            rows = x.movedim(1, -1).flatten(0, -2) if x.dim() > 2 else x
            total, count = self.found.get(n, (0.0, 0))
            self.found[n] = total + rows.sum(0), count + len(rows)
        return super().run_node(n)


def _corrigible(node: Node) -> bool:
    """A layer with quantized weights and a bias of its own."""
    if WEIGHTED.get(node.target) != 0 or len(node.args) < 3:  # type: ignore[call-overload]
        return False
    _, weight, bias = arguments(node)[:3]
    return weight.op == "call_module" and bias is not None and bias.op == "get_attr"
