"""What is changed in OpenVINO's graphs leaves their numbers, and spares passes over tensors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.latency import runtime_graph
from edgekd.latency.runtime_graph import runtime_nodes
from edgekd.network import Network
from edgekd.runtimes.base import get_runtime
from edgekd.runtimes.local_parity import local_parity
from edgekd.runtimes.openvino_graph import turn_maps
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.target import Target

openvino = pytest.importorskip("openvino")


class Block(nn.Module):
    """ConvNeXt's, arXiv:2201.03545 figure 4, whose norm may have other readers."""

    def __init__(self, width: int, *, read: bool = False) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.read = nn.LayerNorm(width), read
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        z = self.narrow(self.act(self.wide(y))).permute(0, 3, 1, 2)
        return x + z * y.mean((1, 2))[:, :, None, None] if self.read else x + z


def net_of(*blocks: nn.Module) -> Network:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), *blocks, nn.Conv2d(16, 8, 1)]
    for parameter in (modules := nn.Sequential(*layers)).parameters():
        nn.init.normal_(parameter, std=0.3)
    return Network(modules, torch.zeros(1, 3, 24, 24))


@pytest.mark.parametrize("read", [False, True])
def test_linear_layers_between_permutations_are_convolutions(
    read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runtime_graph, "RUNS", 2)
    net, x = net_of(Block(16, read=read), Block(16)), torch.randn(4, 3, 24, 24)
    path = export(net, target="intel-cpu", out=tmp_path).path
    kinds = Counter(node.operator for node in runtime_nodes("openvino", path))
    assert kinds["Convolution"] == (6 if read else 8)
    assert (kinds["FullyConnected"], kinds["MatMul"]) == (2 * read, 0)
    with torch.no_grad():
        ours = net(x).numpy()
    theirs = get_runtime("openvino").load(path, threads=1)([x.numpy()])[0]
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())


@pytest.mark.parametrize("name", ["intel-cpu", "intel-cpu-vnni", "intel-igpu"])
def test_what_is_trained_is_computed_with_channels_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runtime_graph, "RUNS", 2)
    target, x = Target.load(name), torch.randn(16, 3, 24, 24)
    net = quantize(net_of(Block(16), Block(16)), target=target, data=[x], accelerator="cpu")
    path = export(net, target=target, out=tmp_path).path
    session = get_runtime("openvino").load(path, threads=1)
    with torch.no_grad():
        ours = net(x).numpy()
    step = np.abs(ours).max() / 127
    assert np.abs(session([x.numpy()])[0] - ours).mean() / step < 0.02
    assert session.integer_share() == (8, 8)
    ran = local_parity(net, [x], written=None, shipped=session).as_shipped
    assert ran is not None
    assert (ran.first, ran.tensors, ran.max_steps) == (None, ran.of, 1)
    assert ran.exact >= 0.999
    kernels = runtime_nodes("openvino", path)
    turned = target.device == "CPU"
    assert ("FullyConnected" in {node.operator for node in kernels}) != turned
    sums = [k.operator for k in kernels if "node_add" in k.attributes["originalLayersNames"]]
    assert (sums == ["Convolution"] * 2) == turned


def test_a_quantizer_in_front_of_an_add_stays_in_front_of_it(tmp_path: Path):
    """The kernel of a convolution would clip there, and not round."""
    target, x = Target.load("intel-cpu"), torch.randn(16, 3, 24, 24)
    assert target.scheme is not None
    scheme = target.scheme.model_copy(update={"linear_as_conv": False})
    apart = target.model_copy(update={"scheme": scheme})
    net = quantize(net_of(Block(16)), target=apart, data=[x], accelerator="cpu")
    model = openvino.Core().read_model(export(net, target=apart, out=tmp_path).path)
    before = Counter(op.get_type_name() for op in model.get_ops())
    turn_maps(model)
    assert Counter(op.get_type_name() for op in model.get_ops()) == before
    assert before["MatMul"] == 2
