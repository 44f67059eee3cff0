"""distill: train a float network on labels, on a teacher, or on both."""

from __future__ import annotations

from collections.abc import Sequence

from edgekd.data.base import BatchSource
from edgekd.errors import ModelError
from edgekd.knowledge.teachers import TeacherLike, as_teacher
from edgekd.knowledge.terms import learning_terms
from edgekd.network import Network
from edgekd.rundir import RunDir
from edgekd.tasks.base import Task
from edgekd.training import fabric, fit


def distill(
    net: Network,
    *,
    task: Task,
    data: BatchSource,
    teacher: TeacherLike | Sequence[TeacherLike] | None = None,
    epochs: int,
    alpha: float = 0.9,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
    accelerator: str = "auto",
    run: RunDir | None = None,
) -> Network:
    """A trained copy of `net`: from a teacher's responses (Hinton et al. 2015), or plainly.

    Args:
        net: a float network.
        data: a Data, or batches (x, labels) that can be iterated once per epoch.
        teacher: a Network, a module, a callable, or a list of these (averaged). None is plain
            training: teachers and control arms come out of the same function.
        alpha: the teacher's share of the loss; labels have the rest.
        lr: highest learning rate of the cosine schedule.
        run: where to keep the log and the checkpoint to resume from.

    Raises:
        ModelError: `net` is quantized already.
        TrainingError: the loss is not finite.
    """
    if net.scheme is not None:
        raise ModelError("distill takes a float network; this one is quantized: use quantize")
    student = net.copy()
    on = fabric(accelerator)
    ask = None if teacher is None else as_teacher(teacher, on.device)
    fit(
        student,
        terms=learning_terms(task, ask, alpha),
        data=data,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        on=on,
        label="training" if teacher is None else "distilling",
        run=run,
    )
    return student
