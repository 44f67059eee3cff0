"""Images as a camera gives them: the normalisation inside the file, as far as it is exact."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekd.errors import ModelError
from edgekd.network import Preprocessing
from edgekd.runtimes.onnx_values import constant, new_constant

KEY = "edgekd.image_input"  # in the file's metadata: the element type of images of 0 … 255
Place = Literal["convolution", "quantizer", "in front"]


def fold_preprocessing(
    model: ir.Model, preprocessing: Preprocessing, *, dtype: Literal["uint8", "float32"] = "uint8"
) -> Place:
    """The first input, (N, C, H, W), takes images of 0 … 255 instead of (x / 255 − mean) / std.

    What the normalisation went into is returned:

    - "convolution": the scale goes into the weights of the first convolution, the mean into its
      bias. ONNX pads by 0, which stands for the mean; so where it pads, the image is padded by the
      mean in an operator of its own if all channels have the same, else the mean is subtracted in
      front and only the scale goes into the weights. No padding is approximated.
    - "quantizer": the quantizer of the input gives each of the 256 values its own number back, for
      every channel (tried out); the image is taken in its place. Only with uint8.
    - "in front": a subtraction and a product stand in front, for anything else.

    With uint8, a Cast makes floats of the image first, unless it goes into a quantizer's place.

    Raises:
        ModelError: the input is not float32 of (N, C, H, W) with the C of `preprocessing`.
    """
    image = model.graph.inputs[0]
    channels, shape = len(preprocessing.mean), image.shape
    if (
        image.dtype != ir.DataType.FLOAT or shape is None or len(shape) != 4
        or shape[1] != channels
    ):  # fmt: skip
        raise ModelError(
            f"{image.name} is {image.dtype} of {shape}; images are FLOAT of "
            f"[N, {channels}, H, W], as many channels as the preprocessing has"
        )
    mean = np.array(preprocessing.mean, np.float64) * 255
    factor = 1 / (255 * np.array(preprocessing.std, np.float64))
    place: Place = "in front"
    readers = [use.node for use in image.uses()]
    first = readers[0] if len(readers) == 1 and not image.is_graph_output() else None
    if first is not None and dtype == "uint8" and _is_identity(first, mean, factor):
        image.dtype, place = ir.DataType.UINT8, "quantizer"
        ir.convenience.replace_all_uses_with(first.outputs[0], image)
        model.graph.remove(first, safe=True)
    elif first is not None and _takes(first, channels):
        _into_convolution(model.graph, first, mean, factor)
        place = "convolution"
    else:
        _in_front(model.graph, image, {"Sub": mean, "Mul": factor})
    if dtype == "uint8" and place != "quantizer":
        _cast(model.graph, image)
    RemoveUnusedNodesPass()(model)
    model.metadata_props[KEY] = dtype
    return place


def _per_channel(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.float32).reshape(1, -1, 1, 1)


def _is_identity(node: ir.Node, mean: NDArray[Any], factor: NDArray[Any]) -> bool:
    """Whether a QuantizeLinear to uint8 undoes the normalisation of all 256 values."""
    if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
        return False
    scale, zero = (constant(value) for value in node.inputs[1:3])
    if scale is None or zero is None or scale.size > 1 or zero.dtype != np.uint8:
        return False
    values = np.arange(256, dtype=np.float64)
    inputs = ((values - mean[:, None]) * factor[:, None]).astype(np.float32)
    steps = np.rint(inputs / scale.reshape(())) + zero.reshape(()).astype(np.int32)
    return bool((steps.clip(0, 255) == values).all())


def _takes(node: ir.Node, channels: int) -> bool:
    """Whether the node is a convolution over the image with constant weights."""
    weight = constant(node.inputs[1]) if node.op_type == "Conv" else None
    if weight is None or weight.ndim != 4 or weight.dtype != np.float32:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    whole = weight.shape[1] * node.attributes.get_int("group", 1) == channels
    return whole and (bias is None or constant(bias) is not None)


def _into_convolution(
    graph: ir.Graph, conv: ir.Node, mean: NDArray[Any], factor: NDArray[Any]
) -> None:
    weight = constant(conv.inputs[1])
    assert weight is not None
    groups = conv.attributes.get_int("group", 1)

    def by_weight(values: NDArray[Any]) -> NDArray[Any]:
        """(C,) as it spreads over (outputs, C / groups, height, width)."""
        parts = values.reshape(groups, 1, -1)
        return parts.repeat(len(weight) // groups, 1).reshape(len(weight), -1, 1, 1)

    name = str(conv.outputs[0].name)
    scaled = weight * by_weight(factor)
    pads = [int(p) for p in conv.attributes.get_ints("pads", (0, 0, 0, 0))]
    automatic = conv.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    padded_by_mean = mean.any() and (automatic or any(pads))
    if padded_by_mean and (automatic or len(set(mean)) > 1):
        _in_front(graph, conv.inputs[0], {"Sub": mean})
    else:
        if padded_by_mean:
            widths = np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)
            inputs = [
                conv.inputs[0], new_constant(graph, f"{name}.pads", widths),
                new_constant(graph, f"{name}.mean", np.array(mean[0], np.float32)),
            ]  # fmt: skip
            padded = ir.node("Pad", inputs, name=f"{conv.name}.pad")
            graph.insert_before(conv, padded)
            conv.replace_input_with(0, padded.outputs[0])
            conv.attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 0, 0])
        bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
        moved = (0 if bias is None else bias) - (scaled * by_weight(mean)).sum((1, 2, 3))
        conv.resize_inputs(3)
        conv.replace_input_with(2, new_constant(graph, f"{name}.bias", moved.astype(np.float32)))
    conv.replace_input_with(1, new_constant(graph, f"{name}.weight", scaled.astype(np.float32)))


def _in_front(graph: ir.Graph, image: ir.Value | None, steps: dict[str, NDArray[Any]]) -> None:
    """`steps` (operator → a number for each channel) between the image and what reads it."""
    assert image is not None
    last, nodes = image, []
    for op_type, values in steps.items():
        number = new_constant(graph, f"{image.name}.{op_type.lower()}", _per_channel(values))
        nodes.append(ir.node(op_type, [last, number], name=f"{image.name}.{op_type.lower()}"))
        last = nodes[-1].outputs[0]
        last.dtype, last.shape = ir.DataType.FLOAT, image.shape
    _insert(graph, image, nodes)


def _cast(graph: ir.Graph, image: ir.Value) -> None:
    cast = ir.node("Cast", [image], {"to": ir.DataType.FLOAT}, name=f"{image.name}.cast")
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, image.shape
    _insert(graph, image, [cast])
    image.dtype = ir.DataType.UINT8


def _insert(graph: ir.Graph, image: ir.Value, nodes: list[ir.Node]) -> None:
    """`nodes` first of all; what read the image reads the last of them."""
    ir.convenience.replace_all_uses_with(image, nodes[-1].outputs[0], replace_graph_outputs=True)
    nodes[0].replace_input_with(0, image)
    graph.insert_before(graph[0], nodes)
