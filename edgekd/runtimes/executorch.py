"""ExecuTorch on a phone: one `.pte` file, whose operators XNNPACK runs.

The quantized program goes to XNNPACK's partitioner as it is, so every scale is the trained one. The
file is for one sample of (1, C, H, W), and a session runs a batch one by one. Labels, preprocessing
and the scales of integer ends are text that the file's method `edgekd` gives back.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd import __version__
from edgekd.errors import MissingPackageError, ModelError, StateError
from edgekd.files import write_atomically
from edgekd.network import Network
from edgekd.runtimes.arithmetic import XNNPACK
from edgekd.runtimes.base import Arrays
from edgekd.runtimes.integer_ends import KEY, IntegerEnd, IntegerEnds
from edgekd.runtimes.onnx_graph import metadata, quiet
from edgekd.target import Target

# of XNNPACK's graph, and of the portable kernels, which compute in float
MATRIX_NODES = {
    "XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected",
    "XNNBatchMatrixMultiply",
}  # fmt: skip
MATRIX_KERNELS = {
    "aten::convolution", "aten::linear", "aten::addmm", "aten::mm", "aten::bmm",
}  # fmt: skip
TYPES = {0: "uint8", 1: "int8", 6: "float32"}  # as torch numbers them
FACTS = "edgekd"  # the method that gives the file's facts


def _executorch(module: str) -> Any:
    try:
        with quiet("root"):
            return import_module(f"executorch.{module}")
    except ImportError:
        raise MissingPackageError("executorch", "executorch") from None


class ExecuTorch:
    """The ExecuTorch runtime with XNNPACK, on this host's CPU."""

    name = "executorch"
    suffix = ".pte"
    emulator = "executorch"
    plain = False
    exact = 1.0
    rounding = XNNPACK

    def version(self) -> str:
        """Of the installed package."""
        try:
            return version("executorch")
        except PackageNotFoundError:
            raise MissingPackageError("executorch", "executorch") from None

    def export(self, net: Network, target: Target, path: Path) -> dict[str, str]:
        """Write one `.pte` file.

        Raises:
            ModelError: an operator has no form in ExecuTorch.
        """
        exir = _executorch("exir")
        xnnpack = _executorch("backends.xnnpack.partition.xnnpack_partitioner")
        example = tuple(x[:1] for x in net.io.example(2))
        graph = net.program().module(check_guards=False)
        try:
            with torch.no_grad(), quiet("root"):
                program = torch.export.export(graph, example, strict=False)
                facts = metadata(net, target) | {KEY: _cut_ends(program, net, target)}
                lowered = exir.to_edge_transform_and_lower(
                    program, partitioner=[xnnpack.XnnpackPartitioner()],
                    constant_methods={FACTS: json.dumps(facts)},
                ).to_executorch()  # fmt: skip
        except Exception as error:  # torch's and ExecuTorch's share no base but this
            raise ModelError(f"{net!r} has no ExecuTorch form: {error}") from error
        write_atomically(path, bytes(lowered.buffer))
        return {"edgekd": __version__, "torch": torch.__version__, "executorch": self.version()}

    def load(self, path: Path, *, threads: int, emulated: bool = False) -> ExecuTorchSession:
        """Open a program; `emulated` is refused: what XNNPACK was given runs in its kernels."""
        if emulated:
            raise StateError(f"{path}: ExecuTorch cannot run a program without XNNPACK's kernels")
        return ExecuTorchSession(path.read_bytes(), threads, str(path))


def _cut_ends(program: Any, net: Network, target: Target) -> str:
    """Make inputs and outputs integers, as the scheme wants; those of float operators stay float.

    Returns:
        What `IntegerEnds.read` reads, by number: the program has no names for its ends.
    """
    if net.scheme is None or target.scheme is None:
        return "{}"
    cut = _executorch("exir.passes.quantize_io_pass")
    inputs = len(net.io.inputs) if target.scheme.integer_inputs else 0
    outputs = len(net.io.outputs) if target.scheme.integer_outputs else 0
    sides = [(f"input {i}", cut.quantize_input, i) for i in range(inputs)]
    sides += [(f"output {i}", cut.quantize_output, i) for i in range(outputs)]
    ends: dict[str, Any] = {}
    for name, quantize, index in sides:
        try:
            scale, zero, _, _, dtype = quantize(program, index)
        except ValueError:  # a float operator reads it, or gives it
            continue
        dtype = str(dtype).removeprefix("torch.")
        ends[name] = IntegerEnd(dtype=dtype, scale=scale, zero_point=zero).model_dump()
    return json.dumps(ends)


