"""build: an artifact's engine, made and checked on the device itself."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from edgekd.devices.base import Device, get_device
from edgekd.errors import DeviceError, TargetError
from edgekd.files import write_atomically
from edgekd.latency.measuring import today
from edgekd.runtimes.base import Artifact
from edgekd.runtimes.on_device.measure import BUILD, tensorrt_version

SCRIPT, CHECKER, LOG, RECORD = "build_engine.sh", "infer.py", "build.log", "device.json"
BUILD_SECONDS, CHECK_SECONDS = 3600.0, 600.0
TAIL_LINES = 40
ROOM = 4  # times the artifact: itself, the engine, and what TensorRT writes beside it


class DeviceBuild(BaseModel):
    """What became of an artifact on a device.

    Attributes:
        device: its address; host: its own name; machine: as `uname -m` says it.
        folder: where the artifact and its engine are, from the login's folder on.
        tensorrt: the version that built it, as trtexec says; None where it says none.
        tail: the last lines of the build's log; the whole log is beside the artifact.
        check: what the artifact's own check printed there, outputs against the expected ones.
        result: "passed" if the engine was built and its outputs agree; "unchecked" if it was
            built and nothing in the artifact checks it.
        reason: why it is not passed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    device: str
    host: str
    machine: str
    folder: str
    sha256: str
    date: str
    tensorrt: str | None
    tail: tuple[str, ...]
    check: dict[str, Any] | None = None
    result: Literal["passed", "failed", "unchecked"]
    reason: str | None = None


def remote_folder(target: str, sha256: str) -> str:
    """Where an artifact's files are on a device: its engine too, which is built once."""
    return f"edgekd/{target}-{sha256[:12]}"


def build_on(artifact: Artifact, *, device: str | Device) -> DeviceBuild:
    """Copy the artifact to the device, build its engine there and check its outputs there.

    An engine of the same file, script and trtexec is not built again.
    `build.log` and `device.json` appear beside the artifact. Started again, what has arrived stays.

    Args:
        device: a link, or its address: ssh://user@host:port.

    Raises:
        TargetError: nothing in the artifact is built on its device.
        DeviceError: the device cannot be reached, the link was lost, or something is missing there.
    """
    link = get_device(device) if isinstance(device, str) else device
    bundle = artifact.path.parent
    if not (bundle / SCRIPT).is_file():
        raise TargetError(
            f"{artifact.target}: its artifact has no {SCRIPT}; only TensorRT's engines are built "
            "on the device"
        )
    checked = (bundle / CHECKER).is_file()
    facts = link.check()
    if checked and facts.python is None:
        raise DeviceError(f"{link.address} has no python3, which {CHECKER} needs; install it there")
    needed = ROOM * artifact.size_bytes // 2**20 + 1
    if facts.free_mib < needed:
        raise DeviceError(
            f"{link.address} has {facts.free_mib} MiB of free disk; {needed} MiB are needed: make "
            "room there"
        )
    folder = remote_folder(artifact.target, artifact.sha256)
    link.push(bundle, folder)
    ran = link.run(["sh", "-c", BUILD], cwd=folder, timeout=BUILD_SECONDS)
    link.fetch(f"{folder}/{LOG}", bundle / LOG)
    log = (bundle / LOG).read_text(errors="replace")
    common: dict[str, Any] = {
        "device": link.address, "host": facts.host, "machine": facts.machine, "folder": folder,
        "sha256": artifact.sha256, "date": today(), "tensorrt": tensorrt_version(log),
        "tail": tuple(log.splitlines()[-TAIL_LINES:]),
    }  # fmt: skip
    if ran.exit_code != 0:
        reason = f"{SCRIPT} exits with {ran.exit_code}"
        build = DeviceBuild(**common, result="failed", reason=reason)
    elif not checked:
        reason = f"the artifact has no {CHECKER}"
        build = DeviceBuild(**common, result="unchecked", reason=reason)
    else:
        ran = link.run(["python3", CHECKER, "--check"], cwd=folder, timeout=CHECK_SECONDS)
        found = _last_json(ran.stdout)
        passed = ran.exit_code == 0 and found is not None
        reason = f"{CHECKER} --check exits with {ran.exit_code}: {ran.stderr.strip()[-500:]}"
        build = DeviceBuild(
            **common, check=found, result="passed" if passed else "failed",
            reason=None if passed else reason,
        )  # fmt: skip
    write_atomically(bundle / RECORD, build.model_dump_json(indent=1))
    return build


def _last_json(output: str) -> dict[str, Any] | None:
    """The JSON object in the last line; None where there is none."""
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return found if isinstance(found, dict) else None
