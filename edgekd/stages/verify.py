"""verify: is the artifact what was trained?"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.fx import GraphModule

from edgekd.data.base import BatchSource, evaluation_batches
from edgekd.errors import DataError, MissingPackageError, StateError
from edgekd.network import IO, Network
from edgekd.quantization.fake_quant import FakeQuant
from edgekd.quantization.placement import intended_matrix_ops
from edgekd.reporting.progress import Progress
from edgekd.runtimes.base import (
    Arrays,
    Artifact,
    CompileCheck,
    Runtime,
    Session,
    verifying_runtime,
)
from edgekd.runtimes.half import to_half, written_out
from edgekd.runtimes.local_parity import LocalParity, local_parity, saturating
from edgekd.runtimes.onnxruntime import OrtSession
from edgekd.runtimes.tensorrt import compile_check
from edgekd.target import Precision, QuantScheme, Target
from edgekd.tasks.base import Score, Task, top1_agreement

WITHIN_ONE_STEP = 0.99  # of outputs, where the runtime's rounding is known: they should be equal
LOCAL_SAMPLES = 8  # local parity shows every tensor; a few samples have millions of elements

Gate = Literal["passed", "failed", "unchecked"]


class Parity(BaseModel):
    """Figures of an artifact against the Network it came from, and the gate.

    Attributes:
        verifier: "native": the device's kernels ran; "emulated": another runtime stood
            in for it; None if nothing could run.
        agreement: share of samples with the same answer.
        max_steps, mean_steps: difference of outputs in steps; a step is the scale of the
            output's quantizer, or amax / 127 where the output is float. INT8 only.
        relative_error: largest difference of outputs over their largest magnitude. FP32 only.
        half_agreement, half_relative_error: likewise of an FP16 copy of the file, each operator
            rounded to half precision on this host: a prediction of what the device builds. Of
            precision "fp16", where the file is ONNX.
        metric: of the artifact itself; reference_metric: of the Network.
        integer_share: matrix operators in integers over those that the placement has in integers.
            INT8 only.
        gate: "passed" only if every check that was asked for ran and held.
        compiled: what a compiler for the target's kind of device makes of the file, where its
            kernels are not here; None where nothing can.
        reasons: why the gate is failed or unchecked.
        local: each quantized operator by itself, of an INT8 artifact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    target: str
    precision: Precision
    verifier: Literal["native", "emulated"] | None
    n: int = 0
    agreement: float | None = None
    max_steps: float | None = None
    mean_steps: float | None = None
    relative_error: float | None = None
    half_agreement: float | None = None
    half_relative_error: float | None = None
    metric: Score | None = None
    reference_metric: Score | None = None
    integer_share: float | None = None
    gate: Gate
    reasons: tuple[str, ...] = ()
    local: LocalParity | None = None
    compiled: CompileCheck | None = None


