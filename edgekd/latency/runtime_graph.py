"""The kernels of an artifact and the time of each, read from the runtime that runs it."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from edgekd.errors import TargetError, nearest

Dims = tuple[int, ...]
RUNS = 150
# runs of a compiled OpenVINO model, and those of them before its caches are warm
EACH, COLD = 25, 5


class RuntimeNode(BaseModel):
    """One node of the graph that a runtime executes, batch 1.

    Attributes:
        operator: the runtime's own name of its kind; ONNX Runtime's with the domain in front.
        inputs, outputs: shapes; of inputs that are constants, too, where the runtime tells.
        types: of the inputs.
        attributes: strides, groups, ...; as far as the runtime tells.
        p50_ms: see `_undisturbed`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    operator: str
    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    types: tuple[str, ...]
    attributes: dict[str, Any]
    p50_ms: float


def onnxruntime_nodes(path: Path, threads: int = 1) -> list[RuntimeNode]:
    """Of an ONNX file, as ONNX Runtime's CPU provider rewrites and runs it."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {
            i.name: np.random.default_rng(0).standard_normal((1, *i.shape[1:]), dtype=np.float32)
            for i in session.get_inputs()
        }
        for _ in _runs():
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(options.optimized_model_filepath).graph
    constants = {t.name: tuple(t.dims) for t in graph.initializer}
    timed: dict[str, list[Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            timed.setdefault(event["args"]["node_index"], []).append(event)
    by_name: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        # the profile calls a node without a name by its kind and its index
        by_name.setdefault(node.name or node.op_type, []).append(node)
    whole = {index: same for index, same in timed.items() if len(same) == RUNS}
    durations = _undisturbed([[e["dur"] for e in same] for same in whole.values()]) / 1e3
    found = []
    for same, p50_ms in zip(whole.values(), durations, strict=True):
        args = same[0]["args"]
        name = same[0]["name"].removesuffix("_kernel_time")
        node = (by_name.get(name) or by_name[args["op_name"]]).pop(0)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        kept = {
            key: value.decode() if isinstance(value, bytes) else
            list(value) if hasattr(value, "extend") else value
            for key, value in attributes.items() if key in KEPT
        }  # fmt: skip
        kept["constants"] = [list(constants[i]) for i in node.input if i in constants]
        kept["slots"] = [bool(i) for i in node.input]
        found.append(
            RuntimeNode(
                name=name,
                operator=f"{node.domain}:{node.op_type}".lstrip(":"),
                inputs=tuple(tuple(s) for d in args["input_type_shape"] for s in d.values()),
                outputs=tuple(tuple(s) for d in args["output_type_shape"] for s in d.values()),
                types=tuple(t for d in args["input_type_shape"] for t in d),
                attributes=kept,
                p50_ms=float(p50_ms),
            )
        )
    return found


KEPT = {
    "activation", "group", "strides", "kernel_shape", "channels_last", "perm",
}  # fmt: skip


def openvino_nodes(path: Path, threads: int = 1) -> list[RuntimeNode]:
    """Of an IR, as OpenVINO's CPU plugin compiles and runs it.

    Its counters are means over all runs since the model was compiled, cut to whole microseconds.
    Of each node: the mean of the runs that are not the first ones, and of the quicker half of
    several compilations.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    each, cold = min(EACH, RUNS), min(COLD, RUNS - 1)
    took: list[list[float]] = []
    for _ in range(-(-RUNS // EACH)):
        compiled = core.compile_model(model, "CPU", {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True,
        })  # fmt: skip
        request = compiled.create_infer_request()
        shape = [1, *(d.get_length() for d in list(compiled.inputs[0].partial_shape)[1:])]
        x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        sums = []
        for before, runs in ((0, cold), (cold, each)):
            for _ in range(before, runs):
                request.infer([x])
            infos = request.get_profiling_info()
            sums.append([runs * (i.real_time.total_seconds() * 1e3 + 0.0005) for i in infos])
        took.append([(b - a) / (each - cold) for a, b in zip(*sums, strict=True)])
    quick = np.sort(took, axis=0)[: -(-len(took) // 2)].mean(axis=0)
    executed = openvino.ProfilingInfo.Status.EXECUTED
    durations = {
        info.node_name: max(ms, 0.0)
        for info, ms in zip(infos, quick, strict=True) if info.status == executed
    }  # fmt: skip
    found = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {k: op.get_rt_info()[k].astype(str) for k in op.get_rt_info()}
        name = op.get_friendly_name()
        ins = [i.get_source_output() for i in op.inputs()]
        found.append(
            RuntimeNode(
                name=name,
                operator=info["layerType"],
                inputs=tuple(_batch_one(o) for o in ins),
                outputs=tuple(_batch_one(o) for o in op.outputs()),
                types=tuple(o.get_element_type().get_type_name() for o in ins),
                attributes={
                    k: info[k] for k in (
                        "primitiveType", "runtimePrecision", "originalLayersNames",
                        "outputLayouts", "outputPrecisions",
                    ) if k in info
                },
                p50_ms=float(durations.get(name, 0.0)),
            )
        )  # fmt: skip
    return found


def _batch_one(port: Any) -> Dims:
    dims = list(port.get_partial_shape())
    return tuple(d.get_length() if d.is_static else 1 for d in dims)


READERS: dict[str, Callable[[Path, int], list[RuntimeNode]]] = {
    "onnxruntime": onnxruntime_nodes,
    "openvino": openvino_nodes,
}


def runtime_nodes(runtime: str, path: Path, threads: int = 1) -> list[RuntimeNode]:
    """Of an artifact.

    Raises:
        TargetError: that runtime's graph cannot be read here.
    """
    if runtime not in READERS:
        raise TargetError(f"no graph of kernels for runtime {runtime!r}{nearest(runtime, READERS)}")
    return READERS[runtime](path, threads)


def _runs() -> Iterator[None]:
    """A pause now and then: without it a busy host interrupts every run at the same layer.

    Behind each pause the caches are cold, and that run is slow.
    """
    draw = random.Random(0)
    for index in range(RUNS):
        if index % 10 == 0:
            time.sleep(draw.uniform(0.001, 0.006))
        yield


def _undisturbed(times: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Of each layer, the mean of its quick runs; `times` has a row for each layer.

    The clock is the wall's: on a busy host, most runs wait for a processor in some layer, but not
    in all. A mean, since ONNX Runtime tells whole microseconds.
    """
    runs = np.sort(np.asarray(times, dtype=np.float64), axis=1)
    count = runs.shape[1]
    quick: NDArray[np.float64] = runs[:, count // 30 : count // 30 + max(1, count // 6)]
    return np.asarray(quick.mean(axis=1))
