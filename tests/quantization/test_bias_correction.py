"""The average error of each output channel, before and after its bias is corrected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.network import Network
from edgekd.stages.quantize import quantize
from edgekd.target import Target

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(3, 8, 3), (3, 12, 12)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), (6, 12, 12)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (8, 12, 12)),
    "same padding": (nn.Conv2d(3, 8, 1, padding="same"), (3, 12, 12)),
    "linear": (nn.Linear(16, 8), (16,)),
    "linear over tokens": (nn.Linear(16, 8), (5, 16)),
}


@pytest.fixture
def coarse(host: Target) -> Target:
    """One weight scale for all channels."""
    assert host.scheme is not None
    scheme = host.scheme.model_copy(update={"weight_granularity": "tensor"})
    return host.model_copy(update={"scheme": scheme})


@pytest.mark.parametrize("name", LAYERS)
def test_the_average_error_goes(name: str, coarse: Target):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight[0] *= 30  # its scale is too coarse for the others
    x = torch.rand(64, *shape, generator=torch.Generator().manual_seed(1))
    net = Network(layer, x[:1])
    common: dict[str, Any] = {"target": coarse, "data": [x], "calibration": 64}

    def average_error(ours: Network) -> np.ndarray:
        with torch.no_grad():
            y: Tensor = ours(x) - net(x)
        channels = 1 if y.dim() == 4 else -1
        return y.movedim(channels, -1).flatten(0, -2).mean(0).abs().numpy()

    before = average_error(quantize(net, **common))
    after = average_error(quantize(net, **common, correct_bias=True))
    assert before.max() > 0.02
    assert after.max() < before.max() / 5
