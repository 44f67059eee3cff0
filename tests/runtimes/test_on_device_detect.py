"""detect.py, as it lies beside a detector: letterbox against Pillow, boxes against torch's."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from edgekd.runtimes.on_device import detect as on_device
from edgekd.runtimes.on_device.detect import letterbox, placed, resize
from edgekd.tasks import decoding
from edgekd.tasks.decoding import Decoding, Level
from edgekd.tasks.detection import original_pixels

RNG = np.random.default_rng(0)


def photo(height: int, width: int) -> np.ndarray:
    """Smooth and sharp parts."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1)
    noise = RNG.integers(0, 256, (height, width, 3))
    return np.where((x // 9 % 2 == 0)[..., None], smooth, noise).astype(np.uint8)


@pytest.mark.parametrize("size", [(48, 64), (33, 21), (97, 131), (200, 240), (1, 1)])
def test_resizing_is_pillows(size):
    image = photo(97, 131)
    theirs = PIL.Image.fromarray(image).resize(size[::-1], PIL.Image.Resampling.BILINEAR)
    apart = np.abs(resize(image, *size).astype(int) - np.asarray(theirs))
    assert apart.max() <= 1  # Pillow rounds between its two passes
    assert apart.mean() < 0.2


def test_resizing_is_the_mean_that_it_says_it_is():
    image = photo(7, 5)
    got = resize(image, 3, 4)
    for i in range(3):
        for j in range(4):
            weights = [
                np.maximum(0, 1 - np.abs(np.arange(n) + 0.5 - (k + 0.5) * n / m) / max(1, n / m))
                for n, m, k in ((7, 3, i), (5, 4, j))
            ]
            both = np.outer(*weights)
            mean = (image * both[..., None]).sum((0, 1)) / both.sum()
            np.testing.assert_allclose(got[i, j], mean, atol=0.501)


@pytest.mark.parametrize(
    ("image", "size", "wanted"),
    [
        ((480, 640), (160, 160), (120, 160, 20, 0)),
        ((480, 640), (192, 256), (192, 256, 0, 0)),
        ((300, 100), (96, 128), (96, 32, 0, 48)),
        ((3, 1000), (32, 32), (1, 32, 15, 0)),
    ],
)
def test_letterbox_keeps_the_whole_image_in_the_middle(image, size, wanted):
    assert placed(*image, *size) == wanted
    high, wide, top, left = wanted
    pixels = photo(*image)
    canvas = letterbox(pixels, *size)
    inner = canvas[top : top + high, left : left + wide]
    np.testing.assert_array_equal(inner, resize(pixels, high, wide))
    outside = np.ones(size, bool)
    outside[top : top + high, left : left + wide] = False
    assert canvas.shape == (*size, 3)
    assert (canvas[outside] == 114).all()


# ---- boxes -------------------------------------------------------------------------------------

LEVELS = (
    Level(grid=(6, 8), stride=(8, 8), sizes=((8, 8), (12, 20))),
    Level(grid=(3, 4), stride=(16, 16), offset=0.0, sizes=((24, 16),)),
)
CODINGS = [
    {"boxes": "distance"},
    {"boxes": "log_distance", "quality": True},
    {"boxes": "distribution", "bins": 5},
    {"boxes": "offset", "weights": (10, 10, 5, 5), "scores": "softmax", "candidates_of": "class"},
    {"boxes": "distance", "candidates": 9, "detections": 7},
    {"boxes": "distance", "score_threshold": 0.999999},
]


@pytest.mark.parametrize("coding", CODINGS)
def test_boxes_are_those_of_evaluation(coding):
    rules = Decoding(**({"image": (48, 64), "levels": LEVELS, "score_threshold": 0.2} | coding))
    generator = torch.Generator().manual_seed(0)
    anchors = 6 * 8 * 2 + 3 * 4
    heads = [
        torch.randn(2, anchors, width, generator=generator)
        for width in (3, 4 * max(rules.bins, 1), 1)
    ]
    heads[1] = heads[1] * (3 if rules.bins else 0.5) + 1
    heads = heads[: 2 + rules.quality]
    wanted = decoding.detect(rules, heads)
    for image in range(2):
        outputs = [head[image : image + 1].numpy() for head in heads]
        found = on_device.detect(rules.model_dump(mode="json"), outputs)
        count = int((wanted[image, :, 5] >= 0).sum())
        assert found.shape == (count, 6)
        np.testing.assert_allclose(found, wanted[image, :count], rtol=1e-4, atol=1e-4)
        assert (count == 0) == (rules.score_threshold > 0.99)


def test_boxes_come_back_to_the_original_image():
    rules = Decoding(image=(96, 128), levels=LEVELS, boxes="distance")
    rows = np.array([[40, 10, 70, 50, 0.9, 1], [0, 0, 128, 96, 0.8, 0]], np.float32)
    found = on_device.to_original(rows, 300, 100, rules.model_dump(mode="json"))
    high, wide, top, left = placed(300, 100, 96, 128)
    frame = torch.tensor([[100, 300, wide / 100, high / 300, left, top]])
    truth = torch.full((1, 1, 7), -1.0)
    wanted, _ = original_pixels(torch.from_numpy(rows)[None], (truth[..., :5], truth, frame))
    np.testing.assert_allclose(found, wanted[0], rtol=1e-5)


def test_it_is_python_3_6():
    source = Path(str(on_device.__file__)).read_text()
    ast.parse(source, feature_version=(3, 6))
    names = {n.names[0].name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import)}
    assert names == {"numpy"}
    assert not [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
