"""prune: ten torchvision families, goals, what it refuses, and what comes after it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import edgekd
from edgekd import pipeline
from edgekd.data.base import InMemory
from edgekd.errors import ModelError, RecipeError, StateError
from edgekd.models.build import Build, build_module
from edgekd.reporting.progress import console
from edgekd.runtimes.base import get_runtime
from edgekd.target import ChannelMultiple

AUXILIARY = {"aux_logits": False, "init_weights": False}
FAMILIES = {
    "alexnet": {},
    "resnet18": {},
    "resnext50_32x4d": {},
    "densenet121": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "googlenet": AUXILIARY,
    "squeezenet1_1": {},
    "mnasnet0_5": {},
    "regnet_y_400mf": {},
}
EXPORTED = {"squeezenet1_1", "mnasnet0_5"}  # tools/bench_prune.py exports all
FRESH = """
import sys, edgekd
from safetensors.torch import load_file, save_file
for line in sys.stdin:
    net = edgekd.Network.load(line.strip())
    net.train_mode(False)
    save_file({"y": net(load_file(line.strip() + "/x")["x"]).detach()}, line.strip() + "/y")
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[Path], Tensor]]:
    """Outputs of a saved network on the `x` beside it, from another process."""
    with subprocess.Popen(
        [sys.executable, "-c", FRESH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout

        def ask(folder: Path) -> Tensor:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            return load_file(folder / "y")["y"]

        yield ask
        process.stdin.close()


def named(model: str, size: int = 32, **kwargs: object) -> edgekd.Network:
    """Random weights whose BatchNorms have seen noise."""
    torch.manual_seed(0)
    build = Build(model=model, kwargs=kwargs)
    module = build_module(build, trust=False, origin="test")
    with torch.no_grad():
        module.train()(torch.randn(4, 3, size, size))
    return edgekd.Network(module.eval(), torch.zeros(1, 3, size, size), build=build)


def small(**kwargs: object) -> edgekd.Network:
    return named("edgekd/resnet", 16, num_classes=4, widths=[16, 32, 64], **kwargs)


def noise(net: edgekd.Network, batch: int = 4) -> Tensor:
    shape = (batch, *net.io.inputs[0].shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def outputs(net: edgekd.Network, x: Tensor) -> Tensor:
    net.train_mode(False)
    with torch.no_grad():
        return net(x)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(console, "print", lambda text, **_: lines.append(text))
    return lines


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_pruned_trained_saved_and_exported(
    name: str, tmp_path: Path, fresh: Callable[[Path], Tensor]
):
    net = named(f"torchvision/{name}", 64, **FAMILIES[name])
    before = {n: t.clone() for n, t in net.state().items()}
    pruned = edgekd.prune(net, ratio=0.3, round_to=8)

    assert pruned.params < 0.75 * net.params
    assert pruned.macs < 0.75 * net.macs
    assert all(torch.equal(t, before[n]) for n, t in net.state().items())
    for path, attributes in pruned.resized.items():
        layer = pruned.module.get_submodule(path)
        assert attributes == {a: getattr(layer, a) for a in attributes}
        if "out_channels" in attributes:
            assert attributes["out_channels"] % 8 == 0
            assert layer.weight.shape[0] == attributes["out_channels"]

    x = noise(pruned)
    pruned.train_mode(True)
    pruned(x).square().mean().backward()
    assert all(p.grad is not None for p in pruned.module.parameters())

    pruned.save(tmp_path / "net")
    save_file({"x": x}, tmp_path / "net" / "x")
    ours = outputs(pruned, x)
    assert torch.equal(fresh(tmp_path / "net"), ours)

    if name in EXPORTED:
        artifact = edgekd.export(pruned, target="host-onnxruntime", out=tmp_path / "onnx")
        session = get_runtime("onnxruntime").load(artifact.path, threads=1)
        np.testing.assert_allclose(
            session([x.numpy()])[0], ours.numpy(), atol=1e-4 * float(ours.abs().max())
        )


def test_channels_that_do_nothing_go_first_and_nothing_changes():
    """A quarter of the channels is silenced by hand in each group: those must be what goes."""
    net = small()
    silent = {16: 4, 32: 8, 64: 16}
    with torch.no_grad():
        for layer in net.module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                channels = torch.arange(0, layer.num_features, 4)
                assert len(channels) == silent[layer.num_features]
                layer.weight[channels] = 0
                layer.bias[channels] = 0
    pruned = edgekd.prune(net, ratio=0.25, round_to=4)
    assert pruned.module.head.in_features == 48
    assert close(outputs(pruned, noise(net)), outputs(net, noise(net)))


def test_the_worth_of_a_filter_counts_the_batchnorm_after_it():
    net = edgekd.Network(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)),
        torch.zeros(1, 3, 8, 8),
    )
    conv, norm, _, after = net.module
    with torch.no_grad():
        conv.weight[::2] *= 10  # the largest filters, which BatchNorm makes the smallest
        norm.running_var[::2] = 1e4
        after.weight.fill_(1.0)
    kept = edgekd.prune(net, ratio=0.5, round_to=8).module[0].weight
    assert torch.equal(kept, conv.weight[1::2])


def test_grouped_convolutions_lose_whole_groups():
    layers = [nn.Conv2d(3, 48, 1), nn.Conv2d(48, 48, 3, groups=12), nn.Conv2d(48, 4, 1)]
    net = edgekd.Network(nn.Sequential(*layers), torch.zeros(1, 3, 8, 8))
    pruned = edgekd.prune(net, ratio=0.3, round_to=8)
    grouped = pruned.module[1]
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (32, 32, 8)
    assert pruned.resized["1"] == {"out_channels": 32, "in_channels": 32, "groups": 8}
    rows = layers[1].weight.reshape(12, -1)
    for row in grouped.weight.reshape(8, -1):
        assert (rows == row).all(1).sum() == 1  # a group of the original, whole


@pytest.mark.parametrize("goal", ["macs", "params"])
def test_a_goal_gives_the_widest_network_that_meets_it(goal: str):
    net = named("edgekd/resnet", 8, num_classes=4, widths=[16, 24])
    sizes = {
        size
        for r in np.linspace(0, 0.99, 18)
        if (size := getattr(pruned_or_whole(net, float(r)), goal))
    }
    for share in (0.9, 0.55):
        limit = share * getattr(net, goal)
        found = getattr(edgekd.prune(net, **{goal: share}, round_to=8), goal)
        assert found == max(size for size in sizes if size <= limit)
        same = edgekd.prune(net, **{goal: int(limit)}, round_to=8)
        assert getattr(same, goal) == found
    whole = edgekd.prune(net, **{goal: 1.0})
    assert whole.params == net.params and whole.resized == {}


def pruned_or_whole(net: edgekd.Network, ratio: float) -> edgekd.Network:
    try:
        return edgekd.prune(net, ratio=ratio, round_to=8)
    except ModelError:
        return net


def test_a_goal_out_of_reach_names_the_smallest_figure():
    net = small()
    smallest = edgekd.prune(net, ratio=0.99, round_to=8)
    with pytest.raises(RecipeError, match=f"fewest in multiples of 8 are {smallest.params:,} of"):
        edgekd.prune(net, params=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of ratio, macs and params; got none"),
        ({"ratio": 0.3, "macs": 0.5}, "got ratio = 0.3, macs = 0.5"),
        ({"ratio": 1.0}, "ratio is 1;"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"macs": 0.0}, "macs is 0; give a count"),
        ({"ratio": 0.3, "round_to": 0}, "round_to is 0"),
        ({"ratio": 0.3, "epochs": 1}, "epochs = 1 retrains; give task and data"),
        ({"ratio": 0.3, "ignore": ("stages.9",)}, "no module 'stages.9'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str):
    with pytest.raises(RecipeError, match=message):
        edgekd.prune(small(), **options)


def test_nothing_to_remove_is_an_error():
    with pytest.raises(ModelError, match=r"ratio of 0\.3 in multiples of 64 removes nothing"):
        edgekd.prune(small(), ratio=0.3, round_to=64)


def test_the_multiple_is_the_targets():
    target = edgekd.Target.load("host-onnxruntime")
    multiple = ChannelMultiple(value=32, source="default")
    wide = target.model_copy(update={"channel_multiple": multiple})
    net = small()
    assert edgekd.prune(net, ratio=0.4, target=wide).module.head.in_features == 32
    assert edgekd.prune(net, ratio=0.4, target=target).module.head.in_features == 40


def test_layers_that_stay_whole_are_named(said: list[str]):
    edgekd.prune(small(), ratio=0.3, round_to=16, ignore=("stages.2",))
    text = "\n".join(said)
    assert "kept whole: head (outputs of the network)" in text
    assert "stem.0, stages.0.0.conv1 (multiples of 16 leave nothing to remove)" in text
    assert "stages.2.0.conv1" in text and "(stages.2 is in ignore)" in text


def test_ignored_modules_do_not_change():
    net = small()
    pruned = edgekd.prune(net, ratio=0.5, ignore=("stages.1",))
    assert not any(path.startswith("stages.1.") for path in pruned.resized)
    assert pruned.module.stages[2][0].conv1.out_channels == 32


def test_pruning_composes_and_a_bare_module_reloads(tmp_path: Path):
    net = small()
    net.build = None
    twice = edgekd.prune(edgekd.prune(net, ratio=0.25, round_to=4), ratio=0.34, round_to=4)
    assert twice.module.head.in_features == 32
    twice.save(tmp_path)
    with pytest.raises(StateError, match="module="):
        edgekd.Network.load(tmp_path)
    again = edgekd.Network.load(tmp_path, module=small().module)
    assert again.resized == twice.resized
    assert torch.equal(outputs(again, noise(net)), outputs(twice, noise(net)))


def test_a_spec_without_widths_loads_and_wrong_widths_do_not(tmp_path: Path):
    net = small()
    net.save(tmp_path)
    spec = json.loads((tmp_path / "spec.json").read_text())
    del spec["resized"]
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert edgekd.Network.load(tmp_path).resized == {}
    for wrong, message in (
        ({"body": {"out_channels": 8}}, "has no such layer"),
        ({"head": {"out_channels": 8}}, "a Linear takes out_features"),
        ({"pool": {"out_channels": 8}}, "takes no other width"),
        ({"head": {"in_features": 0}}, "whole numbers from 1"),
        ({"head": {"in_features": "8"}}, "valid integer"),
        ({"head": {"in_features": 8}}, "fails on the example"),
    ):
        (tmp_path / "spec.json").write_text(json.dumps(spec | {"resized": wrong}))
        with pytest.raises((StateError, ModelError), match=message):
            edgekd.Network.load(tmp_path)


class Fixed(nn.Module):
    """Has its channels written into its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(len(x), 32, *x.shape[2:])


class Shuffled(nn.Module):
    """Interleaves two halves of the channels, which torch-pruning takes for a plain reshape."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class WithAuxiliary(nn.Module):
    """Has a head that runs in training only, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1)
        self.auxiliary = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) + self.auxiliary(x) if self.training else self.head(x)


class Concatenated(nn.Module):
    """Its input goes on beside its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 32, 1), nn.Conv2d(35, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.body(x)], 1))


