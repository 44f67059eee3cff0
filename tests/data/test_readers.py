"""Readers: IDX, .npz, folders, torchvision's sets and callables, against NumPy and torchvision."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file

from edgekd.data import readers
from edgekd.data.base import Data, InMemory, evaluation_batches
from edgekd.data.readers import read_data, read_idx
from edgekd.errors import DataError
from edgekd.network import Preprocessing

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist.npz"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test sees this machine's data or cache."""
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(readers, "DEBIAN", tmp_path / "debian")


def digits(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return pixels, (np.arange(count) % 10).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, train: int = 30, test: int = 20) -> Path:
    folder.mkdir(parents=True)
    for prefix, count, seed in (("train", train, 0), ("t10k", test, 1)):
        pixels, labels = digits(count, seed)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def take_all(data: Data, split: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = data.splits[split].take(torch.arange(len(data.splits[split])))
    return x.numpy(), y.numpy()


# ---- IDX and .npz ------------------------------------------------------------------------------


def test_idx_is_read_as_torchvision_reads_it(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx(digits(7)[0]))
    assert torch.equal(read_idx(path), read_image_file(str(path)))
    assert np.array_equal(read_idx(path).numpy(), digits(7)[0])


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "begins with ; an IDX file"),
        (b"\x89PNG\r\n", "begins with 89 50 4e 47; an IDX file"),
        (struct.pack(">HBB", 0, 8, 3) + bytes(8), "begins with 00 00 08 03"),
        (idx(digits(2)[0])[:-1], r"holds 1567 values; its header says \[2, 28, 28\], .* 1568"),
        (idx(digits(2)[0]) + b"x", "holds 1569 values"),
    ],
)
def test_damaged_idx_is_named(tmp_path, raw, says):
    (tmp_path / "images").write_bytes(raw)
    with pytest.raises(DataError, match=f"images {says}"):
        read_idx(tmp_path / "images")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"no" + raw[2:]])
def test_damaged_gzip_is_named(tmp_path, damage):
    (tmp_path / "images.gz").write_bytes(damage(gzip.compress(idx(digits(2)[0]))))
    with pytest.raises(DataError, match=r"images\.gz cannot be read"):
        read_idx(tmp_path / "images.gz")


def test_mnist_from_idx(tmp_path):
    data = read_data("mnist", root=write_idx(tmp_path / "idx"), augment=["flip"])
    assert data.image_shape == (1, 28, 28)
    assert data.classes == tuple("0123456789")
    assert data.augment == ("flip",)
    for split, (pixels, labels) in {"train": digits(30), "test": digits(20, 1)}.items():
        x, y = take_all(data, split)
        np.testing.assert_array_equal(x[:, 0], pixels)
        np.testing.assert_array_equal(y, labels)
    values = digits(30)[0].astype(np.float64) / 255
    np.testing.assert_allclose(data.preprocessing.mean, [values.mean()], atol=1e-6)
    np.testing.assert_allclose(data.preprocessing.std, [values.std()], atol=1e-6)


@pytest.mark.parametrize("place", ["debian/fashion-mnist", "home/data/fashion-mnist"])
def test_idx_is_found_where_the_system_keeps_it(tmp_path, place):
    write_idx(tmp_path / place)
    data = read_data("fashion-mnist", download=False)
    assert data.classes[9] == "Ankle boot"
    assert len(data.splits["train"]) == 30


def test_a_missing_idx_file_is_named(tmp_path):
    folder = write_idx(tmp_path / "idx")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="3 of 4 IDX files; add t10k-labels-idx1-ubyte"):
        read_data("mnist", root=folder)


def test_images_and_labels_of_unequal_number(tmp_path):
    folder = write_idx(tmp_path / "idx")
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(digits(29)[1]))
    with pytest.raises(DataError, match=r"mnist train: images are \(30, 28, 28\), labels \(29,\)"):
        read_data("mnist", root=folder)


