"""Latency from architecture: kernel by kernel from measured ones, or from a device's peak figures.

A network's kernels are predicted by rules (`fusion.py`). The time of each is its physical share (an
overhead, multiply-accumulates, bytes) times what a Gaussian process has learnt about the kernels
that were measured. Their sum is calibrated to whole networks: layers are timed with a clock that
costs time itself, and each alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.optimize import lsq_linear
from torch import nn

from edgekd.errors import TargetError
from edgekd.latency.fusion import kernels_of
from edgekd.latency.kernels import CONVOLUTIONS, IMAGE, Kernel
from edgekd.latency.probes import is_probe, probe
from edgekd.latency.profiles import ProfileRow, own_file, read_profile
from edgekd.latency.tracing import Dims, Op, count_users, trace
from edgekd.network import Network
from edgekd.target import Precision, Target

Array = NDArray[np.float64]

LEAST_MS = 1e-4
LEAST_NETWORKS = 5
# how far apart two kernels may be, in each of `_features`, to still tell of each other
LENGTHS = np.array([5.0, 2.2, 2.2, 0.7, 2.2, 7.0, 3.0, 1.5, 5.0, 1.5, 0.6, 10.0, 16.0])
SPREAD, NOISE = 0.7, 0.02  # variances of the logarithm
OFF_MS = 0.0001  # that a kernel's median time may be off by, whose clock tells microseconds
CACHE = 65536  # elements, about what the nearest caches hold
RESIDENT = 8e6  # bytes of weights, about what the last cache keeps from run to run
TOLD = 3  # networks at least, to tell what one that does not fit takes longer
FETCHING = 4.0  # times as long as in a dense convolution any weight takes to fetch, at most
FOLDS = 5
# what timing a kernel costs more than running it without a clock, or less than from one kernel to
# the next; and what running a network at all may cost
CLOCK_MS, ONCE_MS = np.arange(-0.006, 0.006, 0.00025), np.arange(0, 0.2, 0.01)
# how firmly a network's calibration holds to its kernels' times, to no rest for each kernel, and to
# the rest of each network
RIDGE, HELD, HELD_ONCE = 0.04, 30.0, 1.5
SLOWEST, FEW = 50.0, 8  # times as long for an element as others, so few of a kind may take
PEAK = 0.6  # of the least time for a multiply-accumulate that was seen, any takes at least
BLIND_MS, TIMED_MS = 0.002, 0.01  # what a profile's clock does not see, and what it tells well
# what networks reach of a device's peak: between all and a tenth of it, a third in the middle
REACHED, WORST = 3.0, 10.0
LAUNCH_MS = 0.005
BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}


class Estimate(BaseModel):
    """A latency nobody measured, batch 1.

    Attributes:
        p50_ms: of a host or device with nothing else to do.
        low_ms, high_ms: 90 % predictive interval.
        method: "model": from measured kernels; "roofline": from peak figures alone.
        basis: what it stands on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    p50_ms: float
    low_ms: float
    high_ms: float
    method: Literal["model", "roofline"]
    basis: str

    def __str__(self) -> str:
        wide = max(self.high_ms / self.p50_ms, self.p50_ms / self.low_ms)
        how = f"±{wide - 1:.0%}" if self.method == "model" else f"±? within {wide:.0f}×"
        return f"{self.p50_ms:.3g} ms, estimated ({how})"


class _Correction(NamedTuple):
    """Added to the logarithm of an estimate: a + b · (log ms - center)."""

    a: float = 0.0
    b: float = 0.0
    center: float = 0.0
    spread: float | None = None  # standard deviation then


