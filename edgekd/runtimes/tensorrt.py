"""TensorRT on a Jetson: what the device builds its engine from, and the check without the device.

Engines are not portable, so the artifact is the ONNX, a script that builds it with the trtexec of
that device's TensorRT, and a manifest. Numerics are checked in ONNX Runtime. Where a compute
capability can stand in for the device's, `tensorrt-rtx` compiles the file for it on any CPU, and
its log says what each layer computes in: a compile check, not a build for the device. Where
`tensorrt` itself is installed beside a GPU, that builds the engine.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import torch
from pydantic import BaseModel, ConfigDict

from edgekd.errors import MissingPackageError, StateError
from edgekd.files import write_atomically
from edgekd.network import Network
from edgekd.runtimes.base import CompileCheck, Session, fingerprint
from edgekd.runtimes.bundle import example_inputs
from edgekd.runtimes.half import to_half
from edgekd.runtimes.onnx_graph import MATRIX_OPS, quantized_matrix_ops, save_onnx, to_onnx
from edgekd.runtimes.operator_tables import release
from edgekd.runtimes.rules import check_operators
from edgekd.target import Precision, Target

SCRIPT = """\
#!/bin/sh
# {title}: builds model.engine from model.onnx ({precision}).
# Engines are not portable: run this on the device itself, with TensorRT {version}.
# Another file of the bundle, model.decoded.onnx say: build_engine.sh model.decoded
set -eu
cd "$(dirname "$0")"
name=${{1:-model}}
trtexec=$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)
if [ ! -x "$trtexec" ]; then
  echo 'trtexec is not here; it comes with JetPack: sudo apt-get install libnvinfer-bin' >&2
  exit 1
fi
[ "$name" != model ] || echo {sha256} ' model.onnx' | sha256sum -c -
exec "$trtexec" {flags}
"""


Shapes = Mapping[str, tuple[int, ...]]


STRONGLY_TYPED = (11,)  # from this version on, types are those of the ONNX


class TensorRt:
    """TensorRT, by way of ONNX."""

    name = "tensorrt"
    suffix = ".onnx"
    emulator = "onnxruntime"
    plain = False
    exact = 1.0
    rounding = None

    def version(self) -> str:
        """Of what can compile here: nothing is needed to export."""
        try:
            return f"tensorrt-rtx {version('tensorrt-rtx')}"
        except PackageNotFoundError:
            return "none here"

    def export(self, net: Network, target: Target, path: Path) -> dict[str, str]:
        """Write the `.onnx`, and beside it `build_engine.sh`.

        Raises:
            TargetError: an operator that this version's parser does not take.
        """
        model = to_onnx(net, target)
        check_operators(model, target)
        precision: Precision = (
            "int8" if net.scheme is not None else target.float_precision or "fp32"
        )
        if precision == "fp16" and release(target.runtime_version) >= STRONGLY_TYPED:
            model, _ = to_half(model, [x.numpy() for x in example_inputs(net)])
        versions = save_onnx(model, path)
        write_script(path, target, precision, {i.name: (1, *i.shape) for i in net.io.inputs})
        return versions

    def load(self, path: Path, *, threads: int, emulated: bool = False) -> Session:
        """Refused: the device runs it."""
        raise StateError(f"{path}: build it on the device with build_engine.sh, and run it there")


def write_script(path: Path, target: Target, precision: Precision, shapes: Shapes) -> None:
    """`build_engine.sh` beside `path`, and what compiles for the device's kind, if it is here."""
    flags = " ".join(map(shlex.quote, build_flags(shapes, target, precision)))
    flags = flags.replace("=model.", '="$name".')
    script = SCRIPT.format(
        title=target.title, precision=precision, version=target.runtime_version,
        sha256=fingerprint(path)[0], flags=flags,
    )  # fmt: skip
    write_atomically(path.with_name("build_engine.sh"), script)
    path.with_name("build_engine.sh").chmod(0o755)
    if target.compile_check is not None:
        with contextlib.suppress(MissingPackageError):  # verify says what is unchecked
            compiled(path, target, precision)


def build_flags(shapes: Shapes, target: Target, precision: Precision) -> list[str]:
    """trtexec's flags, which differ from version to version.

    Args:
        shapes: of the inputs that the file leaves open, by name, batch axis included.
    """
    version_here = release(target.runtime_version)
    named = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    # detailed: the engine can tell later which layers it has, and in what types
    flags = ["--onnx=model.onnx", "--saveEngine=model.engine", "--profilingVerbosity=detailed"]
    if named:  # trtexec refuses it for a file of fixed shapes
        flags.append(f"--shapes={named}")
    if version_here < STRONGLY_TYPED:
        flags += {"fp32": [], "fp16": ["--fp16"], "int8": ["--int8", "--fp16"]}[precision]
    if target.memory_mib is not None:
        workspace = target.memory_mib // 4
        flags.append(
            f"--memPoolSize=workspace:{workspace}" if version_here >= (8, 4)
            else f"--workspace={workspace}"
        )  # fmt: skip
    if version_here <= (8, 5):
        flags.append("--buildOnly")
    elif version_here >= (10, 3):
        flags.append("--skipInference")
    return flags


# ---- compiling -----------------------------------------------------------------------------------


