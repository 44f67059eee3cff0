"""What lies beside a model file, so that a device can run it and prove that it computes the same.

manifest.json   target, precision, hash, inputs and outputs, preprocessing, tolerances, versions
labels.txt      one class a line
check.npz       three inputs, and what the trained network gives for them
infer.py        runs images, or `--check`; Python 3.6, NumPy and the runtime
measure.py      measures latency, and writes measurement.json; Python 3.6
Classifier.kt, Classifier.swift   the same in an app
detect.py       of a detector: letterbox, boxes out of raw heads; NumPy alone
detect.cc       of a detector: boxes out of raw heads, in an app; C++14 alone
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.files import write_atomically
from edgekd.network import Network
from edgekd.runtimes.base import fingerprint, verifying_runtime
from edgekd.runtimes.variants import write_variants
from edgekd.target import Precision, Target
from edgekd.tasks.decoding import Decoding

ON_DEVICE = ("infer.py", "measure.py")
CHECKED = 3  # inputs in check.npz
# share of an output's largest magnitude that its mean may be off by; INT8 is held to its step
RELATIVE = {"fp32": 1e-4, "fp16": 1e-2}


def write_bundle(
    path: Path,
    net: Network,
    target: Target,
    precision: Precision,
    *,
    versions: dict[str, str],
    examples: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Write what belongs to the model file `path` beside it.

    Args:
        examples: a batch of inputs, (N, ...) each, for the device's own check, the first three
            samples; without any, images of seeded noise.
    """
    inputs = example_inputs(net, examples)
    outputs = _outputs(net, inputs)
    arrays = {i.name: x.numpy() for i, x in zip(net.io.inputs, inputs, strict=True)} | outputs
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    write_atomically(path.with_name("check.npz"), packed.getvalue())
    digest, size = fingerprint(path)
    manifest: dict[str, Any] = {
        "format": 1,
        "target": target.name,
        "title": target.title,
        "runtime": target.runtime,
        "runtime_version": target.runtime_version,
        "device": target.device,
        "providers": target.providers,
        "opset": target.opset,
        "precision": precision,
        "file": path.name,
        "sha256": digest,
        "size_bytes": size,
        "io": net.io.model_dump(mode="json"),
        "network": net.architecture,
        "layout": target.layout,
        "integers": _integers(path, net, target),
        "scheme": None if net.scheme is None else net.scheme.model_dump(mode="json"),
        "check": {
            "file": "check.npz",
            "tolerance": {name: _tolerance(y, precision) for name, y in outputs.items()},
        },
        "variants": write_variants(path, target, net),
        "versions": versions,
    }
    write_atomically(path.with_name("manifest.json"), json.dumps(manifest, indent=1))
    if net.io.labels:
        write_atomically(path.with_name("labels.txt"), "\n".join(net.io.labels) + "\n")
    shipped = files("edgekd.runtimes") / "on_device"
    for name in ON_DEVICE:
        write_atomically(path.with_name(name), (shipped / name).read_text())
    if net.io.decoding is not None:
        write_atomically(path.with_name("detect.py"), (shipped / "detect.py").read_text())
        snippets, words = ["detect.cc"], _decoding_words(path, net.io.decoding, outputs)
    elif len(net.io.inputs) == 1 and len(net.io.inputs[0].shape) == 3:
        snippets, words = list(target.snippets), _words(path, net)
    else:
        snippets, words = [], {}
    for name in snippets:
        text = (shipped / name).read_text()
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        write_atomically(path.with_name(name), text)


def _integers(path: Path, net: Network, target: Target) -> dict[str, Any]:
    """The file's integer inputs and outputs, by the network's names for them."""
    if net.scheme is None or not (net.scheme.integer_inputs or net.scheme.integer_outputs):
        return {}
    known = verifying_runtime(target).load(path, threads=1).integers
    ends = {f"input {i}": each.name for i, each in enumerate(net.io.inputs)}
    ends |= {f"output {i}": name for i, name in enumerate(net.io.outputs)}
    # some formats number their ends
    found = {name: known.get(name, known.get(number)) for number, name in ends.items()}
    return {name: end.model_dump() for name, end in found.items() if end is not None}