def around(middle: nn.Module) -> edgekd.Network:
    torch.manual_seed(0)
    parts = {"stem": nn.Conv2d(3, 32, 1), "middle": middle, "head": nn.Conv2d(32, 4, 1)}
    return edgekd.Network(nn.Sequential(OrderedDict(parts)), torch.zeros(1, 3, 8, 8))


def test_a_channel_count_in_the_code_is_found_and_the_remedy_works():
    net = around(Fixed())
    with pytest.raises(ModelError, match=r"fails in middle .*view.* ignore=\('middle',\)"):
        edgekd.prune(net, ratio=0.3)
    net = around(nn.Sequential(OrderedDict(a=nn.Conv2d(32, 64, 1), b=nn.Conv2d(64, 32, 1),
                                           fixed=Fixed())))  # fmt: skip
    pruned = edgekd.prune(net, ratio=0.3, ignore=("middle.fixed",))
    assert pruned.resized.keys() == {"stem", "middle.a", "middle.b"}


@pytest.mark.parametrize("middle", [Shuffled(), nn.PixelShuffle(1)])
def test_channels_are_never_mixed_up(middle: nn.Module):
    """Either torch-pruning gets it right, or there is an error; the output decides."""
    net = around(middle)
    with torch.no_grad():
        net.module.head.weight[:, 8:] = 0  # whatever is removed of these does not matter
    try:
        pruned = edgekd.prune(net, ratio=0.5)
    except ModelError as error:
        assert "torch-pruning" in str(error)
    else:
        assert close(outputs(pruned, noise(net)), outputs(net, noise(net)))


