"""The sub-command ``train-planner``."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from cda4rec_jax.cli.console import StagesView, standard_output
from cda4rec_jax.cli.process import set_up_process
from cda4rec_jax.errors import UserError

if TYPE_CHECKING:
    from cda4rec_jax.runs import RunDirectory


@dataclass(frozen=True, kw_only=True)
class TrainPlanner:
    """Train the planner anew on the frozen agents of a finished run, into a run directory of its own; or, with --budget, make its
    planner spend a number of cloud calls where they gain most quality.
    """

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    """Run directory of a finished training; it stays as it is."""
    out: Path | None = None
    """Run directory to write; that of --run with -planner-OBJECTIVE, or -calls-NUMBER, at its end if not given."""
    budget: str | None = None
    """calls=NUMBER: at most so many cloud calls per user and day, where the planner of --run expects them to gain most quality. Nothing is
    trained then: the price of a call is found on validation events. Time, energy and exposure no longer decide."""
    requests_per_day: float | None = None
    """Requests of one user and day, which --budget needs to be shared out over; 10 if not given."""
    objective: Literal["exact", "gumbel", "regression"] | None = None
    """What the planner learns from: the expected utility over all plans (exact, if not given), that of sampled plans (straight-through
    Gumbel-softmax), or the quality of plans alone."""
    planner: str | None = None
    """A planner of your own, package.module:Class, from an installed package or this folder; that of --run if not given."""
    profile: Literal["deployment", "measured"] = "deployment"
    """Costs of sub-tasks to train with, and then to plan by in service: of a declared deployment (modelled), or as measured (by
    calibrate, or when the run was trained)."""
    steps: int | None = None
    """Steps of training; 400 if not given."""
    seed: int = 0
    """Of the weights, of who trains and who selects, and of all draws; with --budget, of the users whose events it is fitted on."""
    overwrite: bool = False
    """Replace the run in --out."""

    def run(self) -> None:
        """See ``train_planner_run`` and ``schedule_calls_run``."""
        if self.budget is None and self.requests_per_day is not None:
            raise UserError("--requests-per-day says what a budget of calls is: add --budget calls=NUMBER, or leave it out")
        trains = {"--objective": self.objective, "--planner": self.planner, "--steps": self.steps}
        given = [flag for flag, value in trains.items() if value is not None]
        if self.budget is not None and given:
            raise UserError(
                f"{' and '.join(given)} say how a planner is trained, and --budget trains none: leave one of them out, or train first and "
                "name the run that this writes with --budget"
            )
        set_up_process()
        if self.budget is None:
            self._train()
        else:
            self._schedule(self.budget)

    def _train(self) -> None:
        from cda4rec_jax.planner import Objective
        from cda4rec_jax.training import PlannerTraining, train_planner_run

        objective = Objective(self.objective or "exact")
        config = PlannerTraining(objective=objective, seed=self.seed)
        if self.steps is not None:
            config = replace(config, steps=self.steps)
        console = standard_output()
        with StagesView(console) as view:
            run, trained = train_planner_run(
                self.run_directory,
                self._out(f"planner-{objective}"),
                config,
                planner=self.planner,
                profile=self.profile,
                overwrite=self.overwrite,
                progress=view.progress,
            )
        self._tell(console, trained.lines(), run)

    def _schedule(self, budget: str) -> None:
        from cda4rec_jax.evaluation.call_schedule import ScheduleFitting, schedule_calls_run
        from cda4rec_jax.planner.budgets import REQUESTS_PER_DAY, Budget

        per_day = REQUESTS_PER_DAY if self.requests_per_day is None else self.requests_per_day
        limited, console = Budget.parse(budget, per_day), standard_output()
        with StagesView(console) as view:
            run, found = schedule_calls_run(
                self.run_directory,
                self._out(f"calls-{limited.limit:g}"),
                limited,
                ScheduleFitting(seed=self.seed),
                profile=self.profile,
                overwrite=self.overwrite,
                progress=view.progress,
            )
        self._tell(console, found.lines(), run)

    def _out(self, ending: str) -> Path:
        return self.out or self.run_directory.with_name(f"{self.run_directory.name}-{ending}")

    def _tell(self, console: Console, lines: Iterable[str], run: "RunDirectory") -> None:
        for line in (*lines, f"{'trained' if self.budget is None else 'written'}: {run.path}"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
