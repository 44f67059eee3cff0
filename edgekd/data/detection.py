"""Detection data: COCO JSON and YOLO text files, letterboxed, with boxes that augmentation moves.

An image is letterboxed to the input's size by `edgekd/runtimes/on_device/detect.py`, which says how
exactly, and does the same on a device.

Example of a folder (or a zip with it inside), for `source = "coco"`:

    bccd/images/BloodImage_00001.jpg ...
    bccd/annotations/instances_train.json, instances_val.json, instances_test.json

and for `source = "yolo"`, with one class name a line in classes.txt:

    cells/classes.txt
    cells/images/train/1.jpg ...   cells/labels/train/1.txt ...   (and val, test)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from edgekd.data.base import SPLITS, Augmentations, Data, Images, coloured, sha256
from edgekd.data.readers import (
    cache_folder,
    channel_statistics,
    decode_in_threads,
    open_image,
    tracked,
)
from edgekd.errors import DataError
from edgekd.reporting.progress import console
from edgekd.runtimes.on_device.detect import GREY, letterbox, placed

VISIBLE = 0.25  # of a box must stay in the image, else augmentation drops it
ZOOM = (0.6, 1.6)
SMALLEST = 0.01  # pixels that the sides of a box have at least
TOLERANCE = 1.0  # pixels that a box may stick out without being counted: rounding
NAMED = 5  # problems that a message spells out

Pixels = NDArray[np.uint8]
Box = tuple[float, ...]  # class, left, top, right, bottom, area, whether it is a crowd


@dataclass(frozen=True)
class Labelled:
    """An image file of (height, width) pixels and its boxes."""

    path: Path
    height: int
    width: int
    boxes: tuple[Box, ...]


# what is wrong with annotations: kind of problem -> where, one entry each
Problems = defaultdict[str, list[str]]


def read_detection(
    source: str,
    *,
    root: Path,
    size: int | tuple[int, int],
    annotations: Path | None = None,
    images: Path | None = None,
    augment: Sequence[str] = (),
    channels: int | None = None,
    train: int | None = None,
    test: int | None = None,
    strict: bool = False,
    memory_mib: int = 4096,
) -> Data:
    """Read images with boxes, see the head of this module.

    What is wrong with the annotations is counted and named on the terminal. Left out are images
    that are missing, cannot be opened, are listed twice or are of another size than the annotations
    say, and boxes of unknown categories or images, without an area, listed twice or outside their
    image; a box that sticks out is cut to the image.

    Args:
        source: "coco" or "yolo".
        root: the folder, or a zip of it, which is unpacked into the cache once.
        size: of the input: (height, width), or one number for both.
        annotations: the folder of COCO's JSON files, one for each split with its name in their
            own, or YOLO's file of class names; root/annotations and root/classes.txt otherwise.
        images: COCO's folder of images; it is looked for in `root` otherwise.
        augment: of "flip", "scale" and "colour".
        channels: 1 reads the images in grey.
        train, test: use only so many images, balanced over the rarest class in each.
        strict: refuse what is wrong instead.
        memory_mib: a set that is larger once decoded is decoded batch by batch instead.

    Raises:
        DataError: files that are missing, damaged or do not fit together; with `strict` any of the
            problems above.
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    if min(height, width) < 1:
        raise DataError(f"size is {size}; height and width must be 1 or more")
    if root.suffix == ".zip":
        root = unpack(root)
    problems: Problems = defaultdict(list)
    if source == "coco":
        splits, classes = _coco(root, annotations, images, problems)
    else:
        splits, classes = _yolo(root, annotations, problems)
    if problems:
        said = "; ".join(
            f"{len(where)} × {kind} ({', '.join(where[:NAMED])}{', ...' * (len(where) > NAMED)})"
            for kind, where in problems.items()
        )
        if strict:
            raise DataError(f"{root}: {said}; mend the annotations, or read with strict=False")
        console.print(f"{root.name}: left out or mended: {said}", markup=False)
    made: dict[str, Images] = {}
    shape = (channels or 3, height, width)
    pixels = sum(map(len, splits.values())) * math.prod(shape)
    for split, records in splits.items():
        if not records:
            raise DataError(f"{root}: split {split!r} has no image left; it needs one")
        if not any(record.boxes for record in records):
            raise DataError(
                f"{root}: split {split!r} has {len(records)} images and not one box; see that the "
                "annotations lie where they are looked for"
            )
        made[split] = letterboxed(records, shape, split, in_memory=pixels <= memory_mib * 2**20)
    statistics = channel_statistics(made["train"])
    data = Data(
        root.name, made, classes,
        statistics.model_copy(update={"fit": "letterbox"}),
        tuple(augment), AUGMENTATIONS,
    )  # fmt: skip
    return data.subset(train, test)


