"""Every network of torchvision, and one of each timm family: capture → integers → runtime.

    python tools/zoo.py torchvision                    # what is missing, the smallest first
    python tools/zoo.py timm --minutes 30              # as many as fit
    python tools/zoo.py torchvision --models resnet18 --schemes jetson-orin-nano
    python tools/zoo.py --tables                       # docs/zoo.md from what there is

Weights are random, images are noise of 224 px or the next size the network takes. BatchNorm is
calibrated; scales and shifts of all normalisations are random too: with PyTorch's 1 and 0 a random
network is chaotic (arXiv:1902.08129), and one rounding flip in its first layer fills the output.
Each network is quantized post-training, trained two steps in integers from its own float outputs,
exported and verified, in a process of its own with a time-out and a bound on memory. Results are
kept in docs/bench/zoo/, one file a network and scheme. No accuracy here: on random weights it
compares near-ties.

The gate: every convolution and matrix product that the scheme wants in integers is in integers in
the graph that runs; locally no tensor is off by more than a step; end to end the file's outputs are
within half a step of the trained graph's in the mean, without optimizations. Both are computed in
float64 (`float64.py`), where nothing but the export can differ; what was kept before that is judged
in float32, where a network moves by itself. Shown too: the outputs in ONNX Runtime's float32, as
shipped beside the trained graph in its own integer arithmetic, and OpenVINO's by its own kernels.
`jetson-orin-nano` is compiled too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from float64 import in_float64
from torch import Tensor, nn

import edgekd
from edgekd.files import write_atomically
from edgekd.latency.measuring import host_name, today
from edgekd.quantization.capture import capture
from edgekd.quantization.placement import describe, intended_matrix_ops, left_in_float
from edgekd.runtimes.arithmetic import IntegerGraph
from edgekd.runtimes.base import get_runtime

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "bench" / "zoo"
SCHEMES = ("host-onnxruntime", "jetson-orin-nano")
LARGEST = 60e6  # parameters
SIZES = (224, 240, 256, 299)
BATCH, BATCHES = 4, 2
MEAN_STEPS = 0.5
LOCAL_EXACT = 0.999  # share of elements
TIMM = (
    "beit_base_patch16_224", "coat_tiny", "coatnet_nano_rw_224", "convit_tiny",
    "convmixer_768_32", "convnext_atto", "convnextv2_atto", "crossvit_tiny_240",
    "cs3darknet_s", "cspresnet50", "davit_tiny", "deit_tiny_patch16_224", "densenet121",
    "dla34", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientnet_lite0",
    "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_dw", "fastvit_t8", "fbnetc_100",
    "gernet_s", "ghostnet_050", "hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small", "inception_v4",
    "inception_next_atto", "lcnet_050", "levit_128s", "mixer_s32_224", "mnasnet_small",
    "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "mobileone_s0", "mobilevit_xxs",
    "mobilevitv2_050", "nfnet_l0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002",
    "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_14w_8s", "resmlp_12_224",
    "resnest14d", "resnet10t", "resnetv2_50", "rexnetr_100", "selecsls42", "semnasnet_050",
    "skresnet18", "starnet_s1", "tf_efficientnetv2_b0", "tinynet_e", "tiny_vit_5m_224",
    "vit_tiny_patch16_224", "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip


def names(library: str) -> list[str]:
    """Of the networks to run; torchvision: all that classify."""
    if library == "timm":
        return sorted(TIMM)
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def build(library: str, name: str) -> nn.Module:
    """Random weights."""
    torch.manual_seed(0)
    if library == "timm":
        import timm

        module: nn.Module = timm.create_model(name, pretrained=False)
        return module
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    found: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return found


def parameters(library: str, name: str) -> int:
    """How many, without any memory for them."""
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    with torch.device("meta"):
        return sum(p.numel() for p in build(library, name).parameters())


def noise(count: int, size: int, seed: int) -> Tensor:
    """Images of (count, 3, size, size): noise of two scales."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(count, 3, size, size, generator=generator)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return fine + nn.functional.interpolate(coarse, size=size, mode="bilinear")


