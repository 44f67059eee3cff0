"""Targets: those that ship keep their contract; a user's own overlay them."""

from __future__ import annotations

import platform
import tomllib
from pathlib import Path

import pytest

from edgekd import target as target_module
from edgekd.errors import TargetError
from edgekd.runtimes.base import RUNTIMES
from edgekd.target import QuantScheme, Target, target_names

FOLDER = Path(__file__).parents[1] / "targets"
FILES = sorted(FOLDER.glob("*.toml"))
MINIMAL = """
name = "mine"
title = "my board"
runtime = "onnxruntime"
runtime_version = "1.31"
opset = 18
verifier = "native"
precisions = ["fp32"]
channel_multiple = { value = 4, source = "default" }
"""
U8 = QuantScheme(
    activation_dtype="uint8", activation_symmetric=False, weight_bits=8,
    weight_granularity="channel", bias="int32", add_inputs="both", outputs=True, ops=("conv",),
)  # fmt: skip
S8 = U8.model_copy(update={"activation_dtype": "int8"})


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's folder of targets."""
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path))
    folder = tmp_path / "targets"
    folder.mkdir()
    return folder


# ---- what ships --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_target_keeps_the_contract(path, monkeypatch):
    monkeypatch.delenv("EDGEKD_HOME", raising=False)
    raw = tomllib.loads(path.read_text())
    target = Target.load(path.stem)
    assert target.name == path.stem == raw["name"]
    assert target.opset == raw["opset"] >= 13
    assert list(target.precisions) == raw["precisions"] != []
    assert (target.scheme is not None) == ("int8" in raw["precisions"])
    assert target.runtime in RUNTIMES
    assert target.channel_multiple.value >= 1
    assert target.source, "a target's figures need sources"
    for source in target.source:
        assert source.url.startswith("https://"), source
        assert source.fact.strip()


def test_every_file_is_a_target(monkeypatch):
    monkeypatch.delenv("EDGEKD_HOME", raising=False)
    assert FILES
    assert target_names() == sorted(path.stem for path in FILES)


def test_no_two_targets_share_a_title():
    titles = [tomllib.loads(path.read_text())["title"] for path in FILES]
    assert len(set(titles)) == len(titles)


# ---- finding -----------------------------------------------------------------------------------


def test_an_unknown_target_gets_the_nearest_name():
    with pytest.raises(TargetError, match="no target 'intel-cpus'; did you mean 'intel-cpu'"):
        Target.load("intel-cpus")


@pytest.mark.parametrize("name", ["../targets/intel-cpu", "./intel-cpu", "", ".", "intel-cpu.toml"])
def test_a_path_is_no_name(name):
    with pytest.raises(TargetError, match="no target"):
        Target.load(name)


def test_an_absolute_path_is_no_name():
    with pytest.raises(TargetError, match="no target"):
        Target.load(str(FOLDER / "intel-cpu"))


def test_a_target_passes_through():
    target = Target.load("intel-cpu")
    assert Target.load(target) is target


def test_a_users_target_is_found_and_listed(home):
    (home / "mine.toml").write_text(MINIMAL)
    assert Target.load("mine").title == "my board"
    assert {"mine", "intel-cpu"} <= set(target_names())


def test_a_users_target_overlays_the_shipped_one(home):
    (home / "intel-cpu.toml").write_text(MINIMAL.replace('"mine"', '"intel-cpu"'))
    assert Target.load("intel-cpu").title == "my board"
    assert Target.load("host-onnxruntime").title != "my board"
    assert target_names().count("intel-cpu") == 1


