#!/usr/bin/env python3
"""Measure the latency of this bundle's model on this device: `measure.py`.

It writes measurement.json, which `edgekd profile --import measurement.json` reads elsewhere.
`measure.py --job FILE` measures the files that a job names, in turns.

It needs Python 3.6 and what runs the model: the runtime that manifest.json names and NumPy, or
trtexec. Files are timed in turns of a few runs each, so that whatever else the device does falls on
all of them alike, and each finds its weights in the caches, as it does in use: the first run of a
turn is not timed. No timed run is thrown away. With one thread on a busy host the process' CPU time
stands in for the wall clock: under load the median of the wall clock repeats within 26 %, that of
CPU time within 2.3 %.
"""

import argparse
import contextlib
import datetime
import functools
import glob
import hashlib
import json
import math
import os
import platform
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SYS, PROC = "/sys", "/proc"

WINDOW_RUNS, WINDOW_SECONDS = 10, 0.5  # of the warm-up, whose medians are compared
WARM_UP_SECONDS, LONGEST_WARM_UP = 0.3, 5.0
STEADY = 0.02  # medians of two windows in a row that agree within this end the warm-up
TURN_RUNS = 5
COPIES = 5  # of a model, each loaded anew: where its memory lies changes what a run takes by 2 %
COLD_RUNS = 3  # of each copy but the first, which warms up
LEAST_RUNS, MOST_RUNS = 20, 5000  # the former before the time may end the runs
RUNS_TO_SETTLE, SECONDS_TO_SETTLE = 200, 3.0  # before the interval may
WANTED = 0.01  # half-width of the median's 95 % interval, as a share of the median
AT_REST = 1.02  # times as long as on the quietest host, the reference may take on a quiet one
BUSY = 1.05  # wall / CPU time above which the host counts as busy
COARSEST_MS = 0.05  # step of CPU time above which it measures no run
WATCH_SECONDS = 0.1
MEMORY_SECONDS = 300
LAYER_RUNS, LAYER_SECONDS = 30, 10.0
TRTEXEC_ROUNDS = 3  # of a comparison: each loads the engines anew
RAILS_OF_ALL = ("VDD_IN", "POM_5V_IN")  # those of a Jetson that measure the whole module
OUT_OF_MEMORY = re.compile(r"\bKilled\b|out of memory|OutOfMemory|bad_alloc", re.IGNORECASE)


# ---- figures -------------------------------------------------------------------------------------


