"""An OpenSSH server on loopback: its own port, keys and folder, and a client that knows it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Contents = Callable[[Path], dict[str, tuple[bytes, int]]]
# what a shell would make something of; the tests have it as NASTY too
NASTY = "a b'c\"d;$(touch oops)`touch oops`&|<>*?~!#\\ é"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


class Server:
    """What a login finds: `home` for its folder, and `bin` first on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.bin = folder, folder / "home", folder / "bin"
        for made in (self.home, self.bin):
            made.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.address = f"ssh://{os.environ.get('USER') or 'root'}@127.0.0.1:{self.port}"
        for name in ("host", "user"):
            self.new_key(name)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        # what sshd does itself, but in another folder than the user's own
        login = folder / "login.sh"
        login.write_text(
            f"cd '{self.home}' && PATH='{self.bin}':/usr/bin:/bin "
            'exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n'
        )
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nForceCommand /bin/sh {login}\n"
            "PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        )
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known\n"
            "GlobalKnownHostsFile /dev/null\nIdentityAgent none\n"
        )
        self.know()
        self.start()

    def new_key(self, name: str) -> None:
        path = self.folder / name
        path.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)

    def know(self) -> None:
        """The client knows the host's key."""
        kind, key, _ = (self.folder / "host.pub").read_text().split()
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def program(self, name: str, script: str) -> None:
        """Put a program on the PATH of logins."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)

    def start(self) -> None:
        assert SSHD is not None
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd refuses to start without it
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")],
                stderr=log, start_new_session=True,
            )  # fmt: skip
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        """With its connections, which are children of its own; what they started stays."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, _, rest = stat.read_text().partition(" ")
            except (FileNotFoundError, ProcessLookupError):
                continue
            name, _, fields = rest.rpartition(") ")
            if "sshd" in name and int(fields.split()[1]) == self.process.pid:
                os.kill(int(pid), signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    if SSHD is None:
        pytest.skip("sshd is not installed; run: sudo apt-get install openssh-server")
    made = Server(tmp_path / "server")
    monkeypatch.setenv("EDGEKD_SSH_CONFIG", str(made.folder / "ssh_config"))
    yield made
    made.kill()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder to be pushed, with all that a link may stumble over."""
    folder = tmp_path / "bundle"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(random.Random(0).randbytes(3_000_000))
    (folder / "empty").touch()
    (folder / "sub" / NASTY.replace("/", "")).write_text("nasty")
    (folder / "-rf").write_text("no option")
    script = folder / "build.sh"
    script.write_text("echo built\n")
    script.chmod(0o755)
    return folder


@pytest.fixture
def contents() -> Contents:
    """Name -> bytes and mode of all files in a folder."""
    return lambda folder: {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode)
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip
