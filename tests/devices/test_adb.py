"""The link over adb, against a stub of adb that runs everything in a folder of this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from edgekd.devices import binaries
from edgekd.devices.base import get_device
from edgekd.errors import DeviceError
from edgekd.stages.profile import profile

NASTY = "a b'c\"d;$(touch oops)`touch oops`&|<>*?~!#\\ é"
# /data/local/tmp is $ROOT; `broken` says what adb says instead, `full` fills the disk
ADB = """#!/bin/sh
[ "$1" = -s ] && [ "$2" = serial-1 ] || { echo "error: device '$2' not found" >&2; exit 1; }
shift 2
if [ -f "$ROOT/../broken" ]; then cat "$ROOT/../broken" >&2; exit 1; fi
there() { printf %s "$1" | sed "s#/data/local/tmp#$ROOT#g"; }
echo "$@" >> "$ROOT/../called"
case $1 in
  shell) shift; exec sh -c "$(there "$*")";;
  push)
    [ -f "$ROOT/../full" ] && { echo 'adb: error: No space left on device' >&2; exit 1; }
    cp "$2" "$(there "$3")" && echo '1 file pushed';;
  pull)
    [ -f "$(there "$2")" ] ||
      { echo "adb: error: failed to stat remote object '$2': No such file or directory"; exit 1; }
    cp "$(there "$2")" "$3";;
  *) exit 1;;
esac
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The phone's /data/local/tmp."""
    root, programs = tmp_path / "phone" / "root", tmp_path / "bin"
    root.mkdir(parents=True)
    programs.mkdir()
    (programs / "adb").write_text(ADB)
    (programs / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("ROOT", str(root))
    return root


def pushed(phone: Path) -> list[str]:
    """Names of the files that adb was told to push, partial as they are."""
    called = (phone.parent / "called").read_text().splitlines()
    return [Path(line.split()[-1]).name for line in called if line.startswith("push ")]


def test_a_phone_says_what_it_is(phone: Path):
    facts = get_device("adb://serial-1").check()
    assert facts.host
    assert facts.machine == os.uname().machine
    assert facts.free_mib > 0


@pytest.mark.parametrize("remote", ["edgekd/x", f"edgekd/{NASTY.replace('/', '')}"])
def test_a_folder_arrives_as_it_is_and_once(phone: Path, bundle: Path, remote: str, contents: Any):
    device = get_device("adb://serial-1")
    device.push(bundle, remote)
    assert contents(phone / remote) == contents(bundle)
    assert {p.name for p in phone.iterdir()} == {"edgekd"}  # nothing else ran
    (bundle / "empty").write_text("changed")
    before = len(pushed(phone))
    device.push(bundle, remote)
    assert len(pushed(phone)) == before + 1
    assert contents(phone / remote) == contents(bundle)


def test_whole_files_stay_when_the_link_is_lost(phone: Path, bundle: Path, contents: Any):
    device = get_device("adb://serial-1")
    adb = Path(os.environ["PATH"].split(os.pathsep)[0]) / "adb"
    lost = 'push) case $2 in */model.onnx) head -c 1000 "$2" > "$(there "$3")"; echo gone >&2;'
    adb.write_text(ADB.replace("  push)", f"  {lost} exit 1;; esac"))
    with pytest.raises(DeviceError, match=r"link failed; try again: whole files stay \(gone\)"):
        device.push(bundle, "far")
    there = set(contents(phone / "far"))
    assert {"-rf", "empty"} <= there and "model.onnx" not in there
    adb.write_text(ADB)
    (phone.parent / "called").unlink()
    device.push(bundle, "far")
    assert contents(phone / "far") == contents(bundle)
    assert not any("empty" in name for name in pushed(phone))


def test_what_arrives_damaged_is_removed(phone: Path, bundle: Path, contents: Any):
    adb = Path(os.environ["PATH"].split(os.pathsep)[0]) / "adb"
    adb.write_text(ADB.replace('cp "$2" "$(there', 'tr x y < "$2" > "$(there'))
    with pytest.raises(DeviceError, match=r"model.onnx arrived damaged"):
        get_device("adb://serial-1").push(bundle, "far")
    assert not any("model" in name for name in contents(phone / "far"))


def test_a_program_gets_its_arguments_as_they_are(phone: Path):
    device = get_device("adb://serial-1")
    (phone / NASTY).mkdir()
    ran = device.run(["printf", "%s\n", NASTY, "", "-x", "two\nlines"], cwd=NASTY)
    assert ran == (0, f"{NASTY}\n\n-x\ntwo\nlines\n", "")
    ran = device.run(["sh", "-c", "pwd; echo wrong >&2; exit 7"], cwd=NASTY)
    assert ran == (7, f"{phone}/{NASTY}\n", "wrong\n")  # adb itself said 0
    assert list((phone / NASTY).iterdir()) == []
    with pytest.raises(DeviceError, match="sleep did not end within 1 s"):
        device.run(["sleep", "60"], timeout=1)


def test_a_file_is_fetched_whole_or_not_at_all(phone: Path, bundle: Path, tmp_path: Path):
    device = get_device("adb://serial-1")
    (phone / "got it").write_bytes((bundle / "model.onnx").read_bytes())
    device.fetch("got it", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == (bundle / "model.onnx").read_bytes()
    with pytest.raises(DeviceError, match="No such file"):
        device.fetch("absent", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_model_is_measured_by_the_runtimes_binary(
    phone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(binaries, "CALLS", 2)
    for place, script in (
        (tmp_path / "bin" / "python3", "exit 127"),
        (phone / "benchmark_model", "[ -f model.tflite ] && echo 'Timings (microseconds): count=50 "
         "first=9 curr=9 min=8 max=12 avg=10 std=1 p5=8 median=9 p95=11'"),
    ):  # fmt: skip
        place.write_text(f"#!/bin/sh\n{script}\n")
        place.chmod(0o755)
    (tmp_path / "model.tflite").write_bytes(b"a model")
    m = profile(tmp_path / "model.tflite", target="android-litert", device="adb://serial-1")
    assert (m.p50_ms, m.runs, m.device, m.origin) == (0.009, 2, "adb://serial-1", "device")


# what adb printed in reports of these faults -> the remedy
@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set", "allow USB"),
        ("error: device offline", "plug it in again"),
        ("error: no devices/emulators found", "adb devices lists them"),
        ("* daemon not running\nerror: cannot connect to daemon", "adb start-server"),
        ("error: insufficient permissions for device: no permissions (user is not in plugdev)",
         "may not open its USB port"),
        ("error: closed", r"link failed; try again.*error: closed"),
    ],
)  # fmt: skip
def test_what_adb_says_becomes_a_remedy(phone: Path, said: str, remedy: str):
    (phone.parent / "broken").write_text(said)
    with pytest.raises(DeviceError, match=remedy):
        get_device("adb://serial-1").check()


def test_other_faults(phone: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DeviceError, match="is it plugged in"):
        get_device("adb://another").check()
    (phone.parent / "full").touch()
    with pytest.raises(DeviceError, match="disk is full; make room"):
        get_device("adb://serial-1").push(bundle, "far")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match="apt-get install adb"):
        get_device("adb://serial-1").check()


@pytest.mark.parametrize("address", ["adb://", "adb://-s", "adb://a b", "adb://a;id", "adb://a\n"])
def test_addresses_that_are_none(address: str):
    with pytest.raises(DeviceError, match="is no address"):
        get_device(address)


@pytest.mark.parametrize("address", ["adb://emulator-5554", "adb://192.168.1.7:5555"])
def test_addresses(address: str):
    assert get_device(address).address == address
