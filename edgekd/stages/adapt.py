"""adapt: anybody's ONNX file as a target runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgekd import __version__
from edgekd.errors import ModelError, TargetError
from edgekd.runtimes.base import Artifact, fingerprint
from edgekd.runtimes.decompose import fold_constants
from edgekd.runtimes.onnx_graph import fit_operators, save_onnx
from edgekd.runtimes.onnx_values import require_tensors
from edgekd.runtimes.onnxruntime import INTEGER_OPS
from edgekd.runtimes.openvino import write_ir
from edgekd.runtimes.opset import EXPORTED
from edgekd.runtimes.rules import check_operators
from edgekd.runtimes.shapes import fix_shapes
from edgekd.runtimes.tensorrt import write_script
from edgekd.runtimes.weight_form import float_weights, integer_weights
from edgekd.target import Precision, Target

TOLERANCE = 1e-4  # of an output's largest magnitude; the rewrites are exact but for the last bits
QUANTIZING = INTEGER_OPS | {"QuantizeLinear", "DequantizeLinear"}
Shapes = Mapping[str, tuple[int, ...]]


def adapt(
    path: str | Path, *, target: str | Target, out: str | Path, shapes: Shapes | None = None
) -> tuple[Artifact, float]:
    """Write the ONNX file `path` as `target` runs it, into the folder `out`.

    Its opset, operators, shapes and form of quantized weights become the target's; the result is
    compared with the source in ONNX Runtime, unoptimized, on seeded noise. An OpenVINO IR is
    converted from what was compared.

    Args:
        shapes: of inputs by name, to be fixed in the file. An input may leave its first axis open
            without one, no other.

    Returns:
        The artifact, and the largest difference of outputs over their largest magnitude.

    Raises:
        ModelError: the file is not valid ONNX or not of tensors of numbers, an input's shape is
            not known or cannot be fixed, or ONNX Runtime fails on noise of these shapes.
        TargetError: the target cannot run it, or it would compute something else.
        StateError: `out` holds an artifact of another target or precision.
    """
    target, path = Target.load(target), Path(path)
    if target.runtime not in ("onnxruntime", "openvino", "tensorrt"):
        raise TargetError(
            f"{target.name} takes no ONNX; its format is written from a network: edgekd export "
            "FOLDER, as stages write it"
        )
    model = _read(path)
    source = ir.to_proto(model)
    precision = _precision(model, target)
    folder = Path(out)
    model = _of_exported_opset(model, target)
    fixed = dict(shapes or {})
    left_open = {name: _one_sample(v) for name, v in _unknown(model, fixed)}
    if target.shapes == "static":
        fixed, left_open = left_open | fixed, {}
    if fixed:
        fix_shapes(model, fixed)
    fold_constants(model)
    if precision == "int8":
        assert target.scheme is not None
        (integer_weights if target.scheme.fold_weights else float_weights)(model)
    fit_operators(model, target)
    if target.runtime == "tensorrt":
        check_operators(model, target)
    digest, _ = fingerprint(path)
    model.metadata_props.update(
        {
            "edgekd.version": __version__,
            "edgekd.target": target.name,
            "edgekd.source": f"{path.name} {digest}",
        }
    )
    error = _difference(source, ir.to_proto(model), left_open | fixed)
    if not error <= TOLERANCE:
        raise TargetError(
            f"{path} for {target.name} differs from the source by {error:.3g} of its outputs' "
            f"largest; {TOLERANCE:g} is allowed"
        )
    Artifact.claim(folder, target, precision)
    if target.runtime == "openvino":
        place = folder / "model.xml"
        versions = write_ir(model, target, place, half=precision == "fp16")
    else:
        place = folder / "model.onnx"
        versions = save_onnx(model, place)
    if target.runtime == "tensorrt":
        write_script(place, target, precision, left_open)
    return Artifact.of(place, target=target, precision=precision, versions=versions), error


def _read(path: Path) -> ir.Model:
    """The file with the shapes and types of all its tensors."""
    if not path.is_file():
        raise ModelError(f"{path} does not exist")
    try:
        onnx.checker.check_model(str(path))  # by its path: weights in files of their own too
        proto = onnx.load(path)
    except Exception as error:  # protobuf's and onnx' own types share no base but this
        said = str(error).strip().splitlines()
        raise ModelError(f"{path} is no valid ONNX: {said[0] if said else error!r}") from None
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    require_tensors(model)
    return model


def _precision(model: ir.Model, target: Target) -> Precision:
    """INT8 where the file has quantize or integer operators, FP16 where its weights are.

    Else what a float network becomes on the target.
    """
    quantized = any(node.op_type in QUANTIZING for node in model.graph)
    if quantized and target.scheme is None:
        raise TargetError(f"{target.name} runs no integers{target.why_float}; give the float file")
    precision = "int8" if quantized else target.float_precision
    if precision is None:
        raise TargetError(f"{target.name} runs integers only; give a file with Q/DQ operators")
    return "fp16" if not quantized and _in_half(model) else precision


def _in_half(model: ir.Model) -> bool:
    """Whether more of its weights are in FP16 than in FP32."""
    numbers: Counter[ir.DataType] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            numbers[value.const_value.dtype] += value.const_value.size
    return numbers[ir.DataType.FLOAT16] > numbers[ir.DataType.FLOAT]


def _of_exported_opset(model: ir.Model, target: Target) -> ir.Model:
    """The model at opset 18, which all rewrites are for, or newer if the target takes that."""
    opset = model.opset_imports.get("", 1)
    if EXPORTED <= opset <= target.opset:
        return model
    try:
        raised = onnx.version_converter.convert_version(ir.to_proto(model), EXPORTED)
    except Exception as error:  # the converter's own types share no base but this
        raise TargetError(
            f"the file has opset {opset}; onnx cannot convert it to {EXPORTED}: "
            f"{str(error).strip().splitlines()[0]}; export it at opset {EXPORTED}"
        ) from None
    return ir.from_proto(onnx.shape_inference.infer_shapes(raised))


def _unknown(model: ir.Model, fixed: Shapes) -> list[tuple[str, ir.Value]]:
    """Inputs whose shape is neither given nor in the file."""
    return [
        (str(v.name), v) for v in model.graph.inputs
        if v.name not in fixed and (v.shape is None or not v.shape.is_static())
    ]  # fmt: skip


def _one_sample(value: ir.Value) -> tuple[int, ...]:
    """The input's shape with batch 1.

    Raises:
        ModelError: more than its first axis is open.
    """
    dims = [None] if value.shape is None else list(value.shape)
    shape = [1 if i == 0 and not isinstance(d, int) else d for i, d in enumerate(dims)]
    if value.shape is None or not all(isinstance(d, int) for d in shape):
        raise ModelError(
            f"export needs the shape of input {value.name!r}, which is "
            f"{value.shape or 'unknown'}: give --shape {value.name}=1x3x224x224"
        )
    return tuple(int(d) for d in shape if isinstance(d, int))


def _difference(source: onnx.ModelProto, result: onnx.ModelProto, shapes: Shapes) -> float:
    """Largest difference of outputs over their largest magnitude, on the same noise."""
    wanted, got = (_outputs(model, shapes) for model in (source, result))
    if [a.shape for a in wanted] != [b.shape for b in got]:
        return float("inf")
    # not `max`, which may pass over a NaN
    return float(np.max([_apart(a, b) for a, b in zip(wanted, got, strict=True)], initial=0))


def _apart(wanted: NDArray[Any], got: NDArray[Any]) -> float:
    """Largest difference over the largest finite magnitude; NaN equals NaN, ∞ the same ∞."""
    a, b = wanted.astype(np.float64), got.astype(np.float64)
    other = (a != b) & ~(np.isnan(a) & np.isnan(b))
    largest = np.abs(a[np.isfinite(a)]).max(initial=1e-30)
    return float(np.abs(a[other] - b[other]).max(initial=0) / largest)


def _outputs(model: onnx.ModelProto, shapes: Shapes) -> list[NDArray[Any]]:
    """Of ONNX Runtime, unoptimized, on seeded noise; integers are 0 or 1.

    Raises:
        ModelError: it refuses the model, or fails on inputs of these shapes.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what it has to say is in the exception
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own types share no base but this
        raise ModelError(f"ONNX Runtime refuses the file: {error}") from None
    generator = np.random.default_rng(0)
    given: dict[str, NDArray[Any]] = {}
    for each in session.get_inputs():
        dims = shapes.get(each.name, each.shape)
        if each.type in ("tensor(float)", "tensor(float16)", "tensor(double)"):
            types = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(double)": "f8"}
            given[each.name] = generator.normal(size=dims).astype(types[each.type])
        else:
            name = each.type.removeprefix("tensor(").removesuffix(")")
            given[each.name] = generator.integers(0, 2, dims).astype(name)
    try:
        found: list[NDArray[Any]] = session.run(None, given)
    except Exception as error:  # as above
        tried = ", ".join(f"{name}={'x'.join(map(str, x.shape))}" for name, x in given.items())
        raise ModelError(
            f"ONNX Runtime fails on noise of {tried} (integers are 0 or 1): "
            f"{str(error).strip().splitlines()[0]}; give shapes that the file runs with: "
            "--shape NAME=1x3x224x224"
        ) from None
    return found
