"""export: one file for one target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from edgekd.errors import TargetError
from edgekd.network import Network
from edgekd.runtimes.base import Artifact, get_runtime
from edgekd.runtimes.bundle import write_bundle
from edgekd.target import Target

if TYPE_CHECKING:
    from edgekd.models.two_stage import TwoStage


def export(
    net: Network | TwoStage,
    *,
    target: str | Target,
    out: str | Path,
    examples: Tensor | Sequence[Tensor] | None = None,
) -> Artifact:
    """Write `net` as `target` runs it, into the folder `out`, with its bundle beside it.

    A float network gives the float artifact, a quantized one the integer artifact. What else the
    device needs lies beside the file, see `runtimes/bundle.py`; `artifact.json` is written last.

    Args:
        net: float, or quantized for a scheme that fits the target's (equal, or int8 activations
            that become uint8 without loss); or a two-stage detector, see `stages/whole.py`.
        out: the artifact's own folder; made if absent.
        examples: a batch of inputs, (N, ...) each, of which the bundle's self-check takes three
            samples; seeded noise where there are none.

    Raises:
        TargetError: the target has no integers, or wants others than `net` was trained for.
        ModelError: an operator has no form in the target's format.
        StateError: `out` holds an artifact of another target or precision.
    """
    target = Target.load(target)
    if not isinstance(net, Network):
        from edgekd.stages.whole import export_whole  # torchvision's detectors take a second

        images = examples if examples is None or isinstance(examples, Tensor) else examples[0]
        return export_whole(net, target=target, out=out, examples=images)
    precision = target.float_precision
    if net.scheme is not None:
        precision = "int8"
        if target.scheme is None:
            raise TargetError(
                f"{target.name} runs no integers{target.why_float}; export the float network to it"
            )
        if not net.scheme.fits(target.scheme):
            raise TargetError(
                f"this network is quantized as {net.scheme}; {target.name} takes "
                f"{target.scheme}: quantize with target={target.name!r}"
            )
    if precision is None:
        raise TargetError(f"{target.name} runs integers only; quantize with target={target.name!r}")
    folder = Path(out)
    Artifact.claim(folder, target, precision)
    runtime = get_runtime(target.runtime)
    path = folder / f"model{runtime.suffix}"
    versions = runtime.export(net, target, path)
    write_bundle(path, net, target, precision, versions=versions, examples=examples)
    return Artifact.of(path, target=target, precision=precision, versions=versions)
