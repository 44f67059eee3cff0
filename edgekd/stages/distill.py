"""distill: train a float network on labels, on a teacher, or on both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgekd.data.base import BatchSource
from edgekd.errors import ModelError
from edgekd.knowledge.feature import HintLoss
from edgekd.knowledge.learning import learn
from edgekd.knowledge.taps import Hints
from edgekd.knowledge.teachers import TeacherLike
from edgekd.network import Network
from edgekd.rundir import RunDir
from edgekd.tasks.base import Task
from edgekd.training import fabric


def distill(
    net: Network,
    *,
    task: Task,
    data: BatchSource,
    teacher: TeacherLike | Sequence[TeacherLike] | None = None,
    epochs: int,
    alpha: float = 0.9,
    hints: Hints = (),
    hint_weight: float = 1.0,
    hint_loss: HintLoss = "fitnets",
    cache: Path | None = None,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
    accelerator: str = "auto",
    run: RunDir | None = None,
) -> Network:
    """A trained copy of `net`: from a teacher (Hinton et al. 2015), or plainly.

    Args:
        net: a float network.
        data: a Data, or batches (x, labels) that can be iterated once per epoch.
        teacher: a Network, a module, a callable, an `OnnxTeacher`, or a list of these (an ensemble,
            averaged as the task says). None is plain training: teachers and control arms come out
            of the same function.
        alpha: the teacher's share of the loss; labels have the rest.
        hints: inner tensors to learn from too (Romero et al. 2015): pairs of module paths, the
            student's and the teacher's; one path alone stands for both. "auto": the ends of the
            stages with equal resolution. Of several teachers the first one with a module.
        hint_weight: weight of the hints' term.
        hint_loss: "fitnets": the squared error behind a regressor; "pkd": the correlation of each
            channel, for teachers of another family; "fgd": objects and background apart, by the
            teacher's attention. See `edgekd.knowledge.feature`.
        cache: a folder where the teacher's answers are kept, computed once for every image that
            the augmentation can make (none or "flip"; 16 GiB at most). None asks it online.
        lr: highest learning rate of the cosine schedule.
        run: where to keep the log and the checkpoint to resume from.

    Raises:
        ModelError: `net` is quantized already, or a hint names no module.
        TrainingError: the loss is not finite.
    """
    if net.scheme is not None:
        raise ModelError("distill takes a float network; this one is quantized: use quantize")
    student = net.copy()
    learn(
        student, original=student.module, task=task, data=data, teacher=teacher, alpha=alpha,
        hints=hints, hint_weight=hint_weight, hint_loss=hint_loss, cache=cache, epochs=epochs,
        batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed, on=fabric(accelerator),
        label="training" if teacher is None else "distilling", run=run,
    )  # fmt: skip
    return student
