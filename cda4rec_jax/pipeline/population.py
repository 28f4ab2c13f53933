"""Outcomes of all plans for many users: what evaluation, weight scales and plug-in planners are computed from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cda4rec_jax.links import LinkConfig
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.pipeline.catalogue import Catalogue, ItemTables, build_catalogue
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.decisions import PlanningWorld, Requests, draw_requests, redraw_requests
from cda4rec_jax.pipeline.full_ranking import checked_ranks, full_ranks, in_batches
from cda4rec_jax.pipeline.outcomes import compute_views, outcomes
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.planner import ContextConfig, plan_quality

CONTEXTS_PER_EVENT = 8
BATCH_USERS = 128


@dataclass(frozen=True, kw_only=True)
class PlanRecords:
    """What every plan would have answered to ``n`` requests, in ``draws`` contexts each. NumPy arrays.

    The contexts of one event share its cache and its consent (of the first draw), on which outcomes depend; everything else is drawn anew.
    """

    users: np.ndarray  # [n]
    ranks: np.ndarray  # [n, p]
    quality: np.ndarray  # [n, p]
    requests: Requests  # leaves [draws, n, ...]


class Population:
    """Compiled functions over the users of one corpus under one set of weights."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        config: SystemConfig,
        tables: ItemTables,
        corpus: Corpus,
        *,
        contexts: ContextConfig | None = None,
        links: LinkConfig | None = None,
    ):
        self.config, self.tables, self.corpus = config, tables, corpus
        options = {
            "max_cache_age": config.max_cache_age,
            "contexts": contexts or ContextConfig(),
            "links": links or LinkConfig(),
        }
        # Compiled for a structure, not for an object: systems of one structure, such as those of several seeds, share programs.
        self._graph = graph
        static = {"graph": graph, "config": config, "options": tuple(options.items())}
        self._catalogue = partial(_catalogue, graph)
        self._first = partial(_first_requests, **static)
        self._moments = partial(_feature_moments, **static)
        self._draw = partial(compiled_draw, **options)
        self._redraw = partial(compiled_redraw, contexts=options["contexts"], links=options["links"])
        self._full = partial(_full_ranks, graph=graph, config=config)

    def catalogue(self, weights: Any) -> Catalogue:
        """The catalogue under ``weights``, the state that the graph definition was split from."""
        return self._catalogue(weights, self.tables)

    def records(
        self,
        weights: Any,
        world: PlanningWorld,
        users: np.ndarray,
        positions: np.ndarray,
        *,
        draws: int = CONTEXTS_PER_EVENT,
        first_draw: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> PlanRecords:
        """Outcomes and contexts of ``users`` before the events at ``positions``.

        The contexts are ``draws`` draws from ``first_draw`` on, whose cache and consent all of them share. Evaluation takes draws
        from 0 on; another first draw has other caches.

        Raises:
            UserError: scores that are NaN, as after training that diverged.
        """
        catalogue = self.catalogue(weights)
        ranks, requests = [], []
        for done, history, size in self._batches(users, positions):
            found, first = self._first(weights, catalogue, self.tables, world, history, first_draw)
            further = range(first_draw + 1, first_draw + draws)
            drawn = [first] + [self._redraw(world, first.context, history.event_ids, draw) for draw in further]
            stacked = jax.tree.map(lambda *leaves, size=size: np.stack([np.asarray(leaf)[:size] for leaf in leaves]), *drawn)
            ranks.append(np.asarray(found)[:size])
            requests.append(stacked)
            if progress:
                progress(done, len(users))
        merged = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *requests)
        all_ranks = checked_ranks(np.concatenate(ranks))
        return PlanRecords(users=users, ranks=all_ranks, quality=np.asarray(_quality(all_ranks)), requests=merged)

    def requests(self, world: PlanningWorld, users: np.ndarray, positions: np.ndarray, *, draws: int) -> Iterator[Requests]:
        """Requests of ``users`` before the events at ``positions`` alone, a batch of them in one draw at a time.

        No model runs. So each draw has its own cache and consent, unlike those of ``records``, and many of them cost little.
        """
        for _, history, size in self._batches(users, positions):
            for draw in range(draws):
                drawn = self._draw(world, history, self.tables, draw)
                yield jax.tree.map(lambda leaf, size=size: leaf[:size], drawn)

    def feature_moments(
        self, weights: Any, world: PlanningWorld, users: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each feature, [f], over the candidates of all pools before the events at ``positions``."""
        catalogue = self.catalogue(weights)
        batches = self._batches(users, positions)
        found = [self._moments(weights, catalogue, self.tables, world, history, size) for _, history, size in batches]
        count, total, squares = (
            np.sum([np.asarray(each, np.float64) for each in sums], axis=0) for sums in zip(*found, strict=True)
        )
        mean = total / count
        return mean.astype(np.float32), np.sqrt(np.maximum(squares / count - mean**2, 0.0)).astype(np.float32)

    def over_users(
        self,
        function: Callable[..., Any],
        weights: Any,
        users: np.ndarray,
        positions: np.ndarray,
        *arguments: Any,
        progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        """``function(system, catalogue, history, *arguments)``, compiled, over all users in batches: a tree of arrays [n, ...].

        ``function`` is compiled once for each object, for all systems of one structure, so pass the same one for the same work.
        """
        catalogue, found = self.catalogue(weights), []
        for done, history, size in self._batches(users, positions):
            values = _of_users(self._graph, function, weights, catalogue, history, *arguments)
            found.append(jax.tree.map(lambda leaf, size=size: np.asarray(leaf)[:size], values))
            if progress:
                progress(done, len(users))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)

    def full_ranks(self, weights: Any, users: np.ndarray, positions: np.ndarray, age_events: int = 0) -> np.ndarray:
        """Rank of each target among all unseen items by the cloud agent alone, whose view is ``age_events`` events old, [n].

        Raises:
            UserError: scores that are not finite, as after training that diverged.
        """
        age = np.full((BATCH_USERS,), age_events, np.int32)
        found = [
            np.asarray(self._full(weights, self.tables.categories, history, age))[:size]
            for _, history, size in self._batches(users, positions)
        ]
        return checked_ranks(np.concatenate(found))

    def _batches(self, users: np.ndarray, positions: np.ndarray) -> Iterator[tuple[int, HistoryBatch, int]]:
        for index in in_batches(len(users), BATCH_USERS):
            size = len(np.unique(index))
            history = self.corpus.histories(users[index], positions[index], self.config.stored_events)
            yield int(index[-1]) + 1, history, size


_quality = jax.jit(plan_quality)
compiled_draw = jax.jit(draw_requests, static_argnames=("max_cache_age", "contexts", "links"))
compiled_redraw = jax.jit(redraw_requests, static_argnames=("contexts", "links"))


@partial(jax.jit, static_argnums=0)
def _catalogue(graph: nnx.GraphDef, weights: Any, tables: ItemTables) -> Catalogue:
    system = nnx.merge(graph, weights)
    assert system.device is not None
    return build_catalogue(system.cloud, system.device, tables)


@partial(jax.jit, static_argnums=(0, 1))
def _of_users(
    graph: nnx.GraphDef, function: Callable[..., Any], weights: Any, catalogue: Catalogue, history: HistoryBatch, *arguments: Any
) -> Any:
    return function(nnx.merge(graph, weights), catalogue, history, *arguments)


@partial(jax.jit, static_argnames=("graph", "config", "options"))
def _first_requests(
    weights: Any,
    catalogue: Catalogue,
    tables: ItemTables,
    world: PlanningWorld,
    history: HistoryBatch,
    draw: jax.Array | int,
    *,
    graph: nnx.GraphDef,
    config: SystemConfig,
    options: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, Requests]:
    system = nnx.merge(graph, weights)
    requests = draw_requests(world, history, tables, draw, **dict(options))
    context = requests.context
    found = outcomes(system.cloud, system.device, catalogue, history, context.cache_level, context.cache_age_events, config)
    return found.ranks, requests


@partial(jax.jit, static_argnames=("graph", "config", "options"))
def _feature_moments(
    weights: Any,
    catalogue: Catalogue,
    tables: ItemTables,
    world: PlanningWorld,
    history: HistoryBatch,
    size: jax.Array | int,
    *,
    graph: nnx.GraphDef,
    config: SystemConfig,
    options: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Number of candidates of the first ``size`` users, sum and sum of squares of their features."""
    system = nnx.merge(graph, weights)
    context = draw_requests(world, history, tables, 0, **dict(options)).context
    views = compute_views(
        system.cloud, system.device, catalogue, history, context.cache_level, context.cache_age_events, config
    ).values()
    features = jnp.concatenate([view.features for view in views], axis=1)
    counts = jnp.arange(len(features)) < size  # the rest repeat the last user, to make batches of one shape
    allowed = (jnp.concatenate([view.allowed for view in views], axis=1) & counts[:, None])[..., None]
    features = jnp.where(allowed, features, 0.0)
    return jnp.sum(allowed), jnp.sum(features, (0, 1)), jnp.sum(jnp.square(features), (0, 1))


@partial(jax.jit, static_argnames=("graph", "config"))
def _full_ranks(
    weights: Any,
    categories: jax.Array,
    history: HistoryBatch,
    age_events: jax.Array,
    *,
    graph: nnx.GraphDef,
    config: SystemConfig,
) -> jax.Array:
    system = nnx.merge(graph, weights)
    ranks = full_ranks(
        system.cloud,
        system.cloud.items.vectors(),
        categories,
        history,
        history_length=config.history_length,
        profile_events=config.profile_events,
        age_events=age_events,
    )
    return jnp.where(jnp.isfinite(system.cloud.items.vectors()).all(), ranks, 0)
