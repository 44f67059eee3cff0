"""What the links that lead to a device's shell have in common.

Constant scripts for its `sh`, BusyBox's and Android's too, take what varies as arguments.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from edgekd.devices.base import DeviceFacts, Ran
from edgekd.errors import DeviceError

# runs one of the scripts there: its text, its arguments; keywords `given`, its input, and `timeout`
Script = Callable[..., Ran]

SLACK_SECONDS = 30.0  # to connect, and for the device to end what takes too long
QUERY_SECONDS = 120.0

CHECK = """
for tool in sha256sum cat wc mv cut dirname df; do
  command -v "$tool" >/dev/null || { echo "$tool" >&2; exit 3; }
done
{ getprop ro.product.model || uname -n; } 2>/dev/null
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
# what ends the copying of a file. Folder, name, partial name, SHA-256, bytes, mode
WHOLE = """
[ $(wc -c < "$3") -ge "$5" ] || exit 4
[ "$(sha256sum < "$3" | cut -c 1-64)" = "$4" ] || { rm -f -- "$3"; exit 5; }
chmod "$6" -- "$3" && mv -f -- "$3" "$2"
"""
# folder, seconds, program and arguments; 255 is ssh's own
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


class Missing(NamedTuple):
    """A file that is not there yet, or not whole: `partial` is its name until then."""

    path: Path
    name: str
    partial: str
    sha256: str
    size: int
    mode: str
    offset: int

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of WHOLE, after the folder."""
        return self.name, self.partial, self.sha256, str(self.size), self.mode


def check(script: Script, address: str) -> DeviceFacts:
    """What the device is; DeviceError where it lacks a tool."""
    ran = script(CHECK)
    if ran.exit_code == 3:
        raise DeviceError(f"{address} has no {ran.stderr.split()[-1]}; install coreutils there")
    host, machine, python, disk = lines(ran, 4, address)
    return DeviceFacts(
        host=host, machine=machine, python=python or None, free_mib=int(disk.split()[-3]) // 1024
    )


def missing(script: Script, address: str, folder: Path, remote: str) -> list[Missing]:
    """The files of `folder` that `remote` does not have, by their hash."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip
    if broken := [name for name in files if "\n" in name]:
        raise DeviceError(f"{broken[0]!r} has a line break in its name; rename it")
    known = []
    for name, path in files.items():
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        partial = str(Path(name).with_name(f".{path.name}.{digest[:16]}.partial"))
        known.append((path, name, partial, digest, path.stat()))
    asked = "".join(f"{name}\n{partial}\n" for _, name, partial, _, _ in known)
    there = lines(script(STATE, remote, given=asked.encode()), 2 * len(known), address)
    return [
        Missing(path, name, partial, digest, s.st_size, f"{s.st_mode & 0o777:o}", int(offset))
        for (path, name, partial, digest, s), found, offset in zip(
            known, there[::2], there[1::2], strict=True
        )
        if found != digest
    ]


def received(ran: Ran, name: str, address: str) -> None:
    """DeviceError where WHOLE found a file that is not."""
    if ran.exit_code == 4:
        raise DeviceError(f"{address}: the link was lost in {name}; try again: it goes on")
    if ran.exit_code == 5:
        raise DeviceError(f"{address}: {name} arrived damaged and was removed; try again")
    lines(ran, 0, address)


def run(script: Script, address: str, argv: Sequence[str], cwd: str, timeout: float) -> Ran:
    """Run a program; DeviceError where it takes longer than `timeout` seconds."""
    began = time.monotonic()
    ran = script(RUN, cwd, f"{timeout:g}", *argv, timeout=timeout + SLACK_SECONDS)
    if ran.exit_code == 124 and time.monotonic() - began >= timeout:
        raise too_long(address, argv[0], timeout)
    return ran


def too_long(address: str, what: str, seconds: float) -> DeviceError:
    """The error of what did not end in time."""
    return DeviceError(
        f"{address}: {what} did not end within {seconds:.0f} s; is the device busy, or the link "
        "down?"
    )


def lines(ran: Ran, count: int, address: str) -> list[str]:
    """The first lines that a script printed; DeviceError where it failed."""
    if "no space left on device" in ran.stderr.lower():
        raise DeviceError(f"{address}: its disk is full; make room there and try again")
    found = ran.stdout.splitlines()
    if ran.exit_code != 0 or len(found) < count:
        said = ran.stderr.strip()[-300:] or f"exit code {ran.exit_code}"
        raise DeviceError(f"{address}: {said}")
    return found[:count]


def text(output: bytes) -> str:
    """What a program printed."""
    return output.decode(errors="replace")
