"""What a runtime does for edgekd, and the table of runtimes."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from edgekd.errors import StateError, TargetError, describe_invalid, nearest
from edgekd.files import write_atomically
from edgekd.network import Network
from edgekd.runtimes.arithmetic import Rounding
from edgekd.runtimes.integer_ends import IntegerEnds
from edgekd.target import Precision, Target

Arrays = list[NDArray[np.float32]]


class Artifact(BaseModel):
    """One exported file, or several that belong together, for one target.

    Attributes:
        path: the file that the runtime opens.
        sha256: over all files of the artifact, in the order of their names.
        versions: of the tools that wrote it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    target: str
    precision: Precision
    path: Path
    sha256: str
    size_bytes: int
    versions: dict[str, str]

    @staticmethod
    def of(
        path: Path, *, target: Target, precision: Precision, versions: dict[str, str]
    ) -> Artifact:
        """The artifact whose files share `path`'s stem; writes `artifact.json` beside them."""
        digest, size = fingerprint(path)
        artifact = Artifact(
            target=target.name, precision=precision, path=path, sha256=digest, size_bytes=size,
            versions=versions,
        )  # fmt: skip
        record = artifact.model_dump(mode="json") | {"path": path.name}
        write_atomically(path.parent / "artifact.json", json.dumps(record, indent=1))
        return artifact

    @staticmethod
    def claim(folder: Path, target: Target, precision: Precision) -> None:
        """Make the folder for an artifact.

        Raises:
            StateError: it holds one of another target or precision.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "artifact.json").exists():
            there = Artifact.read(folder)  # its file may be half of one, if an export was killed
            if (there.target, there.precision) != (target.name, precision):
                raise StateError(
                    f"{folder} holds {there.target} {there.precision}; give each artifact a folder"
                )

    @staticmethod
    def load(folder: str | Path) -> Artifact:
        """The artifact in `folder`, its files checked against their hash.

        Raises:
            StateError: no artifact there, or its files have changed.
        """
        artifact = Artifact.read(folder)
        try:
            digest, _ = fingerprint(artifact.path)
        except FileNotFoundError as error:
            raise StateError(f"{folder} holds no artifact: {error.filename} is missing") from None
        if digest != artifact.sha256:
            raise StateError(f"{artifact.path} has changed since it was exported; export it again")
        return artifact

    @staticmethod
    def read(folder: str | Path) -> Artifact:
        """What `artifact.json` in `folder` says; its files are not looked at.

        Raises:
            StateError: no such record there, or it is damaged.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / "artifact.json").read_text())
            return Artifact(**record | {"path": folder / record["path"]})
        except FileNotFoundError as error:
            raise StateError(f"{folder} holds no artifact: {error.filename} is missing") from None
        except ValidationError as error:
            raise StateError(
                f"{folder}/artifact.json: {describe_invalid(error, Artifact)}"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"{folder}/artifact.json is damaged: {error}") from None


def fingerprint(path: Path) -> tuple[str, int]:
    """SHA-256 and bytes of `path`, and of the weights beside it if it is an OpenVINO IR."""
    digest, size = hashlib.sha256(), 0
    for file in [path.with_suffix(".bin"), path] if path.suffix == ".xml" else [path]:
        content = file.read_bytes()
        digest.update(content)
        size += len(content)
    return digest.hexdigest(), size


class CompileCheck(BaseModel):
    """What a compiler makes of an artifact for a device that is not here.

    Attributes:
        tool, version: the compiler.
        capability: what it compiled for, in the device's place.
        integer, total: convolutions and matrix products whose layer computes in Int8, and all
            that are meant to; of an INT8 artifact.
        floating: names of those that do not; if too few have quantizers, of all in float.
        error: why it refused the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    tool: str
    version: str
    capability: str
    integer: int = 0
    total: int = 0
    floating: tuple[str, ...] = ()
    error: str | None = None

    @property
    def summary(self) -> str:
        """In one sentence."""
        if self.error is not None:
            return f"refused by {self.tool} {self.version} for {self.capability}: {self.error}"
        said = f"compiled by {self.tool} {self.version} for {self.capability}, not on the device"
        if self.total:
            said += f"; {self.integer} of {self.total} matrix operators in Int8"
        return said


class TensorDifference(BaseModel):
    """How far one inner tensor of an artifact is from the trained network's, in its steps.

    Attributes:
        elements: in the tensor.
        unequal: how many of them differ by half a step or more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    tensor: str
    elements: int
    unequal: int
    mean_steps: float
    max_steps: float

    @staticmethod
    def of(tensor: str, steps: NDArray[Any]) -> TensorDifference:
        """From the size of each element's difference, in steps."""
        # not finite: off by the whole range; JSON has no NaN
        steps = np.nan_to_num(steps, nan=255.0, posinf=255.0)
        return TensorDifference(
            tensor=tensor, elements=steps.size, unequal=int((steps >= 0.5).sum()),
            mean_steps=float(steps.mean()), max_steps=float(steps.max()),
        )  # fmt: skip


