"""A device over ssh: the system's OpenSSH client, with its configuration, keys and known hosts.

Host keys are always checked, and nothing is asked: a key or a host that OpenSSH does not know is an
error. On the device, constant scripts for its `sh` take what varies as arguments, quoted once for
the login shell that OpenSSH hands the command line to.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

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
SLACK_SECONDS = 30.0  # to connect, and for the device to end what takes too long
QUERY_SECONDS = 120.0
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

CHECK = """
for tool in sha256sum cat wc mv cut dirname df; do
  command -v "$tool" >/dev/null || { echo "$tool" >&2; exit 3; }
done
uname -n
uname -m
python3 -c 'import platform; print(platform.python_version())' 2>/dev/null || echo
df -Pk . | tail -n 1
"""
# for each name on its input: SHA-256 of the file, then bytes of the partial one; "-" where none is
STATE = """
mkdir -p -- "$1" && cd -- "$1" || exit
while IFS= read -r name && IFS= read -r partial; do
  if [ -f "$name" ]; then sha256sum < "$name" | cut -c 1-64; else echo -; fi
  if [ -f "$partial" ]; then wc -c < "$partial"; else echo 0; fi
done
"""
# folder, name, partial name, SHA-256, bytes, mode
RECEIVE = """
cd -- "$1" && mkdir -p -- "$(dirname -- "$2")" || exit
cat >> "$3" || { code=$?; rm -f -- "$3"; exit "$code"; }
[ $(wc -c < "$3") -ge "$5" ] || exit 4
[ "$(sha256sum < "$3" | cut -c 1-64)" = "$4" ] || { rm -f -- "$3"; exit 5; }
chmod "$6" -- "$3" && mv -f -- "$3" "$2"
"""
# folder, seconds, program and arguments; 255 is the client's own
RUN = """
cd -- "$1" || exit
seconds=$2
shift 2
if command -v timeout >/dev/null; then set -- timeout "$seconds" "$@"; fi
"$@"
code=$?
[ "$code" -ne 255 ] || code=254
exit "$code"
"""


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
        ran = self._script(CHECK)
        if ran.exit_code == 3:
            raise DeviceError(
                f"{self.address} has no {ran.stderr.split()[-1]}; install coreutils there"
            )
        host, machine, python, disk = self._lines(ran, 4)
        return DeviceFacts(
            host=host, machine=machine, python=python or None,
            free_mib=int(disk.split()[-3]) // 1024,
        )  # fmt: skip

    def push(self, folder: Path, remote: str) -> None:
        """Copy the files of `folder` into `remote`: those that are not there, and what is left."""
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*")) if path.is_file()
        }  # fmt: skip
        if broken := [name for name in files if "\n" in name]:
            raise DeviceError(f"{broken[0]!r} has a line break in its name; rename it")
        sums = {name: _sha256(path) for name, path in files.items()}
        partials = {
            name: str(Path(name).with_name(f".{Path(name).name}.{sums[name][:16]}.partial"))
            for name in files
        }
        asked = "".join(f"{name}\n{partials[name]}\n" for name in files)
        ran = self._script(STATE, remote, given=asked.encode())
        there = self._lines(ran, 2 * len(files))
        missing = {
            name: int(partial)
            for name, known, partial in zip(files, there[::2], there[1::2], strict=True)
            if known != sums[name]
        }
        with Progress(f"to {self._host}", len(missing)) as progress:
            for name, offset in missing.items():
                with files[name].open("rb", buffering=0) as content:
                    content.seek(offset)  # of the descriptor itself, which the client inherits
                    size, mode = (x := files[name].stat()).st_size, f"{x.st_mode & 0o777:o}"
                    ran = self._script(
                        RECEIVE, remote, name, partials[name], sums[name], str(size), mode,
                        given=content, timeout=None,
                    )  # fmt: skip
                self._received(ran, name)
                progress.advance(name)

    def _received(self, ran: Ran, name: str) -> None:
        if ran.exit_code == 4:
            raise DeviceError(f"{self.address}: the link was lost in {name}; try again: it goes on")
        if ran.exit_code == 5:
            raise DeviceError(f"{self.address}: {name} arrived damaged and was removed; try again")
        self._lines(ran, 0)

    def run(self, argv: Sequence[str], *, cwd: str = ".", timeout: float = 600.0) -> Ran:
        """Run a program; its 255 is given as 254, which the client keeps for itself."""
        began = time.monotonic()
        ran = self._script(RUN, cwd, f"{timeout:g}", *argv, timeout=timeout + SLACK_SECONDS)
        if ran.exit_code == 124 and time.monotonic() - began >= timeout:
            raise self._too_long(argv[0], timeout)
        return ran

    def fetch(self, remote: str, local: Path) -> None:
        """Copy one remote file."""
        done = self._client(["cat", "--", remote], b"", None)
        self._lines(Ran(done.returncode, "", _text(done.stderr)), 0)
        write_atomically(local, done.stdout)

    def _script(
        self,
        script: str,
        *arguments: str,
        given: bytes | IO[bytes] = b"",
        timeout: float | None = QUERY_SECONDS,
    ) -> Ran:
        """Run one of the scripts above; without a timeout, only a lost link ends it."""
        argv = ["env", "LC_ALL=C", "sh", "-c", script, "sh", *arguments]
        done = self._client(argv, given, timeout)
        return Ran(done.returncode, _text(done.stdout), _text(done.stderr))

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
            raise self._too_long("the command", error.timeout) from None
        if done.returncode == CLIENT_FAILED:
            raise DeviceError(f"{self.address}: {self._failure(_text(done.stderr))}")
        return done

    def _failure(self, said: str) -> str:
        """What is wrong, from what the client says, and the remedy."""
        by_hand = " ".join([*self._port, self._login])
        known_as = f"'[{self._host}]:{self._port[1]}'" if self._port else self._host
        for sign, meaning in FAILURES.items():
            if sign in said.lower():
                return meaning.format(known_as=known_as, by_hand=by_hand)
        return f"the link failed; try again: what has arrived stays ({said.strip()[-300:]})"

    def _too_long(self, what: str, seconds: float) -> DeviceError:
        return DeviceError(
            f"{self.address}: {what} did not end within {seconds:.0f} s; is the device busy, "
            "or the link down?"
        )

    def _lines(self, ran: Ran, count: int) -> list[str]:
        """The first lines that a script printed; DeviceError where it failed."""
        if "no space left on device" in ran.stderr.lower():
            raise DeviceError(f"{self.address}: its disk is full; make room there and try again")
        lines = ran.stdout.splitlines()
        if ran.exit_code != 0 or len(lines) < count:
            said = ran.stderr.strip()[-300:] or f"exit code {ran.exit_code}"
            raise DeviceError(f"{self.address}: {said}")
        return lines[:count]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(output: bytes) -> str:
    return output.decode(errors="replace")
