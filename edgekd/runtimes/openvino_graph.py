"""Changes to a model that OpenVINO has converted, for its CPU plugin's compiler."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from edgekd.errors import MissingPackageError

CLIP = ".clip"
TURNED = ".channels_first"  # behind the name of a tensor that `turn_maps` left in another order
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
MOVES = {
    "Gather", "Reshape", "Slice", "Split", "Squeeze", "StridedSlice", "Transpose", "Unsqueeze",
    "VariadicSplit",
}  # fmt: skip
DEQUANTIZING = {"Convert", "Multiply", "Reshape", "Subtract"}
UNARY = {"Clamp", "Gelu", "HSigmoid", "HSwish", "Relu", "Sigmoid", "Swish", "Tanh"}
BINARY = {"Add", "Divide", "Multiply", "Subtract"}


def import_openvino() -> Any:
    """The package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise MissingPackageError("openvino", "openvino") from None
    return openvino


def of_one_sample(model: Any) -> None:
    """Fix an open batch to 1.

    With it open, the compiler runs a pass of its own for each operator between the layers, and
    leaves the transpositions around a norm (`tools/bench_openvino.py`).
    """
    shapes = {port: port.partial_shape for port in model.inputs}
    for shape in shapes.values():
        if shape.rank.is_static and shape[0].is_dynamic:
            shape[0] = 1
    model.reshape(shapes)


def sample_axes(model: Any) -> list[int]:
    """The axis that each output of a model of one sample has its samples on.

    Inner tensors are permuted, and have rows of all samples in one axis. Where the shape says
    nothing, it is the first.
    """
    pair = model.clone()
    try:
        pair.reshape({port: [2, *list(port.partial_shape)[1:]] for port in pair.inputs})
    except RuntimeError:  # a count of rows that is written in the file
        return [0] * len(model.outputs)
    both = zip(model.outputs, pair.outputs, strict=True)
    shapes = [(list(one.partial_shape), list(two.partial_shape)) for one, two in both]
    return [
        next((axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), 0)
        for one, two in shapes
    ]


def quantize_terms(model: Any) -> None:
    """Quantize what a concatenation joins, not what comes out of it; all have one scale.

    The conversion leaves one quantizer behind it, which the compiler puts in front again: beside
    what quantizes a term for its other readers, where both are too many to run inside the layer
    that made it: in DenseNet, a pass over every tensor.
    """
    opset = import_openvino().opset13
    for last in model.get_ordered_ops():
        if (wanted := _quantizer(last)) is None:
            continue
        joined = last.input_value(0).get_node()
        if joined.get_type_name() != "Concat" or len(joined.output(0).get_target_inputs()) > 1:
            continue
        for index, term in enumerate(joined.input_values()):
            readers = [reader.get_node() for reader in term.get_target_inputs()]
            quantizer = next((each for each in readers if _quantizer(each) == wanted), None)
            if quantizer is None:
                ends = [last.input_value(i) for i in range(1, 5)]
                name = f"{last.get_friendly_name()}.{index}"
                quantizer = opset.fake_quantize(term, *ends, levels=wanted[0], name=name)
            joined.input(index).replace_source_output(quantizer.output(0))
        joined.output(0).add_names(last.output(0).get_names())
        for reader in last.output(0).get_target_inputs():
            reader.replace_source_output(joined.output(0))


def turn_maps(model: Any) -> None:
    """Compute with channels first what stands between two permutations that undo each other.

    As in ConvNeXt (arXiv:2201.03545): norms over channels, linear layers, which are convolutions of
    1 × 1 there, and what acts number by number. In memory the plugin's maps lie with channels last
    anyway, and it would move all numbers at each permutation, and around each norm once more.
    """
    nodes = model.get_ordered_ops()
    places = {node.get_name(): place for place, node in enumerate(nodes)}
    for turn in nodes:
        if _order(turn) != TO_LAST or turn.get_output_partial_shape(0).is_dynamic:
            continue
        inside, ends = _between(turn)
        if ends:
            _take_out(turn)
            for node in sorted(inside, key=lambda node: places[node.get_name()]):
                suffix = f"{TURNED}{len(node.get_output_shape(0))}"
                names = {f"{name}{suffix}" for name in node.output(0).get_names()}
                made = TURN.get(node.get_type_name(), _turn_elementwise)(node)
                made.set_names(names | {name for name in made.get_names() if TURNED in name})
            for end in ends:
                end.input_value(0).add_names(end.output(0).get_names())
                _take_out(end)
    model.validate_nodes_and_infer_types()


