"""What a kernel's time is made of."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from edgekd.latency.kernels import Kernel, moves_elements, of_tensor


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(4, 3, 1), (3, 5, 1), (7, 7, 2), (28, 3, 2), (9, 1, 1)]
)
def test_the_taps_inside_a_map_are_those_that_torch_finds(side, kernel, stride):
    ones, taps = torch.ones(1, 1, side * stride, side * stride), torch.ones(1, 1, kernel, kernel)
    counted = F.conv2d(ones, taps, stride=stride, padding=kernel // 2)
    assert counted.shape[-2:] == (side, side)
    conv = Kernel("Convolution", 8, 8, kernel, stride, height=side, width=side)
    assert conv.inside == pytest.approx(float(counted.mean()) / kernel**2)


def test_a_patch_embedding_has_no_edge():
    assert Kernel("Convolution", 3, 64, 16, 16, height=14, width=14).inside == 1
    assert Kernel("MatMul", 64, 64, height=196).inside == 1


def test_steps_are_what_is_gathered_pooled_or_repeated():
    conv = Kernel("QLinearConv", 8, 16, 3, 1, 1, 10, 12)
    assert conv.steps == 8 * 9 * 10 * 12
    assert Kernel("QLinearConv", 8, 16, 1, 1, 1, 10, 12).steps == 0
    pool = Kernel("QLinearAveragePool", 8, 8, 3, 1, 1, 10, 12, reads=960, writes=960)
    assert pool.steps == 9 * 960
    rows = Kernel("QLinearMul", reads=960 + 8, writes=960)  # by one number for each of 8 channels
    assert rows.steps == 120
    assert Kernel("QLinearMul", reads=1920, writes=960).steps == 0  # of two maps


def test_channels_fill_vectors_and_activations_are_told_apart():
    assert [Kernel("Conv", cout=n).padding for n in (16, 24, 8)] == [1, pytest.approx(4 / 3), 2]
    blocked = [Kernel("Conv.nchwc", n, 32, groups=g).padding for n, g in ((8, 1), (3, 1), (8, 8))]
    assert blocked == [2, 1, 1]  # an image is read as it comes
    grouped = [Kernel("Conv", 48, 48, 3, groups=g).padding for g in (2, 3, 6)]
    assert grouped == [pytest.approx(4 / 3), 1, 2]  # of each group's 24, 16 and 8
    alone = [Kernel("QLinearConv", n, n, 3, groups=n).padding * n for n in (24, 28)]
    assert alone[1] > 2 * alone[0]  # four channels that fill no vector
    assert Kernel("QLinearConv", 1, 16, 3).padding == 1  # a grey image is not one channel alone
    assert Kernel("Conv", fused="add+exp", writes=5).activated == (5, 0)
    assert Kernel("Conv", fused="hardswish", writes=5).activated == (0, 5)
    assert Kernel("Conv", fused="add+clip", writes=5).activated == (0, 5)  # another pass
    assert Kernel("Conv", fused="add+relu", writes=5).activated == (0, 0)
    attention = Kernel("Subgraph", 2 * 32, 50, groups=4, height=50, writes=4 * 50 * 32)
    assert attention.activated == (4 * 50 * 50, 0)


@pytest.mark.parametrize(
    ("cin", "cout", "groups", "gathered"),
    [
        (64, 64, 64, False),
        (40, 40, 40, True),  # each channel alone, and not in 16s
        (64, 64, 4, True),
        (3, 32, 1, True),
        (32, 8, 1, True),
        (12, 20, 1, False),
    ],
)
def test_direct_kernels_in_integers_want_whole_vectors(cin, cout, groups, gathered):
    assert Kernel("QLinearConv", cin, cout, 3, groups=groups).gathered == gathered
    assert not Kernel("Convolution", cin, cout, 3, groups=groups).gathered


@pytest.mark.parametrize(
    ("shape", "image"),
    [((1, 3, 32, 32), True), ((1, 32, 32, 3), True), ((1, 64, 4, 4), False), ((1, 3, 64), False)],
)
def test_an_image_that_turns_is_told_from_a_map(shape, image):
    names = [of_tensor(op, shape, 1, 1).op for op in ("Reorder", "Transpose", "Concat")]
    assert names == (["Reorder.image", "Transpose.image", "Concat"] if image else
                     ["Reorder", "Transpose", "Concat"])  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "size", "slow"),
    [
        ((1, 65, 3, 4, 64), (3, 1, 4, 65, 64), 1, False),  # whole rows of a head
        ((1, 65, 3, 4, 32), (3, 1, 4, 65, 32), 1, True),  # in integers they are too short
        ((1, 65, 3, 4, 32), (3, 1, 4, 65, 32), 4, False),
        ((1, 64, 100), (1, 100, 64), 4, True),
        ((1, 24, 24, 72), (1, 72, 24, 24), 4, True),
        ((1, 4, 65, 64), (1, 65, 4, 64), 4, False),
        ((1, 2, 58, 28, 28), (1, 58, 2, 28, 28), 4, True),  # a channel shuffle
    ],
)
def test_transpositions_that_move_single_elements(before, after, size, slow):
    assert moves_elements(before, after, size) == slow
