"""All systems on one catalogue at one batch size: recall and single calls of each setting, and the fastest of each in turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.charts import curves
from cda4rec_jax.bench.harness import OtherLoad, measurement_json, method_lines, say, times
from cda4rec_jax.bench.retrieval_adapter import AdapterOverhead, adapter_overhead
from cda4rec_jax.bench.retrieval_systems import HNSWLIBS, TUNED, IndexSearch, SearchData, SearchSystem
from cda4rec_jax.bench.systems import System, call_times_ms, calls_of, started
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.retrieval import ScannIndex
from cda4rec_jax.timing import Contestant, Measurement, Spread, TimingConfig, measure, usable_cores

MOST_SECONDS = 3.0  # of single calls of one system at one setting
CALLS, LEAST_CALLS = 1000, 100  # the least are two turns, so that one that was disturbed does not choose the setting
TUNED_BATCH, TUNED_TARGET = 256, 1.5  # times the queries a second of hnswlib that we want of ScaNN, tuned, in such batches


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
    ours: str  # the fastest of ours by single calls, which is held against all others
    latency: Mapping[str, LatencySummary]  # of single calls, by name
    first_call_seconds: Mapping[str, float]  # in such a batch, for which JAX compiles, by name
    measurement: Measurement
    others: OtherLoad
    left_out: Mapping[str, str]  # systems that were not measured here, and why
    adapter: AdapterOverhead | None  # of the tuned ScaNN index

    @property
    def title(self) -> str:
        """What was searched, and how."""
        queries = "one query" if self.batch == 1 else f"{self.batch:,} queries"
        return f"{self.data}: {self.num_items:,} items, {queries} a call"

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
        ratios = [self.measurement.ratio(self.ours, one.name).median for one in self.compared if not one.is_ours]
        return min(ratios, default=None)

    @property
    def tuned_over_hnswlib(self) -> Spread | None:
        """Ratio of queries a second at the recall to the faster of its graphs; None where either side does not reach it, or is absent."""
        by_system = {one.system: one.name for one in self.compared}
        graphs = [by_system[name] for name in HNSWLIBS if name in by_system]
        if TUNED not in by_system or not graphs:
            return None
        ratios = [self.measurement.ratio(by_system[TUNED], graph) for graph in graphs]
        return min(ratios, key=lambda ratio: ratio.median)

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
                "first_call_seconds": self.first_call_seconds[one.name],
                "queries_per_second": self.queries_per_second(one.name),
                "latency": asdict(self.latency[one.name]),
            }
            for one in self.systems
        ]
        told = ("data", "fingerprint", "num_items", "batch", "k", "least_recall", "target", "ours", "least_ratio", "left_out")
        over = self.tuned_over_hnswlib
        return {
            **{key: getattr(self, key) for key in told},
            "systems": rows,
            "tuned_over_hnswlib": None if over is None else {**asdict(over), "target": TUNED_TARGET, "target_batch": TUNED_BATCH},
            "adapter": None if self.adapter is None else self.adapter.json(),
            "measurement": measurement_json(self.measurement, self.others),
        }

    def print(self, console: Console) -> None:
        """A table of the systems that were compared."""
        table = Table(title=f"{self.title}, k = {self.k}", box=SIMPLE)
        table.add_column("system")
        for column in ("recall", "queries/s", "p50 us", "p95 us", "p99 us", "build s", "first call s", "ours faster by"):
            table.add_column(column, justify="right")
        for one in self.compared:
            latency = self.latency[one.name]
            percentiles = (f"{1e3 * value:,.0f}" for value in (latency.p50_ms, latency.p95_ms, latency.p99_ms))
            ratio = "" if one.name == self.ours else times(self.measurement.ratio(self.ours, one.name))
            rate = f"{self.measurement.rates[one.name].median:,.0f}"
            seconds = (f"{one.build_seconds:.1f}", f"{self.first_call_seconds[one.name]:.2f}")
            table.add_row(one.name, f"{one.recall:.3f}", rate, *percentiles, *seconds, ratio)
        console.print(table)
        missed = {one.system: one for one in sorted(self.systems, key=lambda one: one.recall)}
        missed = [f"{name} (at most {one.recall:.3f})" for name, one in missed.items() if one.recall < self.least_recall]
        lines = [
            f"the fastest setting of each that finds {self.least_recall} of the exact items; 'ours' in the last column is {self.ours!r}",
            "build s: of the index, which its settings share; first call s: of the first such batch, compiling for it included",
            *([f"below that recall: {', '.join(missed)}"] if missed else []),
            *([f"aim: {self.target} times the fastest of others; it is {self.least_ratio:.2f}"] if self.has_aim else []),
            *self._tuned_lines(),
            *(f"left out: {name} ({why})" for name, why in self.left_out.items()),
            f"versions: {', '.join(dict.fromkeys(one.version for one in self.compared))}",
            *method_lines(self.measurement, usable_cores(), self.others),
        ]
        say(console, lines)

    def _tuned_lines(self) -> list[str]:
        """ScaNN, tuned, beside hnswlib; and what our index adds to ScaNN's own search."""
        over, is_aimed = self.tuned_over_hnswlib, self.batch == TUNED_BATCH
        aim = f" (aim: {TUNED_TARGET})" if is_aimed else ""
        lines = [] if over is None else [f"queries a second of {TUNED!r} are {times(over)} times those of hnswlib{aim}"]
        return lines if self.adapter is None else [*lines, self.adapter.line()]


