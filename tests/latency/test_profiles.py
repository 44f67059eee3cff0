from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.errors import StateError
from edgekd.latency.profiles import COLUMNS, ProfileRow, append_rows, own_file, read_profile

ROW = ProfileRow(
    kind="kernel", network="dense-0", op="QLinearConv", cin=16, cout=32, kernel=3, stride=2,
    groups=1, height=24, width=20, fused="add+relu", reads=9216, writes=15360, macs=2211840,
    precision="int8", threads=1, p50_ms=0.125, runs=150, clock="wall", runtime="onnxruntime",
    runtime_version="1.32.0", host='AMD "EPYC", 2 cores', instruction_set="avx512_vnni",
    conditions="shared, busy", date="2026-11-24", origin="host", sha256="ab" * 32,
)  # fmt: skip
WRITER = """
import sys
from pathlib import Path

from edgekd.latency.profiles import ProfileRow, append_rows

row = ProfileRow.model_validate_json(sys.argv[2])
for index in range(12):
    append_rows(Path(sys.argv[1]), [row.model_copy(update={"network": f"{sys.argv[3]}-{index}"})])
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path))
    return tmp_path


def test_what_is_appended_is_read(home):
    network = ROW.model_copy(update={"kind": "network", "op": "", "low_ms": 0.1, "high_ms": 0.2})
    append_rows(own_file("mine"), [ROW])
    append_rows(own_file("mine"), [network])
    assert read_profile("mine") == [ROW, network]
    with own_file("mine").open(newline="") as file:
        (first, _) = csv.DictReader(file)  # another reader
    assert first["host"] == ROW.host
    assert (first["stride"], first["low_ms"]) == ("2", "")


def test_a_users_rows_come_behind_the_shipped_ones(home, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped"
    append_rows(shipped / "mine.csv", [ROW])
    monkeypatch.setattr("edgekd.latency.profiles.data_folders", lambda kind: [home / kind, shipped])
    append_rows(own_file("mine"), [ROW.model_copy(update={"network": "own"})])
    assert [row.network for row in read_profile("mine")] == ["dense-0", "own"]


def test_no_file_no_rows(home):
    assert read_profile("never-measured") == []


def test_writers_at_once_lose_nothing(home):
    path = own_file("mine")
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, ROW.model_dump_json(), name])
        for name in ("a", "b", "c")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    wanted = {f"{name}-{index}" for name in ("a", "b", "c") for index in range(12)}
    found = [row.network for row in read_profile("mine")]
    assert len(found) == 36
    assert set(found) == wanted


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[:-9], "line 3: it is torn"),
        (lambda text: text + "1,2,3\n", "line 4: 3 values"),
        (lambda text: text.replace("0.125", "-1", 1), "line 2: p50_ms"),
        (lambda text: text.replace("int8", "int4", 1), "line 2: precision"),
        (lambda text: text.replace("kind,", "sort,", 1), "line 1: the columns differ"),
    ],
)
def test_a_line_that_is_not_one_is_named(home, spoil, said):
    path = own_file("mine")
    append_rows(path, [ROW, ROW])
    path.write_text(spoil(path.read_text()))
    before = path.read_text()
    with pytest.raises(StateError, match=said):
        read_profile("mine")
    with pytest.raises(StateError, match=said):
        append_rows(path, [ROW])
    assert path.read_text() == before


def test_every_shipped_row_is_whole_and_says_where_it_is_from():
    for path in (Path(__file__).parents[2] / "profiles").glob("*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and tuple(rows[0]) == COLUMNS
        for row in rows:
            assert row["host"] and row["runtime_version"] and row["date"] and row["sha256"]
            assert row["origin"] in ("host", "device")
        assert len(read_profile(path.stem)) >= len(rows)