def test_an_auxiliary_head_is_an_error_before_training_starts():
    net = edgekd.Network(WithAuxiliary(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match="fails in training mode in auxiliary"):
        edgekd.prune(net, ratio=0.5)


def test_channels_beside_the_input_are_right_or_refused():
    net = edgekd.Network(Concatenated(), torch.zeros(1, 3, 8, 8))
    try:
        pruned = edgekd.prune(net, ratio=0.5)
    except ModelError as error:
        assert "torch-pruning" in str(error)
    else:
        assert pruned.module.head.in_channels == 19


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(4, 32), nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 32, 1))],
)
def test_layers_without_known_widths_stay_whole(layer: nn.Module, said: list[str]):
    net = around(nn.Sequential(layer, nn.Conv2d(32, 64, 1), nn.PReLU(64), nn.Conv2d(64, 32, 1)))
    pruned = edgekd.prune(net, ratio=0.5)
    assert pruned.module.stem.out_channels == 32
    assert pruned.module.middle[2].num_parameters == 32
    assert any("stem" in line and "cannot be resized" in line for line in said)


def test_a_quantized_network_is_refused_and_a_pruned_one_quantizes_whole(tmp_path: Path):
    pruned = edgekd.prune(small(), ratio=0.3)
    batches = [noise(pruned, 16), noise(pruned, 16) * 0.5]
    quantized = edgekd.quantize(pruned, target="host-onnxruntime", data=batches)
    with pytest.raises(ModelError, match="prune it before"):
        edgekd.prune(quantized, ratio=0.3)

    quantized.save(tmp_path / "net")
    again = edgekd.Network.load(tmp_path / "net")
    assert torch.equal(outputs(again, batches[0]), outputs(quantized, batches[0]))

    artifact = edgekd.export(again, target="host-onnxruntime", out=tmp_path / "onnx")
    session = get_runtime("onnxruntime").load(artifact.path, threads=1)
    integer, total = session.integer_share()
    assert integer == total == 10  # nine convolutions and the head
    parity = edgekd.verify(artifact, quantized, data=batches)
    assert parity.gate == "passed", parity.reasons


