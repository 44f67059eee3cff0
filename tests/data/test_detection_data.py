"""Detection data: readers, wrong annotations, boxes that move with their pixels."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from edgekd.data.base import Data, evaluation_batches, training_batches, view_batches, views
from edgekd.data.detection import (
    AUGMENTATIONS,
    Boxed,
    augmented,
    unpack,
)
from edgekd.data.readers import read_data
from edgekd.errors import DataError
from edgekd.network import Preprocessing
from edgekd.runtimes.on_device.detect import letterbox

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd-coco.zip"
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))


# ---- readers -----------------------------------------------------------------------------------


def photo(height: int, width: int) -> np.ndarray:
    """Smooth and sharp parts."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1)
    noise = RNG.integers(0, 256, (height, width, 3))
    return np.where((x // 9 % 2 == 0)[..., None], smooth, noise).astype(np.uint8)


def write_image(path: Path, height: int = 40, width: int = 60) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(photo(height, width)).save(path)


def coco(**changes: Any) -> dict[str, Any]:
    """Two images of 40×60 with three boxes."""
    content: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 8, "file_name": "b.png", "width": 60, "height": 40},
        ],
        "categories": [{"id": 5, "name": "cell"}, {"id": 2, "name": "plate"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [10, 5, 20, 30], "area": 400,
             "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 6, 4], "iscrowd": 1},
            {"id": 3, "image_id": 8, "category_id": 2, "bbox": [30.5, 20, 29.5, 20], "area": 590},
        ],
    }  # fmt: skip
    return content | changes


def write_coco(root: Path, **changes: Any) -> Path:
    for name in ("a.png", "b.png"):
        write_image(root / "images" / name)
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        content = coco(**changes) if split == "train" else coco()
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_coco_is_read_into_padded_boxes(tmp_path):
    data = read_data("coco", root=write_coco(tmp_path / "cells"), size=32)
    assert (data.name, data.classes) == ("cells", ("plate", "cell"))
    assert data.image_shape == (3, 32, 32)
    assert set(data.splits) == {"train", "test"}  # what is for validation is the test here
    assert data.preprocessing.fit == "letterbox"
    x, boxes, truth, frame = data.splits["train"].take(torch.arange(2))
    # 40×60 becomes 21×32 with a border of 5 rows above
    pixels = np.asarray(PIL.Image.open(tmp_path / "cells/images/a.png"))
    np.testing.assert_array_equal(x[0].permute(1, 2, 0), letterbox(pixels, 32, 32))
    down, right = 21 / 40, 32 / 60
    np.testing.assert_allclose(frame, [[60, 40, right, down, 0, 5]] * 2, rtol=1e-6)
    np.testing.assert_allclose(
        truth,
        [
            [[1, 10, 5, 30, 35, 400, 0], [0, 0, 0, 6, 4, 24, 1]],
            [[0, 30.5, 20, 60, 40, 590, 0], [-1] * 7],
        ],
    )
    learnt = [1, 10 * right, 5 * down + 5, 30 * right, 35 * down + 5]
    np.testing.assert_allclose(boxes[0], [learnt, [-1] * 5], rtol=1e-6)  # no crowd is learnt
    np.testing.assert_allclose(boxes[1, 0], [0, 30.5 * right, 15.5, 32, 26], rtol=1e-6)


def test_sizes_may_be_two_and_images_grey(tmp_path):
    root = write_coco(tmp_path / "cells")
    data = read_data("coco", root=root, size=(32, 64), channels=1)
    assert data.image_shape == (1, 32, 64)
    grey = np.asarray(PIL.Image.open(root / "images/a.png").convert("L"))[..., None]
    x, *_ = data.splits["train"].take(torch.tensor([0]))
    np.testing.assert_array_equal(x[0].permute(1, 2, 0), letterbox(grey, 32, 64))


