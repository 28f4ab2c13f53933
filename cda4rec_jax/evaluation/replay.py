"""Sequential replay: the last events of each user as requests in order, with a cache that follows from the planner's own choices.

Everything that does not depend on choices is computed once (``record_replay``): what each request's situation is, what its link does,
and the target's rank under every plan for every cache that may be found. ``play`` then lets a scheduler walk through it, which takes
milliseconds, so that prices of a call can be searched for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array, PlanRanks
from cda4rec_jax.evaluation.answers import happened_latency_ms
from cda4rec_jax.evaluation.conditions import cache_plans, plan_ranks
from cda4rec_jax.links import LinkConfig
from cda4rec_jax.messages import Context, HistoryBatch
from cda4rec_jax.metrics import hit_rate, ndcg
from cda4rec_jax.pipeline.catalogue import Catalogue, ItemTables
from cda4rec_jax.pipeline.decisions import PlanningWorld, Requests, facts_of, requests_of
from cda4rec_jax.pipeline.system import System
from cda4rec_jax.planner import (
    ContextConfig,
    PlanCosts,
    PlanSpace,
    allowed,
    local_repair,
    plan_quality,
    realised_utility,
    sample_contexts,
)
from cda4rec_jax.planner.scheduling import CACHE_LEVELS
from cda4rec_jax.runs.artifacts import TrainedSystem

OF_THE_DEVICE = ("consent", "tier", "free_memory_mb")  # fields of a context that stay over a user's requests
LINKS, CONTEXTS = LinkConfig(), ContextConfig()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """The last semantic embedding of each device: the level that it was made at (0: there is none), and its age (0 without one)."""

    level: Int[Array, "b"]
    age_events: Float[Array, "b"]

    @classmethod
    def of_the_last_event(cls, consent: Int[Array, "b"]) -> "Cache":
        """Made one event ago at the level of consent; none without consent."""
        return cls(level=jnp.asarray(consent), age_events=jnp.asarray(consent > 0, jnp.float32))


def next_cache(cache: Cache, fresh_level: Int[Array, "b"], max_age_events: int) -> Cache:
    """What the next request finds, one event later.

    A fresh embedding that arrived, made at ``fresh_level`` (0: none arrived), is then 1 event old. Otherwise the cached one is 1
    event older, and is dropped once it is older than ``max_age_events``.
    """
    renewed = fresh_level > 0
    age = jnp.where(renewed, 1.0, cache.age_events + 1.0)
    kept = renewed | ((cache.level > 0) & (age <= max_age_events))
    level = jnp.where(renewed, fresh_level, cache.level)
    return Cache(level=jnp.where(kept, level, 0), age_events=jnp.where(kept, age, 0.0))


@dataclass(frozen=True, kw_only=True)
class ReplayRecords:
    """``n`` users with ``steps`` requests each, in ``draws`` situations. Row ``draw * n + user`` of a step is one device's request."""

    # Under every plan, by the cache found: level - 1, age - 1; 0 where never found.
    ranks: Int[np.ndarray, "levels ages n steps p"]
    contexts: Context  # leaves [steps, rows]; their cache is not carried yet
    realised: PlanCosts  # leaves [steps, rows, p]; exposure likewise
    failed: Bool[np.ndarray, "steps rows"]

    @property
    def space(self) -> PlanSpace:
        return self.realised.space

    @property
    def num_users(self) -> int:
        return self.ranks.shape[2]

    @property
    def num_steps(self) -> int:
        return self.ranks.shape[3]

    @property
    def num_rows(self) -> int:
        return self.failed.shape[1]

    def of(self, users: Int[np.ndarray, "k"]) -> "ReplayRecords":
        """The records of some of the users, by their place."""
        rows = (np.arange(self.num_rows // self.num_users)[:, None] * self.num_users + users[None, :]).ravel()

        def select(leaf: np.ndarray) -> np.ndarray:
            return leaf[:, rows]

        return ReplayRecords(
            ranks=self.ranks[:, :, users],
            contexts=jax.tree.map(select, self.contexts),
            realised=jax.tree.map(select, self.realised),
            failed=select(self.failed),
        )


def replay_positions(lengths: Int[np.ndarray, "n"], steps: int) -> Int[np.ndarray, "n steps"]:
    """Positions of the last ``steps`` events of users with so many events."""
    return lengths[:, None] - steps + np.arange(steps)[None, :]


def cached_ranks(
    trained: TrainedSystem,
    users: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n steps"],
    progress: Callable[[int, int], None] | None = None,
) -> Int[np.ndarray, "levels ages n steps p"]:
    """Rank under every plan for every cache that the requests may find: before request t, ages 1 to t + 1."""
    steps, plans = positions.shape[1], cache_plans(trained.config.space)
    found = np.zeros((len(CACHE_LEVELS), steps, *positions.shape, trained.config.space.num_plans), np.int32)
    every = plan_ranks(trained, np.repeat(users, steps), positions.ravel(), age_events=1).reshape(*positions.shape, -1)
    for level_place, level in enumerate(CACHE_LEVELS):
        for age in range(1, steps + 1):
            asked = positions[:, age - 1 :]
            who = np.repeat(users, asked.shape[1])
            ranks = plan_ranks(trained, who, asked.ravel(), age_events=age, level=level, by_cache_alone=True)
            found[level_place, age - 1, :, age - 1 :] = every[:, age - 1 :]
            found[level_place, age - 1, :, age - 1 :, plans] = np.moveaxis(ranks.reshape(*asked.shape, -1), -1, 0)
            if progress:
                progress(level_place * steps + age, len(CACHE_LEVELS) * steps)
    return found


def record_replay(
    trained: TrainedSystem,
    world: PlanningWorld,
    users: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n steps"],
    ranks: Int[np.ndarray, "levels ages n steps p"],
    draws: int,
) -> ReplayRecords:
    """Situations of all requests beside their ``cached_ranks``.

    Contexts are those of distribution v1, a hash of event and draw, but that a device stays what it is: consent, tier and free memory
    are those of the first request.
    """
    weights, by_step = jax.device_put(trained.weights), []
    function = partial(_situations, max_cache_age=trained.config.max_cache_age)
    for step in range(positions.shape[1]):
        by_draw = []
        for draw in range(draws):
            asked = (trained.tables, world, jnp.asarray(draw, jnp.int32), jnp.asarray(step, jnp.int32))
            by_draw.append(trained.population.over_users(function, weights, users, positions[:, step], *asked))
        by_step.append(jax.tree.map(lambda *leaves: np.concatenate(leaves), *by_draw))
    context, realised, failed = jax.tree.map(lambda *leaves: np.stack(leaves), *by_step)
    return ReplayRecords(ranks=ranks, contexts=context, realised=realised, failed=failed)


def record_sequence(
    trained: TrainedSystem,
    world: PlanningWorld,
    users: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n"],
    ranks: Int[np.ndarray, "levels ages n p"],
    *,
    steps: int,
    draws: int,
) -> ReplayRecords:
    """One event of each user, asked for ``steps`` times in a row: what a request finds changes, and what plans are worth does not.

    Contexts are those of distribution v1, every request a draw of its own, but that a device stays what it is, as in ``record_replay``.

    Args:
        trained, world: whose.
        users: of the events.
        positions: of the events.
        ranks: under every plan for every cache that may be found, ages 1 to ``steps``.
        steps: requests of each sequence.
        draws: sequences of each user.
    """
    function = partial(_repeated, steps=steps, draws=draws, max_cache_age=trained.config.max_cache_age)
    drawn = trained.population.over_users(function, jax.device_put(trained.weights), users, positions, trained.tables, world)

    def in_rows(leaf: np.ndarray) -> np.ndarray:
        return np.moveaxis(leaf, 0, 2).reshape(steps, draws * len(users), *leaf.shape[3:])

    context, realised, failed = jax.tree.map(in_rows, drawn)
    of_steps = np.broadcast_to(ranks[:, :, :, None], (*ranks.shape[:3], steps, ranks.shape[3]))
    return ReplayRecords(ranks=of_steps, contexts=context, realised=realised, failed=failed)


def _situations(
    system: System,
    catalogue: Catalogue,
    history: HistoryBatch,
    tables: ItemTables,
    world: PlanningWorld,
    draw: Array,
    step: Array,
    *,
    max_cache_age: int,
) -> tuple[Context, PlanCosts, Array]:
    """Context, realised costs and failure of request ``step`` of each user, whose events have numbers in a row."""
    del system, catalogue
    return situations(history, tables, world, draw, history.event_ids - step, max_cache_age)


def _repeated(
    system: System,
    catalogue: Catalogue,
    history: HistoryBatch,
    tables: ItemTables,
    world: PlanningWorld,
    *,
    steps: int,
    draws: int,
    max_cache_age: int,
) -> tuple[Context, PlanCosts, Array]:
    """Context, realised costs and failure of all requests of each user, leaves [b, steps, draws]."""
    del system, catalogue

    def one(step: Array, draw: Array) -> tuple[Context, PlanCosts, Array]:
        first = draw * steps
        return situations(history, tables, world, first + step, history.event_ids, max_cache_age, device_draw=first)

    of_step = jax.vmap(one, in_axes=(None, 0), out_axes=1)
    return jax.vmap(of_step, in_axes=(0, None), out_axes=1)(jnp.arange(steps), jnp.arange(draws))


def situations(
    history: HistoryBatch,
    tables: ItemTables,
    world: PlanningWorld,
    draw: Array | int,
    device_events: Int[Array, "b"],
    max_cache_age: int,
    device_draw: Array | int | None = None,
) -> tuple[Context, PlanCosts, Array]:
    """Context, realised costs and failure of requests before the events of ``history``, by devices that stay what they are.

    Consent, tier and memory are draw ``device_draw`` (``draw`` if None) for the event ``device_events`` of each device, all else is
    draw ``draw`` for the request's own. Jittable.
    """
    facts = facts_of(history, tables, max_cache_age)
    first = sample_contexts(facts, device_events, world.scales, draw if device_draw is None else device_draw, CONTEXTS)
    drawn = sample_contexts(facts, history.event_ids, world.scales, draw, CONTEXTS)
    context = replace(drawn, **{name: getattr(first, name) for name in OF_THE_DEVICE})
    requests = requests_of(world, context, history.event_ids, draw, LINKS)
    return context, requests.realised, requests.failed


@runtime_checkable
class Scheduler(Protocol):
    """Chooses plans along a replay. ``step`` is the number of the request; only schedules that learn nothing may read it."""

    def choose(self, requests: Requests, step: int) -> Int[Array, "b"]:
        """Index of the wanted plan of each request; one that its mask allows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a scheduler made of a replay. NumPy arrays."""

    plans: Int[np.ndarray, "steps rows"]
    cache_level: Int[np.ndarray, "steps rows"]  # as each request found it
    cache_age_events: Float[np.ndarray, "steps rows"]
    values: dict[str, Float[np.ndarray, "steps rows"]]  # hit_rate@10, ndcg@10, calls, latency_ms, exposure, utility
    num_users: int

    def per_user(self, name: str, steps: slice = slice(None)) -> Float[np.ndarray, "n"]:
        """Mean of a quantity over each user's requests (of ``steps``) and draws."""
        return self.values[name][steps].mean(axis=0, dtype=np.float64).reshape(-1, self.num_users).mean(axis=0)


def play(records: ReplayRecords, world: PlanningWorld, scheduler: Scheduler, max_cache_age: int) -> Played:
    """All requests in order. The first finds a cache that was made one event before, at the level of consent.

    A fresh plan whose link fails renews nothing; its request is answered by the local repair plan, and counts as a call.
    """
    cache, columns = Cache.of_the_last_event(records.contexts.consent[0]), []
    for step in range(records.num_steps):
        situation = jax.tree.map(lambda leaf, step=step: leaf[step], (records.contexts, records.realised, records.failed))
        requests = ask(world, cache, *situation)
        plans = scheduler.choose(requests, step)
        found, renewed = _answer(requests, records.ranks[:, :, :, step], plans, max_cache_age=max_cache_age)
        columns.append(jax.tree.map(np.asarray, (plans, cache.level, cache.age_events, found)))
        cache = renewed
    plans, levels, ages, values = jax.tree.map(lambda *leaves: np.stack(leaves), *columns)
    if (values.pop("rank") < 1).any():
        raise ValueError("a plan was chosen whose rank was never computed: the cache is older than the replay")
    return Played(plans=plans, cache_level=levels, cache_age_events=ages, values=values, num_users=records.num_users)


@jax.jit
def ask(world: PlanningWorld, cache: Cache, context: Context, realised: PlanCosts, failed: Array) -> Requests:
    """The requests of one step with the cache that is there. Of what was realised only exposure depends on it."""
    context = replace(context, cache_level=cache.level, cache_age_events=cache.age_events)
    predicted = world.costs(context)
    return Requests(
        context=context,
        mask=allowed(context, world.space),
        predicted=predicted,
        realised=replace(realised, exposure=predicted.exposure),
        failed=failed,
    )


@partial(jax.jit, static_argnames="max_cache_age")
def _answer(
    requests: Requests, ranks: Int[Array, "levels ages n p"], plans: Int[Array, "b"], *, max_cache_age: int
) -> tuple[dict[str, Array], Cache]:
    context = requests.context
    level = jnp.maximum(context.cache_level - 1, 0)
    age = jnp.maximum(context.cache_age_events.astype(jnp.int32) - 1, 0)
    of_plans = jnp.asarray(ranks)[level, age, jnp.arange(len(plans)) % ranks.shape[2]]
    return settle(requests, of_plans, plans, max_cache_age=max_cache_age)


@partial(jax.jit, static_argnames="max_cache_age")
def settle(requests: Requests, ranks: PlanRanks, plans: Int[Array, "b"], *, max_cache_age: int) -> tuple[dict[str, Array], Cache]:
    """What happens under the wanted plans whose ``ranks`` the targets have, and the caches that they leave."""
    context, rows, space = requests.context, jnp.arange(len(plans)), requests.predicted.space
    calls = jnp.asarray(space.table.uses_link)[plans]
    answering = jnp.where(calls & requests.failed, local_repair(requests.mask, space)[rows, plans], plans)
    rank = ranks[rows, answering]
    quality = plan_quality(ranks)
    gained = realised_utility(quality, requests.realised, context, failed=requests.failed, mask=requests.mask)
    values = {
        "rank": rank,
        "hit_rate@10": hit_rate(rank, 10),
        "ndcg@10": ndcg(rank, 10),
        "calls": calls.astype(jnp.float32),
        "repaired": (calls & requests.failed).astype(jnp.float32),
        "latency_ms": happened_latency_ms(requests)[rows, plans],
        "exposure": requests.realised.exposure[rows, plans],
        "utility": gained[rows, plans],
    }
    arrived = jnp.asarray(space.table.semantic_cloud)[plans] & ~requests.failed
    fresh_level = jnp.where(arrived, jnp.asarray(space.table.level)[plans], 0)
    found = Cache(level=context.cache_level, age_events=context.cache_age_events)
    return values, next_cache(found, fresh_level, max_cache_age)
