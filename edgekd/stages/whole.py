"""Export of a two-stage detector, whole and in float, which no exporter of graphs can capture."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from edgekd.errors import ModelError, TargetError
from edgekd.files import write_atomically
from edgekd.models.torchvision_detectors import ALTERNATIVE
from edgekd.models.two_stage import TwoStage
from edgekd.runtimes.base import Artifact, verifying_runtime
from edgekd.runtimes.opset import EXPORTED
from edgekd.stages.adapt import adapt
from edgekd.target import Target
from edgekd.tasks.detection import Detection

SAME = {"fp32": 0.99, "fp16": 0.95}  # share of the network's detections that the file must have


def export_whole(
    net: TwoStage, *, target: Target, out: str | Path, examples: Tensor | None = None
) -> Artifact:
    """`export` of a two-stage detector: images one by one, as its one output detections.

    The manifest beside it says enough for `OnnxTeacher` to read the file.

    Args:
        examples: (N, 3, H, W) images on which the file has to give the network's detections;
            seeded noise where there are none.

    Raises:
        ModelError: `net` is something else.
        TargetError: another runtime than ONNX Runtime and OpenVINO, or the file has not the same
            detections.
        StateError: `out` holds an artifact of another target or precision.
    """
    if not isinstance(net, TwoStage):
        raise ModelError(
            f"export takes a Network or a TwoStage, not {type(net).__name__}: "
            "edgekd.Network(module, example_inputs)"
        )
    if target.runtime not in ("onnxruntime", "openvino"):
        raise TargetError(
            f"{target.name} takes no {type(net.module).__name__} (RoIAlign between its stages), "
            f"ONNX Runtime and OpenVINO do; {ALTERNATIVE}"
        )
    if examples is None:
        generator = torch.Generator().manual_seed(0)
        examples = torch.randn(2, *net.io.inputs[0].shape, generator=generator)
    with TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, of sizes that are fixed here
        source = Path(folder) / "two_stage.onnx"
        # torch.export has no form for as many boxes as there happen to be
        torch.onnx.export(
            net, (examples[:1],), source, dynamo=False, opset_version=EXPORTED,
            input_names=["input"], output_names=["detections"],
        )  # fmt: skip
        _check(net, adapt(source, target=target, out=Path(folder) / "checked")[0], target, examples)
        artifact, _ = adapt(source, target=target, out=out)
    manifest = {
        "format": 1, "target": target.name, "precision": artifact.precision,
        "file": artifact.path.name, "io": net.io.model_dump(mode="json"),
    }  # fmt: skip
    write_atomically(artifact.path.with_name("manifest.json"), json.dumps(manifest, indent=1))
    return artifact


def _check(net: TwoStage, artifact: Artifact, target: Target, examples: Tensor) -> None:
    """Refuse a file that has not the network's detections."""
    session = verifying_runtime(target).load(artifact.path, threads=1)
    found = [torch.from_numpy(session([x[None].numpy()])[0]) for x in examples]
    same = Detection(shown=0.0).agreement(net(examples), torch.cat(found))
    if same < (least := SAME[artifact.precision]):
        raise TargetError(
            f"for {target.name} the file has {same:.1%} of the network's detections on "
            f"{len(examples)} images; {least:.0%} are wanted: give examples= of your data"
        )