def test_a_large_set_is_decoded_when_it_is_asked_for(tmp_path):
    root = write_coco(tmp_path / "cells")
    kept, lazy = (read_data("coco", root=root, size=32, memory_mib=m) for m in (64, 0))
    for a, b in zip(
        kept.splits["train"].take(torch.tensor([1, 0])),
        lazy.splits["train"].take(torch.tensor([1, 0])), strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)
    before = lazy.fingerprint
    os.utime(root / "images/a.png", ns=(0, 0))
    assert read_data("coco", root=root, size=32, memory_mib=0).fingerprint != before
    assert read_data("coco", root=root, size=32).fingerprint == kept.fingerprint


def annotation(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 7, "category_id": 5, "bbox": [10, 5, 20, 30]} | changes


@pytest.mark.parametrize(
    ("wrong", "says", "left"),
    [
        (annotation(9, bbox=[10, 5, 0, 30]), "box without an area .*annotation 9", 0),
        (annotation(9, bbox=[10, 5, 4, -3]), "box without an area .*annotation 9", 0),
        (annotation(9, bbox=[10, 5, 1e-9, 3]), "box without an area .*annotation 9", 0),
        (annotation(9, bbox=[61, 5, 4, 3]), "box outside its image .*annotation 9", 0),
        (annotation(9, bbox=[50, 5, 20, 3]), "box that sticks out of its image, cut to it", 1),
        (annotation(9, bbox=[50, 5, 10.9, 3]), None, 1),  # rounding
        (annotation(9, bbox=[10, 5, 4]), "box that is not four numbers .*annotation 9", 0),
        (annotation(9, bbox=[10, 5, 4, float("nan")]), "box that is not four numbers", 0),
        (annotation(9, bbox=None), "box that is not four numbers", 0),
        (annotation(9, category_id=4), "unknown category .*annotation 9: 4", 0),
        (annotation(9, category_id=[4]), "unknown category", 0),
        (annotation(9, image_id=70), "annotation of an unknown image .*annotation 9: 70", 0),
        (annotation(1), "annotation id twice .*annotation 1", 0),
        ({"image_id": 7, "category_id": 5, "bbox": [1, 1, 1, 1]}, None, 1),  # some have no id
    ],
)  # fmt: skip
def test_wrong_annotations_are_left_out_and_named(tmp_path, capsys, wrong, says, left):
    root = write_coco(tmp_path / "cells", annotations=[*coco()["annotations"], wrong])
    data = read_data("coco", root=root, size=32)
    said = " ".join(capsys.readouterr().err.split())
    _, _, truth, _ = data.splits["train"].take(torch.tensor([0]))
    assert int((truth[0, :, 0] >= 0).sum()) == 2 + left
    assert (truth[..., 3] <= 60).all()
    if says is None:
        assert not said
        read_data("coco", root=root, size=32, strict=True)
        return
    assert re.search(f"1 × {says}", said), said
    with pytest.raises(DataError, match=f"1 × {says}.*or read with strict=False"):
        read_data("coco", root=root, size=32, strict=True)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ({"id": 9, "file_name": "no.png"}, "missing image .*image 9: no.png"),
        ({"id": 9, "file_name": "text.png"}, "file that is no image .*image 9"),
        ({"id": 7, "file_name": "a.png"}, "image id twice .*image 7"),
        ({"id": 9, "file_name": "c.png", "width": 40, "height": 60},
         r"image of another size than annotated \(\(40, 60\) in the file\)"),
    ],
)  # fmt: skip
def test_wrong_images_are_left_out_with_their_boxes(tmp_path, capsys, image, says):
    boxes = [*coco()["annotations"], annotation(9, image_id=image["id"], bbox=[1, 1, 5, 5])]
    root = write_coco(tmp_path / "cells", images=[*coco()["images"], image], annotations=boxes)
    (root / "images/text.png").write_text("no pixels")
    write_image(root / "images/c.png")
    data = read_data("coco", root=root, size=32)
    assert len(data.splits["train"]) == 2
    assert "1 × " in capsys.readouterr().err
    with pytest.raises(DataError, match=f"1 × {says}"):
        read_data("coco", root=root, size=32, strict=True)