# ---- wrong files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("opset = 18", "opset = 18\nop_set = 1", r"op_set: unknown key; did you mean 'opset'"),
        ("value = 4", "valeu = 4", r"channel_multiple.valeu: unknown key; did you mean 'value'"),
        ("opset = 18", 'opset = "new"', r"opset: .*integer.* \(got 'new'\)"),
        ('"native"', '"guess"', r"verifier: .*'native' or 'emulated'.* \(got 'guess'\)"),
        ('["fp32"]', '["fp32", "int4"]', r"precisions.1: .*'fp16' or 'int8'.* \(got 'int4'\)"),
        ("opset = 18\n", "", r"opset: Field required$"),
        ('"mine"', '"yours"', r"name is 'yours'; it must be the file's: 'mine'"),
        ('["fp32"]', '["fp32", "int8"]', r"a \[scheme\] goes with 'int8'"),
        ("opset = 18", "opset = ", r"mine.toml: not valid TOML: "),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(home, before, after, says):
    assert before in MINIMAL
    (home / "mine.toml").write_text(MINIMAL.replace(before, after))
    with pytest.raises(TargetError, match=says) as error:
        Target.load("mine")
    assert str(home / "mine.toml") in str(error.value)


def test_bytes_that_are_not_text_are_named(home):
    (home / "mine.toml").write_bytes(b'title = "\xff\xfe"')
    with pytest.raises(TargetError, match=r"mine.toml: not valid TOML"):
        Target.load("mine")


def test_an_unknown_key_of_the_scheme_is_refused(home):
    scheme = "".join(f"{k} = {str(v).lower()}\n" if isinstance(v, bool) else f"{k} = {v!r}\n"
                     for k, v in U8.model_dump(mode="json").items())  # fmt: skip
    text = MINIMAL.replace('["fp32"]', '["fp32", "int8"]') + "[scheme]\n" + scheme
    (home / "mine.toml").write_text(text)
    assert Target.load("mine").scheme == U8
    (home / "mine.toml").write_text(text + "weigth_bits = 8\n")
    with pytest.raises(
        TargetError, match=r"scheme.weigth_bits: unknown key; did you mean 'weight_bits'"
    ):
        Target.load("mine")


def test_targets_and_schemes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Target.load("intel-cpu").opset = 13
    with pytest.raises(ValueError, match="frozen"):
        U8.weight_bits = 7


def test_a_scheme_that_no_runtime_has_is_refused():
    with pytest.raises(ValueError, match="symmetric activations are int8"):
        QuantScheme(**U8.model_dump() | {"activation_symmetric": True})


@pytest.mark.parametrize(
    ("verifier", "machines", "instructions", "native"),
    [
        ("native", (), (), True),
        ("native", ("x86_64", "riscv64"), (), True),
        ("native", ("aarch64", "x86_64"), (), False),
        ("native", ("riscv64",), ("rvv", "amx"), True),
        ("native", ("riscv64",), ("amx",), False),
        ("emulated", ("riscv64",), (), False),
    ],
)
def test_native_is_only_what_this_machine_has_kernels_for(
    verifier, machines, instructions, native, monkeypatch
):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(target_module, "host_instruction_set", lambda: "rvv")
    changes = {"verifier": verifier, "machines": machines, "instructions": instructions}
    assert Target.load("intel-cpu").model_copy(update=changes).native_here is native


# ---- which network fits which target -------------------------------------------------------------


SYMMETRIC = {"activation_symmetric": True}


@pytest.mark.parametrize(
    ("network", "target", "fits"),
    [
        (U8, U8, True),
        (S8, S8, True),
        (S8, U8, True),  # 128 added to each zero point
        (U8, S8, False),
        (S8.model_copy(update=SYMMETRIC), U8.model_copy(update=SYMMETRIC), False),
        (S8.model_copy(update=SYMMETRIC), U8, False),
        (S8, S8.model_copy(update=SYMMETRIC), False),
        (S8, U8.model_copy(update={"weight_bits": 7}), False),
        (U8, U8.model_copy(update={"weight_granularity": "tensor"}), False),
        (U8, U8.model_copy(update={"bias": "float"}), False),
        (U8, U8.model_copy(update={"outputs": False}), False),
        (U8, U8.model_copy(update={"ops": ("conv", "linear")}), False),
    ],
)
def test_fits_means_exportable_without_loss(network, target, fits):
    assert network.fits(target) is fits
