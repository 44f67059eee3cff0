"""The table of rules, and what they find in a graph."""

from __future__ import annotations

import onnx_ir as ir

from edgekd.errors import TargetError
from edgekd.runtimes.operator_rules import OPERATOR_RULES
from edgekd.runtimes.operator_tables import operator_table
from edgekd.runtimes.quantization_rules import QUANTIZATION_RULES
from edgekd.runtimes.rule import Device, Finding, Graph, Rule, node_name, operator_name
from edgekd.target import Target

RULES: tuple[Rule, ...] = (*OPERATOR_RULES, *QUANTIZATION_RULES)


def findings(model: ir.Model, target: Target) -> list[Finding]:
    """All that `target` does not hold of `model`, whose shapes and types are inferred.

    Raises:
        TargetError: the target's runtime does not read ONNX.
    """
    graph, device = Graph.of(model), Device(target, operator_table(target))
    return [
        Finding(
            rule=rule.name, severity=found.severity,
            node="" if found.node is None else node_name(found.node),
            operator="" if found.node is None else operator_name(found.node),
            found=found.found, limit=found.limit, remedy=found.remedy or rule.remedy,
            source=_source(rule, device),
        )
        for rule in RULES
        if rule.applies(device)
        for found in rule.find(graph, device)
    ]  # fmt: skip


def check_operators(model: ir.Model, target: Target) -> None:
    """What `edgekd check` calls an error is not written either.

    Raises:
        TargetError: what the device does not hold, with its nodes.
    """
    refused: dict[str, list[str]] = {}
    for finding in findings(model, target):
        if finding.severity == "error":
            refused.setdefault(f"{finding.found}: {finding.limit}", []).append(finding.node)
    if refused:
        found = "; ".join(f"{what} ({', '.join(names[:3])})" for what, names in refused.items())
        raise TargetError(
            f"{target.name}: {found}: use other layers, or a target with a newer runtime"
        )


def _source(rule: Rule, device: Device) -> str | None:
    url = rule.sources.get(device.table.name, rule.sources.get("", None))
    return device.table.url if url == "table" else url
