"""Values of an ONNX graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from edgekd.errors import ModelError

REMEDY = "devices take tensors of numbers: export the network without what makes or reads it"


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer or a Constant node, None if the value is computed."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def require_tensors(model: ir.Model) -> None:
    """Refuse what no device computes with.

    Raises:
        ModelError: a tensor of strings, or an input or output that is no tensor.
    """
    graph = model.graph
    computed = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *computed):
        if value.dtype == ir.DataType.STRING:
            raise ModelError(f"{value.name} holds strings; {REMEDY}")
    for value in (*graph.inputs, *graph.outputs):
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise ModelError(f"{value.name} is a {value.type}; {REMEDY}")


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes `value`, if it is an `op_type`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def new_constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer of `graph`."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value
