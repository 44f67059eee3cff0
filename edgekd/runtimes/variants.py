"""Further files of one artifact: ONNX Runtime's format, integers or bytes in, boxes out."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from edgekd.errors import ModelError
from edgekd.files import write_atomically
from edgekd.network import Network, Preprocessing
from edgekd.runtimes.detections import (
    PLUGIN,
    append_decoding,
    append_plugin,
    append_suppression,
)
from edgekd.runtimes.integer_ends import KEY, cut_ends
from edgekd.runtimes.onnx_graph import own_zero_points, pad_before_averages, to_onnx
from edgekd.runtimes.operator_tables import operator_table
from edgekd.runtimes.preprocessing import fold_preprocessing
from edgekd.runtimes.rules import check_operators
from edgekd.runtimes.shapes import fix_shapes
from edgekd.target import Target

# One reduced build that was published: a transformer's operators, arm64, not compressed. Nothing
# was built here, and nothing tells how far another network's is from it.
REDUCED_BUILD = {
    "full_mb": 27, "reduced_mb": 11, "estimated": True,
    "source": "https://github.com/cantoo-scribe/capacitor-onnx/blob/HEAD/docs/reduced-onnx.md",
}  # fmt: skip


def write_variants(path: Path, target: Target, net: Network) -> dict[str, dict[str, Any]]:
    """Write what the target wants beside `path`; the manifest's facts of each file, by its name.

    Raises:
        TargetError: an operator of a variant that the device does not hold.
    """
    written: dict[str, dict[str, Any]] = {}
    if "ort" in target.variants:
        written |= _ort(path)
    if "integer_inputs" in target.variants:
        written |= _integer_inputs(path)
    if "images" in target.variants and net.io.preprocessing is not None:
        written |= _images(path, net.io.preprocessing)
    if net.io.decoding is not None:
        if "decoded" in target.variants:
            written |= _decoded(path, target, net)
        if "detections" in target.variants:
            written |= _detections(path, target, net)
    return {n: f | {"size_bytes": path.with_name(n).stat().st_size} for n, f in written.items()}


def _ort(path: Path) -> dict[str, dict[str, Any]]:
    """`model.ort`, optimized for Arm, and the list of operators that a reduced build needs."""
    from onnxruntime.tools.convert_onnx_models_to_ort import (
        OptimizationStyle,
        convert_onnx_models_to_ort,
    )

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", ResourceWarning)  # the tool leaves files open
        logging.disable(logging.INFO)
        try:
            convert_onnx_models_to_ort(
                path, Path(folder), [OptimizationStyle.Fixed], target_platform="arm"
            )
        finally:
            logging.disable(logging.NOTSET)
        config = next(Path(folder).glob("*.config")).read_text()
        model = (Path(folder) / f"{path.stem}.ort").read_bytes()
    write_atomically(path.with_suffix(".ort"), model)
    write_atomically(path.with_suffix(".required_operators.config"), config)
    operators = sum(
        len(line.split(";")[-1].split(","))
        for line in config.splitlines() if line and not line.startswith("#")
    )  # fmt: skip
    return {
        path.with_suffix(".ort").name: {"what": "ONNX Runtime's format, optimized for Arm"},
        path.with_suffix(".required_operators.config").name: {
            "what": "for ONNX Runtime's build.py --include_ops_by_config",
            "operators": operators,
            "reduced_build": REDUCED_BUILD,
        },
    }


def _integer_inputs(path: Path) -> dict[str, dict[str, Any]]:
    """`model.integer_inputs.onnx`: the file without the quantize operators of its inputs."""
    model = ir.load(path)
    try:
        cut_ends(model, inputs=True, outputs=False)
    except ModelError:  # a float artifact
        return {}
    place = path.with_suffix(".integer_inputs.onnx")
    _save(model, place)
    return {
        place.name: {
            "what": "takes integers: real value = scale · (integer − zero_point)",
            "integers": json.loads(model.metadata_props[KEY]),
        }
    }


def _images(path: Path, preprocessing: Preprocessing) -> dict[str, dict[str, Any]]:
    """`model.images.onnx`: the file with the normalisation inside, for images of bytes."""
    model = ir.load(path)
    where = fold_preprocessing(model, preprocessing)
    place = path.with_suffix(".images.onnx")
    _save(model, place)
    return {place.name: {"what": "takes uint8 images", "normalised": where}}


def _decoded(path: Path, target: Target, net: Network) -> dict[str, dict[str, Any]]:
    """`model.decoded.onnx`: the file with the decoding inside, for a suppression of one's own."""
    model = _with_boxes(path, target, net)
    what = "gives boxes in pixels of the input, and scores"
    return _checked(model, target, path.with_suffix(".decoded.onnx"), what)


def _detections(path: Path, target: Target, net: Network) -> dict[str, dict[str, Any]]:
    """`model.detections.onnx`: the file with decoding and suppression inside, batch 1."""
    assert net.io.decoding is not None
    model = _with_boxes(path, target, net)
    if PLUGIN in operator_table(target).operators:
        append_plugin(model, net.io.decoding)
        what = f"gives what TensorRT's plugin {PLUGIN} does, in pixels of the input"
    else:
        fix_shapes(model, {i.name: (1, *i.shape) for i in net.io.inputs})
        append_suppression(model, net.io.decoding)
        what = "gives left, top, right, bottom in pixels of the input, score and class; or -1"
    return _checked(model, target, path.with_suffix(".detections.onnx"), what)


def _with_boxes(path: Path, target: Target, net: Network) -> ir.Model:
    """The artifact in ONNX, which gives boxes and scores."""
    assert net.io.decoding is not None
    if path.suffix == ".onnx":
        model = ir.load(path)
    else:  # OpenVINO's own format holds the same
        model = to_onnx(net, target)
        pad_before_averages(model)
        own_zero_points(model)
    append_decoding(model, net.io.decoding)
    return model


def _checked(model: ir.Model, target: Target, path: Path, what: str) -> dict[str, dict[str, Any]]:
    """Write a file that the target's operators make up; its facts."""
    ShapeInferencePass()(model)
    check_operators(model, target)
    _save(model, path)
    shapes = {
        str(value.name): [dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()]
        for value in model.graph.outputs
    }
    return {path.name: {"what": what, "outputs": shapes}}


def _save(model: ir.Model, path: Path) -> None:
    """The file whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        ir.save(model, whole)
        whole.replace(path)