def _between(turn: Any) -> tuple[list[Any], list[Any]]:
    """What computes on a map with channels last, and the permutations that turn it back.

    No ends if something else reads it, or a quantizer stands between a linear layer and an Add: a
    convolution's kernel would not round there.
    """
    reached, names, ends = [turn], {turn.get_name()}, {}
    for node in reached:
        for reader in _readers(node):
            if _order(reader) == TO_FIRST:
                ends[reader.get_name()] = reader
            elif reader.get_name() not in names:
                names.add(reader.get_name())
                reached.append(reader)
    sides = list(turn.get_output_shape(0))[:3]
    linear = any(node.get_type_name() == "MatMul" for node in reached)
    fits = (
        all(list(end.get_input_shape(0))[:3] == sides for end in ends.values())
        and all(_turns(node, names) for node in reached[1:])
        and not (linear and any(map(_rounds_before_add, ends.values())))
    )
    return (reached[1:], list(ends.values())) if fits else ([], [])


def _readers(node: Any) -> list[Any]:
    return [reader.get_node() for output in node.outputs() for reader in output.get_target_inputs()]


def _order(node: Any) -> list[int] | None:
    """Of a transposition, else None."""
    if node.get_type_name() != "Transpose" or not _is_fixed(node.input_value(1)):
        return None
    return [int(x) for x in node.input_value(1).get_node().data]


def _is_fixed(value: Any) -> bool:
    """A constant, or integers of constants that are dequantized."""
    node = value.get_node()
    return bool(
        node.get_type_name() == "Constant"
        or (node.get_type_name() in DEQUANTIZING and all(map(_is_fixed, node.input_values())))
    )


def _rounds_before_add(end: Any) -> bool:
    """Whether what `end` turns back is quantized in front of it, or behind, and then added."""
    before, behind = end.input_value(0).get_node(), _readers(end)
    quantizers = [node for node in (before, *behind) if _quantizer(node)]
    readers = [*behind, *(each for node in quantizers for each in _readers(node))]
    return bool(quantizers) and any(node.get_type_name() == "Add" for node in readers)


def _turns(node: Any, names: set[str]) -> bool:
    """Whether `turn_maps` can do `node` with channels first; `names`: of what it turns with it."""
    kind = node.get_type_name()
    if node.get_output_partial_shape(0).is_dynamic:
        return False
    shape = list(node.get_output_shape(0))
    others = [v for v in node.input_values() if v.get_node().get_name() not in names]
    if kind == "Reshape":
        return shape[-1] == node.get_input_shape(0)[-1] and len(shape) in (2, 4)
    if kind == "MVN":
        options = node.get_attributes()
        last = [int(x) for x in np.atleast_1d(others[0].get_node().data)] in ([-1], [3])
        return last and options["normalize_variance"] and options["eps_mode"] == "INSIDE_SQRT"
    if kind == "MatMul":
        options = node.get_attributes()
        plain = options["transpose_b"] and not options["transpose_a"]
        return (
            plain and len(others) == 1 and _is_fixed(others[0]) and len(others[0].get_shape()) == 2
        )
    if kind in BINARY:
        return all(_is_fixed(v) and _is_of_channels(list(v.get_shape())) for v in others)
    return kind in UNARY or _quantizer(node) is not None


def _is_of_channels(shape: list[int]) -> bool:
    return all(size == 1 for size in shape[:-1])


def _turn_elementwise(node: Any) -> Any:
    opset = import_openvino().opset13
    for port in node.inputs() if node.get_type_name() in BINARY else []:
        value = port.get_source_output()
        if _is_fixed(value) and math.prod(value.get_shape()) > 1:
            turned = opset.reshape(value, np.array([1, -1, 1, 1]), False)
            port.replace_source_output(turned.output(0))
    node.validate_and_infer_types()
    return node.output(0)


