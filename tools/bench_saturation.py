"""What 8-bit weights do on a CPU without VNNI, and what 7-bit weights do there.

    apt-get install qemu-user-static
    python tools/bench_saturation.py --photos ../shared/data/photos.zip

Without VNNI, x86 kernels multiply u8 · i8 by `vpmaddubsw`, which adds pairs of products in int16
and saturates. EfficientNet-Lite0 is quantized post-training with either number of bits and runs on
this CPU and on an emulated Haswell (AVX2). Each operator is compared by itself, given the runtime's
own integers, with exact arithmetic. Numbers only: nothing is timed. Figures go to
docs/bench/saturation.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from bench_int8 import CALIBRATION, SIZE, networks, photos

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.runtimes.base import Arrays, get_runtime
from edgekd.runtimes.local_parity import local_parity

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "saturation.json"
EMULATOR = {"this CPU": [], "Haswell": ["qemu-x86_64-static", "-cpu", "Haswell"]}
SAMPLES = 16


class Elsewhere:
    """A session whose every call is a process of its own, on an emulated CPU or not."""

    def __init__(self, runtime: str, path: Path, emulator: list[str]) -> None:
        self.input_shapes, self.input_types = [], ["float32"]
        self._runtime, self._path = runtime, path
        self._command = [*emulator, sys.executable, __file__, "--child", runtime, str(path)]

    def __call__(self, inputs: Arrays) -> Arrays:
        """The file's outputs."""
        return list(self._run(inputs, []).values())

    def integer_share(self) -> tuple[int, int]:
        """Of the same file on this CPU."""
        return get_runtime(self._runtime).load(self._path, threads=1).integer_share()

    def tensors(self, inputs: Arrays, names: list[str]) -> dict[str, np.ndarray]:
        """By name."""
        return self._run(inputs, names)

    def _run(self, inputs: Arrays, names: list[str]) -> dict[str, np.ndarray]:
        with TemporaryDirectory() as folder:
            given, taken = f"{folder}/in.npz", f"{folder}/out.npz"
            np.savez(given, *inputs)
            subprocess.run([*self._command, given, taken, *names], check=True)
            return dict(np.load(taken))


def child(runtime: str, path: str, given: str, taken: str, *names: str) -> None:
    """Run the file once; keep its outputs, or the tensors of these names."""
    session = get_runtime(runtime).load(Path(path), threads=1)
    inputs = list(np.load(given).values())
    if names:
        np.savez(taken, **session.tensors(inputs, list(names)))
    else:
        np.savez(taken, *session(inputs))


def main() -> None:
    """Each runtime, number of bits and CPU."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, help="zip of 256 × 256 JPEGs")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        child(*options.child)
        return
    batches = photos(options.photos)
    used = CALIBRATION // len(batches[0])
    held_out = torch.cat(batches[used:])[:SAMPLES]
    net = edgekd.Network(networks()["EfficientNet-Lite0"], torch.zeros(1, 3, SIZE, SIZE))
    rows = []
    for name in ("host-onnxruntime", "intel-cpu"):
        target = edgekd.Target.load(name)
        assert target.scheme is not None
        for bits in (8, 7):
            scheme = target.scheme.model_copy(update={"weight_bits": bits})
            there = target.model_copy(update={"scheme": scheme})
            quantized = edgekd.quantize(
                net, target=there, data=batches[:used], calibration=CALIBRATION
            )
            with torch.no_grad():
                wanted = quantized(held_out).argmax(1).numpy()
            with TemporaryDirectory() as folder:
                path = edgekd.export(quantized, target=there, out=folder).path
                for cpu, emulator in EMULATOR.items():
                    session = Elsewhere(target.runtime, path, emulator)
                    answers = session([held_out.numpy()])[0].argmax(1)
                    found = local_parity(
                        quantized, [held_out[:4]], written=None, shipped=session
                    ).passes["as shipped"]
                    rows.append(
                        {
                            "runtime": target.runtime, "weight_bits": bits, "cpu": cpu,
                            "exact": found.exact, "max_steps": found.max_steps,
                            "elements": found.elements,
                            "differ": int((answers != wanted).sum()), "n": len(wanted),
                        }
                    )  # fmt: skip
                    print(rows[-1], flush=True)
    result = {"network": "EfficientNet-Lite0", "host": host_name(), "date": today(), "rows": rows}
    write_atomically(RESULT, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
