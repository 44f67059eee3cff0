"""AdaRound: better integers than the nearest, next to these, and the same ones in the export."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.network import Network
from edgekd.quantization import rounding
from edgekd.quantization.calibration import calibrate
from edgekd.quantization.capture import capture
from edgekd.quantization.layers import stored_tensors
from edgekd.quantization.placement import place, quantizers
from edgekd.quantization.rounding import round_weights
from edgekd.target import QuantScheme

WEIGHTS = {"_0_weight": "0.weight", "_2_weight": "2.weight", "_6_weight": "6.weight"}


def batch(seed: int) -> Tensor:
    """Neighbouring pixels are alike, as in images: then the weights' errors work together."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(64, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(small, size=(8, 8), mode="bilinear")


class Rounded:
    """A small network in 4-bit weights, before and after."""

    def __init__(self, scheme: QuantScheme, granularity: str) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        ).eval()  # fmt: skip
        self.net = Network(self.module, torch.zeros(1, 3, 8, 8))
        self.scheme = scheme.model_copy(update={"weight_granularity": granularity})
        self.nearest = place(capture(self.module, (batch(0)[:2],)), self.scheme)
        for name in WEIGHTS:
            quantizers(self.nearest)[name].low, quantizers(self.nearest)[name].high = -7, 7
        calibrate(self.nearest, [(batch(0),)], "mse")
        self.graph = self.round(seed=0)

    def round(self, **options: Any) -> GraphModule:
        graph = copy.deepcopy(self.nearest)
        given = {"iterations": 300} | options
        round_weights(
            graph, stored_tensors(graph), list(zip(batch(0).split(30), strict=True)), **given
        )
        return graph

    def error(self, graph: GraphModule) -> float:
        """Of the outputs, on samples that nothing was fitted to."""
        with torch.no_grad():
            return float((graph(batch(9)) - self.module(batch(9))).square().mean())


@pytest.fixture(scope="module", params=["channel", "tensor"])
def rounded(request: pytest.FixtureRequest, scheme: QuantScheme) -> Rounded:
    return Rounded(scheme, request.param)


def integers(graph: GraphModule, name: str) -> NDArray[np.float64]:
    """Plain rounding in NumPy."""
    q = quantizers(graph)[name]
    weight = graph.get_parameter(WEIGHTS[name]).detach().numpy()
    scale = q.scale.detach().numpy().reshape(-1, *[1] * (weight.ndim - 1))
    found: NDArray[np.float64] = np.clip(np.rint(weight.astype(np.float64) / scale), q.low, q.high)
    return found


def test_outputs_are_nearer_than_by_rounding_to_nearest(rounded: Rounded):
    assert rounded.error(rounded.graph) < rounded.error(rounded.nearest) / 2
    moved = [
        (integers(rounded.graph, name) != integers(rounded.nearest, name)).ravel()
        for name in WEIGHTS
    ]
    assert np.concatenate(moved).mean() > 0.02


@pytest.mark.parametrize("name", WEIGHTS)
def test_integers_are_the_nearest_or_the_next(rounded: Rounded, name: str):
    moved = integers(rounded.graph, name) - integers(rounded.nearest, name)
    assert set(np.unique(moved)) <= {-1.0, 0.0, 1.0}
    assert np.mean(moved != 0) < 0.5
    weight = rounded.graph.get_parameter(WEIGHTS[name]).detach()
    q = quantizers(rounded.graph)[name]
    assert torch.equal(weight, q(weight).detach())  # rounding again changes no bit
    assert np.abs(integers(rounded.graph, name)).max() == 7


def test_the_program_has_the_chosen_integers(rounded: Rounded):
    state = rounded.net.quantized(rounded.graph, rounded.scheme).program().state_dict
    exported = sorted((t.numpy() for t in state.values() if t.dtype is torch.int8), key=np.size)
    chosen = sorted((integers(rounded.graph, name) for name in WEIGHTS), key=np.size)
    for theirs, ours in zip(exported, chosen, strict=True):
        np.testing.assert_array_equal(theirs, ours)


def test_only_weights_change_and_the_seed_decides(rounded: Rounded):
    again, other = rounded.round(seed=0), rounded.round(seed=1)
    ours = rounded.graph.state_dict()
    assert all(torch.equal(ours[name], t) for name, t in again.state_dict().items())
    assert any(not torch.equal(ours[name], t) for name, t in other.state_dict().items())
    before = rounded.nearest.state_dict()
    changed = {name for name, t in before.items() if not torch.equal(ours[name], t)}
    assert changed == set(WEIGHTS.values())
    assert all(p.grad is None for p in rounded.graph.parameters())


def test_an_optimization_that_fails_does_no_harm(rounded: Rounded, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rounding, "LR", 1e3)
    scattered = rounded.round(iterations=3, seed=0)
    for name in WEIGHTS:
        np.testing.assert_array_equal(integers(scattered, name), integers(rounded.nearest, name))
