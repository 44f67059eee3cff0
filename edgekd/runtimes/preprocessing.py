"""An image's normalisation inside the model: the file takes pixels of 0 to 255."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekd.errors import ModelError
from edgekd.network import Preprocessing
from edgekd.runtimes.onnx_values import constant, new_constant


def fold_preprocessing(model: ir.Model, preprocessing: Preprocessing) -> None:
    """Fold (x / 255 - mean) / std into the first convolution, of float weights.

    Where the convolution pads, a border of zeros is one of the mean, channel by channel, which no
    Pad writes: there 255 · mean is subtracted in front of it, and only the scale is folded.

    Raises:
        ModelError: the input does not go into exactly one convolution of constant float weights,
            whose groups, if it has any, take one channel each.
    """
    (image, *others) = model.graph.inputs
    readers = list(image.consumers())
    conv = readers[0] if len(readers) == 1 else None
    weight = constant(conv.inputs[1]) if conv is not None and conv.op_type == "Conv" else None
    if others or conv is None or weight is None or weight.dtype != np.float32:
        raise ModelError(
            "preprocessing folds into one convolution of float weights that alone reads the one "
            f"input; {image.name} is read by {', '.join(n.op_type for n in readers) or 'nothing'}"
        )
    mean, std = (np.array(v, np.float64) for v in (preprocessing.mean, preprocessing.std))
    groups = conv.attributes.get_int("group", 1)
    channels = weight.shape[1] * groups
    if len(mean) != channels or groups not in (1, channels):
        raise ModelError(
            f"{conv.name} takes {channels} channels in {groups} groups; preprocessing has "
            f"{len(mean)} channels"
        )
    name = f"{conv.outputs[0].name}.preprocessed"
    padded = any(conv.attributes.get_ints("pads", ())) or (
        conv.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    )
    if padded:
        zero = new_constant(
            model.graph, f"{name}.mean", (255 * mean).reshape(1, -1, 1, 1).astype(np.float32)
        )
        centred = ir.node("Sub", [image, zero], name=f"{name}.centred")
        model.graph.insert_before(conv, centred)
        conv.replace_input_with(0, centred.outputs[0])
    # w · (x / 255 - mean) / std = (w / (255 std)) · x - w · mean / std
    each = (1, -1, 1, 1) if groups == 1 else (-1, 1, 1, 1)
    if groups > 1:  # outputs of a group lie together
        mean, std = (np.repeat(v, len(weight) // groups) for v in (mean, std))
    scaled = weight / std.reshape(each)
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    shift = 0 if padded else (scaled * mean.reshape(each)).sum((1, 2, 3))
    shifted = np.zeros(len(weight)) + (0 if bias is None else bias) - shift
    conv.resize_inputs(3)
    for index, array in ((1, scaled / 255), (2, shifted)):
        value = new_constant(model.graph, f"{name}.{index}", array.astype(np.float32))
        conv.replace_input_with(index, value)