def _real_tensorrt() -> Any:
    """The vendor's own package where it can build: beside a GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        return import_module("tensorrt")
    except ImportError:
        return None


def _tensorrt_rtx() -> Any:
    try:
        return import_module("tensorrt_rtx")
    except ImportError:
        raise MissingPackageError("tensorrt-rtx", "tensorrt") from None


# kind of layer, element types of its inputs, names of the ONNX nodes in it
Layer = tuple[str, tuple[str, ...], tuple[str, ...]]


class Compiled(BaseModel):
    """What a compiler made of one file, kept as `compiled.json` beside it.

    Attributes:
        layers: of the engine, with the types that they read.
        error: why there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    tool: str
    version: str
    capability: str
    sha256: str
    precision: Precision
    layers: tuple[Layer, ...] = ()
    error: str | None = None


def compile_check(
    path: Path, target: Target, precision: Precision, intended: int | None = None
) -> CompileCheck:
    """Compile the file for what stands in for the device, and read the layers' types.

    Args:
        intended: how many matrix operators the placement has in integers; None: all.

    Raises:
        MissingPackageError: neither `tensorrt` with a GPU nor `tensorrt-rtx` is here.
    """
    done = compiled(path, target, precision)
    common = done.model_dump(include={"tool", "version", "capability", "error"})
    if done.error is not None or precision != "int8":
        return CompileCheck(**common)
    model = onnx.load(path)
    matrix = [n.name for n in model.graph.node if n.op_type in MATRIX_OPS]
    total = len(matrix) if intended is None else intended
    if len(quantized := quantized_matrix_ops(model)) >= total:
        matrix = quantized  # the others are meant to be in float; if too few, one of them is not
    floating = tuple(name for name in matrix if not _in_integers(name, done.layers))
    return CompileCheck(
        **common, integer=len(matrix) - len(floating), total=total, floating=floating
    )


def compiled(path: Path, target: Target, precision: Precision) -> Compiled:
    """The file, compiled once; `compiled.json` beside it keeps what came out.

    Raises:
        MissingPackageError: neither `tensorrt` with a GPU nor `tensorrt-rtx` is here.
    """
    trt = _real_tensorrt() or _tensorrt_rtx()
    real = trt.__name__ == "tensorrt"
    common: dict[str, Any] = {
        "tool": trt.__name__.replace("_", "-"), "version": trt.__version__,
        "capability": "this GPU" if real else str(target.compile_check),
        "sha256": fingerprint(path)[0], "precision": precision,
    }  # fmt: skip
    place = path.with_name("compiled.json")
    with contextlib.suppress(OSError, ValueError):
        kept = Compiled.model_validate_json(place.read_text())
        if kept.model_dump(include=set(common)) == common:
            return kept
    done = Compiled(**common, **_compile(trt, path, common["capability"], precision))
    write_atomically(place, done.model_dump_json(indent=1))
    return done


def _compile(trt: Any, path: Path, capability: str, precision: Precision) -> dict[str, Any]:
    """`layers` of the engine, or the `error`."""
    real = trt.__name__ == "tensorrt"
    lines: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]  # the vendor's, either one
        def log(self, _: Any, message: str) -> None:
            lines.append(message)

    log = Log()
    builder = trt.Builder(log)
    flags = 1 if real and release(trt.__version__)[0] < 10 else 0  # 1: explicit batch
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(path.read_bytes()):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = (f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors)
        return {"error": "; ".join(said)}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if real and precision != "fp32" and release(trt.__version__)[0] < 11:
        config.set_flag(trt.BuilderFlag.FP16)
        if precision == "int8":
            config.set_flag(trt.BuilderFlag.INT8)
    if not real:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        shape = (1, *tuple(value.shape)[1:])
        profile.set_shape(value.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"error": lines[-1] if lines else "no engine came out"}
    if real:
        path.with_suffix(".engine").write_bytes(engine)
    return {"layers": tuple(_layers_of_engine(trt, log, engine) if real else _layers_of_log(lines))}


def _layers_of_log(lines: list[str]) -> Iterator[Layer]:
    """What `tensorrt-rtx` logs of its engine."""
    for line in "\n".join(lines).splitlines():
        if kind := re.search(r", LayerType: (\w+),", line):
            inputs = re.search(r"Inputs: \[(.*?)\](?:, Constants:|, Outputs:)", line)
            yield (
                kind[1],
                tuple(re.findall(r"Datatype: (\w+)", inputs[1])) if inputs else (),
                tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", line)),
            )


def _layers_of_engine(trt: Any, log: Any, engine: Any) -> Iterator[Layer]:
    """What TensorRT's engine inspector says."""
    inspector = trt.Runtime(log).deserialize_cuda_engine(engine).create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    for layer in json.loads(text)["Layers"]:
        types = [str(tensor["Format/Datatype"]) for tensor in layer["Inputs"]]
        nodes = re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer.get("Metadata", ""))
        yield (
            layer["LayerType"], tuple("Int8" if "int8" in t.lower() else t for t in types),
            tuple(nodes) or (layer["Name"],),
        )  # fmt: skip


def _in_integers(node: str, layers: Iterable[Layer]) -> bool:
    """Whether the layer that does the node's work reads Int8 only.

    A node is also named by the generated kernels (`kgen`) that prepare its input or scale its
    output; they count only where nothing else names it.
    """
    own = [layer for layer in layers if node in layer[2]]
    work = [layer for layer in own if layer[0] != "kgen"] or own
    return any(types and set(types) == {"Int8"} for _, types, _ in work)
