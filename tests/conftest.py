"""Networks and artifacts that take seconds to make, made once."""

from __future__ import annotations

import os

# two threads that wait for each other on a busy machine are 20 times slower than one
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.models.build import Build, build_module
from edgekd.network import Network, Preprocessing
from edgekd.runtimes.base import Artifact
from edgekd.stages.distill import distill
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.target import QuantScheme, Target
from edgekd.tasks.classification import Classification

Batches = list[tuple[Tensor, Tensor]]
LABELS = ("upright stripes", "level stripes", "checks", "plain")


@pytest.fixture(autouse=True)
def same_draws(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers alone, in any order and in any worker."""
    torch.manual_seed(0)
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(0)


@pytest.fixture(scope="session")
def host() -> Target:
    return Target.load("host-onnxruntime")


@pytest.fixture(scope="session")
def scheme(host: Target) -> QuantScheme:
    assert host.scheme is not None
    return host.scheme


@pytest.fixture(scope="session")
def batches() -> Batches:
    """Noise of (64, 3, 16, 16) under one of four patterns, which is the label."""
    generator = torch.Generator().manual_seed(0)
    stripes = (torch.arange(16) % 4 >= 2).float().expand(16, 16) * 2 - 1
    patterns = torch.stack([stripes, stripes.T, stripes * stripes.T, torch.ones(16, 16)])
    made = []
    for _ in range(6):
        y = torch.randint(4, (64,), generator=generator)
        noise = torch.randn(64, 3, 16, 16, generator=generator)
        made.append((noise + patterns[y][:, None], y))
    return made


@pytest.fixture(scope="session")
def trained(batches: Batches) -> Network:
    """A float network of the residual family that tells the patterns apart."""
    torch.manual_seed(0)
    build = Build(model="edgekd/resnet", kwargs={"num_classes": 4, "widths": [8, 16]})
    module = build_module(build, trust=False, origin="test")
    net = Network(
        module,
        torch.zeros(1, 3, 16, 16),
        build=build,
        labels=LABELS,
        preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    )
    return distill(net, task=Classification(), data=batches, epochs=4, lr=0.05, accelerator="cpu")


@pytest.fixture(scope="session")
def quantized(trained: Network, batches: Batches, host: Target) -> Network:
    """`trained`, quantized for ONNX Runtime and trained further."""
    return quantize(
        trained, target=host, data=batches, task=Classification(), epochs=1, accelerator="cpu"
    )


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018, arXiv:1801.04381), ReLU6 as in the paper."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.ReLU6(), nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@pytest.fixture(scope="session")
def quantized_mobile(batches: Batches, host: Target) -> Network:
    """A small MobileNetV2 whose ReLU6 clips."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(), InvertedResidual(8), InvertedResidual(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    with torch.no_grad():
        module[0].weight.mul_(10)
    net = Network(module, torch.zeros(1, 3, 16, 16))
    return quantize(
        net, target=host, data=batches[:3], task=Classification(), epochs=2, lr=3e-4,
        accelerator="cpu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def int8_artifact(
    quantized: Network, host: Target, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    return export(quantized, target=host, out=tmp_path_factory.mktemp("int8"))


@pytest.fixture(scope="session")
def fp32_artifact(
    trained: Network, host: Target, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    return export(trained, target=host, out=tmp_path_factory.mktemp("fp32"))
