"""The report of an evaluation: aggregate numbers, what they mean, and where they come from."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.budgets import BudgetRow
from cda4rec_jax.evaluation.gate import Gate
from cda4rec_jax.evaluation.tables import Table, interval_text, markdown, number, print_table
from cda4rec_jax.metrics import Interval

SHOWN_PLANS = 8
SHOWN_FIXED = 4
REFERENCE_PLAN = "fresh-full-100-device"
FAMILIES = ("fresh", "reuse", "local", "cloud")
_DIGITS = 6  # kept of every number


@dataclass(frozen=True, kw_only=True)
class SystemRow:
    """Accuracy of something that ranks: a baseline, an agent, or one plan wherever it is possible."""

    name: str
    num_users: int
    metrics: dict[str, float]
    minus_sasrec: dict[str, Interval] = field(default_factory=dict)  # by metric; empty without a baseline


@dataclass(frozen=True, kw_only=True)
class PlannerRow:
    """What a planner answers in contexts v1, on average over users and their contexts."""

    name: str
    kind: str  # policy, fixed, best fixed, simple, plug-in, oracle, upper bound
    utility: float
    policy_minus: Interval | None  # utility of the policy minus this; None for the policy itself
    metrics: dict[str, float]
    latency_ms: dict[str, float]  # mean, p50, p95; of the cost profile that the report names
    energy_mj: float
    exposure: float
    uplink_bytes: float
    downlink_bytes: float
    families: dict[str, float]  # share of requests by family of plans: fresh, reuse, local, cloud
    plan_shares: dict[str, float]  # share of requests by plan, where above 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that one evaluation found. Aggregate numbers only."""

    dataset: str
    dataset_fingerprint: str
    kind: str  # of the run: joint or sasrec
    split: str
    num_users: int
    num_items: int
    protocol: str
    latency: str  # what latencies are, such as "modelled (deployment profile)"
    systems: list[SystemRow]
    plans: list[SystemRow]
    planners: list[PlannerRow]
    best_fixed: str | None  # plan of the highest mean utility on validation
    gate: Gate | None
    scales: dict[str, float]  # dQ and dC_j, fixed before the planner was trained
    exposure_by_level: list[float]
    training_seconds: dict[str, float]  # wall time of the run and of the baseline
    provenance: dict[str, Any]
    budgets: list[BudgetRow] = field(default_factory=list)  # that the policy was asked to keep

    def to_json(self) -> str:
        """The whole report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(_rounded(msgspec.to_builtins(self)))).decode() + "\n"

    def write_json(self, path: Path | str) -> None:
        """Write ``to_json`` as a whole or not at all.

        Raises:
            UserError: the path cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(
                f"Cannot write {path}: {error.strerror or error}. Choose a file in a directory that can be written."
            ) from error
        finally:
            if temporary.exists():
                temporary.unlink()

    def tables(self, *, everything: bool = False) -> list[Table]:
        """Tables to read, best first; ``everything`` shows all plans and fixed planners."""
        tables = [self._accuracy_table(everything)]
        if self.planners:
            tables += [self._planner_table(everything), self._cost_table(everything)]
        return tables

    def print(self, console: Console | None = None) -> None:
        """Print the main tables, the gate and the protocol; they fit 100 columns."""
        console = console or Console()
        sizes = f"{self.num_users:,} users, {self.num_items:,} items"
        console.print(f"{self.dataset}, {self.split} split: {sizes}", highlight=False, markup=False)
        for table in self.tables():
            print_table(console, table)
        for line in self.notes():
            console.print(line, highlight=False, markup=False)

    def to_markdown(self, *, everything: bool = True) -> str:
        """The tables, the gate and the protocol as Markdown."""
        title = f"# {self.dataset}, {self.split} split\n\n{self.num_users:,} users, {self.num_items:,} items.\n"
        notes = "\n".join(f"- {line}" for line in self.notes())
        return "\n".join([title, *(markdown(table) for table in self.tables(everything=everything)), notes, ""])

    def notes(self) -> list[str]:
        """The gate, what the numbers mean, and where they come from, a line each."""
        if self.gate is None:
            gate = []
        else:
            gate = [f"Is choosing a plan a task on this data? {'Yes' if self.gate.passed else 'Not by all of three marks'}:"]
            gate += [f"  {line}" for line in self.gate.lines()]
        seconds = ", ".join(f"{name} {value:,.0f} s" for name, value in self.training_seconds.items())
        origin = self.provenance
        commit = f"{(origin.get('commit') or 'none')[:12]}{' (dirty)' if origin.get('dirty') else ''}"
        machine = f"{origin['cores']} cores of {origin['cpu_model']}"
        return [
            *gate,
            *(f"budget: {row.line()}" for row in self.budgets),
            *([f"trained for: {seconds}"] if seconds else []),
            f"protocol: {self.protocol}",
            f"data {self.dataset_fingerprint[:12]}, commit {commit}, {machine}, {origin['time']}",
        ]

    def _accuracy_table(self, everything: bool) -> Table:
        best = sorted(self.plans, key=lambda row: -row.metrics["ndcg@10"])
        shown = (
            best if everything else [row for place, row in enumerate(best) if place < SHOWN_PLANS or row.name == REFERENCE_PLAN]
        )
        columns = ["hit_rate@10", "ndcg@10", "mrr@10"]
        compared = any(row.minus_sasrec for row in self.systems)
        rows = [
            [row.name, *(number(row.metrics[name], 4) for name in columns)]
            + ([interval_text(row.minus_sasrec.get("ndcg@10"))] if compared else [])
            for row in [*self.systems, *shown]
        ]
        header = ["system or plan", *columns, *(["ndcg@10 - SASRec [95%]"] if compared else [])]
        left = len(best) - len(shown)
        return Table(
            title="Accuracy" + (f" (best plans; {left} more with --json and in the run's results.json)" if left else ""),
            columns=header,
            rows=rows,
        )

    def _shown_planners(self, everything: bool) -> list[PlannerRow]:
        ordered = sorted(self.planners, key=lambda row: -row.utility)
        others = [row.name for row in ordered if row.kind == "fixed"]
        hidden = [] if everything else others[SHOWN_FIXED:]
        return [row for row in ordered if row.name not in hidden]

    def _planner_table(self, everything: bool) -> Table:
        rows = [
            [
                _label(row),
                number(row.utility, 4),
                interval_text(row.policy_minus),
                number(row.metrics["hit_rate@10"], 4),
                number(row.metrics["ndcg@10"], 4),
            ]
            for row in self._shown_planners(everything)
        ]
        header = ["planner", "utility", "policy - it [95%]", "hit@10", "ndcg@10"]
        return Table(title="Planners in contexts v1, by mean realised utility", columns=header, rows=rows)

    def _cost_table(self, everything: bool) -> Table:
        rows = [
            [
                _label(row),
                *(number(row.latency_ms[name], 0) for name in ("mean", "p50", "p95")),
                number(row.uplink_bytes, 0),
                number(row.downlink_bytes / 1000, 1),
                number(row.exposure, 3),
                "/".join(f"{100 * row.families[family]:.0f}" for family in FAMILIES),
            ]
            for row in self._shown_planners(everything)
        ]
        header = ["planner", "ms", "p50", "p95", "up B", "down KB", "exposed", "plans %"]
        return Table(title=f"What it costs; latency {self.latency}; plans {'/'.join(FAMILIES)}", columns=header, rows=rows)


def _label(row: PlannerRow) -> str:
    marks = {"best fixed": " *", "oracle": " (cross-fitted)", "upper bound": " (upper bound)"}
    return row.name + marks.get(row.kind, "")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
