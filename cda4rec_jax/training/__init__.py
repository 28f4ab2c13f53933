"""Training of both agents and the planner in one step, and of SASRec as the baseline."""

from cda4rec_jax.training.config import TrainConfig
from cda4rec_jax.training.job import RunConfig, refit_deciders, train_run
from cda4rec_jax.training.loop import Interrupted, Progress, Trainer
from cda4rec_jax.training.planner_only import (
    PlannerExamples,
    PlannerTraining,
    TrainedPlanner,
    new_planner,
    planner_examples,
    train_planner,
)
from cda4rec_jax.training.planner_run import train_planner_run
from cda4rec_jax.training.step import StepConfig

__all__ = [
    "Interrupted",
    "PlannerExamples",
    "PlannerTraining",
    "Progress",
    "RunConfig",
    "StepConfig",
    "TrainConfig",
    "TrainedPlanner",
    "Trainer",
    "new_planner",
    "planner_examples",
    "refit_deciders",
    "train_planner",
    "train_planner_run",
    "train_run",
]