def test_no_images_at_all(tmp_path):
    with pytest.raises(DataError, match="split 'train' is empty"):
        read_data("mnist", root=write_idx(tmp_path / "idx", train=0))


def test_nowhere_and_no_download(tmp_path):
    with pytest.raises(DataError, match=r"switched off; run: sudo apt-get install dataset-fashion"):
        read_data("fashion-mnist", download=False)
    with pytest.raises(DataError, match=r"switched off; set root to"):
        read_data("mnist", download=False)


def test_a_failed_download_says_what_to_do(monkeypatch):
    def offline(root: str, download: bool) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(datasets, "FashionMNIST", offline)
    says = "download failed: .*no route to host.*sudo apt-get install dataset-fashion-mnist"
    with pytest.raises(DataError, match=says):
        read_data("fashion-mnist")


def test_a_download_is_read_and_kept(tmp_path, monkeypatch):
    raw = tmp_path / "home" / "data" / "mnist" / "MNIST" / "raw"

    def fetch(root: str, download: bool) -> None:
        shutil.rmtree(raw)
        write_idx(raw)

    monkeypatch.setattr(datasets, "MNIST", fetch)
    write_idx(raw)
    (raw / "t10k-labels-idx1-ubyte").unlink()  # as if the first download had been cut off
    assert len(read_data("mnist").splits["test"]) == 20
    assert len(read_data("mnist", download=False).splits["test"]) == 20


