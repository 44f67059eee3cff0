"""Local parity: each quantized operator by itself, beside the runtime.

End to end, one value that rounds to the other side moves everything behind it. Here the trained
graph is computed tensor by tensor in float64, and each operator reads the integers that the runtime
computed, not our own: what differs is that operator's doing. Sums of products of two 8-bit integers
are exact in float64, and biases are whole steps of the products where the device holds them in
int32 (`round_biases`), so the reference is the integer arithmetic itself. Where it is known how
the runtime's kernels round (`arithmetic.py`), the network is compared as a whole, too.

The runtime's integers are read behind their dequantizers: the zero points of signed and unsigned
files are gone there, and a wrong scale shows. To show them leaves the fused kernels as they are:
the outputs are the same bits, and if not, the pass says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgekd.network import Network
from edgekd.quantization.capture import arguments
from edgekd.quantization.placement import operator_name, quantized_activations
from edgekd.runtimes.arithmetic import IntegerGraph, Rounding
from edgekd.runtimes.base import Arrays, Session, TensorDifference
from edgekd.runtimes.onnx_graph import quantized_name
from edgekd.target import QuantScheme, host_instruction_set

SATURATING = ("avx2", "avx512f")  # they multiply u8 · i8 by vpmaddubsw, pairs summed in int16
WORST = 10  # tensors that a pass names


class LocalPass(BaseModel):
    """One way to run the artifact, operator by operator.

    Attributes:
        tensors, of: quantized activations and float outputs compared, and all that there are; a
            Pad that moved into its convolution leaves none to compare, nor does a quantizer that
            moved behind permutations: there it is compared.
        elements: in those tensors.
        exact: share of elements that are equal; of a float output, within half a step.
        max_steps: the largest difference.
        first: the first operator in the order of the graph that is off by more than 1 step, with
            what it reads; None if there is none.
        worst: tensors that differ at all, the largest difference first.
        causes: known causes that fit what differs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    tensors: int
    of: int
    elements: int
    exact: float
    max_steps: float
    first: str | None
    worst: tuple[TensorDifference, ...]
    causes: tuple[str, ...]

    @property
    def summary(self) -> str:
        """In one sentence."""
        return (
            f"{self.exact:.5%} of {self.elements:,} elements exact, "
            f"largest difference {self.max_steps:.3g} steps, {self.tensors} of {self.of} tensors"
        )


class WholePass(BaseModel):
    """The artifact in integer kernels beside the trained graph in their own arithmetic.

    Attributes:
        elements: of all outputs.
        exact: share of them that are equal; of a float output, within half a step.
        within_one_step: share of them that are off by a step at most.
        mean_steps, max_steps: difference of the outputs.
        unknown: operators whose rounding no rule says, in order; one of their values may lie
            between two integers, and then moves all that follows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    elements: int
    exact: float
    within_one_step: float
    mean_steps: float
    max_steps: float
    unknown: tuple[str, ...]

    @property
    def summary(self) -> str:
        """In one sentence."""
        said = (
            f"{self.exact:.3%} of {self.elements:,} outputs exact, "
            f"{self.within_one_step:.3%} within one step"
        )
        if self.unknown:
            said += f"; as real numbers, rounded once: {', '.join(self.unknown)}"
        return said


class LocalParity(BaseModel):
    """Each operator of an INT8 artifact by itself, and all together, on the first `n` samples.

    Attributes:
        as_written: the file without optimizations: quantize, dequantize and float operators; None
            where the runtime always optimizes.
        as_shipped: with the fused integer kernels of this host; None where they are not the
            device's.
        as_a_whole: in this host's integer kernels, where it is known how they round.
        skipped: why it ran in no way, where the runtime shows no inner tensors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    n: int
    as_written: LocalPass | None
    as_shipped: LocalPass | None
    as_a_whole: WholePass | None = None
    skipped: str = ""

    @property
    def passes(self) -> dict[str, LocalPass]:
        """Those that ran, by what they are called."""
        named = {"as written": self.as_written, "as shipped": self.as_shipped}
        return {name: ran for name, ran in named.items() if ran is not None}

    @property
    def summaries(self) -> dict[str, str]:
        """What was found, in one sentence each."""
        said = {f"operator by operator, {how}": ran.summary for how, ran in self.passes.items()}
        if self.skipped:
            said["operator by operator"] = self.skipped
        if self.as_a_whole is not None:
            said["as a whole, in the runtime's integers"] = self.as_a_whole.summary
        return said