def searched(
    data: SearchData,
    systems: Sequence[SearchSystem],
    batch: int,
    k: int,
    least_recall: float,
    target: float | None,
    timing: TimingConfig,
    progress: Callable[[int, int], None],
    left_out: Mapping[str, str] | None = None,
) -> SearchFound:
    """Single calls of all, then turns of the fastest setting of each that reaches the recall; ScaNN's own search, if it was tuned."""
    inputs = data.batches(batch)
    unstarted = (System(name=one.name, version=one.version, against=(), run=one.run, inputs=inputs) for one in systems)
    timed = {one.name: started(one) for one in unstarted}
    with OtherLoad() as others:
        taken = call_times_ms(list(timed.values()), max(LEAST_CALLS, CALLS // batch), most_seconds=MOST_SECONDS)
        latency = {name: summarise_latency(values) for name, values in taken.items()}
        fastest: dict[str, SearchSystem] = {}
        for one in sorted(systems, key=lambda one: -latency[one.name].p50_ms):
            if one.recall >= least_recall:
                fastest[one.system] = one
        ours = min((one for one in fastest.values() if one.is_ours), key=lambda one: latency[one.name].p50_ms)
        others_names = [one.name for one in fastest.values() if one.name != ours.name]
        contestants = [Contestant(name=one.name, call=calls_of(timed[one.name], batch)) for one in fastest.values()]
        pairs = [(ours.name, name) for name in others_names] or [(ours.name, ours.name)]
        if TUNED in fastest and ours.system != TUNED:
            pairs += [(fastest[TUNED].name, fastest[name].name) for name in HNSWLIBS if name in fastest]
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
        ours=ours.name,
        latency=latency,
        first_call_seconds={name: one.first_call_seconds for name, one in timed.items()},
        measurement=measurement,
        others=others,
        left_out=left_out or {},
        adapter=_adapter(fastest[TUNED], data, batch, k, timing) if TUNED in fastest else None,
    )


def _adapter(tuned: SearchSystem, data: SearchData, batch: int, k: int, timing: TimingConfig) -> AdapterOverhead:
    assert isinstance(tuned.run, IndexSearch) and isinstance(tuned.run.index, ScannIndex)
    return adapter_overhead(tuned.run.index, np.concatenate(data.batches(batch)), k, batch, timing=timing)


def recall_chart(path: Path, found: Sequence[SearchFound]) -> None:
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for one in found:
        lines = panels.setdefault(one.title, {})
        for system in one.systems:
            x, y = lines.setdefault(system.system, ([], []))
            x.append(system.recall)
            y.append(one.queries_per_second(system.name))
    ours = sorted({system.system for one in found for system in one.systems if system.is_ours})
    curves(path, panels, f"recall@{found[0].k}", ["queries a second"] * len(panels), ours, log_x=False)
