"""What ``bench plan`` and ``bench rank`` measure: systems that take inputs in rotation, NumPy to NumPy, and what is told of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cda4rec_jax.metrics.system import LatencySummary


@dataclass(frozen=True, kw_only=True)
class System:
    """One system at one batch size."""

    name: str
    version: str
    against: tuple[str, ...]  # systems of ours with which it is compared
    run: Callable[[Any], object]  # to NumPy, from a row (batch 1, ours), rows, or what ``inputs`` are made of
    inputs: Sequence[Any]  # in rotation
    first_call_seconds: float = 0.0
    difference: float = 0.0  # from our outputs, relative to the largest


def started(one: System) -> System:
    """After its first call, which compiles."""
    start = time.perf_counter()
    one.run(one.inputs[0])
    return replace(one, first_call_seconds=time.perf_counter() - start)


def call_times_ms(systems: Sequence[System], calls: int, block: int = 50) -> dict[str, np.ndarray]:
    """Milliseconds of single calls, where systems take turns of ``block`` calls, the first of which are not counted."""
    found: dict[str, list[float]] = {one.name: [] for one in systems}
    clock = time.perf_counter_ns
    for turn in range(-(-calls // block)):
        for one in systems:
            run, taken = one.run, found[one.name]
            inputs = [one.inputs[(turn * block + call) % len(one.inputs)] for call in range(block)]
            for given in inputs[: block // 5]:
                run(given)
            for given in inputs:
                start = clock()
                run(given)
                taken.append((clock() - start) / 1e6)
    return {name: np.asarray(taken) for name, taken in found.items()}


def calls_of(one: System, batch: int) -> Callable[[int], float]:
    """For the harness: one call on the inputs of a number; gives its requests."""

    def call(number: int) -> float:
        one.run(one.inputs[number % len(one.inputs)])
        return float(batch)

    return call


def systems_json(systems: Sequence[System], latency: Mapping[str, LatencySummary]) -> dict[str, Any]:
    """Version, first call, difference and latency of each, ready for JSON."""
    return {
        one.name: {
            "version": one.version,
            "first_call_seconds": one.first_call_seconds,
            "difference": one.difference,
            "latency": asdict(latency[one.name]),
        }
        for one in systems
    }


def percentile_cells(latency: LatencySummary) -> list[str]:
    """p50, p95 and p99 in microseconds, for a table."""
    return [f"{1e3 * value:,.1f}" for value in (latency.p50_ms, latency.p95_ms, latency.p99_ms)]


def origin_lines(systems: Sequence[System]) -> list[str]:
    """Versions, what first calls took, and how far outputs are from those they were checked against."""
    versions = ", ".join(dict.fromkeys(one.version for one in systems))
    first = ", ".join(f"{one.name} {one.first_call_seconds:.2f} s" for one in systems)
    off = ", ".join(f"{one.name} {one.difference:.0e}" for one in systems if one.difference)
    return [f"{versions}; first call, compiling included: {first}", f"outputs off by, relative to the largest: {off}"]
