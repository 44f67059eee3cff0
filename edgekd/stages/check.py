"""check: what of anybody's ONNX file a device cannot hold."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from edgekd.errors import ModelError
from edgekd.runtimes.operators import operators
from edgekd.runtimes.rules import RULES, Severity, limit_of, remedy_of
from edgekd.target import Target


class Finding(BaseModel):
    """One thing that breaks a rule.

    Attributes:
        rule: key of `RULES`.
        node, operator: where; empty for the file as a whole.
        found, limit, remedy: what is there, what the device holds, what to do.
        source: where the fact comes from; empty where it is the target's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: str
    severity: Severity
    node: str
    operator: str
    found: str
    limit: str
    remedy: str
    source: str


class Check(BaseModel):
    """What the device makes of a file, as far as the file shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Path
    target: str
    opset: int
    nodes: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings for which the device refuses the file, or silently runs it otherwise."""
        return tuple(f for f in self.findings if f.severity == "error")


def check(path: str | Path, *, target: str | Target) -> Check:
    """Hold an ONNX file against everything that is known of `target`; nothing is run.

    Raises:
        ModelError: the file is no valid ONNX, or the target takes another format.
    """
    target, path = Target.load(target), Path(path)
    if target.runtime in ("litert", "executorch"):
        raise ModelError(
            f"{target.name} takes no ONNX; edgekd export writes its format from a network, and "
            "verify checks it"
        )
    model = read_onnx(path)
    findings = [
        Finding(
            rule=name,
            severity=rule.severity,
            node="" if node is None else str(node.name or node.outputs[0].name),
            operator="" if node is None else node.op_type,
            found=found,
            limit=limit_of(rule, target),
            remedy=remedy_of(rule, target),
            source=rule.source,
        )
        for name, rule in RULES.items()
        if rule.holds(target)
        for node, found in rule.find(model, target)
    ]
    if operators(target)[1] is None:
        findings += _converted(path, target)
    return Check(
        path=path, target=target.name, opset=model.opset_imports.get("", 0),
        nodes=len(model.graph), findings=tuple(findings),
    )  # fmt: skip


def read_onnx(path: Path) -> ir.Model:
    """The file with the shapes and types of all its tensors."""
    if not path.is_file():
        raise ModelError(f"{path} does not exist")
    try:
        onnx.checker.check_model(str(path))  # by its path: weights in files of their own too
        proto = onnx.load(path)
    except Exception as error:  # protobuf's and onnx' own types share no base but this
        said = str(error).strip().splitlines()
        raise ModelError(f"{path} is no valid ONNX: {said[0] if said else error!r}") from None
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def _converted(path: Path, target: Target) -> list[Finding]:
    """What OpenVINO's own converter says, where it is the only table."""
    from edgekd.runtimes.openvino import conversion_error

    said = conversion_error(path)
    if said is None:
        return []
    return [
        Finding(
            rule="operator", severity="error", node="", operator="", found=said,
            limit="what OpenVINO's converter takes", remedy="use other layers", source="",
        )
    ]  # fmt: skip