def verify(
    artifact: Artifact,
    net: Network,
    *,
    data: BatchSource,
    task: Task | None = None,
    agreement: float = 0.995,
    metric_gap: float = 0.001,
    mean_steps: float = 1.0,
    integer_share: float = 1.0,
    local_exact: float = 0.999,
) -> Parity:
    """Run the artifact and the Network over the whole test split and compare.

    An INT8 artifact is also compared operator by operator, on a few samples: end to end alone, one
    value that rounds to the other side moves all that follows.

    Args:
        task: its agreement and its metric; without one, outputs of (N, K) are compared by their
            largest score and no metric is asked for.
        agreement: least share of samples with the same answer.
        metric_gap: largest difference of the metric, as a share of 1.
        mean_steps: largest mean difference of an INT8 artifact's outputs, in steps; sound ones
            are below 0.2, and classes far apart hide much more from the agreement.
        integer_share: least share of integer matrix operators, for an INT8 artifact; layers that
            were left in float do not count.
        local_exact: least share of elements that each quantized operator gives exactly, of the
            runtime's own inputs, or `Runtime.exact` where that is less; none may be off by more
            than 1 step. See `local_parity`.

    Raises:
        StateError: the artifact is in integers and `net` is not, or the other way round.
        DataError: no batch, or its inputs have other shapes than the network's.
    """
    _check_kinds(artifact, net)
    target = Target.load(artifact.target)
    emulated = target.verifier == "emulated"
    common: dict[str, Any] = {"target": target.name, "precision": artifact.precision}
    if not emulated and not target.native_here:
        reason = f"{target.name} needs {target.needs}; this host is another"
        return Parity(**common, verifier=None, gate="unchecked", reasons=(reason,))
    try:
        runtime, session = verifying_runtime(target), verifying_session(artifact, target)
    except MissingPackageError as error:
        return Parity(**common, verifier=None, gate="unchecked", reasons=(str(error),))
    plain = emulated and runtime.plain

    theirs, ours, targets, first = _run_both(session, net, data)
    figures: dict[str, Any] = {"n": len(ours[0])}
    failed: list[str] = []
    unchecked: list[str] = []
    intended: int | None = None
    if not all(np.isfinite(t).all() for t in theirs):
        failed.append("the artifact's outputs are not finite")
    task = None if task is None else task.of(net.io)
    compare = _agreement(task, theirs, ours)
    if compare is None:
        unchecked.append("agreement: outputs are not (N, K) scores; give a task")
    else:
        figures["agreement"] = compare
        if compare < agreement:
            failed.append(f"agreement {compare:.2%} is below {agreement:.2%}")
    if task is not None:
        if not targets:
            unchecked.append("metric: the data has no labels")
        else:
            score = task.score(task.answers(_as_outputs(theirs)), targets)
            reference = task.score(task.answers(_as_outputs(ours)), targets)
            figures |= {"metric": score, "reference_metric": reference}
            if abs(score.value - reference.value) > metric_gap + 1e-12:
                failed.append(
                    f"{task.metric_name} {score.value:.2%} is more than {100 * metric_gap:g} "
                    f"points from the trained network's {reference.value:.2%}"
                )
    if artifact.precision == "int8":
        difference = [
            np.abs(a - b) / output_step(b, net) for a, b in zip(theirs, ours, strict=True)
        ]
        figures["max_steps"] = max(float(d.max()) for d in difference)
        figures["mean_steps"] = mean = float(np.mean([d.mean() for d in difference]))
        if not mean <= mean_steps:  # NaN fails too
            failed.append(
                f"outputs differ by {mean:.3g} steps in the mean; {mean_steps:g} is allowed"
            )
        assert isinstance(net.module, GraphModule)
        intended = intended_matrix_ops(net.module)
        integer, _ = session.integer_share()
        figures["integer_share"] = share = integer / intended if intended else 1.0
        if share < integer_share:
            failed.append(f"{integer} of {intended} matrix operators run in integers")
        elif integer > intended:
            failed.append(
                f"{integer} matrix operators run in integers; only {intended} are meant to: the "
                "runtime quantizes the others by itself"
            )
        written = session if plain else None
        if runtime.plain and not emulated:
            written = runtime.load(artifact.path, threads=torch.get_num_threads(), emulated=True)
        figures["local"] = local = local_parity(
            net,
            [x[:LOCAL_SAMPLES] for x in first],
            written=written,
            shipped=None if plain else session,
            whole=_integer_kernels(artifact, target, runtime, session, net.scheme),
            rounding=runtime.rounding,
        )
        failed += _local_failures(local, local_exact * runtime.exact)
    else:
        figures["relative_error"] = _relative_error(theirs, ours)
    if artifact.precision == "fp16" and artifact.path.suffix == ".onnx":
        rounded = _in_half(artifact, net.io, data)
        figures["half_relative_error"] = _relative_error(rounded, ours)
        figures["half_agreement"] = half = _agreement(task, rounded, ours)
        if not all(np.isfinite(t).all() for t in rounded):
            failed.append("the outputs of the copy in FP16 are not finite")
        if half is not None and half < agreement:
            failed.append(f"agreement in FP16 {half:.2%} is below {agreement:.2%}")
    if target.compile_check is not None:
        try:
            figures["compiled"] = compiled = compile_check(
                artifact.path, target, artifact.precision, intended
            )
            failed += _compile_failures(compiled, artifact.precision)
        except MissingPackageError as error:
            unchecked.append(f"compile check: {error}")
    gate: Gate = "failed" if failed else "unchecked" if unchecked else "passed"
    return Parity(
        **common, **figures, verifier=target.verifier, gate=gate,
        reasons=(*failed, *unchecked),
    )  # fmt: skip


def verifying_session(artifact: Artifact, target: Target) -> Session:
    """The artifact as `verify` runs it: as written, where another runtime stands in."""
    runtime = verifying_runtime(target)
    plain = target.verifier == "emulated" and runtime.plain
    return runtime.load(artifact.path, threads=torch.get_num_threads(), emulated=plain)


def _integer_kernels(
    artifact: Artifact,
    target: Target,
    runtime: Runtime,
    session: Session,
    scheme: QuantScheme | None,
) -> Session | None:
    """The artifact as its runtime's integer kernels run it here, where it is known how they round.

    None too where the runtime is another than the target's, or its kernels saturate on this host.
    """
    saturates = runtime.name == "onnxruntime" and saturating(scheme)
    if runtime.rounding is None or runtime.name != target.runtime or saturates:
        return None
    if target.verifier == "emulated" and runtime.plain:
        return runtime.load(artifact.path, threads=torch.get_num_threads())
    return session


def _check_kinds(artifact: Artifact, net: Network) -> None:
    """Refuse a float network beside an INT8 artifact, and a quantized one beside a float file."""
    integers, quantized = artifact.precision == "int8", net.scheme is not None
    if integers != quantized:
        remedy = "a quantize-... folder" if integers else "a distill-... or prune-... folder"
        raise StateError(
            f"{artifact.path} is {artifact.precision}; the network beside it is "
            f"{'quantized' if quantized else 'float'}: give the one that it was exported from, "
            f"{remedy}"
        )


