"""The walk gives each layer what it reads in integers and what it should give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.quantization import layers as layers_module
from edgekd.quantization.calibration import calibrate
from edgekd.quantization.capture import capture
from edgekd.quantization.layers import layers, stored_tensors, walk
from edgekd.quantization.placement import place
from edgekd.target import QuantScheme


def branches() -> nn.Module:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.last = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            x = (x + self.left(x)).relu()
            return self.last(x.mean((2, 3)))

    torch.manual_seed(0)
    return Branches().eval()


def placed(module: nn.Module, scheme: QuantScheme, x: Tensor) -> GraphModule:
    graph = place(capture(module, (x[:2],)), scheme)
    calibrate(graph, [(x,)], "minmax")
    return graph


@pytest.fixture
def x() -> Tensor:
    return torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_float_outputs_are_the_eager_layers(scheme: QuantScheme, x: Tensor):
    module = branches()
    graph = placed(module, scheme, x)
    seen: list[Tensor] = []
    for name in ("first", "left", "last"):
        module.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        module(x)
    floats = stored_tensors(graph)
    found = []
    for layer, _, outputs in walk(graph, floats, list(zip(x.split(8), strict=True))):
        found.append(torch.cat(outputs))
        layer.weight.data.zero_()  # a changed layer changes nothing in the float network
    assert len(found) == 3
    for ours, eager in zip(found, seen, strict=True):
        torch.testing.assert_close(ours, eager)


def test_inputs_are_those_of_the_graph_with_the_changes_made_so_far(scheme: QuantScheme, x: Tensor):
    graph = placed(branches(), scheme, x)
    floats = stored_tensors(graph)
    for layer, inputs, _ in walk(graph, floats, [(x,)]):
        assert layer.quantizer is not None
        read = inputs[0]
        with torch.no_grad():
            layer.weight.mul_(0.5)
            last = layer(read, layer.quantizer(layer.weight))
    with torch.no_grad():  # the walk's last layer reads and gives what the changed graph does
        torch.testing.assert_close(last, graph(x), rtol=0, atol=0)


def test_samples_are_those_that_fit(
    scheme: QuantScheme, x: Tensor, monkeypatch: pytest.MonkeyPatch
):
    graph = placed(branches(), scheme, x)
    # alive at most, in float and in integers: the three (8, 6, 6) around the addition
    monkeypatch.setattr(layers_module, "WALK_BYTES", 23 * 3 * 8 * 6 * 6 * 4)
    for _, inputs, outputs in walk(
        graph, stored_tensors(graph), list(zip(x.split(8), strict=True))
    ):
        assert [len(part) for part in inputs] == [len(part) for part in outputs] == [8, 3]


def test_a_weight_with_two_readers_is_shared(scheme: QuantScheme):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    twice = nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(4, 4, 1))
    tied = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    tied[2].weight = tied[0].weight
    for module, expected in ((twice, [True, True, False]), (tied, [True, True, False])):
        graph = capture(module, (torch.zeros(2, 4, 8, 8),))
        assert [layer.shared for layer in layers(graph)] == expected
        assert [layer.shared for layer in layers(place(graph, scheme))] == expected