# ---- images with boxes -------------------------------------------------------------------------


class Boxed:
    """Images of one shape with padded boxes, as `edgekd.tasks.detection` wants them.

    Args:
        images: (N, C, H, W) uint8, or a function from indices (n,) to (n, C, H, W).
        boxes: (N, M, 5): class, left, top, right, bottom in pixels of the input; class −1: none.
        truth: (N, M, 7): the same in pixels of the original image, area and crowd; None: the
            boxes are the truth, and the images are the original ones.
        frame: (N, 6): width and height of the original image, its scale in x and y, and the left
            and top border in the input.
        identity: changes whenever an image does, where `images` is a function.

    Raises:
        DataError: another shape or type, or a box without an area.
    """

    def __init__(
        self,
        images: Tensor | Callable[[Tensor], Tensor],
        boxes: Tensor,
        truth: Tensor | None = None,
        frame: Tensor | None = None,
        *,
        identity: str = "",
    ) -> None:
        if boxes.dim() != 3 or boxes.shape[2] != 5 or not boxes.shape[1]:
            raise DataError(
                f"boxes are {tuple(boxes.shape)}; they must be (N, M, 5) with M of 1 or more: "
                "class, left, top, right, bottom, and class -1 where there is none"
            )
        if isinstance(images, Tensor) and (images.dtype, images.dim(), len(images)) != (
            torch.uint8, 4, len(boxes),
        ):  # fmt: skip
            raise DataError(
                f"images are {images.dtype} of {tuple(images.shape)}; they must be uint8 of "
                f"({len(boxes)}, C, H, W), one for each row of boxes"
            )
        boxes = boxes.float()
        there = boxes[..., 0] >= 0
        flat = there & (boxes[..., 3:] <= boxes[..., 1:3]).any(-1)
        if flat.any():
            image, row = flat.nonzero()[0].tolist()
            raise DataError(
                f"box {row} of image {image} is {boxes[image, row].tolist()}; right and bottom "
                "must be larger than left and top"
            )
        self._images, self._identity = images, identity
        if truth is None or frame is None:
            area = (boxes[..., 3:] - boxes[..., 1:3]).prod(-1, keepdim=True)
            truth = torch.cat([boxes, area, torch.zeros_like(area)], -1)
            *_, height, width = self._pixels(torch.tensor([0])).shape
            frame = torch.tensor([[width, height, 1, 1, 0, 0]]).expand(len(boxes), -1)
        self.targets = (boxes, truth.float(), frame.float())
        self.labels = _rarest(boxes[..., 0].long())

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images and targets."""
        targets = [t.contiguous().numpy().data for t in self.targets]
        if not isinstance(self._images, Tensor):
            return sha256(self._identity.encode(), *targets)
        shape = repr(tuple(self._images.shape)).encode()
        return sha256(shape, self._images.contiguous().numpy().data, *targets)

    def take(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Images (n, C, H, W) uint8, boxes, truth and frame of `indices` (n,)."""
        return self._pixels(indices), *(t[indices] for t in self.targets)

    def _pixels(self, indices: Tensor) -> Tensor:
        return self._images[indices] if isinstance(self._images, Tensor) else self._images(indices)


