"""`edgekd profile`: what it takes, and what it prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.cli_profile import _conditions, _layer_table, _Row, _tables
from edgekd.errors import DeviceError, ModelError, RecipeError, StateError
from edgekd.latency.layers import LayerTime
from edgekd.latency.measuring import Conditions, Measurement
from edgekd.rundir import exports
from edgekd.runtimes.base import Artifact
from edgekd.target import Target


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["profile", *arguments, "--runs", "20"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_several_targets_give_one_table(fp32_artifact: Artifact):
    pytest.importorskip("openvino")
    said = call(str(fp32_artifact.path), "--target", "host-onnxruntime", "--target", "intel-cpu")
    table, _, below = said.partition("what else it takes")
    assert table.count("host-onnxruntime") == table.count("intel-cpu") == 1
    for target in ("host-onnxruntime", "intel-cpu"):
        assert f"{target}: o" in below  # its conditions
        assert "20 runs after " in below
    assert below.count("rest: ") == 2


def test_others_are_compared_with_the_first(int8_artifact: Artifact, fp32_artifact: Artifact):
    folder, other = str(int8_artifact.path.parent), str(fp32_artifact.path)
    line = [folder, "--compare", other, "--target", "host-onnxruntime"]
    assert "× first" in call(*line, "--layers", "0")
    first, second = json.loads(call(*line, "--json", "--layers", "0"))
    assert first["compared"] == second["compared"] == [first["sha256"], second["sha256"]]
    assert (first["layers"], first["rest_ms"]) == ([], None)


def test_all_layers_or_the_slowest(fp32_artifact: Artifact):
    line = [str(fp32_artifact.path), "--target", "host-onnxruntime"]
    (found,) = json.loads(call(*line, "--json"))
    count = len(found["layers"])
    assert count > 3
    assert f"the slowest 2 of {count} layers" in call(*line, "--layers", "2")
    assert f"the slowest {count} of {count} layers" in call(*line, "--layers", "all")
    with pytest.raises(RecipeError, match="give a number, or all"):
        call(*line, "--layers", "many")


def test_a_runs_exports(int8_artifact: Artifact, fp32_artifact: Artifact, tmp_path: Path):
    for name, artifact in (("1a", int8_artifact), ("2b", fp32_artifact), ("3c", fp32_artifact)):
        folder = shutil.copytree(
            artifact.path.parent, tmp_path / f"export-host-onnxruntime-{name * 6}"
        )
        if name != "3c":  # which is not done
            (folder / "done.json").write_text("{}")
    first, second = json.loads(call(str(tmp_path), "--target", "host-onnxruntime", "--json"))
    assert (first["sha256"], second["sha256"]) == (int8_artifact.sha256, fp32_artifact.sha256)
    with pytest.raises(StateError, match="holds no artifact for intel-cpu"):
        exports(tmp_path, Target.load("intel-cpu"))


def test_a_python_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def small():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = ["my_nets:small", "--target", "host-onnxruntime", "--shape", "1x3x8x8"]
    with pytest.raises(ModelError, match="if you trust it"):
        call(*line)
    (found,) = json.loads(call(*line, "--trust", "--json"))
    assert any("Conv" in layer["operator"] for layer in found["layers"])
    with pytest.raises(RecipeError, match="give it as 1x3x224x224"):
        call(*line[:-1], "3,8,8", "--trust")
    with pytest.raises(StateError, match=r"my_nets:small does not exist; .* with --shape"):
        call(*line[:-2])


def test_what_is_not_the_targets(int8_artifact: Artifact):
    folder = str(int8_artifact.path.parent)
    with pytest.raises(StateError, match="is for host-onnxruntime, not for intel-cpu"):
        call(folder, "--target", "intel-cpu")
    with pytest.raises(DeviceError, match="no device 'usb'"):
        call(folder, "--target", "host-onnxruntime", "--device", "usb")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], ["local", "local"]),
        (["ssh://a"], ["ssh://a", "ssh://a"]),
        (["jetson-nano=ssh://me@nano", "intel-cpu=local"], ["ssh://me@nano", "local"]),
        (["intel-cpu=adb://x"], ["local", "adb://x"]),
    ],
)
def test_links_are_each_targets_or_all_ones(
    given: list[str], wanted: list[str], fp32_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
):
    at = []

    def profile_together(paths: Any, *, device: Any, **_: Any) -> list[Measurement]:
        at.append(device.address)
        return [row().measured for _ in paths]

    monkeypatch.setattr("edgekd.stages.profile.profile_together", profile_together)
    targets = ["--target", "jetson-nano", "--target", "intel-cpu"]
    links = [word for link in given for word in ("--device", link)]
    call(str(fp32_artifact.path), *targets, *links)
    assert at == wanted
    with pytest.raises(RecipeError, match="jetson-tx2"):
        call(str(fp32_artifact.path), *targets, "--device", "jetson-tx2=ssh://a")


# ---- what it says --------------------------------------------------------------------------------


def row(name: str = "a.onnx", **changes: Any) -> _Row:
    values = {
        "target": "jetson-nano", "sha256": "abc", "p50_ms": 2.0, "p90_ms": 2.1, "p99_ms": 2.2,
        "clock": "wall", "runs": 60, "warm_up_runs": 20, "threads": 1, "load_ms": None,
        "peak_memory_mib": None, "runtime": "tensorrt", "runtime_version": "8.2.1",
        "host": "Jetson Nano (aarch64)", "instruction_set": "neon", "date": "2026-01-01",
        "compared": (), "p50_ci95_ms": (1.98, 2.02), "throughput_per_s": 400.0,
        "size_bytes": 2048, "device": "ssh://nano", "trust": "steady",
    }  # fmt: skip
    return _Row(name, Measurement(**values | changes))


def test_the_conditions_are_told():
    conditions = Conditions(
        cpu_mhz_before=1479, cpu_mhz_after=1224, temperature_c_before=45, temperature_c_after=61,
        governor="schedutil", power_mode="MAXN", clocks_locked=True, load_average=0.5,
        rails=("POM_5V_IN",),
    )  # fmt: skip
    hot = row(conditions=conditions, trust="throttled", repeats=2, energy_mj=8.0)
    said = "\n".join(_conditions([hot]))
    for words in (
        "tensorrt 8.2.1 on Jetson Nano (aarch64), ssh://nano", "wall clock", "60 runs after 20",
        "CPU 1479 to 1224 MHz", "temperature 45 to 61 °C", "governor schedutil",
        "power mode MAXN", "clocks locked", "energy at POM_5V_IN", "measured 3 times",
        "a.onnx (jetson-nano): throttled: do not rely on its figures",
    ):  # fmt: skip
        assert words in said
    fast, takes = _tables([hot], ratios=False)
    assert [c.header for c in fast.columns][-1] == "trust"
    assert [list(c.cells) for c in takes.columns][-1] == ["8.0"]


def test_clocks_that_differ_are_told():
    rows = [row(), row(target="host-onnxruntime", clock="cpu")]
    assert "clocks differ (jetson-nano: wall, host-onnxruntime: cpu)" in _conditions(rows)[-1]
    assert not any("differ" in line for line in _conditions(rows[:1]))


def test_layers_are_told_by_their_time():
    layers = tuple(
        LayerTime(name=f"l{i}", operator="Conv", p50_ms=ms, share=ms / 6)
        for i, ms in enumerate((1.0, 3.0, 2.0))
    )
    table = _layer_table(layers, 2)
    assert [list(column.cells) for column in table.columns] == [
        ["l1", "l2"], ["Conv", "Conv"], ["3.000", "2.000"], ["50.0%", "33.3%"]
    ]  # fmt: skip