def _turn_reshape(node: Any) -> Any:
    _take_out(node)
    return node.input_value(0)


def _turn_norm(node: Any) -> Any:
    opset, x = import_openvino().opset13, node.input_value(0)
    channels, epsilon = np.array([1]), np.float32(node.get_attributes()["eps"])
    centred = opset.subtract(x, opset.reduce_mean(x, channels, True))
    variance = opset.reduce_mean(opset.multiply(centred, centred), channels, True)
    return _instead(node, opset.divide(centred, opset.sqrt(opset.add(variance, epsilon))))


def _turn_linear(node: Any) -> Any:
    weight = _with_pixels(node.input_value(1))
    convolution = import_openvino().opset13.convolution(
        node.input_value(0), weight, [1, 1], [0, 0], [0, 0], [1, 1]
    )
    return _instead(node, convolution)


def _with_pixels(value: Any) -> Any:
    """Weights of (out, in), fixed, as (out, in, 1, 1): with their scales of (out, 1), or one."""
    opset, node = import_openvino().opset13, value.get_node()
    kind = node.get_type_name()
    if kind in ("Multiply", "Subtract"):
        apply = opset.multiply if kind == "Multiply" else opset.subtract
        return apply(*map(_with_pixels, node.input_values())).output(0)
    if kind == "Convert":
        wide = node.get_attributes()["destination_type"]
        return opset.convert(_with_pixels(node.input_value(0)), wide).output(0)
    if len(value.get_shape()) != 2:
        return value
    shape = np.array([*value.get_shape(), 1, 1])
    return opset.reshape(value, shape, False).output(0)


def _instead(node: Any, made: Any) -> Any:
    made.set_friendly_name(node.get_friendly_name())
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(made.output(0))
    return made.output(0)


TURN: dict[str, Callable[[Any], Any]] = {
    "Reshape": _turn_reshape, "MVN": _turn_norm, "MatMul": _turn_linear,
}  # fmt: skip


def quantize_behind_turns(model: Any) -> None:
    """Quantize what a linear layer or an attention gives behind the permutations that follow.

    One scale stands on both sides, so the numbers are the same, and the plugin permutes floats in
    less time than bytes.
    """
    for node in model.get_ordered_ops():
        wanted = _quantizer(node)
        if wanted and _of_product(node.input_value(0)) and _again_behind_turn(node, wanted):
            _forget_names(node)
            _take_out(node)


def _of_product(value: Any) -> bool:
    """Whether it is what a matrix product gives, with its bias, moved or quantized or not."""
    node = value.get_node()
    while node.get_type_name() in MOVES or _quantizer(node):
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Add":
        node = node.input_value(0).get_node()
    return node.get_type_name() in ("MatMul", "ScaledDotProductAttention")


def _forget_names(node: Any) -> None:
    """Of what moves numbers behind `node`: the conversion calls some of it quantized."""
    for reader in _readers(node):
        if reader.get_type_name() in MOVES:
            for output in reader.outputs():
                output.set_names(set())
            _forget_names(reader)


def _turns_rows(node: Any) -> bool:
    """A permutation that is none between channels first and last: memory has maps one way."""
    return _order(node) not in (None, TO_LAST, TO_FIRST)


def _again_behind_turn(node: Any, wanted: tuple[int, list[float]], turned: bool = False) -> bool:
    """Whether all that read `node` quantize it as `wanted` behind a permutation."""

    def again(reader: Any) -> bool:
        if _quantizer(reader) == wanted:
            return turned or _again_behind_turn(reader, wanted)
        moves = reader.get_type_name() in MOVES
        return moves and _again_behind_turn(reader, wanted, turned or _turns_rows(reader))

    readers = _readers(node)
    return bool(readers) and all(map(again, readers))


