"""A file in float64 beside the network that it was exported from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from float64 import in_float64
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array
from torch import Tensor, nn

from edgekd.network import Network
from edgekd.runtimes.arithmetic import IntegerGraph
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize


class Floats(nn.Module):
    """What a float32 file has its own constants for, or another operator."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, groups=1)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.stem(x)).flatten(2).transpose(1, 2)
        x = self.norm(x) * 0.1767766952966369
        x = nn.functional.gelu(self.first(x)) + nn.functional.gelu(
            x.repeat(1, 1, 2), approximate="tanh"
        )
        x = x * nn.functional.hardsigmoid(x.mean(1, keepdim=True))
        return self.last(x.mean(1))


@pytest.mark.parametrize("target", ["host-onnxruntime", "jetson-orin-nano", "jetson-agx-xavier"])
def test_nothing_but_the_export_can_differ(target: str, tmp_path: Path):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 17, 17)
    net = Network(Floats().eval(), images[:1])
    quantized = quantize(net, target=target, data=[(images,)], correct_bias=False)
    model = onnx.load(export(quantized, target=target, out=tmp_path).path)
    graph = IntegerGraph(quantized.module, rounding=None)
    with torch.no_grad():
        graph.run(images.double())
    [(_, wanted)] = graph.ends
    step = float(wanted.abs().max()) / 127

    def off(changed: onnx.ModelProto) -> float:
        [got] = in_float64(changed, [images.numpy()])
        assert got.dtype == np.float64
        return float(np.abs(got - wanted.numpy()).max()) / step

    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    assert off(model) < 1e-10
    scale = next(n.input[1] for n in wrong.graph.node if n.op_type == "DequantizeLinear")
    [tensor] = (t for t in wrong.graph.initializer if t.name == scale)
    tensor.CopyFrom(from_array(to_array(tensor) * np.float32(1.05), tensor.name))
    assert off(wrong) > 0.1


def test_an_image_is_in_float64_for_all_but_its_quantizer():
    """And PyTorch's cubic resize is what it is: a sum of both differs in neither."""
    sides = {"x": [1, 3, 24, 24], "resized": [1, 3, 22, 22], "y": [1, 3, 22, 22]}
    x, y = (make_tensor_value_info(name, TensorProto.FLOAT, sides[name]) for name in ("x", "y"))
    nodes = [
        make_node("QuantizeLinear", ["x", "scale"], ["integers"], output_dtype=TensorProto.INT8),
        make_node("DequantizeLinear", ["integers", "scale"], ["rounded"]),
        make_node("Slice", ["rounded", "starts", "ends", "axes"], ["corner"]),
        make_node("Resize", ["x", "", "", "sizes"], ["resized"], mode="cubic"),
        make_node("Add", ["corner", "resized"], ["y"]),
    ]
    numbers = {"starts": [0, 0], "ends": [22, 22], "axes": [2, 3], "sizes": sides["y"]}
    tensors = [from_array(np.array(value), name) for name, value in numbers.items()]
    tensors.append(from_array(np.float32(0.02), "scale"))
    model = make_model(make_graph(nodes, "graph", [x], [y], tensors))
    image = torch.randn(sides["x"], generator=torch.Generator().manual_seed(0))
    resized = nn.functional.interpolate(image.double(), size=22, mode="bicubic")
    rounded = (image / 0.02).round().clamp(-128, 127).double() * float(np.float32(0.02))
    [got] = in_float64(model, [image.numpy()])
    assert np.abs(got - (rounded[..., :22, :22] + resized).numpy()).max() < 1e-12
