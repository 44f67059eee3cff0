"""OpenVINO on an Intel CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
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
from edgekd.target import Target

MATRIX_LAYERS = {
    "Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul",
}  # fmt: skip
CLIP = ".clip"


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise MissingPackageError("openvino", "openvino") from None
    return openvino


def write_ir(exported: ir.Model, target: Target, path: Path, *, half: bool) -> dict[str, str]:
    """An ONNX model as an IR of batch 1, float weights in FP16 if `half`; the tools' versions.

    Raises:
        TargetError: OpenVINO has no conversion for an operator.
    """
    openvino = _openvino()
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
        _quantize_terms(model)
        _of_one_sample(model)
        if target.device == "CPU":
            _bound_branches(model)
        if KEY in exported.metadata_props:
            model.set_rt_info(exported.metadata_props[KEY], KEY)
        try:
            openvino.save_model(model, path, compress_to_fp16=half)
        except RuntimeError as error:
            raise OSError(f"OpenVINO could not write {path}: {error}") from None
    return versions | {"openvino": OpenVino().version()}


def _of_one_sample(model: Any) -> None:
    """Fix an open batch to 1.

    With it open, the compiler runs a pass of its own for each operator between the layers, and
    leaves the transpositions around a norm (`tools/bench_batch.py`).
    """
    shapes = {port: port.partial_shape for port in model.inputs}
    for shape in shapes.values():
        if shape.rank.is_static and shape[0].is_dynamic:
            shape[0] = 1
    model.reshape(shapes)


def _quantize_terms(model: Any) -> None:
    """Quantize what a concatenation joins, not what comes out of it; all have one scale.

    The conversion leaves one quantizer behind it, which the compiler puts in front again: beside
    what quantizes a term for its other readers, where both are too many to run inside the layer
    that made it: in DenseNet, a pass over every tensor.
    """
    opset = _openvino().opset13
    for last in model.get_ordered_ops():
        if (wanted := _quantizer(last)) is None:
            continue
        joined = last.input_value(0).get_node()
        if joined.get_type_name() != "Concat" or len(joined.output(0).get_target_inputs()) > 1:
            continue
        for index, term in enumerate(joined.input_values()):
            readers = [reader.get_node() for reader in term.get_target_inputs()]
            quantizer = next((each for each in readers if _quantizer(each) == wanted), None)
            if quantizer is None:
                ends = [last.input_value(i) for i in range(1, 5)]
                name = f"{last.get_friendly_name()}.{index}"
                quantizer = opset.fake_quantize(term, *ends, levels=wanted[0], name=name)
            joined.input(index).replace_source_output(quantizer.output(0))
        joined.output(0).add_names(last.output(0).get_names())
        for reader in last.output(0).get_target_inputs():
            reader.replace_source_output(joined.output(0))


def _bound_branches(model: Any) -> None:
    """Clip what a convolution adds to a quantized skip where the sum's quantizer clips anyway.

    Of fixed shapes the compiler adds inside the convolution only behind a quantizer, which its
    kernel takes for a clip: it does not round. With these ends that changes nothing, and spares a
    pass over the sum in float. Where the compiler leaves the two apart it would round: taken out.
    """
    opset = _openvino().opset13
    for add in model.get_ordered_ops():
        sums = [_quantizer(reader.get_node()) for reader in add.output(0).get_target_inputs()]
        if add.get_type_name() != "Add" or not sums or not all(sums):
            continue
        shapes = [value.get_partial_shape() for value in add.input_values()]
        if shapes[0] != shapes[1] or shapes[0].is_dynamic:
            continue
        for branch, skip in ((0, 1), (1, 0)):
            added = _quantizer(add.input_value(skip).get_node())
            if added is None or not _of_convolution(add.input_value(branch)):
                continue
            (_, (*_, low, high)) = added
            most = max(abs(x) for _, (*_, a, b) in sums for x in (a - high, b - low))
            ends = [opset.constant(np.float32(x)) for x in (-most * 128 / 127, most)] * 2
            name = f"{add.get_friendly_name()}{CLIP}"
            clip = opset.fake_quantize(add.input_value(branch), *ends, levels=256, name=name)
            add.input(branch).replace_source_output(clip.output(0))
            break
    if _clips(model):
        compiled = _openvino().Core().compile_model(model, "CPU")
        infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
        together = [set(info["originalLayersNames"].astype(str).split(",")) for info in infos]
        for name, clip in _clips(model).items():
            if not any({name, name.removesuffix(CLIP)} <= names for names in together):
                _take_out(clip)


def _clips(model: Any) -> dict[str, Any]:
    """What `_bound_branches` put in, by name."""
    names = {op.get_friendly_name(): op for op in model.get_ops()}
    return {name: op for name, op in names.items() if name.endswith(CLIP)}


def _take_out(node: Any) -> None:
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(node.input_value(0))


def _of_convolution(value: Any) -> bool:
    """Whether it is what a convolution gives, with its bias, to one reader."""
    node = value.get_node()
    if node.get_type_name() == "Add":
        node = node.input_value(0).get_node()
    alone = len(value.get_target_inputs()) == 1
    return alone and node.get_type_name() in ("Convolution", "GroupConvolution")


def _quantizer(node: Any) -> tuple[int, list[float]] | None:
    """Number of integers and ends of a quantizer with one range; None of any other node."""
    if node.get_type_name() != "FakeQuantize":
        return None
    ends = [node.input_value(i).get_node() for i in range(1, 5)]
    if any(end.get_type_name() != "Constant" or end.data.size > 1 for end in ends):
        return None
    return node.get_attributes()["levels"], [float(end.data.item()) for end in ends]


class OpenVino:
    """The CPU plugin."""

    name = "openvino"
    suffix = ".xml"
    emulator = "openvino"
    plain = False
    exact = 1.0

    def version(self) -> str:
        """Of the installed package."""
        version: str = _openvino().__version__
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
    openvino = _openvino()
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
        self._openvino = _openvino()
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

    def _run(self, compiled: Any, inputs: Arrays) -> Arrays:
        def run(arrays: Arrays) -> Arrays:
            results = compiled(arrays, share_inputs=True)
            return [np.array(results[o]) for o in compiled.outputs]

        given = dict(zip(self._inputs, inputs, strict=True))
        names = [self._name(o) for o in compiled.outputs]
        return self.integers.run(lambda x: in_batches(run, x, self._fixed), given, names)

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
        """Values of inner tensors by name; showing them may keep neighbours from fusing.

        What `_bound_branches` put in is taken out: a kernel that is not fused rounds there.
        """
        model = self._model.clone()
        for clip in _clips(model).values():
            _take_out(clip)
        known = {name for op in model.get_ordered_ops() for o in op.outputs() for name in o.names}
        outputs = {name for o in model.outputs for name in o.names}
        model.add_outputs([name for name in names if name in known - outputs])
        compiled = self._compile(model)
        results = zip(compiled.outputs, self._run(compiled, inputs), strict=True)
        values = {name: value for port, value in results for name in port.names}
        return {name: values[name] for name in names if name in values}
