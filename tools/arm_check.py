"""Phone artifacts on real Arm kernels, by emulation: their numbers, never their time.

    sudo apt-get install qemu-user-static
    .venv/bin/python tools/arm_check.py --photos photos.zip       # a quarter of an hour of CPU time

ONNX Runtime's own aarch64 wheel runs under qemu in an arm64 Python: the exported file with its
optimizations (the kernels as they ship) and without, the bundle's other files, and its `infer.py
--check`. Outputs are compared with the trained network's; so are those of ONNX Runtime on this
host, as a control. The first run gets what it needs (Debian's arm64 packages and two wheels, 60 MB)
into a folder, and continues there if it was broken off.

Our family's student and ResNet-18 learn Fashion-MNIST for one epoch, at its 28 px: with random
weights answers lie within a step of each other, and agreement says nothing. EfficientNet-Lite0 has
its real weights. `photos.zip`: JPEGs of 256 × 256 for the latter; without it noise takes their
place. Figures go to docs/bench/arm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import resnet18

from edgekd.data.base import Data, evaluation_batches
from edgekd.errors import EdgekdError
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.network import Network
from edgekd.pipeline import new_network, task_and_data
from edgekd.recipe import Recipe
from edgekd.reporting.progress import Progress, console
from edgekd.runtimes.arithmetic import MLAS_ARM
from edgekd.runtimes.base import Arrays, TensorDifference
from edgekd.runtimes.integer_ends import IntegerEnds
from edgekd.runtimes.local_parity import local_parity
from edgekd.runtimes.onnxruntime import OnnxRuntime, integer_kernels
from edgekd.stages.distill import distill
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import output_step
from edgekd.tasks.base import wilson_interval

RESULT = Path(__file__).parents[1] / "docs" / "bench" / "arm.json"
ROOT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd" / "arm"
AGREEMENT = 0.995
CALIBRATION = 100
BATCH = 25
# a core like the target's: qemu's name, and its part number of MIDR_EL1 (Arm's reference manuals)
CORES = {
    "android-arm64": ("neoverse-n1", "0xd0c"),  # the server's Cortex-A76: dot products, half floats
    "raspberry-pi-4": ("cortex-a72", "0xd08"),  # without either
    "raspberry-pi-5": ("cortex-a76", "0xd0b"),
}
IMAGES = {"student": 1000, "ResNet-18": 400, "EfficientNet-Lite0": 200}
# (file, optimizations, share of the images): of every target, and further ones of the first; those
# without optimizations are slow, and no integer kernel takes part in them
EVERY = (("model.onnx", "default", 1.0),)
FURTHER = (("model.onnx", "off", 0.2), ("model.ort", "default", 0.2),
           ("model.integer_inputs.onnx", "default", 0.2))  # fmt: skip

# ---- the emulated machine ------------------------------------------------------------------------

PACKAGES = ("python3", "libstdc++6")
TOOLS = {
    "apt-get": "this needs Debian or Ubuntu, whose packages the emulated Python comes from",
    "dpkg-deb": "run: sudo apt-get install dpkg",
    "qemu-aarch64-static": "run: sudo apt-get install qemu-user-static",
}
# names of the bits of AT_HWCAP and AT_HWCAP2, lowest first: Linux, arch/arm64/kernel/cpuinfo.c
HWCAP = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma "
    "lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
HWCAP2 = (
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm "
    "svebf16 i8mm bf16 dgh rng bti mte"
)
RUN_FILE = """
import runpy
import sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ASK_HWCAP = """
import ctypes
ask = ctypes.CDLL(None).getauxval
ask.restype, ask.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
print(ask(16), ask(26))
"""
RUN_MODEL = """
import sys
import numpy as np
import onnxruntime as ort
model, given, answers, level, optimized = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 3
if not model.endswith(".ort"):
    options.optimized_model_filepath = optimized
if level == "off":
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
inputs = dict(np.load(given))
rows = []
for i in range(len(next(iter(inputs.values())))):
    rows.append(session.run(None, {name: x[i : i + 1] for name, x in inputs.items()}))
    print("image", flush=True)
np.savez(answers, *map(np.concatenate, zip(*rows)))
"""


class ArmError(EdgekdError):
    """The emulated machine cannot be made, or does not run."""


def missing_tools() -> list[str]:
    """What the system lacks, each with its remedy."""
    return [f"{tool} is missing; {remedy}" for tool, remedy in TOOLS.items()
            if shutil.which(tool) is None]  # fmt: skip


