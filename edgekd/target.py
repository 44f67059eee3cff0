"""What a device accepts: one TOML file in `targets/`, no Python."""

from __future__ import annotations

import os
import platform
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgekd.errors import TargetError, describe_invalid, nearest

Precision = Literal["fp32", "fp16", "int8"]
IntegerOp = Literal[
    "conv", "conv_transpose", "linear", "matmul", "add", "sub", "mul", "sigmoid", "concat", "pool"
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QuantScheme(_Frozen):
    """How a device wants its integers.

    Attributes:
        activation_dtype: integer type of activations in the exported file.
        activation_symmetric: zero point 0 (int8 only).
        weight_bits: 8, or 7 where the device's 8-bit kernels saturate; stored as int8.
        weight_granularity: one scale per output channel, or per tensor.
        bias: "int32" (scale = input scale · weight scale) or "float".
        fold_weights: weights are stored as integers; otherwise in float, with a quantize and a
            dequantize operator behind them, as TensorRT 8 wants them.
        add_inputs: which inputs of a residual Add or Sub are quantized: both, or all but the
            convolution that it is fused into ("skip"), with a ReLU in between too
            ("skip-activated").
        shared_scales: operators whose inputs and output have one scale, as integer-only runtimes
            want it; of poolings, those over windows, not those over whole maps; as "concat-alike",
            concatenations of values that are all at least 0, or none of them: ONNX Runtime drops a
            ReLU in front of zero point 0 only, and a convolution with one that stays is in float.
        fixed_scales: operators whose output has the one scale that the device's kernel takes:
            of a sigmoid 1 / 256, from 0 on.
        symmetric_matmul: whether a product of two activations wants its factors as int8 with zero
            point 0 (what a softmax gives, from 0 on, as all others), and gives floats: so does
            OpenVINO's attention kernel.
        symmetric_norms: whether what a vector norm reads is int8 with zero point 0, if it may be
            below 0. OpenVINO's zeros are else off by a millionth of a step: all that a vector of
            zeros is, and its norm makes a whole vector of it.
        outputs: whether the output of an integer operator is quantized too.
        linear_gives_float: whether a linear layer gives floats where operators in float read it,
            as an attention in float does: no quantizer stands between.
        fused_activations: those that the kernel of a convolution or a linear layer takes along, on
            its sums, besides ReLU and ReLU6: no quantizer stands between.
        linear_as_conv: whether the file computes a linear layer over a map with channels last,
            between permutations, as a convolution, which an Add behind it may be fused into.
        integer_inputs, integer_outputs: whether the file takes and gives integers; their scales are
            in its metadata, see `integer_ends`.
        least_pooled_channels: a convolution over 1 × 1 maps of fewer channels stays in float, where
            the runtime has no integer kernel for it.
        ops: the operators that run in integers; the others stay in float (softmax, normalisation
            and activations that no kernel takes along always do). With "sigmoid", which integer
            runtimes look up in a table, a SiLU becomes a sigmoid and a product.
    """

    activation_dtype: Literal["uint8", "int8"]
    activation_symmetric: bool
    weight_bits: Literal[7, 8]
    weight_granularity: Literal["channel", "tensor"]
    bias: Literal["int32", "float"]
    fold_weights: bool = True
    add_inputs: Literal["both", "skip", "skip-activated"]
    shared_scales: tuple[Literal["add", "concat", "concat-alike", "pool"], ...] = ()
    fixed_scales: tuple[Literal["sigmoid"], ...] = ()
    symmetric_matmul: bool = False
    symmetric_norms: bool = False
    outputs: bool
    linear_gives_float: bool = False
    fused_activations: tuple[Literal["gelu", "hardswish", "silu"], ...] = ()
    linear_as_conv: bool = False
    least_pooled_channels: int = 1
    integer_inputs: bool = False
    integer_outputs: bool = False
    ops: tuple[IntegerOp, ...]

    @model_validator(mode="after")
    def _possible(self) -> QuantScheme:
        if self.activation_symmetric and self.activation_dtype != "int8":
            raise ValueError("symmetric activations are int8; their zero point is 0")
        return self

    def fits(self, other: QuantScheme) -> bool:
        """Whether a network trained for this scheme can be exported to `other` without loss.

        Equal, or S8 → U8 activations: the zero points move by 128, nothing else changes.
        """
        shifted = self.model_copy(update={"activation_dtype": "uint8"})
        return self == other or (not self.activation_symmetric and shifted == other)


class Source(_Frozen):
    """Where a figure comes from."""

    fact: str
    url: str


class ChannelMultiple(_Frozen):
    """Widths that the device's kernels like; `source` is "default" where none is known."""

    value: Annotated[int, Field(ge=1)]
    source: str


class Target(_Frozen):
    """One device and the runtime on it.

    Attributes:
        runtime: key of the table of runtimes ("onnxruntime", "openvino", "tensorrt").
        verifier: "native": this host has the device's kernels; "emulated": it has not, and
            another runtime stands in, see `Runtime.emulator`.
        machines: hosts whose kernels count as native, as `platform.machine()` names them;
            empty: all.
        instructions: likewise, as `host_instruction_set` names them.
        precisions: what the device runs, the preferred one last. "fp16": the file is in FP32, and
            built for half precision on the device.
        no_integers: why `scheme` is absent.
        compile_check: compute capability that stands in for the device's where the runtime can
            compile without it ("SM86"); None: nothing does.
        device: what OpenVINO calls it ("CPU", "GPU", "NPU").
        providers: of ONNX Runtime, before the CPU's.
        operators: table of operators other than the runtime's own ("coreml").
        layout: of the file's images.
        shapes: of the file: a batch of any size (1 in OpenVINO's own format), or "static": batch 1,
            and every tensor's shape known, for devices that take no others or run them worse.
        variants: further files of the same network in the bundle: ONNX Runtime's format ("ort"),
            the file that takes integers ("integer_inputs"), and the one that takes images of 0 to
            255 as they are ("images"); of a detector, in ONNX, the one that gives boxes and scores
            ("decoded"), and the one without duplicates ("detections").
        snippets: examples for apps in the bundle.
        memory_mib: of the device.
        peak: figures of the device by name and unit (fp16_gflops, memory_gb_s).
    """

    name: str
    title: str
    runtime: str
    runtime_version: str
    opset: int
    verifier: Literal["native", "emulated"]
    machines: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    precisions: tuple[Precision, ...]
    channel_multiple: ChannelMultiple
    scheme: QuantScheme | None = None
    no_integers: str = ""
    compile_check: str | None = None
    device: Literal["CPU", "GPU", "NPU"] = "CPU"
    providers: tuple[str, ...] = ()
    operators: str | None = None
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    shapes: Literal["dynamic_batch", "static"] = "dynamic_batch"
    variants: tuple[Literal["ort", "integer_inputs", "images", "decoded", "detections"], ...] = ()
    snippets: tuple[Literal["Classifier.kt", "Classifier.swift", "LiteRtClassifier.kt"], ...] = ()
    memory_mib: int | None = None
    peak: dict[str, float] = {}
    source: tuple[Source, ...] = ()

    @property
    def float_precision(self) -> Precision | None:
        """What a float network becomes on this device; None if it runs integers only."""
        return next((p for p in self.precisions if p != "int8"), None)

    @property
    def why_float(self) -> str:
        """`: the reason`, to stand behind "runs no integers"; empty where none is known."""
        return f": {self.no_integers}" if self.no_integers else ""

    @property
    def native_here(self) -> bool:
        """Whether this host's kernels are the device's: only then is a latency here its own."""
        fits = not self.machines or platform.machine() in self.machines
        able = not self.instructions or host_instruction_set() in self.instructions
        return self.verifier == "native" and fits and able

    @property
    def needs(self) -> str:
        """The hosts whose kernels are the device's, in words."""
        return " with ".join(
            f"one of {', '.join(x)}" for x in (self.machines, self.instructions) if x
        )

    @staticmethod
    def load(name: str | Target) -> Target:
        """The target of that name: `$EDGEKD_HOME/targets` first, then the shipped ones.

        Raises:
            TargetError: no such target (the nearest name is given), or its file is invalid.
        """
        if isinstance(name, Target):
            return name
        for folder in data_folders("targets"):
            path = folder / f"{name}.toml"
            if path.is_file() and name == path.stem:
                return _read(path)
        raise TargetError(f"no target {name!r}{nearest(name, target_names())}")


def target_names() -> list[str]:
    """Names of all targets, shipped and the user's own."""
    return sorted({p.stem for folder in data_folders("targets") for p in folder.glob("*.toml")})


def data_folders(kind: Literal["targets", "profiles"]) -> list[Path]:
    """Where `kind` is looked for: the user's folder, the wheel's data, the repository."""
    package = Path(__file__).parent
    candidates = [package / "_data" / kind, package.parent / kind]
    if home := os.environ.get("EDGEKD_HOME"):
        candidates.insert(0, Path(home) / kind)
    return [c for c in candidates if c.is_dir()]


def _read(path: Path) -> Target:
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text())
        target = Target(**values)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise TargetError(f"{path}: {describe_invalid(error, Target)}") from None
    if target.name != path.stem:
        raise TargetError(f"{path}: name is {target.name!r}; it must be the file's: {path.stem!r}")
    if target.compile_check and target.runtime != "tensorrt":
        raise TargetError(f"{path}: compile_check is for runtime = 'tensorrt' alone; leave it out")
    if ("int8" in target.precisions) != (target.scheme is not None):
        raise TargetError(f"{path}: a [scheme] goes with 'int8' in precisions; give both or none")
    return target


@cache
def host_instruction_set() -> str:
    """The widest integer instructions of this CPU: "amx", "avx512_vnni", "avx2", "neon", ...

    It decides which kernels a native check runs on, so it is part of an export's key.
    """
    if platform.machine() in ("aarch64", "arm64"):
        return "neon"
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() or "unknown"
    flags = set(next((x for x in text.splitlines() if x.startswith("flags")), "").split())
    order = {"amx_int8": "amx", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni"}
    wide = [name for flag, name in order.items() if flag in flags]
    return (wide + [f for f in ("avx512f", "avx2") if f in flags] + ["x86"])[0]
