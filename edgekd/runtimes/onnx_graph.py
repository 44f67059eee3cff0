"""ONNX from a Network: torch's exporter, then small rewrites, one function each."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript.function_libs.torch_lib.ops.core import aten_as_strided
from torch.fx import GraphModule

from edgekd import __version__
from edgekd.errors import ModelError, TargetError
from edgekd.network import Network
from edgekd.quantization.placement import quantized_activations
from edgekd.runtimes.decompose import decompose, fold_constants
from edgekd.runtimes.integer_ends import cut_ends
from edgekd.runtimes.onnx_values import constant, new_constant, producer
from edgekd.runtimes.operator_tables import operator_table
from edgekd.runtimes.opset import EXPORTED, lower
from edgekd.runtimes.shapes import fix_shapes
from edgekd.target import Target

MATRIX_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def to_onnx(net: Network, target: Target) -> ir.Model:
    """The network as a model of the target's opset and shapes, rewritten and labelled.

    Raises:
        TargetError: torch could not give this opset; it names the one it gave.
        ModelError: an operator has no ONNX form, a bias does not fit into int32, or an input or
            output that is to be an integer is not quantized.
    """
    wanted = None if net.scheme is None else target.scheme
    unsigned = wanted is not None and wanted.activation_dtype == "uint8"
    model = _exported(net, max(EXPORTED, target.opset), unsigned, target.name).clone()
    _name_ends(model, net)
    _name_inlined(model)
    if net.scheme is not None:
        _name_quantized(model, net)
    pool_globally(model)
    pad_in_convolution(model)
    if wanted is not None and wanted.bias == "int32":
        integer_bias(model)
    drop_idle_clips(model)
    small_letters(model)
    if wanted is not None and (wanted.integer_inputs or wanted.integer_outputs):
        cut_ends(model, inputs=wanted.integer_inputs, outputs=wanted.integer_outputs)
    if target.shapes == "static":
        fix_shapes(model, {i.name: (1, *i.shape) for i in net.io.inputs})
    fit_operators(model, target)
    _drop_unused(model)
    _drop_traces(model)
    model.metadata_props.update(metadata(net, target))
    model.metadata_props["edgekd.tools"] = json.dumps(tool_versions())
    return model


def fit_operators(model: ir.Model, target: Target) -> None:
    """Operators of opset 18 become those of the target's opset and, on TensorRT, of its parser.

    Raises:
        TargetError: an operator has no form there.
    """
    if target.runtime == "tensorrt":
        fold_constants(model)
        decompose(model, operator_table(target).operators)
    if target.opset < EXPORTED:
        lower(model, target.opset, target.name)


def _exported(net: Network, opset: int, unsigned: bool, device: str) -> ir.Model:
    """What torch's exporter makes of the network; once for all targets that take the same."""
    kept: ir.Model | None = net.onnx.get((opset, unsigned))
    if kept is not None:
        return kept
    program = net.program(unsigned=unsigned)
    try:
        with quiet("torch.onnx"):
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=opset, verbose=False,
                custom_translation_table={torch.ops.aten.as_strided.default: _as_strided},
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(f"{net!r} has no ONNX form: {error}") from error
    assert exported is not None
    model: ir.Model = exported.model
    # the exporter may log a failed conversion and go on with another opset
    if model.opset_imports.get("") != opset:
        raise TargetError(
            f"{device} takes opset {opset}; torch's exporter gave "
            f"{model.opset_imports.get('')} for this network"
        )
    net.onnx[opset, unsigned] = model
    return model


def _as_strided(
    x: Any, size: Sequence[Any], stride: Sequence[Any], storage_offset: int | None = None
) -> Any:
    """Of a pooled map, what torch's decomposition of pooling adds for another memory layout."""
    if len(size) == 4 and list(size[2:]) == [1, 1] and list(stride[1:]) == [1, size[1], size[1]]:
        return onnxscript.opset18.Identity(x)
    return aten_as_strided(x, size, stride, storage_offset or 0)


