"""Where images come from: IDX files, folders, torchvision's sets, or a callable of one's own."""

from __future__ import annotations

import gzip
import inspect
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from PIL import ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import interpolate

from edgekd.data.base import SPLITS, Data, Images, InMemory, first_balanced, sha256
from edgekd.errors import DataError, ModelError, nearest
from edgekd.models.build import import_callable
from edgekd.network import Preprocessing

DEBIAN = Path("/usr/share/datasets")
IDX_SETS = {
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "mnist": tuple("0123456789"),
}  # fmt: skip
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# torchvision's classes for the IDX sets; they download into <root>/<class name>/raw
IDX_DOWNLOADS = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST"}
GREY, COLOUR = {"1", "L", "LA"}, {"P", "RGB", "RGBA", "CMYK", "YCbCr"}  # PIL's 8-bit modes
MEAN_SAMPLE = 2000  # images that mean and deviation of a lazy set come from
CHUNK = 256

Shape = tuple[int, int, int]  # C, H, W
T = TypeVar("T")


def read_data(
    source: str,
    *,
    root: str | Path | None = None,
    augment: Sequence[str] = (),
    channels: int | None = None,
    size: int | tuple[int, int] | None = None,
    train: int | None = None,
    test: int | None = None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    strict: bool = False,
    download: bool = True,
    memory_mib: int = 4096,
) -> Data:
    """Read labelled images, or images with boxes.

    Mean and standard deviation are those of the training images that are used, from 2,000 of
    them where they are not held in memory.

    Args:
        source: one of
            "fashion-mnist", "mnist": IDX files in `root`, in Debian's dataset-fashion-mnist or
            in the cache ($EDGEKD_HOME/data, else ~/.cache/edgekd), else downloaded; or an `.npz`
            with x_train, y_train, x_test and y_test as `root`;
            "image-folder": root/train/<class>/<image>, and the same in root/test, root/val or
            both; needs `size`;
            "coco", "yolo": images with boxes in a folder or zip, see `edgekd.data.detection`; needs
            `size`, which may be (height, width);
            "torchvision/NAME": a classification set of torchvision.datasets;
            "package.module:callable": called with `root=` if given; returns `Data`.
        root: file or folder; what it means depends on the source.
        augment: of "flip", "crop", "scale" and "colour"; see `Data`. Of boxes: not "crop".
        channels: 3 repeats grey images; None keeps what the first image has.
        size: height and width in pixels: the shorter side is resized (bilinear, antialiased),
            the middle is kept. None keeps the images' own, which must then all be equal.
        train: use only so many training images, balanced over the classes.
        test: the same for the test split.
        annotations, images, strict: of images with boxes, see `read_detection`.
        download: whether the network may be used.
        memory_mib: a set that is larger once decoded is decoded batch by batch instead.

    Raises:
        DataError: an unknown source, files that are missing, damaged or do not fit together, or
            options that do not fit the images.
    """
    root = None if root is None else Path(root).expanduser()
    if channels not in (None, 1, 3):
        raise DataError(f"channels is {channels}; it must be 1 or 3")
    if source in ("coco", "yolo"):
        from edgekd.data.detection import read_detection

        if root is None or size is None:
            raise _lacks(source, "root" if root is None else "size")
        return read_detection(
            source, root=root, size=size,
            annotations=None if annotations is None else Path(annotations).expanduser(),
            images=None if images is None else Path(images).expanduser(), augment=augment,
            channels=channels, train=train, test=test, strict=strict, memory_mib=memory_mib,
        )  # fmt: skip
    if annotations is not None or images is not None or strict:
        raise DataError(f"{source} has no boxes; remove annotations, images and strict")
    if isinstance(size, tuple):
        raise DataError(f"size is {size}; {source} takes one number for height and width")
    if size is not None and size < 1:
        raise DataError(f"size is {size}; it must be 1 or more")
    if ":" in source:
        if channels is not None or size is not None:
            raise DataError(f"{source} decides channels and size itself; remove these options")
        data = _from_callable(source, root).subset(train, test)
        return replace(data, augment=tuple(augment)) if augment else data
    library, _, name = source.partition("/")
    sources: Mapping[str, _Opened | InMemory]
    if source in IDX_SETS:
        sources, classes = _idx_set(source, root, download), IDX_SETS[source]
    elif source == "image-folder":
        if root is None or size is None:
            raise _lacks(source, "root" if root is None else "size")
        sources, classes = _image_folder(root)
    elif library == "torchvision" and name:
        sources, classes = _torchvision(name, root or cache_folder("torchvision"), download)
    else:
        known = (
            *IDX_SETS,
            "image-folder",
            "coco",
            "yolo",
            "torchvision/NAME",
            "package.module:callable",
        )
        raise DataError(f"unknown data source {source!r}{nearest(source, known)}")
    splits = _shaped(sources, channels, size, {"train": train, "test": test}, memory_mib)
    return Data(source, splits, classes, channel_statistics(splits["train"]), tuple(augment))


