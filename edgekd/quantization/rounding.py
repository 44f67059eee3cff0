"""AdaRound: each weight up or down by what it does to its layer's output.

Nagel et al. 2020, arXiv:2004.10568.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgekd.quantization.fake_quant import along
from edgekd.quantization.layers import Inputs, Layer, layers, walk
from edgekd.quantization.placement import fused_activation, layer_name, upper_bound
from edgekd.reporting.progress import Progress

ZETA, GAMMA = 1.1, -0.1  # the rectified sigmoid reaches 0 and 1 (their eq. 23)
WARM_UP = 0.2  # share of the iterations before the regularizer sets in
BETA = (20.0, 2.0)  # its exponent, from and to
LAMBDA = 0.01  # its weight
LR = 1e-2
BATCH, BATCH_OUTPUTS = 32, 1 << 18  # samples of an iteration: fewer where the output is large


def round_weights(
    graph: GraphModule,
    floats: Mapping[str, Tensor],
    batches: Sequence[Inputs],
    *,
    iterations: int,
    seed: int,
) -> None:
    """Choose for every weight of a calibrated graph which of its two neighbours it becomes.

    Layer by layer, each with what it reads from the rounded layers before it; its own activation,
    where the kernel takes one along, belongs to the output (their eq. 25). The float weight becomes
    s·q, so that plain rounding gives q here and in the export. Layers that share their weights
    are rounded to nearest.

    Args:
        floats: the float network's weights, see `walk`.
        batches: of the graph's inputs, of which `walk` keeps what fits into memory; a layer's own
            inputs and outputs are there twice.
        iterations: of Adam for each layer.
    """
    generator = torch.Generator().manual_seed(seed)
    with Progress("rounding weights", sum(1 for _ in layers(graph))) as progress:
        for layer, inputs, targets in walk(graph, floats, batches):
            if layer.quantizer is not None and not layer.shared:
                x, y = torch.cat(inputs), _activated(layer, torch.cat(targets))
                _round(layer, x, y, iterations, generator)
            progress.advance(layer_name(layer.node))


def _round(layer: Layer, x: Tensor, y: Tensor, iterations: int, generator: torch.Generator) -> None:
    """Overwrite the weight of `layer` by the multiples of its step that give `y` for `x` best."""
    assert layer.quantizer is not None
    low, high = layer.quantizer.low, layer.quantizer.high
    with torch.no_grad():
        scale = layer.quantizer.scale
        step = along(scale, layer.weight, layer.axis) if scale.dim() else scale.clone()
        floor = (layer.weight / step).floor()
        nearest = layer.quantizer(layer.weight)
        up = layer.weight / step - floor
        # h(V) of eq. 23 starts at what rounding down leaves over
        logit = torch.logit((up - GAMMA) / (ZETA - GAMMA)).requires_grad_()

    def weight(up: Tensor) -> Tensor:
        return step * (floor + up).clamp(low, high)

    optimizer = torch.optim.Adam([logit], lr=LR)
    samples = max(1, min(BATCH, len(x), BATCH_OUTPUTS * len(y) // y.numel()))
    for iteration in range(iterations):
        chosen = torch.randint(len(x), (samples,), generator=generator).to(x.device)
        up = _rectified(logit)
        difference = _activated(layer, layer(x[chosen], weight(up))) - y[chosen]
        loss = difference.square().sum(layer.channel_axis).mean()
        progress = iteration / iterations
        if progress >= WARM_UP:
            loss = loss + LAMBDA * _undecided(up, (progress - WARM_UP) / (1 - WARM_UP))
        (logit.grad,) = torch.autograd.grad(loss, [logit])  # of nothing else: not of the bias
        optimizer.step()
    with torch.no_grad():
        rounded = weight((_rectified(logit) >= 0.5).to(floor))
        # an optimization cut short must not do harm
        better = _error(layer, x, y, rounded) < _error(layer, x, y, nearest)
        layer.weight.copy_(rounded if better else nearest)


def _rectified(logit: Tensor) -> Tensor:
    """h(V) of eq. 23."""
    return (logit.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _undecided(up: Tensor, progress: float) -> Tensor:
    """f_reg(V) of eq. 24: 0 where each weight is decided. β is annealed with `progress`."""
    beta = BETA[0] + (BETA[1] - BETA[0]) * progress
    return (1 - (2 * up - 1).abs().pow(beta)).sum()


def _activated(layer: Layer, y: Tensor) -> Tensor:
    """`y` behind the activation that the layer's kernel takes along."""
    bound = upper_bound(fused_activation(layer.node))
    return y if bound is None else y.clamp(0, bound)


def _error(layer: Layer, x: Tensor, y: Tensor, weight: Tensor) -> float:
    """Mean squared error of the output with `weight`."""
    with torch.no_grad():
        parts = zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True)
        total = sum((_activated(layer, layer(a, weight)) - b).square().sum() for a, b in parts)
    return float(total) / y.numel()
