"""The way to a billion items: a model of exact search by 8-bit codes over shards, checked against what was measured.

A query on one host of c cores that holds n items of width d takes

    t(n) = overhead + max(n bytes / read rate, n / (c scan rate))

if reading and computing overlap (the roofline), and the sum of the two in place of the larger one if they do not. Hosts are counted by
the sum, which rather asks for too many: most of what was measured lies near the roofline. An item has d + 13 bytes (codes, three bounds
in float32, and whether it exists). The read rate is that of memory, measured by adding up an array larger than the caches; overhead and
scan rate come from two tables that fit into the caches. None of the checked points is used. Over s shards the slowest counts, each
answers with k scores, and one host merges them:

    t(n, s) = t(n / s) + round trip + s k 8 bytes / link rate + merge(s k)

The merge is timed here at its true size. What is assumed and not measured says so: the round trip, the link rate, and a larger host.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.harness import say
from cda4rec_jax.bench.retrieval_data import hard_items, hard_queries
from cda4rec_jax.bench.retrieval_sizes import MAPPED, SizesFound
from cda4rec_jax.bench.retrieval_systems import WIDTH
from cda4rec_jax.retrieval import QuantisedIndex
from cda4rec_jax.timing import usable_cores

BOUND_BYTES = 13  # of an item, beside its codes
VECTOR_BYTES = 4 * WIDTH  # of an item on disk, of which a search reads a few hundred
IN_CACHE = (8_192, 65_536)  # items of the tables that give overhead and scan rate; less would not occupy all cores
READ_BYTES = 512 * 2**20
MEMORY_SHARE = 0.8  # of a host's, for the index
ROUND_TRIP_MS, LINK_BYTES_PER_SECOND, RESULT_BYTES = 0.5, 1.25e9, 8  # within a data centre, 10 Gbit/s: assumed
CATALOGUES = (10_000_000, 100_000_000, 1_000_000_000)
DEADLINE_MS = 50.0


@dataclass(frozen=True, kw_only=True)
class Host:
    """What one host can do."""

    name: str
    cores: int
    memory_bytes: int
    read_bytes_per_second: float


LARGE_HOST = Host(name="96 cores, 300 GB/s (assumed)", cores=96, memory_bytes=512 * 2**30, read_bytes_per_second=300e9)


@dataclass(frozen=True, kw_only=True)
class ScaleModel:
    """See the module."""

    bytes_per_item: int
    overhead_ms: float
    scanned_items_per_second: float  # of one core, from its caches

    def scan_ms(self, num_items: int, host: Host, *, overlap: bool = False) -> float:
        """``t(n)`` of the module, with or without overlap."""
        read_s = num_items * self.bytes_per_item / host.read_bytes_per_second
        compute_s = num_items / (host.cores * self.scanned_items_per_second)
        return self.overhead_ms + 1e3 * (max(read_s, compute_s) if overlap else read_s + compute_s)

    def shards(self, num_items: int, host: Host, most_ms: float) -> int:
        """As few as hold the catalogue in memory and scan it in ``most_ms``.

        Raises:
            ValueError: the time is not above what a scan of no item takes.
        """
        left_ms = most_ms - self.overhead_ms
        if left_ms <= 0.0:
            raise ValueError(f"{most_ms} ms leave nothing beside the overhead of a scan")
        by_time = (self.scan_ms(num_items, host) - self.overhead_ms) / left_ms
        return max(1, math.ceil(by_time), math.ceil(num_items * self.bytes_per_item / (MEMORY_SHARE * host.memory_bytes)))


@dataclass(frozen=True, kw_only=True)
class Check:
    """A measured point, and what the model says of it."""

    num_items: int
    measured_ms: float
    roofline_ms: float
    no_overlap_ms: float

    @property
    def errors(self) -> tuple[float, float]:
        """Of the roofline and of the sum, relative to what was measured."""
        return self.roofline_ms / self.measured_ms - 1.0, self.no_overlap_ms / self.measured_ms - 1.0


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Shards of a catalogue, one on each host."""

    host: str
    num_items: int
    shards: int
    memory_bytes_per_host: float
    disk_bytes_per_host: float
    scan_ms: float  # without overlap
    merge_ms: float  # round trip, transfer and merging

    @property
    def query_ms(self) -> float:
        return self.scan_ms + self.merge_ms


