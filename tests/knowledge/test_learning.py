"""Hints and the cache where they are used: distill, prune's retraining, quantize."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgekd
from edgekd.data.base import InMemory, training_batches, view_batches
from edgekd.errors import ModelError, RecipeError, StateError
from edgekd.knowledge import cache as cache_module
from edgekd.knowledge.cache import cached_teacher
from edgekd.models.build import Build, build_module
from edgekd.rundir import RunDir

CPU = torch.device("cpu")
TASK = edgekd.get_task("classification")
RNG = torch.Generator().manual_seed(0)


def images(count: int) -> InMemory:
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 100, (count, 1, 12, 12), generator=RNG, dtype=torch.uint8)
    for index, label in enumerate(labels.tolist()):
        pixels[index, 0, 4 * label : 4 * label + 4] += 120
    return InMemory(pixels, labels)


DATA = edgekd.Data(
    name="stripes", splits={"train": images(96), "test": images(48)}, classes=("a", "b", "c"),
    preprocessing=edgekd.Preprocessing(mean=(0.4,), std=(0.3,)), augment=("flip",),
)  # fmt: skip


def net(widths: list[int], seed: int = 0) -> edgekd.Network:
    build = Build(
        model="edgekd/resnet", kwargs={"num_classes": 3, "in_channels": 1, "widths": widths}
    )
    torch.manual_seed(seed)
    module = build_module(build, trust=False, origin="test")
    return edgekd.Network(module, torch.zeros(1, 1, 12, 12), build=build)


TEACHER = edgekd.distill(net([16, 16]), task=TASK, data=DATA, epochs=3, batch_size=16)
COMMON = {"task": TASK, "data": DATA, "teacher": TEACHER, "batch_size": 16}


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a: edgekd.Network, b: edgekd.Network) -> bool:
    ours, theirs = a.state(), b.state()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- hints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hints", ["auto", [("stages.0", "stages.1")], ["stages.0", "stages.1"]])
def test_hints_are_learnt_and_leave_nothing_behind(tmp_path, hints):
    student = net([8, 8])
    out = edgekd.distill(student, hints=hints, epochs=4, run=RunDir(tmp_path), **COMMON)
    terms = [row["hints"] for row in logged(tmp_path)]
    assert terms[-1] < 0.8 * terms[0]
    assert out.state().keys() == student.state().keys()
    assert not any(m._forward_hooks for m in out.module.modules())
    assert not same(out, edgekd.distill(student, epochs=4, **COMMON))


def test_the_weight_of_hints_scales_their_term(tmp_path):
    first = {}
    for weight in (0.5, 2.0):
        run = RunDir(tmp_path / str(weight))
        # a learning rate of next to nothing: the features are those of the untrained networks
        edgekd.distill(net([8, 8]), hints="auto", hint_weight=weight, epochs=1, lr=1e-9, run=run,
                       **COMMON)  # fmt: skip
        first[weight] = logged(run.path)[0]["hints"]
    assert first[2.0] == pytest.approx(4 * first[0.5], rel=1e-3)


def test_prune_and_quantize_take_hints_too(tmp_path):
    pruned = edgekd.prune(
        net([16, 16]), ratio=0.5, hints="auto", epochs=1, run=RunDir(tmp_path / "p"), **COMMON
    )
    quantized = edgekd.quantize(
        pruned, target="host-onnxruntime", hints="auto", epochs=2, run=RunDir(tmp_path / "q"),
        **COMMON,
    )  # fmt: skip
    assert logged(tmp_path / "p")[0]["hints"] > 0
    rows = logged(tmp_path / "q")
    assert rows[1]["hints"] < rows[0]["hints"]
    quantized.program()  # nothing of the taps is left in the graph
    artifact = edgekd.export(quantized, target="host-onnxruntime", out=tmp_path / "out")
    assert edgekd.verify(artifact, quantized, data=DATA).agreement == 1.0


def test_a_run_with_hints_resumes_in_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("edgekd.training.CHECKPOINT_SECONDS", 0.0)
    whole = edgekd.distill(net([8, 8]), hints="auto", epochs=2, **COMMON)
    saved = RunDir.save_checkpoint

    def stop_at_five(self, state):
        saved(self, state)
        if state["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "save_checkpoint", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        edgekd.distill(net([8, 8]), hints="auto", epochs=2, run=RunDir(tmp_path), **COMMON)
    monkeypatch.setattr(RunDir, "save_checkpoint", saved)
    resumed = edgekd.distill(net([8, 8]), hints="auto", epochs=2, run=RunDir(tmp_path), **COMMON)
    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": None}, RecipeError, "hints come from a teacher"),
        ({"teacher": TEACHER.module.forward}, ModelError, "not callables alone"),
        ({"hint_loss": "fitnet"}, RecipeError, "no hint_loss 'fitnet'; did you mean 'fitnets'"),
        ({"hint_loss": "fgd"}, ModelError, "tells objects from the background by their boxes"),
        ({"hints": ["stages.9"]}, ModelError, "'stages.9'"),
        ({"hints": [("stages.0", "stage.0")]}, ModelError, "did you mean 'stages.0'"),
        ({"hint_weight": -1.0}, RecipeError, "hint_weight is -1"),
        ({"hint_weight": float("nan")}, RecipeError, "hint_weight is nan"),
    ],
)
def test_hints_that_cannot_be_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        edgekd.distill(net([8, 8]), epochs=1, **COMMON | {"hints": "auto"} | change)


# ---- the cache -------------------------------------------------------------------------------


def test_keys_name_the_images_of_the_batches():
    views = torch.cat(list(view_batches(DATA, 20)))
    assert len(views) == 2 * 96
    seen = []
    for epoch in range(3):
        for x, _, keys in training_batches(DATA, batch_size=16, seed=1, epoch=epoch, keyed=True):
            assert torch.equal(views[keys], x)
            seen.append(keys)
    assert 0 < float((torch.cat(seen) >= 96).float().mean()) < 1


def test_answers_are_the_teachers_in_half_precision(tmp_path):
    ask = cached_teacher(TEACHER, DATA, folder=tmp_path, device=CPU, taps=["stages.0"])
    assert ask is not None
    views = torch.cat(list(view_batches(DATA, 64)))
    keys = torch.tensor([100, 3, 191])
    (outputs,), features = ask((views[keys],), keys)
    with torch.no_grad():
        wanted = TEACHER(views[keys])
        inner = TEACHER.module.stages[0](TEACHER.module.stem(views[keys]))
    assert torch.allclose(outputs, wanted, rtol=2e-3, atol=2e-3)
    assert torch.allclose(features["stages.0"], inner, rtol=2e-3, atol=2e-3)


def test_it_is_asked_once_and_every_stage_reads_the_same(tmp_path, monkeypatch):
    first = edgekd.distill(net([8, 8]), epochs=1, hints="auto", cache=tmp_path, **COMMON)
    asked = []
    monkeypatch.setattr(cache_module, "_fill", lambda *a: asked.append(a))
    again = edgekd.distill(net([8, 8]), epochs=1, hints="auto", cache=tmp_path, **COMMON)
    edgekd.quantize(
        first, target="host-onnxruntime", epochs=1, hints="auto", cache=tmp_path, **COMMON
    )
    assert not asked
    assert same(first, again)
    online = edgekd.distill(net([8, 8]), epochs=1, hints="auto", **COMMON)
    for name, tensor in online.state().items():  # but for the rounding of the answers
        assert torch.allclose(tensor.float(), again.state()[name].float(), atol=0.02), name


def test_another_teacher_or_other_data_are_asked_anew(tmp_path):
    def folders() -> int:
        return len(list(tmp_path.iterdir()))

    cached_teacher(TEACHER, DATA, folder=tmp_path, device=CPU)
    cached_teacher([TEACHER], DATA, folder=tmp_path, device=CPU)  # a list of one is the same
    assert folders() == 1
    other = TEACHER.copy()
    with torch.no_grad():
        other.module.head.bias += 1e-3
    cached_teacher(other, DATA, folder=tmp_path, device=CPU)
    cached_teacher(TEACHER, replace(DATA, augment=()), folder=tmp_path, device=CPU)
    cached_teacher(TEACHER, DATA, folder=tmp_path, device=CPU, taps=["stem"])
    cached_teacher([TEACHER, other], DATA, folder=tmp_path, device=CPU)
    assert folders() == 5


class Several(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x):
        parts = {"mean": x.mean((2, 3)), "corner": x[..., :2, :3]}
        return parts if self.kind is dict else tuple(parts.values())


@pytest.mark.parametrize("kind", [dict, tuple])
def test_answers_of_several_tensors_are_kept_as_they_come(tmp_path, kind):
    teacher = Several(kind)
    ask = cached_teacher(teacher, DATA, folder=tmp_path, device=CPU)
    assert ask is not None
    views = torch.cat(list(view_batches(DATA, 64)))
    keys = torch.tensor([100, 3, 191])
    (outputs,), features = ask((views[keys],), keys)
    assert type(outputs) is kind and not features
    wanted = teacher(views[keys])
    names = list(wanted) if kind is dict else range(2)
    assert len(outputs) == 2
    for name in names:
        assert torch.allclose(outputs[name], wanted[name], rtol=2e-3, atol=2e-3)


class Huge(nn.Module):
    def forward(self, x):
        return 1e6 * x.mean((2, 3))


@pytest.mark.parametrize(
    ("teacher", "data"),
    [
        (TEACHER.module.forward, DATA),
        (TEACHER, replace(DATA, augment=("flip", "crop"))),
        (TEACHER, [(torch.zeros(2, 1, 12, 12), torch.zeros(2, dtype=torch.long))]),
        (Huge(), DATA),
    ],
)
def test_what_cannot_be_kept_is_asked_online(tmp_path, teacher, data):
    assert cached_teacher(teacher, data, folder=tmp_path, device=CPU) is None
    assert not list(tmp_path.iterdir())


def test_answers_too_large_are_not_kept(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(cache_module, "LARGEST_GIB", 1e-7)
    monkeypatch.setattr(cache_module.console, "print", said.append)
    assert cached_teacher(TEACHER, DATA, folder=tmp_path, device=CPU) is None
    assert "the limit here is 0.0); it is asked online" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_is_refused(tmp_path):
    cached_teacher(TEACHER, DATA, folder=tmp_path, device=CPU)
    (file,) = tmp_path.glob("*/0.f16")
    values = np.fromfile(file, np.float16)
    values[5] += 1
    values.tofile(file)
    with pytest.raises(StateError, match=r"0\.f16 is not what was written.*delete it"):
        cached_teacher(TEACHER, DATA, folder=tmp_path, device=CPU)


def test_a_fill_that_ended_early_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        yield torch.zeros(4, 1, 12, 12)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_module, "view_batches", interrupted)
        cached_teacher(TEACHER, DATA, folder=tmp_path, device=CPU)
    assert not list(tmp_path.iterdir())
    assert cached_teacher(TEACHER, DATA, folder=tmp_path, device=CPU) is not None
