"""export: which network may go where."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from edgekd.errors import StateError, TargetError
from edgekd.network import Network
from edgekd.runtimes.base import Artifact
from edgekd.stages.export import export
from edgekd.target import Target


def test_an_artifact_is_found_again_where_it_was_put(int8_artifact: Artifact):
    assert int8_artifact.path.name == "model.onnx"
    assert (int8_artifact.target, int8_artifact.precision) == ("host-onnxruntime", "int8")
    assert Artifact.load(int8_artifact.path.parent) == int8_artifact


def test_exporting_again_gives_the_same_file(
    quantized: Network, host: Target, int8_artifact: Artifact, tmp_path: Path
):
    again = export(quantized, target=host, out=tmp_path)
    assert again.sha256 == int8_artifact.sha256


def test_integers_that_the_target_does_not_take_are_refused(
    quantized: Network, host: Target, tmp_path: Path
):
    assert host.scheme is not None
    eight = host.scheme.model_copy(update={"weight_bits": 8})
    other = host.model_copy(update={"name": "other", "scheme": eight})
    with pytest.raises(TargetError, match=r"weight_bits=7.*other takes.*weight_bits=8.*quantize"):
        export(quantized, target=other, out=tmp_path)
    floats = host.model_copy(update={"scheme": None, "precisions": ("fp32",)})
    with pytest.raises(TargetError, match="host-onnxruntime runs no integers"):
        export(quantized, target=floats, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_floats_that_the_target_does_not_take_are_refused(
    trained: Network, host: Target, tmp_path: Path
):
    integers = host.model_copy(update={"precisions": ("int8",)})
    with pytest.raises(TargetError, match="host-onnxruntime runs integers only; quantize"):
        export(trained, target=integers, out=tmp_path)


def test_a_folder_holds_one_artifact(
    trained: Network, int8_artifact: Artifact, host: Target, tmp_path: Path
):
    out = shutil.copytree(int8_artifact.path.parent, tmp_path / "int8")
    with pytest.raises(StateError, match=r"holds host-onnxruntime int8; give each"):
        export(trained, target=host, out=out)
    assert Artifact.load(out).sha256 == int8_artifact.sha256


def test_the_network_is_not_changed(host: Target, tmp_path: Path):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    net = Network(module, torch.zeros(1, 3, 8, 8))
    before = {name: t.clone() for name, t in net.state().items()}
    export(net, target=host, out=tmp_path)
    assert module is net.module
    assert net.scheme is None
    assert all(torch.equal(before[name], t) for name, t in net.state().items())
