"""What each layer's integers cost, and which layers stay in float for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from edgekd.data.base import Data, InMemory
from edgekd.errors import ModelError, RecipeError
from edgekd.models.detector import detector
from edgekd.network import Network, Preprocessing
from edgekd.quantization.capture import capture
from edgekd.quantization.sensitivity import (
    AGREEMENT,
    LayerEffect,
    Sensitivity,
    _Trials,
    fewest,
    held_out,
    layer_macs,
    mixed_precision,
    rank,
    sqnr_db,
)
from edgekd.rundir import RunDir
from edgekd.stages.export import export
from edgekd.stages.quantize import _calibrated, quantize
from edgekd.stages.verify import verify
from edgekd.target import Target
from edgekd.tasks.classification import Classification
from edgekd.tasks.detection import Detection
from edgekd.training import fabric

Batches = list[tuple[Tensor, Tensor]]
HOSTILE = "stages.0.0.conv2"
LAYERS = {"stem.0", "stages.0.0.conv1", HOSTILE, "stages.1.0.conv1", "stages.1.0.conv2",
          "stages.1.0.shortcut.0", "head"}  # fmt: skip


@pytest.fixture(scope="module")
def coarse(host: Target) -> Target:
    """One scale for all weights of a layer."""
    assert host.scheme is not None
    scheme = host.scheme.model_copy(update={"weight_granularity": "tensor"})
    return host.model_copy(update={"scheme": scheme})


@pytest.fixture(scope="module")
def hostile(trained: Network) -> Network:
    """`trained` with a weight of 500 that reads a channel of zeros: only its integers matter."""
    net = trained.copy()
    state = net.module.state_dict()
    state["stages.0.0.bn1.weight"][3] = 0
    state["stages.0.0.bn1.bias"][3] = -1  # ReLU makes it 0
    state[f"{HOSTILE}.weight"][0, 3] = 500
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed")


@pytest.fixture(scope="module")
def mixed(hostile: Network, coarse: Target, batches: Batches, folder: Path) -> Network:
    return quantize(
        hostile, target=coarse, data=batches, task=Classification(), max_drop=0.02,
        accelerator="cpu", run=RunDir(folder),
    )  # fmt: skip


@pytest.fixture(scope="module")
def table(mixed: Network, folder: Path) -> Sensitivity:
    return Sensitivity.model_validate_json((folder / "sensitivity.json").read_text())


def accuracy(net: Callable[[Tensor], Tensor], batches: Batches) -> float:
    with torch.no_grad():
        return float(np.mean(np.concatenate([(net(x).argmax(1) == y).numpy() for x, y in batches])))


def outputs(net: Callable[[Tensor], Tensor], batches: Batches) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([net(x).numpy() for x, _ in batches]).astype(np.float64)


def numpy_sqnr(reference: np.ndarray, quantized: np.ndarray) -> float:
    return 10 * np.log10((reference**2).sum() / ((reference - quantized) ** 2).sum())


# ---- one hostile layer ---------------------------------------------------------------------------


def test_exactly_the_hostile_layer_stays_in_float(
    hostile: Network, coarse: Target, mixed: Network, table: Sensitivity, batches: Batches
):
    assert mixed.float_layers == (HOSTILE,)
    assert {effect.layer for effect in table.layers} == LAYERS
    assert table.layers[0].layer == HOSTILE
    assert (table.in_float, table.metric_name) == ((HOSTILE,), "top-1 accuracy")
    integer = quantize(hostile, target=coarse, data=batches, accelerator="cpu")
    lost, kept = (accuracy(hostile, batches) - accuracy(net, batches) for net in (integer, mixed))
    assert kept <= 0.02 < 0.1 < lost
    assert (table.integer_drop, table.drop) == (pytest.approx(lost), pytest.approx(kept))
    assert table.n == 6 * 64


def test_effects_are_numpys(hostile: Network, coarse: Target, table: Sensitivity, batches: Batches):
    few = batches[:4]  # of 64: a layer's effect is measured on 256 samples
    assert table.n_layers == 256
    reference = outputs(hostile, few)
    plain: dict[str, Any] = {"data": batches, "correct_bias": False, "accelerator": "cpu"}
    integer = quantize(hostile, target=coarse, **plain)
    assert table.sqnr_db == pytest.approx(numpy_sqnr(reference, outputs(integer, few)), abs=1e-3)
    effects = {effect.layer: effect for effect in table.layers}
    for layer in (HOSTILE, "stem.0", "head"):
        alone = quantize(hostile, target=coarse, float_layers=[layer], **plain)
        gain = numpy_sqnr(reference, outputs(alone, few)) - table.sqnr_db
        assert effects[layer].sqnr_gain_db == pytest.approx(gain, abs=1e-3)
        more = accuracy(alone, few) - accuracy(integer, few)
        assert effects[layer].metric_gain == pytest.approx(more)


def test_saved_and_loaded_it_computes_the_same(mixed: Network, batches: Batches, tmp_path: Path):
    mixed.save(tmp_path)
    again = Network.load(tmp_path)
    assert again.float_layers == (HOSTILE,)
    with torch.no_grad():
        assert torch.equal(again(batches[0][0]), mixed(batches[0][0]))


def test_exported_the_layer_is_float_and_all_else_runs_in_integers(
    mixed: Network, coarse: Target, batches: Batches, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(Target, "load", staticmethod(lambda name: coarse))
    artifact = export(mixed, target=coarse, out=tmp_path)
    parity = verify(artifact, mixed, data=batches, task=Classification())
    assert (parity.gate, parity.reasons) == ("passed", ())
    assert parity.integer_share == 1.0
    graph = onnx.load(artifact.path).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    stored = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
    matrix = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    (floating,) = [n for n in matrix if made_by.get(n.input[1]) != "DequantizeLinear"]
    assert len(matrix) == 7
    assert stored[floating.input[1]].dtype == np.float32
    assert stored[floating.input[1]].max() > 100


def test_trained_further_the_layer_stays_in_float(
    hostile: Network, coarse: Target, batches: Batches
):
    net = quantize(
        hostile, target=coarse, data=batches[:2], task=Classification(), max_drop=0.02, epochs=1,
        accelerator="cpu",
    )  # fmt: skip
    assert net.float_layers == (HOSTILE,)
    assert accuracy(net, batches) > 0.9


# ---- other ways ----------------------------------------------------------------------------------


def test_without_labels_or_task_it_is_the_agreement(
    hostile: Network, coarse: Target, batches: Batches, tmp_path: Path
):
    inputs = [x for x, _ in batches]
    net = quantize(
        hostile, target=coarse, data=inputs, max_drop=0.03, accelerator="cpu",
        run=RunDir(tmp_path),
    )  # fmt: skip
    assert net.float_layers == (HOSTILE,)
    written = json.loads((tmp_path / "sensitivity.json").read_text())
    assert written["metric_name"] == AGREEMENT
    same = outputs(net, batches).argmax(1) == outputs(hostile, batches).argmax(1)
    assert written["drop"] == pytest.approx(1 - same.mean())


def test_nothing_stays_in_float_where_the_drop_is_small_already(
    trained: Network, host: Target, batches: Batches, tmp_path: Path
):
    net = quantize(
        trained, target=host, data=batches, task=Classification(), max_drop=0.05,
        accelerator="cpu", run=RunDir(tmp_path),
    )  # fmt: skip
    plain = quantize(trained, target=host, data=batches, accelerator="cpu")
    assert net.float_layers == ()
    assert np.array_equal(outputs(net, batches), outputs(plain, batches))
    table = Sensitivity.model_validate_json((tmp_path / "sensitivity.json").read_text())
    assert table.in_float == ()
    assert table.summary.startswith("no layer needs to stay in float: top-1 accuracy drops by")


def test_layers_that_were_given_stay_too(hostile: Network, coarse: Target, batches: Batches):
    net = quantize(
        hostile, target=coarse, data=batches, task=Classification(), max_drop=0.02,
        float_layers=["head"], accelerator="cpu",
    )  # fmt: skip
    assert net.float_layers == ("head", HOSTILE)


def test_a_drop_that_cannot_be_reached_is_said(trained: Network, host: Target, batches: Batches):
    with pytest.raises(ModelError, match=r"max_drop = -1 is not reached: .* of 7 layers in float"):
        quantize(trained, target=host, data=batches, task=Classification(), max_drop=-1)


def test_outputs_that_no_one_can_judge_need_a_task(host: Target, batches: Batches):
    net = Network(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 16, 16))
    with pytest.raises(RecipeError, match=r"outputs are not \(N, K\) scores; give a task"):
        quantize(net, target=host, data=[batches[0][0]], max_drop=0.1)


@pytest.mark.parametrize("name", ["host-onnxruntime", "jetson-orin-nano", "android-arm64"])
def test_a_trial_is_what_quantize_makes_of_it(trained: Network, batches: Batches, name: str):
    """Also where the trial has a quantizer that the others have not: the skip of TensorRT's Add."""
    target = Target.load(name)
    inputs = [(x,) for x, _ in batches[:2]]
    calibrated = _calibrated(trained, target, (), inputs, "mse")
    before = {name: tensor.clone() for name, tensor in calibrated.state().items()}
    trials = _Trials(trained, calibrated, inputs, "mse")
    for layers in (["stem.0"], [HOSTILE], ["head"], [HOSTILE, "stages.1.0.conv2", "stem.0"]):
        correct = layers != ["head"]
        real = quantize(
            trained, target=target, data=inputs, float_layers=layers, correct_bias=correct,
            accelerator="cpu",
        )  # fmt: skip
        trial = trials.with_float(layers, correct_bias=correct)
        assert trial.float_layers == real.float_layers
        assert np.array_equal(outputs(trial, batches), outputs(real, batches))
    assert all(torch.equal(before[name], tensor) for name, tensor in calibrated.state().items())