def smallest(module: nn.Module) -> int:
    """The smallest of SIZES that the network takes, and that pools evenly."""
    even = True

    def look(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal even
        sides = zip(inputs[0].shape[2:], output.shape[2:], strict=True)
        even = even and all(i % o == 0 for i, o in sides)

    for layer in module.modules():
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            layer.register_forward_hook(look)
    reasons = []
    for size in SIZES:
        even = True
        try:
            with torch.no_grad():
                module.eval()(torch.zeros(2, 3, size, size))
        except Exception as error:  # a network may fail in any way at a size it does not take
            reasons.append(f"{size}: {error}")
            continue
        if even:
            return size
    raise ValueError(f"no size of {SIZES} will do; {reasons[-1] if reasons else 'uneven pooling'}")


def calibrate_norms(module: nn.Module, size: int) -> None:
    """Random scales and shifts; running statistics as the mean over a few batches."""
    torch.manual_seed(1)
    module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)  # a head that starts at zero tells nothing
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)) and layer.weight is not None:
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, 0.5, 0.2)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.2, 0.4)
                nn.init.normal_(layer.bias, 1.0, 0.4)
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    with torch.no_grad():
        for seed in range(3):
            module(noise(8, size, seed))
    module.eval()


def mean_steps(got: list[Any], wanted: list[Any]) -> float:
    """Mean difference of outputs, in steps of amax / 127."""
    step = max(float(np.abs(w).max()) for w in wanted) / 127
    return float(np.mean([np.abs(a - b).mean() for a, b in zip(got, wanted, strict=True)])) / step


def trained(net: edgekd.Network, target: str, batches: list[tuple[Tensor]]) -> edgekd.Network:
    """In the target's integers, post-training, then a step for each batch."""
    return edgekd.quantize(
        net, target=target, data=batches, teacher=net, epochs=1, calibration=BATCH * BATCHES,
        lr=1e-4, accelerator="cpu",
    )  # fmt: skip


def one(library: str, name: str, scheme: str, record: dict[str, Any]) -> None:
    """All stages of one network; `record` tells how far it came."""
    record["stage"] = "build"
    module = build(library, name)
    record["size"] = size = smallest(module)
    module = build(library, name)  # without hooks
    calibrate_norms(module, size)
    net = edgekd.Network(module, torch.zeros(1, 3, size, size))
    record["stage"] = "capture"
    if record["params"] > LARGEST:
        capture(module, net.io.example(2))
        record["stage"] = "captured"
        return
    batches = [(noise(BATCH, size, 10 + i),) for i in range(BATCHES)]
    record["stage"] = "quantize and train"
    quantized = trained(net, scheme, batches)
    record["intended"] = intended_matrix_ops(quantized.module)
    record["in_float"] = describe(left_in_float(quantized.module))
    record["stage"] = "export"
    with TemporaryDirectory() as folder:
        artifact = edgekd.export(quantized, target=scheme, out=f"{folder}/{scheme}")
        record["stage"] = "verify"
        parity = edgekd.verify(artifact, quantized, data=batches, mean_steps=1e9)
        record["parity"] = parity.model_dump(mode="json")
        plain = get_runtime("onnxruntime").load(artifact.path, threads=1, emulated=True)
        with torch.no_grad():
            wanted = [quantized(x).numpy() for (x,) in batches]
        got = [plain([x.numpy()])[0] for (x,) in batches]
        record["plain_mean_steps"] = mean_steps(got, wanted)
        (images,) = batches[0]
        graph = IntegerGraph(quantized.module, rounding=None)
        with torch.no_grad():
            graph.run(images.double())
        got = in_float64(onnx.load(artifact.path), [images.numpy()])
        record["float64_mean_steps"] = mean_steps(got, [end.numpy() for _, end in graph.ends])
        if scheme == "host-onnxruntime":
            record["stage"] = "openvino"
            quantized = trained(net, "intel-cpu", batches)
            artifact = edgekd.export(quantized, target="intel-cpu", out=f"{folder}/openvino")
            parity = edgekd.verify(artifact, quantized, data=batches)
            record["openvino"] = parity.model_dump(
                mode="json", include={"mean_steps", "max_steps", "integer_share", "gate", "reasons"}
            )
    record["stage"] = "done"


