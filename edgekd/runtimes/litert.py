"""LiteRT on a phone: one `.tflite` file, which litert-torch converts from the quantized program.

The converter moves the quantize and dequantize operators into the operators between them, and the
outermost ones out of the file: its inputs and outputs are int8, and every scale is the trained one.
Images are (N, H, W, C), as LiteRT's kernels want them: of convolutional networks, the converter
transposes around a Pad alone. A session takes and gives (N, C, H, W) like all others. The file is
for one sample, and a session runs a batch one by one: with a fixed shape, the kernels of phones
take all of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from edgekd import __version__
from edgekd.errors import MissingPackageError, ModelError, StateError
from edgekd.files import write_atomically
from edgekd.network import Network
from edgekd.quantization.capture import WEIGHTED, arguments
from edgekd.quantization.layers import quantizer_at
from edgekd.runtimes.arithmetic import XNNPACK
from edgekd.runtimes.base import Arrays
from edgekd.runtimes.integer_ends import IntegerEnd, IntegerEnds
from edgekd.runtimes.onnx_graph import metadata, quantized_name, quiet
from edgekd.target import Target

MATRIX_OPS = {
    "CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL",
}  # fmt: skip
# of operators with kernels for (N, H, W, C) alone
CHANNELS_LAST = {
    "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "AVERAGE_POOL_2D", "MAX_POOL_2D",
}  # fmt: skip
TENSORS = "edgekd.tensors"  # in the file's metadata: name -> [index, channels last]
Places = dict[str, tuple[int, bool]]


def _litert(module: str) -> Any:
    """A module of the interpreter's package."""
    try:
        return import_module(f"ai_edge_litert.{module}")
    except ImportError:
        raise MissingPackageError("ai-edge-litert", "litert") from None


class LiteRt:
    """The LiteRT interpreter; as shipped, XNNPACK runs what it can on this host's CPU.

    Its reference kernels scale an integer sum by a 32-bit fixed-point factor and shift the product,
    rounding each time: at a shift of 8 bits, about 1 element in 2⁸⁺¹ is 1 step off. XNNPACK's
    round once.
    """

    name = "litert"
    suffix = ".tflite"
    emulator = "litert"
    plain = True
    exact = 0.99
    rounding = XNNPACK

    def version(self) -> str:
        """Of the installed interpreter."""
        try:
            return version("ai-edge-litert")
        except PackageNotFoundError:
            raise MissingPackageError("ai-edge-litert", "litert") from None

    def export(self, net: Network, target: Target, path: Path) -> dict[str, str]:
        """Write one `.tflite` file."""
        write_atomically(path, _label(_convert(net), net, target))
        return {
            "edgekd": __version__, "torch": torch.__version__,
            "litert-torch": version("litert-torch"), "ai-edge-litert": self.version(),
        }  # fmt: skip

    def load(self, path: Path, *, threads: int, emulated: bool = False) -> LiteRtSession:
        """Open a model; `emulated`: by LiteRT's reference kernels, without delegates."""
        return LiteRtSession(path.read_bytes(), threads, emulated, str(path))


# ---- writing -------------------------------------------------------------------------------------


