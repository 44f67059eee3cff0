"""Which tensors get a quantizer, operator by operator, and what the digest sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.errors import ModelError
from edgekd.quantization.calibration import calibrate
from edgekd.quantization.capture import capture
from edgekd.quantization.convert import convert
from edgekd.quantization.placement import (
    KINDS,
    describe,
    digest,
    intended_matrix_ops,
    left_in_float,
    place,
    quantized_activations,
    quantizers,
    training_graph,
    upper_bound,
)
from edgekd.target import QuantScheme, Target

Function = Callable[[Any, Tensor], Tensor]


class Layers(nn.Module):
    """Four layers to make small graphs of: `a` and `b` keep 4 channels."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.wide = nn.Conv2d(8, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.same1, self.same3 = (conv(4, 4, 1, padding="same") for conv in (nn.Conv1d, nn.Conv3d))
        self.up1, self.up2, self.up3 = (
            up(4, 4, 2, stride=2)
            for up in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        )
        self.one, self.three = nn.Conv1d(4, 4, 3), nn.Conv3d(4, 4, 1)
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.flat = nn.Linear(256, 3)
        self.relu6, self.zero_pad = nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@dataclass
class Case:
    """A graph, its quantized activations in order, and groups that share one quantizer."""

    function: Function
    activations: list[str]
    weights: list[str] = field(default_factory=lambda: ["a_weight"])
    shared: list[list[str]] = field(default_factory=list)
    bounds: dict[str, float] = field(default_factory=dict)
    shape: tuple[int, ...] = (4, 8, 8)


def split(m: Layers, x: Tensor) -> Tensor:
    y = m.a(x)
    return F.relu(y) + y