def child(library: str, name: str, scheme: str, path: Path, memory_gib: float) -> None:
    """One network in this process; its record is written whatever happens."""
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "library": library, "model": name, "scheme": scheme, "host": host_name(), "date": today(),
        "params": parameters(library, name),
    }  # fmt: skip
    began = time.monotonic()
    try:
        one(library, name, scheme, record)
    except Exception as error:  # whatever it is, it is the result
        message = (str(error).strip() or "no message").splitlines()[0]
        record["error"] = f"{type(error).__name__}: {message[:300]}"
        traceback.print_exc()
    record["seconds"] = round(time.monotonic() - began, 1)
    write_atomically(path, json.dumps(record, indent=1))


def launch(library: str, name: str, scheme: str, timeout_s: float, memory_gib: float) -> None:
    """The same in a process of its own; the log is in runs/zoo."""
    path = KEPT / library / f"{name}--{scheme}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = ROOT / "runs" / "zoo" / f"{path.stem}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, library, "--child", name, scheme, str(path)]
    command += ["--memory-gib", str(memory_gib)]
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=file, timeout=timeout_s,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            ).returncode  # fmt: skip
            reason = f"ended with {code}"
        except subprocess.TimeoutExpired:
            code, reason = -1, f"not done in {timeout_s:g} s"
    if code:
        record = {
            "library": library, "model": name, "scheme": scheme, "host": host_name(),
            "date": today(), "params": parameters(library, name), "stage": "killed",
            "error": f"{reason}; memory is bounded to {memory_gib:g} GiB",
        }  # fmt: skip
        write_atomically(path, json.dumps(record, indent=1))
    done = json.loads(path.read_text())
    print(f"{name} {scheme}: {'; '.join(faults(done)) or 'passed'}", flush=True)


def faults(record: dict[str, Any]) -> list[str]:
    """Why a network does not pass; none for one that is captured only, being too large."""
    if "error" in record:
        return [f"{record['stage']}: {record['error']}"]
    if record["stage"] == "captured":
        return []
    parity, found = record["parity"], []
    if parity["integer_share"] < 1:
        found.append(f"{parity['integer_share']:.1%} of {record['intended']} in integers")
    steps = record.get("float64_mean_steps", record["plain_mean_steps"])
    if not steps <= MEAN_STEPS:
        found.append(f"{steps:.3g} steps in the mean, end to end")
    for name in ("as_written", "as_shipped"):
        local = (parity["local"] or {}).get(name)
        if local and (local["max_steps"] > 1 or local["exact"] < LOCAL_EXACT):
            found.append(
                f"locally {name.replace('_', ' ')}: {local['exact']:.4%} exact, largest "
                f"{local['max_steps']:.3g} steps, first {local['first']}"
            )
    if record["scheme"] == "jetson-orin-nano":
        compiled = parity["compiled"] or {"error": "not compiled", "floating": []}
        if compiled["error"]:
            found.append(f"tensorrt-rtx: {compiled['error']}")
        elif compiled["floating"]:
            count = len(compiled["floating"])
            found.append(f"{count} of {compiled['total']} float in tensorrt-rtx")
    return found


