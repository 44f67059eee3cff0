"""Data and its batches, against NumPy and plain loops."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.data.base import (
    OF_LABELS,
    Data,
    InMemory,
    evaluation_batches,
    first_balanced,
    train_steps,
    training_batches,
)
from edgekd.errors import DataError
from edgekd.network import Preprocessing

COLOUR = Preprocessing(mean=(0.5, 0.25, 0.125), std=(0.5, 0.2, 0.1))


def images(count: int, seed: int = 0, shape: tuple[int, int, int] = (3, 16, 12)) -> InMemory:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 256, (count, *shape), dtype=np.uint8)  # 0 is the border's alone
    return InMemory(torch.from_numpy(pixels), torch.arange(count) % 4)


def data(train: int = 50, test: int = 10, augment: tuple[str, ...] = ()) -> Data:
    return Data(
        "random",
        {"train": images(train), "test": images(test, seed=1)},
        ("a", "b", "c", "d"),
        COLOUR,
        augment,
    )


def normalised(pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (COLOUR.mean, COLOUR.std))
    return (pixels / 255.0 - mean) / std


def batches(source: object, **options: int) -> list[tuple[torch.Tensor, ...]]:
    defaults = {"batch_size": 8, "seed": 3, "epoch": 0}
    return list(training_batches(source, **{**defaults, **options}))


def test_evaluation_is_in_order_complete_and_normalised():
    random = data(augment=("flip", "crop"))
    got = list(evaluation_batches(random, batch_size=4))
    assert [len(x) for x, _ in got] == [4, 4, 2]
    x, y = (torch.cat(part).numpy() for part in zip(*got, strict=True))
    assert x.dtype == np.float32
    assert y.dtype == np.int64
    np.testing.assert_allclose(x, normalised(random.splits["test"].images.numpy()), atol=1e-5)
    np.testing.assert_array_equal(y, np.arange(10) % 4)


def test_training_draws_each_image_once_and_drops_the_incomplete_batch():
    random = data(train=50)
    got = batches(random)
    assert [len(x) for x, _ in got] == [8] * 6
    originals = normalised(random.splits["train"].images.numpy()).reshape(50, -1)
    drawn = torch.cat([x for x, _ in got]).numpy().reshape(48, -1)
    labels = torch.cat([y for _, y in got]).numpy()
    found = [int(np.abs(originals - x).max(1).argmin()) for x in drawn]
    assert len(set(found)) == 48
    assert found != sorted(found)
    np.testing.assert_allclose(drawn, originals[found], atol=1e-5)
    np.testing.assert_array_equal(labels, np.array(found) % 4)


def test_a_split_smaller_than_a_batch_is_one_batch():
    assert [len(x) for x, _ in batches(data(train=5))] == [5]


def test_crop_and_flip_give_windows_of_the_padded_image():
    random = data(train=64, augment=("flip", "crop"))
    pad = 2  # 16 // 8
    originals = {}
    for index, pixels in enumerate(random.splits["train"].images.numpy()):
        padded = np.zeros((3, 20, 16), np.uint8)
        padded[:, pad : pad + 16, pad : pad + 12] = pixels
        for top in range(5):
            for left in range(5):
                window = padded[:, top : top + 16, left : left + 12]
                originals[window.tobytes()] = (index, top, left, False)
                originals[window[:, :, ::-1].tobytes()] = (index, top, left, True)
    x, y = batches(random, batch_size=64)[0]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (COLOUR.mean, COLOUR.std))
    pixels = ((x * std + mean) * 255).round().to(torch.uint8).numpy()
    found = [originals[p.tobytes()] for p in pixels]
    assert sorted(f[0] for f in found) == list(range(64))
    assert [f[0] % 4 for f in found] == y.tolist()
    assert {f[1] for f in found} == {f[2] for f in found} == set(range(5))
    assert 16 < sum(f[3] for f in found) < 48


@pytest.mark.parametrize("name", ["flip", "crop"])
def test_one_augmentation_alone(name):
    random = data(train=64, augment=(name,))
    x = torch.cat([x for x, _ in batches(random, batch_size=64)])
    plain = torch.cat([x for x, _ in batches(replace(random, augment=()), batch_size=64)])
    same = [bool((a == b).all()) for a, b in zip(x, plain, strict=True)]
    mirrored = [bool((a == b.flip(2)).all()) for a, b in zip(x, plain, strict=True)]
    if name == "flip":
        assert all(a != b for a, b in zip(same, mirrored, strict=True))
        assert 16 < sum(mirrored) < 48
    else:
        assert not any(mirrored)
        assert sum(same) < 16  # 1 in 25 offsets is the middle


def test_a_part_is_enlarged_to_the_whole():
    """Pixels say where they are from, so what comes out is a ramp in each direction."""
    side = 64
    ramp = torch.arange(side, dtype=torch.uint8).mul(4).expand(side, side)
    pictures = torch.stack([ramp, ramp.T, ramp]).expand(50, -1, -1, -1)
    x, _, flipped = OF_LABELS.apply(pictures, (), ("scale",), torch.Generator().manual_seed(0))
    assert x.shape == pictures.shape
    assert x.dtype == torch.uint8
    assert not flipped.any()
    first, last = x[:, :, 8, 8].float() / 4, x[:, :, -9, -9].float() / 4
    shares = ((last - first) / (side - 17))[:, :2]  # of the width and of the height
    assert ((shares > 0.4) & (shares < 1.03)).all()
    area, aspect = shares.prod(1), shares[:, 0] / shares[:, 1]
    assert 0.22 < area.min() < 0.4
    assert 0.7 < area.max() < 1.05
    assert 0.7 < aspect.min() < 0.85
    assert 1.18 < aspect.max() < 1.4
    assert first.std(0).min() > 2  # they are from anywhere


def test_colours_change_and_a_grey_image_stays_grey():
    picture = torch.full((20, 3, 8, 8), 100, dtype=torch.uint8)
    x, *_ = OF_LABELS.apply(picture, (), ("colour",), torch.Generator().manual_seed(0))
    assert (x == x[:, :1, :1, :1]).all()
    brightness = x[:, 0, 0, 0].float() / 100
    assert 0.68 < brightness.min() < 0.8
    assert 1.2 < brightness.max() < 1.31


@pytest.mark.parametrize("start", [1, 4, 6])
def test_starting_later_is_bit_equal_to_the_uninterrupted_epoch(start):
    random = data(augment=OF_LABELS.names)
    whole, rest = batches(random, epoch=2), batches(random, epoch=2, start=start)
    assert len(rest) == 6 - start
    for expected, got in zip(whole[start:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_seed_and_epoch_change_the_batches_and_global_randomness_does_not():
    random = data(augment=("crop",))
    first = batches(random)[0][0]
    torch.manual_seed(99)
    assert torch.equal(first, batches(random)[0][0])
    assert not torch.equal(first, batches(random, seed=4)[0][0])
    assert not torch.equal(first, batches(random, epoch=1)[0][0])


def test_augmentation_takes_images_of_any_memory_layout():
    random = data(augment=("flip",))
    nhwc = InMemory(
        random.splits["train"].images.contiguous(memory_format=torch.channels_last),
        random.splits["train"].labels,
    )
    other = replace(random, splits={**random.splits, "train": nhwc})
    assert torch.equal(batches(random)[0][0], batches(other)[0][0])


def test_steps():
    random = data(train=50, test=10)
    assert [random.steps("train", n) for n in (8, 50, 51)] == [6, 1, 1]
    assert [random.steps("test", n) for n in (4, 10, 11)] == [3, 1, 1]
    assert train_steps(random, 8) == len(batches(random)) == 6
    assert train_steps([torch.zeros(1)] * 3, 8) == 3
    assert train_steps((torch.zeros(1) for _ in range(3)), 8) is None
    assert random.image_shape == (3, 16, 12)
    with pytest.raises(DataError, match="batch_size is 0"):
        random.steps("train", 0)


class _Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.zeros(2)


def test_a_loader_that_refuses_its_length_has_no_known_steps():
    assert train_steps(torch.utils.data.DataLoader(_Endless()), 8) is None


# ---- other iterables ---------------------------------------------------------------------------


def test_tensors_tuples_and_lists_become_tuples():
    x, y = torch.ones(2, 3), torch.zeros(2)
    got = batches([x, (x, y), [x, y, y]])
    assert [len(b) for b in got] == [1, 2, 3]
    assert all(b[0] is x for b in got)
    assert [len(b) for b in evaluation_batches([x, (x, y)])] == [1, 2]


def test_start_skips_batches_of_an_iterable():
    got = batches([torch.tensor([i]) for i in range(5)], start=3)
    assert [int(x) for (x,) in got] == [3, 4]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"x": torch.ones(1)}, "batch 1 of 'train' is a dict"),
        ((torch.ones(1), "cat"), r"is a tuple of \(Tensor, str\)"),
        ((), r"is a tuple of \(\)"),
    ],
)
def test_other_batches_are_refused(batch, says):
    with pytest.raises(DataError, match=says):
        batches([torch.ones(1), batch])


def test_what_cannot_be_iterated_is_refused():
    with pytest.raises(DataError, match="data is a int; give Data, or an iterable"):
        batches(3)


def test_an_exhausted_generator_is_named():
    generator = (torch.ones(1) for _ in range(2))
    assert len(batches(generator)) == 2
    with pytest.raises(DataError, match="the generator given as 'train' data yielded no batch"):
        batches(generator, epoch=1)
    with pytest.raises(DataError, match=r"'test' data yielded no batch; .* pass a list"):
        list(evaluation_batches([]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(value):
    bad = torch.ones(2, 3)
    bad[1, 2] = value
    with pytest.raises(DataError, match=r"tensor 0 of batch 1 of 'train' .* in 1 of 6 values"):
        batches([torch.ones(2, 3), bad])
    with pytest.raises(DataError, match="tensor 1 of batch 0 of 'val'"):
        list(evaluation_batches([(torch.ones(2), bad)], split="val"))


def test_a_sum_that_overflows_is_not_an_error():
    assert len(batches([torch.full((4,), 60000.0, dtype=torch.float16)])) == 1


# ---- the value ---------------------------------------------------------------------------------


def test_wrong_data_is_refused():
    good = data()
    train, test = good.splits["train"], good.splits["test"]
    wrong_label = InMemory(train.images, train.labels.clone().index_fill_(0, torch.tensor(7), 4))
    other_shape = images(3, shape=(3, 8, 8))
    empty = InMemory(train.images[:0], train.labels[:0])
    cases = [
        ({"splits": {"train": train}}, "no split 'test'"),
        ({"splits": {**good.splits, "tset": test}}, "unknown split 'tset'; did you mean 'test'"),
        ({"splits": {"train": train, "test": empty}}, "split 'test' is empty"),
        ({"splits": {"train": wrong_label, "test": test}}, "label 4 of image 7 in 'train'; .* 4 c"),
        ({"splits": {"train": train, "test": other_shape}}, r"'test' are \(3, 8, 8\)"),
        ({"preprocessing": Preprocessing(mean=(0.5,), std=(0.5,))}, "1 means .* 3 channels"),
        ({"preprocessing": Preprocessing(mean=(0,) * 3, std=(1, 0, 1))}, "deviation is 0"),
        ({"augment": ("flop",)}, "unknown augmentation 'flop'; did you mean 'flip'"),
    ]
    for change, says in cases:
        with pytest.raises(DataError, match=says):
            replace(good, **change)


def test_wrong_tensors_are_refused():
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DataError, match=r"float32 of shape \(2, 1, 4, 4\); they must be uint8"):
        InMemory(torch.zeros(2, 1, 4, 4), labels)
    pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"labels are int64 of shape \(2, 1\)"):
        InMemory(pixels, labels[:, None])
    with pytest.raises(DataError, match="labels are float32"):
        InMemory(pixels, labels.float())


def test_a_split_that_is_not_there_is_named():
    with pytest.raises(DataError, match="no split 'val'; there are: test, train"):
        list(evaluation_batches(data(), split="val"))


def test_subset_is_balanced_and_the_same_each_time():
    random = data(train=50, test=10)
    few = random.subset(train=22, test=None)
    assert (len(few.splits["train"]), len(few.splits["test"])) == (22, 10)
    counts = np.bincount(few.splits["train"].labels.numpy())
    assert sorted(counts) == [5, 5, 6, 6]
    again = random.subset(22)
    assert few.fingerprint == again.fingerprint != random.fingerprint
    assert torch.equal(batches(few)[0][0], batches(again)[0][0])
    x, y = few.splits["train"].take(torch.arange(22))
    originals = random.splits["train"].images.numpy().reshape(50, -1)
    found = [int((originals == p).all(1).nonzero()[0][0]) for p in x.numpy().reshape(22, -1)]
    assert len(set(found)) == 22
    assert y.tolist() == few.splits["train"].labels.tolist() == [i % 4 for i in found]
    assert few.preprocessing == random.preprocessing


def test_a_rare_class_comes_whole_into_a_subset():
    labels = torch.tensor([0] * 30 + [1] * 2)
    rare = InMemory(torch.zeros(32, 1, 2, 2, dtype=torch.uint8), labels)
    assert first_balanced(rare, 10, "train").labels.bincount().tolist() == [8, 2]


@pytest.mark.parametrize("count", [0, 51])
def test_a_subset_of_more_or_less_than_there_is(count):
    with pytest.raises(DataError, match=f"train: a subset of {count} images .* there are 50"):
        data().subset(train=count)


def test_fingerprint_changes_with_all_that_decides_the_batches():
    good = data()
    train = good.splits["train"]
    labels, pixels = train.labels.clone(), train.images.clone()
    labels[3] = (labels[3] + 1) % 4
    pixels[5, 0, 0, 0] += 1
    variants = [
        good,
        replace(good, splits={**good.splits, "train": InMemory(train.images, labels)}),
        replace(good, splits={**good.splits, "train": InMemory(pixels, train.labels)}),
        replace(good, splits={**good.splits, "val": train}),
        replace(good, classes=("a", "b", "c", "e")),
        replace(good, preprocessing=Preprocessing(mean=(0.5, 0.25, 0.25), std=COLOUR.std)),
        replace(good, augment=("flip",)),
    ]
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert replace(good, name="other").fingerprint == good.fingerprint


def test_fingerprint_is_the_same_in_another_process():
    code = "from test_data_batches import data; print(data().subset(20).fingerprint)"
    here = Path(__file__).parent
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        text=True,
        env={"PYTHONPATH": f"{here}:{here.parents[1]}", "PYTHONHASHSEED": "7"},
    ).stdout
    assert printed.strip() == data().subset(20).fingerprint
