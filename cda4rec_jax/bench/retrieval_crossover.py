"""Our indices against each other by catalogue size and batch, at equal recall, on the present backend.

Items are the generated hard set. An approximate index is built once for each size, and for each recall searched in the cheapest way that
reaches it on both halves of the queries: ScaNN as ``tune_search`` finds it, the partitioned index over the fewest leaves.
This tells from which size on a partition beats brute force, and gives the table of times by which ``retrieval.choose_index`` chooses.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.charts import curves
from cda4rec_jax.bench.harness import OtherLoad, check_folder, is_quiet, measurement_json, say, write_json
from cda4rec_jax.bench.retrieval_data import hard_items, hard_queries
from cda4rec_jax.bench.retrieval_systems import version_of
from cda4rec_jax.bench.retrieval_ways import APPROXIMATE, Searched, built_ways
from cda4rec_jax.bench.systems import measure_calls
from cda4rec_jax.errors import UserError
from cda4rec_jax.metrics.system import LatencySummary
from cda4rec_jax.processor import vector_instructions
from cda4rec_jax.retrieval import IndexTime, IndexTimes
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, usable_cores

RECALLS, BATCHES = (0.95, 0.99), (1, 256)
NUM_QUERIES = 512
MOST_SORTED = 2**25  # scores of a batch: approx_max_k sorts them on a CPU, and is left out where there are more


@dataclass(frozen=True, kw_only=True)
class CrossoverPoint:
    """All ways on one catalogue, at one batch size."""

    num_items: int
    batch: int
    ways: tuple[Searched, ...]
    first_call_seconds: Mapping[str, float]  # in such a batch, for which JAX compiles, by name
    latency: Mapping[str, LatencySummary]  # of single calls, in the rounds, by name
    measurement: Measurement
    others: OtherLoad

    def beats_exact(self, name: str) -> bool:
        """Whether it was there and faster than exact search in at least nine tenths of the rounds."""
        return name in self.measurement.rates and self.measurement.ratio(name, self.exact).p10 > 1.0

    @property
    def calls_ms(self) -> dict[str, float]:
        """Median time of a batch, NumPy to NumPy, by way."""
        return {name: 1e3 / rate.median for name, rate in self.measurement.rates.items()}

    @property
    def exact(self) -> str:
        """Exact search, as it is here."""
        return self.ways[0].name

    def way_json(self, way: Searched) -> dict[str, Any]:
        """A row, ready for JSON."""
        return {
            **way.json(),
            "threads": usable_cores(),
            "version": version_of(None),
            "first_call_seconds": self.first_call_seconds[way.name],
            "latency": asdict(self.latency[way.name]),
        }

    @property
    def quiet(self) -> bool:
        """Whether to believe it."""
        return is_quiet(self.measurement, self.others)


@dataclass(frozen=True, kw_only=True)
class CrossoverBenchmark:
    """All that was found."""

    backend: str  # of JAX
    device: str
    width: int
    k: int
    points: tuple[CrossoverPoint, ...]  # by batch, then by size
    provenance: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Of all ways."""
        return list(dict.fromkeys(way.name for point in self.points for way in point.ways))

    @property
    def batches(self) -> list[int]:
        return list(dict.fromkeys(point.batch for point in self.points))

    def crossover(self, name: str, batch: int) -> int | None:
        """The smallest measured catalogue from which on a way always beat exact search; None if it did not on the largest."""
        found = None
        for point in sorted((one for one in self.points if one.batch == batch), key=lambda one: -one.num_items):
            if not point.beats_exact(name):
                break
            found = point.num_items
        return found

    def crossovers(self, batch: int) -> dict[str, int | None]:
        """Of every way but exact search itself."""
        return {name: self.crossover(name, batch) for name in self.names[1:]}

    def times(self) -> IndexTimes:
        """What ``choose_index`` chooses by."""
        calls: dict[tuple[int, str], tuple[float, ...]] = {}
        for point in self.points:
            for way in point.ways:
                key = point.num_items, way.name
                calls[key] = (*calls.get(key, ()), point.calls_ms[way.name])
        rows = [
            IndexTime(
                way=way.way,
                num_items=point.num_items,
                recall=way.wanted,
                call_ms=calls[point.num_items, way.name],
                leaf_share=way.leaf_share,
                reordered=way.reordered,
            )
            for point in self.points
            if point.batch == self.batches[0]
            for way in point.ways
            if way.way != APPROXIMATE
        ]
        return IndexTimes(
            backend=self.backend,
            instructions=vector_instructions() if self.backend == "cpu" else None,
            width=self.width,
            k=self.k,
            batches=tuple(self.batches),
            rows=tuple(rows),
            disturbed=tuple((point.num_items, point.batch) for point in self.points if not point.quiet),
            provenance={**self.provenance, "quiet": all(point.quiet for point in self.points)},
        )

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "benchmark": "retrieval crossover",
            "device": self.device,
            "threads": usable_cores(),
            "width": self.width,
            "k": self.k,
            "crossover": {str(batch): self.crossovers(batch) for batch in self.batches},
            "points": [
                {
                    "num_items": one.num_items,
                    "batch": one.batch,
                    "ways": {way.name: one.way_json(way) for way in one.ways},
                    "measurement": measurement_json(one.measurement, one.others),
                }
                for one in self.points
            ],
            "provenance": self.provenance,
        }

    def chart(self, path: Path) -> bool:
        """Time of a call by catalogue size, a panel for each batch."""
        panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for point in self.points:
            lines = panels.setdefault(f"batches of {point.batch:,}, {self.device}", {})
            for way in point.ways:
                x, y = lines.setdefault(way.name, ([], []))
                x.append(float(point.num_items))
                y.append(point.calls_ms[way.name])
        exact = [way.name for point in self.points for way in point.ways if way.wanted == 1.0]
        return curves(path, panels, "items", ["ms"] * len(panels), exact, log_x=True)

    def print(self, console: Console) -> None:
        """A row for each catalogue and batch, from which size on a way pays, and how it was measured."""
        table = Table(title=f"Milliseconds of a call on {self.device}: top {self.k} of {self.width} dimensions", box=SIMPLE)
        for column in ("items", "batch", *self.names):
            table.add_column(column, justify="right")
        for one in self.points:
            cells = [f"{one.calls_ms[name]:,.3g}" if name in one.calls_ms else "-" for name in self.names]
            table.add_row(f"{one.num_items:,}", f"{one.batch:,}", *cells)
        console.print(table)
        lines = [self._verdict(batch) for batch in self.batches]
        first, nulls = self.points[0], [null for one in self.points for null in one.measurement.nulls.values()]
        lines.append(
            f".95 is the recall that was wanted and reached; {first.measurement.rounds} rounds in turns in one process, {usable_cores()} "
            f"threads; nulls from {min(nulls):.3f} to {max(nulls):.3f}"
        )
        if any(APPROXIMATE not in one.measurement.rates for one in self.points):
            lines.append(f"{APPROXIMATE} is left out where it would sort more than {MOST_SORTED:,} scores")
        lines += [f"NOT QUIET: {one.num_items:,} items, batches of {one.batch:,}" for one in self.points if not one.quiet]
        say(console, lines)

    def _verdict(self, batch: int) -> str:
        told = [
            f"{name} {f'from {size:,} items on' if size else 'not at the largest'}"
            for name, size in self.crossovers(batch).items()
        ]
        return f"beats exact search in batches of {batch:,}: {', '.join(told)}"


