"""Layer times: fixtures in the shapes that the tools write, and real profiles of two runtimes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgekd.errors import StateError
from edgekd.latency import layers
from edgekd.runtimes.base import Artifact

# names as TensorRT makes them, and as trtexec writes them: quotes and backslashes as they are
NAMES = ["Conv_0 + Relu_1", 'say "hi", \\n', "PWN(PWN(Sigmoid_2), Mul_3)"]


def trtexec(figures: list[dict[str, float]], names: list[str] = NAMES) -> str:
    """A profile, written as trtexec writes it: one layer a line, the comma first."""
    lines = ['  { "count" : 100 }']
    for name, figure in zip(names, figures, strict=True):
        rest = ", ".join(f'"{key}" : {value:g}' for key, value in figure.items())
        lines.append(f', {{ "name" : "{name}", {rest} }}')
    return "[\n" + "\n".join(lines) + "\n]\n"


def of_version(version: str) -> list[dict[str, float]]:
    rows = []
    for mean, middle in ((0.3, 0.25), (0.1, 0.05), (0.2, 0.2)):
        row = {"timeMs": 100 * mean, "averageMs": mean, "medianMs": middle, "percentage": 33.3}
        if version == "8.2":
            del row["medianMs"]
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("version", "times"),
    [
        ("8.2", [0.3, 0.1, 0.2]),  # means only
        ("8.5", [0.25, 0.05, 0.2]),
        ("10.3", [0.25, 0.05, 0.2]),
        ("11.4", [0.25, 0.05, 0.2]),
    ],
)
def test_trtexecs_profile(version: str, times: list[float]):
    found = layers.trtexec_profile(trtexec(of_version(version)))
    assert [layer.name for layer in found] == NAMES
    assert [layer.p50_ms for layer in found] == pytest.approx(times)
    assert [layer.share for layer in found] == pytest.approx([t / sum(times) for t in times])


@pytest.mark.parametrize("ends", ["Bindings", "I/O Tensors"])
def test_trtexecs_layers_give_operators_and_types(ends: str):
    kinds = ["CaskConvolution", "Reformat", "PointWiseV2"]
    info = {
        "Layers": [
            {"Name": name, "LayerType": kind, "Inputs": [
                {"Name": "x", "Location": "Device", "Dimensions": [1, 8, 4, 4],
                 "Format/Datatype": "Int8 NC/32HW32 format"}], "Outputs": [],
             "Weights": {"Type": "Int8", "Count": 8}, "TacticName": "sm80"}
            for name, kind in zip(NAMES, kinds, strict=True)
        ],
        ends: ["x"] if ends == "Bindings" else [{"Name": "x"}],
    }  # fmt: skip
    raw = json.dumps(info, indent=1)
    for name in NAMES:
        raw = raw.replace(json.dumps(name), f'"{name}"')
    for text in (raw, json.dumps(info)):  # a version that escapes, and one that does not
        found = layers.trtexec_profile(trtexec(of_version("8.5")), text)
        assert [layer.operator for layer in found] == kinds
        assert {layer.types for layer in found} == {("Int8 NC/32HW32 format",)}


def test_trtexecs_layers_without_detail_are_names():
    info = json.dumps({"Layers": NAMES, "Bindings": ["x"]})
    found = layers.trtexec_profile(trtexec(of_version("8.2")), info)
    assert [layer.operator for layer in found] == ["", "", ""]


def test_a_name_that_comes_twice_is_two_layers():
    found = layers.trtexec_profile(trtexec(of_version("8.5"), ["a", "a", "b"]))
    assert [layer.name for layer in found] == ["a", "a #2", "b"]


@pytest.mark.parametrize("extra", [{}, {"endToEndMs": 4.0}], ids=["10.3", "8.2"])
def test_trtexecs_times(extra: dict[str, float]):
    runs = [
        {"startEnqMs": i, "endEnqMs": i + 0.1, "startH2dMs": i, "endH2dMs": i + 0.2,
         "startComputeMs": i + 0.2, "endComputeMs": i + 1.2, "startD2hMs": i + 1.2,
         "endD2hMs": i + 1.3, "h2dMs": 0.2, "computeMs": 1.0 + i, "d2hMs": 0.1,
         "latencyMs": 1.3 + i} | extra
        for i in range(3)
    ]  # fmt: skip
    found = layers.trtexec_times(json.dumps(runs))
    assert [run.latency_ms for run in found] == pytest.approx([1.3, 2.3, 3.3])
    assert [run.compute_ms for run in found] == pytest.approx([1.0, 2.0, 3.0])


def test_onnxruntimes_profile_of_several_runs():
    events: list[dict[str, Any]] = [
        {"cat": "Session", "ph": "X", "dur": 9, "name": "session_initialization", "args": {}}
    ]
    for run in ([30, 5, 7], [10, 5, 8], [20, 5, 9]):
        for name, dur in zip(("conv", "add", "add"), run, strict=True):  # a loop runs it twice
            kind = [{"uint8": [1, 8]}, {"float": [8]}]
            args = {"op_name": name.title(), "node_index": "3", "output_size": "64",
                    "input_type_shape": kind}  # fmt: skip
            event = {"cat": "Node", "ph": "X", "dur": dur, "name": f"{name}_kernel_time"}
            events += [event | {"args": args}, event | {"name": f"{name}_fence_after"}]
        events.append({"cat": "Session", "ph": "X", "dur": 50, "name": "model_run", "args": {}})
    found = layers.onnxruntime_profile(json.dumps(events))
    assert [(x.name, x.operator) for x in found] == [
        ("conv", "Conv"), ("add", "Add"), ("add #2", "Add")
    ]  # fmt: skip
    assert [x.p50_ms for x in found] == pytest.approx([0.02, 0.005, 0.008])
    assert found[0].types == ("uint8", "float")
    with pytest.raises(StateError, match="not whole"):
        layers.onnxruntime_profile(json.dumps(events)[:-9])
    with pytest.raises(StateError, match="no layers"):
        layers.onnxruntime_profile("[]")


def test_on_a_busy_host_interrupted_runs_do_not_count():
    noise = np.random.default_rng(0).uniform(2.0, 2.2, 30)
    noise[:18] += 4.0  # most runs of a long layer are interrupted by others' time slices
    events: list[dict[str, Any]] = []
    for ms in noise:
        conv = {"cat": "Node", "name": "conv_kernel_time", "dur": round(ms * 1e3), "args": {}}
        events += [conv, {"cat": "Session", "name": "model_run", "dur": 1, "args": {}}]
    text = json.dumps(events)
    assert layers.onnxruntime_profile(text)[0].p50_ms > 6
    busy = layers.onnxruntime_profile(text, busy=True)[0].p50_ms
    assert busy == pytest.approx(np.median(noise[18:]), abs=1e-3)


def test_a_real_profile_of_onnxruntime(int8_artifact: Artifact, tmp_path: Path):
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.intra_op_num_threads = 1
    options.profile_file_prefix = str(tmp_path / "p")
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(int8_artifact.path, options)
    x = np.zeros((1, 3, 16, 16), np.float32)
    for _ in range(5):
        session.run(None, {"input": x})
    found = layers.onnxruntime_profile(Path(session.end_profiling()).read_text())
    import onnx

    kinds = sorted(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert sorted(layer.operator for layer in found) == kinds
    assert sum(layer.share for layer in found) == pytest.approx(1)
    assert any("uint8" in layer.types for layer in found)


def test_a_real_profile_of_openvino(fp32_artifact: Artifact):
    openvino = pytest.importorskip("openvino")
    settings = {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(fp32_artifact.path, "CPU", settings)
    request = compiled.create_infer_request()
    requests, times, executed = [], [], Counter[str]()
    for _ in range(3):
        request.infer([np.zeros((1, 3, 16, 16), np.float32)])
        infos = request.get_profiling_info()
        requests.append({"nodes": [
            {"name": i.node_name, "node_type": i.node_type, "exec_type": i.exec_type,
             "status": str(i.status), "real_time": f"{i.real_time.total_seconds() * 1e3:.3f}"}
            for i in infos
        ]})  # fmt: skip
        times.append({i.node_name: i.real_time.total_seconds() * 1e3 for i in infos})
        done = openvino.ProfilingInfo.Status.EXECUTED  # below a microsecond, not in every run
        executed.update(i.node_name for i in infos if i.status == done)
    found = layers.openvino_counters(json.dumps({"detailed_performance": requests}))
    assert {layer.name for layer in found} == executed.keys()
    always = [layer for layer in found if executed[layer.name] == len(times)]
    assert len(always) > len(found) / 2
    for layer in always:
        assert layer.p50_ms == pytest.approx(median(run[layer.name] for run in times))
    assert {"Convolution"} <= {layer.operator for layer in found}


COUNTERS = """layerName;execStatus;layerType;execType;realTime (ms);cpuTime (ms)
input;{s}NOT_RUN;Parameter;unknown_f32;0.000;0.000
conv;{s}EXECUTED;Convolution;brgconv_avx512_i8;{conv};0.050
fc;{s}EXECUTED;FullyConnected;gemm_f32;0.010;0.010
Total;;;;0.060;0.060

