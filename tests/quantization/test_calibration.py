"""The scales that calibration and training leave behind can be exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.errors import DataError, RecipeError
from edgekd.network import Network
from edgekd.quantization.calibration import calibrate, settle
from edgekd.quantization.capture import capture
from edgekd.quantization.fake_quant import Observer
from edgekd.quantization.placement import place, quantized_activations, quantizers
from edgekd.runtimes.onnxruntime import OnnxRuntime
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.target import QuantScheme, Target

Batches = list[tuple[Tensor, Tensor]]


def with_a_dead_channel() -> nn.Module:
    """Channel 1 of the convolution is 5 whatever comes in: its BatchNorm has γ = 0, β = 5."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        module[1].weight[1], module[1].bias[1] = 0.0, 5.0
    return module.eval()


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [7, 8])
def test_a_dead_channel_is_exported_with_an_int32_bias(
    granularity: str, bits: int, host: Target, tmp_path: Path
):
    assert host.scheme is not None
    scheme = host.scheme.model_copy(update={"weight_granularity": granularity, "weight_bits": bits})
    target = host.model_copy(update={"scheme": scheme})
    module = with_a_dead_channel()
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net = quantize(
        Network(module, x[:1]), target=target, data=[x], observer="minmax", accelerator="cpu"
    )
    artifact = export(net, target=target, out=tmp_path)
    session = OnnxRuntime().load(artifact.path, threads=1)
    (theirs,) = session([x.numpy()])
    with torch.no_grad():
        ours, exact = net(x).numpy(), module(x).numpy()
    step = np.abs(exact).max() / 127
    assert np.abs(theirs - ours).max() < 2 * step
    assert np.abs(theirs - exact).max() < 8 * step  # the dead channel's 5 is still there


def dead_graph(scheme: QuantScheme) -> GraphModule:
    graph = place(capture(with_a_dead_channel(), (torch.zeros(2, 3, 8, 8),)), scheme)
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    calibrate(graph, [(x,)], "minmax")
    return graph


def bias_steps(graph: GraphModule) -> float:
    """Largest bias of the convolution in steps of s_x · s_w, in NumPy."""
    placed = quantizers(graph)
    x_scale = placed[quantized_activations(graph)[0]].scale.detach().double().numpy()
    w_scale = next(iter(placed.values())).scale.detach().double().numpy()
    bias = graph.get_parameter("0.bias").detach().double().numpy()
    return float(np.abs(bias / (x_scale * w_scale)).max())


def test_settling_makes_room_for_biases_that_training_has_outgrown(scheme: QuantScheme):
    graph = dead_graph(scheme)
    assert bias_steps(graph) < 2**31
    weight = next(iter(quantizers(graph).values())).scale
    alive = weight.detach()[[0, 2, 3]].clone()
    with torch.no_grad():
        quantizers(graph)[quantized_activations(graph)[0]].scale.div_(8)
    assert bias_steps(graph) > 2**31
    settle(graph)
    assert bias_steps(graph) < 2**31
    assert torch.equal(weight.detach()[[0, 2, 3]], alive)


def largest_values(graph: GraphModule) -> list[np.float32]:
    bounded = [q for q in quantizers(graph).values() if q.max_value is not None]
    steps = [np.float32(q.high - int(q.zero_point)) for q in bounded]
    return [n * q.scale.detach().numpy() for n, q in zip(steps, bounded, strict=True)]


def test_settling_keeps_ranges_behind_a_relu6_inside_the_clip(quantized_mobile: Network):
    graph = quantized_mobile.copy().module
    assert isinstance(graph, GraphModule)
    assert len(largest_values(graph)) == 5
    assert max(largest_values(graph)) <= 6
    with torch.no_grad():  # the last step of an optimizer
        for q in quantizers(graph).values():
            q.scale.mul_(1.001)
    assert max(largest_values(graph)) > 6
    settle(graph)
    assert 5.999 < max(largest_values(graph)) <= 6


def test_no_samples_no_scales(scheme: QuantScheme):
    graph = place(capture(nn.Conv2d(3, 4, 1), (torch.zeros(2, 3, 8, 8),)), scheme)
    with pytest.raises(DataError, match="no samples to calibrate with"):
        calibrate(graph, [], "mse")


def test_calibration_reads_as_many_samples_as_it_was_told(host: Target):
    x = torch.cat([torch.rand(10, 3, 8, 8), torch.full((10, 3, 8, 8), 50.0)])
    net = Network(nn.Conv2d(3, 4, 1), x[:1])

    def first_scale(samples: int) -> float:
        made = quantize(
            net, target=host, data=list(x.split(4)), calibration=samples, observer="minmax",
            accelerator="cpu",
        )  # fmt: skip
        assert isinstance(made.module, GraphModule)
        name = quantized_activations(made.module)[0]
        return quantizers(made.module)[name].scale.item()

    assert first_scale(10) == pytest.approx(x[:10].max().item() / 255)
    assert first_scale(11) == pytest.approx(50 / 255)


