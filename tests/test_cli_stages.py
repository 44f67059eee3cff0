"""Single stages on the command line, and what it tells of targets, runs and this machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.errors import ModelError, RecipeError, StateError
from edgekd.network import Network
from edgekd.stages.export import export
from edgekd.stages.verify import Parity

RECIPE = """
name = "tiny"
targets = ["host-onnxruntime"]
[data]
source = "image-folder"
root = "images"
size = 12
[teacher]
model = "edgekd/resnet"
kwargs = { widths = [16, 16] }
epochs = 2
batch_size = 16
[student]
model = "edgekd/resnet"
kwargs = { widths = [16, 16] }
[distill]
epochs = 8
batch_size = 8
lr = 0.02
hints = "auto"
[prune]
ratio = 0.5
epochs = 4
batch_size = 8
lr = 0.02
[quantize]
epochs = 1
batch_size = 16
[verify]
agreement = 0.8
metric_gap = 0.2
[profile]
runs = 20
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A recipe, an image folder of two classes, and every stage made by a command of its own."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "my.toml").write_text(RECIPE)
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for index, name in enumerate(("left", "right")):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 120, (12, 12, 3), dtype=np.uint8)
                pixels[:, 6 * index : 6 * index + 6] += 120
                Image.fromarray(pixels).save(place / f"{n}.png")
    call(folder, "distill --recipe my.toml --out teacher")
    call(folder, "distill --recipe my.toml --teacher teacher --out student")
    call(folder, "prune student --recipe my.toml --teacher teacher --out narrow")
    call(folder, "quantize narrow --recipe my.toml --target host-onnxruntime "
                 "--teacher student --out integers")  # fmt: skip
    call(folder, "export integers --target host-onnxruntime --out artifact")
    return folder


def call(folder: Path, line: str, code: int = 0) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def test_each_stage_writes_a_network_that_loads(project):
    nets = {name: Network.load(project / name) for name in ("student", "narrow", "integers")}
    assert nets["narrow"].params < nets["student"].params
    assert nets["integers"].scheme is not None
    for name in nets:
        done = json.loads((project / name / "done.json").read_text())
        assert 0.5 <= done["score"]["value"] <= 1
    logged = (project / "student" / "metrics.jsonl").read_text()
    assert "hints" in logged
    assert (
        "hints" not in (project / "teacher" / "metrics.jsonl").read_text()
    )  # nothing to take from


def test_several_teachers_and_an_onnx_file_teach(project):
    call(project, "export teacher --target host-onnxruntime --out box")
    call(project, "distill --recipe my.toml --set distill.epochs=1 --teacher student "
                  "--teacher box/model.onnx --out taught")  # fmt: skip
    assert "hints" in (project / "taught" / "metrics.jsonl").read_text()  # of the first
    with pytest.raises(ModelError, match="not callables alone"):
        call(project, "distill --recipe my.toml --teacher box/model.onnx --out untaught")


def test_prune_alone_needs_no_recipe(project):
    call(project, "prune student --ratio 0.5 --round-to 8 --out bare")
    assert Network.load(project / "bare").params == Network.load(project / "narrow").params


def test_verify_says_what_it_found_and_fails_where_the_gate_does(project):
    said = call(project, "verify artifact integers --recipe my.toml")
    assert "passed" in said
    parity = Parity.model_validate_json((project / "artifact" / "parity.json").read_text())
    assert (parity.gate, parity.n) == ("passed", 16)
    gate = "--set verify.mean_steps=1e-9 --set verify.agreement=1.0"
    if parity.mean_steps:
        call(project, f"verify artifact integers --recipe my.toml {gate}", code=1)


def test_export_to_several_targets_gives_each_a_folder(project):
    call(project, "export narrow --target jetson-nano --target android-arm64 --out several")
    assert (project / "several" / "jetson-nano" / "build_engine.sh").exists()
    assert (project / "several" / "android-arm64" / "model.onnx").exists()


def test_each_target_gets_the_last_network_of_a_run_that_it_takes(project):
    for stage, folder in (("distill", "student"), ("prune", "narrow"), ("quantize", "integers")):
        shutil.copytree(project / folder, project / "runs" / "my" / f"{stage}-1")
    said = call(project, "export runs/my --target host-onnxruntime --target jetson-nano --out last")
    assert "model.onnx: int8" in said and "model.onnx: fp16" in said


def test_profile_times_files_and_folders_in_turns(project):
    line = "profile artifact artifact/model.onnx --target host-onnxruntime --runs 20"
    assert "p50 ms" in call(project, line)
    first, second = json.loads(call(project, line + " --json"))
    assert first["compared"] == second["compared"]
    assert (first["runs"], first["p50_ms"] > 0) == (20, True)


def test_students_are_priced_and_none_is_trained(project):
    line = "students my.toml --target host-onnxruntime --set student.space={scale=[1,2,4]}"
    told = json.loads(call(project, f"{line} --json"))
    assert [row["member"]["name"] for row in told] == [
        f"edgekd/resnet scale={scale}" for scale in (4, 2, 1)
    ]
    assert told[0]["member"]["params"] > told[1]["member"]["params"]
    for row in told:
        (price,) = row["prices"]
        assert price["target"] == "host-onnxruntime" and price["measured_ms"] is None
        estimate = price["estimate"]
        assert 0 < estimate["low_ms"] <= estimate["p50_ms"] <= estimate["high_ms"]
    assert "3 members, estimated" in call(project, line)
    took = [row["prices"][0]["estimate"]["p50_ms"] for row in told]
    limit = 1.001 * sorted(took)[1]
    inside = json.loads(call(project, f"{line} --json --latency {limit}ms"))
    assert inside == [row for row, ms in zip(told, took, strict=True) if ms <= limit]
    with pytest.raises(RecipeError, match="none of 3 members is inside the budget"):
        call(project, f"{line} --latency 0.001us")


