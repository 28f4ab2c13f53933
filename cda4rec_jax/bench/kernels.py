"""``cda4rec bench kernels``: every implementation of every kernel, beside plain JAX and as a share of what the machine can do."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.harness import (
    OtherLoad,
    check_folder,
    in_full,
    is_quiet,
    measurement_json,
    megabytes,
    say,
    times,
    write_json,
)
from cda4rec_jax.bench.retrieval_systems import version_of
from cda4rec_jax.bench.systems import call_times_ms
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy import bench as linear_cross_entropy
from cda4rec_jax.kernels.rank_candidates import bench as rank_candidates
from cda4rec_jax.kernels.segment_attention import bench as segment_attention
from cda4rec_jax.kernels.topk_dot import bench as topk_dot
from cda4rec_jax.kernels.workloads import DevicePeer, Workload
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import Contestant, Measurement, Spread, TimingConfig, measure, usable_cores

# A further kernel is one line here.
KERNELS: Mapping[str, Callable[[str], Iterator[Workload]]] = {
    "topk_dot": topk_dot.workloads,
    "segment_attention": segment_attention.workloads,
    "linear_cross_entropy": linear_cross_entropy.workloads,
    "rank_candidates": rank_candidates.workloads,
}
LOOPS = 20  # calls in one program on an accelerator, so that the host is not what is measured
CPU_CEILING, ACCELERATOR_CEILING = (2**28, 1024), (2**31, 8192)  # bytes that are copied, and size of the matrices
PRODUCTS = 4  # of a call
CALLS, MOST_SECONDS = 100, 1.0
COPY = "copy"


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine can do, measured."""

    copy_bytes_per_second: float  # read and written
    flops_per_second: Mapping[str, float]  # of products of large matrices, by dtype


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation on one workload."""

    implementation: str
    version: str
    threads: int
    ms: Spread
    times_as_fast: Spread  # as the baseline, in turns; 1 for itself
    copy_share: float  # bytes that must move over the copy rate
    matmul_share: float  # operations that are needed over the rate of large products
    temporary_bytes: int | None  # by XLA's plan; None for peers, and where the backend has none
    compile_seconds: float | None  # None for peers, which prepare in their first call what they do
    first_call_seconds: float  # after compiling
    difference: float  # from the baseline's output, as the workload counts it
    latency: LatencySummary  # of single calls, from the host on accelerators, where ``ms`` is of many in one program


@dataclass(frozen=True, kw_only=True)
class WorkloadFound:
    """All implementations on one workload."""

    kernel: str
    name: str
    shapes: str
    baseline: str
    rows: tuple[Row, ...]
    left_out: Mapping[str, str]  # peers that were not measured, and why
    measurement: Measurement
    others: OtherLoad

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        told = {key: getattr(self, key) for key in ("kernel", "name", "shapes", "baseline", "left_out")}
        return {
            **told,
            "rows": [asdict(row) for row in self.rows],
            "measurement": measurement_json(self.measurement, self.others),
        }


@dataclass(frozen=True, kw_only=True)
class KernelsBenchmark:
    """All that was found."""

    backend: str
    ceilings: Ceilings
    workloads: tuple[WorkloadFound, ...]
    provenance: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "benchmark": "kernels",
            "backend": self.backend,
            "threads": usable_cores(),
            "ceilings": asdict(self.ceilings),
            "workloads": [one.json() for one in self.workloads],
            "provenance": self.provenance,
        }

    def print(self, console: Console) -> None:
        """A table for each workload, and the ceilings."""
        for found in self.workloads:
            quiet = "" if is_quiet(found.measurement, found.others) else "; NOT QUIET: read the ratios loosely"
            table = Table(title=f"{found.kernel}, {found.name}: {found.shapes}{quiet}", box=SIMPLE, padding=(0, 1, 0, 0))
            table.add_column("implementation")
            for column in ("ms", f"x {found.baseline}", "copy rate", "matmul rate", "temp MB", "compile s"):
                table.add_column(column, justify="right")
            for row in found.rows:
                memory = "" if row.temporary_bytes is None else megabytes(row.temporary_bytes)
                compiling = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}"
                shares = (f"{row.copy_share:.0%}", f"{row.matmul_share:.0%}")
                table.add_row(row.implementation, f"{row.ms.median:.3f}", times(row.times_as_fast), *shares, memory, compiling)
            console.print(table)
            beside = [one for one in found.measurement.comparisons if one.other != found.baseline]
            lines = [f"{one.name} is {times(one.ratio)} times as fast as {one.other}" for one in beside]
            say(console, [*lines, *(f"not measured: {name} ({why})" for name, why in found.left_out.items())])
        rates = ", ".join(f"{dtype} {rate / 1e12:.2f} TFLOP/s" for dtype, rate in self.ceilings.flops_per_second.items())
        versions = dict.fromkeys(row.version for found in self.workloads for row in found.rows)
        lines = [
            f"measured on {', '.join(self.provenance['devices'])} ({self.backend}), {usable_cores()} threads: copy "
            f"{self.ceilings.copy_bytes_per_second / 1e9:.1f} GB/s, products of large matrices {rates}",
            "copy rate: the share of it at which inputs and outputs move; matmul rate: the share of it at which the products that the "
            "result needs are computed; what an implementation does twice does not count",
            f"ratios are medians of the rounds' ratios with their 10th to 90th percentile; versions: {', '.join(versions)}",
        ]
        say(console, lines)


def bench_kernels(
    *,
    only: tuple[str, ...] | None = None,
    timing: TimingConfig,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> KernelsBenchmark:
    """Measure on the backend at hand, and write JSON into ``out`` after each workload, so that what was measured is kept.

    Args:
        only: names of ``KERNELS``; None takes all.
        timing: how much to measure.
        out: folder of the result.
        progress: hears of the stage, and how much of it is done.

    Raises:
        UserError: an unknown kernel, a bad folder, or an implementation whose output is not that of the baseline.
    """
    unknown = sorted({*(only or ())} - {*KERNELS})
    if unknown:
        raise UserError(f"unknown kernel {', '.join(unknown)}: choose from {', '.join(KERNELS)}")
    folder, backend = check_folder(out), jax.default_backend()
    progress("ceilings", 0, 1)
    ceilings = measure_ceilings(backend, timing)
    progress("ceilings", 1, 1)
    origin = provenance(dataset_fingerprint="random inputs, seed 0")
    result = KernelsBenchmark(backend=backend, ceilings=ceilings, workloads=(), provenance=origin)
    for kernel in only or KERNELS:
        for workload in KERNELS[kernel](backend):
            heard = partial(progress, f"{kernel}, {workload.name}")
            with in_full(workload.dtype):
                found = measure_workload(workload, backend, ceilings, timing, heard)
            result = replace(result, workloads=(*result.workloads, found))
            write_json(folder / f"kernels-{backend}.json", result.json())
    return result


@dataclass(frozen=True, kw_only=True)
class Ready:
    """An implementation that can be called."""

    name: str
    version: str
    run: Callable[[int], Any]  # the work of one number; gives its output, which may not be there yet
    single: Callable[[int], Any]  # the same, but one call of the kernel alone
    inputs: Sequence[int]
    first_call_seconds: float
    calls_per_run: int = 1
    temporary_bytes: int | None = None
    compile_seconds: float | None = None

    def call(self, number: int) -> float:
        """For the harness: waits for the output; gives how many calls of the kernel that was."""
        jax.block_until_ready(self.run(number))
        return float(self.calls_per_run)


def measure_workload(
    workload: Workload, backend: str, ceilings: Ceilings, timing: TimingConfig, progress: Callable[[int, int], None]
) -> WorkloadFound:
    """Compile, compare outputs, then time in turns."""
    ready = {name: _program(workload, name, backend) for name in workload.programs}
    ready |= {name: _peer(workload, name) for name in workload.peers}
    ready |= {name: _device_peer(name, peer) for name, peer in workload.device_peers.items()}
    differences = _require_equal_outputs(workload)
    pairs = [(name, workload.baseline) for name in ready if name != workload.baseline]
    pairs += [(name, peer) for peer in workload.device_peers for name in workload.programs if name != workload.baseline]
    with OtherLoad() as others:
        measurement = measure(
            [Contestant(name=one.name, call=one.call) for one in ready.values()], pairs, timing, progress=progress
        )
        waiting = [replace(one, run=lambda number, one=one: jax.block_until_ready(one.single(number))) for one in ready.values()]
        single = call_times_ms(waiting, CALLS, most_seconds=MOST_SECONDS)
    return WorkloadFound(
        kernel=workload.kernel,
        name=workload.name,
        shapes=workload.shapes,
        baseline=workload.baseline,
        rows=tuple(_row(workload, one, ceilings, measurement, single[one.name], differences[one.name]) for one in ready.values()),
        left_out=workload.left_out,
        measurement=measurement,
        others=others,
    )


def _row(
    workload: Workload, one: Ready, ceilings: Ceilings, measurement: Measurement, single: np.ndarray, difference: float
) -> Row:
    rate = measurement.rates[one.name]
    is_baseline = one.name == workload.baseline
    return Row(
        implementation=one.name,
        version=one.version,
        threads=usable_cores(),
        ms=Spread(median=1e3 / rate.median, p10=1e3 / rate.p90, p90=1e3 / rate.p10),
        times_as_fast=Spread.of([1.0]) if is_baseline else measurement.ratio(one.name, workload.baseline),
        copy_share=workload.bytes_moved * rate.median / ceilings.copy_bytes_per_second,
        matmul_share=workload.flops * rate.median / ceilings.flops_per_second[workload.dtype],
        temporary_bytes=one.temporary_bytes,
        compile_seconds=one.compile_seconds,
        first_call_seconds=one.first_call_seconds,
        difference=difference,
        latency=summarise_latency(single),
    )


def _program(workload: Workload, name: str, backend: str) -> Ready:
    """One call a run on a CPU; ``LOOPS`` calls in one program elsewhere, each on the next batch."""
    function, constants, batches = workload.programs[name], workload.constants, workload.batches
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*constants, *batches[0]).compile()
    compile_seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()

    def run(number: int) -> Any:
        return compiled(*constants, *batches[number % len(batches)])

    unmeasured = Ready(
        name=name,
        version=f"jax {jax.__version__}",
        run=run,
        single=run,
        first_call_seconds=_seconds(run),
        inputs=range(len(batches)),
        temporary_bytes=None if analysis is None else analysis.temp_size_in_bytes,
        compile_seconds=compile_seconds,
    )
    if backend == "cpu":
        return unmeasured
    loop = jax.jit(partial(in_a_loop, function))
    stacked = tuple(jnp.stack(column) for column in zip(*batches, strict=True))
    return replace(unmeasured, run=lambda number: loop(constants, stacked, number, LOOPS), calls_per_run=LOOPS)


def in_a_loop(function: Callable[..., Any], constants: tuple[Any, ...], stacked: tuple[Any, ...], first: Any, count: Any) -> Any:
    """Output of the last of ``count`` calls, on batches in rotation; the whole output is carried, so that none of it is left out."""

    def one(number: Any, _: Any) -> Any:
        place = (first + number) % stacked[0].shape[0]
        return function(*constants, *(jax.lax.dynamic_index_in_dim(column, place, keepdims=False) for column in stacked))

    shapes = jax.eval_shape(one, 0, None)
    start = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.fori_loop(0, count, one, start)


def _peer(workload: Workload, name: str) -> Ready:
    batches = [tuple(np.asarray(array) for array in batch) for batch in workload.batches]
    peer = workload.peers[name]

    def run(number: int) -> Any:
        return peer(*batches[number % len(batches)])

    return Ready(
        name=name,
        version=version_of(_package(name)),
        run=run,
        single=run,
        first_call_seconds=_seconds(run),
        inputs=range(len(batches)),
    )


def _device_peer(name: str, peer: DevicePeer) -> Ready:
    """``LOOPS`` calls are on their way at the same time, so that the host is not what is measured."""

    def many(number: int) -> None:
        for call in range(LOOPS):
            peer.start(number + call)
        peer.wait()

    def single(number: int) -> None:
        peer.start(number)
        peer.wait()

    return Ready(
        name=name,
        version=version_of(_package(name)),
        run=many,
        single=single,
        first_call_seconds=_seconds(single),
        inputs=range(LOOPS),
        calls_per_run=LOOPS,
    )


def _package(peer: str) -> str:
    return peer.split()[0].removesuffix(",")


def _seconds(run: Callable[[int], Any]) -> float:
    """Of the first call."""
    start = time.perf_counter()
    jax.block_until_ready(run(0))
    return time.perf_counter() - start


def _require_equal_outputs(workload: Workload) -> dict[str, float]:
    """How far each output is from that of the baseline. UserError where that is more than it may be."""
    batch = workload.batches[0]
    expected = jax.jit(workload.programs[workload.baseline])(*workload.constants, *batch)
    differences = {}
    for name in (*workload.programs, *workload.peers, *workload.device_peers):
        tolerance = workload.tolerance
        if name in workload.programs:
            found = jax.jit(workload.programs[name])(*workload.constants, *batch)
        elif name in workload.peers:
            found = workload.peers[name](*(np.asarray(array) for array in batch))
        else:
            peer = workload.device_peers[name]
            found, tolerance = peer.result(peer.start(0)), tolerance if peer.tolerance is None else peer.tolerance
        differences[name] = off = workload.difference(found, expected)
        if not off <= tolerance:
            raise UserError(
                f"{workload.kernel}, {workload.name}: {name!r} is {off:.1e} off {workload.baseline!r}, more than {tolerance}, so "
                "speeds say nothing. This is a bug to report"
            )
    return differences


def measure_ceilings(backend: str, timing: TimingConfig) -> Ceilings:
    """A copy of an array larger than any cache, and products of large matrices, each a chain within one program."""
    num_bytes, size = CPU_CEILING if backend == "cpu" else ACCELERATOR_CEILING
    array = jnp.ones(num_bytes // 4, jnp.float32)
    moved = jax.jit(lambda x, count: jax.lax.fori_loop(0, count, lambda _, y: y + 1.0, x))
    loops = 1 if backend == "cpu" else LOOPS

    def copy(number: int) -> float:
        jax.block_until_ready(moved(array, loops))
        return 2.0 * num_bytes * loops

    contestants = [Contestant(name=COPY, call=copy), *(_products(dtype, size) for dtype in ("float32", "bfloat16"))]
    found = measure(contestants, [(one.name, one.name) for one in contestants], replace(timing, attempts=1))
    rates = {name: rate.median for name, rate in found.rates.items()}
    return Ceilings(copy_bytes_per_second=rates.pop(COPY), flops_per_second=rates)


def _products(dtype: str, size: int) -> Contestant:
    """Each of the result of the one before."""
    keys = jax.random.split(jax.random.key(0), 2)
    weights, start = (jax.random.normal(key, (size, size), dtype) * jnp.asarray(size**-0.5, dtype) for key in keys)
    chain = jax.jit(lambda weights, start: jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ weights, start))

    def call(number: int) -> float:
        with in_full(dtype):
            jax.block_until_ready(chain(weights, start))
        return PRODUCTS * 2.0 * size**3

    return Contestant(name=dtype, call=call)
