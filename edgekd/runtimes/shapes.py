"""Fixed shapes, for runtimes that take no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from edgekd.errors import ModelError, nearest
from edgekd.runtimes.decompose import fold_constants


def fix_shapes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give the named inputs these shapes, and all that follows from them; fold what was a shape.

    Raises:
        ModelError: no such input, a shape that contradicts the input's own, or a tensor whose
            shape still depends on values.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

    inputs = {str(value.name): value for value in model.graph.inputs}
    for name, shape in shapes.items():
        if name not in inputs:
            raise ModelError(f"no input {name!r}{nearest(name, inputs)}")
        known = inputs[name].shape
        if known is not None and not _fits(known, shape):
            raise ModelError(f"input {name!r} is {known}; {shape} does not fit it")
        inputs[name].shape = ir.Shape(shape)
    for value in _computed(model):  # what was inferred for other shapes
        value.shape = None
    ShapeInferencePass()(model)
    fold_constants(model)
    ShapeInferencePass()(model)
    RemoveUnusedNodesPass()(model)
    for value in (*inputs.values(), *_computed(model)):
        if value.shape is None or not value.shape.is_static():
            raise ModelError(
                f"{value.name} of {value.producer() or 'the inputs'} has no fixed shape: "
                f"{value.shape}; give each input a shape, and use no operator whose output's shape "
                "depends on values"
            )


def _fits(known: ir.Shape, shape: tuple[int, ...]) -> bool:
    return len(known) == len(shape) and all(
        d == n or not isinstance(d, int) for d, n in zip(known, shape, strict=True)
    )


def _computed(model: ir.Model) -> Iterator[ir.Value]:
    """What nodes give, where it is used."""
    for node in model.graph:
        yield from (v for v in node.outputs if v.consumers() or v.is_graph_output())