def test_many_problems_are_counted_and_five_named(tmp_path, capsys):
    wrong = [annotation(100 + n, bbox=[0, 0, 0, 0]) for n in range(7)]
    root = write_coco(tmp_path / "cells", annotations=[*coco()["annotations"], *wrong])
    read_data("coco", root=root, size=32)
    said = capsys.readouterr().err
    assert "7 × box without an area" in said
    assert "annotation 104, ...)" in " ".join(said.split())
    assert "annotation 105" not in said


def test_no_file_outside_the_folder_is_opened(tmp_path):
    write_image(tmp_path / "secret.png")
    outside = {"id": 9, "file_name": "../../secret.png", "width": 60, "height": 40}
    root = write_coco(tmp_path / "cells", images=[*coco()["images"], outside])
    with pytest.raises(DataError, match=r"'\.\./\.\./secret\.png' leads out of"):
        read_data("coco", root=root, size=32)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "has no list of images"),
        (json.dumps(coco(annotations=[1])), "has no list of annotations"),
        (json.dumps(coco(categories=[])), "has no category"),
        (json.dumps(coco(categories=[{"id": 1}])), "a category lacks its id or name"),
        (json.dumps(coco(categories=[{"id": 1, "name": "x"}] * 2)), "or two with one id"),
        (json.dumps(coco(categories=[{"id": 5, "name": "x"}])), "other splits have"),
        (json.dumps(coco(images=[])), "none of its images is in"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, says):
    root = write_coco(tmp_path / "cells")
    (root / "annotations/instances_val.json").write_text(content)
    with pytest.raises(DataError, match=f"instances_val.json.*{says}"):
        read_data("coco", root=root, size=32)


def test_splits_must_be_there_once(tmp_path):
    root = write_coco(tmp_path / "cells")
    (root / "annotations/panoptic_train.json").write_text("{}")
    with pytest.raises(DataError, match=r"instances_train\.json, panoptic_train\.json for 'train'"):
        read_data("coco", root=root, size=32)
    (root / "annotations/panoptic_train.json").unlink()
    (root / "annotations/instances_val.json").unlink()
    with pytest.raises(DataError, match=r"has train; it needs files \*train\*\.json"):
        read_data("coco", root=root, size=32)


@pytest.mark.parametrize("missing", ["root", "size"])
def test_root_and_size_are_needed(tmp_path, missing):
    given = {"root": tmp_path, "size": 32}
    del given[missing]
    with pytest.raises(DataError, match=f"coco needs {missing}"):
        read_data("coco", **given)


def test_classification_takes_no_annotations(tmp_path):
    with pytest.raises(DataError, match="image-folder has no boxes; remove annotations"):
        read_data("image-folder", root=tmp_path, size=8, annotations=tmp_path)
    with pytest.raises(DataError, match=r"size is \(8, 9\); image-folder takes one number"):
        read_data("image-folder", root=tmp_path, size=(8, 9))


@pytest.mark.parametrize("layout", ["images/{}", "{}/images"])
def test_yolo_is_read_like_coco(tmp_path, layout, capsys):
    root = tmp_path / "cells"
    for split in ("train", "test"):
        for name in ("a", "b", "c"):
            write_image(root / layout.format(split) / f"{name}.png")
        labels = root / layout.format(split).replace("images", "labels")
        labels.mkdir(parents=True)
        (labels / "a.txt").write_text("1 0.5 0.5 0.5 0.5\n0 0.1 0.2 0.1 0.2\n\n")
        (labels / "b.txt").write_text("")  # and c has none: both are images without boxes
    (root / "classes.txt").write_text("plate\ncell\n")
    data = read_data("yolo", root=root, size=(40, 60))
    assert data.classes == ("plate", "cell")
    assert not capsys.readouterr().err
    _, boxes, truth, _ = data.splits["test"].take(torch.arange(3))
    wanted = [[1, 15, 10, 45, 30, 600, 0], [0, 3, 4, 9, 12, 48, 0]]
    np.testing.assert_allclose(truth[0], wanted, rtol=1e-6)
    np.testing.assert_allclose(boxes[0], np.array(wanted)[:, :5], rtol=1e-6)
    assert (boxes[1:] == -1).all()
    (labels / "a.txt").write_text(
        "1 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n2 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5\nx 1 1 1 1\n"
        "1 0.5 0.5 0 0.5\n0 0.9 0.5 0.5 0.5\n1 3 0.5 0.5 0.5\n"
    )
    with pytest.raises(DataError) as caught:
        read_data("yolo", root=root, size=32, strict=True)
    for problem in (
        "1 × line twice (a.txt:2)", "1 × unknown category (a.txt:3: 2)",
        "2 × line that is not `class x y width height` (a.txt:4, a.txt:5)",
        "1 × box without an area (a.txt:6)", "1 × box that sticks out of its image, cut to it",
        "1 × box outside its image (a.txt:8)",
    ):  # fmt: skip
        assert problem in str(caught.value)


