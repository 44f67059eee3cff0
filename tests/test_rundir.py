"""A stage's folder survives being killed at any instant, and runs no code from its files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from edgekd.errors import StateError
from edgekd.network import Network
from edgekd.rundir import RunDir, final_network
from edgekd.target import Target

STATE = {"step": 3, "net": {"w": torch.arange(1000.0)}, "optimizer": {"lr": 0.1, "state": {}}}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "stage")


def names(run: RunDir) -> set[str]:
    return {path.name for path in run.path.iterdir()}


# ---- checkpoints -------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(run):
    assert run.load_checkpoint() is None
    run.save_checkpoint(STATE)
    state = run.load_checkpoint()
    assert state["step"] == 3
    assert torch.equal(state["net"]["w"], STATE["net"]["w"])
    assert state["optimizer"] == STATE["optimizer"]


def test_half_a_checkpoint_is_never_seen(run, monkeypatch):
    run.save_checkpoint(STATE)

    write_bytes = Path.write_bytes

    def half(self: Path, content: bytes) -> None:
        write_bytes(self, content[: len(content) // 2])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(Killed):
            run.save_checkpoint({**STATE, "step": 4})
    assert run.load_checkpoint()["step"] == 3


def test_a_kill_before_the_rename_leaves_the_old_checkpoint(run, monkeypatch):
    run.save_checkpoint(STATE)

    def killed(self: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            run.save_checkpoint({**STATE, "step": 4})
    assert run.load_checkpoint()["step"] == 3


def test_what_a_killed_process_left_behind_is_ignored(run):
    run.save_checkpoint(STATE)
    (run.path / ".last.ckpt.4242").write_bytes(b"PK half a file")
    (run.path / ".done.json.4242").write_text('{"sco')
    (run.path / ".metrics.jsonl.4242").write_text('{"st')
    assert run.load_checkpoint()["step"] == 3
    assert run.done() is None
    run.finish({"score": 1})
    assert run.done() == {"score": 1}


def as_file(state: object, path: Path) -> bytes:
    torch.save(state, path)
    return path.read_bytes()


DAMAGED = {
    "empty": lambda path: b"",
    "zeros": lambda path: bytes(4096),
    "text": lambda path: b"hello",
    "json": lambda path: b'{"step": 1}',
    "cut short": lambda path: as_file(STATE, path)[:-700],
    "first half": lambda path: as_file(STATE, path)[: len(as_file(STATE, path)) // 2],
    "no step": lambda path: as_file({"net": {}}, path),
    "a list": lambda path: as_file([1, 2], path),
    "a tensor": lambda path: as_file(torch.zeros(3), path),
    "a pickled number": lambda path: pickle.dumps(7, protocol=2),
    "a bare end of pickle": lambda path: b".",
    "a pickle that pops nothing": lambda path: b"\x80\x020.",
    "a pickle of a missing memo": lambda path: b"\x80\x02h\x07.",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_checkpoint_says_what_to_do(run, tmp_path, kind):
    run.save_checkpoint(STATE)
    (run.path / "last.ckpt").write_bytes(DAMAGED[kind](tmp_path / "scratch"))
    with pytest.raises(StateError, match=r"last.ckpt is damaged, .*; delete it to start") as error:
        run.load_checkpoint()
    assert "weights_only" not in str(error.value)  # torch's advice would run what is in the file


class Malicious:
    """Pickled: a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_runs_no_code(run, tmp_path, form):
    proof = tmp_path / "executed"
    state = {**STATE, "extra": Malicious(proof)}
    run.path.mkdir()
    path = run.path / "last.ckpt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(StateError, match="damaged"):
        run.load_checkpoint()
    assert not proof.exists()
    # the file would do it
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert proof.exists()


# ---- the log -----------------------------------------------------------------------------------


def test_the_log_grows_line_by_line(run):
    assert run.history() == []
    for step in range(3):
        run.log({"step": step, "loss": step / 7})
    assert run.history() == [{"step": s, "loss": s / 7} for s in range(3)]


