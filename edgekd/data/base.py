"""Data: splits of images with their labels, and the batches that training and checks draw.

Everything random is a function of (seed, epoch, step), so batches drawn from step 100 on are
those that an uninterrupted run draws there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as transforms

from edgekd.errors import DataError, nearest
from edgekd.network import Preprocessing

SPLITS = ("train", "val", "test")
SUBSET_SEED = 0
COLOUR = (0.7, 1.3)
PART = (0.25, 1.0)  # of the area
ASPECT = 4 / 3  # of the sides of a part, times those of the image, at most


class Images(Protocol):
    """One split: uint8 images of one shape, and their targets."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 class indices, over which subsets are balanced."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever an image or a label does; the same in every process."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Images (N, C, H, W) uint8 of `indices` (N,), and targets: labels (N,) int64, or more."""


class InMemory:
    """Images that are two tensors.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) integers.

    Raises:
        DataError: another shape or type, or not as many labels as images.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"images are {_describe(images)}; they must be uint8 of shape (N, C, H, W)"
            )
        if labels.is_floating_point() or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels are {_describe(labels)}; they must be integers of shape "
                f"({len(images)},), one for each image"
            )
        self.images, self.labels = images, labels.long()

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of shape, pixels and labels."""
        pixels, labels = self.images.contiguous().numpy(), self.labels.contiguous().numpy()
        return sha256(repr(pixels.shape).encode(), pixels.data, labels.data)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) uint8 and labels (N,) int64 of `indices` (N,)."""
        return self.images[indices], self.labels[indices]


class Chosen:
    """Some images of another split."""

    def __init__(self, images: Images, indices: Tensor) -> None:
        self._images, self._indices = images, indices
        self.labels = images.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the other split and the choice."""
        return sha256(self._images.fingerprint.encode(), self._indices.numpy().data)

    def take(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Of the chosen images, as the other split gives them."""
        return self._images.take(self._indices[indices])


def first_balanced(images: Images, count: int | None, split: str) -> Images:
    """`count` images, the same ones each time, of all classes as equally as there are; None: all.

    Raises:
        DataError: `count` is not between 1 and what the split holds.
    """
    if count is None:
        return images
    if not 1 <= count <= len(images):
        raise DataError(
            f"{split}: a subset of {count} images was asked for; there are {len(images)}: "
            "give a number from 1 to that"
        )
    order = torch.randperm(len(images), generator=_generator(SUBSET_SEED))
    labels = images.labels[order]
    by_class = labels.argsort(stable=True)
    first_of_class = torch.searchsorted(labels[by_class], labels[by_class])
    rank = torch.empty_like(order)  # how many of the same class come before
    rank[by_class] = torch.arange(len(order)) - first_of_class
    return Chosen(images, order[rank.argsort(stable=True)[:count]])


@dataclass(frozen=True)
class Augmentations:
    """What can be done to training images without changing what their targets mean.

    Attributes:
        names: of which `Data.augment` chooses. A "flip" is of left and right.
        apply: (images uint8, targets, the chosen names, generator) -> images, targets, and
            (N,) which images were flipped.
    """

    names: tuple[str, ...]
    apply: Callable[
        [Tensor, tuple[Tensor, ...], Sequence[str], Generator],
        tuple[Tensor, tuple[Tensor, ...], Tensor],
    ]


def coloured(image: Tensor, chances: Sequence[float]) -> Tensor:
    """Brightness, contrast and saturation of a (C, H, W) image times 0.7 to 1.3.

    Args:
        chances: three numbers from 0 to 1, one for each.
    """
    factors = [COLOUR[0] + (COLOUR[1] - COLOUR[0]) * c for c in chances]
    image = transforms.adjust_brightness(image, factors[0])
    image = transforms.adjust_contrast(image, factors[1])
    return transforms.adjust_saturation(image, factors[2]) if len(image) == 3 else image


def _augmented(
    x: Tensor, targets: tuple[Tensor, ...], augment: Sequence[str], generator: Generator
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Crop and flip in a single gather over the pixels of each padded plane; then the others."""
    n, channels, height, width = x.shape
    border = max(1, height // 8) if "crop" in augment else 0
    top, left = torch.randint(2 * border + 1, (2, n, 1), generator=generator)
    columns = torch.arange(width).expand(n, width)
    flipped = torch.zeros(n, 1, dtype=torch.bool)
    if "flip" in augment:
        flipped = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    rows = (torch.arange(height) + top) * (width + 2 * border)
    pixels = rows[:, :, None] + (columns + left)[:, None, :]
    planes = pad(x, [border] * 4).flatten(2)
    augmented = planes.gather(2, pixels.view(n, 1, -1).expand(n, channels, -1)).view(x.shape)
    if "scale" in augment:
        chances = torch.rand(n, 4, generator=generator).tolist()
        augmented = torch.stack([_part(*each) for each in zip(augmented, chances, strict=True)])
    if "colour" in augment:
        chances = torch.rand(n, 3, generator=generator).tolist()
        augmented = torch.stack([coloured(*each) for each in zip(augmented, chances, strict=True)])
    return augmented, targets, flipped[:, 0]


def _part(image: Tensor, chances: Sequence[float]) -> Tensor:
    """A random part of a (C, H, W) image, as large as the whole (arXiv:1409.4842 §6).

    Args:
        chances: four numbers from 0 to 1: of its area, its shape, and where it is.
    """
    height, width = image.shape[1:]
    area = PART[0] + (PART[1] - PART[0]) * chances[0]
    ratio = ASPECT ** (2 * chances[1] - 1)
    rows = max(1, round(height * min(1.0, math.sqrt(area / ratio))))
    columns = max(1, round(width * min(1.0, math.sqrt(area * ratio))))
    top, left = int((height - rows) * chances[2]), int((width - columns) * chances[3])
    part: Tensor = transforms.resized_crop(image, top, left, rows, columns, [height, width])
    return part


OF_LABELS = Augmentations(("flip", "crop", "scale", "colour"), _augmented)


@dataclass(frozen=True, eq=False)
class Data:
    """Splits of labelled images, and how they become inputs.

    Attributes:
        name: for reports.
        splits: "train", "test" and, if there is one, "val".
        classes: class names; a label is an index into them.
        preprocessing: mean and standard deviation per channel, for pixels from 0 to 1.
        augment: of "flip" (left and right, half of the images), "crop" (a black border of an
            eighth of the height, then a random crop back), "scale" (a quarter to all of the area,
            enlarged to the whole) and "colour" (brightness, contrast and saturation times 0.7 to
            1.3), or of what `augmentations` names; for training batches only.
        augmentations: those that fit the targets; here of labels.

    Raises:
        DataError: an unknown or empty split, splits of unequal shapes, a label without a class,
            a preprocessing that does not fit, or an unknown augmentation.
    """

    name: str
    splits: Mapping[str, Images]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    augment: tuple[str, ...] = ()
    augmentations: Augmentations = OF_LABELS

    def __post_init__(self) -> None:
        for split in self.splits:
            if split not in SPLITS:
                raise DataError(f"{self.name}: unknown split {split!r}{nearest(split, SPLITS)}")
        for name in self.augment:
            if name not in self.augmentations.names:
                raise DataError(
                    f"{self.name}: unknown augmentation {name!r}"
                    f"{nearest(name, self.augmentations.names)}"
                )
        for split in ("train", "test", *self.splits):
            if not len(self._split(split)):
                raise DataError(f"{self.name}: split {split!r} is empty; it needs an image")
            self._check_labels(split)
        for split in self.splits:
            if (shape := self._shape(split)) != self.image_shape:
                raise DataError(
                    f"{self.name}: images of {split!r} are {shape}, those of 'train' "
                    f"{self.image_shape}; give both one shape (C, H, W)"
                )
        mean, std = self.preprocessing.mean, self.preprocessing.std
        channels = self.image_shape[0]
        if not len(mean) == len(std) == channels:
            raise DataError(
                f"{self.name}: preprocessing has {len(mean)} means and {len(std)} standard "
                f"deviations; images have {channels} channels: give one of each per channel"
            )
        if min(std) <= 0:
            raise DataError(
                f"{self.name}: a standard deviation is {min(std)}; it must be above 0 (a channel "
                "that is the same everywhere has 0: make Data with a preprocessing of your own)"
            )

    def _check_labels(self, split: str) -> None:
        labels, count = self.splits[split].labels, len(self.classes)
        wrong = ((labels < 0) | (labels >= count)).nonzero()
        if len(wrong):
            index = int(wrong[0])
            raise DataError(
                f"{self.name}: label {int(labels[index])} of image {index} in {split!r}; there "
                f"are {count} classes, so labels go from 0 to {count - 1}"
            )

    def _split(self, split: str) -> Images:
        if split not in self.splits:
            raise DataError(f"{self.name}: no split {split!r}{nearest(split, self.splits)}")
        return self.splits[split]

    def _shape(self, split: str) -> tuple[int, ...]:
        images, *_ = self.splits[split].take(torch.tensor([0]))
        return tuple(images.shape[1:])

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._shape("train")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides the batches: images, labels, preprocessing, augmentation.

        Class names count too; `name` does not.
        """
        preprocessing = self.preprocessing.model_dump(exclude_defaults=True)
        rest = [self.classes, preprocessing, sorted(self.augment)]
        splits = {split: images.fingerprint for split, images in self.splits.items()}
        return sha256(json.dumps([rest, splits], sort_keys=True).encode())

    def steps(self, split: str, batch_size: int) -> int:
        """Number of batches; "train" leaves out the last one if it is incomplete.

        Raises:
            DataError: no such split, or a batch size below 1.
        """
        count = len(self._split(split))
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be 1 or more")
        return max(1, count // batch_size) if split == "train" else -(-count // batch_size)

    def subset(self, train: int | None = None, test: int | None = None) -> Data:
        """The same data with fewer images, balanced over the classes; None leaves a split whole.

        Raises:
            DataError: more images than there are, or fewer than 1.
        """
        splits = {
            **self.splits,
            "train": first_balanced(self.splits["train"], train, "train"),
            "test": first_balanced(self.splits["test"], test, "test"),
        }
        return replace(self, splits=splits)


# Data, or any iterable of batches: x, or the network's inputs and then targets, (x, y, ...)
BatchSource = Data | Iterable[Tensor | Sequence[Tensor]]


def training_batches(
    data: BatchSource,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    keyed: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """The batches of one epoch, from step `start` on.

    Order and augmentation of `Data` are functions of (seed, epoch, step). The last batch is left
    out if it is incomplete, unless it is the only one. Another iterable is iterated as it is:
    batch_size, seed and epoch do not concern it.

    Args:
        data: `Data`, or an iterable of x or (x, y, ...).
        keyed: with the keys of the samples as the last tensor, (N,) int64: each names one of the
            images of `view_batches`. Only for `Data` whose `views` can be counted.

    Yields:
        From `Data`: (N, C, H, W) float32, normalised, and its targets: (N,) int64 labels, or
        what detection has. From an iterable: its tensors, (x,) or (x, y, ...).

    Raises:
        DataError: a batch that is neither, holds NaN or infinity, or an iterable without any.
    """
    if isinstance(data, Data):
        batches = _shuffled(data, batch_size, seed, epoch, start)
        return batches if keyed else (batch[:-1] for batch in batches)
    return _coerced(data, "train", start)


def evaluation_batches(
    data: BatchSource, *, split: str = "test", batch_size: int = 256
) -> Iterator[tuple[Tensor, ...]]:
    """All images of `split` in their order, without augmentation; the last batch may be smaller.

    Arguments, yields and errors are those of `training_batches`; the split of an iterable is
    what it holds.
    """
    if isinstance(data, Data):
        return _in_order(data, split, batch_size)
    return _coerced(data, split, 0)


def views(data: Data) -> int | None:
    """How many images the augmentation can make of one; None where they are too many to keep."""
    kinds = set(data.augment)
    return 1 + len(kinds) if kinds <= {"flip"} else None


def view_batches(data: Data, batch_size: int) -> Iterator[Tensor]:
    """Inputs of all views of the training images, in the order of their keys."""
    for view in range(views(data) or 0):
        for x, *_ in _in_order(data, "train", batch_size):
            yield x.flip(-1) if view else x


def train_steps(data: BatchSource, batch_size: int) -> int | None:
    """Number of training batches of an epoch; None for an iterable that does not know it."""
    if isinstance(data, Data):
        return data.steps("train", batch_size)
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader has a len(), and over an IterableDataset refuses it
        return None


def _shuffled(
    data: Data, batch_size: int, seed: int, epoch: int, start: int
) -> Iterator[tuple[Tensor, ...]]:
    images = data.splits["train"]
    order = torch.randperm(len(images), generator=_generator(seed, epoch))
    for step in range(start, data.steps("train", batch_size)):
        chosen = order[step * batch_size : (step + 1) * batch_size]
        x, *rest = images.take(chosen)
        targets = tuple(rest)
        if data.augment:
            x, targets, flipped = data.augmentations.apply(
                x, targets, data.augment, _generator(seed, epoch, step)
            )
            chosen = chosen + len(images) * flipped
        yield _normalised(x, data.preprocessing), *targets, chosen


def _in_order(data: Data, split: str, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    data.steps(split, batch_size)  # refuses what does not fit
    images = data.splits[split]
    for indices in torch.split(torch.arange(len(images)), batch_size):
        x, *targets = images.take(indices)
        yield _normalised(x, data.preprocessing), *targets


def _normalised(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return x.float().div_(255).sub_(mean).div_(std)


def _coerced(batches: Iterable[Any], split: str, start: int) -> Iterator[tuple[Tensor, ...]]:
    if not isinstance(batches, Iterable):
        raise DataError(
            f"data is a {type(batches).__name__}; give Data, or an iterable of batches: a tensor x "
            "or a tuple (x, y, ...) of tensors"
        )
    index = -1
    for index, batch in enumerate(batches):
        if index < start:
            continue
        tensors = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        if not tensors or not all(isinstance(t, Tensor) for t in tensors):
            raise DataError(
                f"batch {index} of {split!r} is {_describe(batch)}; each batch must be a tensor "
                "x or a tuple (x, y, ...) of tensors"
            )
        for position, tensor in enumerate(tensors):
            _check_finite(tensor, f"tensor {position} of batch {index} of {split!r}")
        yield tensors
    if index < 0:
        raise DataError(
            f"the {type(batches).__name__} given as {split!r} data yielded no batch; if it is a "
            "generator it is exhausted after one pass: pass a list, a DataLoader, or something "
            "else that can be iterated again"
        )


def _check_finite(tensor: Tensor, where: str) -> None:
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:  # else only the sum overflowed
        raise DataError(
            f"{where} holds NaN or infinity in {bad} of {tensor.numel()} values; "
            "clean the data before it gets here"
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(type(v).__name__ for v in value)})"
    return f"a {type(value).__name__}"


def _generator(*key: int) -> Generator:
    """A generator of its own for each key; near keys give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sha256(*parts: bytes | memoryview) -> str:
    """Hexadecimal digest of `parts`, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
