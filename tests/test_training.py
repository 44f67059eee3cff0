"""Training: bit-equal after an interruption, the schedule, weight decay, and what it refuses."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import training
from edgekd.data.base import Data, InMemory, training_batches
from edgekd.errors import DataError, ModelError, RecipeError, StateError, TargetError, TrainingError
from edgekd.knowledge.terms import match_outputs
from edgekd.network import Network, Preprocessing
from edgekd.rundir import RunDir
from edgekd.stages.distill import distill
from edgekd.stages.quantize import quantize
from edgekd.tasks.classification import Classification
from edgekd.training import evaluate, fabric, fit, predict

TASK = Classification()
STEPS, EPOCHS = 5, 2  # per epoch of `DATA` in batches of 16
OPTIONS: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 16, "lr": 0.05, "seed": 3}


class Interrupted(BaseException):
    """Stands for a kill: nothing catches it."""


def images(count: int, seed: int) -> InMemory:
    """Noise with a bright quadrant that gives the class away."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (count, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(count) % 4
    for image, label in zip(pixels, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 100
    return InMemory(torch.from_numpy(pixels), torch.from_numpy(labels))


DATA = Data(
    "quadrants",
    {"train": images(80, 0), "test": images(40, 1)},
    ("nw", "ne", "sw", "se"),
    Preprocessing(mean=(0.3,), std=(0.2,)),
    augment=("crop",),
)


def network(seed: int = 0, dropout: float = 0.3, width: int = 8) -> Network:
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(dropout),
        nn.Flatten(), nn.Linear(width * 16, 4),
    )  # fmt: skip
    return Network(module, torch.zeros(2, 1, 8, 8))


def state_of(net: Network) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in net.state().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


