"""Local parity: each quantized operator by itself, beside the runtime.

End to end, one value that rounds to the other side moves everything behind it. Here the trained
graph is computed tensor by tensor in float64, and each operator reads the integers that the runtime
computed, not our own: what differs is that operator's doing. Sums of products of two 8-bit integers
are exact in float64, and biases are whole steps of the products where the device holds them in
int32 (`round_biases`), so the reference is the integer arithmetic itself.

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
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate, map_arg

from edgekd.network import Network
from edgekd.quantization.capture import arguments
from edgekd.quantization.fake_quant import FakeQuant, along
from edgekd.quantization.placement import quantized_activations
from edgekd.runtimes.base import Session, TensorDifference
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


class LocalParity(BaseModel):
    """Each operator of an INT8 artifact by itself, on the first `n` samples.

    Attributes:
        as_written: the file without optimizations: quantize, dequantize and float operators; None
            where the runtime always optimizes.
        as_shipped: with the fused integer kernels of this host; None where they are not the
            device's.
        skipped: why it ran in no way, where the runtime shows no inner tensors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    n: int
    as_written: LocalPass | None
    as_shipped: LocalPass | None
    skipped: str = ""

    @property
    def passes(self) -> dict[str, LocalPass]:
        """Those that ran, by what they are called."""
        named = {"as written": self.as_written, "as shipped": self.as_shipped}
        return {name: ran for name, ran in named.items() if ran is not None}


def local_parity(
    net: Network, inputs: Sequence[Tensor], *, written: Session | None, shipped: Session | None
) -> LocalParity:
    """Run an artifact and compare each quantized operator with the trained graph's.

    Args:
        net: the quantized Network that it was exported from.
        inputs: (N, ...) each.
        written: the artifact without optimizations, or None where the runtime has no such mode.
        shipped: as the device runs it, or None where this host has not its kernels.
    """
    assert isinstance(net.module, GraphModule) and net.scheme is not None
    outputs = list(net.io.outputs)
    arrays = [x.numpy() for x in inputs]
    names = {a: quantized_name(a) for a in quantized_activations(net.module)}
    names |= _quantized_outputs(net)

    def run(session: Session | None, *, fused: bool) -> LocalPass | None:
        if session is None:
            return None
        shown = session.tensors(arrays, [*names.values(), *outputs])
        if not shown:
            return None
        theirs = {tensor: shown[name] for tensor, name in names.items() if name in shown}
        ran = _compare(net, inputs, theirs, [shown[name] for name in outputs], fused=fused)
        plain = session(arrays)
        if all(np.array_equal(a, shown[b]) for a, b in zip(plain, outputs, strict=True)):
            return ran
        cause = "with its tensors shown the artifact's outputs are others: kernels ran unfused"
        return ran.model_copy(update={"causes": (*ran.causes, cause)})

    as_written, as_shipped = run(written, fused=False), run(shipped, fused=True)
    none = as_written is None and as_shipped is None
    skipped = "the runtime shows no inner tensors; outputs alone are compared" if none else ""
    return LocalParity(
        n=len(inputs[0]), as_written=as_written, as_shipped=as_shipped, skipped=skipped
    )


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


def _causes(max_steps: float, scheme: QuantScheme, *, fused: bool) -> Iterator[str]:
    """What is known to make a sound artifact differ."""
    if max_steps == 1 and fused:
        yield (
            "differences of 1 step: fused kernels scale the integer sum by one float32 factor, "
            "and what lies between two integers may round to either"
        )
    instructions = host_instruction_set()
    if max_steps > 1 and fused and scheme.weight_bits == 8 and instructions in SATURATING:
        yield (
            f"8-bit weights saturate in vpmaddubsw, which this CPU ({instructions}, no VNNI) "
            "multiplies by: quantize with weight_bits = 7"
        )