def is_set_up(root: Path) -> bool:
    """Whether the emulated machine in `root` is whole and can start."""
    return not missing_tools() and _wheels(root).is_dir()


def _wheels(root: Path) -> Path:
    """Where this host's version of ONNX Runtime is, for aarch64."""
    return root / f"wheels-{ort.__version__}"


def set_up(root: Path) -> None:
    """Make the emulated machine in `root`; what is there already stays.

    Raises:
        ArmError: a tool is missing, or one of them failed.
    """
    if missing := missing_tools():
        raise ArmError("; ".join(missing))
    if is_set_up(root):
        return
    console.print(f"emulated Arm machine: into {root} (210 MB, about a minute)")
    if not (root / "system").is_dir():
        _get_system(root)
    with _whole(_wheels(root)) as folder:
        console.print("2 of 2: ONNX Runtime and NumPy for aarch64")
        python = (root / "system/usr/bin/python3").readlink().name.removeprefix("python")
        _command(
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder),
            "--platform", "manylinux_2_28_aarch64", "--only-binary=:all:", "--python-version",
            python, f"onnxruntime=={ort.__version__}", "numpy",
        )  # fmt: skip


def _get_system(root: Path) -> None:
    """Python and its libraries, from the Debian that this is."""
    console.print("1 of 2: Debian's arm64 packages")
    state, cache = root / "apt/state", root / "apt/cache"
    for folder in (state / "lists/partial", cache / "archives/partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()  # nothing is installed, so apt gets all dependencies
    # apt's own user cannot write here; whoever runs this can
    facts = {"APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": state,
             "Dir::State::status": state / "status", "Dir::Cache": cache,
             "APT::Sandbox::User": ""}  # fmt: skip
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in facts.items())]
    _command(*apt, "update")
    _command(*apt, "install", "--download-only", "--yes", "--no-install-recommends", *PACKAGES)
    archives = sorted((cache / "archives").glob("*.deb"))
    with _whole(root / "system") as folder, Progress("unpacking", len(archives)) as progress:
        for archive in archives:
            _command("dpkg-deb", "-x", str(archive), str(folder))
            progress.advance()
    shutil.rmtree(root / "apt")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, that gets its name when it is full."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.replace(folder)


def _command(*argv: str) -> str:
    """What it prints; ArmError where it fails."""
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise ArmError(f"{' '.join(argv[:4])} … exits with {done.returncode}: {said}")
    return done.stdout


def features(hwcap: int, hwcap2: int) -> str:
    """The processor's abilities, as /proc/cpuinfo names them."""
    bits = [(hwcap, HWCAP), (hwcap2, HWCAP2)]
    return " ".join(
        name for word, names in bits for i, name in enumerate(names.split()) if word >> i & 1
    )


def cpuinfo(abilities: str, part: str) -> str:
    """/proc/cpuinfo of one core; on the host's own onnxruntime crashes."""
    fields = {"processor": "0", "BogoMIPS": "100.00", "Features": abilities,
              "CPU implementer": "0x41", "CPU architecture": "8", "CPU variant": "0x0",
              "CPU part": part, "CPU revision": "0"}  # fmt: skip
    return "".join(f"{key}\t: {value}\n" for key, value in fields.items()) + "\n"


def _emulated(root: Path, core: str, program: str, *arguments: str) -> Iterator[str]:
    """Run a Python program on the emulated core; yields the lines that it prints.

    Raises:
        ArmError: it did not exit with 0.
    """
    system = root / "system"
    argv = ["qemu-aarch64-static", "-L", str(system), str(system / "usr/bin/python3"), "-c",
            program, *arguments]  # fmt: skip
    paths = {"PYTHONHOME": str(system / "usr"), "PYTHONPATH": str(_wheels(root))}
    environment = {**paths, "QEMU_CPU": core, "PATH": os.environ["PATH"]}
    with subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            yield line
    if process.returncode != 0:
        raise ArmError(f"on {core}: exits with {process.returncode}: {''.join(said)[-1000:]}")


def _become(root: Path, target: str) -> str:
    """Make /proc/cpuinfo that of the target's core, which onnxruntime reads; the core's name."""
    core, part = CORES[target]
    words = "".join(_emulated(root, core, ASK_HWCAP)).split()
    (root / "system/proc").mkdir(exist_ok=True)
    write_atomically(root / "system/proc/cpuinfo", cpuinfo(features(*map(int, words)), part))
    return core


