"""quantize: a float network becomes the integers that a target computes with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from torch.fx import GraphModule

from edgekd.data.base import BatchSource, Data, evaluation_batches
from edgekd.errors import ModelError, RecipeError, TargetError
from edgekd.files import write_atomically
from edgekd.knowledge.feature import HintLoss
from edgekd.knowledge.learning import learn
from edgekd.knowledge.taps import Hints
from edgekd.knowledge.teachers import TeacherLike
from edgekd.latency.model import LatencyModel
from edgekd.network import IO, Network
from edgekd.quantization.bias_correction import correct_biases
from edgekd.quantization.calibration import calibrate, settle
from edgekd.quantization.capture import capture, move
from edgekd.quantization.equalization import equalize
from edgekd.quantization.fake_quant import Observer
from edgekd.quantization.layers import Inputs, stored_tensors
from edgekd.quantization.placement import describe, left_in_float, place, quantizers
from edgekd.quantization.rounding import round_weights
from edgekd.quantization.sensitivity import mixed_precision
from edgekd.reporting.progress import console
from edgekd.rundir import RunDir
from edgekd.target import Target
from edgekd.tasks.base import Task
from edgekd.training import fabric


def quantize(
    net: Network,
    *,
    target: str | Target,
    data: BatchSource,
    teacher: TeacherLike | Sequence[TeacherLike] | None = None,
    task: Task | None = None,
    epochs: int = 0,
    calibration: int = 512,
    observer: Observer = "mse",
    equalized: bool = False,
    adaround: int = 0,
    correct_bias: bool = True,
    float_layers: Collection[str] = (),
    max_drop: float | None = None,
    alpha: float = 0.9,
    hints: Hints = (),
    hint_weight: float = 1.0,
    hint_loss: HintLoss = "fitnets",
    cache: Path | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    freeze_scales: float = 1.0,
    batchnorm: float = 0.0,
    seed: int = 0,
    accelerator: str = "auto",
    run: RunDir | None = None,
) -> Network:
    """A quantized, trainable network for `target`'s scheme.

    `epochs=0`: post-training. Otherwise the graph is trained as the device will compute it, with
    learnable scales: from labels (`task` only: QAT), from a teacher without labels (`teacher`
    only), or from both (quantization-aware distillation).

    Args:
        net: a float network; the capture is in eval mode, so dropout is off in training too.
        target: a Target or its name; its scheme says what runs in integers.
        data: a Data, or batches; their inputs calibrate, and train if `epochs`.
        calibration: samples to set the first scales from.
        observer: "minmax", "moving-average", "percentile" or "mse", see `calibrate`.
        equalized: balance the weights of consecutive layers first, see `equalize`; feature maps
            between them are scaled for hints, too.
        adaround: iterations for each layer in which its weights learn to round up or down, see
            `round_weights`; 0: they are rounded to nearest.
        correct_bias: take the mean error of each layer's outputs out of its biases, before any
            training, see `correct_biases`.
        float_layers: layers that stay in float, by their module's path.
        max_drop: the fewest further layers stay in float for which the metric drops by this or
            less, as a share of 1, before any training; see `mixed_precision`. Each is priced by
            the target's latency model where its kernels were measured, else by MACs. With a
            `run`, the table of all layers is in its `sensitivity.json`.
        freeze_scales: share of the training behind which scales stay as they are; 1: they learn
            to its end.
        batchnorm: share of the training in which layers that had a BatchNorm have it again, with
            each batch's statistics, see `quantization/batchnorm.py`; 0: it is folded from the
            start, which trains a step cheaper. It is for long trainings on the student's own data:
            with 0.8 and `lr` 1e-2 a student learns in integers about what it would in float. A few
            hundred images would spoil the statistics.
        hints, hint_weight, hint_loss, cache: see `distill`; paths are those of the float network.

    Raises:
        TargetError: the target has no integers.
        ModelError: `net` is quantized already, cannot be captured, or has nothing to quantize; or
            `max_drop` cannot be reached.
        RecipeError: `adaround` is negative, or there is no such observer.
    """
    target = Target.load(target)
    if target.scheme is None:
        raise TargetError(
            f"{target.name} runs no integers{target.why_float}; export the float network to it"
        )
    if net.scheme is not None:
        raise ModelError("this network is quantized already; quantize takes the float one")
    if adaround < 0:
        raise RecipeError(f"quantize: adaround is {adaround}; give iterations, or 0 for none")
    on = fabric(accelerator)
    inputs = [
        tuple(x.to(on.device) for x in batch)
        for batch in calibration_inputs(net.io, data, calibration)
    ]
    student = _calibrated(net, target, float_layers, inputs, observer, equalized)
    if max_drop is not None:
        table = mixed_precision(
            net, student, max_drop=max_drop, data=data, task=task, inputs=inputs,
            observer=observer, on=on, correct_bias=correct_bias,
            cost_ms=_float_costs_ms(net, target),
        )  # fmt: skip
        console.print(f"quantize: {table.summary}")
        if run is not None:
            run.path.mkdir(parents=True, exist_ok=True)
            write_atomically(run.path / "sensitivity.json", table.model_dump_json(indent=1))
        if table.in_float:
            float_layers = (*float_layers, *table.in_float)
            student = _calibrated(net, target, float_layers, inputs, observer, equalized)
    graph = student.module
    assert isinstance(graph, GraphModule)
    if floating := left_in_float(graph):
        console.print(f"quantize: in float stay {describe(floating)}")
    if adaround or correct_bias:
        floats = stored_tensors(move(graph, on.device))
        # Biases first. Rounding minds the output behind the activation only, so that errors where
        # it clips mean nothing; to correct their mean costs EfficientNet-Lite0 3.5 dB of SQNR.
        if correct_bias:
            correct_biases(graph, floats, inputs)
        if adaround:
            round_weights(graph, floats, inputs, iterations=adaround, seed=seed)
        move(graph, "cpu")
    if epochs:
        learn(
            student, original=net.module, task=task, data=data, teacher=teacher, alpha=alpha,
            hints=hints, hint_weight=hint_weight, hint_loss=hint_loss, cache=cache, epochs=epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed, on=on,
            freeze_scales=freeze_scales, batchnorm=batchnorm,
            label="quantized training" if teacher is None else "quantized distilling", run=run,
        )  # fmt: skip
    settle(graph, integer_bias=target.scheme.bias == "int32")
    return student


def _calibrated(
    net: Network,
    target: Target,
    float_layers: Collection[str],
    inputs: Sequence[Inputs],
    observer: Observer,
    equalized: bool = False,
) -> Network:
    """`net` in the integers of `target`'s scheme, its scales from `inputs`."""
    assert target.scheme is not None
    graph = capture(net.module, net.io.example(2))
    if equalized:
        equalize(graph)
    graph = place(graph, target.scheme, float_layers)
    if not quantizers(graph):
        raise ModelError(
            f"{net!r} has no operator that {target.name} runs in integers "
            f"({', '.join(target.scheme.ops)})"
        )
    if inputs:
        move(graph, inputs[0][0].device)
    calibrate(graph, inputs, observer)
    return net.quantized(move(graph, "cpu"), target.scheme, float_layers)


def _float_costs_ms(net: Network, target: Target) -> dict[str, float]:
    """See `LatencyModel.float_costs_ms`; empty too where nothing is known of the target."""
    try:
        return LatencyModel.load(target).float_costs_ms(net)
    except (TargetError, ModelError):
        return {}


def calibration_inputs(io: IO, data: BatchSource, count: int) -> list[Inputs]:
    """The inputs of about `count` samples, in batches, without augmentation."""
    if isinstance(data, Data):
        data = data.subset(train=min(count, len(data.splits["train"])))
    found: list[Inputs] = []
    for batch in evaluation_batches(data, split="train", batch_size=64):
        inputs, _ = io.divide(batch)
        found.append(tuple(x[:count] for x in inputs))
        count -= len(inputs[0])
        if count <= 0:
            break
    return found