"""


@pytest.mark.parametrize("status", ["Status.", ""], ids=["Python's", "C++'s"])
def test_benchmark_apps_counters_as_csv(status: str):
    times = (0.02, 0.09, 0.05)
    text = "".join(COUNTERS.format(s=status, conv=ms) for ms in times)
    conv, fc = layers.openvino_counters(text)
    assert (conv.name, conv.operator, conv.types) == ("conv", "Convolution", ("i8",))
    assert (conv.p50_ms, fc.p50_ms) == (0.05, 0.01)
    nodes = [{"name": "conv", "node_type": "Convolution", "status": "Status.EXECUTED",
              "real_time": "0.070", "cpu_time": "0.070", "exec_type": "ref_any"}]  # fmt: skip
    average = {"report_type": "average", "avg_performance": {"nodes": nodes}}
    assert layers.openvino_counters(json.dumps(average))[0].p50_ms == 0.07


OPS = """\
STARTING!
Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
{heading}
\t                 CONV_2D\t{start}    0.030\t    0.016\t 80.000%\t 80.000%\t     0.000\t        1\t[a/conv, b]:0
\t                 SOFTMAX\t{start}    0.007\t    0.004\t 20.000%\t100.000%\t     0.000\t        1\t[out]:1

============================== Top by Computation Time ==============================
{heading}
\t                 SOFTMAX\t{start}    9.000\t    9.000\t 90.000%\t 90.000%\t     0.000\t        1\t[out]:1

