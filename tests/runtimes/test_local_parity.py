"""Local parity: sound artifacts are exact, and what is wrong is found where it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from edgekd.latency import runtime_graph
from edgekd.latency.runtime_graph import RuntimeNode, runtime_nodes
from edgekd.network import Network
from edgekd.quantization.calibration import round_biases
from edgekd.quantization.placement import quantized_activations, quantizers
from edgekd.runtimes import local_parity as module
from edgekd.runtimes.base import Artifact, get_runtime
from edgekd.runtimes.local_parity import LocalParity, local_parity
from edgekd.runtimes.onnxruntime import OnnxRuntime
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.target import Target

Batches = list[tuple[Tensor, Tensor]]
Change = Callable[[onnx.ModelProto], None]


def local(path: Path, net: Network, x: Tensor, *, shipped: bool) -> LocalParity:
    """Of a file for ONNX Runtime."""
    written, fused = (OnnxRuntime().load(path, threads=1, emulated=e) for e in (True, False))
    return local_parity(net, [x], written=written, shipped=fused if shipped else None)


def assert_sound(found: LocalParity) -> None:
    for ran in found.passes.values():
        assert ran.first is None
        assert ran.tensors == ran.of
        assert ran.exact >= 0.999
        assert ran.max_steps <= 1


def test_a_runtime_that_shows_no_inner_tensors_is_skipped_with_the_reason(
    quantized: Network, batches: Batches, int8_artifact: Artifact
):
    session = OnnxRuntime().load(int8_artifact.path, threads=1)
    session.tensors = lambda inputs, names: {}  # type: ignore[method-assign]
    found = local_parity(quantized, [batches[0][0][:2]], written=None, shipped=session)
    assert found.passes == {}
    assert found.skipped == "the runtime shows no inner tensors; outputs alone are compared"


# ---- sound ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantized", "quantized_mobile"])
def test_a_sound_artifact_is_exact_as_written_and_as_shipped(
    name: str, host: Target, batches: Batches, tmp_path: Path, request: pytest.FixtureRequest
):
    net: Network = request.getfixturevalue(name)
    artifact = export(net, target=host, out=tmp_path)
    found = local(artifact.path, net, batches[-1][0], shipped=True)
    assert list(found.passes) == ["as written", "as shipped"]
    assert_sound(found)
    # every quantized activation, and the output, which is float
    assert found.n == 64
    assert found.as_written.of == len(quantized_activations(net.module)) + 1  # type: ignore[arg-type]
    assert LocalParity.model_validate_json(found.model_dump_json()) == found


def test_a_symmetric_scheme_with_float_biases(trained: Network, batches: Batches, tmp_path: Path):
    net = quantize(trained, target="jetson-orin-nano", data=batches, accelerator="cpu")
    artifact = export(net, target="jetson-orin-nano", out=tmp_path)
    found = local(artifact.path, net, batches[-1][0], shipped=False)
    assert found.as_shipped is None
    assert_sound(found)


def test_signed_activations_export_to_both_flavours(
    trained: Network, host: Target, batches: Batches, tmp_path: Path
):
    assert host.scheme is not None
    scheme = host.scheme.model_copy(update={"activation_dtype": "int8"})
    signed = host.model_copy(update={"scheme": scheme})
    net = quantize(trained, target=signed, data=batches, accelerator="cpu")
    x = batches[-1][0]
    outputs = []
    for target, dtype in ((signed, np.int8), (host, np.uint8)):
        path = export(net, target=target, out=tmp_path / dtype.__name__).path
        session = OnnxRuntime().load(path, threads=1, emulated=True)
        outputs.append(session([x.numpy()])[0])
        model = onnx.load(path)
        zero = producer(model, convolution(model, 0).input[0]).input[2]
        assert constant(model, zero).dtype == dtype
        assert_sound(local(path, net, x, shipped=True))
    np.testing.assert_array_equal(*outputs)


def test_several_outputs_and_an_activation_that_is_read_twice(host: Target, tmp_path: Path):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.first(x).relu()
            y = torch.cat([x, self.second(x).relu()], 1)
            return {"scores": self.head(y[:, :8].mean((2, 3))), "map": y}

    torch.manual_seed(0)
    net = quantize(
        Network(Heads(), torch.zeros(1, 3, 8, 8)), target=host, data=[torch.randn(32, 3, 8, 8)],
        accelerator="cpu",
    )  # fmt: skip
    artifact = export(net, target=host, out=tmp_path)
    written = [output.name for output in onnx.load(artifact.path).graph.output]
    assert written == ["scores", "map"]  # the second one is dequantized, and keeps its name
    assert_sound(local(artifact.path, net, torch.randn(8, 3, 8, 8), shipped=True))


class Between(nn.Module):
    """What `function` makes of two convolutions, between integers."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.second = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.last, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.first(x), self.second(x)).relu()
        return self.head(self.last(y).mean((2, 3)))


