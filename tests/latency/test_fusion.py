"""The kernels that the rules predict are those of the graph that the runtime executes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from edgekd.errors import ModelError, TargetError
from edgekd.latency import runtime_graph
from edgekd.latency.calibrate import export_files, runnable
from edgekd.latency.fusion import kernels_of
from edgekd.latency.kernels import Kernel, timed_kernels
from edgekd.latency.probes import probe
from edgekd.latency.runtime_graph import runtime_nodes
from edgekd.latency.tracing import trace
from edgekd.models.resnet import resnet
from edgekd.network import Network
from edgekd.target import Target


class Difference(nn.Module):
    """Of two convolutions' outputs, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.a, self.b, self.last = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head(self.last((self.a(x) - self.b(x)).relu()).mean((2, 3)))


class Pyramid(nn.Module):
    """Two scales, the coarse one added to the fine, as a feature pyramid does."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6())
        self.down = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.Hardswish())
        self.lateral = nn.Sequential(nn.Conv2d(16, 24, 1), nn.ReLU())
        self.out = nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.stem(x)
        coarse = nn.functional.interpolate(self.down(fine), scale_factor=2, mode=self.mode)
        return self.head(self.out(self.lateral(fine) + coarse).mean((2, 3)))


class Joined(nn.Module):
    """A concatenation of what another layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
        self.more = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.last(torch.cat([x, self.more(x)], 1)).mean((2, 3)))


class HardGate(nn.Module):
    """Channels weighed by a hard sigmoid, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Hardsigmoid())
        self.last = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.last(x * self.gate(x)).relu().mean((2, 3)))


class Mixer(nn.Module):
    """A residual of one convolution, and ConvNeXt's: linear layers between permutations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.alone = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.depthwise = nn.Conv2d(16, 16, 7, 1, 3, groups=16)
        self.mix = nn.Sequential(
            nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (x + self.alone(x)).relu()
        x = x + self.mix(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "residual, pruned": (resnet(num_classes=10, widths=(24, 40), depths=(1, 2)), (3, 32, 32)),
        "squeeze-excite": probe("depthwise", 0),
        "attention": probe("transformer", 12),
        "attention with a class token": probe("transformer", 19),
        "norms of pixels": probe("transformer", 2),
        "tokens mixed": probe("transformer", 3),
        "silu, pooled": probe("dense", 6),
        "difference": (Difference(), (3, 32, 32)),
        "pyramid, nearest": (Pyramid("nearest"), (3, 32, 32)),
        "pyramid, bilinear": (Pyramid("bilinear"), (3, 32, 32)),
        "joined": (Joined(), (3, 32, 32)),
        "hard gate": (HardGate(), (3, 32, 32)),
        "linear layers on maps": (Mixer(), (3, 32, 32)),
    }


# ONNX Runtime quantizes the sum behind a norm once more, and moves a small transposition behind a
# pooling; OpenVINO makes floats of a skip where its sum is quantized in front of an activation
KNOWN = {
    ("norms of pixels", "host-onnxruntime"): {"QuantizeLinear", "DequantizeLinear"},
    ("silu, pooled", "host-onnxruntime"): {"Transpose"},
    ("silu, pooled", "intel-cpu"): {"Reorder"},
}


def identity(kernel: Kernel) -> tuple[object, ...]:
    """But for elements read, which runtimes count differently where a tensor is broadcast."""
    return kernel[:9]


@pytest.mark.parametrize("target_name", ["host-onnxruntime", "intel-cpu"])
@pytest.mark.parametrize("name", networks())
def test_predicted_kernels_are_the_runtimes_own(name, target_name, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_graph, "RUNS", 2)
    target = Target.load(target_name)
    torch.manual_seed(0)
    module, shape = networks()[name]
    net = Network(module.eval(), torch.zeros(1, *shape))
    for precision, path in export_files(net, target, runnable(target), tmp_path).items():
        scheme = target.scheme if precision == "int8" else None
        predicted = Counter(
            map(identity, kernels_of(trace(module, [shape]), target.runtime, scheme))
        )
        executed = Counter(
            identity(k)
            for k, _ in timed_kernels(target.runtime, runtime_nodes(target.runtime, path))
        )
        differ = (predicted - executed) + (executed - predicted)
        allowed = KNOWN.get((name, target_name), set())
        assert {kernel for kernel in differ if kernel[0] not in allowed} == set(), precision
        assert sum(differ.values()) <= 2 * len(allowed), precision
        assert sum(executed.values()) > 4


def test_macs_are_those_of_torchs_counter():
    module, shape = probe("depthwise", 1)
    net = Network(module, torch.zeros(1, *shape))
    kernels = kernels_of(trace(module, [shape]), "openvino", None)
    assert sum(k.macs for k in kernels) == net.macs


def test_a_trace_needs_no_values_and_changes_nothing():
    module, shape = probe("dense", 6)
    module.train()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    full = trace(module, [shape])
    with torch.device("meta"):
        meta, _ = probe("dense", 6)
    assert [(op.kind, op.shape) for op in full] == [(o.kind, o.shape) for o in trace(meta, [shape])]
    assert module.training
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


@pytest.mark.parametrize(("shape", "left"), [((6, 1, 1), 0), ((8,), 1), ((6, 8, 8), 1)])
def test_a_factor_for_each_channel_is_in_the_layer_before(shape: tuple[int, ...], left: int):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gamma = nn.Linear(3, 6), nn.Parameter(torch.ones(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gamma * self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    kinds = Counter(op.kind for op in trace(Scaled(), [(3, 8, 8)]))
    assert (kinds["linear"], kinds["mul"]) == (1, left)


def test_shapes_are_torchs_own():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, (3, 5), (2, 1), (0, 2), dilation=2), nn.Conv2d(6, 6, 1)
            self.up = nn.ConvTranspose2d(6, 5, 3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.max_pool2d(self.b(self.a(x)).relu_(), 3, 2, 1, ceil_mode=True)
            z = nn.functional.avg_pool2d(self.up(y), 2)
            return torch.cat([z, z * z.mean((2, 3), keepdim=True)], 1).flatten(2).transpose(1, 2)

    module = Odd().eval()
    traced = [op.shape for op in trace(module, [(3, 33, 20)]) if op.kind not in ("input", "output")]
    assert traced[-1] == tuple(module(torch.zeros(1, 3, 33, 20)).shape)


def test_a_branch_on_values_is_refused_by_name():
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="Branching does not run without values"):
        trace(Branching(), [(3, 8, 8)])


def test_a_runtime_without_rules_is_named():
    with pytest.raises(TargetError, match="no fusion rules for runtime 'onnxruntim'; did you mean"):
        kernels_of(trace(nn.Conv2d(3, 8, 3), [(3, 8, 8)]), "onnxruntim", None)