class _ChannelsLast(nn.Module):
    """The network with images as (N, H, W, C) on both sides, and its outputs in a row."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        # the converter folds weights into integers by itself, and fails on folded ones
        self.network = net.program(fold_weights=False).module(check_guards=False)
        _drop_expansions(self.network)
        self.training = False  # what was captured has no modes to switch

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        given = (x.permute(0, 3, 1, 2) if x.dim() == 4 else x for x in inputs)
        outputs = tree_leaves(self.network(*given))
        return [y.permute(0, 2, 3, 1) if y.dim() == 4 else y for y in outputs]


def _drop_expansions(graph: GraphModule) -> None:
    """Without the `expand`s in front of arithmetic that broadcasts by itself.

    The converter moves channels last around the arithmetic, but not around an expand.
    """
    aten = torch.ops.aten
    broadcast = {op.Tensor for op in (aten.add, aten.sub, aten.mul, aten.div)}
    for node in list(graph.graph.nodes):
        if node.target not in (aten.expand.default, aten.expand_as.default):
            continue
        shape = node.meta["val"].shape
        for user in list(node.users):
            others = [a for a in user.args if isinstance(a, Node) and a is not node]
            if user.target in broadcast and any(a.meta["val"].shape == shape for a in others):
                user.replace_input_with(node, node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _convert(net: Network) -> bytes:
    """The file as litert-torch writes it.

    Raises:
        ModelError: an operator has no form there.
    """
    try:
        with quiet("root"):
            converter = import_module("litert_torch")
            quantization = import_module("litert_torch.quantize.quant_config")
            pt2e = import_module("litert_torch.quantize.pt2e_quantizer")
    except ImportError:
        raise MissingPackageError("litert-torch", "litert") from None
    example = tuple(x[:1].permute(0, 2, 3, 1) if x.dim() == 4 else x[:1] for x in net.io.example(2))
    config = None
    if net.scheme is not None:
        # it says no more than that the integers are static: where they are, the graph says
        mode = pt2e.PT2EQuantizer().set_global(pt2e.get_symmetric_quantization_config())
        config = quantization.QuantConfig(pt2e_quantizer=mode)
    try:
        with quiet("root"):
            made = converter.convert(_ChannelsLast(net), example, quant_config=config)
            content: bytes = made.model_content()
    except Exception as error:  # MLIR's, torch's and Python's own share no base but this
        raise ModelError(f"{net!r} has no LiteRT form: {error}") from error
    return content


def _label(content: bytes, net: Network, target: Target) -> bytes:
    """The file with the network's names for its tensors, and its facts as metadata."""
    import flatbuffers

    class Aligned(flatbuffers.Builder):  # type: ignore[misc]  # ships no types
        """Weights at multiples of 16 bytes, as the schema wants its buffers."""

        def StartVector(self, size: int, count: int, alignment: int) -> Any:  # noqa: N802
            return super().StartVector(size, count, max(alignment, 16))

    schema = _litert("schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(content)
    (graph,), (signature,) = model.subgraphs, model.signatureDefs
    graph.inputs = _rename(signature.inputs, [i.name for i in net.io.inputs])
    graph.outputs = _rename(signature.outputs, net.io.outputs)
    places = dict(_activations(net, model))
    for name, index in (
        *zip((i.name for i in net.io.inputs), graph.inputs, strict=True),
        *zip(net.io.outputs, graph.outputs, strict=True),
    ):
        places[name] = index, len(graph.tensors[index].shape) == 4
    for name, (index, _) in places.items():  # the ends are last: their names stay
        graph.tensors[index].name = name
    facts = metadata(net, target) | {TENSORS: json.dumps(places)}
    model.metadata = model.metadata or []
    for name, value in facts.items():
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(value.encode(), np.uint8)
        model.buffers.append(buffer)
        entry = schema.MetadataT()
        entry.name, entry.buffer = name, len(model.buffers) - 1
        model.metadata.append(entry)
    builder = Aligned(len(content))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _rename(ends: list[Any], names: Sequence[str]) -> list[int]:
    """Give a signature's inputs or outputs their names; return their tensors in that order."""
    ends.sort(key=lambda end: int(re.findall(rb"\d+", end.name)[-1]))  # args_0, args_1, …
    for end, name in zip(ends, names, strict=True):
        end.name = name
    return [int(end.tensorIndex) for end in ends]


def _activations(net: Network, model: Any) -> Iterator[tuple[str, tuple[int, bool]]]:
    """Where each quantized activation is in the file: the same scale, zero point and shape.

    The converter keeps no names. Of several tensors that fit, behind as many layers, the operators'
    order decides. What it transposes has no name; nor has a cube that may be of either layout; nor
    a reshape of what has one, the same integers: by its shape alone, it may be what is transposed
    later (a Swin block's windows). Rows of features may have been reshaped: (N, H, W, C) here and
    (1, H · W, C) there.
    """
    if net.scheme is None:
        return
    assert isinstance(net.module, GraphModule)
    (graph,) = model.subgraphs
    kinds = _litert("schema_py_generated").BuiltinOperator
    codes = [code.builtinCode for code in model.operatorCodes]
    last = {getattr(kinds, name) for name in CHANNELS_LAST}
    # index -> whether it is (N, H, W, C) for certain
    left = {int(index): True for index in graph.inputs}
    left |= {int(i): codes[op.opcodeIndex] in last for op in graph.operators for i in op.outputs}
    for op in graph.operators:
        if codes[op.opcodeIndex] == kinds.TRANSPOSE:
            left = {i: certain for i, certain in left.items() if i not in op.outputs}
    one_layout = kinds.TRANSPOSE not in codes
    concatenated = {
        int(i) for op in graph.operators if codes[op.opcodeIndex] == kinds.CONCATENATION
        for i in op.outputs
    }  # fmt: skip
    depth, stored_depth = _depths(net.module.graph), _stored_depths(model)
    found: dict[Node, tuple[float, int]] = {}  # reader -> scale and zero point
    origin = {index: index for index in left}  # a tensor and its reshapes are one
    for op in graph.operators:
        if codes[op.opcodeIndex] == kinds.RESHAPE:
            origin[int(op.outputs[0])] = origin.get(op.inputs[0], int(op.inputs[0]))
    for reader in net.module.graph.find_nodes(op="call_module"):
        source, quantizer = arguments(reader)[0], quantizer_at(net.module, reader)
        if source.op == "get_attr" or quantizer is None:
            continue
        wanted = quantizer.scale.item(), int(quantizer.zero_point)
        reshaped = source.target is torch.ops.aten.reshape.default
        if reshaped and found.get(arguments(source)[0]) == wanted:
            found[reader] = wanted
            continue
        shape = tuple(source.meta["val"].shape)
        fitting = [
            (index, layouts[0])
            for index, certain in left.items()
            if _parameters(graph.tensors[index]) == wanted
            and stored_depth.get(index) == depth[source]
            and any(layouts := _layouts(shape, tuple(graph.tensors[index].shape)))
            and (certain or one_layout or not all(layouts))
        ]
        if source.target is torch.ops.aten.roll.default:
            # a concatenation along each axis; what lies before the last one is not rolled yet
            parts = [place for place in fitting if place[0] in concatenated]
            behind = parts[len(source.args[2]) - 1 :]
            for index, _ in fitting[: fitting.index(behind[0])] if behind else fitting:
                del left[index]
            fitting = behind
        if fitting:
            same = origin[fitting[0][0]]
            left = {i: certain for i, certain in left.items() if origin[i] != same}
            found[reader] = wanted
            yield quantized_name(source.name), fitting[0]


def _layouts(own: tuple[int, ...], stored: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether one stored sample may be of a batch of 2, as (H, W, C), and as it is."""
    if len(own) == 4 and stored[1:] == (*own[2:], own[1]):
        return True, stored[1:] == own[1:]
    # rows of features in one axis on either side, and several on the other; an image has none
    image = len(own) == 4 and own[1] == own[3]
    rows = own[-1:] == stored[-1:] and math.prod(own) == 2 * math.prod(stored) and not image
    sample = own[0] // 2, *own[1:]  # a Swin block's windows are in the first axis
    merged = any(sum(side > 1 for side in shape[:-1]) <= 1 for shape in (sample, stored))
    return False, stored[1:] == own[1:] or (rows and merged)


def _depths(graph: Graph) -> dict[Node, int]:
    """Of each node, how many layers with weights are on the longest way to it."""
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        before = max((depth[n] for n in node.all_input_nodes), default=0)
        depth[node] = before + (node.target in WEIGHTED)
    return depth


def _stored_depths(model: Any) -> dict[int, int]:
    """The same of each tensor in the file that depends on an input."""
    (graph,) = model.subgraphs
    kinds = _litert("schema_py_generated").BuiltinOperator
    layers = {getattr(kinds, name) for name in MATRIX_OPS}
    depth = {int(index): 0 for index in graph.inputs}
    for op in graph.operators:
        if before := [depth[i] for i in op.inputs if i in depth]:
            layer = model.operatorCodes[op.opcodeIndex].builtinCode in layers
            weighted = layer and op.inputs[1] not in depth
            depth |= {int(i): max(before) + weighted for i in op.outputs}
    return depth


def _parameters(tensor: Any) -> tuple[float, int] | None:
    """Scale and zero point of a tensor that has one of each."""
    stored = tensor.quantization
    if stored is None or stored.scale is None or len(stored.scale) != 1:
        return None
    return float(stored.scale[0]), int(stored.zeroPoint[0])


# ---- running -------------------------------------------------------------------------------------


class LiteRtSession:
    """One model in one interpreter."""

    def __init__(self, content: bytes, threads: int, emulated: bool, origin: str) -> None:
        self._content, self._threads, self._emulated = content, threads, emulated
        self._origin = origin
        self._interpreter = self._open()
        inputs = self._interpreter.get_input_details()
        self._inputs = [str(d["name"]) for d in inputs]
        self._outputs = [str(d["name"]) for d in self._interpreter.get_output_details()]
        self._places = self._read_places()
        self.integers = IntegerEnds(self._read_integers())
        self.input_types = [np.dtype(d["dtype"]).name for d in inputs]
        self.input_shapes = [self._channels_first(d["shape"], d["name"]) for d in inputs]

    def _open(self, *, shown: bool = False) -> Any:
        """An interpreter; `shown`: one that keeps all tensors, so without delegates."""
        litert = _litert("interpreter")
        kinds = litert.OpResolverType
        kind = kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES if shown else kinds.AUTO
        try:
            interpreter = litert.Interpreter(
                model_content=self._content, num_threads=self._threads,
                experimental_op_resolver_type=kinds.BUILTIN_REF if self._emulated else kind,
                experimental_preserve_all_tensors=shown,
            )  # fmt: skip
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise StateError(f"LiteRT refuses {self._origin}: {error}") from error
        return interpreter

    def _read_places(self) -> Places:
        """Index and layout of the tensors that the file names; of another's file, its ends."""
        model = _litert("schema_py_generated").Model.GetRootAs(self._content)
        for entry in map(model.Metadata, range(model.MetadataLength())):
            if entry.Name().decode() == TENSORS:
                found = model.Buffers(entry.Buffer()).DataAsNumpy().tobytes()
                return {name: (int(i), bool(last)) for name, (i, last) in json.loads(found).items()}
        ends = self._interpreter.get_input_details() + self._interpreter.get_output_details()
        return {str(d["name"]): (int(d["index"]), False) for d in ends}

    def _read_integers(self) -> Iterator[tuple[str, IntegerEnd]]:
        details = {d["index"]: d for d in self._interpreter.get_tensor_details()}
        for name, (index, _) in self._places.items():
            stored = details[index]["quantization_parameters"]
            if len(stored["scales"]) == 1:
                yield name, IntegerEnd(
                    dtype=np.dtype(details[index]["dtype"]).name,
                    scale=stored["scales"][0], zero_point=stored["zero_points"][0],
                )  # fmt: skip

    def _channels_first(self, shape: Sequence[int], name: str) -> tuple[int, ...]:
        sizes = tuple(int(size) for size in shape)
        return (sizes[0], sizes[3], *sizes[1:3]) if self._places[name][1] else sizes

    def __call__(self, inputs: Arrays) -> Arrays:
        """One batch: arrays of (N, ...), images as (N, C, H, W)."""
        return self._run(self._interpreter, inputs, self._outputs)

    def _run(self, interpreter: Any, inputs: Arrays, names: list[str]) -> Arrays:
        given = dict(zip(self._inputs, inputs, strict=True))

        def run(arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
            rows: list[list[NDArray[Any]]] = []
            for sample in range(len(arrays[0])):
                for name, array in zip(given, arrays, strict=True):
                    index, last = self._places[name]
                    x = array[sample : sample + 1]
                    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1) if last else x)
                    interpreter.set_tensor(index, x)
                interpreter.invoke()
                rows.append([self._value(interpreter, name) for name in names])
            return [np.concatenate(column) for column in zip(*rows, strict=True)]

        return self.integers.run(run, given, names)

    def _value(self, interpreter: Any, name: str) -> NDArray[Any]:
        index, last = self._places[name]
        value: NDArray[Any] = interpreter.get_tensor(index)  # a copy
        return value.transpose(0, 3, 1, 2) if last else value

    def integer_share(self) -> tuple[int, int]:
        """Read off the file's operators: an integer kernel gives int8."""
        types = {d["index"]: d["dtype"] for d in self._interpreter.get_tensor_details()}
        outputs = [
            types[int(op["outputs"][0])]
            for op in self._interpreter._get_ops_details()
            if op["op_name"] in MATRIX_OPS
        ]
        return sum(np.dtype(kind) == np.int8 for kind in outputs), len(outputs)

    def tensors(self, inputs: Arrays, names: list[str]) -> dict[str, NDArray[np.float32]]:
        """Values of tensors by name, by kernels of one operator each."""
        shown = [name for name in names if name in self._places]
        return dict(zip(shown, self._run(self._open(shown=True), inputs, shown), strict=True))
