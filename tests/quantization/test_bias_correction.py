"""Corrected biases leave no mean error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.network import Network
from edgekd.quantization.bias_correction import correct_biases
from edgekd.quantization.calibration import calibrate
from edgekd.quantization.capture import capture
from edgekd.quantization.layers import stored_tensors
from edgekd.quantization.placement import place, quantizers
from edgekd.stages.quantize import quantize
from edgekd.target import QuantScheme, Target


def coarse(module: nn.Module, scheme: QuantScheme, x: Tensor) -> GraphModule:
    """Weights in 3 bits: the mean error is large."""
    graph = place(capture(module, (x[:2],)), scheme)
    for quantizer in quantizers(graph).values():
        if quantizer.scale.dim():
            quantizer.low, quantizer.high = -3, 3
    calibrate(graph, [(x,)], "minmax")
    return graph


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16, bias=False),
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.rand(96, 3, 10, 10, generator=torch.Generator().manual_seed(1)) + 0.5


def mean_error(graph: GraphModule, module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (graph(x) - module(x)).mean(0).abs().max()


def test_outputs_have_no_mean_error_left(scheme: QuantScheme, x: Tensor):
    module = network()
    graph = coarse(module, scheme, x)
    before = mean_error(graph, module, x)
    floats = stored_tensors(graph)
    correct_biases(graph, floats, list(zip(x.split(40), strict=True)))
    assert before > 0.01
    assert mean_error(graph, module, x) < before / 1000
    fresh = torch.rand(96, 3, 10, 10, generator=torch.Generator().manual_seed(2)) + 0.5
    assert mean_error(graph, module, fresh) < before / 20
    changed = [name for name, t in floats.items() if not torch.equal(t, graph.get_parameter(name))]
    assert changed == ["0.bias", "3.bias", "7.bias"]


def test_a_linear_layer_over_tokens_is_corrected_by_feature(scheme: QuantScheme):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    torch.manual_seed(0)
    x = torch.rand(64, 5, 8) + 0.5
    module = Tokens()
    graph = coarse(module, scheme, x)
    before = (graph(x) - module(x)).mean((0, 1)).abs().max()
    correct_biases(graph, stored_tensors(graph), [(x,)])
    assert (graph(x) - module(x)).mean((0, 1)).abs().max() < before / 1000


def test_corrected_biases_fit_into_int32(scheme: QuantScheme, x: Tensor):
    module = network()
    with torch.no_grad():  # a channel whose integers are nearly nothing
        module[0].weight[1] *= 1e-9
    graph = coarse(module, scheme, x)
    floats = stored_tensors(graph)
    floats["0.bias"][1] += 10  # the correction is large
    correct_biases(graph, floats, [(x,)])
    bias = graph.get_parameter("0.bias").detach().double()
    assert bias[1] > 9
    placed = quantizers(graph)
    step = (placed["input_1"].scale * placed["_0_weight"].scale.double()).detach()
    assert float((bias / step).abs().max()) < 2**31


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(3, 8, 3), (3, 12, 12)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (6, 12, 12)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (8, 12, 12)),
    "same padding": (lambda: nn.Conv2d(3, 8, 1, padding="same"), (3, 12, 12)),
    "linear": (lambda: nn.Linear(16, 8), (16,)),
    "linear over tokens": (lambda: nn.Linear(16, 8), (5, 16)),
}


@pytest.fixture
def per_tensor(host: Target) -> Target:
    """One weight scale for all channels."""
    assert host.scheme is not None
    scheme = host.scheme.model_copy(update={"weight_granularity": "tensor"})
    return host.model_copy(update={"scheme": scheme})


@pytest.mark.parametrize("name", LAYERS)
def test_the_average_error_goes(name: str, per_tensor: Target):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        layer.weight[0] *= 30  # its scale is too coarse for the others
    x = torch.rand(64, *shape, generator=torch.Generator().manual_seed(1))
    net = Network(layer, x[:1])
    # the whole range: what an output quantizer clips, no bias gives back
    common: dict[str, Any] = {
        "target": per_tensor, "data": [x], "calibration": 64, "observer": "minmax"
    }  # fmt: skip

    def average_error(ours: Network) -> np.ndarray:
        with torch.no_grad():
            y: Tensor = ours(x) - net(x)
        channels = 1 if y.dim() == 4 else -1
        return y.movedim(channels, -1).flatten(0, -2).mean(0).abs().numpy()

    before = average_error(quantize(net, **common, correct_bias=False))
    after = average_error(quantize(net, **common))
    assert before.max() > 0.02
    assert after.max() < before.max() / 20  # what is left is the output quantizer's
