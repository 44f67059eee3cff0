"""The converted program computes what was trained, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from edgekd.network import Network
from edgekd.quantization.convert import convert
from edgekd.quantization.placement import quantizers


@pytest.fixture(params=["quantized", "quantized_mobile"])
def net(request: pytest.FixtureRequest) -> Network:
    made: Network = request.getfixturevalue(request.param)
    return made


def test_the_scales_were_trained(net: Network, batches: list[tuple[Tensor, Tensor]]):
    # else the next test would hold for what calibration set, too
    assert isinstance(net.module, GraphModule)
    x, y = batches[0]
    torch.nn.functional.cross_entropy(net(x), y).backward()
    gradients = [q.scale.grad for q in quantizers(net.module).values()]
    net.module.zero_grad()
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert sum(bool(g.abs().sum() > 0) for g in gradients if g is not None) > len(gradients) / 2


@pytest.mark.parametrize("batch", [1, 64])
def test_the_program_gives_the_fake_quantized_outputs(
    net: Network, batch: int, batches: list[tuple[Tensor, Tensor]]
):
    x = batches[-1][0][:batch]
    with torch.no_grad():
        ours, program = net(x), net.program().module()(x)
    assert torch.equal(ours, program)
    assert ours.std() > 0


def test_conversion_leaves_the_trained_graph_alone(net: Network):
    assert isinstance(net.module, GraphModule)
    before = {name: t.clone() for name, t in net.state().items()}
    placed = list(quantizers(net.module))
    convert(net.module, unsigned=True)
    assert list(quantizers(net.module)) == placed
    after = net.state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_become_integers_of_the_schemes_bits(net: Network):
    weights = [t for t in net.program().state_dict.values() if t.dtype is torch.int8]
    assert len(weights) == len([t for t in net.state() if t.endswith(".weight")])
    assert max(int(w.abs().max()) for w in weights) == 63  # 7 bits in int8
