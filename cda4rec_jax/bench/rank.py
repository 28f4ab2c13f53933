"""``cda4rec bench rank``: the device's ranking of one request, ours beside onnxruntime, torch, plain JAX and NumPy, at equal scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.charts import bar_chart
from cda4rec_jax.bench.harness import (
    OtherLoad,
    check_folder,
    in_full,
    measurement_json,
    method_lines,
    not_installed_lines,
    say,
    times,
    write_json,
)
from cda4rec_jax.bench.peers import RANK_PEERS, chosen_peers
from cda4rec_jax.bench.rank_systems import RankSetting, case_setting, rank_systems, run_setting
from cda4rec_jax.bench.systems import System, call_times_ms, calls_of, origin_lines, percentile_cells, systems_json
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.rank_candidates.cases import WORKLOAD_CASES
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, measure

TARGET_WHOLE, TARGET_STEP = 1.25, 5.0  # times as fast as onnxruntime's best full pass
CANDIDATES = 100
THREADS = 1


@dataclass(frozen=True, kw_only=True)
class RankFound:
    """All systems at one size."""

    setting: RankSetting
    systems: tuple[System, ...]  # our full pass, our step, then others
    latency: dict[str, LatencySummary]  # of single calls
    measurement: Measurement
    others: OtherLoad

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        weights, request = self.setting.weights, self.setting.requests[0]
        return {
            "size": self.setting.name,
            "layers": weights.num_layers,
            "width": weights.width,
            "tokens": len(request.tokens),
            "candidates": len(request.features),
            "systems": systems_json(self.systems, self.latency, THREADS),
            "measurement": measurement_json(self.measurement, self.others),
        }


@dataclass(frozen=True, kw_only=True)
class RankBenchmark:
    """All that was found."""

    sizes: tuple[RankFound, ...]
    not_installed: tuple[str, ...]
    provenance: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "benchmark": "rank",
            "threads": THREADS,
            "targets": {"full_pass_times_onnxruntime": TARGET_WHOLE, "one_new_event_times_onnxruntime": TARGET_STEP},
            "sizes": [one.json() for one in self.sizes],
            "not_installed": list(self.not_installed),
            "provenance": self.provenance,
        }

    def print(self, console: Console) -> None:
        """A table for each size, and how it was measured."""
        for found in self.sizes:
            console.print(_table(found))
            say(console, [*method_lines(found.measurement, THREADS, found.others), *origin_lines(found.systems)])
        lines = [
            "full pass: from tokens of a whole history and features of candidates to their scores; one new event: the same from the "
            "cache of the tokens before; NumPy to NumPy, one thread (XLA may take more). All but plain jax leave out what the last layer "
            "computes for tokens before the last one; onnxruntime's graph has its fused attention, rotation and norms",
            f"aims: the full pass {TARGET_WHOLE} times and one new event {TARGET_STEP:.0f} times as fast as onnxruntime's best full pass",
            *not_installed_lines(self.not_installed),
        ]
        say(console, lines)


def bench_rank(
    run: Path | None = None,
    *,
    peers: tuple[str, ...] | None = None,
    candidates: int = CANDIDATES,
    calls: int = 3000,
    timing: TimingConfig,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> RankBenchmark:
    """Measure, and write JSON, after each size, and (where matplotlib is installed) charts into ``out``.

    Args:
        run: a finished joint run, whose device agent is measured; None takes the sizes of the kernel's workloads, with random weights.
        peers: names of ``bench.peers.RANK_PEERS``; None takes all that are installed.
        candidates: of a request, for ``run``.
        calls: single calls whose percentiles are taken.
        timing: how much to measure.
        out: folder of the results.
        progress: hears of the stage, and how much of it is done.

    Raises:
        UserError: bad run, peer or folder; a system whose scores are not ours.
    """
    if candidates < 1 or calls < 1:
        raise UserError(f"got {candidates} candidates and {calls} calls: expected at least 1 of each")
    chosen, not_installed = chosen_peers(peers, RANK_PEERS)
    settings = [case_setting(case) for case in WORKLOAD_CASES] if run is None else [run_setting(run, candidates)]
    folder = check_folder(out)
    name = "random-weights" if run is None else settings[0].name
    origin = provenance(dataset_fingerprint=f"device agent of {name}, random requests of {len(settings[0].requests)} seeds")
    result = RankBenchmark(sizes=(), not_installed=not_installed, provenance=origin)
    for setting in settings:
        with in_full("float32"):
            found = _measured(setting, chosen, calls, timing, partial(progress, setting.name))
        result = replace(result, sizes=(*result.sizes, found))
        write_json(folder / f"rank-{name}.json", result.json())
    for number, one in enumerate(result.sizes):
        chart = folder / f"rank-{name}{f'-{number + 1}' if len(result.sizes) > 1 else ''}.png"
        bar_chart(
            chart,
            f"Ranking of one request: {_size(one)}",
            "requests per second",
            one.measurement.rates,
            [each.name for each in one.systems if not each.against],
        )
    return result


def _measured(
    setting: RankSetting, peers: Sequence[str], calls: int, timing: TimingConfig, progress: Callable[[int, int], None]
) -> RankFound:
    systems = rank_systems(setting, peers)
    contestants = [Contestant(name=one.name, call=calls_of(one, 1)) for one in systems]
    pairs = [(ours, one.name) for one in systems for ours in one.against]
    pairs += [(systems[1].name, systems[0].name)]
    with OtherLoad() as others:
        latency = {name: summarise_latency(taken) for name, taken in call_times_ms(systems, calls).items()}
        measurement = measure(contestants, pairs, timing, progress=progress)
    return RankFound(setting=setting, systems=tuple(systems), latency=latency, measurement=measurement, others=others)


def _size(found: RankFound) -> str:
    weights, request = found.setting.weights, found.setting.requests[0]
    layers = f"{weights.num_layers} layer{'s' if weights.num_layers > 1 else ''}"
    return f"{layers} of {weights.width}, {len(request.tokens)} tokens, {len(request.features)} candidates"


def _table(found: RankFound) -> Table:
    table = Table(title=f"Ranking of one request: {_size(found)}", box=SIMPLE)
    table.add_column("system")
    for column in ("p50 us", "p95 us", "p99 us", "full pass faster by", "one new event faster by"):
        table.add_column(column, justify="right")
    for one in found.systems:
        latency = found.latency[one.name]
        table.add_row(
            one.name, *percentile_cells(latency), *(times(found.measurement.ratio(ours, one.name)) for ours in one.against)
        )
    return table