def _rarest(kinds: Tensor) -> Tensor:
    """(N,) the class in each image that occurs least of all, for balanced subsets; else 0."""
    counts = torch.bincount(kinds[kinds >= 0], minlength=1)
    frequency = torch.where(kinds >= 0, counts[kinds.clamp(min=0)], len(kinds.flatten()) + 1)
    return kinds.gather(1, frequency.argmin(1, keepdim=True))[:, 0].clamp(min=0)


def letterboxed(
    records: Sequence[Labelled], shape: tuple[int, int, int], split: str, *, in_memory: bool
) -> Boxed:
    """Images of (C, H, W) = `shape`, and where their boxes are in them.

    Args:
        split: for the progress bar.
        in_memory: decode all of them now; else those that are asked for, each time.
    """
    channels, height, width = shape
    most = max(1, *(len(record.boxes) for record in records))
    truth = torch.full((len(records), most, 7), -1.0, dtype=torch.float64)
    frame = torch.zeros(len(records), 6, dtype=torch.float64)
    for row, record in enumerate(records):
        high, wide, top, left = placed(record.height, record.width, height, width)
        scale = wide / record.width, high / record.height
        frame[row] = torch.tensor([record.width, record.height, *scale, left, top])
        if record.boxes:
            truth[row, : len(record.boxes)] = torch.tensor(record.boxes, dtype=torch.float64)
    zoom, border = frame[:, None, 2:4].repeat(1, 1, 2), frame[:, None, 4:].repeat(1, 1, 2)
    boxes = torch.cat([truth[..., :1], truth[..., 1:5] * zoom + border], -1)
    boxes[(truth[..., 0] < 0) | (truth[..., 6] > 0)] = -1  # nothing is learnt from crowds

    def decode(index: int) -> Pixels:
        image = open_image(records[index].path).convert("L" if channels == 1 else "RGB")
        array = np.asarray(image).reshape(image.height, image.width, channels)
        pixels: Pixels = letterbox(array, height, width).transpose(2, 0, 1)
        return pixels

    def decoded(indices: Tensor) -> Tensor:
        return decode_in_threads(decode, indices)

    if in_memory:
        chunks = torch.split(torch.arange(len(records)), 256)
        pixels = torch.cat([decoded(part) for part in tracked(chunks, f"decoding {split}")])
        return Boxed(pixels, boxes, truth, frame)
    stats = [(record.path.name, record.path.stat()) for record in records]
    identity = json.dumps([shape, [(name, s.st_size, s.st_mtime_ns) for name, s in stats]])
    return Boxed(decoded, boxes, truth, frame, identity=identity)


# ---- augmentation ------------------------------------------------------------------------------


