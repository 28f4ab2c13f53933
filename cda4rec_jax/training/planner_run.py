"""Planners that are trained alone on the agents of a run: at the end of joint training, and anew in a run of their own."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import nnx

from cda4rec_jax.errors import UserError
from cda4rec_jax.pipeline.system import with_planner
from cda4rec_jax.planner import LearnedPlanner, Policy
from cda4rec_jax.planner.scheduling import CallScheduler
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained, save_weights
from cda4rec_jax.runs.planner_runs import load_for_planner_run, weights_with, write_planner_run
from cda4rec_jax.runs.processes import first_does, tree_from_first
from cda4rec_jax.training.config import TrainConfig
from cda4rec_jax.training.planner_only import (
    PlannerTraining,
    Report,
    TrainedPlanner,
    enough_users,
    new_planner,
    planner_examples,
    train_planner,
)

_TRAINED = "planner_training"  # the file that tells how a planner was trained alone


def train_planner_run(
    path: Path | str,
    out: Path | str,
    config: PlannerTraining | None = None,
    *,
    planner: str | None = None,
    profile: str = "deployment",
    overwrite: bool = False,
    progress: Report = lambda stage, done, total: None,
) -> tuple[RunDirectory, TrainedPlanner]:
    """Train the policy of a finished run from its start on the frozen agents, and write a run that needs nothing else.

    The run at ``path`` stays as it is, and what ``out`` holds is replaced only when the policy has been trained. The new run has the
    same data, agents, index, costs and scales, and can be evaluated and asked for recommendations like any other.

    Args:
        path: the finished run.
        out: the new run; not that of ``path``.
        config: None takes the defaults.
        planner: ``package.module:Class`` to learn; None takes the class of the run.
        profile: "deployment" or "measured", the costs to train with; the new run plans by them in service.
        overwrite: replace the run that ``out`` holds.
        progress: hears (stage, done, total).

    Raises:
        UserError: no finished run, one without a planner, a class that is no planner or is not trained, ``out`` is that run or holds
            another without ``overwrite``, too few users.
    """
    config = config or PlannerTraining()
    trained, out = load_for_planner_run(path, out, overwrite)
    if planner is not None:
        trained = replace(trained, config=with_planner(trained.config, planner))
    own = trained.config.planner
    kind = Policy if own is None else own.load()
    check_is_trained(kind)
    world = trained.world(profile)
    config = _with_sizes_of(trained, config)
    examples = planner_examples(trained, world, config, progress)
    found = train_planner(examples, world, config, new_planner(examples, world, config, kind), progress)
    run = write_planner_run(
        trained,
        out,
        trained.config,
        found.policy,
        {"profile": profile, "training": config},
        {_TRAINED: _told(found)},
        training={"seconds": found.seconds, "best_step": found.best_step},
        overwrite=overwrite,
        metrics=_curve(found, "planner"),
    )
    return run, found


def check_is_trained(planner: type[LearnedPlanner]) -> None:
    """Refuse a class whose numbers come from elsewhere. Raises UserError."""
    if issubclass(planner, CallScheduler):
        raise UserError(
            f"{planner.__name__} is not trained but fitted to a budget: cda4rec train-planner --run DIR --budget calls=NUMBER makes a run "
            "with it, of any whose planner was trained or fitted; or name another --planner"
        )


def finish_policy(
    run: RunDirectory,
    train: TrainConfig,
    first_step: int,
    progress: Report,
    tell: Callable[[str], None],
) -> None:
    """Train the policy on, alone, before the finished agents, and save the weights that have it.

    Joint training taught it at withheld positions, while the head was moving and before trunks were trained again. Here it meets the
    agents that it will plan for, at validation events, and users who do not train select among its weights, those of the start
    among them. All processes of a job call this together.

    Args:
        run: whose weights, scales and exposure are saved.
        train: how the system was trained.
        first_step: steps that were logged before.
        progress: hears (stage, done, total).
        tell: hears what was found, line by line.

    Raises:
        UserError: scores that are no numbers.
    """
    config = PlannerTraining(
        steps=train.policy_steps, learning_rate=train.policy_learning_rate, objective=train.objective, seed=train.seed
    )
    trained = load_trained(run.path)
    if not enough_users(trained.corpus.interactions.num_users, config):
        tell("the planner stays as joint training left it: too few users to train it on some and select on others")
        return
    policy = trained.system.policy
    assert policy is not None

    def train_on() -> Any:
        world = trained.world()
        found = train_planner(planner_examples(trained, world, config, progress), world, config, policy, progress)
        for row in _curve(found, "policy", first_step):
            run.append_metric(row)
        run.write_json(_TRAINED, _told(found))
        for line in found.lines():
            tell(line)
        return nnx.state(found.policy)

    found = first_does(train_on)
    graph, start = nnx.split(policy)
    policy = nnx.merge(graph, tree_from_first(start if found is None else found))
    save_weights(run, weights_with(trained, policy))


def _curve(found: TrainedPlanner, phase: str, first_step: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of the log. The start of a planner, which is the end of something else, is not among them."""
    for row in found.curve[1:]:
        yield {"phase": phase, **row, "step": first_step + int(row["step"])}


def _told(found: TrainedPlanner) -> dict[str, Any]:
    return {name: value for name, value in vars(found).items() if name != "policy"}


def _with_sizes_of(trained: TrainedSystem, config: PlannerTraining) -> PlannerTraining:
    """The sizes of the policy are those of the run, whose weights it becomes a part of."""
    return PlannerTraining(**{**vars(config), "policy": trained.config.policy})