def median(samples):
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def quiet(samples, copies=1):
    """The tenth percentile: what a run takes that others on the machine hardly disturb.

    The mean over the copies that took turns, see `time_in_turns`.
    """
    of = [[] for _ in range(copies)]
    for index, ms in enumerate(samples):
        of[index // TURN_RUNS % copies].append(ms)
    return sum(sorted(each)[len(each) // 10] for each in of if each) / sum(map(bool, of))


def by_turns(samples, reference):
    """The median run of each turn, as a share of the reference network's in the same turn."""
    turns = [
        [median(each[at : at + TURN_RUNS]) for at in range(0, len(each), TURN_RUNS)]
        for each in (samples, reference)
    ]
    return [ours / theirs for ours, theirs in zip(*turns)]


def median_interval(samples):
    """The 95 % interval of the median, by order statistics: no distribution is assumed.

    The ranks are those of the normal approximation to the binomial: Conover, Practical
    Nonparametric Statistics, section 3.2.
    """
    ordered = sorted(samples)
    reach = 1.96 * math.sqrt(len(ordered)) / 2
    middle = (len(ordered) + 1) / 2
    low = max(math.floor(middle - reach), 1)
    high = min(math.ceil(middle + reach), len(ordered))
    return ordered[low - 1], ordered[high - 1]


def settled(samples):
    """Whether the median is known: its interval is narrow, and both halves of the runs agree.

    The interval alone takes the runs for independent, and a busy host has its good seconds.
    """
    wanted, half = WANTED * median(samples), len(samples) // 2
    low, high = median_interval(samples)
    return (
        high - low <= 2 * wanted and abs(median(samples[:half]) - median(samples[half:])) <= wanted
    )


def disturbed(reference_ms, quietest_ms, copies):
    """Whether the reference network takes longer than it does on this host at its quietest.

    None is known of a host that was not measured before: it counts as disturbed.
    """
    return quietest_ms is None or quiet(reference_ms, copies) > AT_REST * quietest_ms


def paced(timed, quietest_ms, copies):
    """Whether CPU times are known beside the reference network's, the last of those timed."""
    *others, (_, reference_ms) = timed
    return not disturbed(reference_ms, quietest_ms, copies) and all(
        settled(by_turns(cpu_ms, reference_ms)) for _, cpu_ms in others
    )


def clock_of(timed, threads):
    """One clock for all of a comparison: CPU time as soon as the host is busy, of one thread."""
    if not has_cpu_clock():
        return "wall"
    busy = any(median(wall) > BUSY * median(cpu) for wall, cpu in timed)
    return "cpu" if threads == 1 and busy else "wall"


# ---- the loop ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def has_cpu_clock():
    """Whether CPU time is as fine as runs are long; under `ulimit -t` it moves once in a tick.

    By the mean of its first 100 steps, or of those in 20 ms of spinning: at a change of context it
    takes a small one in any case.
    """
    began, first, steps = time.perf_counter(), time.process_time(), 0
    last = first
    while steps < 100 and time.perf_counter() - began < 0.02:
        now = time.process_time()
        steps += now > last
        last = now
    return steps > 0 and (last - first) * 1e3 / steps <= COARSEST_MS


def timed_run(call):
    """(wall, CPU) time of one call in ms."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    wall_end, cpu_end = time.perf_counter(), time.process_time()
    return (wall_end - wall) * 1e3, (cpu_end - cpu) * 1e3


def warm_up(call, threads):
    """Runs until the medians of two windows agree, or the time is up: (runs, whether they did)."""
    clock = 1 if threads == 1 and has_cpu_clock() else 0
    began, runs, last = time.monotonic(), 0, None
    while True:
        opened, window = time.monotonic(), []
        while len(window) < 2 or (
            len(window) < WINDOW_RUNS and time.monotonic() - opened < WINDOW_SECONDS
        ):
            window.append(timed_run(call)[clock])
        runs, middle = runs + len(window), median(window)
        steady = last is not None and abs(middle - last) <= STEADY * last
        spent = time.monotonic() - began
        if (steady and spent >= WARM_UP_SECONDS) or spent >= LONGEST_WARM_UP:
            return runs, steady
        last = middle


def time_in_turns(models, runs, seconds, threads, watch, restless=lambda timed: False):
    """Time models in turns, after their warm-up: a list of dicts, one a model.

    Each is a list of calls: its copies, one of which runs in a turn, the next in the next turn.
    Who comes after whom is drawn anew for each turn: what ran before has an effect of a percent.
    The turns end after `runs` timed runs of each; before, when every median is known well enough
    and the host is not `restless`, or `seconds` have passed for all together. What disturbs a host
    lasts for seconds, in which medians settle as well.
    """
    warm = [warm_up(copies[0], threads) for copies in models]
    for copies in models:  # the machine is warm by now
        for call in copies[1:] * COLD_RUNS:
            call()
    timed = [([], []) for _ in models]
    order = random.Random(0)
    watch.current = 0
    watch.look()
    began, done = time.monotonic(), 0
    while done < runs:
        if done >= LEAST_RUNS and time.monotonic() - began > seconds:
            break
        known = done >= RUNS_TO_SETTLE and time.monotonic() - began >= SECONDS_TO_SETTLE
        if known and done % (10 * TURN_RUNS) == 0:
            clock = clock_of(timed, threads) == "cpu"
            if all(settled(pair[clock]) for pair in timed) and not restless(timed):
                break
        turn = min(TURN_RUNS, runs - done)
        for index in order.sample(range(len(models)), len(models)):
            copies = models[index]
            watch.current = index
            call = copies[done // TURN_RUNS % len(copies)]
            call()
            for _ in range(turn):
                wall, cpu = timed_run(call)
                timed[index][0].append(wall)
                timed[index][1].append(cpu)
        done += turn
    watch.look()
    return [
        {"copies": len(copies), "warm_up_runs": warmed, "warm_up_steady": steady,
         "wall_ms": wall, "cpu_ms": cpu}
        for copies, (warmed, steady), (wall, cpu) in zip(models, warm, timed)
    ]  # fmt: skip


# ---- the device ----------------------------------------------------------------------------------


def read(path):
    """A file's text without its line's end; None where it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return None


def numbers(*patterns):
    """Those in the files under /sys that match."""
    found = [read(p) for pattern in patterns for p in sorted(glob.glob(SYS + "/" + pattern))]
    return [float(text) for text in found if text and re.match(r"-?\d+$", text)]


def cpu_mhz():
    """The fastest core's clock."""
    clocks = [x / 1e3 for x in numbers("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if not clocks:
        said = re.findall(r"^cpu MHz\s*: ([\d.]+)", read(PROC + "/cpuinfo") or "", re.MULTILINE)
        clocks = [float(x) for x in said]
    return max(clocks) if clocks else None


def gpu_mhz():
    """A Jetson's: its GPUs are called 57000000.gpu, 17000000.gv11b, 17000000.ga10b, …"""
    kinds = ("gpu", "gpu-gpc-0", "gp10b", "gv11b", "ga10b")
    clocks = numbers(*("class/devfreq/*{}/cur_freq".format(kind) for kind in kinds))
    return max(clocks) / 1e6 if clocks else None


def temperature_c():
    """The hottest zone's; a Jetson's PMIC-Die says 100 always."""
    degrees = []
    for zone in sorted(glob.glob(SYS + "/class/thermal/thermal_zone*")):
        text = read(zone + "/temp")
        if text and re.match(r"-?\d+$", text) and read(zone + "/type") != "PMIC-Die":
            degrees.append(float(text) / 1e3)
    return max(degrees) if degrees else None


def rails():
    """Power rails of INA3221 sensors: {label: files whose product or value is mW}.

    As hwmon they have mV and mA, as the older driver has them (JetPack 4) mW.
    """
    found = {}
    for folder in sorted(glob.glob(SYS + "/class/hwmon/hwmon*")):
        if read(folder + "/name") == "ina3221":
            for channel in (1, 2, 3):
                label = read("{}/in{}_label".format(folder, channel))
                files = ["{}/{}{}_input".format(folder, kind, channel) for kind in ("in", "curr")]
                if label and all(map(os.path.exists, files)):
                    found[label] = files
    for place in sorted(glob.glob(SYS + "/bus/i2c/drivers/ina3221x/*/iio*device*/rail_name_*")):
        folder, _, channel = place.rpartition("/rail_name_")
        power = "{}/in_power{}_input".format(folder, channel)
        label = read(place)
        if label and os.path.exists(power):
            found.setdefault(label, [power])
    whole = {label: files for label, files in found.items() if label in RAILS_OF_ALL}
    return whole or found


def power_mw(files_of_rails):
    """The sum over the rails; None where one cannot be read."""
    total = 0.0
    for files in files_of_rails.values():
        values = [read(file) for file in files]
        if not all(v and re.match(r"-?\d+$", v) for v in values):
            return None
        total += float(values[0]) * float(values[1]) / 1e3 if len(values) > 1 else float(values[0])
    return total


class Watch:
    """Looks at clocks, temperature and power: when told to and, in a thread, now and then.

    A thread takes CPU time of its own: in the process that is timed there is one only where there
    is power to be read.

    Attributes:
        current: index of the file that is being run; None: none that counts.
        seen: dicts with the time of each look.
    """

    def __init__(self, in_process):
        self.current, self.seen, self.rails = None, [], rails()
        self._threaded = bool(self.rails) or not in_process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def look(self):
        self.seen.append({
            "time": time.time(), "file": self.current, "cpu_mhz": cpu_mhz(), "gpu_mhz": gpu_mhz(),
            "temperature_c": temperature_c(),
            "power_mw": power_mw(self.rails) if self.rails else None,
        })  # fmt: skip

    def _look_on(self):
        while not self._ended.wait(WATCH_SECONDS):
            self.look()

    def __enter__(self):
        if self._threaded:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        if self._threaded:
            self._thread.join()

    def mean_mw(self, index):
        """Over the looks at one file; None without rails."""
        seen = [x["power_mw"] for x in self.seen if x["file"] == index]
        seen = [x for x in seen if x is not None]
        return sum(seen) / len(seen) if seen else None

    def conditions(self):
        """What the first and the last look at a timed run saw."""
        seen = [x for x in self.seen if x["file"] is not None] or self.seen
        first, last = seen[0], seen[-1]
        kinds = ("cpu_mhz", "gpu_mhz", "temperature_c")
        ends = {k + "_before": first[k] for k in kinds}
        ends.update((k + "_after", last[k]) for k in kinds)
        return dict(ends, rails=list(self.rails))


def said_by(*command):
    """What a program prints; None where it is not here, or fails."""
    try:
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, universal_newlines=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None


def power_mode():
    """A Jetson's, such as MAXN."""
    found = re.search(r"NV Power Mode: *(\S+)", said_by("nvpmodel", "-q") or "")
    return found.group(1) if found else None


@contextlib.contextmanager
def locked_clocks(wanted):
    """A Jetson's clocks at their highest, restored afterwards; gives whether they are."""
    if not wanted:
        yield False
        return
    with tempfile.TemporaryDirectory() as folder:
        kept = os.path.join(folder, "clocks")
        if said_by("jetson_clocks", "--store", kept) is None:
            sys.stderr.write("the clocks are not locked: it takes a Jetson and root\n")
            yield False
            return
        try:
            yield said_by("jetson_clocks") is not None
        finally:
            said_by("jetson_clocks", "--restore", kept)


def machine():
    """What this device is."""
    cpuinfo = read(PROC + "/cpuinfo") or ""
    named = re.search(r"^(?:model name|Model|Hardware)\s*: (.+)", cpuinfo, re.MULTILINE)
    return {
        "node": platform.node(), "machine": platform.machine(), "python": platform.python_version(),
        "model": read(PROC + "/device-tree/model") or (named.group(1) if named else None),
    }  # fmt: skip


# ---- runtimes in this process --------------------------------------------------------------------

MODULES = {  # runtime -> names of its module, and of its package
    "executorch": {"executorch": "executorch"},
    "litert": {"ai_edge_litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime"},
    "onnxruntime": {"onnxruntime": "onnxruntime"},
    "openvino": {"openvino": "openvino"},
}


def runtime_version(runtime):
    """Of the installed package, which is imported."""
    errors = []
    for name in MODULES[runtime]:
        try:
            module = __import__(name)
        except ImportError as error:
            errors.append(str(error))
            continue
        said = getattr(module, "__version__", None)
        if said is None:  # the folder beside it says it; Python 3.6 has no importlib.metadata
            beside = os.path.dirname(next(iter(module.__path__)))
            found = glob.glob("{}/{}-*.dist-info".format(beside, name))
            said = os.path.basename(found[0])[len(name) + 1 : -len(".dist-info")] if found else "?"
        return said.partition("-")[0]
    raise SystemExit(
        "{} is not there for {} ({}); run: pip3 install {}".format(
            runtime, sys.executable, "; ".join(errors), next(iter(MODULES[runtime].values()))
        )
    )


def with_inputs(run, inputs, path):
    """One run of batch 1 on fixed random inputs."""
    import numpy as np

    random, arrays = np.random.RandomState(0), []
    for shape, kind in inputs:
        if shape[0] != 1:
            raise SystemExit("{} takes batches of {}; batch 1 is measured".format(path, shape[0]))
        if kind.startswith("float"):
            values = random.standard_normal(shape)
        elif kind == "bool":
            values = random.randint(0, 2, shape)
        else:
            limits = np.iinfo(kind)
            values = random.randint(max(limits.min, -(2**31)), min(limits.max, 2**31 - 1), shape)
        arrays.append(values.astype(kind))
    return lambda: run(arrays)


def open_model(job, path):
    """One run of the file, loaded as infer.py does."""
    import infer

    try:
        run, inputs = infer.RUNTIMES[job["runtime"]](path, job, threads=job["threads"])
    except Exception as error:  # each runtime has its own
        name = os.path.basename(path)
        raise SystemExit("{} refuses {}: {}".format(job["runtime"], name, error)) from None
    return with_inputs(run, inputs, path)


def status_mib(field):
    return int(re.search(field + r":\s*(\d+)", read("/proc/self/status")).group(1)) / 1024


def memory_of(load):
    """MiB once loaded, and at most until the first run has ended, above what was held before.

    In a child of its own: in a process that has loaded others, memory that these gave back hides
    what the next takes. (None, None) where the system does not tell, or it does not load.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what is wrong, the parent says
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # sets VmHWM back to VmRSS
            before = status_mib("VmRSS")
            call = load()
            held = status_mib("VmRSS") - before
            call()
            os.write(writer, json.dumps([held, status_mib("VmHWM") - before]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        if not select.select([said], [], [], MEMORY_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        text = said.read()
    os.waitpid(child, 0)
    return tuple(json.loads(text)) if text else (None, None)


def copies_in(each_mib):
    """How many of COPIES half of the free memory holds."""
    free = re.search(r"MemAvailable:\s*(\d+)", read(PROC + "/meminfo") or "")
    room = int(free.group(1)) / 2048 if free else each_mib
    return max(1, min(COPIES, int(room / max(each_mib, 1))))


def measure_in_process(job, paths):
    """(runtime's version, clock, conditions, figures of each file)."""
    sys.path.insert(0, HERE)  # of infer.py
    version = runtime_version(job["runtime"])  # imports it: all children start from the same
    memories = [memory_of(lambda path=path: open_model(job, path)) for path in paths]
    copies, models, loads = copies_in(sum(peak or 0 for _, peak in memories)), [], []
    reference = [os.path.join(HERE, job["reference"])] if job.get("reference") else []
    for path in paths + reference:
        began = time.perf_counter()
        models.append([open_model(job, path)])
        loads.append((time.perf_counter() - began) * 1e3)
        models[-1] += [open_model(job, path) for _ in range(copies - 1)]

    def restless(timed):
        quietest_ms = job.get("quietest_ms")
        return bool(reference) and has_cpu_clock() and not paced(timed, quietest_ms, copies)

    with Watch(in_process=True) as watch:
        found = time_in_turns(
            models, job["runs"], job["seconds"], job["threads"], watch, restless
        )  # fmt: skip
    conditions = watch.conditions()
    if reference:
        cpu_ms = found.pop()["cpu_ms"]
        if has_cpu_clock():
            conditions["reference_ms"] = quiet(cpu_ms, copies)
            for each in found:
                each["per_reference"] = median(by_turns(each["cpu_ms"], cpu_ms))
    for index, (path, each) in enumerate(zip(paths, found)):
        each.update(load_ms=loads[index], load_memory_mib=memories[index][0],
                    peak_memory_mib=memories[index][1])  # fmt: skip
        power = watch.mean_mw(index)
        if power is not None:
            each["energy_mj"] = power * sum(each["wall_ms"]) / len(each["wall_ms"]) / 1e3
        if job["layers"] and job["runtime"] in LAYERS:
            each["layers"] = LAYERS[job["runtime"]](job, path)
    clock = clock_of([(each["wall_ms"], each["cpu_ms"]) for each in found], job["threads"])
    return version, clock, conditions, found


# ---- layers: in a pass of their own, since profiling slows what is timed -------------------------


def profile_of(kind, text, runs):
    """A profile as the runtime wrote it, and the median run while it did, by either clock."""
    wall, cpu = zip(*runs)
    return {"format": kind, "text": text, "wall_ms": median(wall), "cpu_ms": median(cpu)}


def onnxruntime_layers(job, path):
    import infer

    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "profile")
        session = infer.onnxruntime_session(path, job, job["threads"], prefix)
        call, began, runs = with_inputs(*infer.of_session(session), path=path), time.monotonic(), []
        while len(runs) < LAYER_RUNS and (
            len(runs) < 3 or time.monotonic() - began < LAYER_SECONDS
        ):
            runs.append(timed_run(call))
        events = json.loads(read(session.end_profiling()))
    kept = [  # a tenth of it
        {"cat": e["cat"], "name": e["name"], "dur": e.get("dur", 0), "args": {
            key: e["args"][key] for key in ("op_name", "input_type_shape") if key in e["args"]}}
        for e in events
        if e["name"] == "model_run" or e["name"].endswith("_kernel_time")
    ]  # fmt: skip
    return profile_of("onnxruntime", json.dumps(kept), runs)


def openvino_layers(job, path):
    """In the form of benchmark_app's detailed counters.

    The CPU plugin gives whole microseconds, and the mean over all runs of a compiled model: the
    first, cold one as well. What a run took is a difference of two means; so that rounding stays
    small it is one of the second and third runs, and the model is compiled again and again.
    """
    import infer

    began, requests, runs = time.monotonic(), [], []
    while len(runs) < LAYER_RUNS and (len(runs) < 6 or time.monotonic() - began < LAYER_SECONDS):
        compiled = infer.openvino_model(path, job, job["threads"], profile=True)
        request = compiled.create_infer_request()
        inputs = infer.of_compiled(compiled)[1]
        call = with_inputs(lambda x, to=request: to.infer(x, share_inputs=True), inputs, path)
        before = {}
        for run in (1, 2, 3):
            took = timed_run(call)
            infos = request.get_profiling_info()
            means = [info.real_time.total_seconds() * 1e3 for info in infos]
            if job["device"] == "CPU":
                times = [run * mean - before.get(i, 0.0) for i, mean in enumerate(means)]
                before = {i: run * mean for i, mean in enumerate(means)}
            else:
                times = means
            if run > 1:
                runs.append(took)
                requests.append({"nodes": [
                    {"name": i.node_name, "node_type": i.node_type, "exec_type": i.exec_type,
                     "status": str(i.status), "real_time": "{:.3f}".format(max(ms, 0.0))}
                    for i, ms in zip(infos, times)
                ]})  # fmt: skip
    text = json.dumps({"report_type": "detailed", "detailed_performance": requests})
    return profile_of("openvino", text, runs)


def benchmark_model(path, threads, runs, layers):
    """The command of LiteRT's own binary."""
    return [
        "--graph=" + path, "--num_threads={}".format(threads), "--warmup_runs=10",
        "--num_runs={}".format(runs), "--enable_op_profiling={}".format(str(layers).lower()),
    ]  # fmt: skip


def litert_layers(job, path):
    """By its own binary, where that is; None elsewhere."""
    tool = shutil.which("benchmark_model", path=os.environ.get("PATH", "") + os.pathsep + HERE)
    if tool is None:
        return None
    code, said = ran([tool, *benchmark_model(path, job["threads"], LAYER_RUNS, layers=True)])
    return None if code else {"format": "litert", "text": said}


LAYERS = {
    "litert": litert_layers, "onnxruntime": onnxruntime_layers, "openvino": openvino_layers,
}  # fmt: skip


# ---- TensorRT: by trtexec ------------------------------------------------------------------------

TRTEXEC = "/usr/src/tensorrt/bin/trtexec"  # where JetPack has it
# builds in a bundle's folder what is not built yet: of these files, by this trtexec
BUILD = (
    """
made=$(sha256sum model.onnx build_engine.sh "$(command -v trtexec || echo %s)" 2>&1)
if [ -f model.engine ] && [ "$made" = "$(cat model.engine.of 2>/dev/null)" ]; then exit 0; fi
rm -f model.engine.of
sh build_engine.sh > build.log 2>&1 && echo "$made" > model.engine.of
"""
    % TRTEXEC
)


def ran(command, folder=None):
    """(exit code, all that it said)."""
    done = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, universal_newlines=True, errors="replace",
    )  # fmt: skip
    try:
        said = done.communicate()[0]
    finally:
        done.kill()  # it must not run on where this script was ended
    return done.returncode, said


def failure(what, code, log):
    """Why a tool failed, and the remedy."""
    last = "\n".join(log.splitlines()[-30:])  # before, trtexec tells of tactics that did not fit
    if code in (137, -9) or OUT_OF_MEMORY.search(last):
        return (
            "{} ran out of memory; end other programs, add swap, or lower the workspace in "
            "build_engine.sh".format(what)
        )
    if "no space left on device" in last.lower():
        return "{}: the disk is full; make room there and try again".format(what)
    return "{} failed with {}: {}".format(what, code, "\n".join(log.splitlines()[-10:]))


def tensorrt_version(log):
    """Of trtexec's first line: "v8201" is 8.2.1, and from 10 on "v101602" is 10.16.2.

    >>> tensorrt_version("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec")
    '8.5.2'
    """
    found = re.search(r"\[TensorRT v(\d+)\]", log)
    if found is None:
        return None
    number = int(found.group(1))
    major, rest = divmod(number, 10000 if number >= 100000 else 1000)
    return "{}.{}.{}".format(major, rest // 100, rest % 100)


def trtexec_timing(script, iterations):
    """Its flags to time the engine; inputs that the file leaves open are as they were built."""
    shapes = [word for word in shlex.split(script, comments=True) if word.startswith("--shapes=")]
    return [
        "--loadEngine=model.engine", *shapes, "--warmUp=500", "--duration=0",
        "--iterations={}".format(iterations),
    ]  # fmt: skip


def trtexec_layers(version):
    """Its flags to profile layers, which are told of from 8.2 on."""
    told = tuple(map(int, version.split(".")[:2])) >= (8, 2)
    info = ["--exportLayerInfo=layers.json", "--profilingVerbosity=detailed"]
    return ["--exportProfile=profile.json", *(info if told else [])]


def measure_trtexec(job, paths):
    """(TensorRT's version, clock, conditions, figures of each file)."""
    tool = shutil.which("trtexec") or TRTEXEC
    folders = [os.path.dirname(path) for path in paths]
    for folder in folders:
        code = subprocess.call(["sh", "-c", BUILD], cwd=folder)
        if code:
            log = read(folder + "/build.log") or ""
            raise SystemExit(failure("build_engine.sh in " + folder, code, log))
    scripts = [read(folder + "/build_engine.sh") for folder in folders]

    def trtexec(folder, *flags):
        code, said = ran([tool, *flags], folder)
        if code:
            raise SystemExit(failure("trtexec in " + folder, code, said))
        return said

    def times(index, iterations):
        flags = trtexec_timing(scripts[index], iterations)
        said = trtexec(folders[index], *flags, "--exportTimes=times.json")
        return said, json.loads(read(folders[index] + "/times.json"))

    found = [{"warm_up_runs": LEAST_RUNS, "wall_ms": [], "cpu_ms": [], "compute_ms": [],
              "spans_ms": 0.0, "load_ms": None} for _ in paths]  # fmt: skip
    seconds = 0.0
    for index, each in enumerate(found):
        said, runs = times(index, LEAST_RUNS)  # warms up, and tells how many can be had
        loaded = re.search(r"Engine (?:loaded|deserialized) in ([\d.e-]+) sec", said)
        each["load_ms"] = float(loaded.group(1)) * 1e3 if loaded else None
        seconds += median([run["latencyMs"] for run in runs]) / 1e3
    version = tensorrt_version(said) or "?"
    rounds = TRTEXEC_ROUNDS if len(paths) > 1 else 1
    possible = max(LEAST_RUNS, min(job["runs"], int(job["seconds"] / max(seconds, 1e-6))))
    with Watch(in_process=False) as watch:
        for _ in range(rounds):
            for index, each in enumerate(found):
                watch.current, before = index, len(watch.seen)
                watch.look()
                _, runs = times(index, possible // rounds)
                ended, watch.current = time.time(), None
                span = runs[-1]["endD2hMs"] - runs[0]["startEnqMs"]
                for look in watch.seen[before:]:  # loading and warming up do not count
                    if look["time"] < ended - span / 1e3:
                        look["file"] = None
                each["wall_ms"] += [run["latencyMs"] for run in runs]
                each["compute_ms"] += [run["computeMs"] for run in runs]
                each["spans_ms"] += span
    for index, each in enumerate(found):
        each["throughput_per_s"] = len(each["wall_ms"]) / each.pop("spans_ms") * 1e3
        power = watch.mean_mw(index)
        if power is not None:
            each["energy_mj"] = power / each["throughput_per_s"]
        if job["layers"]:
            flags = trtexec_timing(scripts[index], LAYER_RUNS)
            trtexec(folders[index], *flags, *trtexec_layers(version))
            each["layers"] = {
                "format": "tensorrt", "text": read(folders[index] + "/profile.json"),
                "info": read(folders[index] + "/layers.json"),
            }  # fmt: skip
    return version, "wall", watch.conditions(), found


# ---- a job ---------------------------------------------------------------------------------------


def fingerprint(path):
    """SHA-256 and bytes of the file, and of the weights beside it if it is an OpenVINO IR."""
    digest, size = hashlib.sha256(), 0
    stem, suffix = os.path.splitext(path)
    for name in [stem + ".bin", path] if suffix == ".xml" else [path]:
        with open(name, "rb") as file:
            content = file.read()
        digest.update(content)
        size += len(content)
    return digest.hexdigest(), size


def measure(job, folder):
    """The result of a job; its files' names are relative to `folder`."""
    paths = [os.path.normpath(os.path.join(folder, name)) for name in job["files"]]
    marks = [fingerprint(path) for path in paths]
    load = os.getloadavg()[0]
    with locked_clocks(job["lock_clocks"]) as locked:
        how = measure_trtexec if job["runtime"] == "tensorrt" else measure_in_process
        version, clock, conditions, found = how(job, paths)
    conditions.update(
        clocks_locked=locked, load_average=load, power_mode=power_mode(),
        governor=read(SYS + "/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    )  # fmt: skip
    for name, (digest, size), each in zip(job["files"], marks, found):
        each.update(file=name, sha256=digest, size_bytes=size)
    return {
        "format": 1, "target": job["target"], "runtime": job["runtime"],
        "precision": job.get("precision"), "network": job.get("network"),
        "runtime_version": version, "threads": job["threads"], "clock": clock,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(), "conditions": conditions, "files": found,
    }  # fmt: skip


def write_whole(path, text):
    """A reader sees the whole file or none, whenever this is killed."""
    temporary = "{}.{}".format(path, os.getpid())
    try:
        with open(temporary, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise SystemExit(
            "{}: {}; make room there and try again".format(path, error.strerror)
        ) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def only_one(folder):
    """Wait for another measurement here: they would disturb each other."""
    try:
        import fcntl

        lock = open(os.path.join(folder, "measure.lock"), "w")  # until the end
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):  # not on this system
        return None
    return lock


def ended(*_):
    raise SystemExit("ended by a signal")  # so that clocks are restored


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--job", help="a file that says what to measure; else this bundle")
    parser.add_argument("--out", default="measurement.json", help="the file to write")
    parser.add_argument("--runs", type=int, default=MOST_RUNS, help="timed runs, at most")
    parser.add_argument("--seconds", type=float, default=20, help="for them, at most")
    parser.add_argument("--threads", type=int, default=1, help="of the runtime")
    parser.add_argument("--layers", action="store_true", help="time each layer, too")
    parser.add_argument("--lock-clocks", action="store_true",
                        help="a Jetson's, at their highest, restored afterwards")  # fmt: skip
    options = parser.parse_args()
    folder = os.path.dirname(os.path.abspath(options.job)) if options.job else HERE
    with open(options.job or os.path.join(HERE, "manifest.json")) as file:
        job = json.load(file)
    if options.job is None:
        job.update(vars(options), files=[job["file"]])
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), ended)
    lock = only_one(folder)
    if os.path.exists(options.out):
        os.remove(options.out)  # what is there afterwards is of this run
    result = measure(job, folder)
    write_whole(options.out, json.dumps(result))
    for each in result["files"]:
        samples = each[result["clock"] + "_ms"]
        low, high = median_interval(samples)
        print("{}: p50 {:.3f} ms ({:.3f} to {:.3f}), {} clock, {} runs".format(
            each["file"], median(samples), low, high, result["clock"], len(samples)
        ))  # fmt: skip
    if lock:
        lock.close()


if __name__ == "__main__":
    main()