def quadrants(count: int, seed: int) -> InMemory:
    """Noise with one brighter quadrant, the label."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 160, (count, 3, 16, 16), dtype=np.uint8)
    labels = np.arange(count) % 4
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 40
    return InMemory(torch.from_numpy(pixels), torch.from_numpy(labels))


def quadrant_data(train: int, test: int) -> edgekd.Data:
    preprocessing = edgekd.Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    splits = {"train": quadrants(train, 0), "test": quadrants(test, 1)}
    return edgekd.Data("quadrants", splits, tuple("abcd"), preprocessing)


def test_retraining_recovers_what_pruning_lost():
    data = quadrant_data(256, 128)
    task = edgekd.get_task("classification")
    options = {"task": task, "data": data, "batch_size": 32, "accelerator": "cpu"}
    teacher = edgekd.distill(small(), epochs=3, **options)
    x, y = data.splits["test"].take(torch.arange(128))
    x = (x.float() / 255 - 0.5) / 0.25

    def loss(net: edgekd.Network) -> float:
        return float(task.loss(outputs(net, x), (y,)))

    cut = edgekd.prune(teacher, ratio=0.5)
    again = edgekd.prune(teacher, ratio=0.5, teacher=teacher, epochs=2, **options)
    assert again.resized == cut.resized
    assert loss(again) < 0.8 * loss(cut)


def test_a_recipe_prunes_between_distilling_and_quantizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "read_data", lambda **_: quadrant_data(64, 32))
    training = {"epochs": 1, "batch_size": 32}
    model = {"model": "edgekd/resnet", "kwargs": {"widths": [16, 32]}}
    sections = {
        "name": "pruned",
        "targets": ["host-onnxruntime"],
        "data": {"source": "here"},
        "teacher": model | training,
        "student": model,
        "distill": training,
        "quantize": {"calibration": 32},
        "profile": {"runs": 2},
    }
    recipe = edgekd.Recipe(**sections, prune={"ratio": 0.5} | training)
    report = edgekd.run(recipe, out=tmp_path)
    student, pruned, quantized = report.stages
    assert [row.name for row in report.stages] == ["student", "pruned", "quantized"]
    assert pruned.note == "ratio = 0.5, retrained for 1 epochs"
    assert pruned.macs == quantized.macs < 0.5 * student.macs
    (folder,) = (tmp_path / "pruned").glob("prune-*")
    net = edgekd.Network.load(folder)
    assert net.module.head.in_features == 16 and net.params == pruned.params
    (plain,) = (row for row in report.artifacts if row.precision == "fp32")
    weights = onnx.load(plain.path).graph.initializer
    assert max(np.prod(t.dims) for t in weights) == 16 * 16 * 9

    done = sorted(path.name for path in (tmp_path / "pruned").iterdir())
    edgekd.run(recipe, out=tmp_path)
    assert sorted(path.name for path in (tmp_path / "pruned").iterdir()) == done
    with pytest.raises(RecipeError, match="give one of ratio, macs and params"):
        edgekd.Recipe(**sections, prune={"ratio": 0.5, "macs": 0.5})


class Heads(nn.Module):
    """Two maps with heads of their own, flattened into one output, as detectors give it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 2, 1)
        self.heads = nn.ModuleList(nn.Conv2d(32, 6, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x).relu()
        maps = [head(m) for head, m in zip(self.heads, (fine, self.second(fine)), strict=True)]
        return torch.cat([m.permute(0, 2, 3, 1).reshape(len(x), -1, 3) for m in maps], 1)


def test_each_of_a_detectors_heads_is_an_output():
    net = edgekd.Network(Heads(), torch.zeros(1, 3, 16, 16))
    with console.capture() as said:
        pruned = edgekd.prune(net, ratio=0.5, round_to=8)
    text = " ".join(said.get().split())
    assert "kept whole: heads.0, heads.1 (outputs of the network)" in text
    assert pruned.resized == {
        "first": {"out_channels": 16},
        "second": {"in_channels": 16, "out_channels": 16},
        "heads.0": {"in_channels": 16},
        "heads.1": {"in_channels": 16},
    }
