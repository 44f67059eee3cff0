"""What is changed in OpenVINO's graphs leaves their numbers, and spares passes over tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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


class Maps(nn.Module):
    """What `function` makes of a map, with layers over channels that are last."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function, self.stem, self.out = function, nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 1)
        self.norm, self.linear, self.factor = (
            nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, self.stem(x).permute(LAST))


LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
ON_MAPS: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], int]] = {
    "to the output": (lambda m, x: m.norm(x).permute(FIRST), 0),
    "two ends": (
        lambda m, x: (m.out(m.norm(x).permute(FIRST)), m.out(m.linear(m.norm(x)).permute(FIRST))),
        0,
    ),
    "a skip": (lambda m, x: m.out((m.linear(m.norm(x)) + m.norm(x)).permute(FIRST)), 0),
    "factors": (lambda m, x: m.out((1 - m.factor * m.linear(x).relu()).permute(FIRST)), 0),
    "rows in windows": (
        lambda m, x: m.out(m.norm(x.reshape(-1, 4, 3, 8)).reshape(-1, 12, 12, 8).permute(FIRST)), 0
    ),
    "other sides": (lambda m, x: m.out(m.linear(x).reshape(-1, 6, 24, 8).permute(FIRST)), 2),
    "a mean over pixels": (
        lambda m, x: m.out((m.linear(x) * m.linear(x).mean((1, 2), keepdim=True)).permute(FIRST)), 2
    ),
    "read with channels last": (
        lambda m, x: (m.out(m.linear(x).permute(FIRST)), m.linear(x).softmax(-1)), 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_MAPS)
def test_what_cannot_be_turned_stays(name: str, tmp_path: Path):
    torch.manual_seed(0)
    function, permutations = ON_MAPS[name]
    net, x = Network(Maps(function), torch.zeros(1, 3, 24, 24)), torch.randn(2, 3, 24, 24)
    path = export(net, target="intel-cpu", out=tmp_path).path
    with torch.no_grad():
        ours = net(x)
    theirs = get_runtime("openvino").load(path, threads=1)([x.numpy()])
    for a, b in zip(theirs, ours if isinstance(ours, tuple) else (ours,), strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-5)
    kinds = [op.get_type_name() for op in openvino.Core().read_model(path).get_ops()]
    assert kinds.count("Transpose") == permutations


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


class Attention(nn.Module):
    """Of 4 × 4 windows over a map: permutations in front of a product and behind one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(LAST))
        windows = x.reshape(-1, 3, 4, 3, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 16)
        qkv = self.qkv(windows).reshape(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attention = (qkv[0] @ qkv[1].transpose(-2, -1)).softmax(-1) @ qkv[2]
        y = self.out(attention.transpose(1, 2).reshape(-1, 16, 16))
        back = y.reshape(-1, 3, 3, 4, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 12, 12, 16)
        return (x + back).mean((1, 2))


def transpositions(path: Path) -> list[bool]:
    """Of each permutation in a file, whether a quantizer is in front of it, moves left out."""
    quantized = []
    for node in openvino.Core().read_model(path).get_ordered_ops():
        if node.get_type_name() == "Transpose":
            source = node.input_value(0).get_node()
            while source.get_type_name() in ("Reshape", "Gather"):
                source = source.input_value(0).get_node()
            quantized.append(source.get_type_name() == "FakeQuantize")
    return quantized


def test_products_are_quantized_behind_permutations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    target, x = Target.load("intel-cpu-vnni"), torch.randn(16, 3, 24, 24)
    net = quantize(Network(Attention(), x[:1]), target=target, data=[x], accelerator="cpu")
    path = export(net, target=target, out=tmp_path / "behind").path
    # the map's own, the windows, q with k and v, what attention gives, the windows back
    assert transpositions(path) == [True, True, False, False, False]
    session = get_runtime("openvino").load(path, threads=1)
    ran = local_parity(net, [x], written=None, shipped=session).as_shipped
    assert ran is not None and ran.first is None and ran.exact >= 0.999
    assert session.integer_share() == (5, 5)
    monkeypatch.setattr("edgekd.runtimes.openvino.quantize_behind_turns", lambda model: None)
    before = export(net, target=target, out=tmp_path / "before").path
    assert transpositions(before) == [True] * 5
    theirs = get_runtime("openvino").load(before, threads=1)([x.numpy()])[0]
    np.testing.assert_allclose(session([x.numpy()])[0], theirs, atol=1e-5 * np.abs(theirs).max())
