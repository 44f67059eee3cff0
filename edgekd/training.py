"""The one training loop, on Lightning Fabric.

Everything random is a function of (seed, step), so a run that was killed and started again from
its checkpoint ends in the same weights as one that was not; on a CPU, bit for bit.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.fx import GraphModule

from edgekd.data.base import BatchSource, evaluation_batches, train_steps, training_batches
from edgekd.errors import TrainingError
from edgekd.network import Network
from edgekd.quantization.batchnorm import BatchNorms
from edgekd.quantization.capture import arguments, move
from edgekd.quantization.layers import layers
from edgekd.quantization.placement import input_scales, training_graph
from edgekd.reporting.progress import Progress
from edgekd.rundir import RunDir
from edgekd.tasks.base import Score, Task

CHECKPOINT_SECONDS = 20.0
STATISTICS_BATCHES = 8  # that the batch normalisation of a quantized network starts from
WARM_UP = 0.05  # share of the run in which the learning rate rises from 0

# (inputs, targets, outputs) -> name of the term -> its share of the loss
Terms = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Any], dict[str, Tensor]]


def fabric(accelerator: str = "auto") -> Fabric:
    """One device, or what `fabric run --devices N` started this process for."""
    launched = os.environ.get("LT_CLI_USED")
    made = Fabric(accelerator=accelerator, devices="auto" if launched else 1)
    made.launch()
    return made


def fit(
    net: Network,
    *,
    terms: Terms,
    data: BatchSource,
    keyed: bool = False,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    freeze_scales: float = 1.0,
    batchnorm: float = 0.0,
    seed: int,
    on: Fabric,
    label: str,
    run: RunDir | None,
) -> None:
    """Train `net` in place: warm-up, then cosine to zero.

    A float network with SGD and Nesterov momentum, a quantized one with AdamW, whose learning
    rate is relative to the size of each tensor.

    Args:
        terms: from a batch, divided, and the outputs to the weighted terms of the loss. If it is a
            module, its parameters are trained along.
        keyed: whether its batches carry keys, see `training_batches`.
        epochs: passes over `data`.
        lr: the highest learning rate, for a batch of `batch_size`.
        weight_decay: of weights; not of biases, normalisation and quantizers.
        freeze_scales: share of the run behind which a quantized network's scales stay; its weights
            then settle on a grid that does not move.
        batchnorm: share of the run in which a quantized network's layers have their batch
            normalisation back, with each batch's statistics, see `quantization/batchnorm.py`.
        label: what the progress bar says.
        run: where the log and the checkpoint go; None writes nothing.

    Raises:
        TrainingError: the loss is not finite; the last checkpoint is from before.
    """
    move(net.module, on.device).to(memory_format=_memory_format(net))
    fixed: list[Tensor] = []
    trained, norms = net.module, None
    if net.scheme is not None:
        assert isinstance(net.module, GraphModule)
        fixed = input_scales(net.module)
        trained = training_graph(net.module)
        if batchnorm:
            some = training_batches(data, batch_size=batch_size, seed=seed, epoch=0, keyed=keyed)
            norms = BatchNorms(trained, [
                tuple(x.to(on.device) for x in net.io.divide(batch)[0])
                for batch in itertools.islice(some, STATISTICS_BATCHES)
            ])  # fmt: skip
    for scale in fixed:
        scale.requires_grad_(False)
    learnt = torch.nn.ModuleDict()  # beside the network
    if isinstance(terms, torch.nn.Module):
        learnt["terms"] = terms
    if norms is not None:
        learnt["batchnorms"] = norms
    learnt.to(on.device)
    optimizer = _optimizer(net, learnt, lr, weight_decay)
    state = run.load_checkpoint() if run else None
    step, count = 0, 0
    sums: dict[str, Tensor] = {}  # of this epoch's terms
    if state is not None:
        step, count, sums = state["step"], state["count"], state["sums"]
        net.load_state(state["net"], "last.ckpt")
        learnt.load_state_dict(state["learnt"])
        optimizer.load_state_dict(state["optimizer"])
    module = on.setup_module(trained)
    if isinstance(terms, torch.nn.Module) and any(True for _ in terms.parameters()):
        terms = on.setup_module(terms)
    stepper = on.setup_optimizers(optimizer)
    assert not isinstance(stepper, tuple)

    def checkpoint() -> None:
        if run and on.is_global_zero:
            weights = {name: t.detach().cpu() for name, t in net.state().items()}
            run.save_checkpoint(
                {
                    "step": step,
                    "count": count,
                    "sums": sums,
                    "net": weights,
                    "learnt": learnt.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
            )

    learnt_scales = [
        tensor
        for name, tensor in net.state().items()
        if name.startswith("quant.") and tensor.requires_grad
    ]
    steps = train_steps(data, batch_size)
    saved_at = time.monotonic()
    first_epoch, start = divmod(step, steps) if steps else (step, 0)
    finite_step = step
    net.train_mode(True)
    with Progress(label, None if steps is None else steps * epochs, done=step) as progress:
        for epoch in range(first_epoch, epochs):
            batches = training_batches(
                data, batch_size=batch_size, seed=seed, epoch=epoch, start=start, keyed=keyed
            )
            for index, batch in enumerate(batches, start):
                # without a length, one rate for each epoch: that of its middle
                share = (epoch + (index / steps if steps else 0.5)) / epochs
                for group in optimizer.param_groups:
                    group["lr"] = lr * _schedule(share) * group["size"]
                for scale in learnt_scales:
                    scale.requires_grad_(share < freeze_scales)
                if norms is not None:
                    norms.train(share < batchnorm)
                torch.manual_seed(seed * 1_000_003 + epoch * 100_003 + index)
                batch = tuple(t[on.global_rank :: on.world_size].to(on.device) for t in batch)
                inputs, targets = net.io.divide(batch)
                values = terms(inputs, targets, module(*inputs))
                loss = torch.stack(list(values.values())).sum()
                stepper.zero_grad()
                on.backward(loss)
                stepper.step()
                count += 1
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value.detach()
                progress.advance(f"epoch {epoch + 1}/{epochs}", loss.detach())
                if steps:
                    step = epoch * steps + index + 1
                    if time.monotonic() - saved_at > CHECKPOINT_SECONDS and index + 1 < steps:
                        finite_step = _check_finite(net, sums, lr, label, epoch, finite_step, step)
                        checkpoint()
                        saved_at = time.monotonic()
            if not steps:
                step = epoch + 1
            finite_step = _check_finite(net, sums, lr, label, epoch, finite_step, step)
            if run and on.is_global_zero:
                means = {name: float(total) / count for name, total in sums.items()}
                run.log({"step": step, "epoch": epoch + 1, **means})
            start, count, sums = 0, 0, {}
            checkpoint()
            saved_at = time.monotonic()
    for scale in (*learnt_scales, *fixed):
        scale.requires_grad_(True)
    if norms is not None:
        norms.fold()
    # as it will be when it is loaded: kernels and captured graphs depend on the memory format
    move(net.module, "cpu").to(memory_format=torch.contiguous_format)
    net.train_mode(False)


def _memory_format(net: Network) -> torch.memory_format:
    """Channels last, which is 1.3 times as fast on the CPU, and what tensor cores want.

    But for what ends the process there: with AVX-512, oneDNN 3.12 (in torch 2.14) crashes in the
    backward pass of a 1×1 convolution of stride 2 from 2 to 15 channels, on maps of more than about
    2,000 pixels.
    """
    largest = max((math.prod(each.shape[-2:]) for each in net.io.inputs), default=0)
    narrow = any(
        len(weight) == 4 and tuple(weight[2:]) == (1, 1) and 1 < weight[1] < 16 and max(stride) > 1
        for weight, stride in _convolutions(net.module)
    )
    return torch.contiguous_format if narrow and largest > 2000 else torch.channels_last


def _convolutions(module: torch.nn.Module) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(shape of the weight, stride) of each convolution of a module or a captured graph."""
    if isinstance(module, GraphModule):
        for layer in layers(module):
            if layer.node.target is torch.ops.aten.conv2d.default:
                yield layer.weight.shape, (*arguments(layer.node)[3:4], (1, 1))[0]
        return
    for each in module.modules():
        if isinstance(each, torch.nn.Conv2d):
            yield each.weight.shape, each.stride