def augmented(
    x: Tensor, targets: tuple[Tensor, ...], augment: Sequence[str], generator: Generator
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Images and their boxes after those of "flip", "scale" and "colour" that are in `augment`.

    "flip": left and right, half of the images. "scale": 0.6 to 1.6 times as large, evenly over the
    logarithm, moved as far as the middle of the image allows, grey around it; a box goes with less
    than a quarter of it left. "colour": brightness, contrast and saturation times 0.7 to 1.3.
    Truth and frame stay those of the original image.
    """
    boxes, *rest = targets
    chances = torch.rand(len(x), 7, generator=generator)
    flipped = (chances[:, 0] < 0.5) & ("flip" in augment)
    images, moved = [], []
    for image, of_image, flips, row in zip(x, boxes, flipped, chances.tolist(), strict=True):
        size = (image.shape[1], image.shape[2])
        corners = tv_tensors.BoundingBoxes(
            of_image[:, 1:], format="XYXY", canvas_size=size, clamping_mode=None
        )
        if flips:
            image, corners = (transforms.horizontal_flip(each) for each in (image, corners))
        if "scale" in augment:
            low, high = map(math.log, ZOOM)
            zoom = math.exp(low + (high - low) * row[1])
            reach = [abs(1 - zoom) * side for side in reversed(size)]
            shift = [int(r * (c - 0.5)) for r, c in zip(reach, row[2:4], strict=True)]
            image, corners = (
                transforms.affine(
                    each, angle=0, translate=shift, scale=zoom, shear=[0, 0],
                    interpolation=InterpolationMode.BILINEAR, fill=GREY,
                )
                for each in (image, corners)
            )  # fmt: skip
        if "colour" in augment:
            image = coloured(image, row[4:])
        images.append(image)
        moved.append(_visible(of_image[:, 0], corners.as_subclass(Tensor), size))
    return torch.stack(images), (torch.stack(moved), *rest), flipped


def _visible(kinds: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """(M, 5) boxes cut to the image; −1 for those of which too little is left."""
    height, width = size
    limits = corners.new_tensor([width, height, width, height])
    inside = torch.minimum(corners.clamp(min=0), limits)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(-1) for b in (corners, inside)]
    stays = (kinds >= 0) & (areas[1] >= VISIBLE * areas[0]) & (areas[1] > 0)
    return torch.cat([kinds[:, None], inside], 1).masked_fill(~stays[:, None], -1)


AUGMENTATIONS = Augmentations(("flip", "scale", "colour"), augmented)


# ---- COCO --------------------------------------------------------------------------------------

Splits = dict[str, list[Labelled]]


def _coco(
    root: Path, annotations: Path | None, images: Path | None, problems: Problems
) -> tuple[Splits, tuple[str, ...]]:
    folder = annotations or root / "annotations"
    files: dict[str, Path] = {}
    for split in SPLITS:
        found = sorted(folder.glob(f"*{split}*.json"))
        if len(found) > 1:
            said = ", ".join(path.name for path in found)
            raise DataError(f"{folder} holds {said} for {split!r}; leave one of them there")
        files |= {split: found[0]} if found else {}
    _need_splits(files, folder, "files *train*.json and *test*.json (or *val*.json)")
    splits, known = {}, None
    for split, file in files.items():
        content = _json(file)
        names = _categories(content, file)
        if known is not None and names != known:
            raise DataError(f"{file} has the categories {names}; other splits have {known}")
        known = names
        place = _image_folder(root, images, file, content)
        splits[split] = coco_records(content, place, names, problems, file.name)
    assert known is not None
    return _with_test(splits), tuple(known[key] for key in sorted(known))


def _need_splits(found: Mapping[str, Any], where: Path, what: str) -> None:
    if "train" not in found or not {"val", "test"} & found.keys():
        raise DataError(f"{where} has {', '.join(found) or 'no split'}; it needs {what}")


def _with_test(splits: Splits) -> Splits:
    """What there is for validation is the test split, where there is no other."""
    return splits if "test" in splits else {"train": splits["train"], "test": splits["val"]}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}; fetch it again") from None
    for key in ("images", "annotations", "categories"):
        items = content.get(key) if isinstance(content, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise DataError(f"{file} has no list of {key}; COCO's files of instances have one")
    return dict(content)


def _number(item: Mapping[str, Any], key: str) -> int | str | None:
    """An id; None where it is absent or no id at all."""
    found = item.get(key)
    return found if isinstance(found, int | str) else None


def _categories(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    try:
        names = {int(c["id"]): str(c["name"]) for c in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: a category lacks its id or name: {error}") from None
    if not names or len(names) != len(content["categories"]):
        raise DataError(f"{file} has no category, or two with one id; give each an id of its own")
    return names


def _image_folder(root: Path, images: Path | None, file: Path, content: Mapping[str, Any]) -> Path:
    """The folder that holds any image of the file."""
    stem = file.stem.removeprefix("instances_")
    places = [root / "images" / stem, root / stem, root / "images", root]
    if images is not None:
        places = [images / stem, images]
    names = [str(item.get("file_name")) for item in content["images"]]
    for place in places:
        if any((place / name).is_file() for name in names):
            return place
    looked = ", ".join(map(str, places))
    raise DataError(f"{file}: none of its images is in {looked}; give images = their folder")


def coco_records(
    content: Mapping[str, Any],
    folder: Path,
    categories: Mapping[int, str],
    problems: Problems,
    name: str,
) -> list[Labelled]:
    """The images of a COCO file with their boxes; what is wrong goes to `problems`.

    Args:
        content: with lists of images and annotations.
        folder: where the images are.
        categories: id -> name; classes are their ids in order.
        name: of the file, for messages.

    Raises:
        DataError: an image's file name that leads out of the folder.
    """
    sizes: dict[int | str | None, tuple[Path, int, int]] = {}
    left_out: set[int | str | None] = set()
    for item in content["images"]:
        number = _number(item, "id")
        where = f"{name}, image {number}"
        if number in sizes or number in left_out:
            problems["image id twice"].append(where)
            continue
        path = _within(folder, str(item.get("file_name")), where)
        if size := _size(path, problems, where):
            said = item.get("height", size[0]), item.get("width", size[1])
            if said != size:
                problems[f"image of another size than annotated ({size} in the file)"].append(where)
                size = None
        if size:
            sizes[number] = (path, *size)
        else:
            left_out.add(number)
    order: dict[int | str | None, int] = {key: i for i, key in enumerate(sorted(categories))}
    boxes: dict[int | str | None, list[Box]] = {number: [] for number in sizes}
    seen: set[int | str] = set()
    for index, item in enumerate(content["annotations"]):
        number, image = _number(item, "id"), _number(item, "image_id")
        kind = order.get(_number(item, "category_id"))
        where = f"{name}, annotation {f'at {index}' if number is None else number}"
        if number in seen:
            problems["annotation id twice"].append(where)
        elif kind is None:
            problems["unknown category"].append(f"{where}: {item.get('category_id')}")
        elif image not in sizes:
            if image not in left_out:
                problems["annotation of an unknown image"].append(f"{where}: {image}")
        else:
            _, height, width = sizes[image]
            corners = _corners(item.get("bbox"), width, height, problems, where)
            if corners is not None:
                area = item.get("area") or math.prod(item["bbox"][2:])
                crowd = bool(item.get("iscrowd"))
                boxes[image].append((kind, *corners, area, crowd))
        if number is not None:
            seen.add(number)
    return [
        Labelled(path, height, width, tuple(boxes[number]))
        for number, (path, height, width) in sizes.items()
    ]


def _within(folder: Path, name: str, where: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{where}: file_name {name!r} leads out of {folder}; that is not opened")
    return path


def _size(path: Path, problems: Problems, where: str) -> tuple[int, int] | None:
    """(height, width) as the file's head says."""
    if not path.is_file():
        problems["missing image"].append(f"{where}: {path.name}")
        return None
    try:
        with PIL.Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        problems["file that is no image"].append(f"{where}: {path.name}")
        return None


def _corners(
    box: Any, width: int, height: int, problems: Problems, where: str
) -> tuple[float, ...] | None:
    """Left, top, right, bottom within the image, of [left, top, width, height]."""
    try:
        left, top, wide, high = map(float, box)
    except (TypeError, ValueError):
        left = math.nan
    if not math.isfinite(left) or not all(map(math.isfinite, (top, wide, high))):
        problems["box that is not four numbers"].append(where)
        return None
    if min(wide, high) < SMALLEST:
        problems["box without an area"].append(where)
        return None
    whole = left, top, left + wide, top + high
    limits = width, height, width, height
    inside = tuple(min(max(v, 0.0), float(m)) for v, m in zip(whole, limits, strict=True))
    if min(inside[2] - inside[0], inside[3] - inside[1]) < SMALLEST:
        problems["box outside its image"].append(where)
        return None
    if max(abs(a - b) for a, b in zip(whole, inside, strict=True)) > TOLERANCE:
        problems["box that sticks out of its image, cut to it"].append(where)
    return inside


# ---- YOLO --------------------------------------------------------------------------------------


def _yolo(root: Path, names: Path | None, problems: Problems) -> tuple[Splits, tuple[str, ...]]:
    file = names or root / "classes.txt"
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read: {error}; write one class name a line there, in the order of "
            "their numbers, or give annotations = such a file"
        ) from None
    classes = tuple(line for line in lines if line)
    folders: dict[str, tuple[Path, Path]] = {}
    for split in SPLITS:
        for images, labels in (
            (root / "images" / split, root / "labels" / split),
            (root / split / "images", root / split / "labels"),
        ):
            if images.is_dir():
                folders.setdefault(split, (images, labels))
    _need_splits(folders, root, "images/train and images/test (or images/val)")
    splits = {
        split: list(_yolo_records(images, labels, classes, problems))
        for split, (images, labels) in folders.items()
    }
    return _with_test(splits), classes


