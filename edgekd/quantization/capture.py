"""From an eager module to the graph that is quantized, trained and exported.

The graph keeps the module's parameter names. It is captured in eval mode, so dropout and
stochastic depth are absent from it, and every BatchNorm that follows a convolution or a linear
layer is folded into that layer's weight and bias, as is every factor for each of its channels
(ConvNeXt's and CaiT's layer scale): what is folded has no parameter of its own any more.
"""

from __future__ import annotations

import copy
import logging
import math
import operator
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.node import map_aggregate

from edgekd.errors import ModelError
from edgekd.quantization.canonical import canonicalize

aten = torch.ops.aten
M = TypeVar("M", bound=nn.Module)

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
    """Capture `module` with a dynamic batch; fold its BatchNorms and layer scales.

    Args:
        module: any `nn.Module`; it is not changed.
        example_inputs: tensors of (N, ...) with N >= 2. A batch of 1 would make the captured
            graph work for 1 only.

    Raises:
        ModelError: `torch.export` cannot capture it; the message carries the line it names. Or
            it computes with the example's batch as a number, and would run with no other.
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
    fold_scales(graph_module)
    graph_module.recompile()
    return graph_module


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """`torch.export` with a dynamic first dimension.

    Raises:
        ModelError: it fails, or the module fixes that dimension.
    """
    dynamic = tuple({0: Dim.AUTO} for _ in inputs)
    quiet = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises a dozen unrelated types
        raise ModelError(
            f"{type(module).__name__} cannot be captured by torch.export{_line_of(error)}: "
            f"{str(error).strip() or type(error).__name__}\n"
            "Give edgekd the tensor-in/tensors-out core of the model, without branches on the "
            "values of tensors."
        ) from error
    finally:
        quiet.setLevel(level)
    given = program.graph_signature.user_inputs
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in given and is_concrete_int(batch := node.meta["val"].shape[0]):
            raise ModelError(
                f"{type(module).__name__} fixes the batch at {batch} (by int(x.shape[0]), len(x), "
                "or a view with a number): use x.size(0) or flatten(1)"
            )
    return program


def _line_of(error: Exception) -> str:
    """` at file:line, in function: the code`, of the last line that is not torch's or ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(ours) and Path(f.filename).is_file()]
    if not theirs:
        return ""
    last = theirs[-1]
    return f" at {last.filename}:{last.lineno}, in {last.name}: `{last.line}`"


def move(module: M, device: torch.device | str) -> M:
    """`module.to(device)`; of a captured graph, what it makes itself (`arange`, `zeros`) too."""
    module.to(device)
    if not isinstance(module, GraphModule):
        return module
    moved = False

    def there(value: Any) -> Any:
        nonlocal moved
        if not isinstance(value, torch.device):
            return value
        moved = True
        return torch.device(device)

    for node in module.graph.nodes:
        node.args = map_aggregate(node.args, there)
        node.kwargs = map_aggregate(node.kwargs, there)
    if moved:
        module.recompile()
    return module


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
        if bn.target is not aten.batch_norm.default or not _foldable(layer := bn.args[0]):
            continue
        gamma, beta, mean, var = (tensor_of(graph_module, n) for n in bn.args[1:5])
        assert mean is not None and var is not None
        # float64: rounding twice in float32 would show up as a step of the integers later
        factor = (var.double() + bn.args[7]).rsqrt()
        if gamma is not None:
            factor = factor * gamma.double()
        shift = -mean.double() * factor + (beta.double() if beta is not None else 0.0)
        _fold(graph_module, layer, factor, shift)
        # the output is BatchNorm's now, for whoever looks for it by its module path
        layer.meta["nn_module_stack"] = bn.meta.get("nn_module_stack")
        layer.meta["had_batchnorm"] = True
        bn.replace_all_uses_with(layer)
        graph_module.graph.erase_node(bn)
        folded += 1
    graph_module.graph.eliminate_dead_code()
    _drop_unused_tensors(graph_module)
    return folded


def fold_scales(graph_module: GraphModule) -> int:
    """Fold each stored factor for every channel into the layer before it; return how many.

    Between the two there may be what moves whole channels; a tap there sees them scaled. Left
    alone is what is read elsewhere too.
    """
    folded = 0
    for mul in graph_module.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        for scale, x in (arguments(mul), arguments(mul)[::-1]):
            factor = _stored(graph_module, scale)
            if factor is None or (layer := _scaled_layer(mul, x, factor)) is None:
                continue
            _fold(graph_module, layer, factor.double().flatten(), None)
            mul.replace_all_uses_with(x)
            graph_module.graph.erase_node(mul)
            folded += 1
            break
    graph_module.graph.eliminate_dead_code()
    _drop_unused_tensors(graph_module)
    return folded


