"""Mixed precision: what each layer's integers cost, and which few layers stay in float.

"Back to float" is what the placement makes of `float_layers`: every trial is placed anew (16 ms for
ResNet-18, a hundredth of running it), and takes weights and scales from the calibrated network by
their names. Nothing is calibrated again, but a quantizer that only the trial has: TensorRT's
residual Add gets one on the branch that it would have been fused with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

from edgekd.data.base import BatchSource, Data, evaluation_batches, first_balanced
from edgekd.errors import ModelError, RecipeError
from edgekd.network import Network
from edgekd.quantization.bias_correction import correct_biases
from edgekd.quantization.calibration import calibrate, settle
from edgekd.quantization.capture import capture, move
from edgekd.quantization.fake_quant import Observer
from edgekd.quantization.layers import Inputs, stored_tensors
from edgekd.quantization.placement import MATRIX, layer_name, place
from edgekd.reporting.progress import Progress
from edgekd.tasks.base import Task, top1_agreement
from edgekd.training import gather, predict

AGREEMENT = "agreement with the float network"
HIGHEST_SQNR_DB = 120.0  # about float32's own rounding

Batches = list[tuple[Tensor, ...]]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerEffect(_Row):
    """What changes when this layer alone goes back to float.

    Attributes:
        sqnr_gain_db: of the outputs' SQNR over that of the network all in integers.
        metric_gain: of the metric, likewise, as a share of 1.
        price: of the layer in float, in `Sensitivity.price_unit`.
        in_float: whether it stays in float.
    """

    layer: str
    sqnr_gain_db: float
    metric_gain: float
    price: float
    in_float: bool = False


class Sensitivity(_Row):
    """Every layer's effect, the most worth it in float first, and what was chosen.

    Attributes:
        metric_name: the task's, or the agreement with the float network where labels are absent.
        split: where the samples come from.
        n: samples that the drops are measured on; n_layers: those of each layer's effect.
        sqnr_db: of the network all in integers (but for `float_layers` that were given).
        integer_drop: of the metric, from the float network to that one, as a share of 1.
        drop: with the chosen layers in float; at most `max_drop`.
        price_unit: "ms" that a layer takes longer in float, which the target's latency model
            estimates, or "MACs", which are not time.
    """

    metric_name: str
    split: str
    n: int
    n_layers: int
    sqnr_db: float
    integer_drop: float
    drop: float
    max_drop: float
    price_unit: Literal["ms", "MACs"]
    layers: tuple[LayerEffect, ...]

    @property
    def in_float(self) -> tuple[str, ...]:
        """The layers chosen."""
        return tuple(effect.layer for effect in self.layers if effect.in_float)

    @property
    def summary(self) -> str:
        """In one sentence."""
        where = f"on {self.n:,} samples of {self.split} (allowed: {100 * self.max_drop:g})"
        if not self.in_float:
            return (
                f"no layer needs to stay in float: {self.metric_name} drops by "
                f"{100 * self.drop:.2f} points {where}"
            )
        price = sum(effect.price for effect in self.layers if effect.in_float)
        share = price / (sum(effect.price for effect in self.layers) or 1.0)
        dear = f"{share:.1%} of their MACs"
        if self.price_unit == "ms":
            dear = f"{price:.3g} ms slower than integers, estimated"
        return (
            f"in float stay {', '.join(self.in_float)} ({len(self.in_float)} of "
            f"{len(self.layers)} layers, {dear}): "
            f"{self.metric_name} drops by {100 * self.drop:.2f} points, not by "
            f"{100 * self.integer_drop:.2f}, {where}"
        )


def mixed_precision(
    net: Network,
    calibrated: Network,
    *,
    max_drop: float,
    data: BatchSource,
    task: Task | None,
    inputs: Sequence[Inputs],
    observer: Observer,
    on: Fabric,
    correct_bias: bool = False,
    samples: int = 1024,
    layer_samples: int = 256,
    cost_ms: Mapping[str, float] = MappingProxyType({}),
) -> Sensitivity:
    """The fewest layers of `calibrated` in float for which the metric drops by `max_drop` or less.

    Layers are ranked by the share of the outputs' quantization noise that goes with them, over
    1 + price / mean price: one for being a layer, the rest for being a dear one. The first 1, 2,
    4, ... of them go back to float until the drop is small enough, and then each, the last one
    first, goes back to integers if the drop stays small enough without it. The drop does not fall
    evenly with the number of layers, so there is no bisection; every set is evaluated.

    Args:
        net: the float network; calibrated: the same, placed and calibrated, not changed here.
        max_drop: of the task's metric, as a share of 1; of the agreement with the float network
            where there is no task or no label.
        data: a Data, of which "val" is used, or "test" where it has no "val": with a "val" the
            test split has no part in the choice. Or batches.
        inputs, observer: as `calibrated` was calibrated, for quantizers that it has not got.
        correct_bias: whether drops are those after `correct_biases`; single layers' effects, which
            only rank, are without.
        samples: to measure the drop of a set of layers on, the first ones of the data.
        layer_samples: to measure each single layer's effect on.
        cost_ms: how much longer each layer takes in float, by name; where it lacks one, the price
            of each is its MACs.

    Raises:
        ModelError: all layers but one in float drop more than `max_drop`.
        RecipeError: no task, and outputs that are not (N, K).
        DataError: the data gives no batch.
    """
    batches, split = held_out(data, samples)
    trials = _Trials(net, calibrated, inputs, observer)
    prices, unit = _prices(calibrated, trials.captured, cost_ms)
    judge = _Judge.of(trials.captured_network, _first(batches, layer_samples), task, on)
    integer_db, integer = judge(trials.with_float(()))
    ranked = rank(_effects(judge, trials, prices, integer_db, integer))
    whole = _Judge.of(trials.captured_network, batches, task, on)

    @cache
    def drop(*layers: str) -> float:
        return whole.best - whole(trials.with_float(layers, correct_bias=correct_bias))[1]

    kept = fewest([effect.layer for effect in ranked], drop, max_drop, whole.metric_name)
    return Sensitivity(
        metric_name=whole.metric_name, split=split, n=whole.n, n_layers=judge.n,
        sqnr_db=integer_db, integer_drop=drop(), drop=drop(*kept), max_drop=max_drop,
        price_unit=unit,
        layers=tuple(e.model_copy(update={"in_float": e.layer in kept}) for e in ranked),
    )  # fmt: skip


def _effects(
    judge: _Judge, trials: _Trials, prices: Mapping[str, float], integer_db: float, integer: float
) -> list[LayerEffect]:
    """Of each layer alone over the network all in integers, in the order of `prices`."""
    effects = []
    with Progress("each layer in float", len(prices)) as progress:
        for layer, price in prices.items():
            alone_db, alone = judge(trials.with_float([layer]))
            effects.append(
                LayerEffect(
                    layer=layer, sqnr_gain_db=alone_db - integer_db, metric_gain=alone - integer,
                    price=price,
                )
            )  # fmt: skip
            progress.advance()
    return effects


def rank(effects: Sequence[LayerEffect]) -> list[LayerEffect]:
    """The most worth it in float first."""
    mean = sum(effect.price for effect in effects) / len(effects) if effects else 0.0

    def worth(effect: LayerEffect) -> float:
        noise_removed = 1 - 10 ** (-effect.sqnr_gain_db / 10)
        return noise_removed / (1 + effect.price / (mean or 1.0))

    return sorted(effects, key=worth, reverse=True)


def fewest(
    ranked: Sequence[str], drop: Callable[..., float], max_drop: float, metric_name: str
) -> tuple[str, ...]:
    """Names of the fewest layers with `drop(*names) <= max_drop`, as `mixed_precision` says.

    Raises:
        ModelError: `max_drop` is not reached while one layer is in integers.
    """
    allowed = max_drop + 1e-12
    most = max(0, len(ranked) - 1)  # with all of them in float, it is not quantized
    tried: dict[int, float] = {}
    count = 0
    while (found := drop(*ranked[:count])) > allowed:
        tried[count] = found
        if count == most:
            best = min(tried, key=lambda k: tried[k])
            raise ModelError(
                f"max_drop = {max_drop:g} is not reached: {metric_name} drops by "
                f"{tried[best]:.4f} at least, with {best} of {len(ranked)} layers in float; allow "
                "more, train in integers (without max_drop, with epochs), or export the float "
                "network"
            )
        count = min(max(1, 2 * count), most)
    kept = tuple(ranked[:count])
    for name in reversed(kept):
        without = tuple(other for other in kept if other != name)
        if drop(*without) <= allowed:
            kept = without
    return kept


def held_out(data: BatchSource, samples: int) -> tuple[Batches, str]:
    """Batches of about `samples` samples, the same ones each time, and what they are called."""
    if not isinstance(data, Data):
        return _first(evaluation_batches(data), samples), "the data"
    split = "val" if "val" in data.splits else "test"
    images = data.splits[split]
    chosen = first_balanced(images, min(samples, len(images)), split)
    data = replace(data, splits={**data.splits, "test": chosen})
    return list(evaluation_batches(data, batch_size=64)), split


def _first(batches: Iterable[tuple[Tensor, ...]], samples: int) -> Batches:
    found: Batches = []
    left = samples
    for batch in batches:
        found.append(tuple(tensor[:left] for tensor in batch))
        left -= len(batch[0])
        if left <= 0:
            break
    return found


# ---- one trial -----------------------------------------------------------------------------------


class _Trials:
    """`calibrated` with other layers in float."""

    def __init__(
        self, net: Network, calibrated: Network, inputs: Sequence[Inputs], observer: Observer
    ) -> None:
        self.calibrated, self.inputs, self.observer = calibrated, inputs, observer
        self.captured = capture(net.module, net.io.example(2))
        self._known = {name: tensor.detach() for name, tensor in calibrated.state().items()}

    @property
    def captured_network(self) -> Network:
        """The float network, captured and folded."""
        assert self.calibrated.scheme is not None
        return self.calibrated.quantized(self.captured, self.calibrated.scheme)

    def with_float(self, layers: Iterable[str], *, correct_bias: bool = False) -> Network:
        """Placed with these layers in float too; weights and scales are those of `calibrated`."""
        scheme = self.calibrated.scheme
        assert scheme is not None
        floating = {*self.calibrated.float_layers, *layers}
        graph = place(copy.deepcopy(self.captured), scheme, floating)
        trial = self.calibrated.quantized(graph, scheme, floating)
        own = trial.state()
        with torch.no_grad():
            for name in own.keys() & self._known.keys():
                own[name].copy_(self._known[name])
            if new := own.keys() - self._known.keys():
                calibrate(move(graph, self.inputs[0][0].device), self.inputs, self.observer)
                move(graph, "cpu")
                self._known |= {name: trial.state()[name].detach().clone() for name in new}
        if correct_bias:
            move(graph, self.inputs[0][0].device)
            correct_biases(graph, stored_tensors(graph), self.inputs)
            move(graph, "cpu")
        settle(graph, integer_bias=scheme.bias == "int32")
        return trial


@dataclass(frozen=True)
class _Judge:
    """SQNR and metric of networks, on samples that the float network has seen."""

    batches: Batches
    reference: Any
    targets: tuple[Tensor, ...]
    task: Task | None
    on: Fabric

    @staticmethod
    def of(float_net: Network, batches: Batches, task: Task | None, on: Fabric) -> _Judge:
        task = None if task is None else task.of(float_net.io)
        reference, targets = gather(predict(float_net, batches, on=on))
        if task is None and not (isinstance(reference, Tensor) and reference.dim() == 2):
            raise RecipeError("max_drop: outputs are not (N, K) scores; give a task to judge them")
        return _Judge(batches, reference, targets, task, on)

    @property
    def metric_name(self) -> str:
        labelled = self.task is not None and self.targets
        return self.task.metric_name if self.task is not None and labelled else AGREEMENT

    @property
    def n(self) -> int:
        return sum(len(batch[0]) for batch in self.batches)

    @property
    def best(self) -> float:
        """The float network's own score."""
        return self._score(self.reference)

    def __call__(self, net: Network) -> tuple[float, float]:
        """(SQNR in dB, score)."""
        outputs, _ = gather(predict(net, self.batches, on=self.on))
        return sqnr_db(self.reference, outputs), self._score(outputs)

    def _score(self, outputs: Any) -> float:
        if self.task is None:
            return top1_agreement(outputs, self.reference)
        answers = self.task.answers(outputs)
        if not self.targets:
            return self.task.agreement(answers, self.task.answers(self.reference))
        return self.task.score(answers, self.targets).value


