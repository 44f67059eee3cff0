"""This machine, as one that a link leads to: programs run in processes of their own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from edgekd.devices.base import DeviceFacts, Ran
from edgekd.errors import DeviceError
from edgekd.files import write_atomically


class LocalDevice:
    """The address "local". Its folder is a temporary one, that goes with the object.

    Its python3 is the one that runs edgekd.
    """

    def __init__(self, address: str = "local") -> None:
        self.address = address
        self._folder = Path(tempfile.mkdtemp(prefix="edgekd-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def check(self) -> DeviceFacts:
        """What this machine is."""
        return DeviceFacts(
            host=platform.node(), machine=platform.machine(), python=platform.python_version(),
            free_mib=shutil.disk_usage(self._folder).free // 2**20,
        )  # fmt: skip

    def push(self, folder: Path, remote: str) -> None:
        """Link the files of `folder` into `remote`, or copy them where they cannot be."""
        for path in folder.rglob("*"):
            place = self._folder / remote / path.relative_to(folder)
            if not path.is_file() or (place.exists() and place.samefile(path)):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            try:
                os.link(path.resolve(), place)
            except OSError:  # another file system
                shutil.copy2(path, place)

    def run(self, argv: Sequence[str], *, cwd: str = ".", timeout: float = 600.0) -> Ran:
        """Run a program."""
        program = sys.executable if argv[0] == "python3" else argv[0]
        try:
            done = subprocess.run(
                [program, *argv[1:]], cwd=self._folder / cwd, capture_output=True, text=True,
                errors="replace", timeout=timeout, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError as error:
            return Ran(127, "", str(error))
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{argv[0]} did not end within {timeout:.0f} s") from None
        return Ran(done.returncode, done.stdout, done.stderr)

    def fetch(self, remote: str, local: Path) -> None:
        """Copy one file."""
        try:
            write_atomically(local, (self._folder / remote).read_bytes())
        except OSError as error:
            raise DeviceError(f"{remote}: {error.strerror}") from None