@dataclass(frozen=True, kw_only=True)
class ScaleFound:
    """The model with this machine's figures, how far it is off, and what it says of larger catalogues."""

    model: ScaleModel
    host: Host
    checks: tuple[Check, ...]
    deployments: tuple[Deployment, ...]

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "model": asdict(self.model),
            "host": asdict(self.host),
            "assumed": {
                "round_trip_ms": ROUND_TRIP_MS,
                "link_bytes_per_second": LINK_BYTES_PER_SECOND,
                "deadline_ms": DEADLINE_MS,
                "memory_share": MEMORY_SHARE,
                "large_host": LARGE_HOST.name,
            },
            "checks": [{**asdict(check), "errors": check.errors} for check in self.checks],
            "deployments": [{**asdict(one), "query_ms": one.query_ms} for one in self.deployments],
        }

    def print(self, console: Console) -> None:
        """The check, and the path."""
        table = Table(title="One query by 8-bit codes on this machine: model and measurement", box=SIMPLE)
        for column in ("items", "measured p50 ms", "roofline ms", "error", "no overlap ms", "error"):
            table.add_column(column, justify="right")
        for check in self.checks:
            bounds = ((check.roofline_ms, check.errors[0]), (check.no_overlap_ms, check.errors[1]))
            told = (text for bound_ms, error in bounds for text in (f"{bound_ms:.3f}", f"{error:+.0%}"))
            table.add_row(f"{check.num_items:,}", f"{check.measured_ms:.3f}", *told)
        console.print(table)
        path = Table(title=f"Exact search within {DEADLINE_MS:.0f} ms, by the model without overlap", box=SIMPLE)
        path.add_column("host")
        for column in ("items", "hosts", "RAM GiB", "disk GiB", "scan ms", "merge ms", "query ms"):
            path.add_column(column, justify="right")
        for one in self.deployments:
            sizes = (f"{size / 2**30:.2f}" for size in (one.memory_bytes_per_host, one.disk_bytes_per_host))
            taken = (f"{value:.2f}" for value in (one.scan_ms, one.merge_ms, one.query_ms))
            path.add_row(one.host, f"{one.num_items:,}", f"{one.shards:,}", *sizes, *taken)
        console.print(path)
        model, host = self.model, self.host
        roofline, no_overlap = (
            ", ".join(f"{error:+.0%}" for error in errors)
            for errors in zip(*(check.errors for check in self.checks), strict=True)
        )
        lines = [
            f"measured: reads {host.read_bytes_per_second / 1e9:.1f} GB/s, scans {model.scanned_items_per_second / 1e6:.0f} million items "
            f"a second and core from cache, overhead {1e3 * model.overhead_ms:.0f} us, {model.bytes_per_item} bytes an item",
            f"hosts and scans are those without overlap, which is {no_overlap} off the measured points; the roofline is {roofline} off",
            "memory and disk are those of one host",
            f"assumed: round trip {ROUND_TRIP_MS} ms, link {LINK_BYTES_PER_SECOND / 1e9} GB/s; queries come one at a time",
        ]
        say(console, lines)


def measure_scale(sizes: SizesFound, k: int) -> ScaleFound | None:
    """Measure what the model needs, and hold it against the points of the memory-mapped index; None where there are none."""
    points = [point for point in sizes.points if point.system == MAPPED]
    if not points:
        return None
    host = Host(
        name="as this one",
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        read_bytes_per_second=read_rate(READ_BYTES, usable_cores()),
    )
    model = _model(host, k)
    checks = [
        Check(
            num_items=one.num_items,
            measured_ms=one.latency.p50_ms,
            roofline_ms=model.scan_ms(one.num_items, host, overlap=True),
            no_overlap_ms=model.scan_ms(one.num_items, host),
        )
        for one in points
    ]
    return ScaleFound(
        model=model,
        host=host,
        checks=tuple(checks),
        deployments=tuple(
            found
            for each in (host, LARGE_HOST)
            for num_items in CATALOGUES
            if (found := deployment(model, each, num_items, k)) is not None
        ),
    )


def deployment(model: ScaleModel, host: Host, num_items: int, k: int) -> Deployment | None:
    """As few hosts as meet ``DEADLINE_MS`` and hold their shard in memory; None where no number does. The merge is timed here."""
    shards, across_ms = 1, 0.0  # one shard needs no merge
    while (left_ms := DEADLINE_MS - across_ms) > model.overhead_ms:
        needed = model.shards(num_items, host, left_ms)
        if needed <= shards:
            each = math.ceil(num_items / shards)
            return Deployment(
                host=host.name,
                num_items=num_items,
                shards=shards,
                memory_bytes_per_host=float(each * model.bytes_per_item),
                disk_bytes_per_host=float(each * (model.bytes_per_item + VECTOR_BYTES)),
                scan_ms=model.scan_ms(each, host),
                merge_ms=across_ms,
            )
        shards = needed
        across_ms = ROUND_TRIP_MS + 1e3 * shards * k * RESULT_BYTES / LINK_BYTES_PER_SECOND + merge_ms(shards, k)
    return None


def read_rate(num_bytes: int, threads: int) -> float:
    """Bytes a second that threads read of an array of this size, each adding up its part."""
    parts = np.array_split(np.ones(num_bytes // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        taken_s = _median_s(lambda: list(pool.map(np.sum, parts)), 9)
    return num_bytes / taken_s


def merge_ms(shards: int, k: int) -> float:
    """Time to find the best ``k`` among the best ``k`` of each shard."""
    scores = np.random.default_rng(0).random(shards * k)

    def merge() -> np.ndarray:
        best = np.argpartition(-scores, k - 1)[:k] if shards > 1 else np.arange(k)
        return best[np.argsort(-scores[best])]

    return 1e3 * _median_s(merge, 9)


def _model(host: Host, k: int) -> ScaleModel:
    """From tables that fit into the caches: a line through two sizes."""
    queries = hard_queries(64, WIDTH)
    taken = []
    for num_items in IN_CACHE:
        index = QuantisedIndex.build(hard_items(num_items, WIDTH))
        calls = iter(range(1 << 30))
        taken.append(_median_s(lambda index=index, calls=calls: index.search(queries[[next(calls) % 64]], k), 201))
    seconds_per_item = max(1e-12, (taken[1] - taken[0]) / (IN_CACHE[1] - IN_CACHE[0]))
    return ScaleModel(
        bytes_per_item=WIDTH + BOUND_BYTES,
        overhead_ms=1e3 * max(0.0, taken[0] - IN_CACHE[0] * seconds_per_item),
        scanned_items_per_second=1.0 / (seconds_per_item * host.cores),
    )


def _median_s(call: Callable[[], object], calls: int) -> float:
    taken: Sequence[float] = [_seconds(call) for _ in range(calls + 2)][2:]
    return float(np.median(taken))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
