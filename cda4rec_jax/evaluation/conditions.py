"""Ranks under a declared condition instead of drawn contexts: the cloud's view was made so many events ago, at such a level."""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.agents.device.features import FEATURES, SEMANTIC_FEATURES
from cda4rec_jax.array_typing import Array, PlanRanks
from cda4rec_jax.messages import EgressLevel, HistoryBatch
from cda4rec_jax.metrics import target_rank
from cda4rec_jax.pipeline.catalogue import Catalogue
from cda4rec_jax.pipeline.full_ranking import checked_ranks, device_full_ranks
from cda4rec_jax.pipeline.outcomes import REUSE, VIEWS, compute_views, marked_ranks, plan_group, plan_pool, score_views
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import PLANS, PlanSpace, plan_index
from cda4rec_jax.runs.artifacts import TrainedSystem

Progress = Callable[[int, int], None]
CLOUD_WEIGHTS = tuple(np.linspace(0.0, 1.0, 11).round(1).tolist())
_POOL_OF = PLANS[plan_index("local-reuse-device")]
_FROM_THE_CLOUD = np.array([name in SEMANTIC_FEATURES for name in FEATURES])


def can_be_stale(positions: Int[np.ndarray, "n"], age_events: int) -> Bool[np.ndarray, "n"]:
    """Whose past before the target is long enough for a view that is ``age_events`` old: it has at least one event."""
    return positions > age_events


def plan_ranks(
    trained: TrainedSystem,
    users: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n"],
    *,
    age_events: int = 0,
    level: EgressLevel = EgressLevel.FULL,
    by_cache_alone: bool = False,
    progress: Progress | None = None,
) -> Int[np.ndarray, "n p"]:
    """Rank of each target under every plan, where the device's cached embedding was made ``age_events`` ago at ``level``.

    Plans that ask the cloud anew do not depend on the condition, and are left out with ``by_cache_alone``: what remains are the plans
    of ``cache_plans``. A plan that the context would forbid has ranks too.

    Raises:
        ValueError: the age is above the ``max_cache_age`` of the system, or a past is too short for it.
        UserError: scores that are NaN.
    """
    _check(trained.config, positions, age_events)
    condition = (jnp.asarray(int(level), jnp.int32), jnp.asarray(age_events, jnp.float32))
    function = _function(_plan_ranks, trained.config, names=(REUSE,) if by_cache_alone else VIEWS)
    ranks = trained.population.over_users(function, _weights(trained), users, positions, *condition, progress=progress)
    return checked_ranks(ranks)


def cache_plans(space: PlanSpace) -> Int[np.ndarray, "q"]:
    """Plans whose answer depends on what the device has kept."""
    return np.flatnonzero([plan_group(plan).view == REUSE for plan in space.plans])


def device_alone_ranks(
    trained: TrainedSystem, users: Int[np.ndarray, "n"], positions: Int[np.ndarray, "n"], progress: Progress | None = None
) -> Int[np.ndarray, "n"]:
    """Rank of each target among all unseen items by the device alone, were it to hold the records of the whole catalogue."""
    function = _function(_device_alone, trained.config)
    return checked_ranks(trained.population.over_users(function, _weights(trained), users, positions, progress=progress))


def mixture_ranks(
    trained: TrainedSystem,
    users: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n"],
    *,
    age_events: int,
    progress: Progress | None = None,
) -> Int[np.ndarray, "n w"]:
    """Rank of each target in the candidate cache by ``w cloud + (1 - w) device`` for every w of ``CLOUD_WEIGHTS``.

    The pool is that of the plan ``local-reuse-device``: the best 100 of the view of ``age_events`` ago and resident items. ``cloud``
    is that view's score (the lowest of the pool where an item has none), ``device`` the fusion head's without anything from the cloud;
    both standardised over each user's pool.
    """
    _check(trained.config, positions, age_events)
    function = _function(_mixture_ranks, trained.config)
    age = jnp.asarray(age_events, jnp.float32)
    return trained.population.over_users(function, _weights(trained), users, positions, age, progress=progress)


@lru_cache(maxsize=64)
def _function(function: Callable, config: SystemConfig, **static: object) -> Callable:
    """One object for each function and configuration, so that its compiled program is found again."""
    return partial(function, config=config, **static)


def _weights(trained: TrainedSystem) -> object:
    return jax.device_put(trained.weights)


def _check(config: SystemConfig, positions: Int[np.ndarray, "n"], age_events: int) -> None:
    if age_events > config.max_cache_age:
        raise ValueError(f"age_events is {age_events}: this system keeps a cached embedding for {config.max_cache_age} events")
    if not can_be_stale(positions, age_events).all():
        raise ValueError(f"a past is too short for a view of {age_events} events ago: choose users by can_be_stale")


def _plan_ranks(
    system: System,
    catalogue: Catalogue,
    history: HistoryBatch,
    level: Array,
    age_events: Array,
    *,
    config: SystemConfig,
    names: tuple[str, ...],
) -> PlanRanks:
    assert system.device is not None
    levels, ages = jnp.broadcast_to(level, history.lengths.shape), jnp.broadcast_to(age_events, history.lengths.shape)
    views = compute_views(system.cloud, system.device, catalogue, history, levels, ages, config, names)
    return marked_ranks(score_views(system.device.head, views), views, history.targets, config.space)


def _device_alone(system: System, catalogue: Catalogue, history: HistoryBatch, *, config: SystemConfig) -> Int[Array, "b"]:
    assert system.device is not None
    return device_full_ranks(system.device, catalogue, history, config)


def _mixture_ranks(
    system: System, catalogue: Catalogue, history: HistoryBatch, age_events: Array, *, config: SystemConfig
) -> Int[Array, "b w"]:
    assert system.device is not None
    levels = jnp.full(history.lengths.shape, EgressLevel.FULL.value, jnp.int32)
    ages = jnp.broadcast_to(age_events, history.lengths.shape)
    view = compute_views(system.cloud, system.device, catalogue, history, levels, ages, config, (REUSE,))[REUSE]
    features, pool = view.features, plan_pool(_POOL_OF, view).mask(view.num_candidates, view.places)
    allowed = view.allowed & pool
    scored = allowed & (features[..., FEATURES.index("cloud_present")] > 0)
    cloud = features[..., FEATURES.index("cloud_score")]
    lowest = jnp.min(jnp.where(scored, cloud, jnp.inf), axis=1, keepdims=True)
    cloud = jnp.where(scored, cloud, jnp.where(jnp.isfinite(lowest), lowest, 0.0))
    device = system.device.head(features * jnp.asarray(~_FROM_THE_CLOUD, jnp.float32)[None, None, :])
    cloud, device = (_standardised(scores, allowed) for scores in (cloud, device))
    is_target = (view.items == history.targets[:, None]) & pool
    ranks = [target_rank(weight * cloud + (1.0 - weight) * device, is_target, allowed) for weight in CLOUD_WEIGHTS]
    return jnp.stack(ranks, axis=1)


def _standardised(scores: Float[Array, "b c"], allowed: Bool[Array, "b c"]) -> Float[Array, "b c"]:
    """Scores with mean 0 and deviation 1 over each user's allowed candidates."""
    count = jnp.maximum(jnp.sum(allowed, axis=1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(allowed, scores, 0.0), axis=1, keepdims=True) / count
    centred = jnp.where(allowed, scores - mean, 0.0)
    deviation = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count)
    return centred / jnp.maximum(deviation, 1e-6)
