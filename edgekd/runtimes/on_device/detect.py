"""A detector's images and boxes on the device: Python 3.6 and NumPy alone.

Evaluation letterboxes with the functions of this file too, so that both see the same pixels:

1. r = min(H / h, W / w) for an image of (h, w) and an input of (H, W); the image becomes
   h' = floor(r * h + 0.5), w' = floor(r * w + 0.5), at least 1.
2. Along each axis of n pixels that become m, output i is the weighted mean of inputs j with weights
   max(0, 1 - |j + 0.5 - (i + 0.5) * n / m| / max(1, n / m)): bilinear, antialiased, as Pillow's
   BILINEAR. Rows first, then columns, in float32; the result is rounded half to even.
3. It lies floor((H - h') / 2) rows down and floor((W - w') / 2) columns to the right in a canvas
   of grey 114.

An edge x of a box becomes x * w' / w + left, and y likewise. What the outputs mean is the
manifest's `io.decoding`.
"""

import numpy as np

GREY = 114


def placed(height, width, rows, columns):
    """(height, width, top, left) of an image of (height, width) in an input of (rows, columns)."""
    ratio = min(rows / height, columns / width)
    high, wide = max(1, int(ratio * height + 0.5)), max(1, int(ratio * width + 0.5))
    return high, wide, (rows - high) // 2, (columns - wide) // 2


def letterbox(image, rows, columns):
    """(H, W, C) uint8 to (rows, columns, C)."""
    high, wide, top, left = placed(image.shape[0], image.shape[1], rows, columns)
    canvas = np.full((rows, columns, image.shape[2]), GREY, np.uint8)
    canvas[top : top + high, left : left + wide] = resize(image, high, wide)
    return canvas


def resize(image, height, width):
    """(H, W, C) uint8 to (height, width, C)."""
    if image.shape[:2] == (height, width):
        return image
    x = np.tensordot(weights(image.shape[0], height), image.astype(np.float32), 1)
    x = np.tensordot(weights(image.shape[1], width), x, (1, 1)).transpose(1, 0, 2)
    return np.rint(x).clip(0, 255).astype(np.uint8)


def weights(pixels, wanted):
    """(wanted, pixels) of the mean that makes each pixel that is wanted."""
    step = pixels / wanted
    centres = (np.arange(wanted) + 0.5) * step
    apart = np.abs(np.arange(pixels) + 0.5 - centres[:, None])
    found = np.maximum(0, 1 - apart / max(1, step))
    return (found / found.sum(1, keepdims=True)).astype(np.float32)


def anchors(decoding):
    """(A, 4): left, top, right, bottom."""
    parts = []
    for level in decoding["levels"]:
        rows, columns = ((np.arange(count) + level["offset"]) * stride
                         for count, stride in zip(level["grid"], level["stride"]))  # fmt: skip
        y, x = np.meshgrid(rows, columns, indexing="ij")
        centres = np.stack([x, y], -1).reshape(-1, 1, 2)
        halves = np.array(level["sizes"], np.float64) / 2
        parts.append(np.concatenate([centres - halves, centres + halves], -1).reshape(-1, 4))
    return np.concatenate(parts).astype(np.float32)


def boxes_of(decoding, regression):
    """(A, 4 * B) raw numbers to left, top, right, bottom, cut to the input."""
    at = anchors(decoding)
    size, centre = at[:, 2:] - at[:, :2], (at[:, :2] + at[:, 2:]) / 2
    limit = np.float32(decoding["largest"])
    if decoding["boxes"] == "offset":
        moved = regression / np.array(decoding["weights"], np.float32)
        middle = centre + moved[:, :2] * size
        half = np.exp(np.minimum(moved[:, 2:], limit)) * size / 2
        edges = np.concatenate([middle - half, middle + half], 1)
    else:
        if decoding["boxes"] == "log_distance":
            regression = np.exp(np.minimum(regression, limit))
        elif decoding["boxes"] == "distribution":
            logits = regression.reshape(len(regression), 4, -1)
            shares = np.exp(logits - logits.max(2, keepdims=True))
            bins = np.arange(logits.shape[2], dtype=np.float32)
            regression = (shares / shares.sum(2, keepdims=True)).dot(bins)
        before, behind = regression[:, :2] * size, regression[:, 2:] * size
        edges = np.concatenate([centre - before, centre + behind], 1)
    height, width = decoding["image"]
    return edges.clip(0, np.array([width, height, width, height], np.float32))


def scores_of(decoding, classes, quality=None):
    """(A, K) scores from 0 to 1, without the background."""
    if decoding["scores"] == "softmax":
        shares = np.exp(classes - classes.max(1, keepdims=True))
        return (shares / shares.sum(1, keepdims=True))[:, 1:]
    scores = sigmoid(classes)
    return scores if quality is None else np.sqrt(scores * sigmoid(quality))


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def detect(decoding, outputs):
    """(D, 6) of one image's outputs, (1, A, ...): left, top, right, bottom, score, class."""
    classes, regression = outputs[0][0], outputs[1][0]
    scores = scores_of(decoding, classes, outputs[2][0] if decoding["quality"] else None)
    boxes = boxes_of(decoding, regression)
    score, anchor, kind = candidates(decoding, scores)
    kept = []
    for index in np.argsort(-score, kind="mergesort"):
        mine = boxes[anchor[index]]
        same = [other for other in kept if kind[other] == kind[index]]
        if not same or iou(mine, boxes[anchor[same]]).max() <= decoding["nms_threshold"]:
            kept.append(index)
            if len(kept) == decoding["detections"]:
                break
    rows = [boxes[anchor[kept]], score[kept, None], kind[kept, None]]
    return np.concatenate(rows, 1).astype(np.float32)


def candidates(decoding, scores):
    """(score, anchor, class) of the best of each level or class, by scores of (A, K)."""
    anchor, kind = np.mgrid[: scores.shape[0], : scores.shape[1]]
    if decoding["candidates_of"] == "class":
        parts = [(slice(None), k) for k in range(scores.shape[1])]
    else:
        counts = [rows * columns * len(level["sizes"]) for level in decoding["levels"]
                  for rows, columns in [level["grid"]]]  # fmt: skip
        ends = np.cumsum(counts)
        parts = [slice(end - count, end) for end, count in zip(ends, counts)]
    found = []
    for part in parts:
        score = scores[part].ravel()
        best = np.argsort(-score, kind="mergesort")[: decoding["candidates"]]
        best = best[score[best] > decoding["score_threshold"]]
        found.append([score[best], anchor[part].ravel()[best], kind[part].ravel()[best]])
    return [np.concatenate(column) for column in zip(*found)]


def iou(box, others):
    """(n,) overlap of a box (4,) with others (n, 4), over their union."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = (high - low).clip(0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-9)


def to_original(found, height, width, decoding):
    """Detections (D, 6) of a letterboxed image of (height, width), in its own pixels."""
    high, wide, top, left = placed(height, width, decoding["image"][0], decoding["image"][1])
    scale = np.array([wide / width, high / height] * 2)
    edges = (found[:, :4] - [left, top, left, top]) / scale
    edges = edges.clip(0, [width, height, width, height])
    return np.concatenate([edges, found[:, 4:]], 1)
