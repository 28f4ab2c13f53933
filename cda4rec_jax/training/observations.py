"""What the deciders see of a request under given trunks. Nothing in it depends on a decider, so that it can be kept."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.array_typing import Array
from cda4rec_jax.links import LinkConfig
from cda4rec_jax.messages import Context, HistoryBatch
from cda4rec_jax.pipeline.catalogue import Catalogue, ItemTables
from cda4rec_jax.pipeline.decisions import PlanningWorld, draw_requests
from cda4rec_jax.pipeline.outcomes import View, compute_views
from cda4rec_jax.pipeline.population import Population
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import ContextConfig

_KEPT_DTYPE = jnp.float16  # of kept features, which span a few units with three digits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Observation:
    """``b`` requests: every pool with its features, and one draw of their contexts, whose caches the pools follow."""

    history: HistoryBatch
    context: Context
    views: dict[str, View]

    def with_features_as(self, dtype: Any) -> "Observation":
        """The same with features of another dtype."""
        views = {name: replace(view, features=view.features.astype(dtype)) for name, view in self.views.items()}
        return replace(self, views=views)


def observe(
    system: System,
    catalogue: Catalogue,
    history: HistoryBatch,
    tables: ItemTables,
    world: PlanningWorld,
    draw: Array | int,
    *,
    config: SystemConfig,
    contexts: ContextConfig,
    links: LinkConfig,
) -> Observation:
    """The requests of ``history`` under draw ``draw`` of contexts v1, and what every plan would choose from."""
    assert system.device is not None
    options = {"max_cache_age": config.max_cache_age, "contexts": contexts, "links": links}
    context = draw_requests(world, history, tables, draw, **options).context
    views = compute_views(system.cloud, system.device, catalogue, history, context.cache_level, context.cache_age_events, config)
    return Observation(history=history, context=context, views=views)


class KeptObservations:
    """Observations of many users under frozen trunks, in memory, so that a step reads them where it would retrieve and look up anew.

    Args:
        population: the users, and the compiled functions over them.
        weights: of the trunks (and of deciders, which are not read).
        users, positions: the requests; each takes some .2 MB at 500 candidates and 300 resident items.
        draw: of the contexts whose caches the pools follow.
        seed: of the order in which ``batch`` gives them.
        of_requests: what else ``observe`` is told.
    """

    def __init__(
        self,
        population: Population,
        weights: Any,
        users: np.ndarray,
        positions: np.ndarray,
        tables: ItemTables,
        world: PlanningWorld,
        draw: int,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        **of_requests: Any,
    ):
        self._seed, self._size = seed, len(users)
        make = partial(_kept, **of_requests)
        asked = (tables, world, jnp.asarray(draw, jnp.int32))
        self._all = population.over_users(make, weights, users, positions, *asked, progress=progress)

    def __len__(self) -> int:
        return self._size

    def batch(self, step: int, size: int) -> Observation:
        """``size`` of them for step ``step``: a pure function of (seed, step), and all of them once before any comes again."""
        turns, places = np.divmod(np.arange(step * size, (step + 1) * size), self._size)
        orders = {turn: np.random.default_rng([self._seed, 31, turn]).permutation(self._size) for turn in np.unique(turns)}
        chosen = [orders[turn][place] for turn, place in zip(turns, places, strict=True)]
        return jax.tree.map(lambda leaf: leaf[chosen], self._all)


def _kept(system: System, catalogue: Catalogue, history: HistoryBatch, *asked: Any, **options: Any) -> Observation:
    return observe(system, catalogue, history, *asked, **options).with_features_as(_KEPT_DTYPE)