def _stored(graph_module: GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that `node` reads or reshapes, in its shape; None if it does not."""
    root = node
    while isinstance(root, Node) and len(root.users) == 1 and root.target in RESHAPING:
        root = arguments(root)[0]
    if not isinstance(root, Node) or root.op != "get_attr" or len(root.users) > 1:
        return None
    tensor = tensor_of(graph_module, root)
    return None if tensor is None else tensor.reshape(node.meta["val"].shape)


def _scaled_layer(mul: Node, x: Any, factor: Tensor) -> Node | None:
    """The layer whose output channels, on their way through `x`, `factor` multiplies."""
    wide = [axis - factor.dim() for axis, size in enumerate(factor.shape) if size > 1]
    if len(wide) != 1 or not isinstance(x, Node) or "val" not in x.meta:
        return None
    rank = len(mul.meta["val"].shape)
    axis = rank + wide[0]
    if len(x.meta["val"].shape) != rank or x.meta["val"].shape[axis] != factor.numel():
        return None
    while len(x.users) == 1:
        if _foldable(x):
            at = rank - 1 if x.target is aten.linear.default else 1
            return x if axis == at else None
        if x.target not in CHANNELS_BEFORE or "val" not in arguments(x)[0].meta:
            return None
        found = CHANNELS_BEFORE[x.target](x, axis)
        if found is None:
            return None
        axis, x = found, arguments(x)[0]
        rank = len(x.meta["val"].shape)
    return None


def _permuted(node: Node, axis: int) -> int:
    return int(arguments(node)[1][axis]) % len(node.meta["val"].shape)


def _transposed(node: Node, axis: int) -> int:
    rank = len(node.meta["val"].shape)
    a, b = (int(i) % rank for i in arguments(node)[1:3])
    return {a: b, b: a}.get(axis, axis)


def _reshaped(node: Node, axis: int) -> int | None:
    """The axis of the same size before which as many numbers stand behind."""
    after, before = node.meta["val"].shape, arguments(node)[0].meta["val"].shape
    behind = math.prod(after[axis + 1 :])
    for index in reversed(range(len(before))):
        size = before[index]
        if not isinstance(size, int):  # it depends on the batch
            return None
        if size == after[axis] and math.prod(before[index + 1 :]) == behind:
            return index
    return None


RESHAPING = {aten.reshape.default, aten.unsqueeze.default}
# operators that leave channels whole -> the axis of the input that an axis of the output was
CHANNELS_BEFORE = {
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
    **dict.fromkeys((aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int), _reshaped),
}


def _foldable(layer: Node) -> bool:
    """Whether this is a layer whose stored weight and bias, and output, nothing else reads."""
    if layer.target not in WEIGHTED or len(layer.users) > 1:
        return False
    # computed, as by weight_norm: not stored
    stored = [n for n in arguments(layer)[1:3] if n is not None]
    return all(n.op == "get_attr" and len(n.users) == 1 for n in stored)


def _fold(graph_module: GraphModule, layer: Node, factor: Tensor, shift: Tensor | None) -> None:
    """Let `layer` give its output channels times `factor` plus `shift`, (C,) in float64 each."""
    weight_node, bias_node = (*arguments(layer)[1:3], None)[:2]
    weight, bias = tensor_of(graph_module, weight_node), tensor_of(graph_module, bias_node)
    assert weight is not None
    with torch.no_grad():
        weight.copy_(_scaled(weight, factor, WEIGHTED[layer.target], groups_of(layer)))  # type: ignore[index]  # operators are its keys
        if bias is not None:
            bias.copy_(bias.double() * factor + (0.0 if shift is None else shift))
    if bias is None and shift is not None:
        owner = weight_node.target.rpartition(".")[0]
        parameter = nn.Parameter(shift.to(weight.dtype))
        graph_module.get_submodule(owner).register_parameter("bias", parameter)
        with graph_module.graph.inserting_after(weight_node):
            bias_node = graph_module.graph.get_attr(f"{owner}.bias".lstrip("."))
        layer.args = (*layer.args[:2], bias_node, *layer.args[3:])


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
