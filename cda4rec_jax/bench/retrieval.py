"""``cda4rec bench retrieval``: recall against queries a second, exact search, time and memory by catalogue size, and the fastest index.

Ours beside others, except for the last, by which ``retrieval.choose_index`` chooses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from cda4rec_jax.bench.harness import check_folder, not_installed_lines, say, write_json
from cda4rec_jax.bench.peers import RETRIEVAL_PEERS, chosen_peers
from cda4rec_jax.bench.retrieval_compared import SearchFound, recall_chart, searched
from cda4rec_jax.bench.retrieval_crossover import CrossoverBenchmark, bench_crossover, check_crossover
from cda4rec_jax.bench.retrieval_sizes import SizesFound, measure_sizes
from cda4rec_jax.bench.retrieval_systems import built_systems, hard_data, makers, systems_of, trained_data
from cda4rec_jax.bench.scale import ScaleFound, measure_scale
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.bench import plain_search
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import TimingConfig, usable_cores

RECALL = 0.95  # from which on systems are compared
EXACT = 0.9999  # recall of what counts as exact: sums in another order may swap neighbours
EXACT_SHAPES = ((12_101, 256, 4.0), (1_000_000, 1, 3.0))  # items, batch, and how many times as fast as others we want to be
EXACT_SYSTEMS = ("ours, exact", "ours, quantised", "faiss flat", "torch", "numpy")
CROSSOVER_BLOCK_SECONDS = 0.05  # of a turn there: many indices at many sizes, that differ by much
PLAIN = "plain jax"


@dataclass(frozen=True, kw_only=True)
class RetrievalBenchmark:
    """All that was found."""

    searches: tuple[SearchFound, ...]
    sizes: SizesFound | None
    scale: ScaleFound | None
    crossover: CrossoverBenchmark | None
    not_installed: tuple[str, ...]
    provenance: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "benchmark": "retrieval",
            "threads": usable_cores(),
            "searches": [one.json() for one in self.searches],
            "sizes": None if self.sizes is None else self.sizes.json(),
            "scale": None if self.scale is None else self.scale.json(),
            "not_installed": list(self.not_installed),
            "provenance": self.provenance,
        }

    def print(self, console: Console) -> None:
        """Every table, and how it was measured."""
        for one in (*self.searches, self.sizes, self.scale, self.crossover):
            if one is not None:
                one.print(console)
        if self.not_installed:
            say(console, not_installed_lines(self.not_installed))


def bench_retrieval(
    run: Path | None = None,
    *,
    items: tuple[int, ...] = (100_000,),
    batches: tuple[int, ...] = (1, 256),
    k: int = 100,
    exact: bool = True,
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    crossover: tuple[int, ...] = (),
    peers: tuple[str, ...] | None = None,
    timing: TimingConfig,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> RetrievalBenchmark:
    """Measure, and write JSON, as far as it is done, and (where matplotlib is installed) charts into ``out``.

    Args:
        run: a finished joint run, whose item table is measured instead of the generated set.
        items: sizes of the generated set; empty for none.
        batches: queries of one call.
        k: items to find.
        exact: also compare exact search, at ``EXACT_SHAPES``.
        sizes: catalogue sizes at which time and memory are measured, each in a process of its own; empty for none.
        crossover: catalogue sizes at which our indices are timed against each other, see ``bench_crossover``; empty for none.
        peers: names of ``bench.peers.RETRIEVAL_PEERS``; None takes all that are installed.
        timing: how much to measure.
        out: folder of the results.
        progress: hears of the stage, and how much of it is done.

    Raises:
        UserError: bad run, size, peer or folder.
    """
    if not batches or min((*batches, *items, *sizes, k)) < 1:
        raise UserError(f"got items {items}, sizes {sizes}, batches {batches} and k {k}: expected positive numbers")
    if min((*items, *sizes, k + 1)) <= k:
        raise UserError(f"asked for {k} of {min((*items, *sizes))} items: expected fewer")
    if crossover:
        check_crossover(crossover, batches, k)
    chosen, not_installed = chosen_peers(peers, RETRIEVAL_PEERS)
    datasets = (hard_data(size, k) for size in items) if run is None else (trained_data(run, k),)  # one at a time in memory
    folder = check_folder(out)
    name = "hard" if run is None else ""
    result = RetrievalBenchmark(
        searches=(),
        sizes=None,
        scale=None,
        crossover=None,
        not_installed=not_installed,
        provenance=provenance(dataset_fingerprint=""),
    )

    def kept(one: SearchFound) -> RetrievalBenchmark:
        """With one search more, written at once, so that it is kept if a later one fails."""
        searches = (*result.searches, one)
        prints = "; ".join(dict.fromkeys(each.fingerprint for each in searches))
        grown = replace(result, searches=searches, provenance={**result.provenance, "dataset_fingerprint": prints})
        write_json(folder / f"retrieval-{name}.json", grown.json())
        return grown

    for data in datasets:
        name = data.name
        heard = partial(progress, f"building, {data.num_items:,} items")
        systems, left_out = built_systems(data, k, chosen, max(batches), heard)
        for batch in batches:
            heard = partial(progress, f"{data.num_items:,} items, batches of {batch}")
            result = kept(searched(data, systems, batch, k, RECALL, None, timing, heard, left_out))
        recall_chart(folder / f"retrieval-{name}-{data.num_items}.png", result.searches[-len(batches) :])
    for num_items, batch, target in EXACT_SHAPES if exact else ():
        heard = partial(progress, f"exact, {num_items:,} items, batches of {batch}")
        result = kept(_exact(num_items, batch, k, target, chosen, timing, heard))
    measured = measure_sizes(sizes, k, chosen, partial(progress, "catalogue sizes")) if sizes else None
    if measured is not None:
        measured.chart(folder / "retrieval-sizes.png")
        result = replace(result, sizes=measured, scale=measure_scale(measured, k))
        write_json(folder / f"retrieval-{name}.json", result.json())
    if crossover:
        short = replace(timing, block_seconds=min(timing.block_seconds, CROSSOVER_BLOCK_SECONDS))
        crossed = bench_crossover(crossover, batches=batches, k=k, timing=short, out=folder, progress=progress)
        result = replace(result, crossover=crossed)
    return result


def _exact(
    num_items: int,
    batch: int,
    k: int,
    target: float,
    peers: Sequence[str],
    timing: TimingConfig,
    progress: Callable[[int, int], None],
) -> SearchFound:
    """Ours beside exact search of others and what one would write in JAX."""
    data = hard_data(num_items, k)
    plain = jax.jit(partial(plain_search, k=k))
    making = {name: make for name, make in makers(peers).items() if name in EXACT_SYSTEMS}
    systems = [
        one for name, (package, make) in making.items() for one in systems_of(name, package, make, data, k, usable_cores())
    ]
    table = jax.numpy.asarray(data.items)
    written = systems_of(
        PLAIN,
        "jax",
        lambda items, k, threads: {"": lambda queries: np.asarray(plain(table, queries)[0])},
        data,
        k,
        usable_cores(),
    )
    return searched(data, [*systems, *written], batch, k, EXACT, target, timing, progress)