def _check_shapes(inputs: tuple[Tensor, ...], io: IO) -> None:
    """Refuse data of another size than the network's."""
    for x, each in zip(inputs, io.inputs, strict=True):
        if tuple(x.shape[1:]) != each.shape:
            raise DataError(
                f"{each.name}: samples of the data are {tuple(x.shape[1:])}; the network takes "
                f"{each.shape}: give the data that it was trained for (in a recipe: data.size)"
            )


def _local_failures(local: LocalParity, least: float) -> list[str]:
    """Why an artifact fails local parity, or parity as a whole in the runtime's integers."""
    failures = []
    for how, found in local.passes.items():
        causes = "".join(f"; {cause}" for cause in found.causes)
        if found.first is not None:
            failures.append(f"local parity {how}: {found.first}{causes}")
        elif found.exact < least:
            failures.append(
                f"local parity {how}: {found.exact:.3%} of elements are exact; {least:.3%} is "
                f"asked for{causes}"
            )
    whole = local.as_a_whole
    if whole is not None and not whole.unknown and whole.within_one_step < WITHIN_ONE_STEP:
        failures.append(
            f"{whole.within_one_step:.2%} of the outputs are within one step of the trained "
            f"network in the runtime's own integers; {WITHIN_ONE_STEP:.0%} are asked for"
        )
    return failures


def _compile_failures(compiled: CompileCheck, precision: Precision) -> list[str]:
    """Why an artifact fails the compile check."""
    what = f"{compiled.tool} {compiled.version} for {compiled.capability}"
    if compiled.error is not None:
        return [f"{what} refuses the file: {compiled.error}"]
    if precision == "int8" and compiled.integer < compiled.total:
        named = ", ".join(compiled.floating[:5])
        return [
            f"{what} computes {compiled.total - compiled.integer} of {compiled.total} matrix "
            f"operators in float: {named}"
        ]
    return []


def _run_both(
    session: Session, net: Network, data: BatchSource
) -> tuple[Arrays, Arrays, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(artifact's outputs, network's outputs, targets), whole split each, and the first inputs."""
    theirs: list[Arrays] = []
    ours: list[Arrays] = []
    targets: list[tuple[Tensor, ...]] = []
    first: tuple[Tensor, ...] = ()
    net.train_mode(False)
    with torch.no_grad(), Progress("verifying", None) as progress:
        for batch in evaluation_batches(data):
            inputs, wanted = net.io.divide(batch)
            _check_shapes(inputs, net.io)
            first = first or inputs
            ours.append(_as_arrays(net(*inputs)))
            theirs.append(session([x.numpy() for x in inputs]))
            targets.append(wanted)
            progress.advance()
    if not first:
        raise DataError("no samples to verify with: the data gave no batch")

    def joined(parts: list[Arrays]) -> Arrays:
        return [np.concatenate(p) for p in zip(*parts, strict=True)]

    whole_targets = tuple(torch.cat(t) for t in zip(*targets, strict=True))
    return joined(theirs), joined(ours), whole_targets, first


def _in_half(artifact: Artifact, io: IO, data: BatchSource) -> Arrays:
    """The file's outputs on the whole split with every operator in FP16, as --fp16 may build it."""
    copy, _ = to_half(artifact.path)
    model = ir.to_proto(written_out(copy)).SerializeToString()
    session = OrtSession(model, torch.get_num_threads(), True, f"{artifact.path} in FP16")
    batches = (io.divide(batch) for batch in evaluation_batches(data))
    parts = [session([x.numpy() for x in inputs]) for inputs, _ in batches]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def _relative_error(outputs: Arrays, wanted: Arrays) -> float:
    return max(
        float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))
        for a, b in zip(outputs, wanted, strict=True)
    )


def _as_arrays(outputs: Any) -> Arrays:
    if isinstance(outputs, Tensor):
        outputs = [outputs]
    elif isinstance(outputs, dict):
        outputs = outputs.values()
    return [o.numpy() for o in outputs]


def _as_outputs(arrays: Arrays) -> Any:
    tensors = tuple(torch.from_numpy(a) for a in arrays)
    return tensors[0] if len(tensors) == 1 else tensors


def _agreement(task: Task | None, a: Arrays, b: Arrays) -> float | None:
    if task is not None:
        return task.agreement(task.answers(_as_outputs(a)), task.answers(_as_outputs(b)))
    if len(a) == 1 and a[0].ndim == 2:
        return top1_agreement(_as_outputs(a), _as_outputs(b))
    return None


def output_step(output: NDArray[np.float32], net: Network) -> float:
    """The scale of a single quantized output's quantizer, else amax / 127."""
    assert isinstance(net.module, GraphModule)
    *_, last = net.module.graph.nodes
    ends = last.args[0] if isinstance(last.args[0], (tuple, list)) else [last.args[0]]
    if len(ends) == 1 and ends[0].op == "call_module":
        quantizer = net.module.get_submodule(str(ends[0].target))
        if isinstance(quantizer, FakeQuant):
            return quantizer.scale.item()
    return max(float(np.abs(output).max()), 1e-30) / 127