def local_parity(
    net: Network,
    inputs: Sequence[Tensor],
    *,
    written: Session | None,
    shipped: Session | None,
    whole: Session | None = None,
    rounding: Rounding | None = None,
) -> LocalParity:
    """Run an artifact and compare each quantized operator with the trained graph's.

    Args:
        net: the quantized Network that it was exported from.
        inputs: (N, ...) each.
        written: the artifact without optimizations, or None where the runtime has no such mode.
        shipped: as the device runs it, or None where this host has not its kernels.
        whole: in this host's integer kernels, to be compared as a whole.
        rounding: of those kernels, and of those of `shipped`, where it is known.
    """
    graph, scheme = net.module, net.scheme
    assert isinstance(graph, GraphModule) and scheme is not None
    outputs = list(net.io.outputs)
    arrays = [x.numpy() for x in inputs]
    names = {a: quantized_name(a) for a in quantized_activations(graph)}
    names |= _quantized_outputs(net)

    def run(session: Session | None, *, fused: bool) -> LocalPass | None:
        if session is None:
            return None
        shown = session.tensors(arrays, [*names.values(), *outputs])
        if not shown:
            return None
        theirs = {tensor: shown[name] for tensor, name in names.items() if name in shown}
        rounds = rounding if fused else None
        reference = _Reference(graph, theirs, rounds)
        ran = _compare(reference, inputs, [shown[name] for name in outputs])
        causes = tuple(_causes(ran.max_steps, scheme, rounds)) if fused else ()
        ran = ran.model_copy(update={"causes": causes})
        plain = session(arrays)
        if all(np.array_equal(a, shown[b]) for a, b in zip(plain, outputs, strict=True)):
            return ran
        cause = "with its tensors shown the artifact's outputs are others: kernels ran unfused"
        return ran.model_copy(update={"causes": (*ran.causes, cause)})

    as_written, as_shipped = run(written, fused=False), run(shipped, fused=True)
    none = as_written is None and as_shipped is None
    skipped = "the runtime shows no inner tensors; outputs alone are compared" if none else ""
    as_a_whole = None
    if whole is not None and rounding is not None:
        as_a_whole = _as_a_whole(IntegerGraph(graph, rounding), inputs, whole(arrays))
    return LocalParity(
        n=len(inputs[0]), as_written=as_written, as_shipped=as_shipped, as_a_whole=as_a_whole,
        skipped=skipped,
    )  # fmt: skip


def _quantized_outputs(net: Network) -> dict[str, str]:
    """Activations that are dequantized as outputs of the network -> the outputs' names."""
    assert isinstance(net.module, GraphModule)
    ends: list[Node] = []
    map_arg(net.module.graph.output_node().args, ends.append)
    return {
        arguments(end)[0].name: name
        for end, name in zip(ends, net.io.outputs, strict=True)
        if end.op == "call_module"
    }


def _causes(max_steps: float, scheme: QuantScheme, rounding: Rounding | None) -> Iterator[str]:
    """What is known to make fused kernels of a sound artifact differ."""
    if max_steps == 1 and rounding is None:
        yield (
            "differences of 1 step: fused kernels scale the integer sum by one float32 factor, "
            "and what lies between two integers may round to either"
        )
    if max_steps > 1 and saturating(scheme):
        yield (
            f"8-bit weights saturate in vpmaddubsw, which this CPU ({host_instruction_set()}, "
            "no VNNI) multiplies by: quantize with weight_bits = 7"
        )


def saturating(scheme: QuantScheme | None) -> bool:
    """Whether kernels of x86 for the scheme's weights saturate on this host."""
    return scheme is not None and scheme.weight_bits == 8 and host_instruction_set() in SATURATING


def _run(graph: IntegerGraph, inputs: Sequence[Tensor]) -> None:
    """In float64, without gradients."""
    with torch.no_grad():
        graph.run(*(x.double() if x.is_floating_point() else x for x in inputs))


