"""The captured graph against the module it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.errors import ModelError
from edgekd.models.resnet import resnet
from edgekd.quantization.capture import capture, export_graph, fold_batchnorm, move


class Made(nn.Module):
    """A module from a function and its layers."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def lived(module: nn.Module) -> nn.Module:
    """`module` in eval mode, its BatchNorms as after training."""
    generator = torch.Generator().manual_seed(0)
    for bn in module.modules():
        if isinstance(bn, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            size = bn.num_features
            assert bn.running_mean is not None and bn.running_var is not None
            bn.running_mean.copy_(torch.randn(size, generator=generator))
            bn.running_var.copy_(torch.rand(size, generator=generator) * 3 + 0.05)
            if bn.affine:
                with torch.no_grad():
                    bn.weight.copy_(torch.randn(size, generator=generator))
                    bn.bias.copy_(torch.randn(size, generator=generator))
    return module.eval()


def batchnorms(graph: GraphModule) -> int:
    return sum("batch_norm" in str(node.target) for node in graph.graph.nodes)


FOLDABLE = {
    "conv": ((3, 9, 9), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)),
    "conv without bias": ((3, 9, 9), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)),
    "same padding": ((3, 9, 9), nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)),
    "depthwise": ((8, 9, 9), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)),
    "grouped": ((8, 9, 9), nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12)),
    "1d": ((3, 9), nn.Conv1d(3, 8, 3, bias=False), nn.BatchNorm1d(8)),
    "3d": ((3, 5, 5, 5), nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)),
    "transposed": ((6, 5, 5), nn.ConvTranspose2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)),
    "transposed, grouped": (
        (6, 5, 5), nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)
    ),
    "transposed, 1d": ((6, 5), nn.ConvTranspose1d(6, 8, 3, bias=False), nn.BatchNorm1d(8)),
    "transposed, 3d": ((6, 3, 3, 3), nn.ConvTranspose3d(6, 8, 2), nn.BatchNorm3d(8)),
    "linear": ((5,), nn.Linear(5, 8), nn.BatchNorm1d(8)),
    "linear without bias": ((5,), nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8)),
    "large eps": ((3, 9, 9), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=0.1)),
    "not affine": ((3, 9, 9), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDABLE)
def test_batchnorm_is_folded_exactly(case: str):
    shape, layer, bn = FOLDABLE[case]
    module = lived(nn.Sequential(layer, bn))
    graph = capture(module, (torch.zeros(2, *shape),))
    assert batchnorms(graph) == 0
    assert {name for name, _ in graph.named_parameters()} == {"0.weight", "0.bias"}
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(graph(x), module(x), rtol=1e-5, atol=1e-5)


def test_names_survive():
    module = lived(resnet(num_classes=4, widths=[8, 16]))
    graph = capture(module, (torch.zeros(2, 3, 16, 16),))
    layers = {
        name: layer for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }  # fmt: skip
    # each BatchNorm became a bias under its convolution's name
    expected = {f"{name}.{leaf}" for name in layers for leaf in ("weight", "bias")}
    assert {name for name, _ in graph.named_parameters()} == expected
    assert not list(graph.named_buffers())
    assert torch.equal(graph.get_parameter("head.weight"), module.head.weight)
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(graph(x), module(x), rtol=1e-4, atol=1e-5)


def output_used_twice(made: Made, x: Tensor) -> Tensor:
    y = made.conv(x)
    return made.bn(y) + y


def weights_used_twice(made: Made, x: Tensor) -> Tensor:
    return made.conv(made.bn(made.conv(x)))


@pytest.mark.parametrize("function", [output_used_twice, weights_used_twice])
def test_batchnorm_stays_where_folding_would_change_something_else(
    function: Callable[[Any, Tensor], Tensor],
):
    layers = {"conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3)}
    module = lived(Made(function, **layers))
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    assert batchnorms(graph) == 1
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(graph(x), module(x))


def test_batchnorm_stays_where_two_layers_share_a_weight():
    layers = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)]
    layers[1].weight = layers[0].weight
    module = lived(nn.Sequential(layers[0], layers[1], nn.BatchNorm2d(3)))
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    assert batchnorms(graph) == 1
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(graph(x), module(x))


