"""Which operators a device's runtime takes, and in which element types.

TensorRT's tables are its parser's, by version; the Core ML provider's is its list; ONNX Runtime's
are the kernels of the installed wheel. OpenVINO has no table: its own converter is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import onnx
import onnx_ir as ir

from edgekd.errors import TargetError
from edgekd.target import Target

# operator -> element types; None: any
Table = Mapping[str, frozenset[str] | None]
# TensorRT's names for ONNX's types; it takes INT64 where it takes INT32, and casts DOUBLE to FP32
TENSORRT_TYPES = {
    "FP32": {"FLOAT", "DOUBLE"}, "FP16": {"FLOAT16"}, "BF16": {"BFLOAT16"}, "INT8": {"INT8"},
    "INT32": {"INT32", "INT64"}, "INT64": {"INT64"}, "BOOL": {"BOOL"}, "UINT8": {"UINT8"},
}  # fmt: skip


def release(text: str) -> tuple[int, ...]:
    """A version as numbers that compare."""
    return tuple(int(part) for part in text.split("."))


def operators(target: Target) -> tuple[str, Table | None]:
    """(what the table is of, the table); no table where the runtime's converter must be asked."""
    if target.operators is not None:
        return _list(target.operators)
    if target.runtime == "tensorrt":
        return _tensorrt(target.runtime_version)
    if target.runtime == "onnxruntime":
        return _onnxruntime(target.opset)
    return target.runtime, None


def _json(name: str) -> Any:
    return json.loads((files("edgekd") / "runtimes" / f"{name}_operators.json").read_text())


@cache
def _list(name: str) -> tuple[str, Table]:
    return name, dict.fromkeys(_json(name)["operators"])


@cache
def _tensorrt(runtime_version: str) -> tuple[str, Table]:
    """The newest table that is not newer than the device."""
    tables = _json("tensorrt")
    del tables["source"]
    newest = max((v for v in tables if release(v) <= release(runtime_version)), key=release)
    return f"TensorRT {newest}", {
        operator: frozenset().union(*(TENSORRT_TYPES.get(t, set()) for t in types))
        for operator, types in tables[newest].items()
    }


@cache
def _onnxruntime(opset: int) -> tuple[str, Table]:
    """Kernels of the CPU provider for the newest definition at `opset`; a function needs none."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

    found: dict[str, set[str] | None] = {}
    for kernel in get_all_opkernel_def():
        first, last = kernel.version_range
        ours = kernel.domain == "com.microsoft"
        if kernel.domain not in ("", "com.microsoft") or not (ours or first <= opset <= last):
            continue
        name = f"{kernel.domain}:{kernel.op_name}" if ours else kernel.op_name
        types = found.setdefault(name, set())
        if types is None or "T" not in kernel.type_constraints:
            found[name] = None  # one kernel that names no main type takes what it takes
        else:
            types |= {t.removeprefix("tensor(").removesuffix(")").upper()
                      for t in kernel.type_constraints["T"]}  # fmt: skip
    schemas: Sequence[Any] = onnx.defs.get_all_schemas()
    for schema in schemas:
        body = schema.has_function or schema.has_context_dependent_function
        if body and schema.domain == "" and schema.name not in found:
            found[schema.name] = None
    version: str = onnxruntime.__version__
    return f"ONNX Runtime {version}", {
        name: None if types is None else frozenset(types) for name, types in found.items()
    }


def unsupported(model: ir.Model, target: Target) -> Iterator[tuple[ir.Node, str, str]]:
    """(node, what is not taken, the operator or its type) of each node that the table has not."""
    _, table = operators(target)
    if table is None:
        return
    for node in model.graph:
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"
        if name not in table:
            yield node, name, "operator"
            continue
        types, given = table[name], _main_type(node)
        if types is not None and given is not None and given.name not in types:
            yield node, f"{name} of {given}", "type"


def _main_type(node: ir.Node) -> ir.DataType | None:
    """Element type of what the operator computes on: its first input, of Where what it chooses."""
    if node.op_type == "Cast" or not node.inputs:
        return None
    value = node.inputs[1 if node.op_type == "Where" else 0]
    return None if value is None else value.dtype


def check_operators(model: ir.Model, target: Target) -> None:
    """Every operator and its element type must be in the target's table.

    Raises:
        TargetError: what is not, with its nodes.
    """
    refused: dict[str, list[str]] = {}
    for node, what, _ in unsupported(model, target):
        refused.setdefault(what, []).append(str(node.name))
    if refused:
        found = "; ".join(f"{kind} ({', '.join(names[:3])})" for kind, names in refused.items())
        raise TargetError(
            f"{target.name}: {target.runtime} {target.runtime_version} (operators of "
            f"{operators(target)[0]}) does not take {found}: use other layers, or a target with a "
            "newer runtime"
        )