def _as_a_whole(graph: IntegerGraph, inputs: Sequence[Tensor], outputs: Arrays) -> WholePass:
    """The outputs of `graph` beside the runtime's."""
    _run(graph, inputs)
    steps = np.concatenate([
        _steps_off(graph, node, own, theirs).ravel()
        for (node, own), theirs in zip(graph.ends, outputs, strict=True)
    ])  # fmt: skip
    return WholePass(
        elements=steps.size, exact=float((steps < 0.5).mean()),
        within_one_step=float((steps < 1.5).mean()), mean_steps=float(steps.mean()),
        max_steps=float(steps.max()), unknown=tuple(sorted(graph.unknown)),
    )  # fmt: skip


def _steps_off(
    graph: IntegerGraph, node: Node, own: Tensor, theirs: NDArray[np.float32]
) -> NDArray[Any]:
    """How far an output is, in whole steps of its quantizer; of a float one, of amax / 127."""
    if node.op == "call_module":
        step = graph.quantizer(node).scale.detach().double()
    else:
        step = own.abs().max().clamp(min=1e-30) / 127
    steps = ((own - torch.from_numpy(theirs).double()).abs() / step).round()
    return steps.nan_to_num(nan=255.0, posinf=255.0).numpy()  # as in TensorDifference


def _compare(
    reference: _Reference, inputs: Sequence[Tensor], outputs: Sequence[NDArray[np.float32]]
) -> LocalPass:
    """The reference on `inputs` beside the runtime's activations and its outputs."""
    _run(reference, inputs)
    for (node, own), theirs in zip(reference.ends, outputs, strict=True):
        if node.op != "call_module":  # a quantized one was compared as activation
            steps = _steps_off(reference, node, own, theirs)
            reference.found.append((node, TensorDifference.of(node.name, steps)))
    found = [difference for _, difference in reference.found]
    elements, max_steps = sum(d.elements for d in found), max(d.max_steps for d in found)
    first = next((pair for pair in reference.found if pair[1].max_steps > 1), None)
    worst = sorted((d for d in found if d.unequal), key=lambda d: -d.max_steps)
    return LocalPass(
        tensors=len(found),
        of=len(found) + reference.absent,
        elements=elements,
        exact=1 - sum(d.unequal for d in found) / elements,
        max_steps=max_steps,
        first=None if first is None else reference.describe(*first),
        worst=tuple(worst[:WORST]),
        causes=(),
    )


class _Reference(IntegerGraph):
    """The trained graph in integers; what a quantizer gives on is the runtime's value.

    Attributes:
        found: (node whose output is compared, how far the runtime's is from ours), in order.
        absent: how many quantized activations the runtime's graph has not.
    """

    def __init__(
        self, graph: GraphModule, theirs: Mapping[str, NDArray[np.float32]],
        rounding: Rounding | None,
    ) -> None:  # fmt: skip
        super().__init__(graph, rounding)
        self.theirs = theirs
        self.found: list[tuple[Node, TensorDifference]] = []
        self.absent = 0

    def given(self, source: Node, own: Tensor, scale: Tensor) -> Tensor:
        """The runtime's integers; ours where it does not show them."""
        theirs = self.theirs.get(source.name)
        if theirs is None:
            self.absent += 1
            return own
        # rows of several samples may be in one axis here and in two there
        integers = (torch.from_numpy(theirs).double().reshape(own.shape) / scale).round()
        difference = TensorDifference.of(source.name, (own - integers).abs().numpy())
        self.found.append((source, difference))
        return integers.nan_to_num()

    def describe(self, last: Node, difference: TensorDifference) -> str:
        """The operators that computed `last` from quantized tensors, and what they read."""
        operators: list[Node] = []
        read: list[Node] = []
        ahead = [last]
        while ahead:
            node = ahead.pop(0)
            if node.op == "call_function":
                operators += [node]
                ahead += [n for n in node.all_input_nodes if n not in operators + ahead]
            else:
                read += [node] if node not in read else []
        kinds = [operator_name(n) for n in reversed(operators)]
        inputs = [f"{_tensor_name(n)} {self.shapes[n]}" for n in read if n in self.shapes]
        return (
            f"{last.name} ({', '.join(kinds) or last.op}) is off by "
            f"{difference.max_steps:.3g} steps; it reads {', '.join(inputs) or 'the input'}"
        )


def _tensor_name(node: Node) -> str:
    """Of a parameter its path, else the name of what is quantized."""
    if node.op == "call_module":
        return _tensor_name(arguments(node)[0])
    return str(node.target) if node.op == "get_attr" else node.name
