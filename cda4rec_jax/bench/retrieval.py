"""``cda4rec bench retrieval``: recall against queries a second, exact search, and time and memory by catalogue size; ours beside others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.charts import curves
from cda4rec_jax.bench.harness import (
    OtherLoad,
    check_folder,
    measurement_json,
    method_lines,
    times,
    write_json,
)
from cda4rec_jax.bench.peers import RETRIEVAL_PEERS, chosen_peers
from cda4rec_jax.bench.retrieval_sizes import SizesFound, measure_sizes
from cda4rec_jax.bench.retrieval_systems import (
    SearchData,
    SearchSystem,
    hard_data,
    makers,
    systems_of,
    trained_data,
)
from cda4rec_jax.bench.scale import ScaleFound, measure_scale
from cda4rec_jax.bench.systems import call_times_ms
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.bench import plain_search
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, measure, usable_cores

RECALL = 0.95  # from which on systems are compared
EXACT = 0.9999  # recall of what counts as exact: sums in another order may swap neighbours
EXACT_SHAPES = ((12_101, 256, 4.0), (1_000_000, 1, 3.0))  # items, batch, and how many times as fast as others we want to be
EXACT_SYSTEMS = ("ours, exact", "ours, quantised", "faiss flat", "torch", "numpy")
MOST_SECONDS = 3.0  # of single calls of one system at one setting
CALLS = 1000
PLAIN = "plain jax"


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A system at a setting, with inputs of one batch size."""

    system: SearchSystem
    inputs: Sequence[np.ndarray]

    @property
    def name(self) -> str:
        return self.system.name

    @property
    def run(self) -> Callable[[np.ndarray], object]:
        return self.system.run

    def call(self, number: int) -> float:
        """For the harness: one batch; gives its queries."""
        given = self.inputs[number % len(self.inputs)]
        self.system.run(given)
        return float(len(given))


