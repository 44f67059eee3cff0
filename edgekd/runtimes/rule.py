"""What a rule about ONNX files is, and what it finds.

A rule is applied where the facts of the target ask for it. An error: the device refuses the file,
or computes something else. A warning: it runs, but not as it was meant, most often in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from edgekd.runtimes.operator_tables import OperatorTable
from edgekd.target import Target

Severity = Literal["error", "warning"]
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
GRAPH = ir.AttributeType.GRAPH


class Finding(BaseModel):
    """One thing in a file that a device does not hold, or not as it is meant.

    Attributes:
        rule: its id.
        node, operator: where; empty for the file as a whole.
        found, limit, remedy: in words.
        source: of the limit, where there is one on the web.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: str
    severity: Severity
    node: str
    operator: str
    found: str
    limit: str
    remedy: str
    source: str | None = None


class Graph(NamedTuple):
    """A model, and which of its values depend on what it is given.

    Attributes:
        nodes: those inside of If and Loop as well.
    """

    model: ir.Model
    nodes: tuple[ir.Node, ...]
    varying: frozenset[ir.Value]

    @staticmethod
    def of(model: ir.Model) -> Graph:
        """From a model whose nodes are in the order of their computation."""
        nodes = tuple(ir.traversal.RecursiveGraphIterator(model.graph))
        varying = set(model.graph.inputs)
        for node in nodes:
            bodies = [a.as_graph() for a in node.attributes.values() if a.type == GRAPH]
            varying.update(value for body in bodies for value in body.inputs)
            # without an input it is a Constant, or random numbers
            drawn = not node.inputs and node.op_type != "Constant"
            if bodies or drawn or any(value in varying for value in node.inputs):
                varying.update(node.outputs)
        return Graph(model, nodes, frozenset(varying))

    @property
    def opset(self) -> int | None:
        """Of ONNX's own operators."""
        imports = self.model.opset_imports
        return imports.get("", imports.get("ai.onnx"))


class Device(NamedTuple):
    """A target with the operators of its runtime."""

    target: Target
    table: OperatorTable

    @property
    def lenient(self) -> Severity:
        """How bad an operator is that it does not have: another may compute it."""
        return "error" if self.table.falls_back_to is None else "warning"


class Found(NamedTuple):
    """What a rule says of one node, or of the file."""

    node: ir.Node | None
    found: str
    limit: str
    severity: Severity
    remedy: str = ""  # where it is not the rule's


class Rule(NamedTuple):
    """One rule.

    Attributes:
        applies: whether the facts of a device ask for it.
        sources: of its limit, by the name of the operators' table; "table": that of the table.
    """

    name: str
    find: Callable[[Graph, Device], Iterator[Found]]
    remedy: str
    applies: Callable[[Device], bool] = lambda _: True
    sources: Mapping[str, str] = {}


def node_name(node: ir.Node) -> str:
    """Its name, or that of its first output: files of others leave names out."""
    return node.name or (str(node.outputs[0].name) if node.outputs else "")


def operator_name(node: ir.Node) -> str:
    """As tables have it: with the domain, unless it is ONNX's."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"
