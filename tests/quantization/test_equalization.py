"""Equalized networks compute what they did, and lose less to one scale for a whole weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.network import Network
from edgekd.quantization.capture import capture
from edgekd.quantization.equalization import equalize
from edgekd.stages.quantize import quantize
from edgekd.target import Target


def uneven(*, clip: bool = False) -> nn.Sequential:
    """Dense, depthwise, dense, linear; channels of very different ranges in the first two."""
    torch.manual_seed(0)
    act = nn.ReLU6 if clip else nn.ReLU
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), act(), nn.Conv2d(8, 8, 3, padding=1, groups=8), act(),
        nn.MaxPool2d(2), nn.Conv2d(8, 6, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():
        scale = torch.logspace(-2, 2, 8)
        for layer, factor in ((module[0], scale), (module[2], scale.flip(0))):
            layer.weight *= factor.view(-1, 1, 1, 1)
            layer.bias *= factor
    return module.eval()


def images() -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_network_computes_what_it_did():
    module, x = uneven(), images()
    graph = capture(module, (x,))
    assert equalize(graph) == 2
    with torch.no_grad():
        torch.testing.assert_close(graph(x), module(x), rtol=1e-4, atol=1e-4)


def test_ranges_of_a_pair_become_equal():
    graph = capture(uneven(), (images(),))
    equalize(graph)
    first, second, third = (graph.get_parameter(f"{i}.weight") for i in (0, 2, 5))
    ranges = first.abs().amax((1, 2, 3)), second.abs().amax((1, 2, 3)), third.abs().amax((0, 2, 3))
    torch.testing.assert_close(ranges[0], ranges[1], rtol=0.02, atol=0.0)
    torch.testing.assert_close(ranges[1], ranges[2], rtol=0.02, atol=0.0)


def test_a_clip_and_a_second_reader_keep_layers_apart():
    assert equalize(capture(uneven(clip=True), (images(),))) == 0

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y

    assert equalize(capture(Twice(), (images(),))) == 0


def test_a_channel_of_zeros_stays():
    module = uneven()
    with torch.no_grad():
        module[0].weight[2] = 0
    graph = capture(module, (images(),))
    equalize(graph)
    with torch.no_grad():
        torch.testing.assert_close(graph(images()), module(images()), rtol=1e-4, atol=1e-4)


def test_one_scale_for_a_weight_costs_less(host: Target):
    assert host.scheme is not None
    scheme = host.scheme.model_copy(update={"weight_granularity": "tensor"})
    target = host.model_copy(update={"scheme": scheme})
    module, x = uneven(), images()
    net = Network(module, x[:1])

    def error(equalized: bool) -> float:
        q = quantize(net, target=target, data=[x], equalized=equalized, accelerator="cpu")
        with torch.no_grad():
            return float((q(x) - module(x)).square().mean())

    assert error(True) < error(False) / 10
