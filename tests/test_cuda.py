"""The same stages on a GPU; nothing here runs without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgekd.network import Network
from edgekd.quantization.fake_quant import FakeQuant
from edgekd.stages.distill import distill
from edgekd.stages.export import export
from edgekd.stages.prune import prune
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import verify
from edgekd.target import Target
from edgekd.tasks.classification import Classification
from edgekd.training import evaluate, fabric, predict

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

TASK = Classification()


class Positions(nn.Module):
    """Makes tensors of its own, where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        ramp = torch.arange(x.shape[-1], device=x.device) / x.shape[-1]
        return self.linear((x * ramp).relu().mean((2, 3)))


def accuracy(net: Network, batches: Any, accelerator: str = "cuda") -> float:
    return evaluate(net, task=TASK, data=batches, on=fabric(accelerator)).value


def test_the_chain_on_a_gpu(trained: Network, batches: Any, host: Target, tmp_path: Path):
    common = {"task": TASK, "data": batches, "teacher": trained, "accelerator": "cuda"}
    small = prune(trained, ratio=0.3, epochs=2, lr=0.02, **common)
    student = distill(small, epochs=1, lr=0.01, hints=["stages.0"], cache=tmp_path, **common)
    assert student.params < trained.params
    quantized = quantize(student, target=host, epochs=1, **common)
    assert {t.device.type for t in quantized.state().values()} == {"cpu"}
    assert accuracy(quantized, batches) >= accuracy(trained, batches) - 0.02
    report = verify(export(quantized, target=host, out=tmp_path / "out"), quantized, data=batches)
    assert report.gate == "passed", report.reasons


@pytest.mark.parametrize(
    "options",
    [{}, {"equalized": True}, {"adaround": 50}, {"max_drop": 0.0}, {"observer": "percentile"}],
)
def test_post_training_quantization_gives_what_the_cpu_gives(
    trained: Network, batches: Any, host: Target, options: dict[str, Any]
):
    common = {"target": host, "data": batches, "task": TASK, **options}
    ours, theirs = (quantize(trained, accelerator=a, **common) for a in ("cuda", "cpu"))
    assert ours.float_layers == theirs.float_layers
    assert accuracy(ours, batches) == pytest.approx(accuracy(theirs, batches), abs=0.01)
    for name, scale in ours.state().items():
        if name.endswith("scale"):
            torch.testing.assert_close(scale, theirs.state()[name], rtol=0.03, atol=0)


@pytest.mark.parametrize("shape", [(4, 8, 6, 6), (4, 8)])
@pytest.mark.parametrize(("channels", "clip"), [(None, None), (None, 6.0), (8, None)])
def test_a_quantizer_and_its_gradients_are_those_of_the_cpu(
    channels: int | None, clip: float | None, shape: tuple[int, ...]
):
    symmetric = channels is not None
    made = FakeQuant(
        dtype=torch.int8 if symmetric else torch.uint8, symmetric=symmetric, channels=channels,
        ch_axis=1, bits=8,
    )  # fmt: skip
    with torch.no_grad():
        made.scale.copy_(0.03 + 0.01 * torch.rand(made.scale.shape))
        made.zero_point.fill_(0 if symmetric else 100)
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape) * 3
    found = []
    for device in ("cpu", "cuda"):
        made.to(device).scale.grad = None
        leaf = x.to(device, copy=True).requires_grad_()
        y = made(leaf, clip)
        y.backward(dy.to(device))
        assert made.scale.grad is not None and leaf.grad is not None
        found.append([t.detach().cpu() for t in (y, leaf.grad, made.scale.grad)])
        assert y.stride() == x.stride()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_integers_on_a_gpu_are_those_on_the_cpu(quantized: Network, batches: Any):
    gpu, cpu = (
        torch.cat([outputs for outputs, _ in predict(quantized, batches, on=fabric(a))])
        for a in ("cuda", "cpu")
    )
    near = (gpu - cpu).abs() < 1e-3 * cpu.abs().max()  # an integer that flips moves them by more
    assert float(near.float().mean()) > 0.99


def test_a_graph_that_makes_tensors_trains_on_a_gpu(batches: Any, host: Target):
    net = Network(Positions(), torch.zeros(2, 3, 16, 16))
    common: dict[str, Any] = {"task": TASK, "data": batches, "accelerator": "cuda"}
    quantized = quantize(distill(net, epochs=1, **common), target=host, epochs=1, **common)
    assert accuracy(quantized, batches, "cpu") == pytest.approx(
        accuracy(quantized, batches), abs=0.01
    )
