"""The command line: help, exit codes, and errors that are one line."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import edgekd
from edgekd import cli, pipeline
from edgekd.errors import DataError, MissingPackageError, TrainingError
from edgekd.recipe import Recipe, shipped_recipes

COMMANDS = [command.callback.__name__ for command in cli.app.registered_commands]
RECIPE = """
name = "tiny"
targets = ["host-onnxruntime"]
data.source = "slow_source:make"
teacher = { model = "edgekd/resnet", epochs = 1 }
student.model = "edgekd/resnet"
distill.epochs = 1
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def edge(monkeypatch, capsys):
    """Run the entry point in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgekd", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return call


def assert_one_line(stderr: str, says: str) -> None:
    assert re.fullmatch(r"error: [^\n]+\n", stderr), stderr
    assert re.search(says, stderr), stderr


# ---- help --------------------------------------------------------------------------------------


def test_help_names_every_command():
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert {"run", "init"} <= set(COMMANDS)
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", result.output)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"edgekd {command}" in result.output.partition("Example:")[2]


def test_without_arguments_it_helps():
    result = CliRunner().invoke(cli.app, [])
    assert "Usage:" in result.output


def test_version_is_the_packages():
    text = Path(edgekd.__file__).read_text()
    (version,) = re.findall(r'^__version__ = "(.*)"$', text, re.MULTILINE)
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{version}\n")


@pytest.mark.parametrize("arguments", [["rnu"], ["run"], ["run", "--nope"], ["init", "a", "b"]])
def test_wrong_usage_exits_2(edge, arguments):
    code, _, stderr = edge(*arguments)
    assert code == 2
    assert "Usage:" in stderr


# ---- init --------------------------------------------------------------------------------------


def test_init_writes_a_recipe_that_loads(tmp_path, edge):
    path = tmp_path / "my.toml"
    code, stdout, _ = edge("init", path, "--from", "fashion-mnist-quick")
    assert (code, stdout) == (0, f"wrote {path}; run it: edgekd run {path}\n")
    shipped = Path(edgekd.__file__).parent / "recipes" / "fashion-mnist-quick.toml"
    assert path.read_bytes() == shipped.read_bytes()
    assert Recipe.load(path) == Recipe.load("fashion-mnist-quick")


def test_init_never_overwrites(tmp_path, edge):
    path = tmp_path / "my.toml"
    path.write_text("mine")
    code, _, stderr = edge("init", path)
    assert code == 2
    assert_one_line(stderr, r"my\.toml exists; choose another name")
    assert path.read_text() == "mine"


def test_init_lists_what_ships(edge):
    code, stdout, _ = edge("init", "--list")
    assert code == 0
    lines = stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(shipped_recipes())
    assert all(len(line.split()) > 3 for line in lines)


def test_init_from_nothing_known_says_the_nearest(tmp_path, edge):
    code, _, stderr = edge("init", tmp_path / "my.toml", "--from", "fashion")
    assert code == 2
    assert_one_line(stderr, "no recipe 'fashion'; did you mean 'fashion-mnist'")
    assert not (tmp_path / "my.toml").exists()


def test_init_into_a_folder_that_is_not_there_exits_2(tmp_path, edge):
    code, _, stderr = edge("init", tmp_path / "nowhere" / "my.toml")
    assert code == 2
    assert_one_line(stderr, r"No such file or directory \(.*nowhere")


# ---- run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fashion-mnst"], "no recipe 'fashion-mnst'; did you mean 'fashion-mnist'"),
        (["{recipe}", "--set", "distill.epoch=2"], "unknown key; did you mean 'epochs'"),
        (["{recipe}", "--set", "distill.lr=[/bold]"], r"distill.lr: .*\(got '\[/bold\]'\)"),
        (["{recipe}", "--set", "seed"], "write section.key=value"),
        (["{recipe}", "--target", "intel-cpus"], "did you mean 'intel-cpu'"),
        (["{recipe}", "--set", "data.source=nmist"], "unknown data source .* 'mnist'"),
        (["{recipe}", "--set", "data.source=no.such:thing"], "'no.such:thing' cannot be imported"),
        (["{broken}"], "not valid TOML"),
    ],
)
def test_bad_input_exits_2_with_one_line(tmp_path, edge, recipe, arguments, says):
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    paths = {"recipe": recipe, "broken": broken}
    out = tmp_path / "runs"
    code, stdout, stderr = edge("run", *(a.format(**paths) for a in arguments), "--out", out)
    assert (code, stdout) == (2, "")
    assert_one_line(stderr, says)


def test_options_reach_the_pipeline(edge, recipe, tmp_path, monkeypatch):
    given: dict[str, Any] = {}

    def stop(recipe: Recipe, **options: Any) -> None:
        given.update(options, recipe=recipe)
        raise DataError("stop here")

    monkeypatch.setattr(pipeline, "run", stop)
    edge("run", recipe, "--set", "seed=4", "--set", "distill.lr=0.5", "--target", "intel-cpu",
         "--target", "android-arm64", "--out", tmp_path / "o", "--fresh")  # fmt: skip
    assert given["recipe"] == Recipe.load(
        recipe, changes=["seed=4", "distill.lr=0.5"], targets=["intel-cpu", "android-arm64"]
    )
    assert (given["out"], given["fresh"]) == (tmp_path / "o", True)
    edge("run", recipe, "--latency", "5ms", "--device", "ssh://me@there", "--require-measured")
    assert given["recipe"] == Recipe.load(
        recipe, changes=["budget.require_measured=true"], latency=["5ms"],
        devices=["ssh://me@there"],
    )  # fmt: skip
    assert given["recipe"].budget.require_measured
    edge("run", recipe)
    assert given["recipe"] == Recipe.load(recipe)
    assert (given["out"], given["fresh"]) == (Path("runs"), False)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (TrainingError("the loss is not finite"), 2, "the loss is not finite"),
        (MissingPackageError("openvino", "openvino"), 2, r"pip install 'edgekd\[openvino\]'"),
        (DataError("[/red] is no markup"), 2, r"\[/red\] is no markup"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/full"),
            2,
            r"No space left .*\(/full\)",
        ),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
    ],
)
def test_errors_end_in_one_line_and_a_code(edge, recipe, monkeypatch, error, code, says):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    found, stdout, stderr = edge("run", recipe)
    assert (found, stdout) == (code, "")
    assert_one_line(stderr, says)


def test_an_error_that_is_a_bug_keeps_its_traceback(recipe, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "run", fail)
    monkeypatch.setattr(sys, "argv", ["edgekd", "run", str(recipe)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_file_where_the_runs_should_go_exits_2(edge, recipe, tmp_path):
    (tmp_path / "runs").write_text("")
    code, _, stderr = edge("run", recipe, "--out", tmp_path / "runs")
    assert code == 2
    assert_one_line(stderr, r"\(.*runs.*\); what was done before is intact")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_exits_2(edge, recipe, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o500)
    code, _, stderr = edge("run", recipe, "--out", tmp_path / "runs")
    assert code == 2
    assert_one_line(stderr, r"Permission denied \(.*runs")


# ---- a process of its own ----------------------------------------------------------------------


def test_ctrl_c_exits_130(recipe, tmp_path):
    ready = tmp_path / "ready"
    (tmp_path / "slow_source.py").write_text(
        "import pathlib, time\n"
        f"def make():\n    pathlib.Path({str(ready)!r}).touch()\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekd", "run", recipe, "--out", tmp_path / "runs"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # tests that run behind a shell's & inherit an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not ready.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "interrupted; the same command goes on from here" in stderr


def test_a_bad_recipe_exits_2_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "edgekd", "run", "nowhere.toml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no recipe 'nowhere.toml'; ")
    assert not list(tmp_path.iterdir())
