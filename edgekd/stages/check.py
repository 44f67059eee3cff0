"""check: what can a device not hold of anybody's ONNX file?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # none shipped
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from pydantic import BaseModel, ConfigDict

from edgekd.errors import ModelError
from edgekd.runtimes.onnx_values import require_tensors
from edgekd.runtimes.operator_tables import operator_table
from edgekd.runtimes.rule import Finding
from edgekd.runtimes.rules import findings
from edgekd.target import Target


class Check(BaseModel):
    """What a device does not hold of a file, or not as it is meant.

    Attributes:
        opset: of ONNX's own operators; None if the file has none.
        operators: how many there are of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    target: str
    path: Path
    opset: int | None
    operators: dict[str, int]
    findings: tuple[Finding, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What makes the device refuse the file, or compute something else."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def passed(self) -> bool:
        """Whether there are no errors; there may be warnings."""
        return not self.errors


def check(path: str | Path, *, target: str | Target) -> Check:
    """Say, node by node, what `target` cannot hold of the ONNX file `path`.

    The file is read, not run: of its weights only those are looked at that quantizers concern.

    Raises:
        ModelError: `path` is no ONNX file at all, or has strings or sequences, and no operator
            for which the device refuses it anyway.
        TargetError: there is no such target, or it does not read ONNX.
        OSError: `path` cannot be read.
    """
    path, target = Path(path), Target.load(target)
    operator_table(target)  # a target that reads no ONNX is refused, whatever the file holds
    proto = _read(path)
    facts: dict[str, Any] = {
        "target": target.name,
        "path": path,
        "opset": next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None),
        "operators": dict(sorted(Counter(node.op_type for node in _nodes(proto.graph)).items())),
    }
    if broken := tuple(_missing_data(proto, path.parent)) or tuple(_invalid(proto)):
        return Check(**facts, findings=broken)
    model = _graph(proto, path.parent)
    found = Check(**facts, findings=tuple(findings(model, target)))
    if found.passed:
        require_tensors(model)
    return found


def _read(path: Path) -> onnx.ModelProto:
    """Without the weights that lie beside it."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{path} is no ONNX file: {error}; give a .onnx") from None
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path} is no ONNX file, or an empty one; give a .onnx with a graph")
    return onnx.inliner.inline_local_functions(proto) if proto.functions else proto


def _graph(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    """With the shapes and types that follow from the inputs'."""
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    # old files list their weights among the inputs as well
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, folder)
    return model


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _missing_data(proto: onnx.ModelProto, folder: Path) -> Iterator[Finding]:
    """Weights that the file only points to, where there is nothing, or less than they need."""
    for tensor in filter(uses_external_data, proto.graph.initializer):
        info = ExternalDataInfo(tensor)
        file = folder / info.location
        size = file.stat().st_size if file.is_file() else 0
        needed = (info.offset or 0) + (info.length or 1)
        if size < needed:
            yield Finding(
                rule="external-data", severity="error", node="", operator="",
                found=f"{tensor.name}: {file} " + (f"has {size} bytes" if size else "is missing"),
                limit=f"the tensor lies in its first {needed} bytes",
                remedy="copy the file beside the .onnx, or save the model in one file",
            )  # fmt: skip


def _invalid(proto: onnx.ModelProto) -> Iterator[Finding]:
    """What ONNX's own checker says, if it knows the opset."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for entry in copy.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > onnx.defs.onnx_opset_version():
            return  # newer than this onnx; the rule about opsets says so
    copy.ir_version = min(copy.ir_version, onnx.IR_VERSION)  # likewise
    # it looks for weights in the current folder: `_missing_data` has looked in the right one
    outside = [tensor for tensor in copy.graph.initializer if uses_external_data(tensor)]
    inputs = {value.name for value in copy.graph.input}
    for tensor in outside:
        copy.graph.initializer.remove(tensor)
        if tensor.name not in inputs:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            copy.graph.input.append(value)
    # it stops at operators that are not ONNX's; a plugin may have them
    for node in _nodes(copy.graph):
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            node.domain = "edgekd.unknown"
    copy.opset_import.append(onnx.helper.make_opsetid("edgekd.unknown", 1))
    try:
        onnx.checker.check_model(copy, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        said = " ".join(str(error).split())
        yield Finding(
            rule="invalid-onnx", severity="error", node="", operator="", found=said,
            limit="a file that onnx.checker takes",
            remedy="export it again; onnx.checker.check_model says the same",
        )  # fmt: skip
