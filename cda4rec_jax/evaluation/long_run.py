"""Weeks of use: items come and go, caches follow from choices, and the cloud gets a new version while devices keep the old one.

A version is a cloud agent. It travels with every embedding that it makes. Devices keep their agent, their fusion head, and records of
items in the form that these were trained with, which the cloud goes on sending; only candidates come from the new vectors.

An embedding of another version means nothing to the cloud. The device cannot know before it asks: candidates that it has kept serve local
plans as before; a plan that sends the old embedding is refused, as if its link had failed (the local repair plan answers, and the call
counts), and the device drops it. A fresh plan needs no cache, and brings one of the new version.

A planner that is trained again (``logged_outcomes``) learns from what every plan would have brought, in contexts that are drawn anew for
the requests of that week. Logs hold the outcome of the chosen plan alone, so what it gains is an upper bound.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array, Lengths, PlanRanks
from cda4rec_jax.data.synthetic import World
from cda4rec_jax.evaluation.answers import Logits
from cda4rec_jax.evaluation.replay import CONTEXTS, Cache, ask, settle, situations
from cda4rec_jax.messages import Context, HistoryBatch
from cda4rec_jax.pipeline.catalogue import Catalogue, ItemTables
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.decisions import PlanningWorld, facts_of
from cda4rec_jax.pipeline.full_ranking import checked_ranks, in_batches
from cda4rec_jax.pipeline.outcomes import outcomes
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.planner import STANDARD, PlanSpace, choose, plan_quality, sample_contexts
from cda4rec_jax.runs.artifacts import TrainedSystem

BATCH_USERS = 32  # few users have a second, third, ... request in a week


@dataclass(frozen=True, kw_only=True, eq=False)
class Shop:
    """A world whose items come and go, with all that happens in it."""

    world: World
    corpus: Corpus

    @cached_property
    def churning(self) -> Int[np.ndarray, "m"]:
        """Items that are not always on offer."""
        catalogue = self.world.truth.catalogue
        return np.flatnonzero((catalogue.launch_seconds > 0) | np.isfinite(catalogue.retire_seconds)).astype(np.int32)

    def histories(self, users: Int[np.ndarray, "b"], positions: Int[np.ndarray, "b"], stored_events: int) -> HistoryBatch:
        """Pasts before the events at ``positions``; items that are not on offer then are removed like those already seen."""
        history = self.corpus.histories(users, positions, stored_events)
        interactions = self.corpus.interactions
        closed = self.world.truth.catalogue.closed_at(interactions.timestamps[interactions.offsets[users] + positions])
        gone = np.where(closed[:, self.churning], self.churning[None, :], 0)
        return replace(history, seen=np.concatenate([history.seen, gone.astype(np.int32)], axis=1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Deployment:
    """What answers requests: the cloud agent of a version, and everything else of the devices' own."""

    version: int
    graph: nnx.GraphDef
    config: SystemConfig
    weights: Any
    catalogue: Catalogue
    tables: ItemTables
    world: PlanningWorld

    @classmethod
    def of(cls, version: int, devices: TrainedSystem, cloud: TrainedSystem) -> "Deployment":
        """The cloud agent and the item vectors of ``cloud``; records of items and all models on devices of ``devices``."""
        weights = nnx.State({**devices.weights, "cloud": cloud.weights["cloud"]})
        return cls(
            version=version,
            graph=devices.graph,
            config=devices.config,
            weights=jax.device_put(weights),
            catalogue=replace(devices.catalogue, vectors=cloud.catalogue.vectors),
            tables=devices.tables,
            world=devices.world(),
        )

    def ranks(self, history: HistoryBatch, cache: Cache) -> PlanRanks:
        """Rank of each target under every plan with these caches. Raises UserError for scores that are NaN."""
        sizes = {"graph": self.graph, "config": self.config}
        return checked_ranks(np.asarray(_ranks(self.weights, self.catalogue, history, cache.level, cache.age_events, **sizes)))


@partial(jax.jit, static_argnames=("graph", "config"))
def _ranks(
    weights: Any,
    catalogue: Catalogue,
    history: HistoryBatch,
    level: Lengths,
    age_events: Float[Array, "b"],
    *,
    graph: nnx.GraphDef,
    config: SystemConfig,
) -> PlanRanks:
    system = nnx.merge(graph, weights)
    return outcomes(system.cloud, system.device, catalogue, history, level, age_events, config).ranks


_situations = jax.jit(situations, static_argnames="max_cache_age")


class Fleet:
    """Caches of all devices between requests, and the version that made each. A device starts with an embedding one event old."""

    def __init__(self, num_users: int):
        self._started = np.zeros(num_users, bool)
        self._level, self._age = np.zeros(num_users, np.int32), np.zeros(num_users, np.float32)
        self._version = np.zeros(num_users, np.int64)

    def found(self, users: Int[np.ndarray, "b"], consent: Int[Array, "b"], version: int) -> tuple[Cache, Int[np.ndarray, "b"]]:
        """The caches, and the version of each; ``version`` makes those of devices that start."""
        first, started = Cache.of_the_last_event(consent), self._started[users]
        level = np.where(started, self._level[users], np.asarray(first.level))
        age = np.where(started, self._age[users], np.asarray(first.age_events))
        cache = Cache(level=jnp.asarray(level, jnp.int32), age_events=jnp.asarray(age, jnp.float32))
        return cache, np.where(started, self._version[users], version)

    def keep(self, users: Int[np.ndarray, "b"], cache: Cache, version: Int[np.ndarray, "b"]) -> None:
        """What the next requests of these users will find."""
        self._started[users] = True
        self._level[users], self._age[users] = np.asarray(cache.level), np.asarray(cache.age_events)
        self._version[users] = version


