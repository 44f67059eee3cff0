"""The link over ssh, against a real OpenSSH server on loopback."""

from __future__ import annotations

import hashlib
import platform
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgekd.devices.base import get_device
from edgekd.errors import DeviceError

# what a shell would make something of
NASTY = "a b'c\"d;$(touch oops)`touch oops`&|<>*?~!#\\ é"


def test_a_device_says_what_it_is(server: Any):
    facts = get_device(server.address).check()
    assert (facts.host, facts.machine) == (platform.node(), platform.machine())
    assert facts.free_mib > 0
    server.program("python3", "exit 127")
    assert get_device(server.address).check().python is None


@pytest.mark.parametrize("remote", ["plain", f"x/{NASTY.replace('/', '')}", "-n"])
def test_a_folder_arrives_as_it_is_and_once(server: Any, bundle: Path, remote: str, contents: Any):
    device = get_device(server.address)
    device.push(bundle, remote)
    assert contents(server.home / remote) == contents(bundle)
    assert {p.name for p in server.home.iterdir()} == {remote.split("/")[0]}  # nothing else ran
    # what is there is not sent again
    before = {p: p.stat().st_mtime_ns for p in (server.home / remote).rglob("*") if p.is_file()}
    (bundle / "empty").write_text("changed")
    device.push(bundle, remote)
    after = {p: p.stat().st_mtime_ns for p in before}
    assert [p.name for p in before if before[p] != after[p]] == ["empty"]
    assert contents(server.home / remote) == contents(bundle)


def test_a_program_gets_its_arguments_as_they_are(server: Any):
    device = get_device(server.address)
    (server.home / NASTY).mkdir()
    ran = device.run(["printf", "%s\n", NASTY, "", "-x", "two\nlines"], cwd=NASTY)
    assert ran == (0, f"{NASTY}\n\n-x\ntwo\nlines\n", "")
    ran = device.run(["sh", "-c", "pwd; echo wrong >&2; exit 7"], cwd=NASTY)
    assert ran == (7, f"{server.home}/{NASTY}\n", "wrong\n")
    # 255 is the client's own; the program's is another, and no lost link
    assert device.run(["sh", "-c", "exit 255"]).exit_code == 254
    assert list((server.home / NASTY).iterdir()) == []


def test_a_program_that_takes_too_long_is_ended(server: Any):
    began = time.monotonic()
    with pytest.raises(DeviceError, match="sleep did not end within 1 s"):
        get_device(server.address).run(["sleep", "60"], timeout=1)
    assert time.monotonic() - began < 20


