"""The members of a recipe's student: all combinations, each once, as pruning leaves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgekd.choosing.members import AUTO_RATIOS, Candidate, candidates, pruned_variants
from edgekd.errors import ModelError, RecipeError
from edgekd.models.build import Build, build_module
from edgekd.models.resnet import resnet_space
from edgekd.network import Network
from edgekd.recipe import ChosenSection, PruneSection, StudentSection
from edgekd.stages.prune import prune

WIDTHS = {"widths": [16, 32]}


def build(section: StudentSection) -> Network:
    made = Build(model=section.model, kwargs={"num_classes": 4} | section.kwargs)
    return Network(build_module(made, trust=False, origin="test"), torch.zeros(1, 3, 32, 32))


def found(
    pruned: PruneSection | None = None, side: int = 32, model: str = "edgekd/resnet", **student: Any
) -> list[Candidate]:
    section = ChosenSection(model=model, **student)
    return list(candidates(section, pruned, build=build, side=side, round_to=8))


def test_all_combinations_and_further_models():
    got = found(
        kwargs=WIDTHS, space={"depths": [1, 2], "scale": [0.5, 1.0]},
        models=[{"model": "torchvision/squeezenet1_1"}],
    )  # fmt: skip
    assert [c.member.name for c in got] == [
        "edgekd/resnet depths=1 scale=0.5", "edgekd/resnet depths=1 scale=1.0",
        "edgekd/resnet depths=2 scale=0.5", "edgekd/resnet depths=2 scale=1.0",
        "torchvision/squeezenet1_1",
    ]  # fmt: skip
    assert got[1].member.section.kwargs == WIDTHS | {"depths": 1, "scale": 1.0}
    for each in got:
        real = build(each.member.section)
        assert (each.member.params, each.member.macs) == (real.params, real.macs)
        assert each.architecture == real.architecture


def test_members_that_come_out_the_same_are_one():
    # 0.9 · 16 and 0.9 · 32 round to the same multiples of 8
    assert [c.member.section.kwargs["scale"] for c in found(
        kwargs=WIDTHS, space={"scale": [0.9, 1.0, 2.0]}
    )] == [0.9, 2.0]  # fmt: skip


def test_resolutions_differ_though_their_weights_do_not():
    got = found(kwargs=WIDTHS, space={"resolution": [32, 16]})
    assert got[0].member.params == got[1].member.params
    assert got[0].member.macs > 3 * got[1].member.macs


def test_our_family_has_a_space_of_its_own():
    space = resnet_space(WIDTHS, 32)
    assert space["resolution"] == [None, 24, 16]
    assert [16, 32] in space["widths"]
    count = 1
    for values in space.values():
        count *= len(values)
    members = found(kwargs=WIDTHS)
    assert count / 2 < len(members) <= count
    assert len({(c.member.params, c.member.macs) for c in members}) == len(members)


def test_a_model_without_a_space_is_the_only_member():
    (only,) = found(model="torchvision/squeezenet1_1")
    assert only.member.name == "torchvision/squeezenet1_1"


def test_members_are_as_pruning_leaves_them():
    (got,) = found(PruneSection(ratio=0.5), kwargs=WIDTHS, space={"scale": [2.0]})
    real = prune(build(got.member.section), ratio=0.5, round_to=8)
    assert (got.member.params, got.member.macs) == (real.params, real.macs)
    assert got.member.ratio is None  # the recipe's own


def test_members_that_pruning_cannot_narrow_are_left_out():
    with pytest.raises(RecipeError, match="no member is left; pruning makes none"):
        found(PruneSection(ratio=0.3), kwargs={"widths": [8]}, space={"depths": [1]})


def test_an_argument_that_the_model_does_not_take_is_named():
    with pytest.raises(ModelError, match=r"does not take .*'dephts': 1"):
        found(kwargs=WIDTHS, space={"dephts": [1]})


def test_variants_get_smaller_with_the_ratio():
    (whole,) = found(PruneSection(ratio="auto"), kwargs={"widths": [32, 64]}, space={"depths": [1]})
    variants = list(
        pruned_variants(whole, PruneSection(ratio="auto"), build=build, round_to=8)
    )  # fmt: skip
    ratios = [v.member.ratio for v in variants]
    assert ratios == [r for r in AUTO_RATIOS if r in ratios] and len(ratios) >= 3
    sizes = [whole.member.params, *(v.member.params for v in variants)]
    assert sizes == sorted(set(sizes), reverse=True)
    assert variants[-1].member.title.endswith(", pruned by 0.5")
