"""Requests in order: the cache follows from the choices, and outcomes from the cache."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.evaluation.conditions import plan_ranks
from cda4rec_jax.evaluation.replay import Cache, ReplayRecords, cached_ranks, next_cache, play, record_replay, replay_positions
from cda4rec_jax.evaluation.schedulers import (
    Priced,
    Schedule,
    calibrated_price,
    evenly_spaced,
    no_freshness,
    quality_by_age,
    unpriced,
)
from cda4rec_jax.messages import EgressLevel, Link
from cda4rec_jax.planner import NUM_PLANS, PLANS, local_repair, plan_index
from cda4rec_jax.planner.scheduling import QualityByAge, freshness_values
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained

STEPS, USERS, MAX_AGE = 4, 24, 20
FRESH, LOCAL = plan_index("fresh-recent-20-skip"), plan_index("local-reuse-skip")


@pytest.fixture(scope="module")
def trained(tiny_run: Path) -> TrainedSystem:
    return load_trained(tiny_run)


@pytest.fixture(scope="module")
def asked(trained: TrainedSystem) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(trained.corpus.interactions.offsets)
    users = np.flatnonzero(lengths >= STEPS + 5)[:USERS]
    return users, replay_positions(lengths[users], STEPS)


@pytest.fixture(scope="module")
def records(trained: TrainedSystem, asked) -> ReplayRecords:
    """Situations as they are drawn, with ranks that tell every cache, request and plan apart."""
    ranks = np.random.default_rng(0).integers(1, 200, (3, STEPS, USERS, STEPS, NUM_PLANS)).astype(np.int32)
    users, positions = asked
    return record_replay(trained, trained.world(), users, positions, ranks, draws=2)


@pytest.fixture(scope="module")
def reachable(records: ReplayRecords) -> ReplayRecords:
    """The same where everybody consents to all and no link is ever down."""
    contexts = records.contexts
    level, link = np.full_like(contexts.consent, EgressLevel.FULL), np.full_like(contexts.link, Link.WIFI)
    return replace(records, contexts=replace(contexts, consent=level, link=link), failed=np.zeros_like(records.failed))


def scheduled(records: ReplayRecords, calls: list[bool]) -> Schedule:
    every = np.broadcast_to(np.array(calls)[:, None], (STEPS, records.num_rows))
    return Schedule(calls=every, calling_plan=FRESH, other_plan=LOCAL)


def test_a_cache_is_renewed_ages_and_is_dropped():
    cache, found = Cache.of_the_last_event(jnp.array([0])), []
    for fresh_level in (0, 2, 0, 0, 3, 1, 0, 0, 0, 0):
        cache = next_cache(cache, jnp.array([fresh_level]), 3)
        found.append((int(cache.level[0]), float(cache.age_events[0])))
    assert found == [(0, 0), (2, 1), (2, 2), (2, 3), (3, 1), (1, 1), (1, 2), (1, 3), (0, 0), (0, 0)]


def test_choices_make_the_cache_that_later_requests_find(trained: TrainedSystem, reachable: ReplayRecords):
    played = play(reachable, trained.world(), scheduled(reachable, [True, False, False, True]), MAX_AGE)
    np.testing.assert_array_equal(played.cache_age_events, np.tile([[1], [1], [2], [3]], (1, reachable.num_rows)))
    np.testing.assert_array_equal(played.cache_level, np.tile([[3], [2], [2], [2]], (1, reachable.num_rows)))
    users = np.arange(reachable.num_rows) % USERS
    for step, (level, age, plan) in enumerate([(2, 0, FRESH), (1, 0, LOCAL), (1, 1, LOCAL), (1, 2, FRESH)]):
        hits = reachable.ranks[level, age, users, step, plan] <= 10
        np.testing.assert_array_equal(played.values["hit_rate@10"][step], hits)
    np.testing.assert_array_equal(played.values["calls"].mean(axis=1), [1, 0, 0, 1])
    assert played.per_user("calls").shape == (USERS,) and np.allclose(played.per_user("calls"), 0.5)


def test_a_planner_that_always_calls_finds_a_cache_of_one_event(trained: TrainedSystem, reachable: ReplayRecords):
    played = play(reachable, trained.world(), scheduled(reachable, [True] * STEPS), MAX_AGE)
    assert (played.cache_age_events == 1).all() and (played.cache_level[1:] == EgressLevel.RECENT).all()
    never = play(reachable, trained.world(), scheduled(reachable, [False] * STEPS), MAX_AGE)
    np.testing.assert_array_equal(never.cache_age_events[:, 0], [1, 2, 3, 4])
    forgetful = play(reachable, trained.world(), scheduled(reachable, [False] * STEPS), 2)
    np.testing.assert_array_equal(forgetful.cache_level[:, 0], [3, 3, 0, 0])


def test_a_call_whose_link_fails_counts_and_renews_nothing(trained: TrainedSystem, reachable: ReplayRecords):
    failed = np.zeros_like(reachable.failed)
    failed[1] = True
    played = play(replace(reachable, failed=failed), trained.world(), scheduled(reachable, [True, True, False, False]), MAX_AGE)
    assert (played.cache_age_events[2] == 2).all() and (played.values["calls"][:2] == 1).all()
    mask = np.zeros((1, NUM_PLANS), bool)
    mask[0, [FRESH, LOCAL, plan_index("local-skip-skip")]] = True
    assert int(local_repair(jnp.asarray(mask))[0, FRESH]) == LOCAL
    ranks = reachable.ranks[1, 0, np.arange(reachable.num_rows) % USERS, 1, LOCAL]
    np.testing.assert_array_equal(played.values["hit_rate@10"][1], ranks <= 10)


def test_the_device_stays_and_its_situation_changes(records: ReplayRecords):
    contexts = records.contexts
    for name in ("consent", "tier", "free_memory_mb"):
        values = getattr(contexts, name)
        assert (values == values[:1]).all() and len(np.unique(values[0])) > 1
    assert (contexts.link != contexts.link[:1]).any() and (contexts.utility_per_ms != contexts.utility_per_ms[:1]).any()
    np.testing.assert_array_equal(np.diff(contexts.history_length, axis=0), 1)


def test_no_cache_is_above_consent_and_no_choice_depends_on_the_other_users(trained: TrainedSystem, records: ReplayRecords):
    means = quality_by_age(records)
    scheduler = Priced(worth=means.worth, price=0.0, freshness=freshness_values(means, 0.0))
    played = play(records, trained.world(), scheduler, MAX_AGE)
    assert (played.cache_level <= records.contexts.consent).all() and played.cache_level.max() > 1
    some = np.array([3, 7, 11])
    alone = play(records.of(some), trained.world(), scheduler, MAX_AGE)
    rows = np.concatenate([some, USERS + some])
    np.testing.assert_array_equal(alone.plans, played.plans[:, rows])
    np.testing.assert_allclose(alone.values["utility"], played.values["utility"][:, rows], rtol=1e-5, atol=1e-6)


def test_ranks_are_those_of_the_declared_cache(trained: TrainedSystem, asked):
    users, positions = (column[:4] for column in asked)
    found = cached_ranks(trained, users, positions)
    assert found.shape == (3, STEPS, 4, STEPS, NUM_PLANS)
    direct = plan_ranks(trained, users, positions[:, 3], age_events=2, level=EgressLevel.RECENT)
    np.testing.assert_array_equal(found[1, 1, :, 3], direct)
    assert (found[:, 0] >= 1).all() and (found[:, 2, :, :2] == 0).all()


def test_evenly_spaced_calls():
    at_once = np.array([0.0, 0.75])
    calls = evenly_spaced(10, 0.3, at_once)
    assert [np.flatnonzero(row).tolist() for row in calls.T] == [[3, 6, 9], [0, 4, 7]]
    assert np.flatnonzero(evenly_spaced(10, 1 / 3, at_once[:1])[:, 0]).tolist() == [2, 5, 8]
    many = evenly_spaced(10, 0.3, np.random.default_rng(0).random(1000))
    np.testing.assert_allclose(many.mean(axis=1), 0.3, atol=0.05)


@pytest.fixture
def two_plans() -> QualityByAge:
    """A fresh plan at level FULL is worth 1, a local one with a cache of age 1 is worth .5, and nothing else is worth anything."""
    quality = np.zeros((4, 4, NUM_PLANS))
    quality[:, :, plan_index("fresh-full-20-skip")] = 1.0
    quality[1:, 1, LOCAL] = 0.5
    return QualityByAge(quality=quality)


def test_freshness_is_what_a_cache_is_worth_to_later_requests(two_plans: QualityByAge):
    free = freshness_values(two_plans, price=0.0, discount=0.9)
    np.testing.assert_allclose(free[EgressLevel.FULL], 9.0, atol=1e-4)  # .9 (1 + .9 + .81 + ...), whatever the cache
    dear = freshness_values(two_plans, price=10.0, discount=0.9)
    assert dear[EgressLevel.FULL, EgressLevel.FULL, 1] == pytest.approx(0.45) and dear[EgressLevel.FULL, 0, 0] == 0
    assert free[EgressLevel.NOTHING, 0, 0] == 0  # without consent there is nothing fresh
    # At a price of .8 it is best to call at every second request: V(1) = .5 + .9 V(2), V(2) = 1 - .8 + .9 V(1).
    between = freshness_values(two_plans, price=0.8, discount=0.9)
    of_one = 0.68 / 0.19
    np.testing.assert_allclose(between[3, 3, 1:3], [0.9 * of_one, 0.9 * (0.2 + 0.9 * of_one)], atol=1e-5)


def test_freshness_calls_where_one_request_alone_would_not(
    trained: TrainedSystem, reachable: ReplayRecords, two_plans: QualityByAge
):
    calls = []
    for freshness in (no_freshness(two_plans), freshness_values(two_plans, 1.1)):
        scheduler = Priced(worth=two_plans.worth, price=1.1, freshness=freshness)
        calls.append(play(reachable, trained.world(), scheduler, MAX_AGE).values["calls"].mean(axis=1))
    np.testing.assert_array_equal(calls, [[0, 0, 0, 0], [0, 1, 0, 1]])


def test_quality_by_age_is_relative_to_a_fresh_plan_on_the_same_requests(records: ReplayRecords):
    ranks = np.ones_like(records.ranks)
    reuses = [plan.name.startswith(("reuse", "local-reuse")) for plan in PLANS]
    ranks[..., 2:, :] = 3  # late requests are harder, by whatever plan: worth 1 / log2(4) = .5
    ranks[:, 1:, ..., np.array(reuses)] = 200  # and a cache of more than one event is worth nothing
    quality = quality_by_age(replace(records, ranks=ranks)).quality
    np.testing.assert_allclose(quality[0, 0], np.where(reuses, 0.0, 0.75))
    np.testing.assert_allclose(quality[2, 1], np.where(reuses, 0.75, 0.75))
    np.testing.assert_allclose(quality[2, 3], np.where(reuses, 0.25, 0.75))


def test_a_price_brings_calls_to_the_budget():
    gains = np.random.default_rng(0).uniform(-0.5, 0.5, 1000)

    price = calibrated_price(lambda price: float((gains > price).mean()), 0.3)
    assert 0.298 <= (gains > price).mean() <= 0.3


def test_without_prices_of_a_context_the_worth_is_quality_alone(records: ReplayRecords):
    context, costs = jax.tree.map(lambda leaf: leaf[0], (records.contexts, records.realised))
    mask = np.ones(costs.exposure.shape, bool)

    def prices(context, costs, mask):
        of_row = context.utility_per_ms + context.utility_per_mj + context.utility_per_exposure
        return of_row[:, None] * jnp.ones(mask.shape)

    assert np.any(prices(context, costs, mask) > 0) and not np.any(unpriced(prices)(context, costs, mask))