def save_onnx(model: ir.Model, path: Path) -> dict[str, str]:
    """Write and check the model; return the versions of the tools."""
    ir.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the exported graph is not valid ONNX: {error}") from error
    return tool_versions()


def tool_versions() -> dict[str, str]:
    """Of what an ONNX file is made with."""
    return {
        "edgekd": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
    }


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Keep an exporter's progress lines, and the notes of the logger `name`, off the terminal."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_ends(model: ir.Model, net: Network) -> None:
    """Inputs, outputs and the batch axis get the Network's names."""
    for value, spec in zip(model.graph.inputs, net.io.inputs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(["batch", *spec.shape])
    for value, name in zip(model.graph.outputs, net.io.outputs, strict=True):
        value.name = name
        if value.shape is not None:
            value.shape = ir.Shape(["batch", *value.shape.dims[1:]])


def _name_inlined(model: ir.Model) -> None:
    """Nodes that the exporter numbers (n0, n4_2) say what they are: runtimes show but names."""
    for index, node in enumerate(model.graph):
        if re.fullmatch(r"n\d+(_\d+)?", node.name or ""):
            node.name = f"inlined_{node.op_type}_{index}"


def quantized_name(tensor: str) -> str:
    """Name in the exported graph of `tensor` behind its quantizer."""
    return f"quant.{tensor}"


def _name_quantized(model: ir.Model, net: Network) -> None:
    """Call each dequantized activation by the tensor's name in the trained graph."""
    assert isinstance(net.module, GraphModule)
    nodes = [
        node
        for node in model.graph
        if node.op_type == "QuantizeLinear" and constant(node.inputs[0]) is None  # not a weight
    ]
    for node, tensor in zip(nodes, quantized_activations(net.module), strict=True):
        readers = [n for n in node.outputs[0].consumers() if n.op_type == "DequantizeLinear"]
        if not readers[0].outputs[0].is_graph_output():  # that has its name
            readers[0].outputs[0].name = quantized_name(tensor)


def metadata(net: Network, target: Target) -> dict[str, str]:
    """What a file says of itself: target, labels, preprocessing and scheme."""
    facts = {
        "edgekd.version": __version__,
        "edgekd.target": target.name,
        "edgekd.labels": json.dumps(net.io.labels),
    }
    if net.io.preprocessing is not None:
        facts["edgekd.preprocessing"] = net.io.preprocessing.model_dump_json()
    if net.scheme is not None:
        facts["edgekd.scheme"] = net.scheme.model_dump_json()
    return facts


def pool_globally(model: ir.Model) -> int:
    """ReduceMean over all of H and W becomes GlobalAveragePool, which has integer kernels."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "ReduceMean" or node.inputs[0] is None:
            continue
        axes, shape = constant(node.inputs[1]), node.inputs[0].shape
        if axes is None or shape is None or len(shape) != 4:
            continue
        keep = node.attributes.get_int("keepdims", 1)
        if not keep or sorted(int(a) % 4 for a in axes) != [2, 3]:
            continue
        pooled = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [pooled], node.outputs, pooled.outputs
        )
        count += 1
    return count


def pad_in_convolution(model: ir.Model) -> int:
    """A Pad of zeros over H and W moves into the convolution behind it.

    Integer runtimes have no kernel for the Pad; ONNX convolutions pad each side by itself. With
    Q/DQ between the two (the same integers as before the Pad, as 0 is one of them), the
    convolution reads the DQ before the Pad.
    """
    count = 0
    for conv in list(model.graph):
        if conv.op_type != "Conv":
            continue
        dq = producer(conv.inputs[0], "DequantizeLinear")
        q = producer(dq.inputs[0], "QuantizeLinear") if dq else None
        pad = producer(q.inputs[0] if q else conv.inputs[0], "Pad")
        if pad is None or pad.attributes.get_string("mode", "constant") != "constant":
            continue
        pads, fill = (
            constant(pad.inputs[1]),
            constant(pad.inputs[2] if len(pad.inputs) > 2 else None),
        )
        if (
            pads is None
            or len(pads) != 8
            or any(pads[[0, 1, 4, 5]])
            or (fill is not None and fill.any())
        ):
            continue
        own = conv.attributes.get_ints("pads", (0, 0, 0, 0))
        added = [int(p) for p in pads[[2, 3, 6, 7]]]
        conv.attributes["pads"] = ir.AttrInt64s(
            "pads", [a + b for a, b in zip(own, added, strict=True)]
        )
        conv.replace_input_with(0, pad.inputs[0])
        count += 1
    return count


def small_letters(model: ir.Model) -> int:
    """Einsum's axes get small letters, the only ones that TensorRT reads."""
    count = 0
    for node in model.graph:
        equation = node.attributes.get_string("equation", "") if node.op_type == "Einsum" else ""
        axes = sorted(set(filter(str.isalpha, equation)))
        if any(map(str.isupper, axes)) and len(axes) <= len(ascii_lowercase):
            letters = str.maketrans(dict(zip(axes, ascii_lowercase, strict=False)))
            node.attributes["equation"] = ir.AttrString("equation", equation.translate(letters))
            count += 1
    return count


def drop_idle_clips(model: ir.Model) -> int:
    """The exporter clips integers to the range of their type; behind a quantizer that is idle."""
    count = 0
    for clip in list(model.graph):
        if clip.op_type != "Clip" or producer(clip.inputs[0], "QuantizeLinear") is None:
            continue
        source = clip.inputs[0]
        low, high = (constant(bound) for bound in clip.inputs[1:3])
        if source is None or low is None or high is None:
            continue
        limits = np.iinfo(low.dtype)
        if low <= limits.min and high >= limits.max:
            ir.convenience.replace_all_uses_with(clip.outputs[0], source)
            count += 1
    return count


def integer_bias(model: ir.Model) -> int:
    """The bias of an integer convolution or Gemm becomes int32 with scale s_x · s_w.

    Raises:
        ModelError: a bias does not fit into int32 at that scale.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3:
            continue
        x = producer(node.inputs[0], "DequantizeLinear")
        w = producer(node.inputs[1], "DequantizeLinear")
        bias = constant(node.inputs[2])
        if x is None or w is None or bias is None:
            continue
        x_scale, w_scale = constant(x.inputs[1]), constant(w.inputs[1])
        assert x_scale is not None and w_scale is not None
        scale = (x_scale * w_scale).astype(np.float32)
        steps = np.rint(bias / scale)
        if np.abs(steps).max(initial=0) >= 2**31:
            channel = int(np.abs(steps).argmax())
            raise ModelError(
                f"{node.name}: the bias of channel {channel} is {bias[channel]:g}, which is "
                f"{steps[channel]:.3g} steps; int32 holds 2^31: quantize with a larger weight scale"
            )
        # by the node: two nodes that share their weights need not share their input's scale
        name = f"{node.outputs[0].name}.bias"
        dequantized = ir.node(
            "DequantizeLinear",
            [
                new_constant(model.graph, f"{name}.int32", steps.astype(np.int32)),
                new_constant(model.graph, f"{name}.scale", scale),
            ],
            {"axis": 0} if scale.ndim else {},
        )
        model.graph.insert_before(node, dequantized)
        node.replace_input_with(2, dequantized.outputs[0])
        count += 1
    return count


def keep_floats(model: ir.Model) -> int:
    """Float layers between integers stay float in ONNX Runtime, which else makes int8 of them.

    Its WeightBiasQuantization gives the float weight of a convolution or Gemm behind a
    DequantizeLinear a scale of its own, one for the whole tensor, unless the DequantizeLinear has
    a scale for each channel. So such a layer reads one that has: the same scale, repeated.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        dq = producer(node.inputs[0], "DequantizeLinear")
        shape = None if node.inputs[0] is None else node.inputs[0].shape
        if dq is None or shape is None or constant(node.inputs[1]) is None:
            continue
        scale, zero = (None if v is None else constant(v) for v in dq.inputs[1:3])
        channels = shape[1]
        if scale is None or scale.ndim or zero is None or not isinstance(channels, int):
            continue
        name = f"{node.outputs[0].name}.input"
        repeated = ir.node(
            "DequantizeLinear",
            [
                dq.inputs[0],
                new_constant(model.graph, f"{name}.scale", np.repeat(scale, channels)),
                new_constant(model.graph, f"{name}.zero", np.repeat(zero, channels)),
            ],
            {"axis": 1},
        )
        model.graph.insert_before(node, repeated)
        node.replace_input_with(0, repeated.outputs[0])
        count += 1
    _drop_unused(model)
    return count


def own_zero_points(model: ir.Model) -> int:
    """Each DequantizeLinear has a zero point of its own, for OpenVINO.

    Where a convolution and a matrix product of as many channels share theirs, it reshapes the one
    constant in two ways, does not recognise either weight, and computes both in float.
    """
    count = 0
    readers: dict[str, int] = {}
    for node in model.graph:
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        array = constant(zero)
        if node.op_type != "DequantizeLinear" or zero is None or array is None:
            continue
        name = str(zero.name)
        readers[name] = readers.get(name, 0) + 1
        if readers[name] > 1:
            node.replace_input_with(2, new_constant(model.graph, f"{name}.{readers[name]}", array))
            count += 1
    return count


def averaged_padding(node: ir.Node) -> ir.Node | None:
    """The dequantize operator whose integers `node` averages with padding that counts.

    None where it does not, or where the padding of 0 is the integer 0 of uint8.
    """
    if node.op_type != "AveragePool" or not node.attributes.get_int("count_include_pad", 0):
        return None
    dq = producer(node.inputs[0], "DequantizeLinear")
    if dq is None or not any(node.attributes.get_ints("pads", ())):
        return None
    zero = constant(dq.inputs[2]) if len(dq.inputs) > 2 else None
    return None if zero is not None and zero.dtype == np.uint8 and not zero.any() else dq


def pad_before_averages(model: ir.Model) -> int:
    """An average of integers that counts its padding gets it from a Pad, for OpenVINO.

    It would pad with the integer 0, which is the real 0 only of uint8 with zero point 0. Q/DQ
    behind the Pad, of the same integers, keep it from being fused into the average again.
    """
    count = 0
    for node in list(model.graph):
        dq = averaged_padding(node)
        if dq is None:
            continue
        pads = list(node.attributes.get_ints("pads", ()))
        half, name = len(pads) // 2, f"{node.outputs[0].name}.padded"
        sides = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]])
        pad = ir.node(
            "Pad", [node.inputs[0], new_constant(model.graph, f"{name}.pads", sides)], name=name
        )
        q = ir.node("QuantizeLinear", [*pad.outputs, *dq.inputs[1:]], name=f"{name}.quantize")
        again = ir.node("DequantizeLinear", [*q.outputs, *dq.inputs[1:]], name=f"{name}.dequantize")
        model.graph.insert_before(node, [pad, q, again])
        node.replace_input_with(0, again.outputs[0])
        node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
        count += 1
    return count


def _drop_unused(model: ir.Model) -> None:
    """Nodes and initializers that nothing reads any more."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def _drop_traces(model: ir.Model) -> None:
    """The exporter's notes on where each node comes from: in a small network, most of the file."""
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def integer_matrix_ops(model: onnx.ModelProto) -> tuple[int, int]:
    """(how many of `quantized_matrix_ops`, and of all matrix operators)."""
    matrix = [node for node in model.graph.node if node.op_type in MATRIX_OPS]
    return len(quantized_matrix_ops(model)), len(matrix)


def quantized_matrix_ops(model: onnx.ModelProto) -> list[str]:
    """Names of the matrix operators whose input and weight come out of DequantizeLinear."""
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in MATRIX_OPS
        and all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2])
    ]
