"""The time of each layer, read from what runtimes write when they profile.

Each reader takes the text as the tool wrote it and gives the layers in the order they run in.
Where a format has several runs, a layer's time is its median over them, 0 in a run without it;
where it has means only, the mean stands in. On a busy host a long layer is interrupted in most
runs, and runtimes time layers by the wall clock alone: there the median is over the runs in which
nothing came between (`undisturbed`).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from edgekd.errors import StateError

# a time slice of another process, 1 ms and more, lengthens a layer by more than this
INTERRUPTED, RESOLUTION_MS = 1.5, 0.002


class LayerTime(BaseModel):
    """One layer as the runtime runs it: of several layers that it fused, all of them.

    Attributes:
        name: as the runtime calls it.
        operator: the kind of its kernel; empty where the format does not tell.
        p50_ms: the median over the profiled runs; over the undisturbed ones if the host was busy.
        share: of the sum over all layers, 0 to 1.
        types: element types of its inputs, as far as the format tells.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    operator: str
    p50_ms: float
    share: float
    types: tuple[str, ...] = ()


class Kernel(NamedTuple):
    """What runs a layer: its operator, and the types of its inputs."""

    operator: str = ""
    types: tuple[str, ...] = ()


class RunTime(NamedTuple):
    """One timed run of trtexec: with its copies to and from the device, and without."""

    latency_ms: float
    compute_ms: float


def _layers(
    runs: Sequence[Mapping[str, float]],
    kernels: Mapping[str, Kernel],
    source: str,
    busy: bool = False,
) -> list[LayerTime]:
    """Medians over runs of {name: ms}; StateError where there are none."""
    names = dict.fromkeys(name for run in runs for name in run)
    if not names:
        raise StateError(f"{source} holds no layers; was it written while profiling?")
    samples = {name: np.array([run.get(name, 0.0) for run in runs]) for name in names}
    times = {n: float(np.median(undisturbed(x) if busy else x)) for n, x in samples.items()}
    total = sum(times.values()) or 1.0
    return [
        LayerTime(name=name, **kernels.get(name, Kernel())._asdict(), p50_ms=ms, share=ms / total)
        for name, ms in times.items()
    ]


