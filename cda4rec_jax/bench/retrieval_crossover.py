"""From which catalogue size on the partitioned index beats brute force on the present backend; ScaNN on the host beside them.

Items are the generated hard set. For each size the partitioned index is built once, and searches the fewest leaves that reach the target on
one half of the queries; recall is reported on the other half. ScaNN searches as many leaves of its own, and scores as many items again.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.harness import OtherLoad, check_folder, measurement_json, method_lines, times, write_json
from cda4rec_jax.bench.retrieval_data import hard_items, hard_queries
from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval import (
    ExactIndex,
    PartitionedConfig,
    PartitionedIndex,
    ScannConfig,
    ScannIndex,
    exact_search,
    mean_recall,
    scann_available,
)
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, measure, usable_cores

PARTITIONED, EXACT, APPROXIMATE, SCANN = "partitioned", "exact", "approx_max_k", "ScaNN on the host"
SIZES, BATCHES = (10_000, 30_000, 100_000, 300_000), (1, 256)
SHARES = (
    1 / 64,
    1 / 32,
    1 / 16,
    3 / 32,
    1 / 8,
    3 / 16,
    1 / 4,
    5 / 16,
    3 / 8,
    1 / 2,
    1.0,
)  # of the leaves, of which one is chosen
NUM_QUERIES = 512
TIMING = TimingConfig()
Search = Callable[[Float[np.ndarray, "b d"]], Int[np.ndarray, "b k"]]


@dataclass(frozen=True, kw_only=True)
class CrossoverPoint:
    """All systems on one catalogue, at one batch size."""

    num_items: int
    batch: int
    leaves: int
    leaves_searched: int
    reordered: int  # items scored exactly
    build_seconds: float  # of the partitioned index, compiling included
    recall: dict[str, float]  # by system
    measurement: Measurement
    others: OtherLoad

    @property
    def wins(self) -> bool:
        """Whether the partitioned index beats brute force, in at least nine tenths of the rounds."""
        return self.measurement.ratio(PARTITIONED, EXACT).p10 > 1.0

    def call_ms(self, system: str) -> float | None:
        """Median time of a batch, NumPy to NumPy; None where the system is not there."""
        return 1e3 / self.measurement.rates[system].median if system in self.measurement.rates else None


@dataclass(frozen=True, kw_only=True)
class CrossoverBenchmark:
    """All that was found."""

    device: str
    width: int
    k: int
    target: float
    points: tuple[CrossoverPoint, ...]  # by batch, then by size
    provenance: dict[str, Any]

    def crossover(self, batch: int) -> int | None:
        """The smallest measured catalogue from which on the partitioned index always won; None if it lost on the largest."""
        found = None
        for point in sorted((one for one in self.points if one.batch == batch), key=lambda one: -one.num_items):
            if not point.wins:
                break
            found = point.num_items
        return found

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "benchmark": "retrieval crossover",
            "device": self.device,
            "threads": usable_cores(),
            "width": self.width,
            "k": self.k,
            "target_recall": self.target,
            "crossover": {str(batch): self.crossover(batch) for batch in dict.fromkeys(one.batch for one in self.points)},
            "points": [
                {
                    "num_items": one.num_items,
                    "batch": one.batch,
                    "leaves": one.leaves,
                    "leaves_searched": one.leaves_searched,
                    "reordered": one.reordered,
                    "build_seconds": one.build_seconds,
                    "recall": one.recall,
                    "measurement": measurement_json(one.measurement, one.others),
                }
                for one in self.points
            ],
            "provenance": self.provenance,
        }

    def table(self) -> Table:
        """A row for each catalogue and batch."""
        title = f"Top {self.k} of {self.width}-dimensional items on {self.device}, recall@{self.k} of {self.target:g} wanted"
        table = Table(title=title, box=SIMPLE)
        systems = (PARTITIONED, SCANN, APPROXIMATE, EXACT)
        for column in ("items", "batch", "leaves", *(f"{name} ms (recall)" for name in systems), "faster than exact"):
            table.add_column(column, justify="right")
        for one in self.points:
            cells = [
                "-" if (call_ms := one.call_ms(name)) is None else f"{call_ms:,.2f} ({one.recall[name]:.3f})" for name in systems
            ]
            leaves = f"{one.leaves_searched}/{one.leaves}"
            table.add_row(f"{one.num_items:,}", str(one.batch), leaves, *cells, times(one.measurement.ratio(PARTITIONED, EXACT)))
        return table

    def print(self, console: Console) -> None:
        """The table, from which size on a partition pays, and how it was measured."""
        console.print(self.table())
        for batch in dict.fromkeys(one.batch for one in self.points):
            size = self.crossover(batch)
            verdict = f"beats brute force from {size:,} items on" if size else "does not beat brute force at the largest size"
            console.print(f"batches of {batch:,}: the partitioned index {verdict}", highlight=False)
        for one in self.points:
            lines = method_lines(one.measurement, usable_cores(), one.others)
            console.print(
                "\n".join([f"{one.num_items:,} items, batches of {one.batch:,}:", *lines]), highlight=False, soft_wrap=True
            )


def bench_crossover(
    sizes: Sequence[int] = SIZES,
    *,
    batches: Sequence[int] = BATCHES,
    width: int = 64,
    k: int = 100,
    target: float = 0.95,
    config: PartitionedConfig | None = None,
    timing: TimingConfig = TIMING,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> CrossoverBenchmark:
    """Measure on the present backend, and write ``retrieval-crossover-BACKEND.json`` into ``out``.

    Args:
        sizes: items of each catalogue. 1,000,000 takes some GB, and minutes to build; `approx_max_k` holds [batch, items] scores.
        batches: queries of one call.
        width: dimensions, at least 24.
        k: items to find.
        target: recall@k that the partitioned index must reach.
        config: of the partitioned index, whose ``leaf_share`` is chosen, and which has a partition at any size.
        timing: how much to measure.
        out: folder of the results.
        progress: hears of the stage, and how much of it is done.

    Raises:
        UserError: bad sizes, batches, width, k, target or folder.
    """
    if (
        not sizes
        or not batches
        or min(sizes) <= k
        or k < 1
        or min(batches) < 1
        or max(batches) > NUM_QUERIES
        or not 0 < target <= 1
    ):
        raise UserError(
            f"got sizes {tuple(sizes)}, batches {tuple(batches)}, k {k} and target {target}: expected more than k items, batches of 1 to "
            f"{NUM_QUERIES} queries, at least 1 item to find, and a recall in (0, 1]"
        )
    folder, config = check_folder(out), replace(config or PartitionedConfig(), exact_items=0)
    points = []
    for size in sorted(sizes):
        points += _points(size, batches, width, k, target, config, timing, progress)
    device = jax.devices()[0]
    result = CrossoverBenchmark(
        device=f"{device.platform} {device.device_kind}",
        width=width,
        k=k,
        target=target,
        points=tuple(sorted(points, key=lambda one: (one.batch, one.num_items))),
        provenance=provenance(dataset_fingerprint=f"hard items of width {width}, seed 0"),
    )
    write_json(folder / f"retrieval-crossover-{device.platform}.json", result.json())
    return result


def _points(
    size: int,
    batches: Sequence[int],
    width: int,
    k: int,
    target: float,
    config: PartitionedConfig,
    timing: TimingConfig,
    progress: Callable[[str, int, int], None],
) -> list[CrossoverPoint]:
    """All systems on one catalogue."""
    progress(f"{size:,} items: building", 0, 1)
    vectors, queries = hard_items(size, width), hard_queries(NUM_QUERIES, width)
    start = time.perf_counter()
    built = PartitionedIndex.build(vectors, config)
    build_seconds = time.perf_counter() - start
    exact = ExactIndex.build(vectors)
    truth, _ = exact_search(jnp.asarray(vectors), jnp.asarray(queries), k)
    truth = np.asarray(truth)
    index = _reaching(built, queries[::2], truth[::2], target)
    systems: dict[str, Search] = {
        PARTITIONED: lambda rows: index.search(rows, k)[0],
        EXACT: lambda rows: exact.search(rows, k)[0],
        APPROXIMATE: _approximate(vectors, k, target),
    }
    if scann_available():
        scann = _scann_like(index, vectors, k)
        systems[SCANN] = lambda rows: scann.search(rows, k)[0]
    recall = {name: mean_recall(search(queries[1::2]), truth[1::2]) for name, search in systems.items()}
    found = []
    for batch in batches:

        def heard(done: int, total: int, batch: int = batch) -> None:
            progress(f"{size:,} items, batches of {batch:,}", done, total)

        contestants = [_contestant(name, search, queries, batch) for name, search in systems.items()]
        with OtherLoad() as others:
            measurement = measure(
                contestants, [(PARTITIONED, other) for other in systems if other != PARTITIONED], timing, progress=heard
            )
        found.append(
            CrossoverPoint(
                num_items=size,
                batch=batch,
                leaves=index.num_leaves,
                leaves_searched=index.leaves_searched,
                reordered=index.num_reordered(k),
                build_seconds=build_seconds,
                recall=recall,
                measurement=measurement,
                others=others,
            )
        )
    return found


def _reaching(
    built: PartitionedIndex, queries: Float[np.ndarray, "n d"], truth: Int[np.ndarray, "n k"], target: float
) -> PartitionedIndex:
    """The fewest leaves of ``SHARES`` that reach the target; all leaves where none does."""
    indices = (built.with_leaf_share(share) for share in SHARES)
    reaching = (index for index in indices if mean_recall(index.search(queries, truth.shape[1])[0], truth) >= target)
    return next(reaching, built.with_leaf_share(SHARES[-1]))


def _scann_like(index: PartitionedIndex, vectors: Float[np.ndarray, "i d"], k: int) -> ScannIndex:
    """ScaNN over about as many leaves, of which it searches as many, and scores as many items exactly."""
    share = min(1.0, index.leaves_searched / math.isqrt(index.num_items))
    config = ScannConfig(
        brute_force_items=0, tree_items=0, leaf_share=share, reorder_factor=1.0, min_reorder=index.num_reordered(k)
    )
    return ScannIndex.build(vectors, config)


def _approximate(vectors: Float[np.ndarray, "i d"], k: int, target: float) -> Search:
    """``approx_max_k`` of all scores: what JAX offers by itself, partial reductions on a TPU, and a sort elsewhere."""
    table = jnp.asarray(vectors)

    @jax.jit
    def search(table: Float[Array, "i d"], queries: Float[Array, "b d"]) -> Int[Array, "b k"]:
        scores = jnp.where(jnp.arange(table.shape[0])[None] > 0, queries @ table.T, -jnp.inf)
        return jax.lax.approx_max_k(scores, k, recall_target=target)[1]

    return lambda rows: np.asarray(search(table, jnp.asarray(rows)))


def _contestant(name: str, search: Search, queries: Float[np.ndarray, "n d"], batch: int) -> Contestant:
    parts = [queries[start : start + batch] for start in range(0, len(queries) - batch + 1, batch)]

    def call(number: int) -> float:
        search(parts[number % len(parts)])
        return 1.0

    return Contestant(name=name, call=call)
