"""ONNX Runtime on this host's CPU."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from platform import machine

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edgekd.errors import StateError
from edgekd.network import Network
from edgekd.runtimes.arithmetic import MLAS_ARM, MLAS_X86
from edgekd.runtimes.base import Arrays, in_batches
from edgekd.runtimes.integer_ends import IntegerEnds
from edgekd.runtimes.onnx_graph import integer_matrix_ops, keep_floats, save_onnx, to_onnx
from edgekd.target import Target

INTEGER_OPS = {
    "QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
}  # fmt: skip
FLOAT_OPS = {
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul",
    "FusedMatMul",
}  # fmt: skip


class OnnxRuntime:
    """The CPU execution provider."""

    name = "onnxruntime"
    suffix = ".onnx"
    emulator = "onnxruntime"
    plain = True
    exact = 1.0
    rounding = MLAS_X86 if machine() in ("x86_64", "AMD64") else MLAS_ARM

    def version(self) -> str:
        """Of the installed package."""
        version: str = ort.__version__
        return version

    def export(self, net: Network, target: Target, path: Path) -> dict[str, str]:
        """Write one `.onnx` file."""
        model = to_onnx(net, target)
        keep_floats(model)
        return save_onnx(model, path)

    def load(self, path: Path, *, threads: int, emulated: bool = False) -> OrtSession:
        """Open a model; `emulated` turns all graph optimizations off."""
        return OrtSession(path.read_bytes(), threads, emulated, str(path))


class OrtSession:
    """One model in one `InferenceSession`."""

    def __init__(self, model: bytes, threads: int, emulated: bool, origin: str) -> None:
        self._model, self._threads, self._emulated, self._origin = model, threads, emulated, origin
        self._session = self._open(model, self._options())
        inputs = self._session.get_inputs()
        self._inputs = [i.name for i in inputs]
        self._outputs = [o.name for o in self._session.get_outputs()]
        self.integers = IntegerEnds.read(self._session.get_modelmeta().custom_metadata_map)
        self.input_types = [
            self.integers[n].dtype if n in self.integers else "float32" for n in self._inputs
        ]
        self.input_shapes = [(1, *i.shape[1:]) for i in inputs]
        first = inputs[0].shape[0]
        self._fixed = first if isinstance(first, int) else None

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if self._emulated:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options

    def _open(self, model: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own types share no base but this
            raise StateError(f"ONNX Runtime refuses {self._origin}: {error}") from error

    def __call__(self, inputs: Arrays) -> Arrays:
        """One batch: arrays of (N, ...)."""
        return self._run(self._session, inputs, self._outputs)

    def _run(self, session: ort.InferenceSession, inputs: Arrays, names: list[str]) -> Arrays:
        def run(arrays: Arrays) -> Arrays:
            values: Arrays = session.run(names, dict(zip(self._inputs, arrays, strict=True)))
            return values

        given = dict(zip(self._inputs, inputs, strict=True))
        return self.integers.run(lambda x: in_batches(run, x, self._fixed), given, names)

    def integer_share(self) -> tuple[int, int]:
        """Read off the graph as ONNX Runtime rewrote it; emulated: off the Q/DQ file."""
        if self._emulated:
            return integer_matrix_ops(onnx.load_from_string(self._model))
        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.optimized_model_filepath = f"{folder}/optimized.onnx"
            self._open(self._model, options)
            graph = onnx.load(options.optimized_model_filepath).graph
        return integer_kernels(graph)

    def tensors(self, inputs: Arrays, names: list[str]) -> dict[str, NDArray[np.float32]]:
        """Values of tensors by name; showing them may keep neighbours from fusing."""
        model = onnx.load_from_string(self._model)
        made = {name for node in model.graph.node for name in node.output}
        shown = [name for name in names if name in made]
        if not shown:  # `run` takes an empty list for all outputs
            return {}
        outputs = {output.name for output in model.graph.output}
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in shown if name not in outputs
        )
        session = self._open(model.SerializeToString(), self._options())
        return dict(zip(shown, self._run(session, inputs, shown), strict=True))


def integer_kernels(graph: onnx.GraphProto) -> tuple[int, int]:
    """(matrix operators in integers, all of them) of a graph as ONNX Runtime rewrote it."""
    kinds = Counter(node.op_type for node in graph.node)
    integer = sum(kinds[kind] for kind in INTEGER_OPS)
    return integer, integer + sum(kinds[kind] for kind in FLOAT_OPS)