def _compare(
    net: Network,
    inputs: Sequence[Tensor],
    theirs: Mapping[str, NDArray[np.float32]],
    outputs: list[NDArray[np.float32]],
    *,
    fused: bool,
) -> LocalPass:
    """The reference on `inputs` beside the runtime's activations, by name, and its outputs."""
    assert isinstance(net.module, GraphModule) and net.scheme is not None
    reference = _Reference(net.module, theirs)
    with torch.no_grad():
        reference.run(*(x.double() if x.is_floating_point() else x for x in inputs))
    for end, output in zip(reference.ends, outputs, strict=True):
        reference.compare_output(end, output)
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
        causes=tuple(_causes(max_steps, net.scheme, fused=fused)),
    )


class _Reference(Interpreter):
    """The trained graph in float64; what a quantizer gives on is the runtime's value.

    Attributes:
        found: (node whose output is compared, how far the runtime's is from ours), in order.
        absent: how many quantized activations the runtime's graph has not.
        ends: node and value of each output.
    """

    def __init__(self, graph: GraphModule, theirs: Mapping[str, NDArray[np.float32]]) -> None:
        super().__init__(graph)
        self.theirs = theirs
        self.found: list[tuple[Node, TensorDifference]] = []
        self.absent = 0
        self.ends: list[tuple[Node, Tensor]] = []
        self._shapes: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        if n.op == "output":
            map_arg(n.args, lambda end: self.ends.append((end, self.env[end])))
        value: Any = self._quantized(n) if n.op == "call_module" else super().run_node(n)
        if isinstance(value, Tensor):
            self._shapes[n] = tuple(value.shape)
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Casts to float32 that were captured are to float64 here."""

        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return super().call_function(
            target, map_aggregate(args, widened), map_aggregate(kwargs, widened)
        )

    def _quantizer(self, node: Any) -> FakeQuant:
        quantizer = self.module.get_submodule(str(node.target))
        assert isinstance(quantizer, FakeQuant)
        return quantizer

    def _quantized(self, node: Node) -> Tensor:
        """The weight or activation in front of a quantizer, as the runtime has it behind."""
        quantizer, source = self._quantizer(node), arguments(node)[0]
        x: Tensor = self.env[source]
        scale: Tensor = quantizer.scale.double()
        if source.op == "get_attr":
            # in float32, as they are converted to integers
            weight: Tensor = quantizer(x.float()).double()
            scale = along(scale, weight, quantizer.ch_axis) if scale.dim() else scale
            return (weight / scale).round() * scale
        zero = int(quantizer.zero_point)
        own = (x / scale).round().clamp(quantizer.low - zero, quantizer.high - zero)
        theirs = self.theirs.get(source.name)
        if theirs is None:
            self.absent += 1
            return own * scale
        # rows of several samples may be in one axis here and in two there
        given = torch.from_numpy(theirs).double().reshape(x.shape)
        integers = (given / scale).round()  # less the zero point
        difference = TensorDifference.of(source.name, (own - integers).abs().numpy())
        self.found.append((source, difference))
        return integers.nan_to_num() * scale

    def compare_output(self, end: tuple[Node, Tensor], theirs: NDArray[np.float32]) -> None:
        """A float output, in steps of amax / 127; a quantized one was compared as activation."""
        node, own = end
        if node.op != "call_module":
            step = own.abs().max().clamp(min=1e-30) / 127
            steps = ((own - torch.from_numpy(theirs).double()).abs() / step).round()
            self.found.append((node, TensorDifference.of(node.name, steps.numpy())))

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
        kinds = [n.target.__name__.partition(".")[0] for n in reversed(operators)]  # type: ignore[union-attr]
        inputs = [f"{_tensor_name(n)} {self._shapes[n]}" for n in read if n in self._shapes]
        return (
            f"{last.name} ({', '.join(kinds) or last.op}) is off by "
            f"{difference.max_steps:.3g} steps; it reads {', '.join(inputs) or 'the input'}"
        )


def _tensor_name(node: Node) -> str:
    """Of a parameter its path, else the name of what is quantized."""
    if node.op == "call_module":
        return _tensor_name(arguments(node)[0])
    return str(node.target) if node.op == "get_attr" else node.name
