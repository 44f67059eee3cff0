"""OpenVINO on an Intel CPU."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekd.errors import MissingPackageError, StateError, TargetError
from edgekd.network import Network
from edgekd.runtimes.base import Arrays, in_batches
from edgekd.runtimes.integer_ends import KEY, IntegerEnds
from edgekd.runtimes.onnx_graph import own_zero_points, pad_before_averages, save_onnx, to_onnx
from edgekd.runtimes.openvino_graph import (
    bound_branches,
    import_openvino,
    of_one_sample,
    quantize_behind_turns,
    quantize_terms,
    sample_axes,
    show,
    turn_maps,
)
from edgekd.target import Target

MATRIX_LAYERS = {
    "Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul",
}  # fmt: skip


def write_ir(exported: ir.Model, target: Target, path: Path, *, half: bool) -> dict[str, str]:
    """An ONNX model as an IR of batch 1, float weights in FP16 if `half`; the tools' versions.

    Raises:
        TargetError: OpenVINO has no conversion for an operator.
    """
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        pad_before_averages(exported)
        own_zero_points(exported)
        versions = save_onnx(exported, source)
        try:
            model = openvino.convert_model(source)
        except Exception as error:  # OpenVINO's own types share no base but this
            lines = str(error).strip().splitlines()
            said = "; ".join(x[3:] for x in lines if x.startswith("-- ")) or " ".join(lines)
            raise TargetError(
                f"OpenVINO {OpenVino().version()} cannot convert the file: {said}; use other "
                "operators, Q/DQ ones around float layers where it is quantized"
            ) from None
        quantize_terms(model)
        of_one_sample(model)
        if target.device == "CPU":
            if target.scheme is None or target.scheme.linear_as_conv:
                turn_maps(model)
            quantize_behind_turns(model)
            bound_branches(model)
        if KEY in exported.metadata_props:
            model.set_rt_info(exported.metadata_props[KEY], KEY)
        try:
            openvino.save_model(model, path, compress_to_fp16=half)
        except RuntimeError as error:
            raise OSError(f"OpenVINO could not write {path}: {error}") from None
    return versions | {"openvino": OpenVino().version()}


class OpenVino:
    """The CPU plugin."""

    name = "openvino"
    suffix = ".xml"
    emulator = "openvino"
    plain = False
    exact = 1.0
    rounding = None

    def version(self) -> str:
        """Of the installed package."""
        version: str = import_openvino().__version__
        return version.partition("-")[0]

    def export(self, net: Network, target: Target, path: Path) -> dict[str, str]:
        """Write the IR: `.xml` and `.bin`; float weights as the device computes, FP16 or FP32."""
        half = net.scheme is None and target.float_precision == "fp16"
        return write_ir(to_onnx(net, target), target, path, half=half)

    def load(self, path: Path, *, threads: int, emulated: bool = False) -> OpenVinoSession:
        """Compile an IR; `emulated` is refused: OpenVINO has no such mode."""
        if emulated:
            raise StateError(f"{path}: OpenVINO cannot run a model without its optimizations")
        return OpenVinoSession(path, threads)


def nncf_post_training(floats: Path, inputs: Sequence[NDArray[Any]], out: Path) -> Path:
    """NNCF's post-training quantization of a float IR, its defaults: the baseline beside ours.

    Args:
        floats: an IR or an ONNX file.
        inputs: arrays of (N, ...), of which every sample calibrates.

    Raises:
        MissingPackageError: NNCF is not installed.
    """
    openvino = import_openvino()
    try:
        import nncf
    except ImportError:
        raise MissingPackageError("nncf", "nncf") from None
    samples = [x[i : i + 1] for x in inputs for i in range(len(x))]
    model = openvino.Core().read_model(floats)
    quantized = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples))
    openvino.save_model(quantized, out, compress_to_fp16=False)
    return out


class OpenVinoSession:
    """One compiled model."""

    def __init__(self, path: Path, threads: int) -> None:
        self._openvino = import_openvino()
        self._core = self._openvino.Core()
        self._threads = threads
        try:
            self._model = self._core.read_model(path)
        except RuntimeError as error:
            raise StateError(f"OpenVINO refuses {path}: {error}") from error
        self._compiled = self._compile(self._model)
        known = self._model.has_rt_info(KEY)
        self.integers = IntegerEnds.read(
            {KEY: self._model.get_rt_info(KEY).astype(str)} if known else {}
        )
        self._inputs = [self._name(i) for i in self._model.inputs]
        self.input_types = [
            self.integers[n].dtype if n in self.integers else "float32" for n in self._inputs
        ]
        self.input_shapes = [
            (1, *(d.get_length() for d in list(i.partial_shape)[1:])) for i in self._model.inputs
        ]
        first = self._model.inputs[0].partial_shape[0]
        self._fixed = first.get_length() if first.is_static else None

    def _compile(self, model: Any) -> Any:
        settings = {
            "INFERENCE_NUM_THREADS": self._threads,
            "PERFORMANCE_HINT": "LATENCY",
            # on a CPU with AMX the plugin would otherwise run float layers in bfloat16
            "INFERENCE_PRECISION_HINT": "f32",
        }
        return self._core.compile_model(model, "CPU", settings)

    def __call__(self, inputs: Arrays) -> Arrays:
        """One batch: arrays of (N, ...)."""
        return self._run(self._compiled, inputs)

    def _run(
        self, compiled: Any, inputs: Arrays, axes: Iterable[int] = itertools.repeat(0)
    ) -> Arrays:
        def run(arrays: Arrays) -> Arrays:
            results = compiled(arrays, share_inputs=True)
            return [np.array(results[o]) for o in compiled.outputs]

        given = dict(zip(self._inputs, inputs, strict=True))
        names = [self._name(o) for o in compiled.outputs]
        return self.integers.run(lambda x: in_batches(run, x, self._fixed, axes), given, names)

    def _name(self, port: Any) -> str:
        """Of its names the one that tells its integers, if any does."""
        return next((n for n in port.names if n in self.integers), str(port.any_name))

    def integer_share(self) -> tuple[int, int]:
        """Read off the compiled model's runtime information.

        An attention is one "Subgraph" there, whose products count if they are in integers.
        """
        integer = total = 0
        ops = self._model.get_ordered_ops()
        products = {op.get_friendly_name() for op in ops if op.get_type_name() == "MatMul"}
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            info = op.get_rt_info()
            kind, names = (info[key].astype(str) for key in ("layerType", "originalLayersNames"))
            in_integers = info["runtimePrecision"].astype(str) in ("i8", "u8")
            if kind in MATRIX_LAYERS:
                total += 1
                integer += in_integers
            elif kind == "Subgraph" and in_integers:
                inside = len(products.intersection(names.split(",")))
                total, integer = total + inside, integer + inside
        return integer, total

    def tensors(self, inputs: Arrays, names: list[str]) -> dict[str, NDArray[np.float32]]:
        """Values of inner tensors by name; showing them may keep neighbours from fusing."""
        model = self._model.clone()
        show(model, names)
        compiled = self._compile(model)
        axes = sample_axes(model) if self._fixed == 1 < len(inputs[0]) else itertools.repeat(0)
        results = zip(compiled.outputs, self._run(compiled, inputs, axes), strict=True)
        values = {name: value for port, value in results for name in port.names}
        return {name: values[name] for name in names if name in values}