def between(
    function: Callable[[Tensor, Tensor], Tensor], target: Target, folder: Path, second: float = 1.0
) -> list[RuntimeNode]:
    """The kernels of an artifact that is sound, operator by operator and from end to end."""
    torch.manual_seed(0)
    module = Between(function)
    with torch.no_grad():
        for parameter in module.second.parameters():
            parameter.mul_(second)
    net = quantize(
        Network(module, torch.zeros(1, 3, 16, 16)), target=target,
        data=[torch.randn(16, 3, 16, 16)], accelerator="cpu",
    )  # fmt: skip
    path = export(net, target=target, out=folder).path
    runtime, x = get_runtime(target.runtime), torch.randn(8, 3, 16, 16)
    shipped = runtime.load(path, threads=1)
    written = runtime.load(path, threads=1, emulated=True) if runtime.plain else None
    assert_sound(local_parity(net, [x], written=written, shipped=shipped))
    with torch.no_grad():
        ours = net(x).numpy()
    step = np.abs(ours).max() / 127
    assert np.abs(shipped([x.numpy()])[0] - ours).mean() / step < 0.02
    assert shipped.integer_share()[0] == 4
    return runtime_nodes(target.runtime, path)


def test_a_difference_is_a_convolutions_own_where_the_runtime_fuses_it(
    host: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A quantizer inside OpenVINO's fused kernel, which does not round, costs 0.1 steps here."""
    pytest.importorskip("openvino")
    monkeypatch.setattr(runtime_graph, "RUNS", 2)
    nodes = between(lambda a, b: a - b, host, tmp_path / "onnxruntime")
    (own,) = [node for node in nodes if node.operator == "Sub"]
    assert set(own.types) == {"float"}  # it has no integer kernel
    nodes = between(lambda a, b: a - b, Target.load("intel-cpu"), tmp_path / "openvino")
    (kernel,) = [n for n in nodes if "node_sub" in n.attributes["originalLayersNames"]]
    assert (kernel.operator, kernel.types[0]) == ("Convolution", "u8")


def test_a_branch_of_almost_nothing_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As ConvNeXt's are before training, times 1e-6: OpenVINO takes ends within 1e-6 of 0 for 0."""
    pytest.importorskip("openvino")
    monkeypatch.setattr(runtime_graph, "RUNS", 2)
    between(torch.add, Target.load("intel-cpu"), tmp_path, second=5e-7)


def test_silu_and_sigmoid_are_looked_up_by_onnxruntime_and_gelu_is_one_operator(
    host: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runtime_graph, "RUNS", 2)
    nodes = between(lambda a, b: F.silu(a) + b.sigmoid() * b, host, tmp_path / "silu")
    kinds = Counter(node.operator for node in nodes)
    assert [kinds[f"com.microsoft:QLinear{name}"] for name in ("Sigmoid", "Mul")] == [2, 2]
    assert not kinds.keys() & {"Sigmoid", "com.microsoft:QuickGelu", "Mul"}
    nodes = between(lambda a, b: F.gelu(a) + b, host, tmp_path / "gelu")
    kinds = Counter(node.operator for node in nodes)
    assert (kinds["Gelu"], kinds["Erf"]) == (1, 0)


def test_attention_is_one_integer_kernel_of_openvinos(tmp_path: Path):
    pytest.importorskip("openvino")
    target = Target.load("intel-cpu-vnni")
    if not target.native_here:
        pytest.skip(f"{target.name} needs {target.needs}")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.last = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(-1, 16, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
            out: Tensor = self.last(y.transpose(1, 2).reshape(-1, 16, 32))
            return out

    torch.manual_seed(0)
    x = torch.randn(16, 16, 32)
    net = quantize(
        Network(Block(), torch.zeros(1, 16, 32)), target=target, data=[x], accelerator="cpu"
    )
    path = export(net, target=target, out=tmp_path).path
    session = get_runtime("openvino").load(path, threads=1)
    assert session.integer_share() == (4, 4)
    ran = local_parity(net, [x[:8]], written=None, shipped=session).as_shipped
    assert ran is not None and (ran.first, ran.max_steps <= 1, ran.exact >= 0.999) == (
        None,
        True,
        True,
    )
    # the product takes the transposition of the keys along, the attention's is in front of its
    # quantizer
    assert ran.tensors == ran.of - 3


@pytest.mark.parametrize("name", ["host-onnxruntime", "intel-cpu"])
def test_bilinear_resizes_are_exact_in_float_between_integers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("openvino")
    monkeypatch.setattr(runtime_graph, "RUNS", 2)

    def resized(a: Tensor, b: Tensor) -> Tensor:
        by_factor = F.interpolate(a, scale_factor=1.5, mode="bilinear")
        to_size = F.interpolate(b, (24, 24), mode="bilinear", align_corners=True)
        return torch.cat([by_factor[:, :4], to_size[:, 4:]], 1)

    nodes = between(resized, Target.load(name), tmp_path)
    types = [node.types[0] for node in nodes if node.operator in ("Resize", "Interpolate")]
    assert types in (["float"] * 2, ["f32"] * 2)


def test_openvinos_operators_are_exact_and_a_kernel_that_showing_unfuses_is_told(
    trained: Network, batches: Batches, tmp_path: Path
):
    pytest.importorskip("openvino")
    target = Target.load("intel-cpu")
    assert target.scheme is not None
    x = batches[-1][0]
    for add_inputs, same in (("skip", True), ("both", False)):
        scheme = target.scheme.model_copy(update={"add_inputs": add_inputs})
        here = target.model_copy(update={"scheme": scheme})
        net = quantize(trained, target=here, data=batches, accelerator="cpu")
        path = export(net, target=here, out=tmp_path / add_inputs).path
        session = get_runtime("openvino").load(path, threads=1)
        found = local_parity(net, [x], written=None, shipped=session)
        assert list(found.passes) == ["as shipped"]
        # a quantizer between a convolution and its Add clips in the fused kernel, and rounds shown
        assert any("unfused" in cause for cause in found.passes["as shipped"].causes) != same
        if same:
            assert_sound(found)


class Pyramid(nn.Module):
    """Two scales joined as a feature pyramid joins them: a ReLU in front of the Add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.lateral, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        up = F.interpolate(self.deep(x).relu(), scale_factor=2)
        return self.head(self.lateral(x).relu() + up)


def test_openvino_takes_a_sum_into_a_convolution_and_its_relu(tmp_path: Path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    target = Target.load("intel-cpu")
    x = torch.randn(4, 1, 32, 32)
    assert target.scheme is not None
    for add_inputs, same in (("skip-activated", True), ("skip", False)):
        scheme = target.scheme.model_copy(update={"add_inputs": add_inputs})
        here = target.model_copy(update={"scheme": scheme})
        net = quantize(Network(Pyramid(), x[:1]), target=here, data=[x], accelerator="cpu")
        path = export(net, target=here, out=tmp_path / add_inputs).path
        session = get_runtime("openvino").load(path, threads=1)
        found = local_parity(net, [x], written=None, shipped=session).passes["as shipped"]
        assert any("unfused" in cause for cause in found.causes) != same
        assert found.max_steps <= 1


class Residual(nn.Module):
    """A skip that a branch of one or two convolutions reads, and that is added behind it."""

    def __init__(self, kind: type[nn.Module], groups: int, deep: bool) -> None:
        super().__init__()
        self.stem = kind(3, 8, 3, padding=1)
        self.first = kind(8, 8, 1) if deep else nn.Identity()
        self.branch, self.head = kind(8, 8, 3, padding=1, groups=groups), kind(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        y: torch.Tensor = self.head((x + self.branch(self.first(x).relu())).relu())
        return y


@pytest.mark.parametrize(
    ("target", "kind", "groups", "deep", "adds"),
    [
        ("intel-cpu", nn.Conv2d, 1, True, "Convolution"),
        ("intel-cpu-vnni", nn.Conv2d, 1, True, "Convolution"),
        ("intel-cpu-vnni", nn.Conv2d, 2, True, "Convolution"),
        ("intel-cpu-vnni", nn.Conv2d, 8, True, "Convolution"),
        ("intel-cpu-vnni", nn.Conv1d, 1, True, "Convolution"),
        ("intel-cpu-vnni", nn.Conv3d, 1, True, "Convolution"),
        ("intel-cpu-vnni", nn.Conv2d, 1, False, "Subgraph"),  # not over what it reads itself
        ("intel-igpu", nn.Conv2d, 1, True, "Subgraph"),  # other devices would round
    ],
)
def test_openvino_adds_a_skip_inside_the_convolution_and_rounds_nothing_before(
    target: str, kind: type[nn.Module], groups: int, deep: bool, adds: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    pytest.importorskip("openvino")
    monkeypatch.setattr(runtime_graph, "RUNS", 2)
    torch.manual_seed(0)
    sides = (12,) * {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    x = torch.randn(16, 3, *sides)
    net = quantize(
        Network(Residual(kind, groups, deep), x[:1]), target=target, data=[x], accelerator="cpu"
    )
    path = export(net, target=target, out=tmp_path).path
    session = get_runtime("openvino").load(path, threads=1)
    with torch.no_grad():
        ours = net(x).numpy()
    step = np.abs(ours).max() / 127
    assert np.abs(session([x.numpy()])[0] - ours).mean() / step < 0.005
    assert_sound(local_parity(net, [x], written=None, shipped=session))
    kernels = [
        node.operator
        for node in runtime_nodes("openvino", path)
        if "node_add" in node.attributes["originalLayersNames"]
    ]
    assert kernels == [adds]


class PaddedAverage(nn.Module):
    """Of a convolution; the averages at the border count its padding."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem, self.activation = nn.Conv2d(3, 16, 3, 2, 1), activation
        self.average, self.head = nn.AvgPool2d(3, 2, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.average(self.activation(self.stem(x))))
        return y


class CosineAttention(nn.Module):
    """Keys have no bias, and a window may be all padding: Swin V2's, arXiv:2111.09883."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 16)
        nn.init.zeros_(self.qkv.bias[16:32])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(F.pad(x, (0, 0, 0, 4))).chunk(3, -1)
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)
        y: torch.Tensor = self.head((8 * cosines).softmax(-1) @ v)
        return y


@pytest.mark.parametrize(
    ("module", "shape", "padded"),
    [
        (lambda: PaddedAverage(nn.Identity()), (3, 32, 32), 1),
        (lambda: PaddedAverage(nn.ReLU()), (3, 32, 32), 0),  # its zero is the integer 0
        (CosineAttention, (12, 16), 1),
    ],
)
def test_zeros_are_zeros_in_openvino(
    module: Callable[[], nn.Module], shape: tuple[int, ...], padded: int, tmp_path: Path
):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(4, *shape)
    net = quantize(Network(module(), x[:1]), target="intel-cpu", data=[x], accelerator="cpu")
    path = export(net, target="intel-cpu", out=tmp_path / "vino").path
    session = get_runtime("openvino").load(path, threads=1)
    assert local_parity(net, [x], written=None, shipped=session).passes["as shipped"].max_steps <= 1
    assert path.read_text().count('type="Pad"') == padded


# ---- what is wrong is found where it is ----------------------------------------------------------


def tampered(artifact: Artifact, folder: Path, change: Change) -> Path:
    model = onnx.load(artifact.path)
    change(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def constant(model: onnx.ModelProto, name: str) -> np.ndarray[Any, Any]:
    (found,) = [c for c in model.graph.initializer if c.name == name]
    return numpy_helper.to_array(found).copy()


def set_input(model: onnx.ModelProto, node: onnx.NodeProto, index: int, array: Any) -> None:
    """A constant of the node's own: others may share the one that it reads."""
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), "tampered"))
    node.input[index] = "tampered"


