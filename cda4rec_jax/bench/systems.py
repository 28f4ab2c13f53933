"""Systems that take inputs in rotation, NumPy to NumPy, times of single calls, and what all benchmarks tell of a row."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, measure


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


@runtime_checkable
class Timed(Protocol):
    """Something whose single calls are timed."""

    @property
    def name(self) -> str: ...
    @property
    def run(self) -> Callable[[Any], object]: ...
    @property
    def inputs(self) -> Sequence[Any]:
        """In rotation."""
        ...


def call_times_ms(systems: Sequence[Timed], calls: int, block: int = 50, most_seconds: float = math.inf) -> dict[str, np.ndarray]:
    """Milliseconds of single calls, where systems take turns of ``block`` calls, a fifth of which come first and are not counted.

    A system that has had ``most_seconds`` has no further turn, and its turn ends then.
    """
    found: dict[str, list[float]] = {one.name: [] for one in systems}
    clock = time.perf_counter_ns
    for turn in range(-(-calls // block)):
        for one in systems:
            run, taken, left_ms = one.run, found[one.name], 1e3 * most_seconds - sum(found[one.name])
            if taken and left_ms <= 0.0:
                continue
            inputs = [one.inputs[(turn * block + call) % len(one.inputs)] for call in range(min(block, calls - turn * block))]
            for given in inputs[: -(-len(inputs) // 5) if most_seconds == math.inf else 1]:
                run(given)
            for given in inputs:
                start = clock()
                run(given)
                taken.append((clock() - start) / 1e6)
                left_ms -= taken[-1]
                if left_ms <= 0.0:
                    break
    return {name: np.asarray(taken) for name, taken in found.items()}


def measure_calls(
    contestants: Sequence[Contestant],
    pairs: Sequence[tuple[str, str]],
    timing: TimingConfig,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Measurement, dict[str, LatencySummary]]:
    """``timing.measure``, and how long its single calls took: of the rounds that count, by contestant.

    For what takes so long that it is not called again for percentiles alone, or what a turn prepares.
    """
    taken: dict[str, list[float]] = {one.name: [] for one in contestants}

    def timed(one: Contestant) -> Contestant:
        def call(number: int) -> float:
            start = time.perf_counter_ns()
            work = one.call(number)
            taken[one.name].append((time.perf_counter_ns() - start) / 1e6)
            return work

        return replace(one, call=call)

    def heard(done: int, total: int) -> None:
        if done == 0:  # warming up, or an attempt that was rejected, lies behind
            for calls in taken.values():
                calls.clear()
        progress(done, total)

    measurement = measure([timed(one) for one in contestants], pairs, timing, progress=heard)
    return measurement, {name: summarise_latency(np.asarray(calls)) for name, calls in taken.items() if calls}


def calls_of(one: System, batch: int) -> Callable[[int], float]:
    """For the harness: one call on the inputs of a number; gives its requests."""

    def call(number: int) -> float:
        one.run(one.inputs[number % len(one.inputs)])
        return float(batch)

    return call


def systems_json(systems: Sequence[System], latency: Mapping[str, LatencySummary], threads: int) -> dict[str, Any]:
    """Version, threads, first call, difference and latency of each, ready for JSON."""
    return {
        one.name: {
            "threads": threads,
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


def first_calls(systems: Sequence[System]) -> str:
    """What was still to be compiled, or to be read from the cache of compiled programs, is in the first call."""
    return "first calls, compiling included: " + ", ".join(f"{one.name} {one.first_call_seconds:.2f} s" for one in systems)


def origin_lines(systems: Sequence[System]) -> list[str]:
    """Versions, what first calls took, and how far outputs are from those they were checked against."""
    versions = ", ".join(dict.fromkeys(one.version for one in systems))
    off = ", ".join(f"{one.name} {one.difference:.0e}" for one in systems if one.difference)
    return [versions, first_calls(systems), f"outputs off by, relative to the largest: {off}"]