def sqnr_db(reference: Any, outputs: Any) -> float:
    """10 log10(‖y‖² / ‖y − ŷ‖²) over all output tensors, 120 at most."""
    pairs = list(zip(_tensors(reference), _tensors(outputs), strict=True))
    signal = sum(float(y.double().square().sum()) for y, _ in pairs)
    noise = sum(float((y.double() - q.double()).square().sum()) for y, q in pairs)
    if noise <= signal * 10 ** (-HIGHEST_SQNR_DB / 10):
        return HIGHEST_SQNR_DB
    return 10 * math.log10(max(signal, 1e-300) / noise)


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, Mapping) else outputs)


# ---- prices --------------------------------------------------------------------------------------


def _layers(net: Network) -> list[str]:
    """Names of the convolutions and matrix products in integers, in the order of the graph."""
    assert isinstance(net.module, GraphModule)
    nodes = [n for n in net.module.graph.nodes if n.meta.get("integer_kind") in MATRIX]
    return list(dict.fromkeys(map(layer_name, nodes)))


def _prices(
    calibrated: Network, captured: GraphModule, cost_ms: Mapping[str, float]
) -> tuple[dict[str, float], Literal["ms", "MACs"]]:
    """Price of each integer layer in float, and in what."""
    layers = _layers(calibrated)
    if cost_ms.keys() >= set(layers):
        return {layer: cost_ms[layer] for layer in layers}, "ms"
    macs = layer_macs(captured, calibrated.io.example(2))
    return {layer: macs.get(layer, 0.0) for layer in layers}, "MACs"


def layer_macs(captured: GraphModule, example: Sequence[Tensor]) -> dict[str, float]:
    """Multiply-accumulates of one sample by layer, counted by torch's flop counter.

    Args:
        example: inputs of (N, ...).
    """
    macs: dict[str, float] = {}

    class Counting(Interpreter):
        def run_node(self, n: Node) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = super().run_node(n)
            name = layer_name(n)
            flops = counter.get_total_flops()  # 2 a MAC
            macs[name] = macs.get(name, 0.0) + flops / (2 * len(example[0]))
            return result

    with torch.no_grad():
        Counting(captured).run(*example)
    return macs
