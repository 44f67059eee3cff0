"""From an eager module to the graph that is quantized, trained and exported.

The graph keeps the module's parameter names. It is captured in eval mode, so dropout and
stochastic depth are absent from it, and every BatchNorm that follows a convolution or a linear
layer is folded into that layer's weight and bias.
"""

from __future__ import annotations

import copy
import logging
import operator
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

from edgekd.errors import ModelError
from edgekd.quantization.canonical import canonicalize

aten = torch.ops.aten

FUNCTIONAL = {
    aten.relu_.default: aten.relu.default,
    aten.relu6_.default: aten.relu6.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.clamp_.default: aten.clamp.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.silu_.default: aten.silu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.gelu_.default: aten.gelu.default,
    aten.mish_.default: aten.mish.default,
}
IDENTITY = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.contiguous.default,
    aten.alias.default,
}
# operator -> axis of the weight that counts output channels (of each group, if transposed)
WEIGHTED = {
    aten.conv1d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.default: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.default: 0,
    aten.conv3d.padding: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.conv_transpose3d.input: 1,
    aten.linear.default: 0,
}


def arguments(node: Node) -> tuple[Any, ...]:
    """`node.args`, without the union of types that makes them unusable to a type checker."""
    return tuple(node.args)


def groups_of(node: Node) -> int:
    """Of a convolution, whose seventh argument it is; 1 of a linear layer."""
    return int(arguments(node)[6]) if len(node.args) > 6 else 1


def tensor_of(graph_module: GraphModule, node: Node | None) -> Tensor | None:
    """The parameter or buffer that a get_attr node reads; None if it is a graph of its own.

    Such a graph is what a network computes under `torch.autocast`; it stays in float.
    """
    if node is None:
        return None
    tensor = operator.attrgetter(str(node.target))(graph_module)
    return tensor if isinstance(tensor, Tensor) else None


def capture(module: nn.Module, example_inputs: Sequence[Tensor]) -> GraphModule:
    """Capture `module` with a dynamic batch and fold its BatchNorms.

    Args:
        module: any `nn.Module`; it is not changed.
        example_inputs: tensors of (N, ...) with N >= 2. A batch of 1 would make the captured
            graph work for 1 only.

    Raises:
        ModelError: `torch.export` cannot capture it; the message carries the line it names.
    """
    if any(x.shape[0] < 2 for x in example_inputs):
        raise ModelError(
            "capture needs an example batch of at least 2 (1 fixes the batch size); "
            f"got {[tuple(x.shape) for x in example_inputs]}"
        )
    # a copy: the captured graph shares its tensors with the module it came from
    program = _export(copy.deepcopy(module).cpu().eval(), tuple(example_inputs))
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, GraphModule)
    _simplify(graph_module)
    canonicalize(graph_module.graph)
    fold_batchnorm(graph_module)
    graph_module.recompile()
    return graph_module


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """`torch.export` with a dynamic first dimension."""
    dynamic = tuple({0: Dim.AUTO} for _ in inputs)
    quiet = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises a dozen unrelated types
        raise ModelError(
            f"{type(module).__name__} cannot be captured by torch.export{_line_of(error)}: "
            f"{str(error).strip() or type(error).__name__}\n"
            "Give edgekd the tensor-in/tensors-out core of the model, without branches on the "
            "values of tensors."
        ) from error
    finally:
        quiet.setLevel(level)


def _line_of(error: Exception) -> str:
    """` at file:line, in function: the code`, of the last line that is not torch's or ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(ours) and Path(f.filename).is_file()]
    if not theirs:
        return ""
    last = theirs[-1]
    return f" at {last.filename}:{last.lineno}, in {last.name}: `{last.line}`"


def export_graph(graph_module: GraphModule, inputs: Sequence[Tensor]) -> Any:
    """The ExportedProgram of a captured graph, dynamic batch included."""
    return _export(graph_module, tuple(inputs))


def _simplify(graph_module: GraphModule) -> None:
    """In-place operators become functional; operators that do nothing in eval mode go.

    Raises:
        ModelError: an in-place operator on part of a tensor, which has no functional form here.
    """
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in FUNCTIONAL:
            source = arguments(node)[0]
            for user in list(source.users):  # what reads the tensor later reads the new value
                if order[user] > order[node]:
                    user.replace_input_with(source, node)
            if not node.users:
                raise ModelError(
                    f"{node.name} ({node.target}) changes part of a tensor in place; write it "
                    "without the trailing underscore, with torch.cat or torch.where"
                )
            node.target = FUNCTIONAL[node.target]
        if node.target in IDENTITY:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()


def fold_batchnorm(graph_module: GraphModule) -> int:
    """Fold each BatchNorm into the convolution or linear layer before it; return how many.

    A layer whose output or whose weight is used elsewhere too is left alone.
    """
    folded = 0
    for bn in list(graph_module.graph.nodes):
        if bn.target is not aten.batch_norm.default:
            continue
        layer = bn.args[0]
        if layer.target not in WEIGHTED or len(layer.users) > 1 or len(layer.args[1].users) > 1:
            continue
        if any(n is not None and n.op != "get_attr" for n in layer.args[1:3]):
            continue  # computed, as by weight_norm
        gamma, beta, mean, var = (tensor_of(graph_module, n) for n in bn.args[1:5])
        weight = tensor_of(graph_module, layer.args[1])
        bias = tensor_of(graph_module, layer.args[2]) if len(layer.args) > 2 else None
        assert weight is not None and mean is not None and var is not None
        # float64: rounding twice in float32 would show up as a step of the integers later
        factor = (var.double() + bn.args[7]).rsqrt()
        if gamma is not None:
            factor = factor * gamma.double()
        shift = (bias.double() if bias is not None else 0.0) - mean.double()
        new_bias = shift * factor + (beta.double() if beta is not None else 0.0)
        with torch.no_grad():
            weight.copy_(_scaled(weight, factor, WEIGHTED[layer.target], groups_of(layer)))
        if bias is not None:
            with torch.no_grad():
                bias.copy_(new_bias)
        else:
            owner = layer.args[1].target.rpartition(".")[0]
            parameter = nn.Parameter(new_bias.to(weight.dtype))
            graph_module.get_submodule(owner).register_parameter("bias", parameter)
            with graph_module.graph.inserting_after(layer.args[1]):
                bias_node = graph_module.graph.get_attr(f"{owner}.bias".lstrip("."))
            layer.args = (*layer.args[:2], bias_node, *layer.args[3:])
        # the output is BatchNorm's now, for whoever looks for it by its module path
        layer.meta["nn_module_stack"] = bn.meta.get("nn_module_stack")
        bn.replace_all_uses_with(layer)
        graph_module.graph.erase_node(bn)
        folded += 1
    graph_module.graph.eliminate_dead_code()
    _drop_unused_tensors(graph_module)
    return folded


def _scaled(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """`weight` in float64 with output channel c times `factor[c]`, factor of (C,).

    The weight of a transposed convolution is (C_in, C_out / groups, ...): each group of input
    channels has output channels of its own.
    """
    ones = (1,) * (weight.dim() - 1 - axis)
    if not axis:
        return weight.double() * factor.view(-1, *ones)
    by_group = weight.double().reshape(groups, -1, *weight.shape[1:])
    return (by_group * factor.view(groups, 1, -1, *ones)).reshape(weight.shape)


def _drop_unused_tensors(graph_module: GraphModule) -> None:
    used = {n.target for n in graph_module.graph.nodes if n.op == "get_attr"}
    tensors = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    for name, _ in tensors:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(graph_module.get_submodule(owner), leaf)
