"""The command ``cda4rec calibrate``, in the form of ``cli.commands``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.table import Table

from cda4rec_jax.cli.console import StagesView, standard_output
from cda4rec_jax.cli.process import set_up_process

if TYPE_CHECKING:
    from cda4rec_jax.runtime.calibration import Agreement, Calibration


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Measure every sub-task and whole requests on this machine, and hold what the planner predicts against what requests take.

    Stores the measured cost profile in the run, for recommend and evaluate --profile measured; earlier ones are kept.
    """

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    """Run directory of a finished training."""
    rounds: int = 30
    """Requests of every plan, and calls of every sub-task; as many more requests, of other users, validate."""

    def run(self) -> None:
        """Print what ``calibrate`` finds, and the exposure of every level as the run has it."""
        set_up_process()
        from cda4rec_jax.runs.artifacts import load_trained
        from cda4rec_jax.runtime.calibration import calibrate
        from cda4rec_jax.runtime.recommend import Recommender

        console, trained = standard_output(), load_trained(self.run_directory)
        with StagesView(console) as view, Recommender(trained) as recommender:
            found = calibrate(trained, recommender, self.rounds, view.progress)
        for part in (_subtasks(found), _agreement(found), exposure_table(trained.run.read_json("exposure"))):
            console.print(part)
        console.print(
            f"stored in {trained.run.path}: cost_profile.json (the earlier profile is kept in it), calibration.json",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def exposure_table(stored: Mapping[str, Any]) -> Table:
    """``exposure.json`` of a run: the history-recovery attack on every level, between its controls."""
    from cda4rec_jax.messages import EgressLevel

    table = _table(
        f"Exposure: recall@20 of a history-recovery attack on {stored['num_victims']:,} users",
        "The null control shuffles releases among users: it should not beat nothing. Raw histories are the positive control.",
    )
    for column in ("what leaves", "recall", "null control", "exposure"):
        table.add_column(column, justify="left" if column == "what leaves" else "right")
    table.add_row("nothing (popularity)", f"{stored['nothing_recall']:.3f}", "", "0.000")
    for level in list(EgressLevel)[1:]:
        recall, null = (stored[name].get(str(level.value)) for name in ("recall", "null_recall"))
        cells = ["-" if value is None else f"{value:.3f}" for value in (recall, null)]
        table.add_row(level.name.lower(), *cells, f"{stored['exposure'][level]:.3f}")
    if "regressed_recall" in stored:  # runs of earlier versions do not have it
        table.add_row("raw history, by regression alone", f"{stored['regressed_recall']:.3f}", "", "", style="dim")
    table.add_row("raw history (positive control)", f"{stored['raw_recall']:.3f}", "", "1.000", style="dim")
    return table


def _table(title: str, caption: str) -> Table:
    """As close as all numbers of a row need on a terminal of 80 columns."""
    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left", **style)


def _subtasks(found: "Calibration") -> Table:
    machine = found.provenance
    table = _table(
        f"Sub-tasks, warm, one request at a time: {machine['cores']} cores of {machine['cpu_model']}",
        f"{found.rounds} rounds in turns, {found.users} users. In requests: with gate, ledger, codec, hand-over to threads, and "
        "all of planning.",
    )
    for column in ("milliseconds", "alone p50", "p95", "in requests p50", "p95"):
        table.add_column(column, justify="left" if column == "milliseconds" else "right")
    for one in found.subtasks:
        values = (one.alone.p50_ms, one.alone.p95_ms, one.in_requests.p50_ms, one.in_requests.p95_ms)
        table.add_row(one.bucket, *(f"{value:.3f}" for value in values))
    return table


def _agreement(found: "Calibration") -> Table:
    verdict = "within" if found.meets_target else "ABOVE"
    before, after = found.load_average
    table = _table(
        f"Predicted against measured: median error of compute {found.overall.compute_error:.1%}, {verdict} the aim of "
        f"{found.target:.0%}; with the link {found.overall.error:.1%}",
        f"{len(found.requests):,} requests of {found.users} other users over {', '.join(found.by_link)}; the link as estimated. "
        f"{found.left_out} left out: their plan was not allowed, or did not come to its end. Compute: the error without the "
        "time on the link, which both sides know. Bias, of the same: below 0 where requests are slower than predicted. Load "
        f"average {before:.1f} before, {after:.1f} after: above 1, others worked too, and the error is theirs as well.",
    )
    table.add_column("milliseconds", no_wrap=True, min_width=max(len(name) for name in found.by_plan))
    for column in ("predicted", "p50", "p95", "error", "compute", "bias"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in found.by_plan.items():
        table.add_row(name, *_cells(one))
    table.add_section()
    for name, one in found.by_link.items():
        table.add_row(name, *_cells(one))
    table.add_section()
    table.add_row("all", *_cells(found.overall), style="bold")
    return table


def _cells(one: "Agreement") -> list[str]:
    times = [f"{value:.2f}" for value in (one.predicted_ms, one.measured.p50_ms, one.measured.p95_ms)]
    return [*times, f"{one.error:.1%}", f"{one.compute_error:.1%}", f"{one.bias:+.1%}"]
