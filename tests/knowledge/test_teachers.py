"""Teachers: whatever is given answers alike, without gradient, and is not changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgekd.errors import ModelError, StateError
from edgekd.knowledge.teachers import OnnxTeacher, as_teacher
from edgekd.network import Network, Preprocessing
from edgekd.stages.export import export

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
    (outputs,), _ = as_teacher(given, CPU)((X,), None)
    return outputs


@pytest.mark.parametrize("kind", ["network", "module", "callable"])
def test_every_kind_answers_as_in_eval_mode_without_gradient(kind):
    wanted = reference(module())
    given = {
        "network": lambda: Network(module(), torch.zeros(2, 4)),
        "module": lambda: module().train(),
        "callable": lambda: module().eval().forward,
    }[kind]()
    (got,), features = as_teacher(given, CPU)((X,), None)
    assert features == {}
    assert torch.equal(got, wanted)
    assert not got.requires_grad


def test_several_answer_each_for_itself():
    modules = [module(seed).eval() for seed in range(3)]
    given = [Network(modules[0], torch.zeros(2, 4)), modules[1], modules[2].forward]
    outputs, _ = as_teacher(given, CPU)((X,), None)
    assert len(outputs) == 3
    for got, each in zip(outputs, modules, strict=True):
        assert torch.equal(got, reference(each))


def test_features_are_those_of_the_first_that_has_layers():
    first, second = module(1), module(2)
    _, features = as_teacher([first.eval().forward, second, first], CPU, ["0"])((X,), None)
    with torch.no_grad():
        assert torch.equal(features["0"], second[0](X))


def test_a_teacher_sees_images_as_it_normalises_them():
    own = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    seen = Preprocessing(mean=(0.1, 0.2, 0.6), std=(0.5, 0.25, 0.125))
    given = Network(nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 4, 4), preprocessing=own)
    pixels = torch.rand(2, 3, 4, 4)

    def normalised(how: Preprocessing) -> torch.Tensor:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (how.mean, how.std))
        return (pixels - mean) / std

    (got,), _ = as_teacher(given, CPU, seen=seen)((normalised(seen),), None)
    with torch.no_grad():
        wanted = given(normalised(own))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


# ---- a black box -------------------------------------------------------------------------------


def test_an_onnx_file_answers_as_the_network_that_it_came_from(tmp_path):
    net = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(1, 3, 8, 8))
    artifact = export(net, target="host-onnxruntime", out=tmp_path)
    teacher = OnnxTeacher(artifact.path)
    x = torch.randn(5, 3, 8, 8)
    (got,), _ = as_teacher(teacher, CPU)((x,), None)
    with torch.no_grad():
        torch.testing.assert_close(got, net(x), atol=1e-5, rtol=1e-5)
    assert teacher.io.inputs[0].shape == (3, 8, 8)


def test_what_is_no_onnx_file_is_refused(tmp_path):
    with pytest.raises(StateError, match="no such file"):
        OnnxTeacher(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_text("no model")
    with pytest.raises(StateError, match="ONNX Runtime refuses"):
        OnnxTeacher(tmp_path / "broken.onnx")
    flat = Network(nn.Linear(4, 2), torch.zeros(2, 4))
    artifact = export(flat, target="host-onnxruntime", out=tmp_path / "flat")
    with pytest.raises(ModelError, match=r"takes one float32 input of \(N, C, H, W\)"):
        OnnxTeacher(artifact.path)


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
    assert torch.equal(teacher((X,), None)[0][0], wanted)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: Network(m, torch.zeros(2, 4)), lambda m: [m]]
)
def test_features_come_out_of_the_named_layers(wrap):
    given = module()
    (outputs,), features = as_teacher(wrap(given), CPU, ["0", "1"])((X,), None)
    assert torch.equal(outputs, reference(given))
    with torch.no_grad():
        assert torch.equal(features["0"], given[0](X))
        assert torch.equal(features["1"], given[1](given[0](X)))
    assert list(features) == ["0", "1"]