def test_a_finished_stage_is_not_overwritten(project):
    before = (project / "student" / "weights.safetensors").read_bytes()
    with pytest.raises(StateError, match="holds a finished stage"):
        call(project, "distill --recipe my.toml --out student")
    assert (project / "student" / "weights.safetensors").read_bytes() == before


def test_an_unfinished_stage_goes_on_only_with_the_same_options(project, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgekd.training.evaluate", interrupted)
        call(project, "distill --recipe my.toml --out cut", code=130)
    with pytest.raises(StateError, match="begun with other options"):
        call(project, "distill --recipe my.toml --set distill.lr=0.2 --out cut")
    call(project, "distill --recipe my.toml --out cut")
    ours, theirs = (Network.load(project / name).state() for name in ("cut", "teacher"))
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_command_that_is_refused_claims_no_folder(project):
    with pytest.raises(RecipeError, match="ratio"):
        call(project, "prune student --ratio 1.5 --out claimed")
    call(project, "prune student --ratio 0.5 --out claimed")


def test_an_unfinished_stage_goes_on_only_with_the_same_contents(project, monkeypatch):
    """Each is changed in place: the paths are the same."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    shutil.copytree(project / "teacher", project / "mine")
    torch.save(Network.load(project / "teacher").module.state_dict(), project / "mine.pt")
    line = "distill --recipe my.toml --set distill.epochs=1 --set student.weights=mine.pt"
    line += " --teacher mine --teacher box.onnx --out changing"
    call(project, "export teacher --target host-onnxruntime --out whole")
    shutil.copy(project / "whole" / "model.onnx", project / "box.onnx")
    with monkeypatch.context() as patch:
        patch.setattr("edgekd.training.evaluate", interrupted)
        call(project, line, code=130)
    image = next((project / "images" / "train" / "left").iterdir())
    spec, weights = project / "mine" / "spec.json", project / "mine" / "weights.safetensors"
    student = Network.load(project / "student")
    changes = {
        image: lambda: Image.new("RGB", (12, 12)).save(image),
        spec: lambda: spec.write_text(spec.read_text() + "\n"),
        weights: lambda: shutil.copy(project / "student" / "weights.safetensors", weights),
        project / "mine.pt": lambda: torch.save(student.module.state_dict(), project / "mine.pt"),
        project / "box.onnx": lambda: (
            export(student, target="host-onnxruntime", out=project / "o")
            and shutil.copy(project / "o" / "model.onnx", project / "box.onnx")
        ),
    }
    for path, change in changes.items():
        before, times = path.read_bytes(), path.stat()
        change()
        with pytest.raises(StateError, match="begun with other options, networks or data"):
            call(project, line)
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    call(project, line)


def test_a_recipe_without_prune_is_refused(project):
    text = RECIPE[: RECIPE.index("[prune]")] + RECIPE[RECIPE.index("[quantize]") :]
    (project / "plain.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"has no \[prune\] section"):
        call(project, "prune student --recipe plain.toml --out never")
    with pytest.raises(StateError, match=r"nowhere does not exist"):
        call(project, "profile nowhere --target host-onnxruntime")


# ---- facts -----------------------------------------------------------------------------------


def test_targets_are_listed_and_one_is_told_with_its_sources(tmp_path):
    listed = json.loads(call(tmp_path, "targets --json"))
    assert {"jetson-nano", "jetson-orin-nano", "intel-cpu"} <= {t["name"] for t in listed}
    one = json.loads(call(tmp_path, "targets jetson-nano --json"))
    assert (one["opset"], one["precisions"]) == (13, ["fp16"])
    said = call(tmp_path, "targets jetson-nano")
    assert "operators.md" in said
    assert "native" in call(tmp_path, "targets")


def test_doctor_knows_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch):
    import edgekd.cli_facts as facts

    assert {row["name"] for row in json.loads(call(tmp_path, "doctor --json"))["packages"]} == set(
        facts.PACKAGES
    )
    monkeypatch.setitem(facts.PACKAGES, "no-such-package", ("nothing", "openvino"))
    assert "pip install 'edgekd[openvino]'" in call(tmp_path, "doctor")
    monkeypatch.setitem(facts.PACKAGES, "no-such-package", ("everything", None))
    assert "pip install no-such-package" in call(tmp_path, "doctor", code=1)


def test_a_report_that_is_not_there_or_damaged(tmp_path):
    with pytest.raises(StateError, match=r"report\.json does not exist"):
        call(tmp_path, "report .")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text('{"name": 1}')
    with pytest.raises(StateError, match="is damaged"):
        call(tmp_path, "report .")


@pytest.mark.parametrize(
    "command", ["distill", "prune", "quantize", "export", "verify", "profile", "targets", "doctor"]
)
def test_help_teaches(tmp_path, command):
    said = call(tmp_path, f"{command} --help")
    assert "Example" in said


@pytest.mark.parametrize("shape", ["1x3x8x8", "x=1x0x8", "x=", "x=1x-3"])
def test_a_shape_that_is_none(shape: str, tmp_path: Path):
    given = [
        "export",
        "a.onnx",
        "--target",
        "jetson-nano",
        "--out",
        str(tmp_path),
        "--shape",
        shape,
    ]
    result = CliRunner().invoke(app, given)
    assert result.exit_code != 0
    assert "give it as INPUT=1x3x224x224" in f"{result.output} {result.exception}"