AB = ["a_weight", "b_weight"]
CASES = {
    # convolutions and linear layers: input, weight, output
    "conv": Case(lambda m, x: m.a(x), ["x", "conv2d"]),
    "depthwise": Case(lambda m, x: m.depthwise(x), ["x", "conv2d"], ["depthwise_weight"]),
    "conv, padding same": Case(lambda m, x: m.same(x), ["x", "conv2d"], ["same_weight"]),
    "conv1d": Case(lambda m, x: m.one(x), ["x", "conv1d"], ["one_weight"], shape=(4, 8)),
    "conv3d": Case(lambda m, x: m.three(x), ["x", "conv3d"], ["three_weight"], shape=(4, 2, 2, 2)),
    "conv1d, padding same": Case(
        lambda m, x: m.same1(x), ["x", "conv1d"], ["same1_weight"], shape=(4, 8)
    ),
    "conv3d, padding same": Case(
        lambda m, x: m.same3(x), ["x", "conv3d"], ["same3_weight"], shape=(4, 2, 2, 2)
    ),
    "linear at the end gives floats": Case(
        lambda m, x: m.head(x), ["x"], ["head_weight"], shape=(4,)
    ),
    "linear in the middle": Case(
        lambda m, x: m.head(m.linear(x)), ["x", "linear"], ["linear_weight", "head_weight"],
        shape=(4,),
    ),
    # what fuses: the quantizer goes behind the activation
    "conv relu": Case(lambda m, x: F.relu(m.a(x)), ["x", "relu"]),
    "linear relu": Case(
        lambda m, x: m.head(F.relu(m.linear(x))), ["x", "relu"],
        ["linear_weight", "head_weight"], shape=(4,),
    ),
    "linear relu in front of an operator in float": Case(
        lambda m, x: torch.tanh(F.relu(m.linear(x))), ["x", "relu"], ["linear_weight"], shape=(4,)
    ),
    "linear read by both": Case(
        lambda m, x: (y := m.linear(x)) + torch.tanh(m.linear(y)), ["x", "linear", "tanh", "add"],
        shape=(4,), weights=["linear_weight"],
    ),
    "linear relu at the end gives floats": Case(
        lambda m, x: F.relu(m.linear(x)), ["x"], ["linear_weight"], shape=(4,)
    ),
    "conv relu6": Case(
        lambda m, x: m.relu6(m.a(x)), ["x", "hardtanh"], bounds={"hardtanh": 6}
    ),
    "conv relu6, functional": Case(
        lambda m, x: F.relu6(m.a(x)), ["x", "relu6"], bounds={"relu6": 6}
    ),
    "conv clamp": Case(lambda m, x: m.a(x).clamp(0, 4), ["x", "clamp"], bounds={"clamp": 4}),
    "conv clamp from below only": Case(lambda m, x: m.a(x).clamp(min=0), ["x", "clamp"]),
    "clamp that is no ReLU": Case(lambda m, x: m.a(x).clamp(-1, 1), ["x", "conv2d"]),
    "conv leaky relu": Case(
        lambda m, x: m.b(F.leaky_relu(m.a(x))), ["x", "conv2d", "leaky_relu", "conv2d_1"], AB
    ),
    "conv read twice": Case(split, ["x", "conv2d", "relu", "add"]),
    # add: both inputs and the output
    "add": Case(lambda m, x: m.a(x) + x, ["x", "conv2d", "add"]),
    "add relu": Case(lambda m, x: F.relu(m.a(x) + x), ["x", "conv2d", "relu"]),
    "add relu6": Case(
        lambda m, x: m.relu6(m.a(x) + m.b(x)), ["x", "conv2d", "conv2d_1", "hardtanh"], AB,
        bounds={"hardtanh": 6},
    ),
    "sub relu": Case(lambda m, x: F.relu(m.a(x) - x), ["x", "conv2d", "relu"]),
    "sub of a number stays float": Case(
        lambda m, x: m.b(m.a(x) - 1.5), ["x", "conv2d", "sub", "conv2d_1"], AB
    ),
    "add of floats stays float": Case(
        lambda m, x: m.a(torch.tanh(x) + torch.sigmoid(x)), ["add", "conv2d"]
    ),
    "add of a number stays float": Case(
        lambda m, x: m.b(m.a(x) + 1.5), ["x", "conv2d", "add", "conv2d_1"], AB
    ),
    "add of a parameter stays float": Case(
        lambda m, x: m.a(x) + m.a.bias.view(4, 1, 1), ["x", "conv2d"]
    ),
    # concat and pools: inputs and output
    "concat": Case(
        lambda m, x: m.wide(torch.cat([m.a(x), x], 1)),
        ["x", "conv2d", "cat", "conv2d_1"], ["a_weight", "wide_weight"], [["x", "conv2d", "cat"]],
    ),
    "concat of ReLUs": Case(
        lambda m, x: m.wide(torch.cat([F.relu(m.a(x)), F.max_pool2d(F.relu(m.b(x)), 1)], 1)),
        ["x", "relu", "relu_1", "max_pool2d", "cat", "conv2d_2"], [*AB, "wide_weight"],
        [["relu", "relu_1", "max_pool2d", "cat"]],
    ),
    "concat of a ReLU and another": Case(
        lambda m, x: m.wide(torch.cat([F.relu(m.a(x)), m.b(x)], 1)),
        ["x", "relu", "conv2d_1", "cat", "conv2d_2"], [*AB, "wide_weight"],
    ),
    "average pool": Case(
        lambda m, x: F.avg_pool2d(m.a(x), 2), ["x", "conv2d", "avg_pool2d"]
    ),
    "adaptive average pool": Case(
        lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1), ["x", "conv2d", "adaptive_avg_pool2d"]
    ),
    "mean": Case(lambda m, x: m.a(x).mean((2, 3)), ["x", "conv2d", "adaptive_avg_pool2d_default"]),
    "mean that keeps its axes": Case(
        lambda m, x: m.a(x).mean((-1, -2), keepdim=True), ["x", "conv2d", "mean"]
    ),
    "mean over channels stays float": Case(lambda m, x: m.a(x).mean(1), ["x", "conv2d"]),
    "pool of floats stays float": Case(
        lambda m, x: m.b(F.adaptive_avg_pool2d(torch.tanh(m.a(x)), 1)),
        ["x", "conv2d", "adaptive_avg_pool2d", "conv2d_1"], AB,
    ),
    # squeeze-excite: the product of two activations
    "mul": Case(
        lambda m, x: (y := m.a(x)) * torch.sigmoid(F.adaptive_avg_pool2d(y, 1)),
        ["x", "conv2d", "adaptive_avg_pool2d", "sigmoid", "mul"],
    ),
    "mul of a number stays float": Case(lambda m, x: m.a(x) * 1.5, ["x", "conv2d"]),
    "mul of floats stays float": Case(
        lambda m, x: m.a(torch.tanh(x) * torch.sigmoid(x)), ["mul", "conv2d"]
    ),
    # operators that hand integers through share their input's quantizer
    "max pool": Case(
        lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 2)),
        ["x", "relu", "max_pool2d", "conv2d_1"], AB, [["relu", "max_pool2d"]],
    ),
    "two max pools": Case(
        lambda m, x: m.b(F.max_pool2d(F.max_pool2d(m.a(x), 2), 2)),
        ["x", "conv2d", "max_pool2d", "max_pool2d_1", "conv2d_1"], AB,
        [["conv2d", "max_pool2d", "max_pool2d_1"]],
    ),
    "max pool behind a relu6": Case(
        lambda m, x: m.b(F.max_pool2d(m.relu6(m.a(x)), 2)),
        ["x", "hardtanh", "max_pool2d", "conv2d_1"], AB, [["hardtanh", "max_pool2d"]],
        {"hardtanh": 6},
    ),
    "max pool at the end stays float": Case(
        lambda m, x: F.max_pool2d(m.a(x), 2), ["x", "conv2d"]
    ),
    "flatten": Case(
        lambda m, x: m.flat(m.a(x).flatten(1)), ["x", "conv2d", "flatten"],
        ["a_weight", "flat_weight"], [["conv2d", "flatten"]],
    ),
    "reshape": Case(
        lambda m, x: m.flat(m.a(x).reshape(-1, 256)), ["x", "conv2d", "reshape"],
        ["a_weight", "flat_weight"], [["conv2d", "reshape"]],
    ),
    "view": Case(
        lambda m, x: m.flat(m.a(x).view(-1, 256)), ["x", "conv2d", "view"],
        ["a_weight", "flat_weight"], [["conv2d", "view"]],
    ),
    "squeeze": Case(
        lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 1).squeeze((2, 3))),
        ["x", "conv2d", "adaptive_avg_pool2d", "squeeze"], ["a_weight", "head_weight"],
        [["adaptive_avg_pool2d", "squeeze"]],
    ),
    "zero pad": Case(
        lambda m, x: m.b(m.zero_pad(F.relu(m.a(x)))),
        ["x", "relu", "pad", "conv2d_1"], AB, [["relu", "pad"]],
    ),
    "pad of ones stays float": Case(
        lambda m, x: m.b(F.pad(F.relu(m.a(x)), (0, 1, 0, 1), value=1.0)),
        ["x", "relu", "pad", "conv2d_1"], AB,
    ),
    # these move numbers, on the way to a layer that is in integers
    "channels shuffled": Case(
        lambda m, x: m.b(m.a(x).view(-1, 2, 2, 8, 8).transpose(1, 2).reshape(-1, 4, 8, 8)),
        ["x", "conv2d", "reshape", "conv2d_1"], AB, [["conv2d", "reshape"]],
    ),
    "chunk, read as slices": Case(
        lambda m, x: m.wide(torch.cat([m.a(x).chunk(2, 1)[1], m.b(x), x[:, :2]], 1)),
        ["x", "conv2d", "getitem_1", "conv2d_1", "slice_2", "cat", "conv2d_2"],
        ["a_weight", "b_weight", "wide_weight"],
        [["x", "conv2d", "getitem_1", "conv2d_1", "slice_2", "cat"]],
    ),
    "permute, select, unsqueeze, squeeze": Case(
        lambda m, x: m.b(m.a(x).permute(0, 1, 3, 2).unsqueeze(1).squeeze(1).unsqueeze(0)[0]),
        ["x", "conv2d", "permute", "unsqueeze", "squeeze", "unsqueeze_1", "select", "conv2d_1"],
        AB, [["conv2d", "permute", "unsqueeze", "squeeze", "unsqueeze_1", "select"]],
    ),
    "channels shuffled by one operator": Case(
        lambda m, x: m.b(F.channel_shuffle(m.a(x), 2)),
        ["x", "conv2d", "channel_shuffle", "conv2d_1"], AB, [["conv2d", "channel_shuffle"]],
    ),
    "pixels shuffled and back": Case(
        lambda m, x: m.b(F.pixel_unshuffle(F.pixel_shuffle(m.a(x), 2), 2)),
        ["x", "conv2d", "pixel_shuffle", "pixel_unshuffle", "conv2d_1"], AB,
        [["conv2d", "pixel_shuffle", "pixel_unshuffle"]],
    ),
    "nearest upsampling": Case(
        lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2)),
        ["x", "conv2d", "upsample_nearest2d", "conv2d_1"], AB, [["conv2d", "upsample_nearest2d"]],
    ),
    "bilinear upsampling stays float": Case(
        lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2, mode="bilinear")),
        ["x", "conv2d", "upsample_bilinear2d", "conv2d_1"], AB,
    ),
    "unflatten": Case(
        lambda m, x: m.linear(m.one(x).unflatten(1, (2, 2))),
        ["x", "conv1d", "unflatten", "reshape_default"], ["one_weight", "linear_weight"],
        [["conv1d", "unflatten", "reshape_default"]], shape=(4, 6),
    ),
    # matrix products of activations: attention
    "matmul": Case(
        lambda m, x: m.linear(x) @ x.transpose(1, 2),
        ["x", "reshape_default", "linear_default", "linear", "transpose", "matmul"],
        ["linear_weight"],
        [["x", "reshape_default", "transpose"], ["linear_default", "linear"]], shape=(8, 4),
    ),
    "batched matmul": Case(
        lambda m, x: torch.bmm(x, torch.sigmoid(x)), ["x", "sigmoid", "bmm"], [], shape=(8, 8)
    ),
    "attention": Case(
        lambda m, x: F.scaled_dot_product_attention(x, torch.tanh(x), torch.sigmoid(x)),
        ["tanh", "sigmoid", "mul_tensor", "transpose_int", "matmul_default", "softmax_int",
         "scaled_dot_product_attention"], [], [["tanh", "transpose_int"]], shape=(2, 8, 4),
    ),
    "linear over tokens is one over rows": Case(
        lambda m, x: m.head(m.linear(x)),
        ["x", "reshape_default", "linear_default"],
        ["linear_weight", "head_weight"],
        [["x", "reshape_default"]],
        shape=(8, 4),
    ),
    "linear gives floats to an operator in float": Case(
        lambda m, x: m.head(torch.nn.functional.gelu(m.linear(x))),
        ["x", "reshape_default", "gelu_default"],
        ["linear_weight", "head_weight"],
        [["x", "reshape_default"]],
        shape=(8, 4),
    ),
    # an operator that no table knows, in the middle
    "sigmoid": Case(
        lambda m, x: m.b(torch.sigmoid(m.a(x))), ["x", "conv2d", "sigmoid", "conv2d_1"], AB
    ),
    "softmax": Case(
        lambda m, x: m.b(torch.softmax(m.a(x), 1)), ["x", "conv2d", "softmax", "conv2d_1"], AB
    ),
    "nothing to quantize": Case(lambda _, x: torch.sigmoid(x), [], []),
}  # fmt: skip


