"""Each operation in its one form computes what it did before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.quantization.canonical import REWRITES
from edgekd.quantization.capture import capture

aten = torch.ops.aten


class Made(nn.Module):
    """A module from a function, with a linear layer of 4 to 6."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def masked(_: Any, x: Tensor) -> Tensor:
    mask = torch.linspace(-1, 1, 9).view(3, 3)
    return F.scaled_dot_product_attention(x, x.sin(), x.cos(), mask, scale=0.3)


def shuffled(_: Any, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    apart = x.view(n, 3, channels // 3, height, width)
    return apart.transpose(1, 2).contiguous().view(n, -1, height, width)


def shuffled_rows(_: Any, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    apart = x.view(n, channels, 2, height // 2, width)
    return apart.transpose(2, 3).reshape(n, channels, height, width)


def shuffled_and_read(_: Any, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    turned = x.view(n, 3, channels // 3, height, width).transpose(1, 2)
    return turned.reshape(n, channels, height, width) * turned.sum()


def without_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = m.linear(x.float())
    return y.relu()


# function, shape of a sample, operators that are gone, operators that are there
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], set[Any], set[Any]]] = {
    "linear over tokens": (
        lambda m, x: m.linear(x), (3, 4), set(), {aten.linear.default, aten.reshape.default}
    ),
    "linear over a map": (
        lambda m, x: m.linear(x), (3, 5, 4), set(), {aten.linear.default, aten.reshape.default}
    ),
    "mean over H and W": (
        lambda _, x: x.mean((2, 3)), (3, 5, 4), {aten.mean.dim}, {aten.adaptive_avg_pool2d.default}
    ),
    "mean from the end": (
        lambda _, x: x.mean([-1, -2], keepdim=True), (3, 5, 4), {aten.mean.dim},
        {aten.adaptive_avg_pool2d.default},
    ),
    "mean over W only": (lambda _, x: x.mean(3), (3, 5, 4), set(), {aten.mean.dim}),
    "attention": (
        lambda _, x: F.scaled_dot_product_attention(x, x.sin(), x.cos()), (2, 3, 4),
        {aten.scaled_dot_product_attention.default}, {aten.matmul.default, aten.softmax.int},
    ),
    "attention with a mask": (
        masked, (2, 3, 4), {aten.scaled_dot_product_attention.default}, {aten.matmul.default}
    ),
    "causal attention stays": (
        lambda _, x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (2, 3, 4), set(),
        {aten.scaled_dot_product_attention.default},
    ),
    "a view by the batch": (
        lambda _, x: x.view(x.shape[0], 12), (3, 4), {aten.sym_size.int, aten.view.default},
        {aten.reshape.default},
    ),
    "a channel shuffle": (
        shuffled, (6, 4, 5), {aten.reshape.default, aten.transpose.int},
        {aten.channel_shuffle.default},
    ),
    "rows are no channels": (
        shuffled_rows, (6, 4, 5), {aten.channel_shuffle.default}, {aten.transpose.int}
    ),
    "a channel shuffle that is read half way": (
        shuffled_and_read, (6, 4, 5), {aten.channel_shuffle.default}, {aten.transpose.int}
    ),
    "a slice of everything": (lambda _, x: 2 * x[:, :], (7, 4), {aten.slice.Tensor}, set()),
    "a slice of a part": (lambda _, x: 2 * x[:, 2:-1], (7, 4), set(), {aten.slice.Tensor}),
    "autocast turned off": (
        without_autocast, (4,), {torch.ops.higher_order.wrap_with_autocast}, {aten.linear.default}
    ),
    "a type that was asserted": (
        lambda _, x: x * ~torch.zeros(4).to(torch.bool), (3, 4),
        {aten._assert_tensor_metadata.default}, set(),
    ),
    "a pad of nothing": (lambda _, x: 2 * F.pad(x, (0, 0)), (7, 4), {aten.pad.default}, set()),
    "a pad": (lambda _, x: 2 * F.pad(x, (0, 1)), (7, 4), set(), {aten.pad.default}),
    "chunks of unequal size": (
        lambda _, x: torch.cat([2 * c for c in x.chunk(3, 1)], 1), (7, 4), {aten.chunk.default},
        {aten.slice.Tensor},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_stay(name: str):
    function, shape, gone, there = CASES[name]
    module = Made(function).eval()
    graph = capture(module, (torch.zeros(2, *shape),))
    targets = {node.target for node in graph.graph.nodes}
    assert not gone & targets
    assert there <= targets
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(graph(x), module(x))


def test_what_is_computed_twice_is_computed_once():
    graph = capture(Made(lambda _, x: x.sin() + x.sin().cos()), (torch.zeros(2, 3),))
    assert [node.name for node in graph.graph.nodes] == ["x", "sin", "cos", "add", "output"]


def test_every_rewrite_is_in_a_case():
    met = set().union(*(gone | there for _, _, gone, there in CASES.values()))
    assert met >= REWRITES.keys()
