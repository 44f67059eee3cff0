"""measure.py: the protocol, and what it reads of a device."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.latency.measuring import RawMeasurement
from edgekd.network import Network
from edgekd.runtimes import on_device
from edgekd.runtimes.base import Artifact
from edgekd.runtimes.on_device import measure
from edgekd.stages.export import export

SCRIPTS = Path(on_device.__path__[0])


def test_the_scripts_run_on_python_3_6():
    scripts = [str(SCRIPTS / name) for name in ("infer.py", "measure.py")]
    command = [sys.executable, "-c", "import vermin; vermin.main()", "-t=3.6-", "--violations"]
    ran = subprocess.run([*command, *scripts], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout  # one for each thing of a later version
    assert re.search(r"Minimum required versions: +3\.6$", ran.stdout, re.MULTILINE)


# ---- the protocol --------------------------------------------------------------------------------


class Clocks:
    """Stands in for `time`: a call takes as much wall and CPU time as it is told, in ms."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def spend(self, wall_ms: float, cpu_ms: float) -> None:
        self.wall += wall_ms / 1e3
        self.cpu += cpu_ms / 1e3

    def perf_counter(self) -> float:
        return self.wall

    monotonic = time = perf_counter

    def process_time(self) -> float:
        return self.cpu


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    assert measure.has_cpu_clock()  # looked at once, by the real clocks
    monkeypatch.setattr(measure, "time", made)
    return made


class NoWatch:
    current: int | None = None

    def look(self) -> None:
        pass


def timed(calls: list[Callable[[], object]], runs: int, threads: int = 1) -> list[dict[str, Any]]:
    return measure.time_in_turns([[call] for call in calls], runs, 20.0, threads, NoWatch())


def test_candidates_run_in_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.0)
    calls: list[str] = []
    timed([lambda n=n: calls.append(n) for n in "ab"], runs=30)  # type: ignore[misc]
    each = 1 + measure.TURN_RUNS  # the first of a turn is not timed
    turns = 30 // measure.TURN_RUNS
    ran = "".join(calls[-2 * each * turns :])
    found = Counter(ran[at : at + 2 * each] for at in range(0, len(ran), 2 * each))
    # neither always comes after the same one
    assert found.keys() == {"a" * each + "b" * each, "b" * each + "a" * each}
    assert found.total() == turns
    assert {"a", "b"} == set(calls[: -2 * each * turns])  # both were warmed up before


def test_every_timed_run_is_kept(clocks: Clocks):
    costs = [float(c) for c in np.random.default_rng(0).permutation(90) + 100]
    turns = np.reshape(costs, (-1, measure.TURN_RUNS))
    untimed = np.full((len(turns), 1), 900.0)  # the first of each turn
    warm = 2 * measure.WINDOW_RUNS
    queue = iter([20.0] * warm + list(np.hstack([untimed, turns]).flat))

    def call() -> None:
        cost = next(queue)
        clocks.spend(cost, cost / 2)

    (found,) = measure.time_in_turns([[call]], 90, 1e9, 1, NoWatch())
    assert found["wall_ms"] == pytest.approx(costs)
    assert found["cpu_ms"] == pytest.approx([c / 2 for c in costs])
    assert (found["warm_up_runs"], found["warm_up_steady"]) == (warm, True)


def test_the_warm_up_ends_when_two_windows_agree(clocks: Clocks):
    costs = [40.0] * 10 + [30.0] * 10 + [25.0] * 10 + [24.9] * 10 + [9.0]
    queue = iter(costs)
    runs, steady = measure.warm_up(lambda: clocks.spend(c := next(queue), c), 1)
    assert (runs, steady) == (40, True)


def test_a_warm_up_that_never_settles_is_ended(clocks: Clocks):
    cost = 100.0

    def call() -> None:
        nonlocal cost
        cost *= 1.02
        clocks.spend(cost, cost)

    _, steady = measure.warm_up(call, 1)
    assert not steady
    assert clocks.wall == pytest.approx(measure.LONGEST_WARM_UP, rel=0.5)


@pytest.mark.parametrize(
    ("threads", "wall_ms", "clock"),
    [
        (1, 2.0, "wall"),  # an idle host: wall and CPU time are the same
        (1, 2.05, "wall"),
        (1, 7.0, "cpu"),  # a busy one: the wall clock counts others' work too
        (4, 7.0, "wall"),  # CPU time of several threads is no latency
    ],
)
def test_cpu_time_stands_in_for_the_wall_clock_of_one_thread_on_a_busy_host(
    threads: int, wall_ms: float, clock: str
):
    both = [([wall_ms] * 9, [2.0] * 9), ([1.0] * 9, [1.0] * 9)]
    assert measure.clock_of(both, threads) == clock  # one clock for all of a comparison