class Counting(Classification):
    """Counts its losses, and stops before one of them, or makes it NaN."""

    def __new__(cls, **_: int) -> Counting:
        return object.__new__(cls)

    def __init__(self, *, stop_at: int = -1, nan_at: int = -1) -> None:
        super().__init__()
        self.__dict__.update(calls=0, stop_at=stop_at, nan_at=nan_at)

    def loss(self, outputs: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        self.__dict__["calls"] += 1
        if self.calls == self.stop_at:
            raise Interrupted
        value = super().loss(outputs, targets)
        return value * float("nan") if self.calls == self.nan_at else value


@pytest.fixture
def every_step(monkeypatch):
    """A checkpoint after each step."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)


@pytest.fixture(scope="module")
def teacher() -> Network:
    return distill(network(9, width=16), task=TASK, data=DATA, **{**OPTIONS, "epochs": 6})


# ---- interrupted and resumed -------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(teacher) -> dict[str, Tensor]:
    return state_of(distill(network(), task=TASK, data=DATA, teacher=teacher, **OPTIONS))


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5, 6, 7, 10])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, every_step, teacher, uninterrupted, stop_at):
    run = RunDir(tmp_path)
    common = {"data": DATA, "teacher": teacher, "run": run, **OPTIONS}
    with pytest.raises(Interrupted):
        distill(network(), task=Counting(stop_at=stop_at), **common)
    task = Counting()
    resumed = distill(network(seed=7), task=task, **common)  # its start must not matter
    if stop_at > 1:
        assert_same(state_of(resumed), uninterrupted)
    # it went on, and did not start again
    assert task.calls == STEPS * EPOCHS - (stop_at - 1)
    assert [record["step"] for record in run.history()] == [STEPS, 2 * STEPS]


def test_a_run_interrupted_again_and_again_ends_in_the_same_bits(
    tmp_path, every_step, teacher, uninterrupted
):
    run = RunDir(tmp_path)
    common = {"data": DATA, "teacher": teacher, "run": run, **OPTIONS}
    for stop_at in (3, 1, 4, 2):  # 2, 0, 3 and 1 steps
        with pytest.raises(Interrupted):
            distill(network(), task=Counting(stop_at=stop_at), **common)
    task = Counting()
    assert_same(state_of(distill(network(), task=task, **common)), uninterrupted)
    assert task.calls == STEPS * EPOCHS - 6


def test_a_finished_run_is_not_trained_further(tmp_path, every_step, uninterrupted, teacher):
    common = {"data": DATA, "teacher": teacher, "run": RunDir(tmp_path), **OPTIONS}
    distill(network(), task=TASK, **common)
    task = Counting()
    assert_same(state_of(distill(network(), task=task, **common)), uninterrupted)
    assert task.calls == 0


def test_writing_checkpoints_does_not_change_the_result(tmp_path, teacher, uninterrupted):
    rare = distill(
        network(), task=TASK, data=DATA, teacher=teacher, run=RunDir(tmp_path), **OPTIONS
    )
    assert_same(state_of(rare), uninterrupted)


def test_seed_and_dropout_matter(teacher, uninterrupted):
    # else the tests above would prove nothing of them
    for net, options in ((network(), {"seed": 4}), (network(dropout=0.31), {})):
        other = distill(net, task=TASK, data=DATA, teacher=teacher, **{**OPTIONS, **options})
        assert not torch.equal(state_of(other)["0.weight"], uninterrupted["0.weight"])


@pytest.mark.parametrize("batchnorm", [0.0, 0.6])
@pytest.mark.parametrize("stop_at", [2, 5])
def test_quantized_training_resumes_in_the_same_bits(
    tmp_path, every_step, teacher, host, stop_at, batchnorm
):
    student = network(dropout=0)
    common = {"target": host, "data": DATA, "teacher": teacher, **OPTIONS, "epochs": 1,
              "batchnorm": batchnorm}  # fmt: skip
    whole = state_of(quantize(student, task=TASK, **common))
    with pytest.raises(Interrupted):
        quantize(student, task=Counting(stop_at=stop_at), run=RunDir(tmp_path), **common)
    task = Counting()
    assert_same(state_of(quantize(student, task=task, run=RunDir(tmp_path), **common)), whole)
    assert task.calls == STEPS - (stop_at - 1)
    assert any(name.startswith("quant.") and name.endswith(".scale") for name in whole)


class Stream:
    """Batches without a length."""

    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at, self.yielded = stop_at, 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in training_batches(DATA, batch_size=16, seed=0, epoch=0):
            self.yielded += 1
            if self.yielded == self.stop_at:
                raise Interrupted
            yield batch


def test_data_without_a_length_resumes_at_the_epoch(tmp_path, every_step):
    options = {"task": TASK, **OPTIONS}
    whole = state_of(distill(network(), data=Stream(), **options))
    with pytest.raises(Interrupted):
        distill(network(), data=Stream(stop_at=STEPS + 3), run=RunDir(tmp_path), **options)
    rest = Stream()
    resumed = distill(network(), data=rest, run=RunDir(tmp_path), **options)
    assert_same(state_of(resumed), whole)
    assert rest.yielded == STEPS


def test_data_that_fails_in_the_middle_of_an_epoch_resumes_there(tmp_path, every_step):
    batches = list(training_batches(DATA, batch_size=16, seed=0, epoch=0))
    options = {"task": TASK, **OPTIONS}
    whole = state_of(distill(network(), data=batches, **options))
    with pytest.raises(Interrupted):
        distill(
            network(),
            data=batches,
            run=RunDir(tmp_path),
            **{**options, "task": Counting(stop_at=8)},
        )
    task = Counting()
    resumed = distill(network(), data=batches, run=RunDir(tmp_path), **{**options, "task": task})
    assert_same(state_of(resumed), whole)
    assert task.calls == 3


def test_the_checkpoint_of_another_network_is_refused(tmp_path, every_step):
    common = {"data": DATA, "run": RunDir(tmp_path), **OPTIONS}
    with pytest.raises(Interrupted):
        distill(network(), task=Counting(stop_at=3), **common)
    with pytest.raises(StateError, match=r"last.ckpt: 0.weight has shape \(8, 1, 3, 3\)"):
        distill(network(width=16), task=TASK, **common)


# ---- data --------------------------------------------------------------------------------------


def test_batches_train_as_the_data_they_come_from():
    options = {"task": TASK, **OPTIONS, "epochs": 1}
    from_data = distill(network(), data=DATA, **options)
    batches = list(training_batches(DATA, batch_size=16, seed=OPTIONS["seed"], epoch=0))
    assert_same(state_of(distill(network(), data=batches, **options)), state_of(from_data))


def test_a_generator_is_exhausted_after_one_epoch():
    def once() -> Iterator[tuple[Tensor, ...]]:
        yield from training_batches(DATA, batch_size=16, seed=0, epoch=0)

    one_epoch = distill(network(), task=TASK, data=once(), **{**OPTIONS, "epochs": 1})
    assert not torch.equal(one_epoch.module[0].weight, network().module[0].weight)
    with pytest.raises(DataError, match=r"yielded no batch; .* exhausted after one pass"):
        distill(network(), task=TASK, data=once(), **OPTIONS)


def test_inputs_that_are_not_finite_are_refused():
    bad = [(torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(DataError, match="NaN or infinity in 256 of 256"):
        distill(network(), task=TASK, data=bad, **OPTIONS)


# ---- the optimizer -----------------------------------------------------------------------------


class Line(nn.Module):
    """y = w · x: with the loss Σ y the gradient of w is Σ x, whatever w is."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1) -> (N, 1)."""
        return x * self.w


class Unsized:
    """Batches that can be passed through again and again, and have no length."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def weights_of_steps(*, epochs: int, steps: int, lr: float, sized: bool = True) -> np.ndarray:
    """w before each step and at the end, for a gradient that is always 1."""
    net = Network(Line(), torch.zeros(2, 1, dtype=torch.float64))
    seen: list[float] = []

    def terms(inputs: object, targets: object, outputs: Tensor) -> dict[str, Tensor]:
        seen.append(net.module.w.item())
        return {"sum": outputs.sum()}

    batches = [torch.ones(1, 1, dtype=torch.float64)] * steps
    fit(
        net, terms=terms, data=batches if sized else Unsized(batches), epochs=epochs,
        batch_size=1, lr=lr, weight_decay=0.0,
        seed=0, on=fabric("cpu"), label="line", run=None,
    )  # fmt: skip
    return np.array([*seen, net.module.w.item()])


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    total, lr = 40, 0.2
    w = weights_of_steps(epochs=4, steps=10, lr=lr)
    # Nesterov, momentum 0.9: b ← 0.9 b + 1, w ← w − lr (1 + 0.9 b)
    momentum = (1 - 0.9 ** np.arange(1, total + 1)) / 0.1
    rates = -np.diff(w) / (1 + 0.9 * momentum)
    assert rates[0] > 0
    assert rates[0] < rates[1] < lr  # warm-up: 5 % of 40 steps
    # from there, torch's own cosine
    parameter = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=38)
    cosine = []
    for _ in range(38):
        cosine.append(reference.param_groups[0]["lr"])
        reference.step()
        schedule.step()
    assert rates[2:] == pytest.approx(cosine, rel=1e-6)
    assert rates.max() == pytest.approx(lr)


def test_epochs_share_one_schedule():
    assert weights_of_steps(epochs=4, steps=5, lr=0.1) == pytest.approx(
        weights_of_steps(epochs=1, steps=20, lr=0.1)
    )


def test_data_without_a_length_has_one_rate_for_each_epoch():
    w = weights_of_steps(epochs=2, steps=10, lr=0.1, sized=False)
    rates = -np.diff(w) / (1 + 0.9 * (1 - 0.9 ** np.arange(1, 21)) / 0.1)
    middles = np.array([0.25, 0.75]).repeat(10)  # of the epochs; the first twentieth warms up
    assert rates == pytest.approx(0.05 * (1 + np.cos(np.pi * (middles - 0.05) / 0.95)))


def decayed_after(net: Network) -> dict[str, bool]:
    """Which parameters shrink where only weight decay moves them."""
    before = state_of(net)
    fit(
        net,
        terms=lambda inputs, targets, outputs: {"nothing": 0.0 * outputs.sum()},
        data=[torch.randn(4, 1, 8, 8)] * 3,
        epochs=1, batch_size=4, lr=0.1, weight_decay=0.1, seed=0,
        on=fabric("cpu"), label="decay", run=None,
    )  # fmt: skip
    result = {}
    for name, tensor in net.state().items():
        if isinstance(tensor, nn.Parameter):
            shrunk = bool((tensor.abs() < before[name].abs()).any())
            assert shrunk or torch.equal(tensor, before[name]), name
            result[name] = shrunk
    return result


def test_weights_decay_but_biases_and_normalisation_do_not():
    decayed = decayed_after(network())
    assert {name for name, shrunk in decayed.items() if shrunk} == {
        "0.weight", "3.weight", "7.weight",
    }  # fmt: skip
    assert {name for name, shrunk in decayed.items() if not shrunk} == {
        "0.bias", "1.weight", "1.bias", "3.bias", "7.bias",
    }  # fmt: skip


def test_scales_of_quantizers_do_not_decay(host):
    decayed = decayed_after(quantize(network(), target=host, data=DATA))
    assert {name for name, shrunk in decayed.items() if shrunk} == {
        "0.weight", "3.weight", "7.weight",
    }  # fmt: skip
    scales = [name for name in decayed if name.startswith("quant.")]
    assert len(scales) >= 6  # three weights, and activations


# ---- a loss that is not finite -----------------------------------------------------------------


def test_nan_ends_training_and_leaves_the_checkpoint_before_it(tmp_path, every_step):
    run = RunDir(tmp_path)
    common = {"data": DATA, "run": run, **OPTIONS}
    with pytest.raises(
        TrainingError,
        match=r"supervised\) is not finite in epoch 2, between steps 7 and 8; lr is 0.05: "
        r"try 0.005, .* The checkpoint of step 7 is intact",
    ):
        distill(network(), task=Counting(nan_at=8), **common)
    assert run.load_checkpoint()["step"] == 7
    # with a sound loss it goes on as if nothing had been
    whole = distill(network(), task=TASK, data=DATA, **OPTIONS)
    assert_same(state_of(distill(network(), task=TASK, **common)), state_of(whole))


def test_nan_is_found_at_the_end_of_the_epoch_at_the_latest(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(TrainingError, match="between steps 5 and 10"):
        distill(network(), task=Counting(nan_at=7), data=DATA, run=run, **OPTIONS)
    assert run.load_checkpoint()["step"] == STEPS
    assert [record["step"] for record in run.history()] == [STEPS]


def test_nan_in_the_first_epoch_leaves_no_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(TrainingError, match="between steps 0 and 5"):
        distill(network(), task=Counting(nan_at=2), data=DATA, run=run, **OPTIONS)
    assert run.load_checkpoint() is None


def test_a_learning_rate_that_diverges_is_named():
    with pytest.raises(TrainingError, match=r"not finite .* lr is 1e\+20: try 1e\+19"):
        distill(network(), task=TASK, data=DATA, **{**OPTIONS, "lr": 1e20})


@pytest.mark.parametrize("at", [STEPS + 2, EPOCHS * STEPS])
def test_weights_that_are_not_finite_are_never_saved_nor_given_back(tmp_path, every_step, at):
    calls = 0

    class Steep(Classification):
        """A finite loss, once with a gradient that is not."""

        def loss(self, outputs: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
            nonlocal calls
            calls += 1
            value = super().loss(outputs, targets)
            return value + (outputs[0, 0] * 0).sqrt() if calls == at else value

    run = RunDir(tmp_path)
    with pytest.raises(TrainingError, match=f"between steps {at - 1} and {at};"):
        distill(network(), task=Steep(), data=DATA, run=run, **OPTIONS)
    state = run.load_checkpoint()
    assert state["step"] == at - 1
    assert all(t.isfinite().all() for t in state["net"].values())


# ---- the verbs ---------------------------------------------------------------------------------


def test_distill_changes_neither_its_network_nor_its_teacher(teacher):
    net, module = network(), network(5).module.train()
    before = (
        state_of(net),
        state_of(teacher),
        {n: t.clone() for n, t in module.state_dict().items()},
    )
    modes = [m.training for m in net.module.modules()], [m.training for m in module.modules()]
    result = distill(net, task=TASK, data=DATA, teacher=[teacher, module], **OPTIONS)
    assert_same(state_of(net), before[0])
    assert_same(state_of(teacher), before[1])
    assert_same(module.state_dict(), before[2])
    assert [m.training for m in net.module.modules()] == modes[0]
    assert [m.training for m in module.modules()] == modes[1]
    assert not torch.equal(result.module[0].weight, net.module[0].weight)
    assert result.module is not net.module
    assert not result.module.training


def test_a_teacher_may_be_a_network_a_module_a_callable_or_several(teacher, uninterrupted):
    module = teacher.module.eval()
    same = distill(network(), task=TASK, data=DATA, teacher=module, **OPTIONS)
    assert_same(state_of(same), uninterrupted)
    for given in (module.forward, [teacher, module], (module.forward,)):
        # a callable stays in its memory format, so the last bits may differ
        near = state_of(distill(network(), task=TASK, data=DATA, teacher=given, **OPTIONS))
        for name, tensor in uninterrupted.items():
            assert torch.allclose(near[name], tensor, rtol=1e-3, atol=1e-4), name


def test_a_teacher_and_its_share_matter(teacher, uninterrupted):
    plain = distill(network(), task=TASK, data=DATA, **OPTIONS)
    half = distill(network(), task=TASK, data=DATA, teacher=teacher, alpha=0.5, **OPTIONS)
    none = distill(network(), task=TASK, data=DATA, teacher=teacher, alpha=0.0, **OPTIONS)
    firsts = [state_of(n)["0.weight"] for n in (plain, half)] + [uninterrupted["0.weight"]]
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    assert_same(state_of(none), state_of(plain))


def test_training_learns_and_logs_it(tmp_path, teacher):
    run = RunDir(tmp_path)
    options = {**OPTIONS, "epochs": 6}
    student = distill(network(), task=TASK, data=DATA, teacher=teacher, run=run, **options)
    history = run.history()
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]
    assert set(history[0]) == {"step", "epoch", "supervised", "teacher"}
    assert history[-1]["teacher"] < 0.5 * history[0]["teacher"]
    score = evaluate(student, task=TASK, data=DATA, on=fabric("cpu"))
    assert score.n == 40
    assert score.value > 0.9


def test_what_is_logged_is_the_mean_of_the_loss(tmp_path):
    class Listening(Classification):
        """Keeps its losses."""

        def loss(self, outputs: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
            value = super().loss(outputs, targets)
            seen.append(float(value.detach()))
            return value

    seen: list[float] = []
    distill(network(), task=Listening(), data=DATA, run=RunDir(tmp_path), **OPTIONS)
    means = [np.mean(seen[:STEPS]), np.mean(seen[STEPS:])]
    assert [r["supervised"] for r in RunDir(tmp_path).history()] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("verb", ["distill", "quantize"])
def test_a_share_outside_0_to_1_is_refused(verb, teacher, host):
    common = {"task": TASK, "data": DATA, "teacher": teacher, "alpha": 1.5, **OPTIONS}
    with pytest.raises(RecipeError, match=r"alpha is 1\.5"):
        if verb == "distill":
            distill(network(), **common)
        else:
            quantize(network(), target=host, **common)


def test_quantized_training_needs_something_to_learn_from(host):
    with pytest.raises(RecipeError, match="nothing to learn from"):
        quantize(network(), target=host, data=DATA, **OPTIONS)


def test_quantized_networks_are_refused_where_float_ones_are_wanted(host):
    quantized = quantize(network(), target=host, data=DATA)
    with pytest.raises(ModelError, match="use quantize"):
        distill(quantized, task=TASK, data=DATA, **OPTIONS)
    with pytest.raises(ModelError, match="quantized already"):
        quantize(quantized, target=host, data=DATA)
    float_only = host.model_copy(update={"name": "nano", "scheme": None, "precisions": ("fp32",)})
    with pytest.raises(TargetError, match="nano runs no integers"):
        quantize(network(), target=float_only, data=DATA)


def test_quantize_learns_from_a_teacher_without_labels(teacher, host):
    unlabelled = [x for x, _ in training_batches(DATA, batch_size=16, seed=0, epoch=0)]
    student = network(dropout=0, width=16)

    def distance(net: Network) -> float:
        with torch.no_grad():
            return float(np.mean([match_outputs(net(x), teacher(x)) for x in unlabelled]))

    common = {"target": host, "data": unlabelled, "teacher": teacher, "lr": 0.05, "seed": 0}
    before = distance(quantize(student, **common))
    after = distance(quantize(student, **common, epochs=20))
    assert before > 0.5
    assert after < 0.2 * before


def test_quantize_learns_from_labels_alone(host):
    net = network(dropout=0)
    before = state_of(net)

    def loss(quantized: Network) -> float:
        with torch.no_grad():
            return float(np.mean([TASK.loss(o, t) for o, t in predict(
                quantized, DATA, on=fabric("cpu"))]))  # fmt: skip

    common = {"target": host, "data": DATA, "task": TASK, "batch_size": 16, "lr": 0.1}
    untrained = loss(quantize(net, **common))
    assert untrained > 0.8 * math.log(4)
    assert loss(quantize(net, **common, epochs=6)) < 0.6 * untrained
    assert_same(state_of(net), before)


NARROW = """
import torch, edgekd
from torch import nn

class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.main = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.shortcut = nn.Conv2d(8, 16, 1, 2)  # crashed torch 2.14 in its backward pass
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.main(x) + self.shortcut(x)).relu().mean((2, 3)))

data = [(torch.randn(4, 3, 64, 64), torch.arange(4))]
options = dict(task=edgekd.get_task("classification"), data=data, epochs=1, accelerator="cpu")
net = edgekd.distill(edgekd.Network(Narrow(), torch.zeros(1, 3, 64, 64)), **options)
edgekd.quantize(net, target="host-onnxruntime", **options)
print("trained")
"""


def test_a_narrow_shortcut_on_large_maps_does_not_end_the_process():
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NARROW], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "trained\n"), ran.stderr
