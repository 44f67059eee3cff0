from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from edgekd.errors import TargetError
from edgekd.latency.fusion import kernels_of
from edgekd.latency.kernels import Kernel
from edgekd.latency.model import (
    CACHE,
    FETCHED,
    FETCHING,
    LatencyModel,
    _Kernels,
    fit_rows,
    leave_one_out,
)  # fmt: skip
from edgekd.latency.probes import ProbeKind, probe
from edgekd.latency.profiles import ProfileRow, append_rows, own_file, read_profile
from edgekd.latency.tracing import trace
from edgekd.models.resnet import resnet
from edgekd.network import Network
from edgekd.quantization.sensitivity import LayerEffect, rank
from edgekd.target import Precision, Target

KINDS: tuple[ProbeKind, ...] = ("dense", "depthwise", "transformer")
CLOCK_MS = 0.002


def law(kernel: Kernel) -> float:
    """ms of a made-up device: 50 MACs/ns at most, 10 bytes/ns, 1 µs for each kernel."""
    efficiency = min(1.0, kernel.cout / 64) * min(1.0, kernel.height * kernel.width / 100)
    compute = kernel.macs / (50e6 * efficiency)
    return 0.001 + compute + 4 * (kernel.reads + kernel.writes + kernel.weights) / 10e6


def kernels(
    kind: ProbeKind, seed: int, target: Target, precision: Precision = "fp32"
) -> list[Kernel]:
    with torch.device("meta"):
        module, shape = probe(kind, seed)
    scheme = target.scheme if precision == "int8" else None
    return kernels_of(trace(module, [shape]), target.runtime, scheme)


def rows(
    target: Target, per_kind: int = 4, slower: float = 1.0, precision: Precision = "fp32",
    law: Callable[[Kernel], float] = law,
) -> list[ProfileRow]:  # fmt: skip
    made = []
    draw = np.random.default_rng(0)
    for kind in KINDS:
        for seed in range(per_kind):
            found = kernels(kind, seed, target, precision)
            times = [slower * law(k) for k in found]
            common = ProfileRow(
                kind="network", network=f"{kind}-{seed}", precision=precision, threads=1,
                p50_ms=sum(times) * 1.05, quiet_ms=sum(times), runs=100, clock="cpu",
                runtime=target.runtime, runtime_version="0", host="made up",
                instruction_set="none", conditions="none", date="2026-11-24", origin="host",
                sha256=f"{kind}-{seed}",
            )  # fmt: skip
            made.append(common)
            for kernel, ms in zip(found, times, strict=True):
                noisy = ms * math.exp(0.03 * draw.standard_normal()) + CLOCK_MS
                made.append(common.model_copy(update={
                    "kind": "kernel", **kernel._asdict(), "p50_ms": noisy, "quiet_ms": None,
                }))  # fmt: skip
    return made


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path))
    monkeypatch.setattr("edgekd.latency.profiles.data_folders", lambda kind: [tmp_path / kind])
    return tmp_path


def test_it_learns_a_device_from_its_networks(home):
    target = Target.load("host-onnxruntime")
    append_rows(own_file(target), rows(target))
    model = LatencyModel.load(target)
    off = []
    for kind in KINDS:
        for seed in range(20, 32):
            with torch.device("meta"):
                module, shape = probe(kind, seed)
            found = model.estimate(module, "fp32", [shape])
            truth = sum(map(law, kernels(kind, seed, target)))
            assert found.method == "model"
            assert found.low_ms < found.p50_ms < found.high_ms
            off.append(abs(found.p50_ms / truth - 1))
    assert np.mean(off) < 0.06
    assert np.mean(np.array(off) < 0.15) >= 0.9


def test_kernels_that_gather_are_told_apart():
    def device(kernel: Kernel) -> float:
        return law(kernel) * (4 if kernel.gathered else 1)

    target = Target.load("host-onnxruntime")
    gathering = rows(target, per_kind=5, precision="int8", law=device)
    off = [abs(r - 1) for r in leave_one_out(gathering)["int8"].values()]
    assert np.mean(off) < 0.06


def test_weights_that_the_cache_does_not_keep_are_fetched():
    def took(kernel: Kernel, million: float) -> float:
        return law(kernel) + kernel.weights * max(0.0, 1 - 2 / million) * 2e-7

    def of_network(million: float) -> float:
        return math.log2(1 + million * 1e6 / CACHE)

    gemms = [Kernel("Gemm", n, 1000, reads=n, writes=1000) for n in (256, 512, 1024, 1280)]
    seen = {(g, of_network(m)): [took(g, m)] for g in gemms for m in (0.5, 1.0, 3.0, 6.0, 12.0)}
    fitted = _Kernels.fit(seen, resident=2e6, peak=1e-9, prior=None)
    for million in (0.7, 4.0, 30.0):
        [found] = fitted.predict([gemms[2]], of_network(million))
        assert found == pytest.approx(took(gemms[2], million), rel=0.1)
    few = {key: ms for key, ms in seen.items() if key[1] < of_network(4.0)}
    [same] = _Kernels.fit(few, 2e6, 1e-9, None).predict([gemms[2]], of_network(30.0))
    assert same < 1.5 * took(gemms[2], 0.7)  # one network that is too large does not tell