def example_inputs(
    net: Network, examples: Tensor | Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """CHECKED samples: those given, else bytes of noise as images are normalised."""
    if examples is not None:
        given = [examples] if isinstance(examples, Tensor) else examples
        return tuple(x[:CHECKED] for x in given)
    generator = torch.Generator().manual_seed(0)
    made = []
    for each in net.io.inputs:
        noise = torch.randint(0, 256, (CHECKED, *each.shape), generator=generator).float() / 255
        known = net.io.preprocessing
        if known is not None and len(each.shape) == 3 and each.shape[0] == len(known.mean):
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (known.mean, known.std))
            noise = (noise - mean) / std
        made.append(noise.to(getattr(torch, each.dtype)))
    return tuple(made)


def _outputs(net: Network, inputs: tuple[Tensor, ...]) -> dict[str, NDArray[Any]]:
    net.train_mode(False)
    with torch.no_grad():
        found = net(*inputs)
    if isinstance(found, Tensor):
        found = [found]
    elif isinstance(found, dict):
        found = list(found.values())
    return {name: y.numpy() for name, y in zip(net.io.outputs, found, strict=True)}


def _tolerance(output: NDArray[Any], precision: Precision) -> float:
    """The mean difference that an output may have: a step of amax / 127, or a share of amax."""
    amax = max(float(np.abs(output).max()), 1e-30)
    return amax / 127 if precision == "int8" else amax * RELATIVE[precision]


def _words(path: Path, net: Network) -> dict[str, str]:
    """What the app's snippets say of this model."""
    channels, height, width = net.io.inputs[0].shape
    known = net.io.preprocessing
    mean, std = (known.mean, known.std) if known else ((0.0,) * channels, (1 / 255,) * channels)
    return {
        "MEAN": ", ".join(f"{v:g}" for v in mean), "STD": ", ".join(f"{v:g}" for v in std),
        "FILE": path.name, "STEM": path.stem, "INPUT": net.io.inputs[0].name,
        "OUTPUT": net.io.outputs[0], "CHANNELS": str(channels), "HEIGHT": str(height),
        "WIDTH": str(width),
    }  # fmt: skip


def _decoding_words(
    path: Path, decoding: Decoding, outputs: dict[str, NDArray[Any]]
) -> dict[str, str]:
    """What detect.cc says of this model, in C++."""
    classes, boxes = list(outputs.values())[:2]
    levels = ((*level.grid, *level.stride, level.offset, level.sizes) for level in decoding.levels)
    return {
        "FILE": path.name, "LEVELS": ",\n    ".join(map(_braces, levels)),
        "BOXES": decoding.boxes, "BOX_COLUMNS": str(boxes.shape[2]),
        "CLASS_COLUMNS": str(classes.shape[2]),
        "SOFTMAX": str(decoding.scores == "softmax").lower(),
        "OF_CLASS": str(decoding.candidates_of == "class").lower(),
        "WIDTH": str(decoding.image[1]), "HEIGHT": str(decoding.image[0]),
        "WEIGHTS": ", ".join(map(repr, decoding.weights)), "LARGEST": repr(decoding.largest),
        "SCORE_THRESHOLD": repr(decoding.score_threshold),
        "NMS_THRESHOLD": repr(decoding.nms_threshold),
        "CANDIDATES": str(decoding.candidates), "DETECTIONS": str(decoding.detections),
    }  # fmt: skip


def _braces(values: Any) -> str:
    """Numbers, and tuples of them, as C++ has them."""
    if isinstance(values, Iterable):
        return "{" + ", ".join(map(_braces, values)) + "}"
    return repr(values)