# ---- running -------------------------------------------------------------------------------------


class ExecuTorchSession:
    """One program with its method `forward`."""

    def __init__(self, content: bytes, threads: int, origin: str) -> None:
        self._content = content
        runtime = _executorch("runtime")
        try:
            with quiet("root"):  # it warns that to set the number of threads is experimental
                library = _executorch("extension.pybindings.portable_lib")
                library._unsafe_reset_threadpool(threads)
            self._program = runtime.Runtime.get().load_program(content)
            self._forward = self._program.load_method("forward")
        except RuntimeError as error:
            raise StateError(f"ExecuTorch refuses {origin}: {error}") from error
        meta = self._forward.metadata
        inputs = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
        self.input_shapes = [tuple(i.sizes()) for i in inputs]
        known = FACTS in self._program.method_names
        facts = json.loads(self._program.load_method(FACTS).execute([])[0]) if known else {}
        self.integers = IntegerEnds.read(facts)
        self._inputs = [f"input {i}" for i in range(len(inputs))]
        self._outputs = [f"output {i}" for i in range(meta.num_outputs())]
        self.input_types = [TYPES[i.dtype()] for i in inputs]

    def __call__(self, inputs: Arrays) -> Arrays:
        """One batch: arrays of (N, ...)."""

        def run(arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
            rows = [
                self._forward.execute([
                    torch.from_numpy(np.ascontiguousarray(a[i : i + 1])) for a in arrays
                ])
                for i in range(len(arrays[0]))
            ]  # fmt: skip
            return [torch.cat(column).numpy() for column in zip(*rows, strict=True)]

        given = dict(zip(self._inputs, inputs, strict=True))
        return self.integers.run(run, given, self._outputs)

    def integer_share(self) -> tuple[int, int]:
        """Read off the file: XNNPACK's nodes that give int8; portable kernels compute in float."""
        program = read_program(self._content)
        (plan,) = (p for p in program.execution_plan if p.name == "forward")
        calls = [
            call.instr_args.op_index
            for chain in plan.chains
            for call in chain.instructions
            if hasattr(call.instr_args, "op_index")
        ]
        floating = sum(plan.operators[i].name in MATRIX_KERNELS for i in calls)
        types: list[str] = []
        for graph in delegated(program):
            values = [value["xvalue_union"] for value in graph["xvalues"]]
            values = [value.get("tensor_value", value) for value in values]
            kinds = {value["id_out"]: value["datatype"] for value in values}
            types += [
                kinds[node["xnode_union"]["output_id"]]
                for node in graph["xnodes"]
                if node["xnode_union_type"] in MATRIX_NODES
            ]
        return types.count("xnn_datatype_qint8"), len(types) + floating

    def tensors(self, inputs: Arrays, names: list[str]) -> dict[str, NDArray[np.float32]]:
        """None: what XNNPACK computes inside its graph cannot be read."""
        return {}


def read_program(content: bytes) -> Any:
    """A file's program, its segments put back in."""
    return _executorch("exir._serialize._program").deserialize_pte_binary(content).program


def delegated(program: Any) -> Iterator[dict[str, Any]]:
    """The graphs that XNNPACK was given, as its schema has them."""
    serialize = _executorch("backends.xnnpack.serialization.xnnpack_graph_serialize")
    schema = files("executorch.backends.xnnpack.serialization") / "schema.fbs"
    for plan in program.execution_plan:
        for delegate in plan.delegates:
            payload = bytes(program.backend_delegate_data[delegate.processed.index].data)
            header = serialize.XNNHeader.from_bytes(payload[: serialize.XNNHeader.EXPECTED_LENGTH])
            start = header.flatbuffer_offset
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "graph.bin").write_bytes(payload[start : start + header.flatbuffer_size])
                (folder / "schema.fbs").write_bytes(schema.read_bytes())
                _executorch("exir._serialize._flatbuffer")._flatc_decompile(
                    name, f"{name}/schema.fbs", f"{name}/graph.bin"
                )
                text = (folder / "graph.json").read_text()
            yield json.loads(re.sub(r"\binf\b", "Infinity", text))  # bounds of no clip
