"""``cda4rec bench plan``: decisions in a second and the time of one, ours beside onnxruntime, torch and NumPy, at equal outputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from cda4rec_jax.bench.peers import PLAN_PEERS, chosen_peers
from cda4rec_jax.bench.plan_systems import DECISION, NETWORK, setting_of, systems_of
from cda4rec_jax.bench.systems import System, call_times_ms, calls_of, origin_lines, percentile_cells, systems_json
from cda4rec_jax.errors import UserError
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, measure, usable_cores

BATCHES = (1, 256, 65_536)
TARGET_US, TARGET_PER_SECOND = 15.0, 500_000.0


@dataclass(frozen=True, kw_only=True)
class BatchFound:
    """All systems at one batch size."""

    batch: int
    systems: tuple[System, ...]
    latency: dict[str, LatencySummary]  # of single calls
    measurement: Measurement
    others: OtherLoad

    @property
    def threads(self) -> int:
        """Of each system: one request runs in one."""
        return usable_cores() if self.batch > 1 else 1

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "batch": self.batch,
            "systems": systems_json(self.systems, self.latency, self.threads),
            "measurement": measurement_json(self.measurement, self.others),
        }


@dataclass(frozen=True, kw_only=True)
class PlanBenchmark:
    """All that was found."""

    policy: str
    batches: tuple[BatchFound, ...]
    not_installed: tuple[str, ...]
    provenance: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "benchmark": "plan",
            "policy": self.policy,
            "threads": usable_cores(),
            "targets": {"one_decision_us": TARGET_US, "contexts_per_second": TARGET_PER_SECOND},
            "batches": [one.json() for one in self.batches],
            "not_installed": list(self.not_installed),
            "provenance": self.provenance,
        }

    def print(self, console: Console) -> None:
        """A table for each batch size, and how it was measured."""
        for found in self.batches:
            console.print(_table(self.policy, found))
            say(console, [*method_lines(found.measurement, found.threads, found.others), *origin_lines(found.systems)])
        lines = [
            "whole decision: context features, mask, predicted costs, network, choice; network alone: from given features to qualities, "
            "for others with the plan tower multiplied into the last layer. NumPy to NumPy; one request runs in one thread",
            f"aims: one decision under {TARGET_US:.0f} us and not above onnxruntime's network; {TARGET_PER_SECOND:,.0f} contexts a second "
            "in batches on 2 cores",
            *not_installed_lines(self.not_installed),
        ]
        say(console, lines)


def bench_plan(
    run: Path | None = None,
    *,
    peers: tuple[str, ...] | None = None,
    batches: tuple[int, ...] = BATCHES,
    calls: int = 5000,
    timing: TimingConfig,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> PlanBenchmark:
    """Measure, and write JSON, after each batch size, and (where matplotlib is installed) charts into ``out``.

    Args:
        run: a finished joint run; None takes the standard policy with random weights.
        peers: names of ``bench.peers.PLAN_PEERS``; None takes all that are installed.
        batches: requests of one call.
        calls: single calls whose percentiles are taken, fewer for large batches.
        timing: how much to measure.
        out: folder of the results.
        progress: hears of the stage, and how much of it is done.

    Raises:
        UserError: bad run, peer, batch or folder; a system whose outputs are not ours.
    """
    if not batches or min(batches) < 1 or calls < 1:
        raise UserError(f"got batches {batches} and {calls} calls: expected batches of at least 1 request, and at least 1 call")
    chosen, not_installed = chosen_peers(peers, PLAN_PEERS)
    setting = setting_of(run)
    folder = check_folder(out)
    result = PlanBenchmark(
        policy=setting.name,
        batches=(),
        not_installed=not_installed,
        provenance=provenance(dataset_fingerprint=f"policy {setting.name}, contexts v1 of seed 0"),
    )
    for batch in batches:

        def heard(done: int, total: int, batch: int = batch) -> None:
            progress(f"batches of {batch:,}", done, total)

        with in_full("float32"):
            systems = systems_of(setting, batch, chosen, usable_cores())
            contestants = [Contestant(name=one.name, call=calls_of(one, batch)) for one in systems]
            pairs = [(ours, one.name) for one in systems for ours in one.against] + [(DECISION, NETWORK)]
            with OtherLoad() as others:
                single = call_times_ms(systems, max(50, calls // batch))
                latency = {name: summarise_latency(taken) for name, taken in single.items()}
                measurement = measure(contestants, pairs, timing, progress=heard)
        found = BatchFound(batch=batch, systems=tuple(systems), latency=latency, measurement=measurement, others=others)
        result = replace(result, batches=(*result.batches, found))
        write_json(folder / f"plan-{setting.name}.json", result.json())
    for one in result.batches:
        bar_chart(
            folder / f"plan-{setting.name}-{one.batch}.png",
            f"Planning by the policy of {setting.name}, {one.batch:,} requests a call",
            "requests per second",
            one.measurement.rates,
            (DECISION, NETWORK),
        )
    return result


def _table(policy: str, found: BatchFound) -> Table:
    table = Table(title=f"Planning by the policy of {policy}, {found.batch:,} requests a call", box=SIMPLE)
    table.add_column("system")
    for column in ("requests a second", "p50 us", "p95 us", "p99 us", "whole faster by", "network faster by"):
        table.add_column(column, justify="right")
    for one in found.systems:
        latency = found.latency[one.name]
        ratios = [times(found.measurement.ratio(ours, one.name)) if ours in one.against else "" for ours in (DECISION, NETWORK)]
        table.add_row(one.name, f"{found.measurement.rates[one.name].median:,.0f}", *percentile_cells(latency), *ratios)
    return table