def in_batches(
    run: Callable[[Arrays], Arrays],
    inputs: Arrays,
    fixed: int | None,
    axes: Iterable[int] = itertools.repeat(0),
) -> Arrays:
    """`run` on inputs of (N, ...); `fixed` at a time where the file takes no other count.

    Args:
        axes: that the samples are on, of each output.
    """
    if fixed is None or len(inputs[0]) == fixed:
        return run(inputs)
    starts = range(0, len(inputs[0]), fixed)
    parts = [run([x[i : i + fixed] for x in inputs]) for i in starts]
    outputs = zip(*parts, strict=True)
    return [np.concatenate(part, axis) for part, axis in zip(outputs, axes, strict=False)]


class Session(Protocol):
    """A loaded artifact.

    Attributes:
        input_shapes: of one sample, batch axis 1 included.
        input_types: NumPy's names of them. Integer inputs take floats as well, see `integer_ends`.
        integers: its integer inputs and outputs.
    """

    input_shapes: list[tuple[int, ...]]
    input_types: list[str]
    integers: IntegerEnds

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run one batch: arrays of (N, ...) in, arrays out."""

    def integer_share(self) -> tuple[int, int]:
        """(convolutions and matrix products in integers, all of them) in the graph that runs."""

    def tensors(self, inputs: Arrays, names: list[str]) -> dict[str, NDArray[np.float32]]:
        """Values of tensors by name, as far as the runtime can show them."""


class Runtime(Protocol):
    """One inference runtime.

    Attributes:
        suffix: of the files it opens.
        emulator: the runtime that opens them where the device is not here.
        plain: whether it can run a file as written, without its optimizations.
        exact: share of elements that each of its integer operators gives exactly, at least; below
            1 where its arithmetic rounds sums more than once.
        rounding: of its kernels as it ships, where it is known.
    """

    name: str
    suffix: str
    emulator: str
    plain: bool
    exact: float
    rounding: Rounding | None

    def version(self) -> str:
        """Of the installed package; MissingPackageError where there is none."""

    def export(self, net: Network, target: Target, path: Path) -> dict[str, str]:
        """Write `net` to `path` (and files with its stem); return the versions of the tools."""

    def load(self, path: Path, *, threads: int, emulated: bool = False) -> Session:
        """Open an artifact; `emulated`: as written, without the runtime's optimizations."""


RUNTIMES = {
    "executorch": "edgekd.runtimes.executorch:ExecuTorch",
    "litert": "edgekd.runtimes.litert:LiteRt",
    "onnxruntime": "edgekd.runtimes.onnxruntime:OnnxRuntime",
    "openvino": "edgekd.runtimes.openvino:OpenVino",
    "tensorrt": "edgekd.runtimes.tensorrt:TensorRt",
}


def get_runtime(name: str) -> Runtime:
    """The runtime of that name."""
    if name not in RUNTIMES:
        raise TargetError(f"no runtime {name!r}{nearest(name, RUNTIMES)}")
    module, _, attribute = RUNTIMES[name].partition(":")
    runtime: Runtime = getattr(importlib.import_module(module), attribute)()
    return runtime


def verifying_runtime(target: Target) -> Runtime:
    """The runtime that checks the target's artifacts here: its own, or what stands in for it."""
    runtime = get_runtime(target.runtime)
    return get_runtime(runtime.emulator) if target.verifier == "emulated" else runtime
