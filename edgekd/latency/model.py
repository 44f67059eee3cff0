"""provisional"""

from __future__ import annotations
from collections.abc import Sequence
from typing import Any, Literal
from pydantic import BaseModel, ConfigDict


class Estimate(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    p50_ms: float
    low_ms: float
    high_ms: float
    method: Literal["model", "roofline"]
    basis: str = ""

    def __str__(self) -> str:
        return f"estimated {self.p50_ms:.3g} ms ({self.low_ms:.3g}-{self.high_ms:.3g})"


class LatencyModel:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    @staticmethod
    def load(target: Any, *, threads: int = 1) -> LatencyModel:
        return LatencyModel()

    @staticmethod
    def basis(target: str) -> str:
        return ""

    def estimate_many(self, nets: Sequence[Any], precision: str) -> list[Estimate]:
        out = []
        for n in nets:
            ops = sum(1 for m in n.module.modules() if type(m).__name__ in ("Conv2d", "Linear"))
            ms = self.scale * (0.008 + ops * 0.004 + n.macs / 60e9 * 1e3 / 3)
            out.append(Estimate(p50_ms=ms, low_ms=ms * 0.8, high_ms=ms * 1.2, method="model"))
        return out

    def corrected(self, measured: Any) -> LatencyModel:
        import math

        r = [math.log(ms / LatencyModel().estimate_many([n], p)[0].p50_ms) for n, p, ms in measured]
        return LatencyModel(math.exp(sum(r) / len(r)))
