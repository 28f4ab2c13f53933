"""The sub-command ``train-planner``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cda4rec_jax.cli.console import StagesView, standard_output
from cda4rec_jax.cli.process import set_up_process


@dataclass(frozen=True, kw_only=True)
class TrainPlanner:
    """Train the planner anew on the frozen agents of a finished run, into a run directory of its own."""

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    """Run directory of a finished training; it stays as it is."""
    out: Path | None = None
    """Run directory to write; that of --run with -planner-OBJECTIVE at its end if not given."""
    objective: Literal["exact", "gumbel", "regression"] = "exact"
    """What the planner learns from: the expected utility over all plans, that of sampled plans (straight-through Gumbel-softmax), or the
    quality of plans alone."""
    planner: str | None = None
    """A planner of your own, package.module:Class, from an installed package or this folder; that of --run if not given."""
    profile: Literal["deployment", "measured"] = "deployment"
    """Costs of sub-tasks to train with, and then to plan by in service: of a declared deployment (modelled), or as measured (by
    calibrate, or when the run was trained)."""
    steps: int | None = None
    """Steps of training; 400 if not given."""
    seed: int = 0
    """Of the weights, of who trains and who selects, and of all draws."""
    overwrite: bool = False
    """Replace the run in --out."""

    def run(self) -> None:
        """See ``train_planner_run``."""
        set_up_process()
        from cda4rec_jax.planner import Objective
        from cda4rec_jax.training import PlannerTraining, train_planner_run

        config = PlannerTraining(objective=Objective(self.objective), seed=self.seed)
        if self.steps is not None:
            config = replace(config, steps=self.steps)
        given = self.run_directory
        out = self.out or given.with_name(f"{given.name}-planner-{self.objective}")
        console = standard_output()
        with StagesView(console) as view:
            run, trained = train_planner_run(
                given, out, config, planner=self.planner, profile=self.profile, overwrite=self.overwrite, progress=view.progress
            )
        for line in (*trained.lines(), f"trained: {run.path}"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
