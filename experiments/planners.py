"""What the experiments on planners share: requests in contexts v1 with kept outcomes, and planners that are trained alone and kept."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import OURS, Arrays, Study

from cda4rec_jax.data import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.answers import answer, fixed_name
from cda4rec_jax.evaluation.drawn import drawn_records
from cda4rec_jax.evaluation.gate import best_fixed
from cda4rec_jax.evaluation.rows import plug_in_means
from cda4rec_jax.messages import Context
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.training.planner_only import PlannerExamples, PlannerTraining, new_planner, planner_examples, train_planner

TRAINING = PlannerTraining()


def ranks_in_contexts(study: Study, seed: int, split: Split) -> np.ndarray:
    """Rank [users, plans] of each target under every plan, with the caches of contexts v1."""
    users, positions = study.of_split(split)

    def make() -> Arrays:
        trained = study.ours(seed)
        weights = jax.device_put(trained.weights)
        return {"ranks": trained.population.records(weights, trained.world(), users, positions, draws=1).ranks}

    return study.cell(f"{OURS}-{seed}-{split}-plans-contexts-v1", make)["ranks"]


def records_of(study: Study, seed: int, split: Split, profile: str, draws: int) -> PlanRecords:
    """Requests in contexts v1 under the costs of a profile, with the outcomes of all plans.

    Raises:
        UserError: no draw.
    """
    if draws < 1:
        raise UserError(f"--draws is {draws}: expected at least 1 context for each event")
    users, positions = study.of_split(split)
    trained, ranks = study.ours(seed), ranks_in_contexts(study, seed, split)
    return drawn_records(trained, trained.world(profile), ranks, users, positions, draws=draws)


def selected_on_validation(study: Study, seed: int, profile: str, draws: int) -> tuple[str, np.ndarray]:
    """Name of the fixed plan that is best on validation requests, and plug-in's mean quality of every plan."""
    records = records_of(study, seed, Split.VALIDATION, profile, draws)
    means = plug_in_means(records)
    return best_fixed(answer(records, {}, means)).removeprefix(fixed_name("")), means


def examples_of(study: Study, seed: int) -> PlannerExamples:
    """What planners train on alone: outcomes of all plans before validation events, at most as many users as are evaluated."""

    def make() -> Arrays:
        trained, config = study.ours(seed), replace(TRAINING, seed=seed, users=_most_users(study))
        found = planner_examples(trained, trained.world(), config)
        context = {f"context-{name}": np.asarray(leaf) for name, leaf in vars(found.context).items()}
        return {name: np.asarray(value) for name, value in vars(found).items() if name not in ("context", "space")} | context

    kept = study.cell(f"{OURS}-{seed}-planner-examples", make)
    context = Context(**{name.removeprefix("context-"): leaf for name, leaf in kept.items() if name.startswith("context-")})
    arrays = {name: leaf for name, leaf in kept.items() if not name.startswith("context-")}
    return PlannerExamples(context=context, space=study.config.system.space, **arrays)


def _most_users(study: Study) -> int | None:
    limits = [limit for limit in (TRAINING.users, study.options.users) if limit is not None]
    return min(limits, default=None)


def trained_alone(
    study: Study,
    seed: int,
    name: str,
    world: PlanningWorld,
    config: PlannerTraining,
    start: Any = None,
    planner_seed: int | None = None,
) -> Any:
    """The planner that ``config`` trains on ``examples_of``, from ``start`` or as plug-in; its weights are kept under ``name``.

    ``planner_seed`` draws its first weights and the order of the examples; None takes that of the run, whose examples all of them share.
    """
    config = replace(config, seed=seed if planner_seed is None else planner_seed)
    planner = new_planner(examples_of(study, seed), world, config) if start is None else start
    graph, state = nnx.split(planner)
    leaves, tree = jax.tree.flatten(state)

    def make() -> Arrays:
        found = train_planner(examples_of(study, seed), world, config, start)
        return {str(place): np.asarray(leaf) for place, leaf in enumerate(jax.tree.leaves(nnx.state(found.policy)))}

    kept = study.cell(f"{OURS}-{seed}-{name}-{config.steps}-steps", make)
    return nnx.merge(graph, jax.tree.unflatten(tree, [jnp.asarray(kept[str(place)]) for place in range(len(leaves))]))