def refused_plans(
    plans: Int[np.ndarray, "b"], is_other_version: Bool[np.ndarray, "b"], space: PlanSpace = STANDARD
) -> Bool[np.ndarray, "b"]:
    """Whose plan sends an embedding that another version of the cloud has made."""
    return (space.table.semantic_reuse & space.table.uses_link)[plans] & is_other_version


def serve(
    shop: Shop,
    deployments: Mapping[int, Deployment],
    version: int,
    planner: Logits,
    fleet: Fleet,
    users: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n"],
) -> dict[str, Float[np.ndarray, "n"]]:
    """Answers to requests while ``version`` runs in the cloud; those of one user in the order of their positions.

    Returns:
        values of ``replay.settle`` for each request, ``refused``, ``cold`` (the target had no event when devices were trained) and
        ``other_version`` (of the cache that was found).
    """
    values: dict[str, np.ndarray] = {}
    for rows in _rounds(users, positions):
        for index in in_batches(len(rows), BATCH_USERS):
            batch = rows[index]
            answered = _serve_batch(shop, deployments, version, planner, fleet, users[batch], positions[batch])
            for name, column in answered.items():
                values.setdefault(name, np.zeros(len(users), np.float32))[batch] = column
    return values


def _rounds(users: np.ndarray, positions: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of every user's first request, then of every user's second, ..."""
    order = np.lexsort((positions, users))
    starts = np.concatenate([[True], np.diff(users[order]) != 0])
    place = np.arange(len(order)) - np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    for number in range(int(place.max(initial=-1)) + 1):
        yield order[place == number]


def _serve_batch(
    shop: Shop,
    deployments: Mapping[int, Deployment],
    version: int,
    planner: Logits,
    fleet: Fleet,
    users: Int[np.ndarray, "b"],
    positions: Int[np.ndarray, "b"],
) -> dict[str, np.ndarray]:
    now = deployments[version]
    max_age = now.config.max_cache_age
    history = shop.histories(users, positions, now.config.stored_events)
    device_events = shop.corpus.interactions.offsets[users].astype(np.int32)
    situation = _situations(history, now.tables, now.world, 0, device_events, max_cache_age=max_age)
    cache, made_by = fleet.found(users, situation[0].consent, version)
    requests = ask(now.world, cache, *situation)
    logits = planner(requests.context, requests.predicted, requests.mask)
    space = now.world.space
    plans = np.asarray(choose(logits, requests.mask, space))
    is_other = (made_by != version) & (np.asarray(cache.level) > 0)
    ranks = np.asarray(now.ranks(history, cache))
    for old in np.unique(made_by[is_other]):
        kept = (made_by == old)[:, None] & is_other[:, None] & space.table.semantic_reuse[None, :]
        ranks = np.where(kept, np.asarray(deployments[int(old)].ranks(history, cache)), ranks)
    refused = refused_plans(plans, is_other, space)
    requests = replace(requests, failed=jnp.asarray(requests.failed) | refused)
    values, left = settle(requests, jnp.asarray(ranks), jnp.asarray(plans), max_cache_age=max_age)
    left = Cache(level=jnp.where(refused, 0, left.level), age_events=jnp.where(refused, 0.0, left.age_events))
    fleet.keep(users, left, np.where(np.asarray(left.age_events) == 1.0, version, made_by))
    cold = np.asarray(now.tables.train_counts)[history.targets] == 0
    found = {name: np.asarray(column) for name, column in values.items()}
    return found | {"refused": refused, "cold": cold, "other_version": is_other}


def logged_outcomes(
    shop: Shop, deployment: Deployment, users: Int[np.ndarray, "n"], positions: Int[np.ndarray, "n"], draw: int
) -> tuple[Context, Float[np.ndarray, "n p"], Int[np.ndarray, "n"]]:
    """Contexts v1 with caches under draw ``draw``, the quality of every plan, and event ids: of requests whose targets are known by now."""
    found = []
    for index in in_batches(len(users), BATCH_USERS):
        history = shop.histories(users[index], positions[index], deployment.config.stored_events)
        context = _contexts(history, deployment.tables, deployment.world, draw, max_cache_age=deployment.config.max_cache_age)
        ranks = deployment.ranks(history, Cache(level=context.cache_level, age_events=context.cache_age_events))
        size = len(np.unique(index))
        taken = (context, plan_quality(ranks), history.event_ids)
        found.append(jax.tree.map(lambda leaf, size=size: np.asarray(leaf)[:size], taken))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


@partial(jax.jit, static_argnames="max_cache_age")
def _contexts(
    history: HistoryBatch, tables: ItemTables, world: PlanningWorld, draw: Array | int, *, max_cache_age: int
) -> Context:
    return sample_contexts(facts_of(history, tables, max_cache_age), history.event_ids, world.scales, draw, CONTEXTS)