def observed(observer: Observer, batches: list[Tensor], scheme: QuantScheme) -> tuple[float, float]:
    """Scale of the input, and of the first output channel's weights over their largest one."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 1)
    graph = place(capture(layer, (torch.zeros(2, 3, 8, 8),)), scheme)
    calibrate(graph, list(zip(batches, strict=True)), observer)
    found = quantizers(graph)
    weight = found["weight"].scale[0].item() / layer.weight[0].abs().max().item()
    return found[quantized_activations(graph)[0]].scale.item(), weight


@pytest.fixture
def growing() -> list[Tensor]:
    """Batches whose range grows, with two outliers."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 3, 8, 8, generator=generator) * (1 + i) for i in range(8)]
    batches[3][0, 0, 0, 0], batches[5][0, 0, 0, 0] = 1000.0, -500.0
    return batches


def test_a_moving_average_is_numpys(growing: list[Tensor], scheme: QuantScheme):
    low, high = growing[0].min().item(), growing[0].max().item()
    for x in growing[1:]:
        low, high = (0.9 * low + 0.1 * x.min().item(), 0.9 * high + 0.1 * x.max().item())
    scale, weight = observed("moving-average", growing, scheme)
    assert scale == pytest.approx((high - low) / 255, rel=1e-5)
    assert weight == pytest.approx(1 / 63, rel=1e-5)


def test_a_percentile_is_numpys(growing: list[Tensor], scheme: QuantScheme):
    low, high = np.quantile(np.concatenate([x.numpy().ravel() for x in growing]), [1e-4, 1 - 1e-4])
    scale, weight = observed("percentile", growing, scheme)
    assert scale == pytest.approx((high - low) / 255, rel=1e-4)
    assert scale < observed("minmax", growing, scheme)[0] / 10
    assert weight == pytest.approx(1 / 63, rel=1e-5)


def activation_range(graph: GraphModule, name: str) -> tuple[float, float]:
    """The reals at the ends of an asymmetric quantizer's integers."""
    q = quantizers(graph)[name]
    scale, zero = q.scale.item(), q.zero_point.item()
    return (q.low - zero) * scale, (q.high - zero) * scale


def pooled() -> nn.Module:
    """Its MaxPool passes the convolution's integers on: one quantizer for two tensors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)).eval()


def calibrated(scheme: QuantScheme, batches: list[Tensor], observer: Observer) -> GraphModule:
    graph = place(capture(pooled(), (batches[0],)), scheme)
    calibrate(graph, list(zip(batches, strict=True)), observer)
    return graph


def test_the_moving_average_is_that_of_the_batches_ranges(scheme: QuantScheme):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 2, 9, 9, generator=generator) * size for size in (1, 3, 2, 5)]
    graph = calibrated(scheme, batches, "moving-average")
    with torch.no_grad():
        convolved = [pooled()[0](x) for x in batches]
    for name, tensors in {"input_1": batches, "conv2d": convolved}.items():
        ends = np.array([(x.min().item(), x.max().item()) for x in tensors])
        expected = ends[0]
        for low_and_high in ends[1:]:
            expected = 0.9 * expected + 0.1 * low_and_high
        step = np.ptp(expected) / 255
        np.testing.assert_allclose(activation_range(graph, name), expected, atol=0.51 * step)
        assert quantizers(graph)[name].scale.item() == pytest.approx(step, rel=1e-6)
    assert len(quantizers(graph)) == 5  # the MaxPool has none of its own


def test_a_tensor_of_zeros_has_a_scale(scheme: QuantScheme):
    graph = calibrated(scheme, [torch.zeros(4, 2, 9, 9)], "percentile")
    assert all((q.scale > 0).all() for q in quantizers(graph).values())


def test_an_unknown_observer_is_refused(scheme: QuantScheme):
    with pytest.raises(RecipeError, match="no observer 'percentil'; did you mean 'percentile'"):
        calibrated(scheme, [torch.zeros(4, 2, 9, 9)], "percentil")  # type: ignore[arg-type]


def test_groups_of_a_transposed_convolution_share_scales_and_have_biases_of_their_own():
    scheme = Target.load("jetson-orin-nano").scheme
    assert scheme is not None
    scheme = scheme.model_copy(update={"ops": (*scheme.ops, "conv_transpose")})
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2, groups=2)).eval()
    x = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        module[1].weight[:, 1] *= 1e-9  # channels 1 and 4
        module[1].bias.copy_(torch.tensor([0.1, 2.0, -0.1, 0.2, -5.0, 0.3]))
    graph = place(capture(module, (x[:2],)), scheme)
    calibrate(graph, [(x,)], "minmax")
    settle(graph, integer_bias=True)
    placed = quantizers(graph)
    step = np.float64(placed["conv2d"].scale.item()) * placed["_1_weight"].scale.detach().numpy()
    bias = graph.get_parameter("1.bias").detach().numpy()
    np.testing.assert_allclose(bias, module[1].bias.detach(), atol=1e-4)
    assert np.abs(bias / np.tile(step, 2)).max() < 2**31
    assert abs(bias[4] / step[1]) == pytest.approx(2**30, rel=1e-3)