def _yolo_records(
    images: Path, labels: Path, classes: Sequence[str], problems: Problems
) -> Iterable[Labelled]:
    """One record for each image; one without a text file has no boxes."""
    suffixes = PIL.Image.registered_extensions()
    for path in sorted(images.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        size = _size(path, problems, str(images))
        if size is None:
            continue
        file = labels / f"{path.stem}.txt"
        boxes: list[Box] = []
        lines = file.read_text().splitlines() if file.is_file() else []
        for number, line in enumerate(lines, 1):
            where = f"{file.name}:{number}"
            if line in lines[: number - 1] and line.strip():
                problems["line twice"].append(where)
            elif line.strip():
                boxes += _yolo_box(line.split(), *size, classes, problems, where)
        yield Labelled(path, *size, tuple(boxes))


def _yolo_box(
    words: Sequence[str],
    height: int,
    width: int,
    classes: Sequence[str],
    problems: Problems,
    where: str,
) -> list[Box]:
    """Of `class x y width height`, the middle and the sides as shares of the image's."""
    try:
        kind, x, y, wide, high = int(words[0]), *map(float, words[1:])
    except ValueError:
        problems["line that is not `class x y width height`"].append(where)
        return []
    if not 0 <= kind < len(classes):
        problems["unknown category"].append(f"{where}: {kind}")
        return []
    box = (x - wide / 2) * width, (y - high / 2) * height, wide * width, high * height
    corners = _corners(box, width, height, problems, where)
    if corners is None:
        return []
    area = (corners[2] - corners[0]) * (corners[3] - corners[1])
    return [(float(kind), *corners, area, 0.0)]


# ---- archives ----------------------------------------------------------------------------------


def unpack(archive: Path) -> Path:
    """The folder that a zip's content is in, unpacked into the cache once.

    Raises:
        DataError: not a zip, more than fits on the disk, or names and links that lead out of it.
    """
    try:
        facts = archive.stat()
        content = zipfile.ZipFile(archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} cannot be read as a zip: {error}") from None
    key = sha256(f"{archive.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode())
    place = cache_folder(f"{archive.stem}-{key[:12]}")
    with content:
        if not place.is_dir():
            _unpack(content, archive, place)
    inside = [path for path in place.iterdir() if path.name != "__MACOSX"]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else place


def _unpack(content: zipfile.ZipFile, archive: Path, place: Path) -> None:
    for item in content.infolist():
        name = PurePosixPath(item.filename.replace("\\", "/"))
        linked = stat.S_ISLNK(item.external_attr >> 16)
        if name.is_absolute() or ".." in name.parts or ":" in item.filename or linked:
            raise DataError(f"{archive} holds {item.filename!r}, which leads out of it: not opened")
    place.parent.mkdir(parents=True, exist_ok=True)
    needed, free = (
        sum(i.file_size for i in content.infolist()),
        shutil.disk_usage(place.parent).free,
    )
    if needed > 0.9 * free:
        raise DataError(
            f"{archive} unpacks to {needed / 2**20:,.0f} MiB; {place.parent} has "
            f"{free / 2**20:,.0f} free: make room, or set EDGEKD_HOME to another disk"
        )
    part = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        content.extractall(part)
        part.replace(place)
    except (OSError, RuntimeError, zipfile.BadZipFile, NotImplementedError) as error:
        if not place.is_dir():  # else another process was faster
            raise DataError(f"{archive} cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
