"""Further files of one ONNX artifact, for phones: ONNX Runtime's format, integers or bytes in."""

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

from edgekd.errors import ModelError
from edgekd.files import write_atomically
from edgekd.network import Preprocessing
from edgekd.runtimes.integer_ends import KEY, cut_ends
from edgekd.runtimes.preprocessing import fold_preprocessing
from edgekd.target import Target

# One reduced build that was published: a transformer's operators, arm64, not compressed. Nothing
# was built here, and nothing tells how far another network's is from it.
REDUCED_BUILD = {
    "full_mb": 27, "reduced_mb": 11, "estimated": True,
    "source": "https://github.com/cantoo-scribe/capacitor-onnx/blob/HEAD/docs/reduced-onnx.md",
}  # fmt: skip


def write_variants(
    path: Path, target: Target, preprocessing: Preprocessing | None
) -> dict[str, dict[str, Any]]:
    """Write what the target wants beside `path`; the manifest's facts of each file, by its name."""
    written: dict[str, dict[str, Any]] = {}
    if "ort" in target.variants:
        written |= _ort(path)
    if "integer_inputs" in target.variants:
        written |= _integer_inputs(path)
    if "images" in target.variants and preprocessing is not None:
        written |= _images(path, preprocessing)
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


def _save(model: ir.Model, path: Path) -> None:
    """The file whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        ir.save(model, whole)
        whole.replace(path)