def test_a_split_without_any_box_is_refused(tmp_path):
    for split in ("train", "test"):
        write_image(tmp_path / "images" / split / "a.png")  # and no labels beside them
    (tmp_path / "classes.txt").write_text("cell\n")
    with pytest.raises(DataError, match="split 'train' has 1 images and not one box"):
        read_data("yolo", root=tmp_path, size=32)


def test_yolo_needs_the_names_of_its_classes(tmp_path):
    with pytest.raises(DataError, match=r"classes\.txt cannot be read: .*one class name a line"):
        read_data("yolo", root=tmp_path, size=32)


# ---- archives ----------------------------------------------------------------------------------


def test_a_zip_is_unpacked_once(tmp_path):
    root = write_coco(tmp_path / "cells")
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as archive:
        for path in root.rglob("*.*"):
            archive.write(path, Path("inside") / path.relative_to(root))
    data = read_data("coco", root=tmp_path / "cells.zip", size=32)
    assert data.fingerprint == read_data("coco", root=root, size=32).fingerprint
    place = unpack(tmp_path / "cells.zip")
    assert place.is_relative_to(tmp_path / "home")
    (place / "mark").write_text("")
    assert (unpack(tmp_path / "cells.zip") / "mark").exists()
    assert not list(place.parent.parent.glob("*.zip.*"))