@dataclass(frozen=True, kw_only=True)
class SearchFound:
    """All systems on one catalogue at one batch size; the measurement compares the fastest settings that reach a recall."""

    data: str
    fingerprint: str
    num_items: int
    batch: int
    k: int
    least_recall: float
    target: float | None  # ratio to the fastest of others that we want
    systems: tuple[SearchSystem, ...]
    latency: Mapping[str, LatencySummary]  # of single calls, by name
    measurement: Measurement
    others: OtherLoad

    def queries_per_second(self, name: str) -> float:
        """By the median call."""
        return 1e3 * self.batch / self.latency[name].p50_ms

    @property
    def compared(self) -> list[SearchSystem]:
        """Those that were measured in turns, the fastest first."""
        found = [one for one in self.systems if one.name in self.measurement.rates]
        return sorted(found, key=lambda one: -self.measurement.rates[one.name].median)

    @property
    def least_ratio(self) -> float | None:
        """Of the fastest of ours to the fastest of others; None where no other was measured."""
        fastest = next(one.name for one in self.compared if one.is_ours)
        ratios = [self.measurement.ratio(fastest, one.name).median for one in self.compared if not one.is_ours]
        return min(ratios, default=None)

    @property
    def has_aim(self) -> bool:
        """True where there is an aim, and an other to hold it against."""
        return self.target is not None and self.least_ratio is not None

    def json(self) -> dict[str, Any]:
        """Ready for JSON: a row for each system and setting."""
        rows = [
            {
                **{key: value for key, value in vars(one).items() if key != "run"},
                "threads": usable_cores(),
                "batch": self.batch,
                "queries_per_second": self.queries_per_second(one.name),
                "latency": asdict(self.latency[one.name]),
            }
            for one in self.systems
        ]
        told = {key: getattr(self, key) for key in ("data", "fingerprint", "num_items", "batch", "k", "least_recall", "target")}
        measured = measurement_json(self.measurement, self.others)
        return {**told, "systems": rows, "least_ratio": self.least_ratio, "measurement": measured}

    def print(self, console: Console) -> None:
        """A table of the systems that were compared."""
        table = Table(title=f"{self.data}: {self.num_items:,} items, {self.batch} queries a call, k = {self.k}", box=SIMPLE)
        table.add_column("system")
        for column in ("recall", "queries/s", "p50 us", "p95 us", "p99 us", "build s", "ours faster by"):
            table.add_column(column, justify="right")
        fastest = next(one.name for one in self.compared if one.is_ours)
        for one in self.compared:
            latency = self.latency[one.name]
            percentiles = (f"{1e3 * value:,.0f}" for value in (latency.p50_ms, latency.p95_ms, latency.p99_ms))
            ratio = "" if one.name == fastest else times(self.measurement.ratio(fastest, one.name))
            rate = f"{self.measurement.rates[one.name].median:,.0f}"
            table.add_row(one.name, f"{one.recall:.3f}", rate, *percentiles, f"{one.build_seconds:.1f}", ratio)
        console.print(table)
        missed = {one.system: one for one in sorted(self.systems, key=lambda one: one.recall)}
        missed = [f"{name} (at most {one.recall:.3f})" for name, one in missed.items() if one.recall < self.least_recall]
        lines = [
            f"the fastest setting of each that finds {self.least_recall} of the exact items; 'ours faster by' is {fastest!r} against each",
            *([f"below that recall: {', '.join(missed)}"] if missed else []),
            *([f"aim: {self.target} times the fastest of others; it is {self.least_ratio:.2f}"] if self.has_aim else []),
            f"versions: {', '.join(dict.fromkeys(one.version for one in self.compared))}",
            *method_lines(self.measurement, usable_cores(), self.others),
        ]
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class RetrievalBenchmark:
    """All that was found."""

    searches: tuple[SearchFound, ...]
    sizes: SizesFound | None
    scale: ScaleFound | None
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
        for one in (*self.searches, self.sizes, self.scale):
            if one is not None:
                one.print(console)
        if self.not_installed:
            line = f"not installed: {', '.join(self.not_installed)} (pip install 'cda4rec_jax[bench]')"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def bench_retrieval(
    run: Path | None = None,
    *,
    items: tuple[int, ...] = (100_000,),
    batches: tuple[int, ...] = (1, 256),
    k: int = 100,
    exact: bool = True,
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    peers: tuple[str, ...] | None = None,
    timing: TimingConfig,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> RetrievalBenchmark:
    """Measure, and write JSON and (where matplotlib is installed) charts into ``out``.

    Args:
        run: a finished joint run, whose item table is measured instead of the generated set.
        items: sizes of the generated set; empty for none.
        batches: queries of one call.
        k: items to find.
        exact: also compare exact search, at ``EXACT_SHAPES``.
        sizes: catalogue sizes at which time and memory are measured, each in a process of its own; empty for none.
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
    chosen, not_installed = chosen_peers(peers, RETRIEVAL_PEERS)
    folder = check_folder(out)
    name = "hard" if run is None else ""
    found: list[SearchFound] = []
    for make in [partial(hard_data, size, k) for size in items] if run is None else [partial(trained_data, run, k)]:
        data = make()
        name = data.name
        systems = _built(data, k, chosen, partial(progress, f"building, {data.num_items:,} items"))
        for batch in batches:
            heard = partial(progress, f"{data.num_items:,} items, batches of {batch}")
            found.append(_searched(data, systems, batch, k, RECALL, None, timing, heard))
        _recall_chart(folder / f"retrieval-{name}-{data.num_items}.png", found[-len(batches) :])
    for num_items, batch, target in EXACT_SHAPES if exact else ():
        heard = partial(progress, f"exact, {num_items:,} items, batches of {batch}")
        found.append(_exact(num_items, batch, k, target, chosen, timing, heard))
    measured = measure_sizes(sizes, k, chosen, partial(progress, "catalogue sizes")) if sizes else None
    if measured is not None:
        measured.chart(folder / "retrieval-sizes.png")
    result = RetrievalBenchmark(
        searches=tuple(found),
        sizes=measured,
        scale=None if measured is None else measure_scale(measured, k),
        not_installed=not_installed,
        provenance=provenance(dataset_fingerprint="; ".join(dict.fromkeys(one.fingerprint for one in found))),
    )
    write_json(folder / f"retrieval-{name}.json", result.json())
    return result


def _built(data: SearchData, k: int, peers: Sequence[str], progress: Callable[[int, int], None]) -> list[SearchSystem]:
    systems: list[SearchSystem] = []
    making = makers(peers)
    for done, (name, (package, make)) in enumerate(making.items()):
        progress(done, len(making))
        systems += systems_of(name, package, make, data, k, usable_cores())
    progress(len(making), len(making))
    return systems


def _searched(
    data: SearchData,
    systems: Sequence[SearchSystem],
    batch: int,
    k: int,
    least_recall: float,
    target: float | None,
    timing: TimingConfig,
    progress: Callable[[int, int], None],
) -> SearchFound:
    """Single calls of all, then turns of the fastest setting of each that reaches the recall."""
    inputs = data.batches(batch)
    timed = {one.name: Timed(system=one, inputs=inputs) for one in systems}
    with OtherLoad() as others:
        taken = call_times_ms(list(timed.values()), max(20, CALLS // batch), most_seconds=MOST_SECONDS)
        latency = {name: summarise_latency(values) for name, values in taken.items()}
        fastest: dict[str, SearchSystem] = {}
        for one in sorted(systems, key=lambda one: -latency[one.name].p50_ms):
            if one.recall >= least_recall:
                fastest[one.system] = one
        ours = min((one for one in fastest.values() if one.is_ours), key=lambda one: latency[one.name].p50_ms)
        others_names = [one.name for one in fastest.values() if one.name != ours.name]
        contestants = [Contestant(name=one.name, call=timed[one.name].call) for one in fastest.values()]
        pairs = [(ours.name, name) for name in others_names] or [(ours.name, ours.name)]
        measurement = measure(contestants, pairs, timing, progress=progress)
    return SearchFound(
        data=data.name,
        fingerprint=data.fingerprint,
        num_items=data.num_items,
        batch=batch,
        k=k,
        least_recall=least_recall,
        target=target,
        systems=tuple(systems),
        latency=latency,
        measurement=measurement,
        others=others,
    )


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
    return _searched(data, [*systems, *written], batch, k, EXACT, target, timing, progress)


def _recall_chart(path: Path, found: Sequence[SearchFound]) -> None:
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for one in found:
        lines = panels.setdefault(f"{one.data}: {one.num_items:,} items, {one.batch} queries a call", {})
        for system in one.systems:
            x, y = lines.setdefault(system.system, ([], []))
            x.append(system.recall)
            y.append(one.queries_per_second(system.name))
    ours = sorted({system.system for one in found for system in one.systems if system.is_ours})
    curves(path, panels, f"recall@{found[0].k}", ["queries a second"] * len(panels), ours, log_x=False)