# ---- the parts -----------------------------------------------------------------------------------


def test_sqnr_is_over_all_outputs_and_bounded():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 5, 3))
    noisy = a + 0.1 * generator.normal(size=a.shape), b
    expected = numpy_sqnr(np.stack([a, b]), np.stack(noisy))
    tensors = [tuple(map(torch.from_numpy, pair)) for pair in ((a, b), noisy)]
    assert sqnr_db(*tensors) == pytest.approx(expected)
    named = [dict(zip("ab", pair, strict=True)) for pair in tensors]
    assert sqnr_db(*named) == pytest.approx(expected)
    assert sqnr_db(tensors[0], tensors[0]) == 120


def effect(layer: str, gain: float, price: float) -> LayerEffect:
    return LayerEffect(layer=layer, sqnr_gain_db=gain, metric_gain=0.0, price=price)


def test_of_equal_gains_the_cheaper_comes_first_and_a_large_gain_outweighs_its_price():
    effects = [effect("dear", 1.0, 30), effect("worse", -2.0, 1), effect("cheap", 1.0, 1),
               effect("great", 20.0, 30)]  # fmt: skip
    assert [e.layer for e in rank(effects)] == ["great", "cheap", "dear", "worse"]


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ([], ""),
        (["a"], "a"),
        (["c"], "c"),  # a, b and d, which went with it, are given back
        (["b", "e"], "be"),
        (["a", "b", "c", "d", "e"], "abcde"),
    ],
)
def test_the_fewest_layers_are_found(needed: list[str], expected: str):
    def drop(*names: str) -> float:
        return 0.01 * len(set(needed) - set(names))

    assert fewest("abcdef", drop, 0.0, "accuracy") == tuple(expected)