@cache
def captured(function: Function, shape: tuple[int, ...]) -> GraphModule:
    return capture(Layers(function), (torch.zeros(2, *shape),))


def graph_of(function: Function, shape: tuple[int, ...]) -> GraphModule:
    return copy.deepcopy(captured(function, shape))


def sharing(graph: GraphModule) -> list[list[str]]:
    """Names of quantized tensors that have one quantizer between them."""
    by_quantizer: dict[int, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            quantizer = graph.get_submodule(str(node.target))
            by_quantizer.setdefault(id(quantizer), []).append(node.args[0].name)
    return [names for names in by_quantizer.values() if len(names) > 1]


TRANSPOSED = {  # for schemes with "conv_transpose"
    "transposed": Case(
        lambda m, x: F.relu(m.up2(x)), ["x", "relu"], ["up2_weight"]
    ),
    "transposed, 1-d": Case(lambda m, x: m.up1(x), ["x", "conv_transpose1d"], ["up1_weight"],
                            shape=(4, 8)),
    "transposed, 3-d": Case(lambda m, x: m.up3(x), ["x", "conv_transpose3d"], ["up3_weight"],
                            shape=(4, 2, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *TRANSPOSED])
def test_which_tensors_are_quantized(name: str, scheme: QuantScheme):
    case = (CASES | TRANSPOSED)[name]
    scheme = scheme.model_copy(update={"ops": (*scheme.ops, "matmul", "conv_transpose", "sub")})
    graph = place(graph_of(case.function, case.shape), scheme)
    assert quantized_activations(graph) == case.activations
    assert sharing(graph) == case.shared
    placed = quantizers(graph)
    followers = {tensor for group in case.shared for tensor in group[1:]}
    first = [tensor for tensor in case.activations if tensor not in followers]
    assert sorted(placed) == sorted([*case.weights, *first])
    bounds = {t: q.max_value for t, q in placed.items() if q.max_value is not None}
    assert bounds == case.bounds
    for quantizer in placed.values():  # every one of them is reached
        quantizer.mode = "range"
    graph(torch.randn(3, *case.shape))
    assert all(quantizer.start() for quantizer in placed.values())


def test_every_operator_of_the_table_is_in_a_case():
    met = set()
    for case in (CASES | TRANSPOSED).values():
        graph = graph_of(case.function, case.shape)
        met |= {node.target for node in graph.graph.nodes}
    # torch.export writes pads as aten.pad; older programs hold constant_pad_nd
    assert {str(op) for op in KINDS} - {str(op) for op in met} == {"aten.constant_pad_nd.default"}


ALL = ("conv", "linear", "matmul", "add", "sub", "mul", "concat", "pool")


@pytest.mark.parametrize(
    ("kind", "case", "left"),
    [
        ("conv", "conv", []),
        ("linear", "linear in the middle", []),
        ("add", "add relu", ["x", "conv2d"]),
        ("sub", "sub relu", ["x", "conv2d"]),
        ("concat", "concat", ["x", "conv2d", "cat", "conv2d_1"]),
        ("pool", "mean", ["x", "conv2d"]),
        ("mul", "mul", ["x", "conv2d", "adaptive_avg_pool2d"]),
        ("matmul", "batched matmul", []),
    ],
)
def test_a_kind_that_the_scheme_leaves_out_stays_float(
    kind: str, case: str, left: list[str], scheme: QuantScheme
):
    without = scheme.model_copy(update={"ops": tuple(k for k in ALL if k != kind)})
    graph = place(graph_of(CASES[case].function, CASES[case].shape), without)
    assert quantized_activations(graph) == left


def test_operators_that_share_scales_have_one_quantizer(scheme: QuantScheme):
    shared = scheme.model_copy(update={"shared_scales": ("add", "concat")})
    graph = place(graph_of(CASES["concat"].function, (4, 8, 8)), shared)
    assert sharing(graph) == [["x", "conv2d", "cat"]]
    graph = place(graph_of(CASES["add relu"].function, (4, 8, 8)), shared)
    assert sharing(graph) == [["x", "conv2d", "relu"]]


def test_a_pooling_over_windows_shares_its_scale_and_one_over_the_map_does_not(
    scheme: QuantScheme,
):
    shared = scheme.model_copy(update={"shared_scales": ("pool",)})
    graph = place(graph_of(lambda m, x: F.avg_pool2d(m.a(x), 2), (4, 8, 8)), shared)
    assert ["conv2d", "avg_pool2d"] in sharing(graph)
    graph = place(graph_of(lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1), (4, 8, 8)), shared)
    assert all("adaptive_avg_pool2d" not in group for group in sharing(graph))


def test_layers_stay_in_float_on_request(scheme: QuantScheme):
    graph = place(graph_of(CASES["concat"].function, (4, 8, 8)), scheme, ["a"])
    assert quantized_activations(graph) == ["cat", "conv2d_1"]
    assert intended_matrix_ops(graph) == 1
    assert left_in_float(graph) == {"conv2d": 1, "cat": 1}


def test_a_layer_that_is_to_stay_in_float_must_be_there(scheme: QuantScheme):
    with pytest.raises(ModelError, match=r"no layer 'wid'.*'wide'"):
        place(graph_of(CASES["concat"].function, (4, 8, 8)), scheme, ["wid"])


def test_a_scheme_without_outputs_quantizes_inputs_only(scheme: QuantScheme):
    inputs = scheme.model_copy(update={"outputs": False})
    graph = place(graph_of(lambda m, x: m.b(F.relu(m.a(x))), (4, 8, 8)), inputs)
    assert quantized_activations(graph) == ["x", "relu"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # TensorRT fuses the Add into the convolution that it follows: only the skip is quantized
        (lambda m, x: m.b(F.relu(m.a(x) + x)), ["x", "relu"]),
        (lambda m, x: m.b(F.relu(x + m.a(x))), ["x", "relu"]),
        (lambda m, x: m.b(F.relu(m.a(x) - x)), ["x", "relu"]),
        # two convolutions: the second is the skip
        (lambda m, x: m.b(F.relu(m.a(x) + m.depthwise(x))), ["x", "conv2d_1", "relu"]),
    ],
)
def test_of_a_residual_add_the_skip_alone(
    function: Function, expected: list[str], scheme: QuantScheme
):
    changes = {"add_inputs": "skip", "outputs": False, "ops": (*scheme.ops, "sub")}
    skip = scheme.model_copy(update=changes)
    graph = place(graph_of(function, (4, 8, 8)), skip)
    assert quantized_activations(graph) == expected
    # a runtime that quantizes outputs too has no quantizer inside the fused kernel either
    inside = place(graph_of(function, (4, 8, 8)), skip.model_copy(update={"outputs": True}))
    assert quantized_activations(inside) == [*expected, f"conv2d_{len(expected) - 1}"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # OpenVINO takes the sum into a convolution with a ReLU too
        (lambda m, x: m.b(F.relu(m.a(x)) + x), ["x", "add"]),
        (lambda m, x: m.b(x + F.relu(m.a(x))), ["x", "add"]),
        (lambda m, x: m.b(m.a(x) + x), ["x", "add"]),
        # one of two; and none whose numbers are read elsewhere as well
        (lambda m, x: m.b(F.relu(m.a(x)) + F.relu(m.depthwise(x))), ["x", "relu_1", "add"]),
        (lambda m, x: m.b((y := F.relu(m.a(x))) + y.flip(1)), ["x", "relu", "flip", "add"]),
    ],
)
def test_of_an_add_behind_a_relu_the_skip_alone(
    function: Function, expected: list[str], scheme: QuantScheme
):
    skip = scheme.model_copy(update={"add_inputs": "skip-activated"})
    graph = place(graph_of(function, (4, 8, 8)), skip)
    assert quantized_activations(graph)[: len(expected)] == expected
    assert len(quantized_activations(graph)) == len(expected) + 1  # and the network's output


