"""Batch normalisation behind integer weights: nothing at first, and nothing left of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.network import Network
from edgekd.quantization.batchnorm import BatchNorms
from edgekd.quantization.fake_quant import FakeQuant
from edgekd.quantization.layers import layers
from edgekd.quantization.placement import training_graph
from edgekd.stages.quantize import quantize
from edgekd.target import Target

IMAGES = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(self.norm(self.conv(x)).relu()))
        return out


# each with how many of its layers get one
MODULES = {
    "convolutions": (lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4),
    ), 3),
    "transposed": (lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(),
        # its scales are of output channels of a group, of which there are several
        nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.BatchNorm2d(6),
    ), 1),
    "linear": (lambda: nn.Sequential(
        nn.Conv2d(3, 4, 12), nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Linear(6, 2),
    ), 1),
    "shared": (Shared, 0),
}  # fmt: skip


def placed(kind: str, target: Target, float_layers: tuple[str, ...] = ()) -> GraphModule:
    assert target.scheme is not None
    ops = (*target.scheme.ops, "conv_transpose")
    target = target.model_copy(update={"scheme": target.scheme.model_copy(update={"ops": ops})})
    module = MODULES[kind][0]()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    net = Network(module.eval(), IMAGES[:1])
    graph = quantize(
        net, target=target, data=[(IMAGES,)], float_layers=float_layers, accelerator="cpu"
    ).module
    assert isinstance(graph, GraphModule)
    return graph


def integers(graph: GraphModule) -> list[Tensor]:
    """Of each layer's weight."""
    return [
        (layer.weight.double() / layer.quantizer.scale.double().view(
            [-1 if axis == layer.axis else 1 for axis in range(layer.weight.dim())]
        )).round().clamp(layer.quantizer.low, layer.quantizer.high)
        for layer in layers(graph) if layer.quantizer is not None
    ]  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_each_stands_behind_a_layer_that_had_one_and_changes_nothing(kind: str, host: Target):
    graph = placed(kind, host)
    trained = training_graph(graph)
    norms = BatchNorms(trained, [(IMAGES[:32],), (IMAGES[32:],)]).eval()
    assert len(norms.each) == MODULES[kind][1]
    with torch.no_grad():
        torch.testing.assert_close(trained(IMAGES), graph(IMAGES), rtol=1e-4, atol=1e-4)
        norms.train()  # the same images, now by their own statistics
        torch.testing.assert_close(trained(IMAGES), graph(IMAGES), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("float_layers", [(), ("3",)])
@pytest.mark.parametrize("kind", ["convolutions", "transposed", "linear"])
def test_what_was_trained_is_what_is_left_when_it_is_folded(
    kind: str, host: Target, float_layers: tuple[str, ...]
):
    graph = placed(kind, host, float_layers if kind == "convolutions" else ())
    trained = training_graph(graph)
    norms = BatchNorms(trained, [(IMAGES,)]).eval()
    with torch.no_grad():
        for norm in norms.each:
            norm.factor.mul_(torch.empty_like(norm.factor).uniform_(0.5, 2))
            norm.factor[0] *= -1  # all of this channel's integers turn
            norm.shift.add_(torch.randn_like(norm.shift))
            norm.mean.add_(torch.randn_like(norm.mean))
            norm.variance.mul_(torch.empty_like(norm.variance).uniform_(0.5, 2))
        wanted, before = trained(IMAGES), integers(graph)
        norms.fold()
        # of one in ten thousand activations that lie between two integers the other may be taken
        off = (graph(IMAGES) - wanted).abs() > 1e-4
        assert off.double().mean() < 0.01
    for q, old in zip(integers(graph), before, strict=True):
        assert torch.equal(q.abs(), old.abs())


def test_channels_are_normalized_by_their_batch_until_statistics_stay(host: Target):
    trained = training_graph(placed("convolutions", host))
    norms = BatchNorms(trained, [(IMAGES,)])
    norm = norms.each[0]
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    for by_batch in (True, False):
        norms.train(by_batch)
        before = norm.mean.clone()
        trained(3 * IMAGES)
        means = seen[-1].mean((0, 2, 3))
        assert torch.allclose(means, norm.shift, rtol=1e-3, atol=1e-4) == by_batch
        assert torch.equal(before, norm.mean) != by_batch


def test_a_channel_that_is_dead_and_a_batch_of_one_value_leave_numbers(host: Target):
    graph = placed("linear", host)
    with torch.no_grad():
        for layer in layers(graph):
            layer.weight[0] = 0
    trained = training_graph(graph)
    norms = BatchNorms(trained, [(IMAGES,)]).train()
    loss = trained(IMAGES).square().sum() + trained(IMAGES[:1]).square().sum()
    loss.backward()
    norms.fold()
    assert all(p.isfinite().all() and (p.grad is None or p.grad.isfinite().all())
               for p in (*graph.parameters(), *norms.parameters()))  # fmt: skip
    assert all((m.scale > 0).all() for m in graph.modules() if isinstance(m, FakeQuant))


def test_the_graph_that_is_exported_has_none(host: Target):
    graph = placed("convolutions", host)
    before = copy.deepcopy(graph.graph)
    BatchNorms(training_graph(graph), [(IMAGES,)]).fold()
    assert [n.name for n in graph.graph.nodes] == [n.name for n in before.nodes]
    assert not any("batchnorm" in name for name, _ in graph.named_modules())