def check_crossover(sizes: Sequence[int], batches: Sequence[int], k: int, recalls: Sequence[float] = RECALLS) -> None:
    """UserError on what cannot be measured."""
    if not sizes or not batches or min((*batches, k)) < 1 or min(sizes) <= k or max(batches) > NUM_QUERIES:
        raise UserError(
            f"got sizes {tuple(sizes)}, batches {tuple(batches)} and k {k}: expected more than k items, and batches of 1 to "
            f"{NUM_QUERIES} queries"
        )
    if not recalls or min(recalls) <= 0.0 or max(recalls) >= 1.0:
        raise UserError(f"got recalls {tuple(recalls)}: expected numbers between 0 and 1; exact search is always measured")


def bench_crossover(
    sizes: Sequence[int],
    *,
    batches: Sequence[int] = BATCHES,
    width: int = 64,
    k: int = 100,
    recalls: Sequence[float] = RECALLS,
    timing: TimingConfig,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> CrossoverBenchmark:
    """Measure on the present backend, and write JSON, a chart and the table of times for ``choose_index`` into ``out``, after each size.

    Args:
        sizes: items of each catalogue.
        batches: queries of one call.
        width: dimensions, at least 24.
        k: items to find.
        recalls: recall@k that approximate search must reach, one or more.
        timing: how much to measure.
        out: folder of the results.
        progress: hears of the stage, and how much of it is done.

    Raises:
        UserError: bad sizes, batches, width, k, recalls or folder.
    """
    check_crossover(sizes, batches, k, recalls)
    folder, device = check_folder(out), jax.devices()[0]
    result = CrossoverBenchmark(
        backend=jax.default_backend(),
        device=f"{device.platform} {device.device_kind}" if device.platform != "cpu" else f"cpu, {usable_cores()} cores",
        width=width,
        k=k,
        points=(),
        provenance=provenance(dataset_fingerprint=f"hard items of width {width}, seed 0"),
    )
    for size in sorted(sizes):
        progress(f"crossover, {size:,} items: building", 0, 1)
        queries = hard_queries(NUM_QUERIES, width)
        ways = built_ways(hard_items(size, width), queries, k, recalls, max(batches))
        points = [_point(size, batch, ways, queries, timing, progress) for batch in sorted(batches)]
        by_batch = sorted((*result.points, *points), key=lambda one: (one.batch, one.num_items))
        result = replace(result, points=tuple(by_batch))
        write_json(folder / "retrieval-crossover.json", result.json())
        result.times().save(folder)
        result.chart(folder / "retrieval-crossover.png")
    return result


def _point(
    size: int,
    batch: int,
    ways: Sequence[Searched],
    queries: Float[np.ndarray, "n d"],
    timing: TimingConfig,
    progress: Callable[[str, int, int], None],
) -> CrossoverPoint:
    too_many = jax.default_backend() == "cpu" and size * batch > MOST_SORTED
    ways = [way for way in ways if not (way.way == APPROXIMATE and too_many)]
    contestants, first_call_seconds = [_contestant(way, queries, batch) for way in ways], {}
    for one in contestants:
        start = time.perf_counter()
        one.call(0)
        first_call_seconds[one.name] = time.perf_counter() - start
    with OtherLoad() as others:
        measurement, latency = measure_calls(
            contestants,
            [(way.name, ways[0].name) for way in ways[1:]],
            timing,
            progress=partial(progress, f"crossover, {size:,} items, batches of {batch:,}"),
        )
    return CrossoverPoint(
        num_items=size,
        batch=batch,
        ways=tuple(ways),
        first_call_seconds=first_call_seconds,
        latency=latency,
        measurement=measurement,
        others=others,
    )


def _contestant(way: Searched, queries: Float[np.ndarray, "n d"], batch: int) -> Contestant:
    parts = [queries[start : start + batch] for start in range(0, len(queries) - batch + 1, batch)]

    def call(number: int) -> float:
        way.search(parts[number % len(parts)])
        return 1.0

    return Contestant(name=way.name, call=call)