def undisturbed(ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those of a layer's times that are at most INTERRUPTED times their lowest decile."""
    return ms[ms <= INTERRUPTED * np.quantile(ms, 0.1) + RESOLUTION_MS]


class _Run(dict[str, float]):
    """One run's {name: ms}; a name that comes again is another layer: "name #2"."""

    def add(self, name: str, ms: float) -> str:
        unique, count = name, 1
        while unique in self:
            count += 1
            unique = f"{name} #{count}"
        self[unique] = ms
        return unique


def _json(text: str, source: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except ValueError as error:
        raise StateError(f"{source} is not whole, or of another format: {error}") from None


# ---- TensorRT ------------------------------------------------------------------------------------

PROFILED = re.compile(r'"name"\s*:\s*"(.*?)"\s*,\s*("timeMs"\s*:[^{}]*)}', re.DOTALL)
# a string that trtexec wrote as it was: it ends where JSON goes on
STRING = re.compile(r'"(.*?)"(?=\s*(?:[:}\]]|,\s*["{\[\d]|,\s*-\d))', re.DOTALL)


def trtexec_profile(text: str, layer_info: str | None = None) -> list[LayerTime]:
    """Of `trtexec --exportProfile`, TensorRT 8.2 to 11.

    Names in it are not escaped, so it is read by its keys. 8.2 has means only.

    Args:
        layer_info: what `--exportLayerInfo` wrote, for operators and types.
    """
    run, kernels = _Run(), {}
    known = {} if layer_info is None else trtexec_layers(layer_info)
    for name, rest in PROFILED.findall(text):
        figures = dict(re.findall(r'"(\w+)"\s*:\s*([-+.\deE]+)', rest))
        unique = run.add(name, float(figures.get("medianMs") or figures["averageMs"]))
        kernels[unique] = known.get(name, Kernel())
    return _layers([run], kernels, "trtexec's profile")


def trtexec_times(text: str) -> list[RunTime]:
    """Of `trtexec --exportTimes`: every timed run."""
    runs = _json(text, "trtexec's times")
    try:
        return [RunTime(float(run["latencyMs"]), float(run["computeMs"])) for run in runs]
    except (KeyError, TypeError) as error:
        raise StateError(f"trtexec's times have no {error}; they are of another version") from None


def trtexec_layers(text: str) -> dict[str, Kernel]:
    """Of `trtexec --exportLayerInfo`: each layer's kind, and its inputs' types.

    Without `--profilingVerbosity=detailed` it holds names alone.
    """
    try:
        found = json.loads(text, strict=False)
    except ValueError:
        found = _json(STRING.sub(lambda s: json.dumps(s[1]), text), "trtexec's layers")
    layers = found.get("Layers", []) if isinstance(found, dict) else []
    kernels = {}
    for layer in layers:
        if isinstance(layer, str):
            kernels[layer] = Kernel()
            continue
        types = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", ())]
        kernels[layer["Name"]] = Kernel(str(layer.get("LayerType", "")), tuple(filter(None, types)))
    return kernels


# ---- ONNX Runtime --------------------------------------------------------------------------------


def onnxruntime_profile(text: str, *, busy: bool = False) -> list[LayerTime]:
    """Of a session with `enable_profiling`: the kernels' times in each `model_run`."""
    runs: list[_Run] = []
    kernels: dict[str, Kernel] = {}
    run = _Run()
    for event in _json(text, "ONNX Runtime's profile"):
        name = str(event.get("name", ""))
        if name == "model_run":
            runs.append(run)
            run = _Run()
        elif event.get("cat") == "Node" and name.endswith("_kernel_time"):
            given = event.get("args", {})
            unique = run.add(name.removesuffix("_kernel_time"), event["dur"] / 1e3)
            shapes = given.get("input_type_shape", ())
            types = tuple(kind for shape in shapes for kind in shape)
            kernels[unique] = Kernel(str(given.get("op_name", "")), types)
    return _layers(runs, kernels, "ONNX Runtime's profile", busy)


def onnxruntime_times(result: str) -> list[float]:
    """ms of each run in the result file of `onnxruntime_perf_test`, which has seconds.

    >>> onnxruntime_times("model,0.0021,1048576,\\nmodel,0.0019,1048576,\\n")
    [2.1, 1.9]
    """
    rows = [row for row in csv.reader(io.StringIO(result)) if len(row) > 1]
    try:
        return [round(float(row[1]) * 1e3, 6) for row in rows]
    except ValueError as error:
        raise StateError(f"onnxruntime_perf_test's result is of another format: {error}") from None


PERF_TEST = {
    "load_ms": (r"Session creation time cost:\s*([\d.eE+-]+)", 1e3),
    "average_ms": (r"Average (?:inference )?time cost(?: per run)?:\s*([\d.eE+-]+)", 1.0),
    "p50_ms": (r"P50 Latency(?: is)?:?\s*([\d.eE+-]+)", 1e3),
    "p90_ms": (r"P90 Latency(?: is)?:?\s*([\d.eE+-]+)", 1e3),
    "p99_ms": (r"P99 Latency(?: is)?:?\s*([\d.eE+-]+)", 1e3),
}


def onnxruntime_perf_test(output: str) -> dict[str, float]:
    """What `onnxruntime_perf_test` prints, in ms: load, average and percentiles it has."""
    found = {key: (re.search(said, output), unit) for key, (said, unit) in PERF_TEST.items()}
    figures = {key: float(m[1]) * unit for key, (m, unit) in found.items() if m is not None}
    if "average_ms" not in figures:
        raise StateError("onnxruntime_perf_test printed no average; its output is of another form")
    return figures


# ---- OpenVINO ------------------------------------------------------------------------------------


def openvino_counters(text: str, *, busy: bool = False) -> list[LayerTime]:
    """Of `benchmark_app`'s detailed or average counters, CSV or JSON; one run a request.

    What the Python API's `get_profiling_info` gives is written in the same JSON by measure.py.
    """
    source = "OpenVINO's counters"
    if text.lstrip().startswith("{"):
        report = _json(text, source)
        requests = report.get("detailed_performance") or [report.get("avg_performance", {})]
        rows = [
            [
                (n["name"], n["node_type"], n["exec_type"], n["status"], n["real_time"])
                for n in nodes
            ]
            for nodes in (request.get("nodes", ()) for request in requests)
        ]
    else:
        rows = list(_openvino_csv(text))
    runs, kernels = [], {}
    for request in rows:
        run = _Run()
        for name, operator, kernel, status, ms in request:
            if status.rpartition(".")[2] == "EXECUTED":
                # the kernel's name ends in the type it computes in: brgconv_avx512_i8
                types = re.findall(r"_([a-z]+\d+)$", kernel)
                kernels[run.add(name, float(ms))] = Kernel(operator, tuple(types))
        runs.append(run)
    return _layers(runs, kernels, source, busy)


def _openvino_csv(text: str) -> Iterable[list[tuple[str, str, str, str, str]]]:
    """The requests, each below a heading and above its total."""
    heading: list[str] = []
    request: list[tuple[str, str, str, str, str]] = []
    for row in csv.reader(io.StringIO(text), delimiter=";", quoting=csv.QUOTE_NONE):
        if row[:1] == ["layerName"]:
            heading = row
        elif row[:1] == ["Total"] or not heading:
            if request:
                yield request
            heading, request = [], []
        elif len(row) >= len(heading):
            cells = dict(zip(heading, row, strict=False))
            request.append((
                row[0], cells["layerType"], cells["execType"], cells["execStatus"],
                cells["realTime (ms)"],
            ))  # fmt: skip


def benchmark_app_median(output: str) -> float:
    """ms, of the run that `benchmark_app` printed.

    >>> benchmark_app_median("[ INFO ] Latency:\\n[ INFO ]    Median:        1.52 ms")
    1.52
    """
    found = re.search(r"Median:\s*([\d.]+) (ms|us)", output)  # us where it is short
    if found is None:
        raise StateError("benchmark_app printed no median; its output is of another form")
    return float(found[1]) / (1 if found[2] == "ms" else 1e3)


# ---- LiteRT --------------------------------------------------------------------------------------


class LiteRtTimings(NamedTuple):
    """The line that ends a run of `benchmark_model`; newer ones have a median."""

    runs: int
    avg_ms: float
    min_ms: float
    max_ms: float
    median_ms: float | None


def litert_ops(output: str) -> list[LayerTime]:
    """The table of operators of `benchmark_model --enable_op_profiling=true`, means over runs.

    Of its tables (preparing, warm-up, runs; each again by time) it is the last in running order.
    """
    run, kernels = _Run(), dict[str, Kernel]()
    title, places = "", dict[str, int]()
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip().split("\t")]
        if line.startswith("====="):
            title = line.strip("= ")
        elif cells[0] == "[node type]" and title != "Top by Computation Time":
            run, kernels = _Run(), {}
            places = {heading: i for i, heading in enumerate(cells)}
        elif places and len(cells) == len(places):
            name = re.sub(r":\d+$", "", cells[places["[Name]"]]).strip("[]")
            kernels[run.add(name, float(cells[places["[avg ms]"]]))] = Kernel(cells[0])
        else:
            places = {}
    return _layers([run], kernels, "benchmark_model's output")


def litert_timings(output: str) -> LiteRtTimings:
    """The last line of timings, microseconds there.

    >>> litert_timings("Timings (microseconds): count=50 first=9 curr=8 min=7 max=9 avg=8 std=1")
    LiteRtTimings(runs=50, avg_ms=0.008, min_ms=0.007, max_ms=0.009, median_ms=None)
    """
    lines = [line for line in output.splitlines() if re.search(r"\bcount=\d+ .*\bavg=", line)]
    if not lines:
        raise StateError("benchmark_model printed no timings; its output is of another form")
    found = {key: float(value) for key, value in re.findall(r"(\w+)=([\d.eE+]+)", lines[-1])}
    middle = found.get("median")
    return LiteRtTimings(
        int(found["count"]), found["avg"] / 1e3, found["min"] / 1e3, found["max"] / 1e3,
        None if middle is None else middle / 1e3,
    )  # fmt: skip