def bundle_passes(root: Path, target: str, folder: Path) -> bool:
    """Whether the bundle's own check, on the emulated core, says that outputs agree."""
    program = str((folder / "infer.py").resolve())
    said = "".join(_emulated(root, _become(root, target), RUN_FILE, program, "--check"))
    passed: bool = json.loads(said.splitlines()[-1])["passed"]
    return passed


def run_on_arm(
    root: Path, target: str, model: Path, images: Arrays, optimizations: str
) -> tuple[Arrays, tuple[int, int] | None]:
    """The model's outputs, image by image, and its (integer, all) matrix operators as they ran.

    An `.ort` file does not tell its operators.
    """
    core = _become(root, target)
    here = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [i.name for i in here.get_inputs()]
    ends = IntegerEnds.read(here.get_modelmeta().custom_metadata_map)
    with TemporaryDirectory() as text:
        given, answers, optimized = (Path(text) / n for n in ("i.npz", "o.npz", "optimized.onnx"))

        def emulate(arrays: Arrays) -> Arrays:
            np.savez(given, **dict(zip(names, arrays, strict=True)))
            paths = map(str, (model.resolve(), given, answers))
            lines = _emulated(root, core, RUN_MODEL, *paths, optimizations, str(optimized))
            with Progress(f"{core}, optimizations {optimizations}", len(images[0])) as progress:
                for line in lines:
                    if line == "image\n":
                        progress.advance()
            with np.load(answers) as found:
                return list(found.values())

        outputs = [o.name for o in here.get_outputs()]
        found = ends.run(emulate, dict(zip(names, images, strict=True)), outputs)
        ran = integer_kernels(onnx.load(optimized).graph) if optimized.exists() else None
        return found, ran


# ---- what is run ---------------------------------------------------------------------------------


def cases(names: list[str], path: Path | None) -> Iterator[tuple[str, Network, Any, Tensor]]:
    """Name, float network, what calibrates it, and images it has not learnt from."""
    from bench_int8 import SIZE, networks, photos

    recipe = Recipe.load("fashion-mnist-quick", changes=["distill.epochs=1"])
    task, data = task_and_data(recipe)
    options: dict[str, Any] = recipe.distill.model_dump() | {"hints": ()}
    small = new_network(recipe.student, data, recipe)  # seeds
    residual = resnet18(num_classes=len(data.classes))
    residual.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)  # grey images
    example = torch.zeros(1, *data.image_shape)
    for name, net in {"student": small, "ResNet-18": Network(residual, example)}.items():
        if name in names:
            net = distill(net, task=task, data=data, seed=recipe.seed, **options)
            test = torch.cat([batch[0] for batch in evaluation_batches(data)])
            yield name, net, data, test
    if "EfficientNet-Lite0" in names:
        batches = photos(path) if path else list(torch.randn(400, 3, SIZE, SIZE).split(20))
        first = CALIBRATION // len(batches[0])
        net = Network(networks()["EfficientNet-Lite0"], torch.zeros(1, 3, SIZE, SIZE))
        yield "EfficientNet-Lite0", net, batches[:first], torch.cat(batches[first:])