def _optimizer(
    net: Network, learnt: torch.nn.Module, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    alike: dict[tuple[float, float], list[Tensor]] = {}
    for name, tensor in (*net.state().items(), *learnt.named_parameters()):
        if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad:
            is_scale = name.startswith("quant.")
            decay = 0.0 if is_scale or tensor.dim() < 2 else weight_decay
            size = 1.0 if net.scheme is None else _size(tensor, is_scale)
            alike.setdefault((decay, size), []).append(tensor)
    groups = [
        {"params": tensors, "weight_decay": decay, "size": size}
        for (decay, size), tensors in alike.items()
    ]
    if net.scheme is None:
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    # With BatchNorm folded, gradients differ in size from layer to layer, and scales are a
    # thousandth of weights. So a step is a share of each tensor's size, as in Adafactor
    # (arXiv:1804.04235 §8), whose norms alone would cost a tenth of a training step.
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def _size(tensor: Tensor, is_scale: bool) -> float:
    """Root mean square; a bias near 0 counts as 0.001, else it could not move."""
    size = float(tensor.detach().square().mean().sqrt())
    return size if is_scale else max(size, 1e-3)


def _schedule(share: float) -> float:
    """Linear warm-up, then half a cosine; `share` of the run that is behind, 0 to 1."""
    if share < WARM_UP:
        return (share + 1e-3) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def _check_finite(
    net: Network, sums: dict[str, Tensor], lr: float, label: str, epoch: int, good: int, step: int
) -> int:
    bad = [name for name, total in sums.items() if not torch.isfinite(total)]
    what = f"the loss ({', '.join(bad)})"
    if not bad:  # a finite loss may have a gradient that is not
        bad = [name for name, t in net.module.named_parameters() if not torch.isfinite(t).all()]
        what = f"the weight {bad[0]}" if bad else ""
    if bad:
        raise TrainingError(
            f"{label}: {what} is not finite in epoch {epoch + 1}, between "
            f"steps {good} and {step}; lr is {lr}: try {lr / 10:g}, and check the data for NaN. "
            f"The checkpoint of step {good} is intact"
        )
    return step


def predict(
    net: Network, data: BatchSource, *, on: Fabric, task: Task | None = None
) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
    """(outputs, targets) of each batch of the test split, on the CPU, in eval mode.

    With a task, its answers take the place of the outputs.
    """
    task = None if task is None else task.of(net.io)
    move(net.module, on.device)
    net.train_mode(False)
    with torch.no_grad():
        for batch in evaluation_batches(data):
            inputs, targets = net.io.divide(batch)
            with _whole_products(net):
                outputs = _to_cpu(net(*(x.to(on.device) for x in inputs)))
            yield (outputs if task is None else task.answers(outputs)), targets
    move(net.module, "cpu")


def _whole_products(net: Network) -> AbstractContextManager[None]:
    """A GPU's convolutions of integers without TF32, whose 10 bits round their scale away."""
    if net.scheme is None or not torch.cuda.is_available():
        return nullcontext()
    cudnn = torch.backends.cudnn
    kept = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    exact: AbstractContextManager[None] = cudnn.flags(enabled=True, allow_tf32=False, **kept)
    return exact


def evaluate(net: Network, *, task: Task, data: BatchSource, on: Fabric) -> Score:
    """The task's metric of `net` over the whole test split."""
    answers, targets = gather(predict(net, data, on=on, task=task))
    return task.of(net.io).score(answers, targets)


def gather(pairs: Iterator[tuple[Any, tuple[Tensor, ...]]]) -> tuple[Any, tuple[Tensor, ...]]:
    """All outputs in one, and all targets in one, along the batch axis."""
    outputs, targets = zip(*pairs, strict=True)
    return _concatenate(outputs), tuple(torch.cat(t) for t in zip(*targets, strict=True))


def _to_cpu(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.cpu()
    if isinstance(outputs, dict):
        return {name: value.cpu() for name, value in outputs.items()}
    return tuple(value.cpu() for value in outputs)


def _concatenate(outputs: tuple[Any, ...]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):
        return {name: torch.cat([o[name] for o in outputs]) for name in first}
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
