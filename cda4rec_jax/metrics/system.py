"""Metrics of the running system."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class LatencySummary:
    """Latency of ``count`` requests. Percentiles are latencies that occurred (nearest rank), never interpolated."""

    count: int
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


def summarise_latency(latencies_ms: Float[np.ndarray, "b"]) -> LatencySummary:
    """Summary of latencies in milliseconds.

    Raises:
      ValueError: No request, or a latency that is NaN, infinite or negative.
    """
    if latencies_ms.size == 0:
        raise ValueError("no latencies; expected at least one request.")
    if not np.all(np.isfinite(latencies_ms) & (latencies_ms >= 0)):
        raise ValueError("latencies hold a value that is NaN, infinite or negative; expected milliseconds.")
    p50_ms, p95_ms, p99_ms = (float(p) for p in np.percentile(latencies_ms, [50, 95, 99], method="inverted_cdf"))
    return LatencySummary(
        count=latencies_ms.size,
        mean_ms=float(latencies_ms.mean()),
        p50_ms=p50_ms,
        p95_ms=p95_ms,
        p99_ms=p99_ms,
        max_ms=float(latencies_ms.max()),
    )