def test_few_weights_that_are_fetched_cost_about_what_dense_ones_do():
    """Stems are in few networks that fetch: left alone, they tell of half a gigabyte a second."""
    families = fit_rows(read_profile("intel-cpu"))["fp32"].families
    most = FETCHING * families["dense"].shares[FETCHED]
    assert 0 < most < 1e-6  # ms for four bytes
    assert max(f.shares[FETCHED] for f in families.values()) < 1.001 * most


@pytest.mark.parametrize("target", ["host-onnxruntime", "intel-cpu"])
def test_running_a_network_costs_no_less_than_nothing(target):
    for fit in fit_rows(read_profile(target)).values():
        assert fit.shares[-1] >= 0


def test_the_clocks_cost_is_found_and_left_out(home):
    target = Target.load("host-onnxruntime")
    for by_network in leave_one_out(rows(target)).values():
        assert abs(np.mean(list(by_network.values())) - 1) < 0.03


def test_the_interval_covers_nine_networks_of_ten(home):
    target = Target.load("host-onnxruntime")
    fit = fit_rows(rows(target, per_kind=5))["fp32"]
    covered = 0
    for kind in KINDS:
        for seed in range(30, 38):
            found = kernels(kind, seed, target)
            estimate = fit.estimate(found)
            covered += estimate.low_ms <= sum(map(law, found)) <= estimate.high_ms
    assert covered >= 0.75 * 24


def test_measurements_move_it(home):
    target = Target.load("host-onnxruntime")
    append_rows(own_file(target), rows(target))
    model = LatencyModel.load(target)
    nets = [Network(resnet(num_classes=4, widths=w), torch.zeros(1, 3, 32, 32))
            for w in ((16, 32), (24, 48), (32, 64))]  # fmt: skip
    before = [model.estimate(net, "fp32").p50_ms for net in nets]
    moved = model.corrected([(nets[0], "fp32", 1.5 * before[0])])
    assert moved.estimate(nets[0], "fp32").p50_ms == pytest.approx(1.5 * before[0], rel=0.01)
    assert moved.estimate(nets[2], "fp32").p50_ms == pytest.approx(1.5 * before[2], rel=0.01)
    assert [model.estimate(net, "fp32").p50_ms for net in nets] == before
    several = model.corrected([(n, "fp32", ms**1.1) for n, ms in zip(nets, before, strict=True)])
    assert several.estimate(nets[1], "fp32").p50_ms == pytest.approx(before[1] ** 1.1, rel=0.05)