def test_half_a_line_at_the_end_is_left_out(run):
    run.log({"step": 1})
    run.log({"step": 2})
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text()[:-4])
    assert run.history() == [{"step": 1}]


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo'])
def test_the_log_is_cut_back_to_the_checkpoint(run, torn):
    for step in (1, 2, 3, 4):
        run.log({"step": step})
        if step == 3:
            run.save_checkpoint(STATE)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    run.load_checkpoint()
    assert run.history() == [{"step": 1}, {"step": 2}, {"step": 3}]
    run.log({"step": 4, "again": True})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][3:] == [{"step": 4, "again": True}]


def test_without_a_checkpoint_the_log_starts_anew(run):
    run.log({"step": 1})
    assert run.load_checkpoint() is None
    assert run.history() == []


# ---- done --------------------------------------------------------------------------------------


def test_done_is_said_once_it_is_done(run):
    assert run.done() is None
    run.save_checkpoint(STATE)
    assert run.done() is None
    run.finish({"score": {"value": 0.5}})
    assert run.done() == {"score": {"value": 0.5}}
    assert names(run) == {"done.json"}


def test_a_kill_while_finishing_leaves_the_stage_unfinished(run, monkeypatch):
    run.save_checkpoint(STATE)

    def killed(self: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            run.finish({"score": 1})
    assert run.done() is None
    assert run.load_checkpoint()["step"] == 3


@pytest.mark.parametrize("content", ["", '{"sco', "\x00\x00"])
def test_a_damaged_done_says_what_to_do(run, content):
    run.finish({})
    (run.path / "done.json").write_text(content)
    with pytest.raises(StateError, match=r"done.json is damaged .*; delete it to redo"):
        run.done()


# ---- a run's last network ----------------------------------------------------------------------


@pytest.fixture
def a_run(tmp_path: Path, trained: Network, quantized: Network) -> Path:
    """As the pipeline lays one out: stages, an artifact's folder, one stage not done."""
    stages = {"teacher-1": trained, "distill-2": trained, "prune-3": trained,
              "quantize-4": quantized, "quantize-5": trained, "prune-6": trained}  # fmt: skip
    for name, net in stages.items():
        net.save(tmp_path / name)
        if name != "prune-6":
            RunDir(tmp_path / name).finish({})
    RunDir(tmp_path / "export-host-onnxruntime-7").finish({})
    (tmp_path / "quantize-5" / "spec.json").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("target", "stage"),
    [
        ("host-onnxruntime", "quantize-4"),
        ("jetson-nano", "prune-3"),  # no integers
        ("jetson-orin-nano", "prune-3"),  # integers of another scheme
    ],
)
def test_a_target_gets_the_last_network_that_it_takes(a_run, target, stage):
    assert final_network(a_run, Target.load(target)) == a_run / stage
    assert final_network(a_run / "teacher-1", Target.load(target)) == a_run / "teacher-1"


def test_of_several_networks_all_are_named(a_run, trained):
    trained.save(a_run / "prune-8")
    RunDir(a_run / "prune-8").finish({})
    assert final_network(a_run, Target.load("host-onnxruntime")) == a_run / "quantize-4"
    with pytest.raises(StateError, match=r"holds 2 networks for jetson-nano; .*prune-3, .*prune-8"):
        final_network(a_run, Target.load("jetson-nano"))


def test_without_a_network_for_the_target(a_run, host):
    for name in ("distill-2", "prune-3", "quantize-4"):
        (a_run / name / "done.json").unlink()
    with pytest.raises(StateError, match="holds no network for host-onnxruntime; give a folder"):
        final_network(a_run, host)


def test_a_damaged_network_is_named(a_run, host):
    (a_run / "quantize-4" / "spec.json").write_text("{}")
    with pytest.raises(StateError, match=r"quantize-4/spec.json is damaged"):
        final_network(a_run, host)