def producer(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = [n for n in model.graph.node if name in n.output]
    return node


def convolution(model: onnx.ModelProto, index: int) -> onnx.NodeProto:
    return [n for n in model.graph.node if n.op_type == "Conv"][index]


def triple_a_scale(model: onnx.ModelProto) -> None:
    """Of the activation that the fourth convolution reads."""
    node = producer(model, convolution(model, 3).input[0])
    set_input(model, node, 1, constant(model, node.input[1]) * np.float32(3))


def move_a_zero_point(model: onnx.ModelProto) -> None:
    node = producer(model, convolution(model, 3).input[0])
    set_input(model, node, 2, constant(model, node.input[2]) + np.uint8(4))


def change_a_weight(model: onnx.ModelProto) -> None:
    node = producer(model, convolution(model, 3).input[1])
    weight = constant(model, node.input[0])
    weight[2, 1, 1, 1] += 64 if weight[2, 1, 1, 1] < 0 else -64
    set_input(model, node, 0, weight)


def move_a_bias(model: onnx.ModelProto) -> None:
    node = producer(model, convolution(model, 3).input[2])
    bias = constant(model, node.input[0])
    bias[5] += 4000
    set_input(model, node, 0, bias)


def change_the_head(model: onnx.ModelProto) -> None:
    (head,) = [n for n in model.graph.node if n.op_type == "Gemm"]
    node = producer(model, head.input[1])
    weight = constant(model, node.input[0])
    weight[0, 0] += 64 if weight[0, 0] < 0 else -64
    set_input(model, node, 0, weight)


def where_it_is(artifact: Artifact, change: Change) -> str:
    """Name of the tensor that the change makes wrong first."""
    model = onnx.load(artifact.path)
    if change is change_the_head:
        return "linear"
    fourth = convolution(model, 3)
    name = fourth.input[0]
    if change in (change_a_weight, move_a_bias):  # on to the quantizer behind it
        name = fourth.output[0]
        while not name.startswith("quant."):
            (name,) = [n.output[0] for n in model.graph.node if name in n.input]
    return name.removeprefix("quant.")


@pytest.mark.parametrize(
    "change",
    [triple_a_scale, move_a_zero_point, change_a_weight, move_a_bias, change_the_head],
    ids=lambda change: change.__name__,
)
def test_a_tampered_artifact_is_found_out_at_the_first_wrong_tensor(
    change: Change, int8_artifact: Artifact, quantized: Network, batches: Batches, tmp_path: Path
):
    path = tampered(int8_artifact, tmp_path, change)
    found = local(path, quantized, batches[-1][0], shipped=False).as_written
    wrong = where_it_is(int8_artifact, change)
    assert found.max_steps > 1
    assert found.first is not None
    assert found.first.startswith(f"{wrong} (")
    # everything else reads what the runtime has, and is right
    assert [d.tensor for d in found.worst if d.max_steps > 1] == [wrong]


def test_the_first_wrong_operator_is_named_with_what_it_reads(
    int8_artifact: Artifact, quantized: Network, batches: Batches, tmp_path: Path
):
    path = tampered(int8_artifact, tmp_path, change_the_head)
    found = local(path, quantized, batches[-1][0][:8], shipped=False).as_written
    assert found.first is not None
    assert found.first.startswith("linear (linear) is off by ")
    head = next(k for k, v in quantized.module.named_parameters() if v.shape == (4, 16))
    assert f"{head} (4, 16)" in found.first
    assert "(8, 16)" in found.first


# ---- the figures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_convolution(host: Target) -> tuple[Network, Tensor]:
    """A convolution with a bias whose int32 steps are coarse beside its output's."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    net = quantize(
        Network(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)), target=host, data=[x],
        accelerator="cpu",
    )  # fmt: skip
    for name, scale in (("input_1", 0.5), ("weight", 0.25), ("conv2d", 0.0625)):
        quantizers(net.module)[name].scale.data.fill_(scale)  # type: ignore[arg-type]
    round_biases(net.module)  # type: ignore[arg-type]
    return net, x


def test_counts_are_numpys(one_convolution: tuple[Network, Tensor], host: Target, tmp_path: Path):
    net, x = one_convolution
    artifact = export(net, target=host, out=tmp_path)
    path = tampered(artifact, tmp_path, change_first_weight)
    found = local(path, net, x, shipped=False).as_written
    # the convolution over the integers, as sums of windows
    q = quantizers(net.module)  # type: ignore[arg-type]
    zero = int(q["input_1"].zero_point)
    integers = np.clip(np.rint(x.numpy() / 0.5) + zero, 0, 255).astype(np.int64) - zero
    weight, bias = (p.detach().numpy() for p in (net.module.weight, net.module.bias))
    weight = np.clip(np.rint(weight / 0.25), -63, 63).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(integers, (3, 3), (2, 3))
    steps = np.einsum("nchwij,ocij->nohw", windows, weight)
    steps = steps + np.rint(bias / 0.125).astype(np.int64)[:, None, None]
    zero = int(q["conv2d"].zero_point)
    ours = np.clip(np.rint(steps * 0.125 / 0.0625) + zero, 0, 255)
    session = OnnxRuntime().load(path, threads=1, emulated=True)
    (theirs,) = session([x.numpy()])
    difference = np.abs(ours - zero - theirs / 0.0625)
    assert difference.max() > 1
    (worst,) = found.worst
    assert (worst.tensor, worst.elements, worst.unequal, worst.max_steps) == (
        "conv2d", difference.size, (difference > 0).sum(), difference.max(),
    )  # fmt: skip
    assert worst.mean_steps == pytest.approx(difference.mean())
    assert found.exact == pytest.approx(1 - worst.unequal / (difference.size + x.numel()))


def change_first_weight(model: onnx.ModelProto) -> None:
    node = producer(model, convolution(model, 0).input[1])
    weight = constant(model, node.input[0])
    weight[1, 0, 0, 0] += 3
    set_input(model, node, 0, weight)


def test_a_bias_that_int32_cannot_hold_shows(
    one_convolution: tuple[Network, Tensor], host: Target, tmp_path: Path
):
    net, x = one_convolution
    artifact = export(net, target=host, out=tmp_path)
    found = local(artifact.path, net, x, shipped=True)
    assert [ran.exact for ran in found.passes.values()] == [1.0, 1.0]
    between = net.copy()
    with torch.no_grad():
        between.module.bias.add_(0.4 * 0.125)  # type: ignore[union-attr,operator]  # of a step
    artifact = export(between, target=host, out=tmp_path)
    found = local(artifact.path, between, x, shipped=True)
    assert all(ran.exact < 0.9 and ran.max_steps == 1 for ran in found.passes.values())


def test_symmetric_activations_saturate_where_the_file_does(tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    net = quantize(
        Network(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)), target="jetson-orin-nano", data=[x],
        accelerator="cpu",
    )  # fmt: skip
    artifact = export(net, target="jetson-orin-nano", out=tmp_path)
    session = OnnxRuntime().load(artifact.path, threads=1, emulated=True)
    (first,) = session.tensors([3 * x.numpy()], ["quant.input_1"]).values()
    scale = quantizers(net.module)["input_1"].scale.item()  # type: ignore[arg-type]
    assert np.rint(first / scale).min() == -128
    assert local(artifact.path, net, 3 * x, shipped=False).as_written.exact == 1


@pytest.mark.parametrize(
    ("instructions", "bits", "explained"),
    [("avx2", 8, True), ("avx512f", 8, True), ("avx2", 7, False), ("avx512_vnni", 8, False)],
)
def test_saturation_is_explained_where_it_is_possible(
    instructions: str, bits: int, explained: bool, int8_artifact: Artifact, quantized: Network,
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(module, "host_instruction_set", lambda: instructions)
    assert quantized.scheme is not None
    scheme = quantized.scheme.model_copy(update={"weight_bits": bits})
    net = quantized.quantized(quantized.module, scheme)  # type: ignore[arg-type]
    path = tampered(int8_artifact, tmp_path, change_a_weight)
    found = local(path, net, batches[0][0][:8], shipped=True)
    assert found.as_shipped is not None
    assert found.as_shipped.max_steps > 1
    assert any("vpmaddubsw" in cause for cause in found.as_shipped.causes) == explained
    assert found.as_written.causes == ()  # float kernels do not saturate


class Dense(nn.Module):
    """Each layer reads all that came before, Huang et al. 2016, arXiv:1608.06993."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.head = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(48, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x).relu()
        b = self.b(a).relu()
        c = self.c(torch.cat([a, b], 1)).relu()
        y: torch.Tensor = self.head(torch.cat([a, b, c], 1))
        return y


def test_openvino_quantizes_what_a_concatenation_joins_inside_its_layers(tmp_path: Path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    net = quantize(Network(Dense(), x[:1]), target="intel-cpu", data=[x], accelerator="cpu")
    path = export(net, target="intel-cpu", out=tmp_path / "vino").path
    session = get_runtime("openvino").load(path, threads=1)
    local = local_parity(net, [x], written=None, shipped=session).passes["as shipped"]
    assert local.max_steps <= 1
    # the conversion drops the names of what only concatenations read, not those of concatenations
    assert local.tensors == local.of - 2
    kinds = Counter(node.operator for node in runtime_nodes("openvino", path))
    assert kinds["Concatenation"] == 2
    # the input's quantizer is one; all others run inside convolutions
    assert (kinds["Subgraph"], kinds["FakeQuantize"]) == (1, 0)