class Two(nn.Module):
    """A dense layer and a depthwise one, on 32 × 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(64, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)

    def forward(self, x):
        return self.depthwise(self.dense(x).relu()).relu()


def test_what_a_layer_costs_in_float_is_of_the_device(home):
    """Made up: a depthwise layer is 30 times slower in float, a dense one as fast as in integers.

    So the dense one is preferred in float, of which MACs say that it is the dearer.
    """
    target = Target.load("host-onnxruntime")

    def floats(kernel: Kernel) -> float:
        return (30 if kernel.groups > 1 and kernel.macs else 1) * law(kernel)

    append_rows(own_file(target), rows(target, law=floats))
    net = Network(Two(), torch.zeros(1, 64, 32, 32))
    assert LatencyModel.load(target).float_costs_ms(net) == {}  # nothing is known of integers
    append_rows(own_file(target), rows(target, precision="int8"))
    costs = LatencyModel.load(target).float_costs_ms(net)
    macs = 32 * 32 * 64 * 9
    map_ms = 0.001 + 8 * 32 * 32 * 64 / 10e6  # to read and write one map
    alone = law(Kernel("Conv", 64, 64, 3, 1, 64, 32, 32, "", 32 * 32 * 64, 32 * 32 * 64))
    assert alone == pytest.approx(map_ms + macs / 50e6, rel=0.01)
    # conversions to float and back, each with its transposition, and reorders to blocks and back
    assert costs["depthwise"] == pytest.approx(29 * alone + 6 * map_ms, rel=0.2)
    assert costs["dense"] == pytest.approx(6 * map_ms, rel=0.5)
    effects = [LayerEffect(layer=name, sqnr_gain_db=1.0, metric_gain=0.0, price=price)
               for name, price in costs.items()]  # fmt: skip
    assert [effect.layer for effect in rank(effects)] == ["dense", "depthwise"]
    moved = LatencyModel.load(target).corrected([(net, "int8", 1.0)])
    assert moved.float_costs_ms(net) == {}  # of a related device: its kernels are not this one's


@pytest.mark.parametrize("name", ["host-onnxruntime", "intel-cpu"])
def test_shipped_profiles_price_every_layer(name: str):
    net = Network(resnet18(), torch.zeros(1, 3, 64, 64))
    model = LatencyModel.load(name)
    costs = model.float_costs_ms(net)
    weighted = [path for path, part in net.module.named_modules()
                if isinstance(part, (nn.Conv2d, nn.Linear))]  # fmt: skip
    assert costs.keys() == set(weighted)
    assert all(math.isfinite(ms) and ms > 0 for ms in costs.values())
    saved = model.estimate(net, "fp32").p50_ms - model.estimate(net, "int8").p50_ms
    assert 0.9 < sum(costs.values()) / saved < 1.3  # each alone has conversions of its own


def test_a_related_device_needs_few_networks(home):
    known, new = Target.load("host-onnxruntime"), Target.load("android-arm64")
    append_rows(own_file(known), rows(known))
    wholes = [
        row.model_copy(update={"quiet_ms": None, "related": known.name})
        for row in rows(new, per_kind=2, slower=3.0) if row.kind == "network"
    ]  # fmt: skip
    append_rows(own_file(new), wholes)
    model = LatencyModel.load(new)
    with torch.device("meta"):
        module, shape = probe("dense", 21)
    truth = 3 * 1.05 * sum(map(law, kernels("dense", 21, new)))
    assert model.estimate(module, "fp32", [shape]).p50_ms == pytest.approx(truth, rel=0.15)


def test_a_new_row_is_seen(home):
    target = Target.load("host-onnxruntime")
    append_rows(own_file(target), rows(target))
    net = Network(resnet(num_classes=4), torch.zeros(1, 3, 32, 32))
    before = LatencyModel.load(target).estimate(net, "fp32").p50_ms
    slow = [r.model_copy(update={"p50_ms": 2 * r.p50_ms, "quiet_ms": r.quiet_ms and 2 * r.quiet_ms})
            for r in rows(target)]  # fmt: skip
    append_rows(own_file(target), slow)  # the same files, measured again
    after = LatencyModel.load(target).estimate(net, "fp32").p50_ms
    assert after == pytest.approx(2 * before, rel=0.1)


def test_what_the_host_did_meanwhile_is_taken_off(home):
    target = Target.load("host-onnxruntime")
    net = Network(resnet(num_classes=4), torch.zeros(1, 3, 32, 32))

    def estimate(slower: float) -> float:
        """Half of the networks, and the reference with them, while others ran."""
        disturbed = [
            row if row.kind == "kernel" else row.model_copy(update={
                "quiet_ms": row.quiet_ms * busy, "reference_ms": 2.0 * busy,
            })
            for row in rows(target)
            for busy in [slower if int(row.network[-1]) % 2 else 1.0]
        ]  # fmt: skip
        return fit_rows(disturbed)["fp32"].estimate(
            kernels_of(trace(net.module, [(3, 32, 32)]), target.runtime, None)
        ).p50_ms  # fmt: skip

    assert estimate(1.4) == pytest.approx(estimate(1.0))


def test_another_hosts_rows_are_not_mixed_in(home):
    target = Target.load("host-onnxruntime")
    mine = [row.model_copy(update={"host": "mine"}) for row in rows(target, slower=2.0)]
    append_rows(own_file(target), rows(target))
    net = Network(resnet(num_classes=4), torch.zeros(1, 3, 32, 32))
    theirs = LatencyModel.load(target).estimate(net, "fp32")
    append_rows(own_file(target), mine)
    found = LatencyModel.load(target).estimate(net, "fp32")
    assert found.p50_ms == pytest.approx(2 * theirs.p50_ms, rel=0.1)
    assert "on mine" in found.basis and "on made up" in theirs.basis


def test_a_device_never_measured_is_bounded_by_its_peak(home):
    target = Target.load("jetson-nano")
    net = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    found = LatencyModel.load(target).estimate(net, "fp16", [(64, 56, 56)])
    assert found.method == "roofline"
    macs = 64 * 64 * 9 * 56 * 56
    assert found.low_ms == pytest.approx(2 * macs / (target.peak["fp16_gflops"] * 1e6))
    assert found.high_ms > 3 * found.p50_ms > 9 * found.low_ms
    assert "estimated (±?" in str(found)
    moved = LatencyModel.load(target).corrected([(net, "fp16", 2.0)], [(64, 56, 56)])
    assert moved.estimate(net, "fp16", [(64, 56, 56)]).p50_ms == pytest.approx(2.0, rel=0.02)


def test_what_is_not_known_is_said(home):
    net = nn.Conv2d(3, 8, 3)
    with pytest.raises(TargetError, match="run: edgekd calibrate --target raspberry-pi-5"):
        LatencyModel.load("raspberry-pi-5")
    with pytest.raises(TargetError, match=r"jetson-nano runs .*, not int8"):
        LatencyModel.load("jetson-nano").estimate(net, "int8", [(3, 32, 32)])
    with pytest.raises(TargetError, match="needs input_shapes"):
        LatencyModel.load("jetson-nano").estimate(net, "fp16")