def test_npz(tmp_path):
    path = tmp_path / "mnist.npz"
    arrays = dict(zip(("x_train", "y_train"), digits(30), strict=True))
    np.savez(path, **arrays)
    with pytest.raises(DataError, match="x_test"):
        read_data("mnist", root=path)
    arrays |= dict(zip(("x_test", "y_test"), digits(20, 1), strict=True))
    np.savez(path, **arrays)
    data = read_data("mnist", root=path)
    np.testing.assert_array_equal(take_all(data, "test")[0][:, 0], digits(20, 1)[0])
    np.savez(path, **(arrays | {"x_train": np.array([{}], dtype=object)}))
    with pytest.raises(DataError, match=r"cannot be read as an \.npz of arrays"):
        read_data("mnist", root=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cannot be read as an \.npz of arrays"):
        read_data("mnist", root=path)


def test_channels_and_size(tmp_path):
    folder = write_idx(tmp_path / "idx")
    grey, _ = take_all(read_data("mnist", root=folder, size=14), "test")
    assert grey.shape == (20, 1, 14, 14)
    for got, pixels in zip(grey[:, 0], digits(20, 1)[0], strict=True):
        expected = PIL.Image.fromarray(pixels).resize((14, 14), PIL.Image.Resampling.BILINEAR)
        np.testing.assert_allclose(got, np.asarray(expected).astype(int), atol=1)
    colour = read_data("mnist", root=folder, size=14, channels=3)
    assert colour.image_shape == (3, 14, 14)
    np.testing.assert_array_equal(take_all(colour, "test")[0], grey.repeat(3, axis=1))
    assert colour.preprocessing.mean[0] == colour.preprocessing.mean[2]


def test_what_does_not_fit_in_memory_is_resized_batch_by_batch(tmp_path):
    folder = write_idx(tmp_path / "idx")
    options = {"root": folder, "size": 32, "channels": 3, "augment": ("flip",)}
    memory, lazy = read_data("mnist", **options), read_data("mnist", **options, memory_mib=0)
    assert isinstance(memory.splits["test"], InMemory)
    assert not isinstance(lazy.splits["test"], InMemory)
    assert memory.preprocessing == lazy.preprocessing
    (x, y), (lazy_x, lazy_y) = (next(evaluation_batches(d)) for d in (memory, lazy))
    assert torch.equal(x, lazy_x)
    assert torch.equal(y, lazy_y)


def test_counts_take_a_balanced_part(tmp_path):
    data = read_data("mnist", root=write_idx(tmp_path / "idx"), train=20, test=10)
    assert data.splits["train"].labels.bincount().tolist() == [2] * 10
    assert data.splits["test"].labels.bincount().tolist() == [1] * 10
    x, _ = take_all(data, "train")
    np.testing.assert_allclose(data.preprocessing.mean, [x.mean() / 255], atol=1e-6)
    with pytest.raises(DataError, match="subset of 31 images was asked for; there are 30"):
        read_data("mnist", root=tmp_path / "idx", train=31)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_real_fashion_mnist():
    data = read_data("fashion-mnist", root=DEBIAN)
    assert [len(data.splits[s]) for s in ("train", "test")] == [60000, 10000]
    raw = gzip.decompress((DEBIAN / "t10k-images-idx3-ubyte.gz").read_bytes())
    expected = np.frombuffer(raw, np.uint8, offset=16).reshape(10000, 28, 28)
    np.testing.assert_array_equal(take_all(data, "test")[0][:, 0], expected)
    np.testing.assert_allclose(data.preprocessing.mean, [0.2860], atol=5e-5)  # as commonly given
    np.testing.assert_allclose(data.preprocessing.std, [0.3530], atol=5e-5)


@pytest.mark.skipif(not MNIST.is_file(), reason="needs ../shared/data/mnist.npz")
def test_the_real_mnist():
    data = read_data("mnist", root=MNIST)
    with np.load(MNIST) as arrays:
        np.testing.assert_array_equal(take_all(data, "test")[1], arrays["y_test"])
    np.testing.assert_allclose(data.preprocessing.mean, [0.1307], atol=5e-5)  # as commonly given
    np.testing.assert_allclose(data.preprocessing.std, [0.3081], atol=5e-5)


# ---- folders -----------------------------------------------------------------------------------


def write_folder(
    root: Path, splits: tuple[str, ...] = ("train", "test"), mode: str = "RGB"
) -> Path:
    rng = np.random.default_rng(0)
    for split in splits:
        for name in ("dog", "cat"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).convert(mode).save(folder / f"{index}.png")
            (folder / ".hidden").write_text("no image")
    return root


def test_image_folder_resizes_the_shorter_side_and_keeps_the_middle(tmp_path):
    root = write_folder(tmp_path / "pets")
    data = read_data("image-folder", root=root, size=10)
    assert data.classes == ("cat", "dog")
    x, y = take_all(data, "train")
    assert x.shape == (6, 3, 10, 10)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    image = PIL.Image.open(root / "train" / "dog" / "1.png")
    # the middle 20 of 30 columns
    expected = image.resize((10, 10), PIL.Image.Resampling.BILINEAR, box=(5, 0, 25, 20))
    np.testing.assert_array_equal(x[4], np.asarray(expected).transpose(2, 0, 1))
    np.testing.assert_allclose(
        data.preprocessing.mean, x.astype(np.float64).mean((0, 2, 3)) / 255, atol=1e-6
    )
    np.testing.assert_allclose(
        data.preprocessing.std, (x / np.float64(255)).std((0, 2, 3)), atol=1e-6
    )


def test_a_lazy_folder_holds_the_same_images(tmp_path):
    root = write_folder(tmp_path / "pets")
    memory = read_data("image-folder", root=root, size=10)
    lazy = read_data("image-folder", root=root, size=10, memory_mib=0)
    assert not isinstance(lazy.splits["train"], InMemory)
    assert lazy.preprocessing == memory.preprocessing
    order = torch.tensor([4, 0, 5])
    for a, b in zip(
        memory.splits["train"].take(order), lazy.splits["train"].take(order), strict=True
    ):
        assert torch.equal(a, b)


def test_fingerprint_of_a_lazy_folder(tmp_path):
    root = write_folder(tmp_path / "pets")

    def fingerprint(**options: int) -> str:
        data = read_data("image-folder", root=root, memory_mib=0, **{"size": 10, **options})
        return data.splits["train"].fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(size=11) != first
    os.utime(root / "train" / "cat" / "0.png", (1, 1))
    touched = fingerprint()
    assert touched != first
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "00.png")
    assert fingerprint() != touched


