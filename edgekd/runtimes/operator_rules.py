"""Rules about the file as a whole and about its operators."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from edgekd.runtimes.decompose import DEFINITIONS
from edgekd.runtimes.operator_tables import read_table
from edgekd.runtimes.rule import (
    QUANTIZERS,
    Device,
    Found,
    Graph,
    Rule,
    Severity,
    operator_name,
)

INTEGER_OPERATORS = {
    "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger",
}  # fmt: skip
COREML = "https://onnxruntime.ai/docs/execution-providers/CoreML-ExecutionProvider.html"


# ---- the file ------------------------------------------------------------------------------------


def _opset(graph: Graph, device: Device) -> Iterator[Found]:
    opset, newest = graph.opset, device.table.max_opset
    if newest is not None and opset is not None and opset > newest:
        limit = f"{device.table.title} takes opset {newest} at most"
        yield Found(None, f"opset {opset}", limit, "error")


def _ir_version(graph: Graph, device: Device) -> Iterator[Found]:
    newest = device.table.max_ir_version
    if newest is not None and graph.model.ir_version > newest:
        limit = f"{device.table.title} reads IR version {newest} at most"
        yield Found(None, f"IR version {graph.model.ir_version}", limit, "error")


def _dynamic(graph: Graph, device: Device) -> Iterator[Found]:
    """Axes of the inputs; the first is the batch's."""
    static = device.target.shapes == "static"
    allowed = "none" if static else device.table.dynamic_axes
    severity: Severity = device.lenient if static else "warning"
    for value in graph.model.graph.inputs if allowed != "any" else ():
        dims = () if value.shape is None else value.shape.dims
        if value.shape is None:
            yield Found(None, f"input {value.name} has no shape", _STATIC[allowed], severity)
        dynamic = [axis for axis, size in enumerate(dims) if not isinstance(size, int)]
        beyond = [axis for axis in dynamic if axis or allowed == "none"]
        if beyond:
            shape = ", ".join(str(s) if isinstance(s, int) else f"{s}" for s in dims)
            yield Found(
                None, f"input {value.name} is ({shape}): dynamic axes {beyond}", _STATIC[allowed],
                severity,
            )  # fmt: skip


_STATIC = {
    "batch": "only the batch axis is left open when the engine is built",
    "none": "all shapes are to be static, the batch's as well",
}


def _memory(graph: Graph, device: Device) -> Iterator[Found]:
    memory = device.target.memory_mib
    weights, activations = size_mib(graph)
    if memory is not None and weights + activations > memory:
        yield Found(
            None, f"{weights:.0f} MiB of weights and at least {activations:.0f} of activations",
            f"{memory} MiB of memory", "error",
        )  # fmt: skip


def size_mib(graph: Graph) -> tuple[float, float]:
    """(weights, largest sum of activations that live at once), of one sample.

    Dynamic axes count as 1; what a dequantize operator gives is read as integers.
    """
    weights = sum(v.const_value.nbytes for v in graph.model.graph.initializers.values()
                  if v.const_value is not None)  # fmt: skip
    last: dict[ir.Value, int] = {}
    nodes = list(graph.model.graph)
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None:
                last[value] = index
    for value in graph.model.graph.outputs:
        last[value] = len(nodes)
    live = sum(map(_bytes, graph.model.graph.inputs))
    peak, ends = live, [0] * (len(nodes) + 1)
    for value in graph.model.graph.inputs:
        ends[last.get(value, 0)] += _bytes(value)
    for index, node in enumerate(nodes):
        folded = node.op_type in ("Constant", "DequantizeLinear")
        for value in () if folded else node.outputs:
            live += _bytes(value)
            ends[last.get(value, index)] += _bytes(value)
        peak = max(peak, live)
        live -= ends[index]
    return weights / 2**20, peak / 2**20


def _bytes(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return 0
    count = 1
    for size in value.shape.dims:
        count *= size if isinstance(size, int) else 1
    return int(count * value.dtype.itemsize)


# ---- operators -----------------------------------------------------------------------------------


def _operator(graph: Graph, device: Device) -> Iterator[Found]:
    table = device.table
    for node in graph.nodes:
        name = operator_name(node)
        if name not in table.operators and not _named_by_another_rule(node):
            yield _absent(node, device, f"{table.title} does not have {name}")


def _named_by_another_rule(node: ir.Node) -> bool:
    return _custom(node) or node.op_type in INTEGER_OPERATORS or node.op_type in QUANTIZERS


def _custom(node: ir.Node) -> bool:
    """Neither an operator of ONNX nor one that is handled as such."""
    return node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type)


def _absent(node: ir.Node, device: Device, limit: str, otherwise: str = "") -> Found:
    """An operator that the table lacks; another runtime may compute it, or another format."""
    name, table = operator_name(node), device.table
    severity: Severity = "error"
    if table.falls_back_to is not None:
        beside = read_table(table.falls_back_to, device.target.runtime_version)
        if name in beside.operators:
            severity, limit = "warning", f"{limit}: {beside.name} computes it, and the graph splits"
    for form, operators in table.other_format.items():
        if name in operators:
            otherwise = f"use the provider's older format, {form}, or another layer"
    if node.op_type in DEFINITIONS and device.target.runtime == "tensorrt":
        otherwise = f"edgekd export FILE --target {device.target.name} writes it with older ones"
    return Found(node, name, limit, severity, otherwise)


def _custom_operator(graph: Graph, device: Device) -> Iterator[Found]:
    table = device.table
    for node in graph.nodes:
        if not _custom(node) or operator_name(node) in table.operators:
            continue
        if table.by_name_alone and node.op_type in table.operators:
            limit = f"{table.title} takes it for ONNX's own {node.op_type}"
            yield Found(node, operator_name(node), limit, "warning")
        else:
            yield _absent(node, device, f"{table.title} takes it from a plugin alone")


