"""Our detectors: shapes, operators, options, and that one learns through the loop."""

from __future__ import annotations

import pytest
import torch

from edgekd.errors import ModelError
from edgekd.models.build import Build, build_module
from edgekd.models.detector import detector
from edgekd.network import Network
from edgekd.tasks.decoding import anchors, detect

SMALL = {"num_classes": 3, "widths": (8, 8, 16, 16), "neck": 8}


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_heads_have_an_anchor_at_every_location_of_three_maps(size):
    net = Network(detector(**SMALL), torch.zeros(1, 3, *size))
    count = sum((size[0] // s) * (size[1] // s) for s in (8, 16, 32))
    assert net.io.outputs == ("classes", "boxes")
    found = net(torch.zeros(2, 3, *size))
    assert [tuple(t.shape) for t in found.values()] == [(2, count, 3), (2, count, 4)]
    assert net.io.decoding is not None
    at = anchors(net.io.decoding)
    assert len(at) == count
    assert at[0].tolist() == [0, 0, 8, 8]
    assert at[-1].tolist() == [size[1] - 32, size[0] - 32, size[1], size[0]]


def test_each_output_sees_where_its_anchor_is():
    """A change of pixels moves the output of the anchors around it the most."""
    torch.manual_seed(0)
    module = detector(**SMALL).eval()
    x = torch.rand(1, 3, 64, 96)
    changed = x.clone()
    changed[:, :, 40:48, 72:80] += 1
    with torch.no_grad():
        apart = (module(changed)["boxes"] - module(x)["boxes"]).abs().sum(-1)[0]
    fine = apart[: 8 * 12].view(8, 12)
    row, column = divmod(int(fine.argmax()), 12)
    assert abs(row - 5) <= 1 and abs(column - 9) <= 1


def test_before_training_scores_are_the_prior_and_boxes_four_strides_wide():
    torch.manual_seed(0)
    module = detector(**SMALL).eval()
    for head in module.heads:
        for tower in (head.classes, head.boxes):
            torch.nn.init.zeros_(tower[-1].weight)
    with torch.no_grad():
        outputs = module(torch.zeros(1, 3, 32, 32))
    rules = module.box_decoding(32, 32).model_copy(
        update={"score_threshold": 0.0, "nms_threshold": 1.0}
    )
    found = detect(rules, outputs)[0]
    found = found[found[:, 5] >= 0]
    assert torch.allclose(found[:, 4], torch.tensor(0.01))
    assert float((found[:, 2] - found[:, 0]).max()) == pytest.approx(32)  # cut to the image


def test_width_depth_and_neck_are_free():
    def params(**options: object) -> int:
        return sum(p.numel() for p in detector(**(SMALL | options)).parameters())

    plain = params()
    assert params(scale=2.0) > 3 * plain
    assert params(depths=2) > plain
    assert params(depths=(1, 1, 2, 1)) < params(depths=2)
    assert params(neck=32) > params(head_depth=2) > plain
    assert detector(**(SMALL | {"in_channels": 1})).stem[0].in_channels == 1
    widths = {m.out_channels for m in detector(num_classes=4, scale=0.3).modules()
              if isinstance(m, torch.nn.Conv2d)}  # fmt: skip
    assert widths == {8, 16, 40, 4}  # multiples of 8, and the outputs


@pytest.mark.parametrize(
    "wrong", [{"widths": (8, 8)}, {"depths": (1, 1)}, {"num_classes": 0}, {"head_depth": -1}]
)
def test_options_that_do_not_fit_are_refused(wrong):
    build = Build(model="edgekd/detector", kwargs=SMALL | wrong)
    with pytest.raises(ModelError, match="edgekd/detector does not take"):
        build_module(build, trust=False, origin="here")


def test_a_size_that_strides_do_not_divide_is_refused():
    with pytest.raises(ModelError, match="the input is 100×96; edgekd/detector takes multiples"):
        Network(detector(**SMALL), torch.zeros(1, 3, 100, 96))