def test_the_smallest_drop_is_named_where_none_is_small_enough():
    def drop(*names: str) -> float:  # not monotone: best with one layer
        return abs(len(names) - 1) / 100 + 0.05

    message = r"max_drop = 0.01 is not reached: accuracy drops by 0.0500 at least, with 1 of 4"
    with pytest.raises(ModelError, match=message):
        fewest("abcd", drop, 0.01, "accuracy")


def test_prices_are_macs_or_the_targets_latencies(trained: Network, host: Target, batches: Batches):
    macs = layer_macs(capture(trained.module, trained.io.example(2)), trained.io.example(2))
    assert macs["head"] == 16 * 4
    assert macs["stem.0"] == 16 * 16 * 8 * 3 * 3 * 3
    assert sum(macs.values()) == trained.macs
    calibrated = quantize(trained, target=host, data=batches[:1], accelerator="cpu")
    options = {"max_drop": 0.1, "data": batches[:1], "task": Classification(),
               "inputs": [batches[0][0]], "observer": "mse", "on": fabric("cpu")}  # fmt: skip
    cost_ms = dict(zip(sorted(LAYERS), range(7), strict=True))
    table = mixed_precision(trained, calibrated, cost_ms=cost_ms, **options)
    assert table.price_unit == "ms"
    assert {effect.layer: effect.price for effect in table.layers} == cost_ms
    del cost_ms["stem.0"]
    table = mixed_precision(trained, calibrated, cost_ms=cost_ms, **options)
    assert table.price_unit == "MACs"
    assert {e.layer: e.price for e in table.layers} == {name: macs[name] for name in LAYERS}


