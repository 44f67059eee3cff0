"""Which kernels a runtime makes of a traced module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgekd.errors import TargetError, nearest
from edgekd.latency.exported import as_exported
from edgekd.latency.kernels import Kernel
from edgekd.latency.onnxruntime_kernels import onnxruntime_floats, onnxruntime_integers
from edgekd.latency.openvino_kernels import openvino_kernels
from edgekd.latency.tracing import Op
from edgekd.target import QuantScheme

# (runtime, in integers) -> its rules
RULES: dict[tuple[str, bool], Callable[[Sequence[Op], QuantScheme | None], list[Kernel]]] = {
    ("onnxruntime", False): onnxruntime_floats,
    ("onnxruntime", True): onnxruntime_integers,
    ("openvino", False): openvino_kernels,
    ("openvino", True): openvino_kernels,
}


def kernels_of(ops: Sequence[Op], runtime: str, scheme: QuantScheme | None) -> list[Kernel]:
    """The kernels that a runtime makes of a traced module.

    Args:
        scheme: of the integers; None: in float.

    Raises:
        TargetError: there are no rules for this runtime.
    """
    key = runtime, scheme is not None
    if key not in RULES:
        known = {name for name, _ in RULES}
        raise TargetError(f"no fusion rules for runtime {runtime!r}{nearest(runtime, known)}")
    return RULES[key](as_exported(ops), scheme)
