"""Equalization keeps the function and evens out the channels' ranges."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.network import Network
from edgekd.quantization.capture import capture
from edgekd.quantization.equalization import equalize
from edgekd.stages.quantize import quantize
from edgekd.target import Target


def uneven(module: nn.Module) -> nn.Module:
    """Channels from 0.01 to 100 times as large, as BatchNorm's γ makes them, but for the last."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in [m for m in module if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)][:-1]:
            axis = int(isinstance(layer, nn.ConvTranspose2d))
            spread = 10 ** (torch.rand(layer.weight.shape[axis], generator=generator) * 4 - 2)
            layer.weight.mul_(
                spread.view([-1 if d == axis else 1 for d in range(layer.weight.dim())])
            )
            if layer.bias is not None:
                layer.bias.mul_(spread.repeat(len(layer.bias) // len(spread)))
    return module.eval()


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.LeakyReLU(0.2), nn.Conv2d(8, 12, 3, groups=2),
        nn.Conv2d(12, 4, 1),
    )  # fmt: skip


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )  # fmt: skip


def headed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4),
    )  # fmt: skip


@pytest.mark.parametrize("make", [depthwise, grouped, transposed, headed])
def test_the_network_computes_the_same(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    module = uneven(make()).double()  # rounding hides nothing
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    graph = capture(module, (x,))
    before = {name: p.detach().clone() for name, p in graph.named_parameters()}
    assert equalize(graph) == 2
    torch.testing.assert_close(graph(x), module(x), rtol=1e-10, atol=0)
    weights = [name for name in before if name.endswith("weight")]
    assert all(not torch.allclose(before[w], graph.get_parameter(w)) for w in weights)


def test_neighbours_end_with_equal_ranges():
    torch.manual_seed(0)
    module = uneven(nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)))
    graph = capture(module, (torch.zeros(2, 5),))
    expected = [p.detach().numpy().copy() for p in (module[0].weight, module[2].weight)]
    equalize(graph)
    # eq. 9 to 11 of the paper: both become sqrt(r1 · r2)
    both = np.sqrt(np.abs(expected[0]).max(1) * np.abs(expected[1]).max(0))
    found: list[NDArray[np.float32]] = [
        graph.get_parameter(f"{i}.weight").detach().abs().numpy() for i in (0, 2)
    ]
    np.testing.assert_allclose(found[0].max(1), both, rtol=1e-3)
    np.testing.assert_allclose(found[1].max(0), both, rtol=1e-3)


def test_one_step_for_a_tensor_hurts_less():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    with torch.no_grad():  # an ordinary network in uneven channels
        for layer, reader in ((module[0], module[2]), (module[2], module[4])):
            spread = 10 ** (torch.rand(16) * 4 - 2)
            layer.weight.mul_(spread.view(-1, 1, 1, 1))
            layer.bias.mul_(spread)
            reader.weight.div_(spread.view(1, -1, 1, 1))
    x = torch.randn(16, 3, 8, 8)
    exact = module(x)

    def error(equalized: bool) -> float:
        graph = capture(module, (x,))
        if equalized:
            equalize(graph)
        with torch.no_grad():
            for name, weight in graph.named_parameters():
                if name.endswith("weight"):
                    step = weight.abs().max() / 127
                    weight.copy_((weight / step).round() * step)
            return float((graph(x) - exact).square().mean() / exact.var())

    assert error(True) < 1e-3
    assert error(False) > 0.1


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish(), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 8)),  # it mixes columns, not channels
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(512, 4)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1)),
    ],
    ids=["relu6", "hardswish", "columns", "flattened positions", "shuffled"],
)
def test_what_does_not_scale_is_left_alone(module: nn.Module):
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    before = copy.deepcopy(graph.state_dict())
    assert equalize(graph) == 0
    assert all(torch.equal(before[name], t) for name, t in graph.state_dict().items())


def test_shared_weights_and_read_tensors_are_left_alone():
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x + self.c(self.b(self.b(x)).relu())

    assert equalize(capture(Module(), (torch.zeros(2, 4, 8, 8),))) == 0


def test_a_channel_that_is_all_bias_does_not_grow():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        module[0].weight[1] *= 1e-6
        module[0].bias[1] = 5.0
        module[0].weight[2], module[0].bias[2] = 0.0, 0.0
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    equalize(graph)
    bias = graph.get_parameter("0.bias")
    assert torch.isfinite(bias).all()
    assert bias.abs().max() <= 5.0


def test_one_step_for_a_weight_costs_less_in_integers(host: Target):
    assert host.scheme is not None
    scheme = host.scheme.model_copy(update={"weight_granularity": "tensor"})
    target = host.model_copy(update={"scheme": scheme})
    torch.manual_seed(0)
    module, x = uneven(headed()), torch.randn(32, 3, 8, 8)
    net = Network(module, x[:1])

    def error(equalized: bool) -> float:
        q = quantize(net, target=target, data=[x], equalized=equalized, accelerator="cpu")
        with torch.no_grad():
            return float((q(x) - module(x)).square().mean())

    assert error(True) < error(False) / 3