def test_val_is_the_test_split_where_there_is_no_test(tmp_path):
    two = read_data("image-folder", root=write_folder(tmp_path / "a", ("train", "val")), size=8)
    assert sorted(two.splits) == ["test", "train"]
    root = write_folder(tmp_path / "b", ("train", "val", "test"))
    assert sorted(read_data("image-folder", root=root, size=8).splits) == ["test", "train", "val"]


def test_grey_folders(tmp_path):
    root = write_folder(tmp_path / "grey", mode="L")
    assert read_data("image-folder", root=root, size=8).image_shape == (1, 8, 8)
    assert read_data("image-folder", root=root, size=8, channels=3).image_shape == (3, 8, 8)
    deep = PIL.Image.fromarray(np.zeros((20, 30), np.uint16))
    deep.save(root / "train" / "cat" / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has mode 'I;16'; save it as 8-bit"):
        read_data("image-folder", root=root, size=8)


def test_wrong_folders_are_named(tmp_path):
    def read(root: Path, **options: object) -> None:
        read_data("image-folder", root=root, **{"size": 8, **options})

    with pytest.raises(DataError, match="needs size"):
        read_data("image-folder", root=tmp_path)
    with pytest.raises(DataError, match="needs root"):
        read_data("image-folder", size=8)
    with pytest.raises(DataError, match="nowhere holds no split; it needs the folders train"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds train; it needs the folders train and test"):
        read(write_folder(tmp_path / "a", ("train",)))
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "test").mkdir()
    with pytest.raises(DataError, match="train holds no folder"):
        read(tmp_path / "flat")

    root = write_folder(tmp_path / "pets")
    with pytest.raises(DataError, match=r"cat/0\.png is in colour \(RGB\); 1 channel: set chan"):
        read(root, channels=1)
    (root / "test" / "dogs").mkdir()
    with pytest.raises(DataError, match="test/dogs: no such class in train; did you mean 'dog'"):
        read(root)
    (root / "test" / "dogs").rename(root / "train" / "dogs")
    with pytest.raises(DataError, match="train/dogs is empty"):
        read(root)
    (root / "train" / "dogs" / "notes.md").write_text("no image")
    with pytest.raises(DataError, match=r"notes\.md is not an image file; remove it"):
        read(root)
    (root / "train" / "dogs" / "notes.md").unlink()
    whole = (root / "train" / "dog" / "0.png").read_bytes()
    for raw in (b"no image", whole[: len(whole) // 2]):
        (root / "train" / "dogs" / "half.png").write_bytes(raw)
        with pytest.raises(DataError, match=r"half\.png cannot be read as an image"):
            read(root)


# ---- torchvision and callables -----------------------------------------------------------------


class Tiny(datasets.VisionDataset):
    """Stands in for a set that torchvision would download."""

    def __init__(self, root, train=True, transform=None, download=False):
        super().__init__(root)
        if not download:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        rng = np.random.default_rng(int(train))
        self.pixels = rng.integers(0, 256, (8 if train else 4, 6, 6, 3), dtype=np.uint8)
        self.targets = [i % 2 for i in range(len(self.pixels))]
        self.classes = ["up", "down"]

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return PIL.Image.fromarray(self.pixels[index]), self.targets[index]


class TinySplit(Tiny):
    """Knows only trainval and val, gives no class names and no list of labels."""

    def __init__(self, root, split="trainval", download=False):
        if split not in ("trainval", "val"):
            raise ValueError(f"Unknown value {split!r} for argument split")
        super().__init__(root, train=split == "trainval", download=download)
        self.answers = self.__dict__.pop("targets")
        del self.classes

    def __getitem__(self, index):
        return PIL.Image.fromarray(self.pixels[index]), self.answers[index]


class Boxes(Tiny):
    def __init__(self, root, train=True, download=False):
        super().__init__(root, train, download=download)
        self.targets = [[1, 2], [3]] * (len(self) // 2)


class Sizes(Tiny):
    def __getitem__(self, index):
        side = 6 + index // 3
        return PIL.Image.new("RGB", (side, 6), (index, 9 * index, 255 * (index % 2))), 0


@pytest.mark.parametrize(("kind", "classes"), [(Tiny, ("up", "down")), (TinySplit, ("0", "1"))])
def test_torchvision_sets(kind, classes, monkeypatch):
    monkeypatch.setattr(datasets, "Tiny", kind, raising=False)
    data = read_data("torchvision/Tiny")
    assert data.classes == classes
    for split, train in (("train", True), ("test", False)):
        x, y = take_all(data, split)
        np.testing.assert_array_equal(
            x, Tiny("", train, download=True).pixels.transpose(0, 3, 1, 2)
        )
        np.testing.assert_array_equal(y, np.arange(len(x)) % 2)


def test_torchvision_sets_that_do_not_fit(monkeypatch):
    for name, kind in (("Tiny", Tiny), ("Boxes", Boxes), ("Sizes", Sizes)):
        monkeypatch.setattr(datasets, name, kind, raising=False)
    with pytest.raises(DataError, match="has no 'CIFAR1'; did you mean 'CIFAR10"):
        read_data("torchvision/CIFAR1")
    with pytest.raises(DataError, match=r"Tiny cannot be loaded: Dataset not found.*set root"):
        read_data("torchvision/Tiny", download=False)
    with pytest.raises(DataError, match="Boxes train does not give one class index"):
        read_data("torchvision/Boxes")
    with pytest.raises(DataError, match=r"image 3 is 6×7 pixels; the first .* 6×6: set size"):
        read_data("torchvision/Sizes")
    assert read_data("torchvision/Sizes", size=6).image_shape == (3, 6, 6)
    with pytest.raises(DataError, match="FakeData has neither train= nor split="):
        read_data("torchvision/FakeData")


def own_data(root: Path | None = None) -> Data:
    images = InMemory(torch.arange(32, dtype=torch.uint8).view(8, 1, 2, 2), torch.arange(8) % 2)
    name = "own" if root is None else root.name
    preprocessing = Preprocessing(mean=(0.0,), std=(1.0,))
    return Data(name, {"train": images, "test": images}, ("a", "b"), preprocessing)


def no_data() -> list[int]:
    return [1, 2]


def test_a_callable_of_ones_own():
    source = f"{__name__}:own_data"
    assert read_data(source).name == "own"
    data = read_data(source, root="/some/where", train=4, augment=("flip",))
    assert (data.name, len(data.splits["train"]), data.augment) == ("where", 4, ("flip",))


def test_callables_that_do_not_fit():
    with pytest.raises(DataError, match="returned list; it must return edgekd's Data"):
        read_data(f"{__name__}:no_data")
    with pytest.raises(DataError, match=r"no_data cannot be called with \['root'\]"):
        read_data(f"{__name__}:no_data", root="/some/where")
    with pytest.raises(DataError, match="cannot be imported"):
        read_data("no_such_module:anything")
    with pytest.raises(DataError, match="decides channels and size itself"):
        read_data(f"{__name__}:own_data", size=8)


def test_unknown_options():
    with pytest.raises(DataError, match="unknown data source 'fashion_mnist'; did you mean 'fash"):
        read_data("fashion_mnist")
    with pytest.raises(DataError, match="channels is 2; it must be 1 or 3"):
        read_data("mnist", channels=2)
    with pytest.raises(DataError, match="size is 0; it must be 1 or more"):
        read_data("mnist", size=0)