Number of nodes executed: 2
============================== Summary by node type ==============================
\t             [Node type]\t  [count]\t  [avg ms]\t    [avg %]\t    [cdf %]\t  [mem KB]\t[times called]
\t                 CONV_2D\t        1\t     0.016\t    80.000%\t    80.000%\t     0.000\t        1

Timings (microseconds): count=50 first=31 curr=22 min=20 max=40 avg=21.5 std=2{median}
Memory (bytes): count=0
2 nodes observed
"""  # noqa: E501


@pytest.mark.parametrize("old", [True, False])
def test_litert(old: bool):
    headings = ["[node type]", "[start]", "[first]", "[avg ms]", "[%]", "[cdf%]", "[mem KB]",
                "[times called]", "[Name]"]  # fmt: skip
    heading = "\t" + "\t".join(h for h in headings if old or h != "[start]")
    start = "            0.000\t" if old else ""
    prepared = OPS.format(heading=heading, start=start, median="").replace("SOFTMAX", "PREPARED")
    text = prepared + OPS.format(
        heading=heading, start=start, median="" if old else " p5=20 median=21 p95=30"
    )
    found = layers.litert_ops(text)
    assert [(x.name, x.operator, x.p50_ms) for x in found] == [
        ("a/conv, b", "CONV_2D", 0.016), ("out", "SOFTMAX", 0.004)
    ]  # fmt: skip
    timings = layers.litert_timings(text)
    assert (timings.runs, timings.avg_ms, timings.min_ms) == (50, 0.0215, 0.02)
    assert timings.median_ms == (None if old else 0.021)


@pytest.mark.parametrize(
    "text",
    [
        "Session creation time cost:0.0125 s\nAverage inference time cost:2.5 ms\n",
        "Session creation time cost: 0.0125 s\nAverage time cost: 2.5 ms\n"
        "P50 Latency is 0.002 sec\nP90 Latency is 0.003 sec\nP99 Latency is 0.004 sec\n",
    ],
)
def test_onnxruntime_perf_test(text: str):
    found = layers.onnxruntime_perf_test(text)
    assert (found["load_ms"], found["average_ms"]) == pytest.approx((12.5, 2.5))
    if "P50" in text:
        assert found["p50_ms"] == pytest.approx(2)
        assert found["p99_ms"] == pytest.approx(4)


@pytest.mark.parametrize(
    "read",
    [layers.trtexec_profile, layers.litert_ops, layers.litert_timings, layers.openvino_counters,
     layers.onnxruntime_profile, layers.onnxruntime_perf_test, layers.benchmark_app_median,
     layers.trtexec_times, layers.trtexec_layers, layers.onnxruntime_times],
)  # fmt: skip
def test_what_is_of_another_form_is_refused(read: Any):
    with pytest.raises(StateError):
        read("Killed, after 3 attempts\n")