@dataclass(frozen=True)
class LatencyModel:
    """Estimates for one target.

    Example:
        >>> model = LatencyModel.load("jetson-nano")
        >>> model.estimate(torch.nn.Conv2d(3, 8, 3), "fp16", [(3, 32, 32)]).method
        'roofline'
    """

    target: Target
    threads: int
    fits: dict[Precision, _Fit] = field(default_factory=dict)
    corrections: dict[Precision, _Correction] = field(default_factory=dict)

    @staticmethod
    def load(target: str | Target, *, threads: int = 1) -> LatencyModel:
        """Fit to the target's profile, or take its peak figures where it has none.

        Raises:
            TargetError: neither is there.
            StateError: a row of the profile is no row.
        """
        target = Target.load(target)
        fits = _fitted(target.name, threads, *_stamp(target.name))
        whole = _whole(target.name, threads, *_stamp(target.name)) if not fits else ()
        if whole:
            related = whole[0].related
            fits = _fitted(related, threads, *_stamp(related)) if related else {}
        if not fits and not target.peak:
            raise TargetError(
                f"{target.name}: no network was measured with {threads} thread(s), and its file "
                f"has no peak figures; run: edgekd calibrate --target {target.name}"
            )
        model = LatencyModel(target, threads, fits)
        return model._adapted(whole) if whole else model

    def _adapted(self, whole: Sequence[ProfileRow]) -> LatencyModel:
        """To networks that were measured as wholes, which their names rebuild."""
        measured = []
        for row in whole:
            kind, _, seed = row.network.partition("-")
            with torch.device("meta"):
                module, shape = probe(kind, int(seed))  # type: ignore[arg-type]  # as written
            measured.append((module, [shape], row.precision, row.p50_ms))
        return self._moved(measured)

    def estimate(
        self,
        net: Network | nn.Module | list[Op],
        precision: Precision,
        input_shapes: Sequence[Dims] | None = None,
    ) -> Estimate:
        """The latency of a float network as it would run in `precision`.

        Args:
            net: untrained is enough: shapes set latency; on the meta device it costs no memory.
                Or what `traced` gave for it.
            input_shapes: of one sample each; of a Network, its own.

        Raises:
            TargetError: the target does not run this precision, or nothing is known of it.
            ModelError: it does not run on meta tensors.
        """
        return self.estimate_many([(net, input_shapes)], precision)[0]

    def estimate_many(
        self,
        nets: Iterable[tuple[Network | nn.Module | list[Op], Sequence[Dims] | None]],
        precision: Precision,
    ) -> list[Estimate]:
        """Likewise of several, each with its input shapes."""
        return [self._of(traced(net, shapes), precision) for net, shapes in nets]

    def _of(self, ops: list[Op], precision: Precision) -> Estimate:
        if precision not in self.target.precisions:
            raise TargetError(
                f"{self.target.name} runs {', '.join(self.target.precisions)}, not {precision}"
            )
        scheme = self.target.scheme if precision == "int8" else None
        fit = self.fits.get(precision)
        if fit is None:
            if not self.target.peak:
                raise TargetError(
                    f"{self.target.name}: no network was measured in {precision}; run: "
                    f"edgekd calibrate --target {self.target.name}"
                )
            # any runtime fuses about as OpenVINO does
            fused = _without_ends(kernels_of(ops, "openvino", scheme))
            found = roofline(fused, self.target, precision)
        else:
            found = fit.estimate(kernels_of(ops, self.target.runtime, scheme))
        return _corrected(found, self.corrections.get(precision))

    def float_costs_ms(self, net: Network) -> dict[str, float]:
        """How much longer each layer takes in float, alone in a network of integers; an estimate.

        Its float kernel and the conversions around it, less its integer kernel. A layer that runs
        several times counts each time; one that is no slower in float costs nothing.

        Args:
            net: the float network.

        Returns:
            ms of each convolution and linear layer, by its module's path. Empty where the target's
            own kernels were not measured in both precisions.
        """
        runtime, scheme = self.target.runtime, self.target.scheme
        precision = self.target.float_precision
        if precision is None or not {precision, "int8"} <= self.fits.keys() or self.corrections:
            return {}
        floats, integers = self.fits[precision], self.fits["int8"]
        costs: dict[str, float] = {}
        ops = traced(net)
        weights = _weights(kernels_of(ops, runtime, scheme))
        for op in ops:
            if op.layer and op.kind in ("convolution", "linear"):
                alone = _alone(op)
                ms = floats.kernels_ms(_without_ends(kernels_of(alone, runtime, None)), weights)
                for kernel in _without_ends(kernels_of(alone, runtime, scheme)):
                    took = integers.kernels_ms([kernel], weights)
                    ms += math.copysign(took, -1 if kernel.macs else 1)
                costs[op.layer] = costs.get(op.layer, 0.0) + max(ms, 0.0)
        return costs

    def corrected(
        self,
        measured: Sequence[tuple[Network | nn.Module | list[Op], Precision, float]],
        input_shapes: Sequence[Dims] | None = None,
    ) -> LatencyModel:
        """This model, moved to what a few networks took: on this device, or on a related one.

        The logarithm of measured ÷ estimated is fitted by a line, held to be flat where there are
        few; a single measurement moves all estimates of its precision by its ratio.

        Args:
            measured: network, precision, p50 in ms.
            input_shapes: of bare modules.
        """
        return self._moved([(net, input_shapes, p, ms) for net, p, ms in measured])

    def _moved(
        self,
        measured: Sequence[
            tuple[Network | nn.Module | list[Op], Sequence[Dims] | None, Precision, float]
        ],
    ) -> LatencyModel:
        corrections = dict(self.corrections)
        plain = replace(self, corrections={})
        for precision in dict.fromkeys(p for *_, p, _ in measured):
            corrections[precision] = _correction([
                (plain.estimate(net, p, shapes), ms)
                for net, shapes, p, ms in measured if p == precision
            ])  # fmt: skip
        return replace(self, corrections=corrections)


