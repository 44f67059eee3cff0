"""Taps: the same inner tensors by the same paths, eager and captured; pairs by resolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.knowledge.taps import pair_hints, tapped
from edgekd.models.resnet import resnet
from edgekd.quantization.calibration import calibrate
from edgekd.quantization.capture import capture
from edgekd.quantization.placement import digest, place
from edgekd.target import Target

X = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
PATHS = ["stem", "stages.0.0.bn1", "stages.0.0", "stages.1", "head"]


def net(widths=(8, 16)) -> nn.Module:
    torch.manual_seed(0)
    made = resnet(num_classes=5, in_channels=1, widths=widths)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that folding must not lose
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return made.eval()


def eager(module: nn.Module, path: str) -> Tensor:
    kept = []
    handle = module.get_submodule(path).register_forward_hook(lambda *a: kept.append(a[2]))
    with torch.no_grad():
        module(X)
    handle.remove()
    return kept[-1]


def test_an_eager_module_gives_what_its_parts_return():
    module = net()
    with tapped(module, PATHS) as features, torch.no_grad():
        module(X)
    for path in PATHS:
        assert torch.equal(features[path], eager(module, path))
    assert not any(part._forward_hooks for part in module.modules())


def test_a_captured_graph_gives_the_same_by_the_same_paths():
    module = net()
    graph = capture(module, [torch.zeros(2, 1, 16, 16)])
    with tapped(graph, PATHS) as features, torch.no_grad():
        graph(X)
    for path in PATHS:
        assert torch.allclose(features[path], eager(module, path), atol=1e-4), path


def test_a_quantized_graph_is_as_before_and_its_features_carry_gradients():
    scheme = Target.load("host-onnxruntime").scheme
    assert scheme is not None
    graph = place(capture(net(), [torch.zeros(2, 1, 16, 16)]), scheme)
    calibrate(graph, [(X,)], "minmax")
    before, code, names = digest(graph), graph.code, list(graph.state_dict())
    with tapped(graph, ["stages.0"]) as features:
        graph(X)
        features["stages.0"].sum().backward()
        assert features["stages.0"].shape == (3, 8, 16, 16)
    weight = graph.get_parameter("stages.0.0.conv1.weight")
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert (digest(graph), graph.code, list(graph.state_dict())) == (before, code, names)


@pytest.mark.parametrize("captured", [False, True])
def test_an_unknown_path_names_the_nearest(captured):
    module = capture(net(), [torch.zeros(2, 1, 16, 16)]) if captured else net()
    with (
        pytest.raises(ModelError, match=r"'stages\.7'.*did you mean 'stages\."),
        tapped(module, ["stem", "stages.7"]),
    ):
        pass
    with torch.no_grad():
        module(X)  # still works: what was put in is taken out again


def test_a_module_that_returns_a_tuple_is_refused():
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    module = nn.Sequential(Two())
    with tapped(module, ["0"]), pytest.raises(ModelError, match="'0' is a tuple"):
        module(X)


def test_auto_pairs_the_ends_of_the_stages_behind_the_first_resolution():
    student, teacher = (
        net((8, 16, 24)),
        resnet(num_classes=5, in_channels=1, widths=(16, 16, 32), depths=2),
    )
    # `stages` as a whole ends with its last stage, and is called after it
    assert pair_hints("auto", student, teacher, [X]) == [
        ("stages.1", "stages.1"),
        ("stages", "stages"),
    ]


def test_auto_leaves_out_what_is_called_at_several_resolutions():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 4, 3, 2, 1)
            self.b = nn.Conv2d(4, 4, 3, 2, 1)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.b(self.relu(self.a(x))))

    module = Shared()
    assert pair_hints("auto", module, module, [X]) == [("b", "b")]


def test_auto_without_a_common_resolution_says_what_there_is():
    with pytest.raises(ModelError, match=r"student has \[\(16, 16\)\], the teacher \[\(8, 8\)\]"):
        pair_hints("auto", nn.Sequential(nn.Conv2d(1, 2, 1)), nn.Sequential(nn.MaxPool2d(2)), [X])


def test_given_pairs_are_taken_as_they_are():
    assert pair_hints(["a", ("b", "c")], nn.Identity(), nn.Identity(), [X]) == [
        ("a", "a"),
        ("b", "c"),
    ]