@pytest.mark.parametrize(
    "name", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:x"]
)
def test_a_zip_that_leads_out_of_itself_is_not_opened(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("images/a.txt", "fine")
        archive.writestr(zipfile.ZipInfo(name), "not fine")
    with pytest.raises(DataError, match="leads out of it: not opened"):
        unpack(tmp_path / "bad.zip")
    assert not list(tmp_path.rglob("*.txt"))


def test_links_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        link = zipfile.ZipInfo("images")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
    with pytest.raises(DataError, match="'images', which leads out of it"):
        unpack(tmp_path / "bad.zip")


def test_what_is_no_zip_is_named(tmp_path):
    (tmp_path / "bad.zip").write_text("no")
    for name in ("bad.zip", "absent.zip"):
        with pytest.raises(DataError, match=f"{name} cannot be read as a zip"):
            unpack(tmp_path / name)


@pytest.mark.skipif(not BCCD.is_file(), reason="needs ../shared/data/bccd-coco.zip")
def test_bccd_has_what_its_makers_say(tmp_path):
    data = read_data("coco", root=BCCD, size=(96, 128), strict=True)
    assert data.classes == ("RBC", "WBC", "Platelets")
    counts = {split: len(images) for split, images in data.splits.items()}
    assert counts == {"train": 205, "val": 87, "test": 72}
    boxes = sum(int((images.targets[1][..., 0] >= 0).sum()) for images in data.splits.values())
    assert boxes == 4886


# ---- images with boxes in memory, batches and augmentation -------------------------------------


def toy(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of one colour on grey noise, (n, 3, 32, 48), two boxes each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(90, 120, (n, 3, 32, 48), generator=generator, dtype=torch.uint8)
    boxes = torch.full((n, 3, 5), -1.0)
    for image in range(n):
        for row in range(2):
            left, top = (int(torch.randint(2, 24, (1,), generator=generator)) for _ in range(2))
            boxes[image, row] = torch.tensor([row, left, top, left + 8, top + 6])
            x[image, :, top : top + 6, left : left + 8] = 255 * row
    return x, boxes


def toy_data(augment: tuple[str, ...] = ()) -> Data:
    images = Boxed(*toy())
    known = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, fit="letterbox")
    return Data("toy", {"train": images, "test": images}, ("a", "b"), known, augment, AUGMENTATIONS)


def test_batches_carry_all_targets():
    x, boxes = toy()
    (batch,) = evaluation_batches(toy_data())
    assert [tuple(t.shape) for t in batch] == [(6, 3, 32, 48), (6, 3, 5), (6, 3, 7), (6, 6)]
    assert torch.equal(batch[1], boxes)
    assert torch.equal(batch[3], torch.tensor([[48.0, 32, 1, 1, 0, 0]]).repeat(6, 1))
    torch.testing.assert_close(batch[0], (x.float() / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("augment", [("flip",), ("scale",), ("colour",), AUGMENTATIONS.names])
def test_augmented_batches_are_a_function_of_seed_epoch_and_step(augment):
    data = toy_data(augment)

    def drawn(**options: int) -> list[tuple[torch.Tensor, ...]]:
        return list(training_batches(data, batch_size=2, **{"seed": 1, "epoch": 0} | options))

    torch.manual_seed(5)
    first = drawn()
    torch.manual_seed(6)
    for again, batches in ((first, drawn()), (first[1:], drawn(start=1))):
        for one, other in zip(again, batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(first[0][0], drawn(epoch=1)[0][0])


def test_flipped_images_are_the_views_of_the_cache():
    data = toy_data(("flip",))
    assert views(data) == 2
    everything = torch.cat(list(view_batches(data, 4)))
    flipped = 0
    for x, boxes, _, _, keys in training_batches(data, batch_size=3, seed=0, epoch=0, keyed=True):
        assert torch.equal(x, everything[keys])
        for image, row, key in zip(x, boxes, keys.tolist(), strict=True):
            flipped += key >= 6
            _, original = toy()
            wanted = original[key % 6].clone()
            if key >= 6:
                wanted[:2, [1, 3]] = 48 - original[key % 6][:2, [3, 1]]
            torch.testing.assert_close(row, wanted)
            assert_boxes_hold_their_squares(image * 0.25 + 0.5, row)
    assert 0 < flipped < 6


def assert_boxes_hold_their_squares(image: torch.Tensor, rows: torch.Tensor) -> None:
    """Within a box its colour, as far as no later square covers it; not outside of all boxes."""
    for index, (kind, left, top, right, bottom) in enumerate(rows.tolist()):
        if kind < 0:
            continue
        later = rows[index + 1 :]
        y, x = (top + bottom) / 2, (left + right) / 2
        covered = any(k >= 0 and a < x < c and b < y < d for k, a, b, c, d in later.tolist())
        if not covered:
            value = float(image[:, int(y), int(x)].mean())
            assert abs(value - kind) < 0.2


def test_scaled_boxes_move_with_their_pixels():
    x, boxes = toy(4)
    seen = set()
    for seed in range(12):
        images, (moved, *_), flipped = augmented(
            x, (boxes,), ("scale",), torch.Generator().manual_seed(seed)
        )
        assert not flipped.any()
        assert images.shape == x.shape and images.dtype == torch.uint8
        for image, rows in zip(images, moved, strict=True):
            assert_boxes_hold_their_squares(image.float() / 255, rows)
            there = rows[rows[:, 0] >= 0]
            seen.add(len(there))
            assert (there[:, 1:] >= 0).all()
            assert (there[:, [1, 3]] <= 48).all() and (there[:, [2, 4]] <= 32).all()
            assert (there[:, 3:] > there[:, 1:3]).all()
            # 8 × 6 pixels times the zoom, unless they are cut
            inside = (there[:, 1:] > 0).all(1) & (there[:, 3] < 48) & (there[:, 4] < 32)
            sides = there[inside][:, 3:] - there[inside][:, 1:3]
            assert torch.allclose(sides[:, 0] / 8, sides[:, 1] / 6, atol=1e-4)
            assert ((sides[:, 0] / 8 > 0.59) & (sides[:, 0] / 8 < 1.61)).all()
    assert {1, 2} <= seen  # some are cut away


def test_a_box_of_which_little_is_left_goes():
    x = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    boxes = torch.tensor([[[0, 0, 0, 4, 4.0], [1, 20, 12, 28, 20.0]]])
    found = []
    for seed in range(40):
        _, (moved,), _ = augmented(x, (boxes,), ("scale",), torch.Generator().manual_seed(seed))
        corner, middle = moved[0]
        found.append(bool(corner[0] >= 0))
        if corner[0] < 0:
            assert (corner == -1).all()
        assert middle[0] == 1  # the middle never leaves
    assert 0 < sum(found) < 40


def test_colour_moves_no_box():
    x, boxes = toy()
    images, (moved, *_), _ = augmented(x, (boxes,), ("colour",), torch.Generator().manual_seed(0))
    assert torch.equal(moved, boxes)
    assert not torch.equal(images, x)
    grey = x[:, :1]
    images, _, _ = augmented(grey, (boxes,), ("colour",), torch.Generator().manual_seed(0))
    assert images.shape == grey.shape


def test_an_unknown_augmentation_is_named():
    with pytest.raises(DataError, match="unknown augmentation 'scael'; did you mean 'scale'"):
        toy_data(("scael",))


def test_subsets_are_balanced_over_the_rarest_class():
    x, boxes = toy(6)
    boxes[:, 1] = -1
    boxes[4, 1] = torch.tensor([1, 1, 1, 5, 5])
    boxes[5] = -1
    data = toy_data()
    images = Boxed(x, boxes)
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 0]
    data = Data("toy", {"train": images, "test": images}, ("a", "b"), data.preprocessing)
    few = data.subset(train=2)
    assert few.splits["train"].labels.sort().values.tolist() == [0, 1]
    _, kept, _, _ = few.splits["train"].take(torch.arange(2))
    assert (kept[..., 0] == 1).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, b: (x.float(), b), r"images are torch\.float32"),
        (lambda x, b: (x[:2], b), r"they must be uint8 of \(6, C, H, W\)"),
        (lambda x, b: (x, b[..., :4]), r"boxes are \(6, 3, 4\); they must be \(N, M, 5\)"),
        (lambda x, b: (x, b[:, :0]), r"boxes are \(6, 0, 5\)"),
        (lambda x, b: (x, b[..., [0, 3, 2, 1, 4]]), "right and bottom must be larger"),
    ],
)
def test_images_and_boxes_that_do_not_fit_are_refused(change, says):
    with pytest.raises(DataError, match=says):
        Boxed(*change(*toy()))


def test_fingerprints_change_with_pixels_and_boxes():
    x, boxes = toy()
    same = Boxed(x.clone(), boxes.clone()).fingerprint
    assert Boxed(x, boxes).fingerprint == same
    x[0, 0, 0, 0] += 1
    assert Boxed(x, boxes).fingerprint != same
    x[0, 0, 0, 0] -= 1
    boxes[0, 0, 3] += 1
    assert Boxed(x, boxes).fingerprint != same


def test_a_class_beyond_the_names_is_refused():
    x, boxes = toy()
    boxes[..., 0][boxes[..., 0] >= 0] = 2
    images = Boxed(x, boxes)
    with pytest.raises(DataError, match="label 2 of image 0 in 'train'; there are 2 classes"):
        Data("toy", {"train": images, "test": images}, ("a", "b"), toy_data().preprocessing)