def compare(net: Network, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> dict[str, Any]:
    """Figures of one run: (N, K) class scores of the trained network, and of the device."""
    n, same = len(ours), int((ours.argmax(1) == theirs.argmax(1)).sum())
    found = TensorDifference.of("output", np.abs(ours - theirs) / output_step(ours, net))
    return {
        "n": n, "agreement": same / n, "ci95": wilson_interval(same, n),
        "exact": 1 - found.unequal / found.elements, "mean_steps": found.mean_steps,
        "max_steps": found.max_steps,
    }  # fmt: skip


def in_integers(net: Network, images: Tensor, theirs: NDArray[np.float32]) -> dict[str, Any]:
    """The device's scores beside the trained network's in the device's own integer arithmetic."""
    parts = np.split(theirs, range(BATCH, len(theirs), BATCH))
    found = [
        local_parity(
            net, [x], written=None, shipped=None, whole=lambda _, y=y: [y], rounding=MLAS_ARM
        ).as_a_whole
        for x, y in zip(images.split(BATCH), parts, strict=True)
    ]
    whole = [each for each in found if each is not None]
    elements = sum(each.elements for each in whole)
    return {
        "exact_in_integers": sum(each.exact * each.elements for each in whole) / elements,
        "max_steps_in_integers": max(each.max_steps for each in whole),
        "rounded_as_real_numbers": sorted({name for each in whole for name in each.unknown}),
    }


def check(root: Path, targets: list[str], net: Network, images: Tensor) -> Iterator[dict[str, Any]]:
    """Export the quantized network to each target and run what was written: a row for each run."""
    net.train_mode(False)
    with torch.no_grad():
        ours = torch.cat([net(x) for x in images.split(50)]).numpy()
    given = images.numpy()
    for target in targets:
        with TemporaryDirectory() as text:
            folder = Path(text)
            path = export(net, target=target, out=folder, examples=images).path
            if target == targets[0]:
                host = OnnxRuntime().load(path, threads=1, emulated=True)
                yield {"target": target, "core": platform.machine(), "file": path.name,
                       "optimizations": "off", **compare(net, ours, host([given])[0])}  # fmt: skip
            passes = bundle_passes(root, target, folder)
            for file, optimizations, share in EVERY + (FURTHER if target == targets[0] else ()):
                n = max(1, round(share * len(given)))
                theirs, kernels = run_on_arm(
                    root, target, folder / file, [given[:n]], optimizations
                )  # fmt: skip
                beside = compare(net, ours[:n], theirs[0])
                if optimizations != "off":
                    beside |= in_integers(net, images[:n], theirs[0])
                yield {
                    "target": target, "core": CORES[target][0], "file": file,
                    "optimizations": optimizations, **beside,
                    "integer_matrix_ops": kernels, "bundle_passes": passes,
                }  # fmt: skip


def agrees(row: dict[str, Any]) -> bool:
    """Whether a run is sound; one answer of it may always differ."""
    differ = round((1 - row["agreement"]) * row["n"])
    return row.get("bundle_passes", True) and differ <= max(1, (1 - AGREEMENT) * row["n"])


def table(rows: list[dict[str, Any]]) -> Table:
    """What the figures say."""
    shown = Table()
    for heading in ("network", "target", "core", "file", "optimizations", "integer", "n",
                    "agreement", "exact", "in integers", "mean steps", "max steps"):  # fmt: skip
        shown.add_column(heading)
    for row in rows:
        integer = " of ".join(map(str, row.get("integer_matrix_ops") or ()))
        low, high = row["ci95"]
        shown.add_row(
            row["network"], row["target"], row["core"], row["file"], row["optimizations"], integer,
            str(row["n"]), f"{row['agreement']:.2%} ({low:.1%}–{high:.1%})",
            f"{row['exact']:.2%}", f"{row['exact_in_integers']:.3%}" if "exact_in_integers" in row
            else "", f"{row['mean_steps']:.3f}", f"{row['max_steps']:.2f}",
        )  # fmt: skip
    return shown


def main() -> None:
    """Make the machine, run all, write JSON, print a table; exits 1 where a run disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, help="zip of 256 × 256 JPEGs")
    parser.add_argument("--targets", nargs="+", choices=CORES, default=list(CORES)[:2])
    parser.add_argument("--root", type=Path, default=ROOT, help="where the machine is made")
    parser.add_argument("--networks", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--out", type=Path, default=RESULT, help="rows of other networks stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        set_up(options.root)
    except ArmError as error:
        sys.exit(str(error))
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    facts = {
        "host": host_name(), "date": today(), "onnxruntime": ort.__version__,
        "qemu": _command("qemu-aarch64-static", "--version").splitlines()[0], "seed": 0,
    }  # fmt: skip
    for name, net, data, images in cases(options.networks, options.photos):
        # one network for all of them: export refuses a target of another scheme
        quantized = quantize(net, target=options.targets[0], data=data, calibration=CALIBRATION)
        rows = [row for row in rows if row["network"] != name]
        facts["images"] = (
            data.name if isinstance(data, Data) else "photos" if options.photos else "noise"
        )
        for row in check(options.root, options.targets, quantized, images[: IMAGES[name]]):
            rows.append({"network": name, **row, **facts})
            write_atomically(options.out, json.dumps({"rows": rows}, indent=1))
    Console(width=None if Console().is_terminal else 170).print(table(rows))
    if wrong := [f"{row['network']} on {row['core']}" for row in rows if not agrees(row)]:
        sys.exit(f"disagree: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
