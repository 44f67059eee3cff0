"""quantize: what it refuses, and what the four ways of it leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.errors import ModelError, RecipeError, TargetError
from edgekd.network import Network
from edgekd.quantization.placement import input_scales, quantizers
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import verify
from edgekd.target import Target
from edgekd.tasks.classification import Classification

Batches = list[tuple[Tensor, Tensor]]


def scales(net: Network) -> dict[str, Tensor]:
    assert isinstance(net.module, GraphModule)
    return {name: q.scale.detach() for name, q in quantizers(net.module).items()}


def accuracy(net: Network | Callable[[Tensor], Tensor], batches: Batches) -> float:
    with torch.no_grad():
        hits = [(net(x).argmax(1) == y).double().mean() for x, y in batches]
    return float(torch.stack(hits).mean())


def test_post_training_keeps_the_networks_answers(trained: Network, batches: Batches, host: Target):
    before = {name: t.clone() for name, t in trained.state().items()}
    net = quantize(trained, target=host, data=batches[:2], accelerator="cpu")
    assert (net.scheme, trained.scheme) == (host.scheme, None)
    assert all(torch.equal(before[name], t) for name, t in trained.state().items())
    assert accuracy(trained, batches) > 0.95
    assert abs(accuracy(net, batches) - accuracy(trained, batches)) < 0.02
    with torch.no_grad():  # but they are other numbers: it is quantized
        assert not torch.allclose(net(batches[0][0]), trained(batches[0][0]), atol=1e-4)


ALL = {"observer": "percentile", "equalized": True, "adaround": 30}


@pytest.mark.parametrize("name", ["host-onnxruntime", "jetson-orin-nano"])
def test_a_network_of_all_post_training_options_passes_its_gates(
    trained: Network, batches: Batches, name: str, tmp_path: Path
):
    before = {name: t.clone() for name, t in trained.state().items()}
    net = quantize(trained, target=name, data=batches[:2], accelerator="cpu", **ALL)
    assert all(torch.equal(before[name], t) for name, t in trained.state().items())
    assert accuracy(net, batches) > 0.95
    net.save(tmp_path / "net")
    loaded = Network.load(tmp_path / "net")
    artifact = export(loaded, target=name, out=tmp_path / "artifact")
    parity = verify(artifact, loaded, data=batches, task=Classification())
    assert parity.gate == "passed", parity


def test_each_post_training_option_has_its_effect_and_comes_out_the_same_again(
    trained: Network, batches: Batches, host: Target
):
    def state(**options: object) -> dict[str, Tensor]:
        net = quantize(trained, target=host, data=batches[:1], accelerator="cpu", **options)
        return {name: t.detach().clone() for name, t in net.state().items()}

    plain = state()
    for name, value in (ALL | {"correct_bias": False}).items():
        one, again = state(**{name: value}), state(**{name: value})
        assert all(torch.equal(one[key], again[key]) for key in plain)
        assert any(not torch.equal(one[key], plain[key]) for key in plain), name


def test_training_goes_on_from_all_post_training_options(
    trained: Network, batches: Batches, host: Target
):
    net = quantize(
        trained, target=host, data=batches[:3], task=Classification(), epochs=1,
        accelerator="cpu", **ALL,
    )  # fmt: skip
    assert accuracy(net, batches) > 0.95


def test_less_than_no_iterations_are_refused(trained: Network, batches: Batches, host: Target):
    with pytest.raises(RecipeError, match="adaround is -1; give iterations, or 0 for none"):
        quantize(trained, target=host, data=batches, adaround=-1)


@pytest.mark.parametrize("way", ["task", "teacher", "both"])
def test_training_moves_weights_and_scales(
    trained: Network, batches: Batches, host: Target, way: str
):
    options = {
        "task": {"task": Classification()},
        "teacher": {"teacher": trained},
        "both": {"task": Classification(), "teacher": [trained, trained.module]},
    }[way]
    data = [x for x, _ in batches[:3]] if way == "teacher" else batches[:3]
    start = quantize(trained, target=host, data=data, accelerator="cpu")
    net = quantize(trained, target=host, data=data, epochs=2, accelerator="cpu", **options)
    assert accuracy(net, batches) > 0.95
    moved = [(scales(net)[name] != scale).any() for name, scale in scales(start).items()]
    assert sum(map(bool, moved)) > 0.8 * len(moved)
    for (own,), (before,) in [(input_scales(net.module), input_scales(start.module))]:
        assert torch.equal(own, before) and own.requires_grad  # images keep their range
    weight = "stages.0.0.conv1.weight"
    assert not torch.equal(net.state()[weight], start.state()[weight])
    assert all((scale > 0).all() for scale in scales(net).values())


def test_batch_normalisation_learns_along_and_is_folded(
    trained: Network, batches: Batches, host: Target
):
    common = {"target": host, "data": batches, "task": Classification(), "accelerator": "cpu"}
    start = quantize(trained, **common).state()
    net = quantize(trained, epochs=2, batchnorm=0.8, freeze_scales=0.0, **common)
    now = net.state()
    assert now.keys() == start.keys() and accuracy(net, batches) > 0.95
    scales = {n for n in start if n.startswith("quant.") and n.endswith(".scale")}
    moved = {n for n in scales if not torch.equal(now[n], start[n])}
    # the factors of the batch normalisation have gone into the scales of weights
    assert moved == {n for n in scales if n.endswith("_weight.scale")} - {"quant.head_weight.scale"}


def test_frozen_scales_stay_while_weights_move(trained: Network, batches: Batches, host: Target):
    start = quantize(trained, target=host, data=batches, accelerator="cpu").state()
    frozen = quantize(
        trained, target=host, data=batches, task=Classification(), epochs=1, freeze_scales=0.0,
        accelerator="cpu",
    )  # fmt: skip
    now = frozen.state()
    assert all(torch.equal(now[n], start[n]) for n in now if n.startswith("quant."))
    assert not torch.equal(now["stem.0.weight"], start["stem.0.weight"])
    assert all(p.requires_grad for p in frozen.module.parameters())


def test_a_network_of_a_quantized_one_is_refused(
    quantized: Network, batches: Batches, host: Target
):
    with pytest.raises(ModelError, match="quantized already"):
        quantize(quantized, target=host, data=batches)


def test_a_target_without_integers_is_refused(trained: Network, batches: Batches, host: Target):
    floats = host.model_copy(update={"scheme": None, "precisions": ("fp32",)})
    with pytest.raises(TargetError, match="runs no integers; export the float network"):
        quantize(trained, target=floats, data=batches)


def test_a_network_with_nothing_to_quantize_is_refused(host: Target):
    net = Network(nn.Sigmoid(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match=r"no operator that host-onnxruntime runs in integers"):
        quantize(net, target=host, data=[torch.zeros(2, 3, 8, 8)])