def traced(
    net: Network | nn.Module | list[Op], input_shapes: Sequence[Dims] | None = None
) -> list[Op]:
    """The operators of a float network; what they are already stays as it is."""
    if isinstance(net, list):
        return net
    if isinstance(net, Network):
        if net.scheme is not None:
            raise TargetError("estimates are of float networks, by the precision they will run in")
        return trace(net.module, input_shapes or [i.shape for i in net.io.inputs])
    if input_shapes is None:
        raise TargetError(f"{type(net).__name__}: a bare module needs input_shapes=[(C, H, W)]")
    return trace(net, input_shapes)


def _alone(op: Op) -> list[Op]:
    """A network of this layer only."""
    before = Op("input", [], op.inputs[0].shape)
    layer = replace(op, inputs=[before])
    ops = [before, layer, Op("output", [layer], ())]
    count_users(ops)
    return ops


def _without_ends(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Without OpenVINO's reorders, which stand at a network's ends."""
    return [kernel for kernel in kernels if kernel.op not in ("Reorder", "Reorder.image")]


# ---- kernels -------------------------------------------------------------------------------------


def _family(kernel: Kernel) -> str:
    if kernel.op in CONVOLUTIONS:
        depthwise = kernel.groups > 1 and kernel.groups == kernel.cin
        kind = "depthwise" if depthwise else "grouped" if kernel.groups > 1 else "dense"
        if kernel.cin <= IMAGE and not depthwise:
            return "stem"
        return f"{kind}.gathered" if kernel.gathered and kind != "grouped" else kind
    if kernel.macs:
        return "product" if kernel.groups == 1 and kernel.op != "Subgraph" else kernel.op
    return kernel.op


def _weights(kernels: Iterable[Kernel]) -> float:
    """Of a network, how many: whether they stay in the caches from run to run."""
    return math.log2(1 + sum(k.weights for k in kernels) / CACHE)


def _features(kernel: Kernel, weights: float) -> list[float]:
    """What the efficiency of a matrix kernel depends on: logarithms of sizes, and kinds."""
    inner = kernel.cin // kernel.groups if kernel.op in CONVOLUTIONS else kernel.cin
    moved = kernel.reads + kernel.writes + kernel.weights
    return [
        math.log2(inner), math.log2(kernel.cout), math.log2(kernel.height * kernel.width),
        math.log2(kernel.kernel), math.log2(kernel.groups),
        float("add" in kernel.fused), float(any(kernel.activated)),
        float(kernel.op in ("Conv", "FusedConv", "Gemm")), math.log2(kernel.inside),
        math.log2(kernel.padding), float(kernel.cout % 8 > 0),
        math.log2(1 + moved / CACHE), weights,
    ]  # fmt: skip


MACS, MOVED, STEPS, FETCHED = 1, 2, 3, -1


def _physical(kernel: Kernel, weights: float, resident: float) -> list[float]:
    """What a kernel's time is made of, without any efficiency.

    Args:
        weights: of its network, see `_weights`.
        resident: elements of weights that the last cache keeps.
    """
    moved = kernel.reads + kernel.writes + kernel.weights
    macs = kernel.macs * kernel.inside * kernel.padding
    fetched = kernel.weights * _fetched(weights, resident)
    return [1.0, macs, moved, kernel.steps, *kernel.activated, fetched]


def _fetched(weights: float, resident: float) -> float:
    """The share of a network's weights that comes from memory in each run."""
    return max(0.0, 1 - resident / max(CACHE * (2**weights - 1), 1.0))


@dataclass(frozen=True)
class _Kernels:
    """Times of one family of kernels: a physical part, and for products its efficiency."""

    resident: float  # see `_physical`
    shares: Array
    shift: float = 0.0
    seen: Array | None = None  # features of what was measured, in LENGTHS
    alpha: Array | None = None  # of each in the mean of the process

    @staticmethod
    def fit(
        seen: Mapping[tuple[Kernel, float], Sequence[float]],
        resident: float,
        peak: float,
        prior: _Kernels | None,
        fetching: float = math.inf,
    ) -> _Kernels:
        """To times of kernels, each in a network of so many `_weights`.

        Args:
            peak: ms that a multiply-accumulate takes at least.
            prior: of kernels of all kinds without products, which bounds what one kind may take for
                each element: a few small ones do not tell. None for those kernels themselves,
                whose `Kernel.steps` do not count the same thing.
            fetching: ms that an element of the weights takes at most to come from memory.
        """
        times = np.maximum([np.median(times) for times in seen.values()], LEAST_MS)
        parts = np.array([_physical(*key, resident) for key in seen])
        products = any(kernel.macs for kernel, _ in seen)
        low, high = np.zeros(parts.shape[1]), np.full(parts.shape[1], np.inf)
        if products:
            low[MACS] = PEAK * peak
        if len({weights for _, weights in seen if _fetched(weights, resident)}) < TOLD:
            parts[:, FETCHED] = 0.0
        high[FETCHED] = fetching
        if prior is None:
            parts[:, STEPS] = 0.0
        elif not products and len(seen) < FEW:
            high[MOVED] = max(SLOWEST * prior.shares[MOVED], LEAST_MS / CACHE)
        trusted = 1 / (times + BLIND_MS)
        rows = parts * trusted[:, None]
        scale = np.maximum(np.abs(rows).max(axis=0), 1e-12)  # a column of zeros stays one
        bounds = low * scale, high * scale
        shares = lsq_linear(rows / scale, times * trusted, bounds, method="bvls").x / scale
        if not products or len(seen) < FEW:
            return _Kernels(resident, shares)
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel

        rest = np.log(times / np.maximum(parts @ shares, LEAST_MS))
        near, noise = ConstantKernel(SPREAD) * RBF(LENGTHS), NOISE + (OFF_MS / times) ** 2
        process = GaussianProcessRegressor(near, alpha=noise, optimizer=None)
        features = np.array([_features(*key) for key in seen])
        process.fit(features, rest - rest.mean())
        return _Kernels(resident, shares, float(rest.mean()), features / LENGTHS, process.alpha_)

    def predict(self, kernels: Sequence[Kernel], weights: float) -> Array:
        parts = np.array([_physical(kernel, weights, self.resident) for kernel in kernels])
        found = np.maximum(parts @ self.shares, LEAST_MS)
        if self.seen is not None:
            here = np.array([_features(k, weights) for k in kernels]) / LENGTHS
            apart = ((here[:, None] - self.seen[None]) ** 2).sum(axis=2)
            learnt = SPREAD * np.exp(-apart / 2) @ self.alpha  # Rasmussen 2006 eq. 2.25
            found = found * np.exp(self.shift + learnt)
        return np.asarray(found)


@dataclass(frozen=True)
class MeasuredNetwork:
    """A measured network: its kernels with the time of each, and its own."""

    name: str
    kernels: list[Kernel]
    times: Array
    total_ms: float
    origin: str = ""
    once_ms: float = 0.0  # of its total, besides the kernels


GROUPS = ("dense", "depthwise", "product", "other")


@dataclass(frozen=True)
class _Fit:
    """Everything learnt about one precision."""

    families: dict[str, _Kernels]
    shares: Array  # of GROUPS; ms for each kernel, and once
    spread: float  # of the logarithm of a network's estimate: its 90 % interval's half width
    basis: str

    @staticmethod
    def of(networks: Sequence[MeasuredNetwork], precision: Precision, basis: str) -> _Fit:
        """Fit, and see what folds of networks that are left out tell."""
        networks = _without_clock(networks)
        off = []
        for fold in range(FOLDS):
            fitted = _fit([n for i, n in enumerate(networks) if i % FOLDS != fold], precision)
            off += [
                abs(math.log(_total(*fitted, n.kernels) / n.total_ms))
                for n in networks[fold::FOLDS]
            ]
        off.sort()
        # the conformal rank: Vovk et al. 2005; with fewer than ten networks, twice the largest
        rank = math.ceil(0.9 * (len(off) + 1))
        spread = off[rank - 1] if rank <= len(off) else 2 * off[-1]
        return _Fit(*_fit(networks, precision), spread, basis)

    def estimate(self, kernels: Sequence[Kernel]) -> Estimate:
        ms = _total(self.families, self.shares, kernels)
        return Estimate(
            p50_ms=ms, low_ms=ms * math.exp(-self.spread), high_ms=ms * math.exp(self.spread),
            method="model", basis=self.basis,
        )  # fmt: skip

    def kernels_ms(self, kernels: Sequence[Kernel], weights: float) -> float:
        """Of these kernels in a network of so many `_weights`, without what a run costs besides."""
        return float(_shares(self.families, kernels, weights)[:-1] @ self.shares[:-1])


def _fit(
    networks: Sequence[MeasuredNetwork], precision: Precision
) -> tuple[dict[str, _Kernels], Array]:
    by_family: dict[str, dict[tuple[Kernel, float], list[float]]] = {"other": {}}
    for net in networks:
        weights = _weights(net.kernels)
        for kernel, ms in zip(net.kernels, net.times, strict=True):
            for name in (_family(kernel), *([] if kernel.macs else ["other"])):
                seen = by_family.setdefault(name, {})
                seen.setdefault((kernel, weights), []).append(float(ms))
    resident = RESIDENT / BYTES[precision]
    peak = min(
        (ms / (k.macs * k.inside) for net in networks for k, ms in zip(net.kernels, net.times,
         strict=True) if k.macs and ms > TIMED_MS), default=0.0,
    )  # fmt: skip
    other = _Kernels.fit(by_family.pop("other"), resident, peak, None)
    families = {"other": other}
    fetching = math.inf
    # dense convolutions first: few others fetch enough to tell what memory gives to all of them
    for name in sorted(by_family, key=lambda name: name != "dense"):
        families[name] = _Kernels.fit(by_family[name], resident, peak, other, fetching)
        if name == "dense":
            fetching = FETCHING * float(families[name].shares[FETCHED]) or math.inf
    rows = np.array([_shares(families, n.kernels) for n in networks])
    rows /= np.array([[n.total_ms] for n in networks])
    # ridge towards the kernels' own times: 20 networks tell little of five factors
    start = np.array([1.0] * len(GROUPS) + [0.0, networks[0].once_ms])
    hold = np.array([RIDGE] * len(GROUPS) + [HELD, HELD_ONCE])
    low = np.array([-np.inf] * (len(GROUPS) + 1) + [0.0])  # running a network costs no less than 0
    left = np.concatenate([np.ones(len(rows)), hold * start])
    shares = lsq_linear(np.vstack([rows, np.diag(hold)]), left, (low, np.inf), method="bvls").x
    return families, shares


def _shares(
    families: dict[str, _Kernels], kernels: Sequence[Kernel], weights: float | None = None
) -> Array:
    """ms in each of GROUPS, the number of kernels, and of networks."""
    if weights is None:
        weights = _weights(kernels)
    found = np.zeros(len(GROUPS) + 2)
    by_family: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_family.setdefault(_family(kernel), []).append(kernel)
    for name, same in by_family.items():
        if same[0].macs:
            kind = name.partition(".")[0]
            group = GROUPS.index("dense" if kind in ("stem", "dense", "grouped") else
                                 "depthwise" if kind == "depthwise" else "product")  # fmt: skip
        else:
            group = GROUPS.index("other")
        near = families.get(name) or families.get(GROUPS[group]) or families["other"]
        found[group] += near.predict(same, weights).sum()
    found[-2:] = len(kernels), 1.0
    return found


def _total(families: dict[str, _Kernels], shares: Array, kernels: Sequence[Kernel]) -> float:
    return max(float(_shares(families, kernels) @ shares), LEAST_MS)


def _without_clock(networks: Sequence[MeasuredNetwork]) -> list[MeasuredNetwork]:
    """Kernel times without what timing each costs, and what a run costs besides its kernels.

    Both are the same for all: those with which the sums fit the networks best. What a network's
    kernels then sum to is scaled to what is left of its time.
    """
    most = min(ONCE_MS[-1], min(n.total_ms for n in networks) / 2)

    def scales(cost: float, once: float) -> Array:
        sums = [np.maximum(n.times - cost, LEAST_MS).sum() for n in networks]
        return np.log([(n.total_ms - once) / s for n, s in zip(networks, sums, strict=True)])

    def misfit(costs: tuple[float, float]) -> float:
        found = scales(*costs)
        return float(np.abs(found - np.median(found)).mean())

    cost, once = min(itertools.product(CLOCK_MS, ONCE_MS[most >= ONCE_MS]), key=misfit)
    return [
        replace(n, times=np.maximum(n.times - cost, LEAST_MS) * math.exp(scale), once_ms=once)
        for n, scale in zip(networks, scales(cost, once), strict=True)
    ]


def _stamp(name: str) -> tuple[str, int]:
    """What tells whether a user's own rows are others than before."""
    own = own_file(name)
    return str(own), own.stat().st_mtime_ns if own.is_file() else 0


@cache
def _fitted(name: str, threads: int, *_: object) -> dict[Precision, _Fit]:
    """Of each precision that enough networks were measured in; once for each `_stamp`."""
    return fit_rows([row for row in read_profile(name) if row.threads == threads])


@cache
def _whole(name: str, threads: int, *_: object) -> tuple[ProfileRow, ...]:
    """Rows of networks, where a target has none of kernels."""
    rows = [row for row in read_profile(name) if row.threads == threads]
    # by name: what `profile --import` brings in stands for itself, see `choosing`
    return tuple(row for row in rows if row.kind == "network" and is_probe(row.network))


def fit_rows(rows: Sequence[ProfileRow]) -> dict[Precision, _Fit]:
    """Fit each precision that at least LEAST_NETWORKS networks were measured in, by kernels."""
    found: dict[Precision, _Fit] = {}
    for precision, networks in measured_networks(rows).items():
        count = sum(len(n.kernels) for n in networks)
        found[precision] = _Fit.of(
            networks,
            precision,
            f"{count} kernels of {len(networks)} networks on {networks[-1].origin}",
        )
    return found


def measured_networks(rows: Sequence[ProfileRow]) -> dict[Precision, list[MeasuredNetwork]]:
    """Networks whose kernels were timed, on the host that measured enough of them last.

    A network that was measured again there counts by its last rows.
    """
    found: dict[Precision, list[MeasuredNetwork]] = {}
    # of each host and version: the reference network's time when it was quietest
    least: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.reference_ms is not None:
            key = row.host, row.runtime_version
            least[key] = min(row.reference_ms, least.get(key, math.inf))
    for precision in dict.fromkeys(row.precision for row in rows):
        by_host: dict[str, dict[str, tuple[ProfileRow, list[ProfileRow]]]] = {}
        for row in (r for r in rows if r.precision == precision):
            networks = by_host.pop(row.host, {})
            by_host[row.host] = networks  # the last comes last
            if row.kind == "network":
                networks[row.network] = row, []
            elif row.network in networks:
                networks[row.network][1].append(row)
        for networks in reversed(by_host.values()):
            timed = [_network(*measured, least) for measured in networks.values() if measured[1]]
            if len(timed) >= LEAST_NETWORKS:
                found[precision] = timed
                break
    return found


def _network(
    whole: ProfileRow, kernels: Sequence[ProfileRow], least: Mapping[tuple[str, str], float]
) -> MeasuredNetwork:
    slower = (
        1.0 if whole.reference_ms is None
        else whole.reference_ms / least[whole.host, whole.runtime_version]
    )  # fmt: skip
    return MeasuredNetwork(
        whole.network, [_kernel(k) for k in kernels], np.array([k.p50_ms for k in kernels]),
        (whole.quiet_ms or whole.p50_ms) / slower,
        f"{whole.host}, {whole.runtime} {whole.runtime_version}, {whole.date}",
    )  # fmt: skip


def leave_one_out(rows: Sequence[ProfileRow]) -> dict[Precision, dict[str, float]]:
    """Of each precision, estimate ÷ measured of each network by a fit to all others."""
    found: dict[Precision, dict[str, float]] = {}
    for precision, networks in measured_networks(rows).items():
        cleaned = _without_clock(networks)
        found[precision] = {
            net.name: _total(*_fit([n for n in cleaned if n is not net], precision), net.kernels)
            / net.total_ms
            for net in cleaned
        }
    return found


def _kernel(row: ProfileRow) -> Kernel:
    return Kernel(**row.model_dump(include=set(Kernel._fields)))


# ---- corrections ---------------------------------------------------------------------------------


def _correction(pairs: Sequence[tuple[Estimate, float]]) -> _Correction:
    """The line through log(measured ÷ estimated), slopes held to 0 by a prior."""
    x = np.log([e.p50_ms for e, _ in pairs])
    y = np.log([ms / e.p50_ms for e, ms in pairs])
    center = float(x.mean())
    rows = np.stack([np.ones_like(x), x - center], axis=1)
    noise, prior = 0.05, np.array([10.0, 0.2])  # standard deviations, of the line's a and b
    a, b = np.linalg.solve(
        rows.T @ rows / noise**2 + np.diag(1 / prior**2), rows.T @ y / noise**2
    )  # fmt: skip
    before = max(math.log(e.high_ms / e.p50_ms) for e, _ in pairs)
    if pairs[0][0].method == "roofline":
        before = min(before, math.log(2.0))  # the same device by now, on other shapes
    rest = y - rows @ np.array([a, b])
    # 1.64 standard deviations are 90 %; the width before counts as two measurements
    spread = math.sqrt((2 * before**2 + (1.64**2) * float(rest @ rest)) / (2 + len(pairs)))
    return _Correction(float(a), float(b), center, spread)


def _corrected(found: Estimate, by: _Correction | None) -> Estimate:
    if by is None:
        return found
    log = math.log(found.p50_ms)
    ms = math.exp(log + by.a + by.b * (log - by.center))
    spread = math.log(found.high_ms / found.p50_ms) if by.spread is None else by.spread
    return found.model_copy(update={
        "p50_ms": ms, "low_ms": ms * math.exp(-spread), "high_ms": ms * math.exp(spread),
        "method": "model", "basis": f"{found.basis}; corrected by measurements",
    })  # fmt: skip


# ---- roofline ------------------------------------------------------------------------------------

RATES: dict[Precision, tuple[tuple[str, float], ...]] = {
    # name of a peak figure -> multiply-accumulates in a ms; each step down in bits doubles a rate
    "fp32": (("fp32_gflops", 0.5e6), ("fp16_gflops", 0.25e6), ("int8_dense_tops", 0.125e9)),
    "fp16": (("fp16_gflops", 0.5e6), ("int8_dense_tops", 0.25e9), ("fp32_gflops", 0.5e6)),
    "int8": (("int8_dense_tops", 0.5e9), ("fp16_gflops", 0.5e6), ("fp32_gflops", 0.5e6)),
}


def roofline(kernels: Sequence[Kernel], target: Target, precision: Precision) -> Estimate:
    """From peak figures: each kernel computes or moves bytes, whichever is slower.

    Williams et al. 2009, doi:10.1145/1498765.1498785. Networks reach less than the peak; how much
    less is not known of this device, so the interval reaches to a tenth of it.

    Raises:
        TargetError: the target's file has no rate, or no memory bandwidth.
    """
    rate = next((target.peak[n] * unit for n, unit in RATES[precision] if n in target.peak), None)
    bandwidth = target.peak.get("memory_gb_s")
    if rate is None or bandwidth is None:
        known = ", ".join(target.peak) or "none"
        raise TargetError(
            f"{target.name}: no roofline from its peak figures ({known}); give memory_gb_s and one "
            f"of {', '.join(n for n, _ in RATES[precision])}, or run: edgekd calibrate --target "
            f"{target.name}"
        )
    size = BYTES[precision]
    bound = sum(
        max(k.macs / rate, (k.reads + k.writes + k.weights) * size / (bandwidth * 1e6))
        for k in kernels
    )
    launches = LAUNCH_MS * len(kernels)
    return Estimate(
        p50_ms=REACHED * bound + launches, low_ms=bound, high_ms=WORST * bound + 2 * launches,
        method="roofline", basis=f"peak figures of {target.title}; nothing was measured",
    )  # fmt: skip