def mixed(m: Layers, x: Tensor, read: bool = False) -> Tensor:
    """ConvNeXt's block, with a linear layer between permutations."""
    y = m.linear(m.a(x).permute(0, 2, 3, 1))
    z = m.b(x) + y.permute(0, 3, 1, 2)
    return z * y.sum() if read else z


def test_a_linear_layer_that_runs_as_a_convolution_takes_the_sum_along(scheme: QuantScheme):
    skip = scheme.model_copy(update={"add_inputs": "skip"})
    turned = skip.model_copy(update={"linear_as_conv": True})

    def of_linear(function: Function, scheme: QuantScheme) -> list[str]:
        graph = place(graph_of(lambda m, x: m.b(function(m, m.a(x))), (4, 8, 8)), scheme)
        names = quantized_activations(graph)
        return names[names.index("reshape_default") + 1 : names.index("add")]

    def main(m: Layers, x: Tensor) -> Tensor:
        return m.linear(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x

    moved = ["linear_default", "linear", "permute_1"]
    assert of_linear(main, skip) == moved
    assert of_linear(main, turned) == []
    # one layer is fused, the first; and none whose map is read with channels last too
    assert of_linear(mixed, turned) == moved
    assert of_linear(lambda m, x: mixed(m, x, read=True), turned) == moved


def test_a_convolution_over_few_pooled_channels_stays_in_float_on_request(scheme: QuantScheme):
    few = scheme.model_copy(update={"least_pooled_channels": 5})
    for shape, quantized in (((4, 1, 1), []), ((4, 8, 8), ["x", "conv2d"])):
        graph = graph_of(lambda m, x: m.b(m.a(x)), shape)
        assert quantized_activations(place(graph, few))[:2] == quantized
    wide = place(graph_of(lambda m, x: m.wide(x), (8, 1, 1)), few)
    assert quantized_activations(wide) == ["x", "conv2d"]


@pytest.mark.parametrize("repeated", [False, True])
def test_a_convolution_of_constants_stays_in_float(repeated: bool, scheme: QuantScheme):
    def joined(m: Layers, x: Tensor) -> Tensor:
        ones = torch.ones(1, 4, 8, 8)
        return m.a(x) * m.b(ones.expand(x.size(0), -1, -1, -1) if repeated else ones)

    graph = place(graph_of(joined, (4, 8, 8)), scheme)
    assert intended_matrix_ops(graph) == 1
    assert quantized_activations(graph)[:2] == ["x", "conv2d"]
    assert left_in_float(graph)["conv2d"] == 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("activation", [F.relu, F.relu6])
def test_the_graph_that_is_trained_leaves_activations_to_quantizers(
    activation: Callable[[Tensor], Tensor], symmetric: bool, scheme: QuantScheme
):
    if symmetric:
        changes = {"activation_dtype": "int8", "activation_symmetric": True, "outputs": False}
        scheme = scheme.model_copy(update=changes)
    graph = place(
        graph_of(lambda m, x: m.b(activation(m.a(x))) + F.relu(m.depthwise(x)).tanh(), (4, 8, 8)),
        scheme,
    )
    x = 4 * torch.randn(4, 4, 8, 8)
    calibrate(graph, [(2 * x,)], "minmax")
    lean = training_graph(graph)
    left = sum(upper_bound(node) is not None for node in lean.graph.nodes)
    assert left == symmetric  # then no quantizer reads the one before the tanh

    def run(module: GraphModule) -> list[Tensor]:
        graph.zero_grad()
        outputs = module(x)
        outputs.square().sum().backward()
        # above 6, where ReLU6 clipped, the scale has LSQ's gradient of a clipped element
        same = [p for p in graph.parameters() if p.dim() or activation is F.relu]
        return [outputs.detach(), *(p.grad.clone() for p in same)]

    assert all(map(torch.equal, run(graph), run(lean)))


@pytest.mark.parametrize(
    ("changes", "activation", "weight"),
    [
        ({}, (torch.uint8, 0, 255), (torch.int8, -63, 63, 4)),
        ({"weight_bits": 8}, (torch.uint8, 0, 255), (torch.int8, -127, 127, 4)),
        ({"activation_dtype": "int8"}, (torch.int8, -128, 127), (torch.int8, -63, 63, 4)),
        (
            {"activation_dtype": "int8", "activation_symmetric": True, "weight_bits": 8},
            (torch.int8, -128, 127), (torch.int8, -127, 127, 4),
        ),
        ({"weight_granularity": "tensor"}, (torch.uint8, 0, 255), (torch.int8, -63, 63, 1)),
    ],
)  # fmt: skip
def test_integers_are_the_schemes(
    scheme: QuantScheme, changes: dict[str, Any], activation: Any, weight: Any
):
    wanted = scheme.model_copy(update=changes)
    placed = quantizers(place(graph_of(CASES["depthwise"].function, (4, 8, 8)), wanted))
    for tensor in ("x", "conv2d"):
        q = placed[tensor]
        assert (q.dtype, q.low, q.high, q.scale.numel()) == (*activation, 1)
    q = placed["depthwise_weight"]
    assert (q.dtype, q.low, q.high, q.scale.numel()) == weight


# ---- digest --------------------------------------------------------------------------------------

# that another process computes the same one: tests/test_network.py


def test_the_digest_tells_placements_apart_and_not_weights(scheme: QuantScheme):
    def of(function: Function, **changes: Any) -> str:
        graph = capture(Layers(function), (torch.zeros(2, 4, 8, 8),))  # other weights each time
        return digest(place(graph, scheme.model_copy(update=changes)))

    plain = of(lambda m, x: F.relu(m.a(x) + x))
    assert plain == of(lambda m, x: F.relu(m.a(x) + x))
    others = [
        of(lambda m, x: F.relu(m.b(x) + x)),
        of(lambda m, x: F.relu6(m.a(x) + x)),
        of(lambda m, x: F.relu(m.a(x) + x), activation_dtype="int8"),
        of(lambda m, x: F.relu(m.a(x) + x), weight_bits=8),
        of(lambda m, x: F.relu(m.a(x) + x), weight_granularity="tensor"),
        of(lambda m, x: F.relu(m.a(x) + x), ops=("conv",)),
    ]
    assert len({plain, *others}) == 1 + len(others)


class HalfKnown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(torch.relu(self.first(x)))
        return torch.softmax(self.second(y).flatten(1), 1)


class Attention(nn.Module):
    """Over one head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y: Tensor = self.last(F.scaled_dot_product_attention(q, k, v))
        return y


def test_factors_of_a_product_are_symmetric_on_request(scheme: QuantScheme):
    changes = {"ops": (*scheme.ops, "matmul"), "symmetric_matmul": True}
    graph = place(capture(Attention(), [torch.zeros(2, 5, 4)]), scheme.model_copy(update=changes))
    x = torch.randn(8, 5, 4)
    calibrate(graph, [(x,)], "minmax")
    products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.matmul.default]
    q, k, softmax, v = (graph.get_submodule(str(f.target)) for n in products for f in n.args)
    for factor in (q, k, v):
        assert (factor.dtype, factor.symmetric, factor.zero_point.item()) == (torch.int8, True, 0)
    assert (softmax.dtype, softmax.symmetric, softmax.zero_point.item()) == (torch.uint8, False, 0)
    assert products[0].name not in quantized_activations(graph)  # it gives floats
    unsigned = convert(graph, unsigned=True)(x)
    assert torch.equal(unsigned, convert(graph)(x))
    zeros = [
        n.args[2:] for n in convert(graph, unsigned=True).graph.nodes
        if "quantize_per_tensor" in str(n.target) and torch.int8 in n.args
    ]  # fmt: skip
    assert zeros and all(zero[0] == 0 for zero in zeros)


@pytest.mark.parametrize(
    ("function", "symmetric"),
    [
        (lambda m, x: F.normalize(m.a(x), dim=1), True),
        (lambda m, x: F.normalize(m.a(x).unbind(1)[0].flatten(1), dim=1), True),
        (lambda m, x: F.normalize(torch.cat([m.a(x), x], 1), dim=1), True),
        (lambda m, x: F.normalize(m.a(x).relu(), dim=1), False),  # its zero point is its least
        (lambda m, x: F.softmax(m.a(x), dim=1), False),
    ],
)
def test_what_a_norm_reads_is_symmetric_on_request(
    function: Function, symmetric: bool, scheme: QuantScheme
):
    assert scheme.outputs and not scheme.symmetric_norms
    for asked in (True, False):
        changed = scheme.model_copy(update={"symmetric_norms": asked, "shared_scales": ()})
        found = quantizers(place(graph_of(function, (4, 8, 8)), changed))
        activations = [q for name, q in found.items() if name not in ("x", "a_weight")]
        assert activations
        assert {q.symmetric for q in activations} == {asked and symmetric}


def test_a_silu_is_a_sigmoid_and_a_product_where_both_are_in_integers(scheme: QuantScheme):
    assert "sigmoid" in scheme.ops
    module = Layers(lambda m, x: m.b(F.silu(m.a(x))) + x)
    graph = place(capture(module, [torch.zeros(2, 4, 8, 8)]), scheme)
    assert quantized_activations(graph)[:4] == ["x", "conv2d", "sigmoid_default", "silu"]
    assert left_in_float(graph) == {}
    without = tuple(kind for kind in scheme.ops if kind != "sigmoid")
    plain = scheme.model_copy(update={"ops": without})
    graph = place(capture(module, [torch.zeros(2, 4, 8, 8)]), plain)
    assert left_in_float(graph) == {"silu": 1}


@pytest.mark.parametrize(
    ("function", "shape", "sums"),
    [
        (lambda m, x: m.b(F.silu(m.a(x))), (4, 8, 8), "conv2d"),
        (lambda m, x: m.b(F.hardswish(m.a(x))), (4, 8, 8), "conv2d"),
        (lambda m, x: m.head(F.gelu(m.linear(x), approximate="tanh")), (8, 4), "linear_default"),
    ],
)
def test_an_activation_that_a_kernel_takes_along_works_on_its_sums(
    function: Function, shape: tuple[int, ...], sums: str
):
    scheme = Target.load("intel-cpu").scheme
    assert scheme is not None and set(scheme.fused_activations) == {"gelu", "hardswish", "silu"}
    graph = place(graph_of(function, shape), scheme)
    assert sums not in quantized_activations(graph) and left_in_float(graph) == {}
    apart = {"fused_activations": (), "linear_gives_float": False}
    graph = place(graph_of(function, shape), scheme.model_copy(update=apart))
    assert sums in quantized_activations(graph) and left_in_float(graph).total() == 1


def test_an_activation_that_stands_beside_other_readers_is_in_no_kernel():
    scheme = Target.load("intel-cpu").scheme
    assert scheme is not None

    def function(m: Layers, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(F.silu(y)) + y

    graph = place(graph_of(function, (4, 8, 8)), scheme)
    assert "conv2d" in quantized_activations(graph) and left_in_float(graph) == {"silu": 1}


def test_operators_that_the_table_does_not_know_are_counted():
    scheme = Target.load("host-onnxruntime").scheme
    graph = place(capture(HalfKnown(), [torch.zeros(2, 3, 6, 6)]), scheme)
    counted = left_in_float(graph)
    assert counted == {"hardswish": 1, "softmax": 1}
    assert describe(counted) == "1 hardswish, 1 softmax"
