"""Behind a detector's raw heads, in the file itself: decoding, and suppression of duplicates.

Operators of opset 13 in float; `edgekd.tasks.decoding` does the same in torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekd.errors import ModelError
from edgekd.runtimes.integer_ends import KEY, IntegerEnds
from edgekd.runtimes.onnx_values import new_constant
from edgekd.tasks.decoding import Decoding, anchors

PLUGIN = "EfficientNMS_TRT"
FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


class _Writer:
    """Nodes at the end of a graph; arrays among their inputs become initializers."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self._graph, self._prefix, self._count = graph, prefix, 0

    def op(self, op_type: str, *inputs: Any, **attributes: Any) -> ir.Value:
        """The first output."""
        return self.outputs(1, op_type, *inputs, **attributes)[0]

    def outputs(
        self, count: int, op_type: str, *inputs: Any, **attributes: Any
    ) -> Sequence[ir.Value]:
        self._count += 1
        name = f"{self._prefix}.{self._count}"
        values = [
            x if isinstance(x, ir.Value) else new_constant(self._graph, f"{name}.in{i}", x)
            for i, x in enumerate(inputs)
        ]
        node = ir.node(op_type, values, attributes, num_outputs=count, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.out{index}"
        self._graph.append(node)
        return node.outputs

    def part(self, x: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        """x[start:end] along an axis."""
        return self.op("Slice", x, *(np.array([n]) for n in (start, end, axis)))


# ---- decoding ------------------------------------------------------------------------------------


def append_decoding(model: ir.Model, decoding: Decoding) -> None:
    """The raw heads, floats or integers, become `boxes` and `scores`.

    boxes: (N, A, 4) left, top, right, bottom in pixels of the input, cut to it;
    scores: (N, A, K) from 0 to 1, without the background.

    Raises:
        ModelError: boxes or scores of a kind that is not among those below.
    """
    for kind, known in ((decoding.boxes, BOXES), (decoding.scores, SCORES)):
        if kind not in known:
            raise ModelError(
                f"a file cannot decode {kind!r}, only {', '.join(known)}: leave the variants "
                "'decoded' and 'detections' out of the target"
            )
    ops = _Writer(model.graph, "decoding")
    classes, regression, *quality = _raw_heads(model, ops)
    shape = classes.shape
    assert shape is not None and isinstance(shape[2], int)
    height, width = decoding.image
    limits = np.array([width, height, width, height], np.float32)
    edges = BOXES[decoding.boxes](ops, decoding, regression)
    boxes = ops.op("Relu", ops.op("Min", edges, limits))
    scores = SCORES[decoding.scores](ops, classes)
    if quality:
        sure = ops.op("Sigmoid", quality[0])
        scores = ops.op("Sqrt", ops.op("Mul", scores, sure))
    classes_alone = shape[2] - decoding.background
    _give(model.graph, boxes=(boxes, FLOAT, (*shape[:2], 4)),
          scores=(scores, FLOAT, (*shape[:2], classes_alone)))  # fmt: skip


def _raw_heads(model: ir.Model, ops: _Writer) -> list[ir.Value]:
    """The outputs as floats, under other names than they had."""
    ends, found = IntegerEnds.read(model.metadata_props), []
    for value in model.graph.outputs:
        end, shape = ends.pop(str(value.name), None), value.shape
        value.name = f"{value.name}.raw"
        if end is not None:
            zero = np.array(end.zero_point, end.dtype)
            value = ops.op("DequantizeLinear", value, np.array(end.scale, np.float32), zero)
            value.shape = shape
        found.append(value)
    if KEY in model.metadata_props:
        plain = {name: end.model_dump() for name, end in ends.items()}
        model.metadata_props[KEY] = json.dumps(plain)
    return found


def _give(graph: ir.Graph, **outputs: tuple[ir.Value, ir.DataType, Sequence[Any]]) -> None:
    """Let these be the graph's outputs: value, type and shape by name."""
    graph.outputs.clear()
    for name, (value, dtype, shape) in outputs.items():
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        graph.outputs.append(value)


def _centres_and_sizes(decoding: Decoding) -> tuple[Any, Any]:
    """(A, 2) x and y, and (A, 2) width and height, of the anchors."""
    at = anchors(decoding).numpy()
    return (at[:, :2] + at[:, 2:]) / 2, at[:, 2:] - at[:, :2]


def _distance(ops: _Writer, decoding: Decoding, raw: ir.Value) -> ir.Value:
    centre, size = _centres_and_sizes(decoding)
    outwards = ops.op("Mul", raw, np.concatenate([-size, size], 1))
    return ops.op("Add", outwards, np.concatenate([centre, centre], 1))


def _log_distance(ops: _Writer, decoding: Decoding, raw: ir.Value) -> ir.Value:
    return _distance(ops, decoding, _exp(ops, decoding, raw))


def _distribution(ops: _Writer, decoding: Decoding, raw: ir.Value) -> ir.Value:
    """Each distance is the mean of its logits' softmax over 0, 1, … sizes."""
    assert raw.shape is not None and isinstance(raw.shape[2], int)
    bins = raw.shape[2] // 4
    logits = ops.op("Reshape", raw, np.array([0, -1, 4, bins]))
    shares = ops.op("Softmax", logits, axis=3)
    mean = ops.op("MatMul", shares, np.arange(bins, dtype=np.float32)[:, None])
    return _distance(ops, decoding, ops.op("Squeeze", mean, np.array([3])))


def _offset(ops: _Writer, decoding: Decoding, raw: ir.Value) -> ir.Value:
    centre, size = _centres_and_sizes(decoding)
    numbers = ops.op("Div", raw, np.array(decoding.weights, np.float32))
    moved, grown = (ops.part(numbers, 2, start, start + 2) for start in (0, 2))
    middle = ops.op("Add", ops.op("Mul", moved, size), centre)
    half = ops.op("Mul", _exp(ops, decoding, grown), size / 2)
    return ops.op("Concat", *(ops.op(sign, middle, half) for sign in ("Sub", "Add")), axis=2)


def _exp(ops: _Writer, decoding: Decoding, logarithms: ir.Value) -> ir.Value:
    return ops.op("Exp", ops.op("Min", logarithms, np.array([decoding.largest], np.float32)))


def _sigmoid(ops: _Writer, classes: ir.Value) -> ir.Value:
    return ops.op("Sigmoid", classes)


def _softmax(ops: _Writer, classes: ir.Value) -> ir.Value:
    return ops.part(ops.op("Softmax", classes, axis=2), 2, 1, np.iinfo(np.int32).max)


# what `Decoding.boxes` and `Decoding.scores` may be; each gives (N, A, 4) edges, or (N, A, K)
BOXES: Mapping[str, Callable[[_Writer, Decoding, ir.Value], ir.Value]] = {
    "distance": _distance,
    "log_distance": _log_distance,
    "distribution": _distribution,
    "offset": _offset,
}
SCORES: Mapping[str, Callable[[_Writer, ir.Value], ir.Value]] = {
    "sigmoid": _sigmoid,
    "softmax": _softmax,
}


# ---- suppression ---------------------------------------------------------------------------------


def append_suppression(model: ir.Model, decoding: Decoding) -> None:
    """What `append_decoding` gave, of one image in fixed shapes, becomes `detections`.

    detections: (1, D, 6) as `edgekd.tasks.decoding.detect` gives them; of equal scores, the lower
    class comes first.
    """
    boxes, scores = model.graph.outputs
    ops = _Writer(model.graph, "suppression")
    wanted = decoding.detections
    scores = ops.op("Transpose", _candidates(ops, decoding, scores), perm=[0, 2, 1])
    chosen = ops.op(
        "NonMaxSuppression", boxes, scores, np.array([wanted]),
        np.array([decoding.nms_threshold], np.float32),
        np.array([decoding.score_threshold], np.float32),
    )  # fmt: skip
    # (M, 3) of image, class and anchor, M being what is found
    kind, anchor = (ops.op("Gather", chosen, np.array(column), axis=1) for column in (1, 2))
    columns = [
        ops.op("Gather", ops.op("Squeeze", boxes, np.array([0])), anchor),
        ops.op("Unsqueeze", ops.op("GatherND", scores, chosen), np.array([1])),
        ops.op("Unsqueeze", ops.op("Cast", kind, to=FLOAT), np.array([1])),
    ]
    absent = np.full((wanted, 6), -1, np.float32)
    rows = ops.op("Concat", ops.op("Concat", *columns, axis=1), absent, axis=0)
    score = ops.op("Gather", rows, np.array(4), axis=1)
    _, best = ops.outputs(2, "TopK", score, np.array([wanted]))
    found = ops.op("Unsqueeze", ops.op("Gather", rows, best), np.array([0]))
    _give(model.graph, detections=(found, FLOAT, (1, wanted, 6)))


def _candidates(ops: _Writer, decoding: Decoding, scores: ir.Value) -> ir.Value:
    """(1, A, K): the best of each level or class; 0 in the place of all others."""
    shape = scores.shape
    assert shape is not None and isinstance(shape[2], int)
    classes = shape[2]
    counts = [level.anchors for level in decoding.levels]
    if decoding.candidates_of == "class":
        return _best(ops, scores, decoding.candidates, (1, sum(counts), classes))
    parts = []
    for count, end in zip(counts, accumulate(counts), strict=True):
        part = ops.part(scores, 1, end - count, end)
        if count * classes > decoding.candidates:
            flat = ops.op("Reshape", part, np.array([1, -1]))
            flat = _best(ops, flat, decoding.candidates, (1, count * classes))
            part = ops.op("Reshape", flat, np.array([1, count, classes]))
        parts.append(part)
    return ops.op("Concat", *parts, axis=1)


def _best(ops: _Writer, scores: ir.Value, count: int, shape: tuple[int, ...]) -> ir.Value:
    """Of `scores`, which have that shape, the best along axis 1; 0 in the place of all others."""
    if shape[1] <= count:
        return scores
    values, index = ops.outputs(2, "TopK", scores, np.array([count]), axis=1)
    nothing = ops.op("ConstantOfShape", np.array(shape), value=ir.tensor(np.zeros(1, np.float32)))
    return ops.op("ScatterElements", nothing, index, values, axis=1)


def append_plugin(model: ir.Model, decoding: Decoding) -> None:
    """What `append_decoding` gave goes through TensorRT's plugin, in the form that it has there.

    num_detections (N, 1) int32, detection_boxes (N, D, 4), detection_scores (N, D) and
    detection_classes (N, D) int32, of which the first `num_detections` count. The plugin knows no
    candidates: of all scores the 4096 highest go in. Where a score or an IoU equals its threshold,
    it keeps the score and drops the box; `detect` does the opposite. Attributes and outputs:
    NVIDIA/TensorRT, plugin/efficientNMSPlugin.
    """
    boxes, scores = model.graph.outputs
    assert boxes.shape is not None
    batch, wanted = boxes.shape[0], decoding.detections
    # -1: no class is the background; box_coding 0: edges; the scores are sigmoids already
    found = _Writer(model.graph, "suppression").outputs(
        4, PLUGIN, boxes, scores, plugin_version="1", background_class=-1, box_coding=0,
        score_activation=0, score_threshold=decoding.score_threshold,
        iou_threshold=decoding.nms_threshold, max_output_boxes=wanted,
    )  # fmt: skip
    boxes.name, scores.name = "decoding.boxes", "decoding.scores"
    names = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
    shapes = ((batch, 1), (batch, wanted, 4), (batch, wanted), (batch, wanted))
    dtypes = (INT32, FLOAT, FLOAT, INT32)
    ends = zip(found, dtypes, shapes, strict=True)
    _give(model.graph, **dict(zip(names, ends, strict=True)))
