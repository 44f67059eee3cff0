"""Integer inputs and outputs: files without the first quantize and the last dequantize operator.

A session of such a file takes floats all the same, and gives them; what it is given in integers it
answers in integers, as the device does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from edgekd.errors import ModelError, StateError
from edgekd.runtimes.onnx_values import constant, producer

KEY = "edgekd.integers"  # in the file's metadata


class IntegerEnd(BaseModel):
    """One integer input or output: real value = scale · (integer − zero_point)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dtype: str
    scale: float
    zero_point: int

    def quantize(self, x: NDArray[Any]) -> NDArray[Any]:
        """Floats as integers; integers stay as they are."""
        if x.dtype == self.dtype:
            return x
        info = np.iinfo(self.dtype)
        steps = np.rint(x / np.float32(self.scale)) + self.zero_point
        return steps.clip(info.min, info.max).astype(self.dtype)

    def dequantize(self, integers: NDArray[Any]) -> NDArray[np.float32]:
        """Integers as floats."""
        steps = integers.astype(np.float32) - self.zero_point
        return steps * np.float32(self.scale)


class IntegerEnds(dict[str, IntegerEnd]):
    """Those of a file, by the names of its inputs and outputs; empty where all are float."""

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Self:
        """From a file's metadata; StateError where it is damaged."""
        try:
            found = TypeAdapter(dict[str, IntegerEnd]).validate_json(metadata.get(KEY, "{}"))
        except ValidationError as error:
            raise StateError(f"{KEY} in the file's metadata is damaged: {error}") from None
        return cls(found)

    def run(
        self,
        model: Callable[[list[NDArray[Any]]], list[NDArray[Any]]],
        inputs: Mapping[str, NDArray[Any]],
        outputs: list[str],
    ) -> list[NDArray[Any]]:
        """The model's outputs for `inputs`: integers for integers, else floats."""
        given = [self[n].quantize(x) if n in self else x for n, x in inputs.items()]
        results = model(given)
        if any(n in self and x.dtype == self[n].dtype for n, x in inputs.items()):
            return results
        return [self.floats(n, y) for n, y in zip(outputs, results, strict=True)]

    def floats(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """What the tensor of that name stands for."""
        return self[name].dequantize(values) if name in self else values


def cut_ends(model: ir.Model, *, inputs: bool, outputs: bool) -> None:
    """Leave out the quantize operator of each input, and the dequantize operator of each output.

    Raises:
        ModelError: an input goes into a float operator, or an output comes out of one.
    """
    graph, ends = model.graph, IntegerEnds()
    for value in graph.inputs if inputs else ():
        readers = [use.node for use in value.uses()]
        first = readers[0] if len(readers) == 1 else None
        if first is None or first.op_type != "QuantizeLinear":
            kinds = ", ".join(sorted({reader.op_type for reader in readers})) or "nothing"
            raise ModelError(
                f"integer inputs: {value.name} goes in float into {kinds}; leave integer_inputs "
                "out of the scheme"
            )
        name = str(value.name)
        ends[name] = _end(first)
        value.dtype = ir.DataType[ends[name].dtype.upper()]
        ir.convenience.replace_all_uses_with(first.outputs[0], value)
        graph.remove(first, safe=True)
    for index, value in enumerate(graph.outputs if outputs else ()):
        last = producer(value, "DequantizeLinear")
        integers = None if last is None else last.inputs[0]
        if last is None or integers is None or producer(integers, "QuantizeLinear") is None:
            raise ModelError(
                f"integer outputs: {value.name} comes out of a float operator; leave "
                "integer_outputs out of the scheme"
            )
        name = str(value.name)
        ends[name] = _end(last)
        value.name = f"{name}.float"
        integers.name, integers.shape = name, value.shape
        integers.dtype = ir.DataType[ends[name].dtype.upper()]
        graph.outputs[index] = integers
    if ends:
        plain = {name: end.model_dump() for name, end in ends.items()}
        model.metadata_props[KEY] = json.dumps(plain)


def _end(node: ir.Node) -> IntegerEnd:
    """Of a quantize or dequantize operator, one scale for the tensor."""
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
    assert scale is not None and zero is not None
    return IntegerEnd(dtype=str(zero.dtype), scale=float(scale), zero_point=int(zero))