def table(library: str) -> list[str]:
    """Markdown: n of m, then a line for each network."""
    found = [json.loads(path.read_text()) for path in sorted((KEPT / library).glob("*.json"))]
    small = [n for n in names(library) if parameters(library, n) <= LARGEST]
    lines = [f"## {library}", ""]
    for scheme in SCHEMES:
        run = [r for r in found if r["scheme"] == scheme and r["params"] <= LARGEST]
        passed = sum(not faults(record) for record in run)
        share = f", {passed / len(run):.1%} of those" if run else ""
        exactly = [r["float64_mean_steps"] for r in run if "float64_mean_steps" in r]
        worst = f", at most {max(exactly):.0e} steps apart" if exactly else ""
        lines.append(
            f"- `{scheme}`: {len(run)} of {len(small)} run, {passed} passed{share}; "
            f"{len(exactly)} were compared in float64{worst}."
        )
    large = sorted(set(names(library)) - set(small))
    captured = {r["model"] for r in found if r["stage"] == "captured"}
    if large:
        lines.append(
            f"- Too large for this machine (over {LARGEST / 1e6:g} M parameters), capture only: "
            f"{len(captured)} of {len(large)} captured."
        )
    lines += [
        "",
        "| network | parameters | px | scheme | integers | exact locally, as written (as shipped) "
        "| end to end, steps, in float64, float32 (ONNX Runtime's integers) "
        "| OpenVINO: steps, integers | in float | result |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in sorted(found, key=lambda r: (r["params"], r["model"], r["scheme"])):
        parity = record.get("parity") or {}
        local = parity.get("local") or {}
        exact = [
            f"{p['exact']:.4%}" for p in (local.get("as_written"), local.get("as_shipped")) if p
        ]
        vino = record.get("openvino")
        steps = "" if "error" in record or not parity else f"{record['plain_mean_steps']:.3f}"
        if "float64_mean_steps" in record:
            steps = f"{record['float64_mean_steps']:.0e}, {steps}"
        if whole := local.get("as_a_whole"):
            steps += f" ({whole['mean_steps']:.3f})"
        cells = [
            record["model"], f"{record['params'] / 1e6:.1f} M", str(record.get("size", "")),
            record["scheme"],
            f"{record['intended'] * parity['integer_share']:.0f} of {record['intended']}"
            if parity else "",
            exact[0] + (f" ({exact[1]})" if len(exact) > 1 else "") if exact else "",
            steps,
            f"{vino['mean_steps']:.3f}, {vino['integer_share']:.0%}" if vino else "",
            record.get("in_float", ""),
            "captured only" if record["stage"] == "captured"
            else "; ".join(faults(record)) or "passed",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return lines


def write_tables() -> None:
    """docs/zoo.md."""
    lines = [
        "# The zoo", "",
        "Made by `tools/zoo.py`, whose header says what is done and what the gate is. One file a "
        "network and scheme is in `docs/bench/zoo/`, with host and date.", "",
    ]  # fmt: skip
    for library in ("torchvision", "timm"):
        lines += [*table(library), ""]
    write_atomically(ROOT / "docs" / "zoo.md", "\n".join(lines))


def main() -> None:
    """Run what is missing, two at a time; write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("collection", nargs="?", choices=("torchvision", "timm"))
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--again", action="store_true", help="also what has a result, or failed")
    parser.add_argument("--minutes", type=float, default=100, help="start no other after this")
    parser.add_argument("--timeout-s", type=float, default=900)
    parser.add_argument("--memory-gib", type=float, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="only write docs/zoo.md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, scheme, path = options.child
        child(options.collection, name, scheme, Path(path), options.memory_gib)
        return
    if options.collection and not options.tables:
        began = time.monotonic()
        chosen = options.models or names(options.collection)
        jobs = [
            (name, scheme)
            for name in sorted(chosen, key=lambda n: parameters(options.collection, n))
            for scheme in options.schemes
            if (scheme == SCHEMES[0] or parameters(options.collection, name) <= LARGEST)
            and (
                options.again or not (KEPT / options.collection / f"{name}--{scheme}.json").exists()
            )
        ]

        def job(pair: tuple[str, str]) -> None:
            if time.monotonic() - began < 60 * options.minutes:
                launch(options.collection, *pair, options.timeout_s, options.memory_gib)

        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(job, jobs))
    write_tables()


if __name__ == "__main__":
    main()