def bound_branches(model: Any) -> None:
    """Clip what a convolution adds to a quantized skip where the sum's quantizer clips anyway.

    Of fixed shapes the compiler adds inside the convolution only behind a quantizer, which its
    kernel takes for a clip: it does not round. With these ends that changes nothing, and spares a
    pass over the sum in float. Where the compiler leaves the two apart it would round: taken out.
    """
    opset = import_openvino().opset13
    for add in model.get_ordered_ops():
        readers = _readers(add)
        sums = [quantizer for reader in readers if (quantizer := _quantizer(reader))]
        if add.get_type_name() != "Add" or not sums or len(sums) < len(readers):
            continue
        shapes = [value.get_partial_shape() for value in add.input_values()]
        if shapes[0] != shapes[1] or shapes[0].is_dynamic:
            continue
        for branch, skip in ((0, 1), (1, 0)):
            ends = _ends(add.input_value(skip).get_node())
            if ends is None or not _of_convolution(add.input_value(branch)):
                continue
            low, high = ends
            most = max(abs(x) for _, (*_, a, b) in sums for x in (a - high, b - low))
            sides = [opset.constant(np.float32(x)) for x in (-most * 128 / 127, most)] * 2
            name = f"{add.get_friendly_name()}{CLIP}"
            clip = opset.fake_quantize(add.input_value(branch), *sides, levels=256, name=name)
            add.input(branch).replace_source_output(clip.output(0))
            break
    if clips := _clips(model):
        compiled = (
            import_openvino()
            .Core()
            .compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        )
        infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
        together = [set(info["originalLayersNames"].astype(str).split(",")) for info in infos]
        for name, clip in clips.items():
            if not any({name, name.removesuffix(CLIP)} <= names for names in together):
                _take_out(clip)


def _ends(node: Any) -> tuple[float, float] | None:
    """Between which a quantizer keeps `node`'s numbers; None if none does."""
    if node.get_type_name() in ("Concat", "MaxPool"):
        spans = [span for value in node.input_values() if (span := _ends(value.get_node()))]
        known = len(spans) == node.get_input_size()
        return (min(a for a, _ in spans), max(b for _, b in spans)) if known else None
    quantizer = _quantizer(node)
    return None if quantizer is None else (quantizer[1][2], quantizer[1][3])


def _clips(model: Any) -> dict[str, Any]:
    """What `bound_branches` put in, by name."""
    names = {op.get_friendly_name(): op for op in model.get_ops()}
    return {name: op for name, op in names.items() if name.endswith(CLIP)}


def _take_out(node: Any) -> None:
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(node.input_value(0))


def show(model: Any, names: Collection[str]) -> None:
    """Make inner tensors outputs, by name, of the shapes that they were exported with.

    Without the clips of `bound_branches`: a kernel that is not fused would round there.
    """
    for clip in _clips(model).values():
        _take_out(clip)
    opset = import_openvino().opset13
    shown = {name for output in model.outputs for name in output.get_names()}
    for output in [output for op in model.get_ordered_ops() for output in op.outputs()]:
        for known in output.get_names():
            name, turned, rank = known.partition(TURNED)
            if name not in names or name in shown:
                continue
            shown.add(name)
            if turned:
                channels = output.get_partial_shape()[1].get_length()
                output = opset.transpose(output, np.array(TO_LAST)).output(0)
                if rank == "2":
                    output = opset.reshape(output, np.array([-1, channels]), False).output(0)
                output.set_names({name})
            model.add_outputs([output])


def _of_convolution(value: Any) -> bool:
    """Whether it is what a convolution gives, with its bias, to one reader."""
    node = value.get_node()
    if node.get_type_name() == "Add":
        node = node.input_value(0).get_node()
    alone = len(value.get_target_inputs()) == 1
    return alone and node.get_type_name() in ("Convolution", "GroupConvolution")


def _quantizer(node: Any) -> tuple[int, list[float]] | None:
    """Number of integers and ends of a quantizer with one range; None of any other node."""
    if node.get_type_name() != "FakeQuantize":
        return None
    ends = [node.input_value(i).get_node() for i in range(1, 5)]
    if any(end.get_type_name() != "Constant" or end.data.size > 1 for end in ends):
        return None
    return node.get_attributes()["levels"], [float(end.data.item()) for end in ends]