def test_a_file_is_fetched_whole_or_not_at_all(server: Any, bundle: Path, tmp_path: Path):
    device = get_device(server.address)
    (server.home / NASTY).write_bytes((bundle / "model.onnx").read_bytes())
    device.fetch(NASTY, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == (bundle / "model.onnx").read_bytes()
    with pytest.raises(DeviceError, match="No such file"):
        device.fetch("absent", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ---- what goes wrong -----------------------------------------------------------------------------


def partial_of(path: Path, remote: Path) -> Path:
    """Where a file is while it arrives."""
    return remote / f".{path.name}.{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.partial"


def cut_off(server: Any, link: threading.Thread, sent: Path, size: int) -> None:
    """Kill the server as soon as `sent` holds `size` bytes."""
    link.start()
    for _ in range(400):
        if sent.exists() and sent.stat().st_size >= size:
            break
        time.sleep(0.05)
    else:
        raise AssertionError(f"{sent} never held {size} bytes")
    server.kill()
    link.join(60)
    assert not link.is_alive()


def test_a_push_that_was_cut_off_goes_on(server: Any, bundle: Path, contents: Any):
    device, sent = get_device(server.address), 1_000_000
    errors: list[DeviceError] = []

    def push() -> None:
        try:
            device.push(bundle, "far")
        except DeviceError as error:
            errors.append(error)

    server.program("cat", f"head -c {sent}; exec sleep 30")  # a slow link
    for name in ("-rf", "build.sh", "empty"):  # those before the large file
        (bundle / name).unlink()
    partial = partial_of(bundle / "model.onnx", server.home / "far")
    cut_off(server, threading.Thread(target=push), partial, sent)
    assert "try again" in str(errors[0])
    assert list(contents(server.home / "far")) == [partial.name]  # no half file under its name

    server.program("cat", "exec tee -a ../counted")
    server.start()
    device.push(bundle, "far")
    assert contents(server.home / "far") == contents(bundle)
    counted = (server.home / "counted").read_bytes()
    assert counted[: 3_000_000 - sent] == (bundle / "model.onnx").read_bytes()[sent:]


def test_a_full_disk_is_named_and_leaves_nothing(server: Any, bundle: Path, contents: Any):
    (server.home / "far").mkdir()
    partial = partial_of(bundle / "model.onnx", server.home / "far")
    partial.symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(DeviceError, match="disk is full; make room"):
        get_device(server.address).push(bundle, "far")
    assert not any("model" in name for name in contents(server.home / "far"))


def test_what_arrives_damaged_is_removed(server: Any, bundle: Path, contents: Any):
    server.program("cat", "tr x y")
    with pytest.raises(DeviceError, match=r"model.onnx arrived damaged"):
        get_device(server.address).push(bundle, "far")
    assert not any("model" in name for name in contents(server.home / "far"))


def test_a_missing_tool_is_named(server: Any):
    login = server.folder / "login.sh"
    for tool in ("env", "sh", "uname", "cat"):
        (server.bin / tool).symlink_to(f"/bin/{tool}")
    login.write_text(login.read_text().replace(":/usr/bin:/bin", ""))
    with pytest.raises(DeviceError, match="has no sha256sum; install coreutils"):
        get_device(server.address).check()


def test_the_wrong_port_and_the_wrong_name(server: Any):
    server.kill()
    with pytest.raises(DeviceError, match="nothing listens at that port"):
        get_device(server.address).check()
    with pytest.raises(DeviceError, match="no such host"):
        get_device("ssh://nobody@host.invalid").check()
    server.start()


def test_an_unknown_host_key_is_refused(server: Any):
    (server.folder / "known").unlink()
    # nor can the user's own settings wave it through
    config = server.folder / "ssh_config"
    config.write_text(config.read_text() + "StrictHostKeyChecking no\n")
    with pytest.raises(DeviceError, match="host key is not known; connect by hand"):
        get_device(server.address).check()
    assert not (server.folder / "known").exists()


def test_a_changed_host_key_is_refused(server: Any):
    server.kill()
    server.new_key("host")
    server.start()
    with pytest.raises(DeviceError, match=r"not the one that is known.*ssh-keygen -R '\[127"):
        get_device(server.address).check()


def test_a_key_that_is_not_let_in(server: Any):
    server.new_key("user")
    with pytest.raises(DeviceError, match=r"does not let this user in.*ssh-copy-id -p"):
        get_device(server.address).check()


@pytest.mark.parametrize(
    "address",
    ["ssh://", "ssh://-oProxyCommand=touch oops", "ssh://me@-host", "ssh://-l@host", "ssh://a b",
     "ssh://host;id", "ssh://$(id)@host", "ssh://host:0", "ssh://host:65536", "ssh://host/path",
     "ssh://me@you@host", "ssh://host\n", "ssh://[::1"],
)  # fmt: skip
def test_addresses_that_are_none(address: str):
    with pytest.raises(DeviceError, match="is no address"):
        get_device(address)


@pytest.mark.parametrize("address", ["", "host", "shh://host", "local://", "ssh"])
def test_links_that_are_none(address: str):
    with pytest.raises(DeviceError, match="no device"):
        get_device(address)


@pytest.mark.parametrize("address", ["ssh://orin", "ssh://me@10.0.0.2/", "ssh://me@[fe80::1]:2222"])
def test_addresses(address: str):
    assert get_device(address).address == address


def test_without_a_client(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match="apt-get install openssh-client"):
        get_device("ssh://host").check()
