"""A device over adb: the system's Android debug bridge.

What is relative starts at /data/local/tmp, the one folder there that a shell may write to and run
programs from. The arguments of the scripts are quoted once, for the shell that adb hands the
command line to.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from edgekd.devices import scripts
from edgekd.devices.base import DeviceFacts, Ran
from edgekd.errors import DeviceError
from edgekd.reporting.progress import Progress

FOLDER = PurePosixPath("/data/local/tmp")
# a serial number, or a host and port; adb would take "-…" for an option
ADDRESS = re.compile(r"adb://([A-Za-z0-9][\w.:-]*)", re.ASCII)
# what adb says, in lower case -> what is wrong, and the remedy
FAILURES = {
    "unauthorized": "it has not let this machine in; unlock it and allow USB debugging",
    "offline": "it is offline; unplug it and plug it in again",
    "no devices": "it is not there; is it plugged in, and USB debugging on? adb devices lists them",
    "not found": "it is not there; is it plugged in, and USB debugging on? adb devices lists them",
    "cannot connect to daemon": "adb's server does not start; run: adb start-server",
    "no permissions": "this user may not open its USB port; adb devices says which rule is missing",
}
MAKE = 'mkdir -p -- "$(dirname -- "$1")"'
ENDED = "edgekd:exit:"  # adb and devices before Android 7 give no exit code


class AdbDevice:
    """The device at `adb://serial`, as `adb devices` lists it.

    Raises:
        DeviceError: the address is none.
    """

    def __init__(self, address: str) -> None:
        found = ADDRESS.fullmatch(address)
        if found is None:
            raise DeviceError(
                f"{address!r} is no address; write adb://serial, as adb devices lists it"
            )
        self.address = address
        self._serial = found[1]

    def check(self) -> DeviceFacts:
        """What the device is."""
        return scripts.check(self._script, self.address)

    def push(self, folder: Path, remote: str) -> None:
        """Copy the files of `folder` into `remote`: those that are not there."""
        missing = scripts.missing(self._script, self.address, folder, remote)
        with Progress(f"to {self._serial}", len(missing)) as progress:
            for file in missing:
                partial = str(FOLDER / remote / file.partial)
                scripts.lines(self._script(MAKE, partial), 0, self.address)
                self._copied(self._adb(["push", str(file.path), partial], b"", None))
                whole = f'cd -- "$1" || exit\n{scripts.WHOLE}'
                ran = self._script(whole, remote, *file.arguments)
                scripts.received(ran, file.name, self.address)
                progress.advance(file.name)

    def run(self, argv: Sequence[str], *, cwd: str = ".", timeout: float = 600.0) -> Ran:
        """Run a program."""
        return scripts.run(self._script, self.address, argv, cwd, timeout)

    def fetch(self, remote: str, local: Path) -> None:
        """Copy one remote file."""
        with tempfile.TemporaryDirectory(dir=local.parent) as folder:
            there = Path(folder) / "there"
            self._copied(self._adb(["pull", str(FOLDER / remote), str(there)], b"", None))
            there.replace(local)

    def _script(
        self,
        script: str,
        *arguments: str,
        given: bytes = b"",
        timeout: float | None = scripts.QUERY_SECONDS,
    ) -> Ran:
        """Run a script there, and find its exit code in what it prints last."""
        argv = ["env", "LC_ALL=C", "sh", "-c", script, "sh", *arguments]
        line = f"cd {FOLDER} && {shlex.join(argv)}; printf '\\n{ENDED}%d\\n' $?"
        done = self._adb(["shell", line], given, timeout)
        said, ended, code = scripts.text(done.stdout).rpartition(f"\n{ENDED}")
        if not ended:
            raise self._failed(done)
        return Ran(int(code), said, scripts.text(done.stderr))

    def _adb(
        self, argv: Sequence[str], given: bytes, timeout: float | None
    ) -> subprocess.CompletedProcess[bytes]:
        if shutil.which("adb") is None:
            raise DeviceError("adb is not installed here; run: sudo apt-get install adb")
        try:
            return subprocess.run(
                ["adb", "-s", self._serial, *argv], input=given, capture_output=True,
                timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise scripts.too_long(self.address, "the command", error.timeout) from None

    def _copied(self, done: subprocess.CompletedProcess[bytes]) -> None:
        if done.returncode != 0:
            raise self._failed(done)

    def _failed(self, done: subprocess.CompletedProcess[bytes]) -> DeviceError:
        """What is wrong, from what adb says, and the remedy."""
        said = scripts.text(done.stdout + done.stderr)
        if "no space left on device" in said.lower():
            return DeviceError(f"{self.address}: its disk is full; make room there and try again")
        if "no such file" in said.lower():
            return DeviceError(f"{self.address}: {said.strip()[-300:]}")
        for sign, meaning in FAILURES.items():
            if sign in said.lower():
                return DeviceError(f"{self.address}: {meaning}")
        return DeviceError(
            f"{self.address}: the link failed; try again: whole files stay ({said.strip()[-300:]})"
        )
