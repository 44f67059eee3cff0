"""Building an exported artifact on a device: a real server, a fake trtexec."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.devices.base import DeviceFacts
from edgekd.devices.build import DeviceBuild, build_on, tensorrt_version
from edgekd.devices.ssh import SshDevice
from edgekd.errors import DeviceError, RecipeError, TargetError
from edgekd.network import Network
from edgekd.runtimes.base import Artifact
from edgekd.stages.export import export

TRTEXEC = """
echo '&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec'
seq 100
for argument; do
  case $argument in --saveEngine=*) echo "$@" > "${argument#--saveEngine=}";; esac
done
"""
CHECK = """
import json, pathlib, sys
assert sys.argv[1:] == ["--check"]
print("outputs of 3 inputs")
print(json.dumps({"engine": pathlib.Path("model.engine").read_text().split()[0], "agree": %s}))
sys.exit(%d)
"""


@pytest.fixture
def artifact(trained: Network, tmp_path: Path) -> Artifact:
    made = export(trained, target="jetson-nano", out=tmp_path / "it's $(a) bundle")
    (made.path.parent / "infer.py").write_text(CHECK % ("True", 0))
    return made


@pytest.fixture
def jetson(server: Any) -> Any:
    server.program("trtexec", TRTEXEC)
    return server


def test_an_engine_is_built_and_checked_there(jetson: Any, artifact: Artifact):
    built = build_on(artifact, device=jetson.address)
    assert (built.result, built.reason, built.tensorrt) == ("passed", None, "8.2.1")
    assert built.check == {"engine": "--onnx=model.onnx", "agree": True}
    assert (len(built.tail), built.tail[-1]) == (40, "100")
    folder = jetson.home / built.folder
    assert folder.name == f"jetson-nano-{artifact.sha256[:12]}"
    assert "--fp16" in (folder / "model.engine").read_text()
    here = artifact.path.parent
    assert not (here / "model.engine").exists()  # an engine is that device's alone
    assert DeviceBuild(**json.loads((here / "device.json").read_text())) == built
    log = (here / "build.log").read_text().splitlines()
    assert log[0] == "model.onnx: OK"  # the script's own sum of what arrived
    assert log[-100:] == [str(i) for i in range(1, 101)]


def test_an_engine_that_is_not_built(jetson: Any, artifact: Artifact):
    jetson.program("trtexec", "echo out of memory; exit 9")
    built = build_on(artifact, device=jetson.address)
    assert (built.result, built.reason) == ("failed", "build_engine.sh exits with 9")
    assert (built.tail[-1], built.check) == ("out of memory", None)


def test_outputs_that_do_not_agree(jetson: Any, artifact: Artifact):
    (artifact.path.parent / "infer.py").write_text(CHECK % ("False", 1))
    built = build_on(artifact, device=jetson.address)
    assert built.result == "failed"
    assert built.reason is not None and "infer.py --check exits with 1" in built.reason
    assert built.check is not None and built.check["agree"] is False


def test_without_a_check_it_is_not_called_passed(jetson: Any, artifact: Artifact):
    (artifact.path.parent / "infer.py").unlink()
    built = build_on(artifact, device=jetson.address)
    assert (built.result, built.reason) == ("unchecked", "the artifact has no infer.py")


def test_a_device_without_python_or_room(
    jetson: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
):
    facts = SshDevice(jetson.address).check()

    def found(**changes: Any) -> DeviceFacts:
        return facts.model_copy(update=changes)

    monkeypatch.setattr(SshDevice, "check", lambda _: found(python=None))
    with pytest.raises(DeviceError, match=r"no python3, which infer.py needs"):
        build_on(artifact, device=jetson.address)
    monkeypatch.setattr(SshDevice, "check", lambda _: found(free_mib=0))
    with pytest.raises(DeviceError, match="has 0 MiB of free disk; 1 MiB are needed"):
        build_on(artifact, device=jetson.address)
    assert list(jetson.home.iterdir()) == []


def test_what_is_not_built_on_a_device(fp32_artifact: Artifact):
    with pytest.raises(TargetError, match=r"host-onnxruntime: .* no build_engine.sh"):
        build_on(fp32_artifact, device="ssh://host")


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101602] [b10] # trtexec", "10.16.2"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec", "10.3.0"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec", "8.2.1"),
        ("trtexec is not here", None),
    ],
)
def test_versions(line: str, version: str | None):
    assert tensorrt_version(line) == version


def test_on_the_command_line(jetson: Any, trained: Network, tmp_path: Path):
    jetson.program("python3", """echo '{"passed": true}'""")  # TensorRT is not here to infer
    trained.save(tmp_path / "net")
    line = ["export", str(tmp_path / "net"), "--target", "jetson-nano", "--out"]
    on = ["--build", "--device", jetson.address]
    done = CliRunner().invoke(app, [*line, str(tmp_path / "a"), *on], catch_exceptions=False)
    assert done.exit_code == 0
    assert "TensorRT 8.2.1" in done.output
    jetson.program("trtexec", "echo out of memory; exit 9")
    shutil.rmtree(jetson.home)
    jetson.home.mkdir()
    done = CliRunner().invoke(app, [*line, str(tmp_path / "b"), *on], catch_exceptions=False)
    assert done.exit_code == 1
    assert "out of memory" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--build"], "go together"),
        (["--device", "ssh://host"], "go together"),
        (["--target", "jetson-tx2", "--build", "--device", "ssh://host"], "2 are given"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str, tmp_path: Path):
    line = ["export", str(tmp_path), "--target", "jetson-nano", "--out", str(tmp_path / "a")]
    with pytest.raises(RecipeError, match=message):
        CliRunner().invoke(app, [*line, *options], catch_exceptions=False)
