"""Every stage, with a network of an image and the numbers that belong to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.network import Network
from edgekd.stages.distill import distill
from edgekd.stages.export import export
from edgekd.stages.profile import profile
from edgekd.stages.prune import prune
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import verify
from edgekd.target import Target
from edgekd.tasks.classification import Classification
from edgekd.training import evaluate, fabric

TASK = Classification()
Batches = list[tuple[Tensor, Tensor, Tensor]]


class Fused(nn.Module):
    """One half of the answer is in the image, one in the numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.numbers = nn.Sequential(nn.Linear(4, width), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        both = torch.cat([self.image(image), self.numbers(numbers)], 1)
        out: Tensor = self.head(both)
        return out


@pytest.fixture(scope="module")
def data(batches: list[tuple[Tensor, Tensor]]) -> Batches:
    generator = torch.Generator().manual_seed(1)
    made = []
    for x, y in batches:
        numbers = torch.randn(len(x), 4, generator=generator)
        made.append((x, numbers, 2 * (y // 2) + (numbers[:, 0] > 0)))
    return made


def network(width: int) -> Network:
    torch.manual_seed(0)
    example = {"image": torch.zeros(1, 3, 16, 16), "numbers": torch.zeros(1, 4)}
    return Network(Fused(width), example)


@pytest.fixture(scope="module")
def teacher(data: Batches) -> Network:
    return distill(network(32), task=TASK, data=data, epochs=12, lr=0.05, accelerator="cpu")


@pytest.fixture(scope="module")
def narrow(teacher: Network, data: Batches) -> Network:
    """Distilled with a hint, pruned, distilled again."""
    student = distill(
        network(16), task=TASK, data=data, teacher=teacher, hints=["image.5"], hint_weight=0.1,
        epochs=8, lr=0.05, accelerator="cpu",
    )  # fmt: skip
    return prune(
        student, ratio=0.25, round_to=4, task=TASK, data=data, teacher=teacher, epochs=4, lr=0.02,
        accelerator="cpu",
    )  # fmt: skip


def accuracy(net: Network, data: Batches) -> float:
    return evaluate(net, task=TASK, data=data, on=fabric("cpu")).value


def test_both_inputs_are_learnt_from(teacher: Network, narrow: Network, data: Batches):
    assert accuracy(teacher, data) > 0.9
    assert accuracy(narrow, data) > 0.8
    assert narrow.params < 0.8 * network(16).params
    blind = [(x, torch.zeros_like(numbers), y) for x, numbers, y in data]
    assert accuracy(narrow, blind) < 0.7


@pytest.mark.parametrize("name", ["host-onnxruntime", "intel-cpu", "jetson-orin-nano"])
def test_integers_are_the_trained_networks(
    name: str, teacher: Network, narrow: Network, data: Batches, tmp_path: Path
):
    target = Target.load(name)
    pytest.importorskip(
        {"openvino": "openvino", "tensorrt": "tensorrt_rtx"}.get(target.runtime, "onnx")
    )
    net = quantize(
        narrow, target=target, data=data, task=TASK, teacher=teacher, epochs=1, lr=3e-4,
        correct_bias=True, accelerator="cpu",
    )  # fmt: skip
    assert accuracy(net, data) > accuracy(narrow, data) - 0.05
    image, numbers, _ = data[0]
    artifact = export(net, target=target, out=tmp_path / name, examples=[image, numbers])
    parity = verify(artifact, net, data=data, task=TASK)
    assert parity.gate == "passed", parity.reasons
    manifest = json.loads((artifact.path.parent / "manifest.json").read_text())
    assert [each["name"] for each in manifest["io"]["inputs"]] == ["image", "numbers"]


def test_layers_go_back_to_float_and_weights_are_rounded(narrow: Network, data: Batches):
    given = {"target": "host-onnxruntime", "data": data, "accelerator": "cpu"}
    assert quantize(narrow, adaround=20, calibration=64, **given).scheme is not None
    mixed = quantize(narrow, task=TASK, max_drop=0.05, calibration=64, **given)
    assert accuracy(mixed, data) > accuracy(narrow, data) - 0.06


def test_the_float_file_is_timed_and_checks_itself(
    narrow: Network, data: Batches, tmp_path: Path, host: Target
):
    artifact = export(narrow, target=host, out=tmp_path)
    assert verify(artifact, narrow, data=data, task=TASK).gate == "passed"
    assert profile(artifact, target=host, runs=20).p50_ms > 0
    done = subprocess.run(
        [sys.executable, "infer.py", "--check"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_data_of_images_alone_does_not_feed_it(narrow: Network, data: Batches):
    images = [(x, y) for x, _, y in data]
    with pytest.raises(ModelError, match=r"takes 2 inputs \(image float32, numbers float32\)"):
        quantize(narrow, target="host-onnxruntime", data=images, accelerator="cpu")
