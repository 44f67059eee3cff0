"""A teacher's answers, computed once for every image that augmentation can make of another.

They are kept on disk in fp16, memory-mapped, with checksums, in a folder that is named by the
teacher's weights, the data and the taps. Where there are too many images (random crops), or where
a teacher has no weights that could name its answers (a callable), it is asked online.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from edgekd.data.base import BatchSource, Data, sha256, view_batches, views
from edgekd.errors import StateError
from edgekd.files import write_atomically
from edgekd.knowledge.taps import Features
from edgekd.knowledge.teachers import (
    OnnxTeacher,
    Teacher,
    TeacherLike,
    as_teacher,
    io_of,
    members,
    module_of,
)
from edgekd.knowledge.terms import flat
from edgekd.network import Preprocessing
from edgekd.reporting.progress import Progress, console

FORMAT = 3
LARGEST_GIB = 16.0
BATCH = 256


def cached_teacher(
    teacher: TeacherLike | Sequence[TeacherLike],
    data: BatchSource,
    *,
    folder: Path,
    device: torch.device,
    taps: Sequence[str] = (),
    seen: Preprocessing | None = None,
) -> Teacher | None:
    """A teacher that looks its answers up by the keys of the samples.

    Args:
        folder: of caches; this one gets a folder of its own in there.
        taps, seen: see `as_teacher`; the outputs of taps are kept too.

    Returns:
        None where answers cannot be kept: the data is not `Data`, its augmentation makes too many
        images, the teacher has no weights, the answers are too large for the disk or for fp16.

    Raises:
        StateError: a file of the cache is damaged.
    """
    if not isinstance(data, Data) or views(data) is None:
        return None
    if (fingerprint := _fingerprint(teacher)) is None:
        return None
    image = None if seen is None else seen.model_dump()
    key = sha256(json.dumps([FORMAT, fingerprint, data.fingerprint, list(taps), image]).encode())
    place = folder / f"teacher-{key[:12]}"
    if not (place / "index.json").exists():
        reason = _fill(place, as_teacher(teacher, device, taps, seen), taps, data, device)
        if reason:
            console.print(f"teacher: its answers are not kept ({reason}); it is asked online")
            return None
    return _read(place)


def _fingerprint(teacher: TeacherLike | Sequence[TeacherLike]) -> str | None:
    """Changes with any weight of any teacher, and its normalisation; None if one has none."""
    digest = hashlib.sha256()
    for member in members(teacher):
        io = io_of(member)
        digest.update(repr(None if io is None else io.preprocessing).encode())
        if isinstance(member, OnnxTeacher):
            digest.update(member.sha256.encode())
            continue
        module = module_of(member)
        if module is None:
            return None
        digest.update(repr(module).encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _fill(
    place: Path, ask: Teacher, taps: Sequence[str], data: Data, device: torch.device
) -> str | None:
    """Ask the teacher about everything; why not, if its answers cannot be kept."""
    count = views(data)
    assert count is not None
    total = count * len(data.splits["train"])
    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files: list[tuple[IO[bytes], Any, list[int]]] = []  # each with its digest and its shape
    try:
        with Progress("asking the teacher", -(-total // BATCH)) as progress, ExitStack() as stack:
            for x in view_batches(data, BATCH):
                outputs, features = ask((x.to(device),), None)
                names = [_names(each) for each in outputs]
                kept = [t for each in outputs for t in flat(each)]
                kept += [features[tap] for tap in taps]
                halves = [t.half().cpu().numpy() for t in kept]
                if not all(np.isfinite(half).all() for half in halves):
                    return "they do not fit into fp16"
                if not files:
                    shapes = [[total, *half.shape[1:]] for half in halves]
                    if reason := _too_large(part, shapes):
                        return reason
                    for index, shape in enumerate(shapes):
                        file: IO[bytes] = stack.enter_context((part / f"{index}.f16").open("wb"))
                        files.append((file, hashlib.sha256(), shape))
                for (file, digest, _), half in zip(files, halves, strict=True):
                    rows = np.ascontiguousarray(half).data
                    file.write(rows)
                    digest.update(rows)
                progress.advance()
        facts = [{"shape": shape, "sha256": digest.hexdigest()} for _, digest, shape in files]
        text = json.dumps({"outputs": names, "taps": list(taps), "files": facts})
        write_atomically(part / "index.json", text)
        part.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return None


def _names(outputs: Any) -> list[str] | int | None:
    """Of a dict of tensors; how many there are in a tuple; None for a single one."""
    if isinstance(outputs, Tensor):
        return None
    return list(outputs) if isinstance(outputs, dict) else len(outputs)


def _outputs(tensors: list[Tensor], names: list[str] | int | None) -> Any:
    """What `tensors` and `names` were taken from."""
    if names is None:
        return tensors[0]
    return tuple(tensors) if isinstance(names, int) else dict(zip(names, tensors, strict=True))


def _too_large(part: Path, shapes: list[list[int]]) -> str | None:
    needed = sum(2 * math.prod(shape) for shape in shapes) / 2**30
    limit = min(LARGEST_GIB, 0.5 * shutil.disk_usage(part).free / 2**30)
    return f"{needed:.1f} GiB; the limit here is {limit:.1f}" if needed > limit else None


def _read(place: Path) -> Teacher:
    try:
        index = json.loads((place / "index.json").read_text())
        names, taps, files = index["outputs"], index["taps"], index["files"]
        arrays = []
        for number, facts in enumerate(files):
            path, shape = place / f"{number}.f16", tuple(facts["shape"])
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    raise ValueError(f"{path.name} is not what was written")
            arrays.append(np.memmap(path, dtype=np.float16, mode="r", shape=shape))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{place} is damaged ({error}); delete it to ask the teacher again"
        ) from None

    def answer(inputs: tuple[Tensor, ...], keys: Tensor | None) -> tuple[Any, Features]:
        assert keys is not None
        rows = keys.cpu().numpy()
        found = [torch.from_numpy(array[rows]).to(inputs[0].device).float() for array in arrays]
        outputs = []
        for each in names:
            count = 1 if each is None else each if isinstance(each, int) else len(each)
            mine, found = found[:count], found[count:]
            outputs.append(_outputs(mine, each))
        return outputs, dict(zip(taps, found, strict=True))

    return answer