def test_batchnorm_without_a_layer_before_it_stays():
    module = lived(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)))
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    assert batchnorms(graph) == 1
    assert fold_batchnorm(graph) == 0
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(graph(x), module(x))


class Scaled(nn.Module):
    """What `function` makes of layers and a factor for each of 6 channels."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.conv, self.grouped = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 1, groups=3, bias=False)
        self.up, self.linear = nn.ConvTranspose2d(3, 6, 2, groups=3), nn.Linear(3, 6)
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


WITH_SCALES: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "conv": (lambda m, x: m.conv(x) * m.gamma, (6, 1, 1)),
    "grouped, no bias": (lambda m, x: m.gamma * m.grouped(x), (1, 6, 1, 1)),
    "transposed, grouped": (lambda m, x: m.up(x) * m.gamma, (6, 1, 1)),
    "linear over tokens": (lambda m, x: m.linear(x.flatten(2).mT) * m.gamma, (6,)),
    "ConvNeXt": (lambda m, x: m.gamma * first(m.linear(last(x))), (6, 1, 1)),
    "ConvNeXt of timm": (
        lambda m, x: first(m.linear(last(x))) * m.gamma.reshape(1, -1, 1, 1), (6,)
    ),
    "transposed behind": (lambda m, x: m.linear(x.flatten(2).mT).transpose(1, 2) * m.gamma, (6, 1)),
    "between reshapes": (lambda m, x: m.conv(x).flatten(2).unflatten(2, (6, 6)) * m.gamma,
                         (6, 1, 1)),
}  # fmt: skip


def muls(graph: GraphModule) -> int:
    return sum("mul" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("case", WITH_SCALES)
def test_a_factor_for_each_channel_is_folded_exactly(case: str):
    function, shape = WITH_SCALES[case]
    torch.manual_seed(0)
    module = Scaled(function, *shape).eval()
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    assert muls(graph) == 0
    assert "gamma" not in dict(graph.named_parameters())
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(graph(x), module(x), rtol=1e-5, atol=1e-6)


def read_twice(m: Scaled, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y * m.gamma + y


def factor_read_twice(m: Scaled, x: Tensor) -> Tensor:
    return m.conv(x) * m.gamma + m.gamma


def heads_mixed(m: Scaled, x: Tensor) -> Tensor:
    """The factor is of parts of channels by then."""
    return m.linear(last(x)).reshape(-1, 64, 3, 2).transpose(2, 3) * m.gamma


WITH_OTHERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "output read twice": (read_twice, (6, 1, 1)),
    "factor read twice": (factor_read_twice, (6, 1, 1)),
    "over columns": (lambda m, x: m.conv(x) * m.gamma, (6,)),  # there are 6 of them too
    "over rows of tokens": (lambda m, x: m.linear(x[:, :, :6, :1].flatten(2).mT) * m.gamma, (6, 1)),
    "behind an activation": (lambda m, x: m.conv(x).relu() * m.gamma, (6, 1, 1)),
    "of pixels too": (lambda m, x: m.conv(x) * m.gamma, (6, 6, 1)),
    "of parts of channels": (heads_mixed, (3,)),
    "weight read twice": (lambda m, x: m.conv(x) * m.gamma + m.conv(x.flip(2)), (6, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", WITH_OTHERS)
def test_a_factor_stays_where_folding_would_change_something_else(case: str):
    function, shape = WITH_OTHERS[case]
    torch.manual_seed(0)
    module = Scaled(function, *shape).eval()
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    assert muls(graph) == 1
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(graph(x), module(x))


def test_the_module_is_not_changed():
    module = lived(resnet(num_classes=4, widths=[8]))
    module.train()
    module.stem[1].eval()  # a frozen BatchNorm
    modes = {name: m.training for name, m in module.named_modules()}
    before = {name: t.clone() for name, t in module.state_dict().items()}
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    with torch.no_grad():  # nor by what is done to the graph afterwards
        for tensor in graph.parameters():
            tensor.add_(1)
    assert {name: m.training for name, m in module.named_modules()} == modes
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_graph_can_be_trained():
    module = lived(resnet(num_classes=4, widths=[8]))
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    graph(torch.randn(4, 3, 8, 8)).square().sum().backward()
    gradients = {name: p.grad for name, p in graph.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_dropout_is_gone_and_in_place_operators_leave_their_input_alone():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU6(inplace=True), nn.Dropout(0.5), nn.SiLU(inplace=True)
    )
    graph = capture(module.train(), (torch.zeros(2, 3, 8, 8),))
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert len(targets) == 3
    assert not any("_." in target for target in targets)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(graph(x), module.eval()(x))


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_the_batch_is_dynamic(batch: int):
    module = lived(resnet(num_classes=4, widths=[8]))
    graph = capture(module, (torch.zeros(2, 3, 8, 8),))
    x = torch.randn(batch, 3, 8, 8)
    torch.testing.assert_close(graph(x), module(x), rtol=1e-4, atol=1e-5)
    program = export_graph(graph, (torch.zeros(2, 3, 8, 8),))
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(a) + b, b.mean((2, 3))

    module = Two()
    examples = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8))
    graph = capture(module, examples)
    a, b = torch.randn(5, 3, 8, 8), torch.randn(5, 4, 8, 8)
    for ours, theirs in zip(graph(a, b), module(a, b), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_batch_of_one_is_refused():
    with pytest.raises(ModelError, match=r"at least 2.*\(1, 3, 8, 8\)"):
        capture(nn.Conv2d(3, 4, 1), (torch.zeros(1, 3, 8, 8),))


def test_a_branch_on_values_is_refused_with_torchs_reason():
    def branch(_: Made, x: Tensor) -> Tensor:
        return F.relu(x) if x.sum() > 0 else x

    line = r"test_capture.py:\d+, in branch: `return F.relu\(x\) if x.sum\(\) > 0 else x`"
    with pytest.raises(ModelError, match=rf"(?s)Made cannot be .*{line}.*data-dependent.*branches"):
        capture(Made(branch), (torch.zeros(2, 3),))


def of_a_number(m: Made, x: Tensor) -> Tensor:
    return m.linear(x.view(int(x.shape[0]), -1))


def one_by_one(m: Made, x: Tensor) -> Tensor:
    return torch.cat([m.linear(x[i : i + 1].flatten(1)) for i in range(len(x))])


def in_pairs(m: Made, x: Tensor) -> Tensor:
    return m.linear(x.view(2, -1))


@pytest.mark.parametrize("function", [of_a_number, one_by_one, in_pairs])
def test_a_fixed_batch_is_refused(function: Callable[[Any, Tensor], Tensor]):
    module = Made(function, linear=nn.Linear(12, 4))
    with pytest.raises(ModelError, match=r"Made fixes the batch at 2 \(by .*: use x\.size\(0\) or"):
        capture(module, (torch.zeros(2, 3, 4),))


def test_a_fixed_batch_of_the_second_input_is_refused():
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a + 1, b.view(3, -1)

    with pytest.raises(ModelError, match="Two fixes the batch at 3"):
        capture(Two(), (torch.zeros(2, 3), torch.zeros(3, 4)))


def test_a_batch_that_is_read_as_a_size_stays_dynamic():
    def sized(m: Made, x: Tensor) -> Tensor:
        return m.linear(x.reshape(x.shape[0], 12)) + torch.zeros(x.size(0), 1)

    module = Made(sized, linear=nn.Linear(12, 4))
    graph = capture(module, (torch.zeros(2, 3, 4),))
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(graph(x), module(x))


def test_what_a_graph_makes_itself_moves_along():
    def ramp(m: Made, x: Tensor) -> Tensor:
        return m.linear(x + torch.arange(4, device=x.device))

    graph = capture(Made(ramp, linear=nn.Linear(4, 4)), (torch.zeros(2, 4),))
    assert move(graph, "meta")(torch.zeros(3, 4, device="meta")).device.type == "meta"
