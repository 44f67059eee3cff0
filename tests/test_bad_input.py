"""Bad input on the command line: one message that says what to do, and earlier results intact."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import edgekd
from edgekd import cli
from edgekd.errors import DataError

SOURCE = """
import torch
from torch import nn

from edgekd import Data, Preprocessing
from edgekd.data.base import InMemory


def images(count, top=1, size=12):
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 100, (count, 1, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    pixels[labels == 1, :, :6] += 100
    labels[-1:] = top
    return InMemory(pixels, labels)


def data(train=64, top=1, size=12):
    splits = {"train": images(train, top), "test": images(32, size=size)}
    return Data("halves", splits, ("a", "b"), Preprocessing(mean=(0.4,), std=(0.25,)))


def wrong_label():
    return data(top=7)


def wrong_size():
    return data(size=9)


def empty():
    return data(train=0)


class Determinants(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(1, 8, 3, stride=4)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.linalg.det(self.features(x)))


def determinants():
    return Determinants()
"""
RECIPE = """
name = "tiny"
targets = ["host-onnxruntime"]
[data]
source = "bad_input_source:data"
[teacher]
model = "edgekd/resnet"
kwargs = { widths = [8, 8] }
epochs = 1
batch_size = 16
[student]
model = "edgekd/resnet"
kwargs = { widths = [8] }
[distill]
epochs = 1
batch_size = 16
lr = 0.02
[verify]
agreement = 0.5
metric_gap = 0.5
[profile]
runs = 20
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A recipe that has been carried out once."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad_input_source.py").write_text(SOURCE)
    (folder / "tiny.toml").write_text(RECIPE)
    done = command(folder, "run tiny.toml")
    assert done.returncode == 0, done.stderr
    return folder


def command(
    folder: Path, line: str, file_size: int = resource.RLIM_INFINITY
) -> subprocess.CompletedProcess[str]:
    """`edgekd line` in a process of its own; no file may become larger than `file_size` bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    package = str(Path(edgekd.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "edgekd", *line.split()],
        cwd=folder, capture_output=True, text=True, timeout=200, preexec_fn=limit,
        env=os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def check(code: int, stderr: str, message: str) -> None:
    """Exit 2, and one error on one line that has all of `message`'s parts."""
    assert code == 2, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in stderr, stderr
    for part in message.split(" … "):
        assert part in errors[0], stderr


@pytest.fixture
def refused(project, monkeypatch, capsys):
    """Check that the entry point, called in this process, refuses and leaves what was there."""

    def call(line: str, message: str) -> None:
        earlier = contents(project / "runs")
        monkeypatch.chdir(project)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", ["edgekd", *line.split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        check(end.value.code, capsys.readouterr().err, message)
        after = contents(project / "runs")
        assert {name: after.get(name) for name in earlier} == earlier

    return call


DETERMINANTS = "--set student.model=bad_input_source:determinants --set student.kwargs={}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run nowhere.toml", "no recipe 'nowhere.toml'"),
        ("run tiny.toml --set distill.epoch=3", "distill.epoch: unknown key … 'epochs'"),
        ("run tiny.toml --target jetson-nanoo", "no target 'jetson-nanoo' … 'jetson-nano'"),
        ("run tiny.toml --set teacher.weights=nothing.pt", "weights nothing.pt do not exist"),
        ("run tiny.toml --set data.source=nowhere:make", "'nowhere:make' cannot be imported"),
        ("run tiny.toml --set data.source=bad_input_source:wrong_size", "(1, 9, 9) … (1, 12, 12)"),
        ("run tiny.toml --set data.source=bad_input_source:wrong_label", "label 7 … from 0 to 1"),
        ("run tiny.toml --set data.source=bad_input_source:empty", "'train' is empty"),
        ("run tiny.toml --set distill.lr=1e30", "is not finite … try 1e+29"),
        (f"run tiny.toml {DETERMINANTS} --target jetson-nano",
         "jetson-nano: Det"),
        ("run tiny.toml --out tiny.toml", "(tiny.toml"),
        ("run tiny.toml --out /proc/nothing", "(/proc/nothing"),
        ("export runs --target intel-cpu --out x", "runs holds no network for intel-cpu"),
        ("report nowhere", "nowhere/report/report.json does not exist"),
    ],
)  # fmt: skip
def test_one_message_and_nothing_lost(refused, line, message):
    refused(line, message)


def test_a_corrupt_checkpoint(project, refused):
    finished = (project / "runs" / "tiny").glob("distill-*/done.json")
    folder = min(finished, key=lambda path: path.stat().st_mtime).parent  # the fixture's
    done = (folder / "done.json").read_text()
    (folder / "done.json").unlink()
    (folder / "last.ckpt").write_bytes(b"PK\x03\x04 and then nothing")
    try:
        refused("run tiny.toml", "last.ckpt is damaged … delete it")
    finally:
        (folder / "last.ckpt").unlink()
        (folder / "done.json").write_text(done)


class Code:
    """Leaves a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def test_a_pickled_checkpoint_runs_no_code(project, refused, tmp_path):
    torch.save({"state_dict": Code(tmp_path / "canary")}, project / "evil.pt")
    refused("run tiny.toml --set teacher.weights=evil.pt", "evil.pt … run code from the file")
    assert not (tmp_path / "canary").exists()
    torch.load(project / "evil.pt", weights_only=False)
    assert (tmp_path / "canary").exists()  # the trap works


def test_nan_in_the_data():
    x = torch.zeros(4, 1, 12, 12)
    x[2, 0, 3, 3] = float("nan")
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 2))
    net = edgekd.Network(module, torch.zeros(1, 1, 12, 12))
    with pytest.raises(DataError, match="batch 0 of 'train' holds NaN or infinity in 1 of 576"):
        edgekd.distill(
            net, task=edgekd.get_task("classification"), epochs=1,
            data=[(x, torch.zeros(4, dtype=torch.long))],
        )  # fmt: skip


def test_a_disk_that_takes_no_more(project):
    """The limit lets through all small files, and refuses the checkpoint of a larger student."""
    line = "run tiny.toml --set student.kwargs={widths=[24]}"
    earlier = contents(project / "runs")
    full = command(project, line, file_size=20_000)
    check(full.returncode, full.stderr, "File too large … what was done before is intact")
    after = contents(project / "runs")
    assert {name: after.get(name) for name in earlier} == earlier
    assert command(project, line).returncode == 0  # with room again, it goes on


@pytest.mark.parametrize(
    ("options", "message"),
    [("size=100k", "No space left on device"), ("size=4m,ro", "Read-only file system")],
)
def test_a_full_and_a_read_only_file_system(refused, tmp_path, options, message):
    place = tmp_path / "mounted"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        refused(f"run tiny.toml --set student.kwargs={{widths=[64]}} --out {place}/runs", message)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