def test_where_cpu_time_moves_in_ticks_the_wall_clock_is_used(tmp_path: Path):
    """Linux accounts for CPU time once in a tick where it is limited."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (300, resource.RLIM_INFINITY))

    model, reference = product(tmp_path / "a.onnx", 1), product(tmp_path / "b.onnx", 1)
    job = job_of(tmp_path, [model], reference=str(reference))
    ran = measured(tmp_path, "--job", str(job), preexec_fn=limit)
    assert ran.returncode == 0, ran.stderr
    raw = RawMeasurement.read(tmp_path / "measurement.json")
    program = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import measure; "
    command = [sys.executable, "-c", program + "print(measure.has_cpu_clock())"]
    said = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit).stdout
    if said == "True\n":
        pytest.skip("this system's CPU time does not move in ticks")
    assert raw.clock == "wall" and raw.conditions.reference_ms is None
    assert raw.measurements(device="local")[0].p50_ms > 0


def test_runs_end_with_the_time_but_not_before_twenty(clocks: Clocks):
    def runs_of(cost: Callable[[], float], most: int = 300) -> int:
        def call() -> None:
            ms = cost()
            clocks.spend(ms, ms)

        return len(timed([call], most)[0]["wall_ms"])

    assert runs_of(lambda: 3000.0) == 20
    # 3 s a turn: the first turn that begins more than 20 s after the start is not run
    assert runs_of(lambda: 500.0) == 35
    assert runs_of(lambda: 1.0, most=60) == 60
    # a median that is known well enough ends them early; one that is not does not
    assert runs_of(lambda: 20.0) == measure.RUNS_TO_SETTLE
    # nor do runs that are over in a second: others disturb a host for longer
    assert runs_of(lambda: 10.5) == 250
    random = np.random.default_rng(0)
    assert runs_of(lambda: float(random.uniform(1, 3))) == 300


def test_a_median_is_not_known_while_others_disturb_the_host(clocks: Clocks):
    """A settled one may be of a slow minute: so the reference has to be as fast as it ever was."""

    def runs_of(slow_until: float, quietest_ms: float | None) -> int:
        began = clocks.wall

        def call() -> None:
            ms = 11.5 if clocks.wall - began < slow_until else 10.5
            clocks.spend(ms, ms)

        def restless(timed: Any) -> bool:
            return measure.disturbed(timed[-1][1], quietest_ms, 1)

        found = measure.time_in_turns([[call]], 5000, 20.0, 1, NoWatch(), restless)
        return len(found[0]["wall_ms"])

    assert runs_of(0.0, 10.5) == 250
    assert 450 <= runs_of(6.0, 10.5) <= 700  # once a tenth of the runs were quick
    assert runs_of(99.0, 10.5) > 1400  # until the time is over
    assert runs_of(0.0, None) > 1500  # nothing is known of this host


def test_candidates_come_out_in_the_order_of_their_cost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.01)

    def work(steps: int) -> object:
        return sum(i * i for i in range(steps))

    slow, fast = timed([lambda: work(30_000), lambda: work(3_000)], runs=25)
    # ten times the work; the machine may be busy, so a third of that is enough
    assert np.median(slow["cpu_ms"]) > 3 * np.median(fast["cpu_ms"])
    (asleep,) = timed([lambda: time.sleep(0.005)], runs=10)
    assert np.median(asleep["cpu_ms"]) < 5 <= np.median(asleep["wall_ms"])


# ---- memory --------------------------------------------------------------------------------------


def product(path: Path, mib: int) -> Path:
    """A product by a matrix of `mib` MiB."""
    rows = mib * 2**20 // 4 // 1024
    weight = numpy_helper.from_array(np.ones((rows, 1024), np.float32), "w")
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1024]),
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight]
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def job_of(folder: Path, files: list[Path], **changes: Any) -> Path:
    job = {
        "target": "host-onnxruntime", "runtime": "onnxruntime", "device": "CPU", "providers": [],
        "files": [str(path) for path in files], "runs": 20, "seconds": 5, "threads": 1,
        "layers": False, "lock_clocks": False,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job | changes))
    return folder / "job.json"


def measured(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(SCRIPTS / "measure.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, **options
    )


def test_memory_is_each_ones_own(tmp_path: Path):
    small, large = product(tmp_path / "small.onnx", 1), product(tmp_path / "large.onnx", 64)
    ran = measured(tmp_path, "--job", str(job_of(tmp_path, [large, small, large])))
    assert ran.returncode == 0, ran.stderr
    files = RawMeasurement.read(tmp_path / "measurement.json").files
    if files[0].load_memory_mib is None:
        pytest.skip("this system does not tell memory")
    held = [file.load_memory_mib or 0.0 for file in files]
    assert held[0] >= 60  # the weights at least
    assert held[1] < held[0] / 2  # though what the large one had is free
    assert held[2] == pytest.approx(held[0], rel=0.1)
    assert all((f.peak_memory_mib or 0) >= h for h, f in zip(held, files, strict=True))


def test_what_cannot_be_loaded_is_named(tmp_path: Path):
    (tmp_path / "broken.onnx").write_text("no model")
    ran = measured(tmp_path, "--job", str(job_of(tmp_path, [tmp_path / "broken.onnx"])))
    assert ran.returncode == 1
    assert ran.stderr.startswith("onnxruntime refuses broken.onnx: ")
    assert not (tmp_path / "measurement.json").exists()


def test_a_runtime_that_is_not_there_is_named(tmp_path: Path):
    job = job_of(tmp_path, [product(tmp_path / "a.onnx", 1)], runtime="litert")
    hidden = tmp_path / "hidden"
    for name in ("ai_edge_litert", "tflite_runtime"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text("raise ImportError('hidden')")
    ran = measured(tmp_path, "--job", str(job), env=os.environ | {"PYTHONPATH": str(hidden)})
    assert ran.returncode == 1
    assert "run: pip3 install ai-edge-litert" in ran.stderr


# ---- by hand, in a bundle ------------------------------------------------------------------------


def test_a_bundle_measures_itself(int8_artifact: Artifact, tmp_path: Path):
    folder = shutil.copytree(int8_artifact.path.parent, tmp_path / "bundle")
    command = [sys.executable, "-W", "error", "measure.py", "--runs", "30", "--layers"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("model.onnx: p50 ")
    raw = RawMeasurement.read(folder / "measurement.json")
    assert (raw.target, raw.runtime_version) == ("host-onnxruntime", onnxruntime.__version__)
    assert raw.files[0].sha256 == int8_artifact.sha256
    (m,) = raw.measurements(device="by hand")
    assert (m.runs, m.threads, m.origin) == (30, 1, "device")
    assert "QLinearConv" in {layer.operator for layer in m.layers}
    assert m.rest_ms == pytest.approx(m.p50_ms - sum(layer.p50_ms for layer in m.layers))


def test_one_that_is_killed_leaves_no_half_a_file(fp32_artifact: Artifact, tmp_path: Path):
    folder = shutil.copytree(fp32_artifact.path.parent, tmp_path / "bundle")
    (folder / "measurement.json").write_text("of another run")
    loading = tmp_path / "loading"
    (tmp_path / "onnxruntime.py").write_text(  # one that never ends, however fast the machine is
        f"import time\nopen({str(loading)!r}, 'w').close()\ntime.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "measure.py"], cwd=folder, env=environment) as running:
        while not loading.exists():
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGKILL)
    assert "measurement.json" not in {path.name for path in folder.iterdir()}


def test_two_at_once_wait_for_each_other(tmp_path: Path):
    held, got = measure.only_one(str(tmp_path)), threading.Event()

    def wait() -> None:
        measure.only_one(str(tmp_path)).close()
        got.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not got.wait(0.3)
    held.close()
    assert got.wait(10)
    waiting.join()


def test_a_full_disk_is_named(tmp_path: Path):
    with pytest.raises(SystemExit, match="make room there"):
        measure.write_whole(str(tmp_path / "absent" / "a.json"), "{}")


# ---- what it reads of a device -------------------------------------------------------------------


def sysfs(root: Path, files: dict[str, Any]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


NANO = {  # JetPack 4: the driver gives mW
    f"bus/i2c/drivers/ina3221x/6-0040/iio:device0/{name}": text
    for name, text in {
        "rail_name_0": "POM_5V_IN", "in_power0_input": 4000, "rail_name_1": "POM_5V_GPU",
        "in_power1_input": 900, "rail_name_2": "POM_5V_CPU", "in_power2_input": 700,
    }.items()
}  # fmt: skip
ORIN = {  # JetPack 5 and 6: hwmon, mV and mA
    f"class/hwmon/hwmon3/{name}": text
    for name, text in {
        "name": "ina3221", "in1_label": "VDD_GPU_SOC", "in1_input": 5000, "curr1_input": 600,
        "in2_label": "VDD_CPU_CV", "in2_input": 5000, "curr2_input": 200, "in3_label": "",
        "in7_label": "sum of shunt voltages", "in7_input": 1, "curr4_input": 1,
    }.items()
} | {"class/hwmon/hwmon0/name": "thermal", "class/hwmon/hwmon0/in1_label": "no rail"}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "rails", "mw"),
    [
        (NANO, ["POM_5V_IN"], 4000),  # it measures the whole module: the others are part of it
        (ORIN, ["VDD_GPU_SOC", "VDD_CPU_CV"], 4000),
        ({}, [], 0),
    ],
    ids=["Nano", "Orin", "none"],
)
def test_power_rails(
    files: dict[str, Any], rails: list[str], mw: float, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    sysfs(tmp_path, files)
    monkeypatch.setattr(measure, "SYS", str(tmp_path))
    assert list(measure.rails()) == rails
    assert measure.power_mw(measure.rails()) == mw


def test_clocks_and_temperatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "SYS", str(tmp_path))
    monkeypatch.setattr(measure, "PROC", str(tmp_path))
    assert (measure.cpu_mhz(), measure.gpu_mhz(), measure.temperature_c()) == (None, None, None)
    (tmp_path / "cpuinfo").write_text("model name\t: x\ncpu MHz\t\t: 2600.5\ncpu MHz\t\t: 800.0\n")
    assert measure.cpu_mhz() == 2600.5
    zones = [("CPU-therm", 45500), ("PMIC-Die", 100000), ("GPU-therm", 51000)]
    sysfs(tmp_path, {
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 918000,
        "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": 1479000,
        "class/devfreq/57000000.gpu/cur_freq": 921600000,
        "class/devfreq/emc/cur_freq": 1600000000,
        **{f"class/thermal/thermal_zone{i}/type": kind for i, (kind, _) in enumerate(zones)},
        **{f"class/thermal/thermal_zone{i}/temp": t for i, (_, t) in enumerate(zones)},
    })  # fmt: skip
    assert (measure.cpu_mhz(), measure.gpu_mhz()) == (1479.0, pytest.approx(921.6))
    assert measure.temperature_c() == 51.0


def test_energy_is_power_by_time(
    fp32_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sysfs(tmp_path, NANO)
    monkeypatch.setattr(measure, "SYS", str(tmp_path))
    monkeypatch.setattr(measure, "WATCH_SECONDS", 0.005)
    job = json.loads(job_of(tmp_path, [fp32_artifact.path]).read_text())
    result = measure.measure(job, str(tmp_path))
    (file,) = result["files"]
    assert file["energy_mj"] == pytest.approx(4000 * np.mean(file["wall_ms"]) / 1e3)
    assert result["conditions"]["rails"] == ["POM_5V_IN"]


@pytest.mark.parametrize("allowed", [True, False])
def test_clocks_are_locked_and_restored(
    allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    tool = tmp_path / "jetson_clocks"
    tool.write_text(
        f'#!/bin/sh\necho "jetson_clocks $1" >> "{tmp_path}/called"\n'
        f"[ {int(allowed)} = 1 ] || exit 1\n"
        'case $1 in --store) echo kept > "$2";; --restore) grep -q kept "$2";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(KeyError), measure.locked_clocks(True) as locked:
        assert locked is allowed
        raise KeyError
    called = (tmp_path / "called").read_text().split("\n")
    wanted = ["--store", "", "--restore"] if allowed else ["--store"]
    assert called[:-1] == [f"jetson_clocks {word}" for word in wanted]
    if not allowed:
        assert "takes a Jetson and root" in capsys.readouterr().err
    with measure.locked_clocks(False) as locked:
        assert not locked


def test_the_power_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert measure.power_mode() is None
    (tmp_path / "nvpmodel").write_text("#!/bin/sh\nprintf 'NV Power Mode: MAXN\\n0\\n'\n")
    (tmp_path / "nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert measure.power_mode() == "MAXN"


# ---- layers --------------------------------------------------------------------------------------


def test_openvinos_layers_are_of_single_runs(trained: Network, tmp_path: Path):
    pytest.importorskip("openvino")
    artifact = export(trained, target="intel-cpu", out=tmp_path / "bundle")
    job = job_of(tmp_path, [artifact.path], runtime="openvino", target="intel-cpu", layers=True)
    ran = measured(tmp_path, "--job", str(job))
    assert ran.returncode == 0, ran.stderr
    (m,) = RawMeasurement.read(tmp_path / "measurement.json").measurements(device="local")
    assert m.sha256 == artifact.sha256  # of .bin and .xml
    assert "Convolution" in {layer.operator for layer in m.layers}
    # the plugin's own figures hold the first, cold run, which takes many times as long
    total = sum(layer.p50_ms for layer in m.layers)
    assert m.rest_ms == pytest.approx(m.p50_ms - total)
    assert 0 < total < m.p50_ms * 1.5
