"""What a link to a device does, and the table of links."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from edgekd.errors import DeviceError, nearest


class DeviceFacts(BaseModel):
    """What a device says of itself.

    Attributes:
        host: its own name.
        machine: as `uname -m` says it.
        python: version of its python3; None where there is none.
        free_mib: of the disk that `push` writes to by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    host: str
    machine: str
    python: str | None
    free_mib: int


class Ran(NamedTuple):
    """What a program on the device left."""

    exit_code: int
    stdout: str
    stderr: str


class Device(Protocol):
    """A link to one device. Remote paths that are not absolute start at the login's folder.

    Every verb raises DeviceError where the device cannot be reached, or the link is lost.
    """

    address: str

    def check(self) -> DeviceFacts:
        """Reach it; DeviceError where it lacks a tool that the other verbs need."""

    def push(self, folder: Path, remote: str) -> None:
        """Copy the files of `folder` into `remote`, each of them whole or not at all.

        Files that are there already, by their hash, stay; what was broken off goes on.
        """

    def run(self, argv: Sequence[str], *, cwd: str = ".", timeout: float = 600.0) -> Ran:
        """Run a program in a remote folder.

        Args:
            argv: the program and its arguments, as they are: no shell reads them.
            timeout: in seconds; what runs longer is ended, and is a DeviceError.
        """

    def fetch(self, remote: str, local: Path) -> None:
        """Copy one remote file, whole or not at all."""


LINKS = {
    "adb": "edgekd.devices.adb:AdbDevice",
    "local": "edgekd.devices.local:LocalDevice",
    "ssh": "edgekd.devices.ssh:SshDevice",
}


def get_device(address: str) -> Device:
    """The device at "local", or at an address such as ssh://user@host:port; not reached yet.

    Raises:
        DeviceError: no such kind of link, or an address that is none.
    """
    kind, separator, _ = address.partition("://")
    if kind not in LINKS or bool(separator) == (kind == "local"):
        raise DeviceError(
            f"no device {address!r}{nearest(kind, LINKS)}; an address is local, "
            "ssh://user@host:port or adb://serial"
        )
    module, _, attribute = LINKS[kind].partition(":")
    device: Device = getattr(importlib.import_module(module), attribute)(address)
    return device