def _integer_operator(graph: Graph, device: Device) -> Iterator[Found]:
    for node in graph.nodes:
        name = operator_name(node)
        if name in INTEGER_OPERATORS and name not in device.table.operators:
            yield _absent(node, device, f"{device.table.title} takes Q/DQ instead")


def _plugin(graph: Graph, device: Device) -> Iterator[Found]:
    for node in graph.nodes:
        if operator_name(node) in device.table.plugins:
            limit = f"in {device.table.title} a plugin computes it, or nothing does"
            yield Found(node, node.op_type, limit, "warning")


def _type(graph: Graph, device: Device) -> Iterator[Found]:
    table, opset = device.table, graph.opset or 1
    for node in graph.nodes:
        name = operator_name(node)
        if name not in table.operators or node.op_type in (*QUANTIZERS, "Constant"):
            continue  # what reads a constant is judged
        refused = {
            value.dtype.name: str(value.name)
            for value in _chosen_types(node, opset)
            if value.dtype is not None and not table.takes(name, value.dtype.name)
        }
        if refused:
            types = ", ".join(sorted(table.operators[name]))
            yield Found(
                node, f"{name} of {' and '.join(sorted(refused))}", f"{table.title}: {types}",
                "error",
            )  # fmt: skip


def _chosen_types(node: ir.Node, opset: int) -> Iterator[ir.Value]:
    """Inputs and outputs whose type is a choice; that of shapes, indices and conditions is not."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return
    choices = {
        constraint.type_param_str
        for constraint in schema.type_constraints
        if any("float" in allowed for allowed in constraint.allowed_type_strs)
        or len(constraint.allowed_type_strs) > 3
    }
    for values, parameters in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            parameter = parameters[min(index, len(parameters) - 1)]  # the last may be variadic
            if value is not None and parameter.type_str in choices:
                yield value


def _constant_input(graph: Graph, device: Device) -> Iterator[Found]:
    for node in graph.nodes:
        for index in device.table.constant_inputs.get(operator_name(node), ()):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value in graph.varying:
                yield Found(
                    node, f"input {index} of {node.op_type} ({value.name}) is computed",
                    f"{device.table.title} takes a constant there", device.lenient,
                )  # fmt: skip


def _spatial_axes(graph: Graph, device: Device) -> Iterator[Found]:
    for node in graph.nodes:
        allowed = device.table.spatial_axes.get(operator_name(node))
        shape = node.inputs[0].shape if allowed and node.inputs[0] is not None else None
        if allowed and shape is not None and len(shape) - 2 not in allowed:
            limit = f"{device.table.title}: {' or '.join(f'{n}D' for n in allowed)}"
            yield Found(node, f"{node.op_type} in {len(shape) - 2}D", limit, device.lenient)


def _further_output(graph: Graph, device: Device) -> Iterator[Found]:
    for node in graph.nodes:
        if operator_name(node) in device.table.single_output and any(
            value.name and (value.uses() or value.is_graph_output()) for value in node.outputs[1:]
        ):
            limit = f"{device.table.title} computes the first output alone"
            yield Found(node, f"a second output of {node.op_type}", limit, device.lenient)


def _einsum(graph: Graph, device: Device) -> Iterator[Found]:
    for node in graph.nodes:
        equation = node.attributes.get_string("equation", "") if node.op_type == "Einsum" else ""
        if equation != equation.lower():
            yield Found(node, equation, f"{device.table.title} reads small letters alone", "error")


TABLE = {"": "table"}
OPERATOR_RULES: tuple[Rule, ...] = (
    Rule(
        "opset", _opset, "export at an older opset: edgekd export does, or torch.onnx.export with "
        "opset_version and onnx.version_converter", sources=TABLE,
    ),
    Rule("ir-version", _ir_version, "set the file's ir_version back, if its opset allows it"),
    Rule("operator", _operator, "use other layers, or a newer runtime", sources=TABLE),
    Rule(
        "custom-operator", _custom_operator,
        "replace it by ONNX's own operators, or ship its plugin", sources=TABLE,
    ),
    Rule(
        "integer-operator", _integer_operator,
        "quantize in the Q/DQ format: float operators between QuantizeLinear and DequantizeLinear",
        sources=TABLE,
    ),
    Rule(
        "plugin", _plugin, "see that the device's libnvinfer_plugin has it, or compute it outside",
        sources=TABLE,
    ),
    Rule("type", _type, "cast around it, or compute it outside", sources=TABLE),
    Rule("constant-input", _constant_input, "fold it into an initializer", sources=TABLE),
    Rule("spatial-axes", _spatial_axes, "reshape to as many axes as it takes", sources=TABLE),
    Rule(
        "einsum", _einsum, "rename the axes; edgekd export does",
        applies=lambda d: d.target.runtime == "tensorrt", sources=TABLE,
    ),
    Rule("further-output", _further_output, "do without that output", sources=TABLE),
    Rule(
        "dynamic-shape", _dynamic, "fix the shapes: python -m "
        "onnxruntime.tools.make_dynamic_shape_fixed, or export with fixed ones",
        sources={"coreml": COREML, "openvino": "https://docs.openvino.ai/2025/documentation/"
                 "compatibility-and-support/supported-devices.html"},
    ),
    Rule(
        "memory", _memory, "use a smaller network or input, integers, or a device with more",
        applies=lambda d: d.target.memory_mib is not None,
    ),
)  # fmt: skip