def test_a_table_is_said_in_one_sentence(table: Sensitivity):
    total = sum(effect.price for effect in table.layers)
    share = table.layers[0].price / total
    assert table.summary == (
        f"in float stay {HOSTILE} (1 of 7 layers, {table.layers[0].price:.3g} ms slower than "
        f"integers, estimated): top-1 accuracy drops by {100 * table.drop:.2f} points, not by "
        f"{100 * table.integer_drop:.2f}, on 384 samples of the data (allowed: 2)"
    )
    without_time = table.model_copy(update={"price_unit": "MACs"})
    assert f"(1 of 7 layers, {share:.1%} of their MACs)" in without_time.summary


def test_val_comes_before_test_and_is_bounded():
    generator = torch.Generator().manual_seed(0)

    def images(count: int, value: int) -> InMemory:
        labels = torch.randint(2, (count,), generator=generator)
        return InMemory(torch.full((count, 1, 4, 4), value, dtype=torch.uint8), labels)

    splits = {"train": images(50, 0), "test": images(50, 51), "val": images(200, 102)}
    data = Data(
        name="plain", splits=splits, classes=("a", "b"),
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
    )  # fmt: skip
    batches, split = held_out(data, 100)
    assert split == "val"
    assert sum(len(x) for x, _ in batches) == 100
    assert all((x == 0.4).all() for x, _ in batches)
    del splits["val"]
    batches, split = held_out(data, 100)
    assert split == "test"
    assert sum(len(x) for x, _ in batches) == 50
    batches, split = held_out([x for x, _ in batches], 30)
    assert [len(x) for (x,) in batches] == [30]
    assert split == "the data"


# ---- a detector ----------------------------------------------------------------------------------


def test_a_detectors_head_stays_in_float_by_mean_ap(coarse: Target, tmp_path: Path):
    """A dead channel of a head, read with a weight of 100: only its layer's integers suffer."""
    torch.manual_seed(0)
    module: Any = detector(num_classes=3, scale=0.25)
    x = torch.randn(4, 3, 64, 64)
    tower = module.heads[0].classes
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 1.0
        module.train()(x)
        tower[0][1].weight[1], tower[0][1].bias[1] = 0, -1  # ReLU makes it 0
        tower[-1].weight.mul_(50)
        tower[-1].weight[0, 1] = 2000
    net = Network(module.eval(), torch.zeros(1, 3, 64, 64), labels=("a", "b", "c"))
    task = Detection().of(net.io)
    with torch.no_grad():
        found = task.answers(net(x))[:, :8]  # what the float network is right about by definition
    boxes = torch.cat([found[..., 5:], found[..., :4]], -1)
    options: dict[str, Any] = {
        "target": coarse, "data": [(x, boxes)], "correct_bias": False, "accelerator": "cpu",
    }  # fmt: skip
    mixed = quantize(net, task=Detection(), max_drop=0.15, run=RunDir(tmp_path), **options)
    table = Sensitivity.model_validate_json((tmp_path / "sensitivity.json").read_text())
    assert mixed.float_layers == table.in_float == ("heads.0.classes.1",)
    integer = quantize(net, **options)
    with torch.no_grad():
        whole, lost, kept = (
            task.score(task.answers(each(x)), (boxes,)).value for each in (net, integer, mixed)
        )
    assert table.metric_name == "mAP@[.5:.95]"
    assert table.integer_drop == pytest.approx(whole - lost)
    assert table.drop == pytest.approx(whole - kept)
    assert table.drop <= 0.15 < 0.3 < table.integer_drop