def _lacks(source: str, name: str) -> DataError:
    return DataError(f"{source} needs {name}; give root = folder, size = pixels")


# ---- from files to tensors ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """One split before shaping."""

    name: str
    open: Callable[[int], PIL.Image.Image]
    labels: Tensor
    identity: Callable[[], str]  # changes whenever an image does


class _Decoded:
    """Images that a pool of threads opens and decodes when they are asked for."""

    def __init__(self, opened: _Opened, shape: Shape, resize: bool) -> None:
        self._opened, self._shape, self._resize = opened, shape, resize
        self.labels = opened.labels

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        text = f"{self._opened.identity()} {self._shape} {self.labels.tolist()}"
        return sha256(text.encode())

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return decode_in_threads(self._decode, indices), self.labels[indices]

    def _decode(self, index: int) -> NDArray[np.uint8]:
        """(C, H, W) of one image."""
        image = self._opened.open(index)
        where = getattr(image, "filename", "") or f"{self._opened.name}, image {index}"
        channels, height, width = self._shape
        if image.mode not in GREY | COLOUR:
            raise DataError(f"{where} has mode {image.mode!r}; save it as 8-bit grey or RGB")
        if channels == 1 and image.mode in COLOUR:
            raise DataError(f"{where} is in colour ({image.mode}); 1 channel: set channels = 3")
        image = image.convert("L" if channels == 1 else "RGB")
        if self._resize:
            image = ImageOps.fit(image, (width, height), PIL.Image.Resampling.BILINEAR)
        elif image.size != (width, height):
            raise DataError(
                f"{where} is {image.height}×{image.width} pixels; the first training image is "
                f"{height}×{width}: set size to make all images one size"
            )
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def decode_in_threads(decode: Callable[[int], NDArray[np.uint8]], indices: Tensor) -> Tensor:
    """(n, C, H, W) uint8 of `indices` (n,), each (C, H, W) decoded by itself."""
    # one task for each thread: one for each image costs more than decoding a small one
    parts = [part.tolist() for part in indices.tensor_split(os.cpu_count() or 1)]
    with ThreadPoolExecutor(len(parts)) as pool:
        decoded = pool.map(lambda part: [decode(index) for index in part], parts)
        return torch.from_numpy(np.stack([array for part in decoded for array in part]))


