"""A device over ssh: the system's OpenSSH client, with its configuration, keys and known hosts.

Host keys are always checked, and nothing is asked: a key or a host that OpenSSH does not know is an
error. The arguments of the scripts are quoted once, for the login shell that OpenSSH hands the
command line to.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from edgekd.devices import scripts
from edgekd.devices.base import DeviceFacts, Ran
from edgekd.errors import DeviceError
from edgekd.files import write_atomically
from edgekd.reporting.progress import Progress

CONFIG = "EDGEKD_SSH_CONFIG"  # the client's configuration file, in place of the user's own
# a name starts with a letter or a digit: the client would take "-o…" for an option
ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][\w.-]*)@)?"
    r"(?:(?P<host>[A-Za-z0-9][\w.-]*)|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])"
    r"(?::(?P<port>\d{1,5}))?/?",
    re.ASCII,
)
OPTIONS = {
    "BatchMode": "yes", "StrictHostKeyChecking": "yes", "LogLevel": "ERROR",
    "ConnectTimeout": "15", "ServerAliveInterval": "10", "ServerAliveCountMax": "3",
    "ForwardAgent": "no", "ClearAllForwardings": "yes", "PermitLocalCommand": "no",
    "RequestTTY": "no", "RemoteCommand": "none",
}  # fmt: skip
CLIENT_FAILED = 255  # the client's own exit code
# what the client says, in lower case -> what is wrong, and the remedy
FAILURES = {
    "remote host identification has changed":
        "its host key is not the one that is known: it was set up again, or another machine "
        "answers; if you know which, run: ssh-keygen -R {known_as}",
    "host key verification failed":
        "its host key is not known; connect by hand and compare the fingerprint: ssh {by_hand}",
    "permission denied":
        "it does not let this user in with the keys here; run: ssh-copy-id {by_hand}",
    "could not resolve hostname": "no such host; look at its name",
    "connection refused": "nothing listens at that port; is it right, and the ssh server running?",
    "no route to host": "it cannot be reached; is it on, and on this network?",
    "network is unreachable": "it cannot be reached; is this machine on the network?",
    "connection timed out": "it does not answer; is it on, and on this network?",
}  # fmt: skip

# folder, name, partial name, SHA-256, bytes, mode
RECEIVE = f"""
cd -- "$1" && mkdir -p -- "$(dirname -- "$2")" || exit
cat >> "$3" || {{ code=$?; rm -f -- "$3"; exit "$code"; }}
{scripts.WHOLE}"""


class SshDevice:
    """The device at `ssh://user@host:port`; the user and the port may be left to the client.

    Raises:
        DeviceError: the address is none.
    """

    def __init__(self, address: str) -> None:
        found = ADDRESS.fullmatch(address)
        port = int(found["port"] or 22) if found else 0
        if found is None or not 0 < port < 65536:
            raise DeviceError(
                f"{address!r} is no address; write ssh://user@host or ssh://user@host:port"
            )
        self.address = address
        self._host: str = found["host"] or found["ipv6"]
        self._port = ["-p", found["port"]] if found["port"] else []
        self._login = f"{found['user']}@{self._host}" if found["user"] else self._host

    def check(self) -> DeviceFacts:
        """What the device is."""
        return scripts.check(self._script, self.address)

    def push(self, folder: Path, remote: str) -> None:
        """Copy the files of `folder` into `remote`: those that are not there, and what is left."""
        missing = scripts.missing(self._script, self.address, folder, remote)
        with Progress(f"to {self._host}", len(missing)) as progress:
            for file in missing:
                with file.path.open("rb", buffering=0) as content:
                    content.seek(file.offset)  # of the descriptor itself, which the client inherits
                    ran = self._script(
                        RECEIVE, remote, *file.arguments, given=content, timeout=None
                    )
                scripts.received(ran, file.name, self.address)
                progress.advance(file.name)

    def run(self, argv: Sequence[str], *, cwd: str = ".", timeout: float = 600.0) -> Ran:
        """Run a program; its 255 is given as 254, which the client keeps for itself."""
        return scripts.run(self._script, self.address, argv, cwd, timeout)

    def fetch(self, remote: str, local: Path) -> None:
        """Copy one remote file."""
        done = self._client(["cat", "--", remote], b"", None)
        scripts.lines(Ran(done.returncode, "", scripts.text(done.stderr)), 0, self.address)
        write_atomically(local, done.stdout)

    def _script(
        self,
        script: str,
        *arguments: str,
        given: bytes | IO[bytes] = b"",
        timeout: float | None = scripts.QUERY_SECONDS,
    ) -> Ran:
        """Run one of the scripts above; without a timeout, only a lost link ends it."""
        argv = ["env", "LC_ALL=C", "sh", "-c", script, "sh", *arguments]
        done = self._client(argv, given, timeout)
        return Ran(done.returncode, scripts.text(done.stdout), scripts.text(done.stderr))

    def _client(
        self, argv: Sequence[str], given: bytes | IO[bytes], timeout: float | None
    ) -> subprocess.CompletedProcess[bytes]:
        """The remote program's end; DeviceError where there was none."""
        if shutil.which("ssh") is None:
            raise DeviceError("ssh is not installed here; run: sudo apt-get install openssh-client")
        own = os.environ.get(CONFIG)
        # "--": what follows is the host and never an option; the login shell there reads the rest
        command = [
            "ssh", *(["-F", own] if own else []), *(f"-o{k}={v}" for k, v in OPTIONS.items()),
            *self._port, "--", self._login, shlex.join(argv),
        ]  # fmt: skip
        source: dict[str, Any] = {"input" if isinstance(given, bytes) else "stdin": given}
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout, **source)
        except subprocess.TimeoutExpired as error:
            raise scripts.too_long(self.address, "the command", error.timeout) from None
        if done.returncode == CLIENT_FAILED:
            raise DeviceError(f"{self.address}: {self._failure(scripts.text(done.stderr))}")
        return done

    def _failure(self, said: str) -> str:
        """What is wrong, from what the client says, and the remedy."""
        by_hand = " ".join([*self._port, self._login])
        known_as = f"'[{self._host}]:{self._port[1]}'" if self._port else self._host
        for sign, meaning in FAILURES.items():
            if sign in said.lower():
                return meaning.format(known_as=known_as, by_hand=by_hand)
        return f"the link failed; try again: what has arrived stays ({said.strip()[-300:]})"
