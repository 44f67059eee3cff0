"""Teachers: whatever is given answers alike, without gradient, and is not changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgekd.errors import ModelError
from edgekd.knowledge.teachers import as_teacher
from edgekd.network import Network

CPU = torch.device("cpu")
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def module(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def reference(net: nn.Module) -> torch.Tensor:
    net.eval()
    with torch.no_grad():
        return net(X)


def ask(given) -> torch.Tensor:
    return as_teacher(given, CPU)((X,), None)[0]


@pytest.mark.parametrize("kind", ["network", "module", "callable"])
def test_every_kind_answers_as_in_eval_mode_without_gradient(kind):
    wanted = reference(module())
    given = {
        "network": lambda: Network(module(), torch.zeros(2, 4)),
        "module": lambda: module().train(),
        "callable": lambda: module().eval().forward,
    }[kind]()
    got, features = as_teacher(given, CPU)((X,), None)
    assert features == {}
    assert torch.equal(got, wanted)
    assert not got.requires_grad


def test_several_are_averaged():
    modules = [module(seed).eval() for seed in range(3)]
    wanted = sum(reference(m).double() for m in modules) / 3
    given = [Network(modules[0], torch.zeros(2, 4)), modules[1], modules[2].forward]
    assert torch.allclose(ask(given).double(), wanted, atol=1e-6)
    assert torch.equal(ask(tuple(modules[:1])), reference(modules[0]))


def test_an_empty_list_is_refused():
    with pytest.raises(ModelError, match="list of teachers is empty"):
        as_teacher([], CPU)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: Network(m, torch.zeros(2, 4))])
def test_a_teacher_keeps_its_mode_and_its_statistics(wrap):
    given = module().train()
    before = {name: t.clone() for name, t in given.state_dict().items()}
    ask(wrap(given))
    assert given.training
    assert all(m.training for m in given.modules())
    assert all(torch.equal(t, before[name]) for name, t in given.state_dict().items())


def test_a_teacher_is_as_it_was_when_it_was_given():
    given = module().eval()
    wanted = reference(given)
    teacher = as_teacher(given, CPU)
    with torch.no_grad():
        given[0].weight.zero_()
    assert torch.equal(teacher((X,), None)[0], wanted)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: Network(m, torch.zeros(2, 4)), lambda m: [m]]
)
def test_features_come_out_of_the_named_layers(wrap):
    given = module()
    outputs, features = as_teacher(wrap(given), CPU, ["0", "1"])((X,), None)
    assert torch.equal(outputs, reference(given))
    with torch.no_grad():
        assert torch.equal(features["0"], given[0](X))
        assert torch.equal(features["1"], given[1](given[0](X)))
    assert list(features) == ["0", "1"]
