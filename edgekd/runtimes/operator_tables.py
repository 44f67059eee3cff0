"""Which operators a runtime takes: one JSON file for each, with its source."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict

from edgekd.errors import TargetError
from edgekd.target import Target


class OperatorTable(BaseModel):
    """The operators of one version of a runtime, and what it asks of them.

    Operators of other domains than ONNX's are named `domain:operator`; types are ONNX's names.

    Attributes:
        name, version: of the runtime.
        source: where the operators were read.
        max_opset, max_ir_version: of files; None: no limit is known.
        operators: and the element types of their inputs and outputs; empty: no limit is known.
        read_as: types that it takes as another.
        falls_back_to: the table of what computes the operators that are not in this one.
        other_format: operators that another format of the same runtime takes.
        by_name_alone: whether it looks at an operator's name, and not at its domain.
        plugins: operators that only a plugin computes.
        constant_inputs: by index, those that must not be computed.
        spatial_axes: how many an operator's images may have.
        single_output: operators of which only the first output is computed.
        int8_initializers: whether a dequantize operator may read one.
        dynamic_axes: which axes of an input may be dynamic.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    version: str
    source: str
    url: str
    max_opset: int | None = None
    max_ir_version: int | None = None
    operators: dict[str, frozenset[str]]
    read_as: dict[str, str] = {}
    falls_back_to: str | None = None
    other_format: dict[str, frozenset[str]] = {}
    by_name_alone: bool = False
    plugins: frozenset[str] = frozenset()
    constant_inputs: dict[str, tuple[int, ...]] = {}
    spatial_axes: dict[str, tuple[int, ...]] = {}
    single_output: frozenset[str] = frozenset()
    int8_initializers: bool = True
    dynamic_axes: Literal["any", "batch", "none"] = "any"

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"

    def takes(self, operator: str, dtype: str) -> bool:
        """Whether `operator` is there for elements of that type."""
        types = self.operators[operator]
        return not types or dtype in types or self.read_as.get(dtype) in types


def operator_table(target: Target) -> OperatorTable:
    """The newest table of the target's runtime that is not newer than the device's.

    Raises:
        TargetError: the runtime does not read ONNX.
    """
    return read_table(target.operators or target.runtime, target.runtime_version)


@cache
def read_table(name: str, runtime_version: str) -> OperatorTable:
    """Of `<name>_operators.json`; the oldest where all are newer than `runtime_version`."""
    file = files("edgekd") / "runtimes" / f"{name}_operators.json"
    if not file.is_file():
        raise TargetError(
            f"{name} does not read ONNX; check takes the targets of ONNX Runtime, OpenVINO and "
            "TensorRT, and edgekd export writes the files of the others"
        )
    content = json.loads(file.read_text())
    versions = content["versions"]
    known = [v for v in versions if release(v) <= release(runtime_version)]
    version = max(known, key=release) if known else min(versions, key=release)
    return OperatorTable(name=name, version=version, source=content["source"], **versions[version])


def release(text: str) -> tuple[int, ...]:
    """A version to compare: "10.3" is (10, 3)."""
    return tuple(int(part) for part in text.split("."))