class _Resized:
    """Images of one array, brought to another shape when they are asked for."""

    def __init__(self, images: InMemory, shape: Shape) -> None:
        self._images, self._shape = images, shape
        self.labels = images.labels

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        return sha256(f"{self._images.fingerprint} {self._shape}".encode())

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self._images.take(indices)
        channels, *size = self._shape
        if list(x.shape[2:]) != size:
            side = min(x.shape[2:])
            top, left = ((length - side) // 2 for length in x.shape[2:])
            x = x[:, :, top : top + side, left : left + side]
            x = interpolate(x, size, mode="bilinear", antialias=True)
        return x.expand(-1, channels, -1, -1), y


def _shaped(
    sources: Mapping[str, _Opened | InMemory],
    channels: int | None,
    size: int | None,
    counts: Mapping[str, int | None],
    memory_mib: int,
) -> dict[str, Images]:
    """The splits in one shape and, if they fit, in memory."""
    if not len(sources["train"].labels):
        raise DataError("split 'train' is empty; it needs an image")
    own = _own_shape(sources["train"])
    shape = (channels or own[0], size or own[1], size or own[2])
    splits: dict[str, Images] = {}
    for split, source in sources.items():
        images: Images
        if isinstance(source, _Opened):
            images = _Decoded(source, shape, size is not None)
        else:
            images = source if source.images.shape[1:] == shape else _Resized(source, shape)
        splits[split] = first_balanced(images, counts.get(split), split)
    mib = sum(map(len, splits.values())) * math.prod(shape) / 2**20
    if mib > memory_mib:
        return splits
    return {split: _in_memory(images, split) for split, images in splits.items()}


def _own_shape(source: _Opened | InMemory) -> Shape:
    if isinstance(source, InMemory):
        channels, height, width = source.images.shape[1:]
        return channels, height, width
    first = source.open(0)
    return (1 if first.mode in GREY else 3), first.height, first.width


def _in_memory(images: Images, split: str) -> InMemory:
    if isinstance(images, InMemory):
        return images
    chunks = torch.split(torch.arange(len(images)), CHUNK)
    pixels = [images.take(indices)[0] for indices in tracked(chunks, f"decoding {split}")]
    return InMemory(torch.cat(pixels), images.labels)


def tracked(items: Sequence[T], label: str) -> Iterable[T]:
    """The items, with a bar on a terminal and nothing in a log file."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(items, label, console=console, transient=True, disable=hidden)


def channel_statistics(images: Images) -> Preprocessing:
    """Mean and deviation per channel, from exact integer sums.

    NumPy's: torch would start its threads for each small sum, at ten times the cost.
    """
    count = len(images) if isinstance(images, InMemory) else min(len(images), MEAN_SAMPLE)
    sums, squares, values = np.zeros(1), np.zeros(1), 0
    spread = torch.linspace(0, len(images) - 1, count, dtype=torch.float64).round().long()
    for indices in torch.split(spread, CHUNK):
        x = images.take(indices)[0].numpy()
        sums = sums + x.sum((0, 2, 3), dtype=np.int64)
        squares = squares + np.square(x, dtype=np.uint16).sum((0, 2, 3), dtype=np.int64)
        values += x.size // x.shape[1]
    mean = sums / values / 255
    std = np.sqrt(np.maximum(squares / values / 255**2 - mean**2, 0))
    return Preprocessing(
        mean=tuple(round(v, 6) for v in mean.tolist()),
        std=tuple(round(v, 6) for v in std.tolist()),
    )


# ---- IDX files and .npz ------------------------------------------------------------------------


def read_idx(path: Path) -> Tensor:
    """The uint8 array of an IDX file (Y. LeCun's MNIST format), gzipped if it ends in .gz.

    Raises:
        DataError: not an IDX file of bytes, or not as long as its header says.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch it again") from None
    # magic number: two zero bytes, 8 for uint8, the number of dimensions; then their sizes
    header = 4 + 4 * raw[3] if len(raw) >= 4 else 4
    if raw[:3] != b"\0\0\x08" or len(raw) < header:
        raise DataError(
            f"{path} begins with {raw[:4].hex(' ')}; an IDX file of bytes begins with 00 00 08 and "
            "the number of dimensions"
        )
    shape = np.frombuffer(raw[4:header], ">u4").tolist()
    if len(raw) - header != math.prod(shape):
        raise DataError(
            f"{path} holds {len(raw) - header} values; its header says {shape}, which makes "
            f"{math.prod(shape)}: fetch it again"
        )
    return torch.from_numpy(np.frombuffer(bytearray(raw[header:]), np.uint8).reshape(shape))


def _idx_set(name: str, root: Path | None, download: bool) -> dict[str, InMemory]:
    if root is not None and root.suffix == ".npz":
        arrays = _read_npz(root)
    else:
        files = _find_idx(name, root, download)
        arrays = {split: (read_idx(x), read_idx(y)) for split, (x, y) in files.items()}
    for split, (x, y) in arrays.items():
        if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
            raise DataError(
                f"{name} {split}: images are {tuple(x.shape)}, labels {tuple(y.shape)}; they must "
                "be (N, H, W) and (N,), with a label for each image"
            )
    return {split: InMemory(x[:, None], y) for split, (x, y) in arrays.items()}


def _find_idx(name: str, root: Path | None, download: bool) -> dict[str, tuple[Path, Path]]:
    """(images, labels) of each split."""
    cache, kind = cache_folder(name), IDX_DOWNLOADS[name]
    places = [DEBIAN / name, cache] if root is None else [root, DEBIAN / name, cache]
    for place in places:
        for folder in (place, place / kind / "raw"):
            if files := _idx_files(folder, strict=place == root):
                return files
    reason = "the download is switched off"
    if download:
        from torchvision import datasets

        try:
            getattr(datasets, kind)(str(cache), download=True)
            return _idx_files(cache / kind / "raw", strict=True)
        except (OSError, RuntimeError) as error:
            reason = f"the download failed: {error}"
    install = "run: sudo apt-get install dataset-fashion-mnist, or " * (name == "fashion-mnist")
    raise DataError(
        f"{name} is in none of {', '.join(map(str, places))}, and {reason}; {install}"
        "set root to a folder with its IDX files or an .npz"
    )


def _idx_files(folder: Path, *, strict: bool) -> dict[str, tuple[Path, Path]]:
    """Paths of the four files; empty if one is missing, which `strict` allows only of all four.

    A download that was cut off leaves some in the cache, and is taken up again.
    """
    names = [name for pair in IDX_FILES.values() for name in pair]
    there = {
        name: path
        for name in names
        for path in (folder / name, folder / f"{name}.gz")  # gzip has a checksum: preferred
        if path.is_file()
    }
    missing = [name for name in names if name not in there]
    if there and missing and strict:
        raise DataError(f"{folder} holds {len(there)} of 4 IDX files; add {', '.join(missing)}")
    return {s: (there[x], there[y]) for s, (x, y) in IDX_FILES.items()} if not missing else {}


def _read_npz(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {
                split: (
                    torch.from_numpy(arrays[f"x_{split}"]),
                    torch.from_numpy(arrays[f"y_{split}"]),
                )
                for split in ("train", "test")
            }
    except KeyError as error:
        raise DataError(
            f"{path}: {error}; x_train, y_train, x_test and y_test are needed"
        ) from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an .npz of arrays: {error}") from None


def cache_folder(name: str) -> Path:
    """Where `name` is kept: in $EDGEKD_HOME/data, else in ~/.cache/edgekd."""
    home = os.environ.get("EDGEKD_HOME")
    return (Path(home) / "data" if home else Path.home() / ".cache" / "edgekd") / name


# ---- folders of images -------------------------------------------------------------------------


def _image_folder(root: Path) -> tuple[dict[str, _Opened], tuple[str, ...]]:
    folders = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if "test" not in folders and "val" in folders:
        folders["test"] = folders.pop("val")
    if not {"train", "test"} <= folders.keys():
        raise DataError(
            f"{root} holds {', '.join(sorted(folders)) or 'no split'}; it needs the folders train "
            "and test (or val), with one folder for each class in them"
        )
    classes = tuple(path.name for path in _folders(folders["train"]))
    if not classes:
        raise DataError(f"{folders['train']} holds no folder; make one for each class")
    return {s: _folder_split(folder, classes) for s, folder in folders.items()}, classes


def _folder_split(folder: Path, classes: tuple[str, ...]) -> _Opened:
    files: list[Path] = []
    labels: list[int] = []
    suffixes = PIL.Image.registered_extensions()
    for kind in _folders(folder):
        if kind.name not in classes:
            raise DataError(f"{kind}: no such class in train{nearest(kind.name, classes)}")
        found = sorted(path for path in kind.iterdir() if not path.name.startswith("."))
        if not found:
            raise DataError(f"{kind} is empty; put images in it or remove it")
        for path in found:
            if path.suffix.lower() not in suffixes:
                raise DataError(f"{path} is not an image file; remove it")
        files += found
        labels += [classes.index(kind.name)] * len(found)

    def open_(index: int) -> PIL.Image.Image:
        return open_image(files[index])

    def identity() -> str:
        stats = [(p.relative_to(folder).as_posix(), p.stat()) for p in files]
        return json.dumps([(name, s.st_size, s.st_mtime_ns) for name, s in stats])

    return _Opened(str(folder), open_, torch.tensor(labels, dtype=torch.int64), identity)


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def open_image(path: Path) -> PIL.Image.Image:
    """The decoded image.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with PIL.Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}; mend or remove it") from None


# ---- torchvision and callables -----------------------------------------------------------------


def _torchvision(
    name: str, root: Path, download: bool
) -> tuple[dict[str, _Opened], tuple[str, ...]]:
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not (isinstance(kind, type) and issubclass(kind, datasets.VisionDataset)):
        raise DataError(f"torchvision.datasets has no {name!r}{nearest(name, datasets.__all__)}")
    takes = inspect.signature(kind).parameters
    fetch = {"download": download} if "download" in takes else {}
    if "train" in takes:
        wanted: dict[str, list[dict[str, Any]]] = {
            "train": [{"train": True}],
            "test": [{"train": False}],
        }
    elif "split" in takes:  # some have only trainval, or no test
        wanted = {
            "train": [{"split": "train"}, {"split": "trainval"}],
            "test": [{"split": "test"}, {"split": "val"}],
        }
    else:
        raise DataError(
            f"torchvision/{name} has neither train= nor split=; write a function that returns "
            "Data and name it as package.module:callable"
        )
    sets = {
        split: _construct(name, partial(kind, str(root), **fetch), options)
        for split, options in wanted.items()
    }
    opened = {split: _from_set(f"torchvision/{name} {split}", one) for split, one in sets.items()}
    classes = getattr(sets["train"], "classes", None)
    if not isinstance(classes, (list, tuple)):
        classes = range(1 + max(int(one.labels.max()) for one in opened.values()))
    return opened, tuple(map(str, classes))


def _construct(name: str, kind: Callable[..., Any], options: Sequence[dict[str, Any]]) -> Any:
    """The set with the first of `options` that it knows."""
    refused: list[str] = []
    for option in options:
        try:
            return kind(**option)
        except ValueError as error:  # no split of that name
            refused.append(str(error))
        except (OSError, RuntimeError, TypeError, ImportError) as error:
            refused.append(str(error))
            break
    raise DataError(
        f"torchvision/{name} cannot be loaded: {refused[0]}; set root to where it is, or allow "
        "the download"
    )


def _from_set(name: str, images: Any) -> _Opened:
    def open_(index: int) -> PIL.Image.Image:
        image = images[index][0]
        if not isinstance(image, PIL.Image.Image):
            raise DataError(f"{name} gives {type(image).__name__}; only sets of images fit")
        return image

    for attribute in ("targets", "labels", "_labels"):
        if hasattr(images, attribute):
            found = getattr(images, attribute)
            break
    else:
        found = [images[i][1] for i in tracked(range(len(images)), f"labels of {name}")]
    try:
        labels = np.asarray(found)
    except ValueError:  # ragged: several labels for an image
        labels = np.empty((0, 0))
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{name} does not give one class index for each image; it cannot be used")
    # torchvision checks the files against its own checksums: the name says what they are
    return _Opened(name, open_, torch.from_numpy(labels.astype(np.int64)), lambda: name)


def _from_callable(source: str, root: Path | None) -> Data:
    try:
        made_by = import_callable(source, "data")
    except ModelError as error:
        raise DataError(str(error)) from None
    given = {} if root is None else {"root": root}
    try:
        inspect.signature(made_by).bind(**given)
    except TypeError as error:
        raise DataError(f"{source} cannot be called with {sorted(given)}: {error}") from None
    data = made_by(**given)
    if not isinstance(data, Data):
        raise DataError(f"{source} returned {type(data).__name__}; it must return edgekd's Data")
    return data
