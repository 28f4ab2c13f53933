"""Ranks under a declared age of the cloud's view."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.agents.device.features import STRUCTURED_FEATURES
from cda4rec_jax.data import Split
from cda4rec_jax.evaluation.conditions import (
    CLOUD_WEIGHTS,
    cache_plans,
    can_be_stale,
    device_alone_ranks,
    mixture_ranks,
    plan_ranks,
)
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.metrics import MISS_RANK
from cda4rec_jax.planner import PLANS, plan_index
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained


@pytest.fixture(scope="module")
def trained(tiny_run: Path) -> TrainedSystem:
    return load_trained(tiny_run)


@pytest.fixture(scope="module")
def asked(trained: TrainedSystem) -> tuple[np.ndarray, np.ndarray]:
    """Users with a long past, and the positions of their targets."""
    positions = trained.corpus.target_positions(Split.TEST)
    users = np.flatnonzero(can_be_stale(positions, 20))[:24]
    return users, positions[users]


def test_drawn_contexts_and_declared_ones_agree_on_the_same_cache(trained: TrainedSystem, asked):
    users, positions = asked
    records = trained.population.records(trained.weights, trained.world(), users, positions, draws=1)
    context = jax.tree.map(lambda leaf: np.asarray(leaf[0]), records.requests.context)
    same = (context.cache_level == EgressLevel.RECENT) & (context.cache_age_events == 1)
    assert same.any()
    found = plan_ranks(trained, users, positions, age_events=1, level=EgressLevel.RECENT)
    np.testing.assert_array_equal(found[same], records.ranks[same])
    fresh = [plan_index(plan.name) for plan in PLANS if plan.name.startswith(("fresh", "cloud"))]
    np.testing.assert_array_equal(found[:, fresh], records.ranks[:, fresh])


def test_a_view_of_now_retrieves_what_asking_anew_does(trained: TrainedSystem, asked):
    ranks = plan_ranks(trained, *asked, age_events=0)
    for kind in ("device", "skip"):
        np.testing.assert_array_equal(ranks[:, plan_index(f"reuse-100-{kind}")], ranks[:, plan_index(f"fresh-full-100-{kind}")])
    stale = plan_ranks(trained, *asked, age_events=10)
    assert np.any(stale[:, plan_index("reuse-100-device")] != ranks[:, plan_index("reuse-100-device")])


def test_plans_of_the_cache_alone_have_the_ranks_that_they_have_among_all(trained: TrainedSystem, asked):
    chosen, condition = cache_plans(trained.config.space), {"age_events": 2, "level": EgressLevel.RECENT}
    names = [trained.config.space.names[plan] for plan in chosen]
    assert names == [name for name in trained.config.space.names if name.startswith(("reuse-", "local-"))]
    alone = plan_ranks(trained, *asked, **condition, by_cache_alone=True)
    np.testing.assert_array_equal(alone, plan_ranks(trained, *asked, **condition)[:, chosen])


def test_the_cloud_alone_with_an_old_view_is_the_cloud_before_those_events(trained: TrainedSystem, asked):
    users, positions = asked
    now = trained.population.full_ranks(trained.weights, users, positions)
    old = trained.population.full_ranks(trained.weights, users, positions, 5)
    np.testing.assert_array_equal(now, trained.population.full_ranks(trained.weights, users, positions, 0))
    assert np.any(old != now)


def test_the_device_alone_over_the_catalogue_ranks_popular_items_as_its_local_plan_does(trained: TrainedSystem, asked):
    local = plan_ranks(trained, *asked, level=EgressLevel.NOTHING)[:, plan_index("local-skip-device")]
    whole = device_alone_ranks(trained, *asked)
    found = local < MISS_RANK
    assert found.any()
    # All items of the local pool are in the catalogue, with the same scores, so more can only stand ahead.
    assert np.all(whole[found] >= local[found]) and whole.max() <= trained.corpus.interactions.num_items


def test_a_device_that_holds_every_record_finds_more_and_ranks_it_as_the_whole_catalogue(trained: TrainedSystem, asked):
    every = jnp.arange(1, trained.corpus.interactions.num_items + 1)
    parts = {name: getattr(trained, name) for name in ("run", "config", "corpus", "graph", "weights")}
    holding = TrainedSystem(tables=replace(trained.tables, resident_items=every), **parts)
    few, all_held = (
        plan_ranks(each, *asked, level=EgressLevel.NOTHING)[:, plan_index("local-skip-device")] for each in (trained, holding)
    )
    found, whole = all_held < MISS_RANK, device_alone_ranks(holding, *asked)
    assert np.sum(few < MISS_RANK) < np.sum(found) < len(found)
    assert np.all(all_held[found] <= whole[found])  # what the device did not find can only have stood ahead


def test_the_weight_of_the_cloud_turns_the_devices_order_into_the_clouds(trained: TrainedSystem, asked):
    ranks = mixture_ranks(trained, *asked, age_events=1)
    pool = plan_ranks(trained, *asked, age_events=1)[:, plan_index("local-reuse-device")] < MISS_RANK
    assert ranks.shape == (len(asked[0]), len(CLOUD_WEIGHTS)) and np.any(ranks[:, 0] != ranks[:, -1])
    assert np.all((ranks < MISS_RANK) == pool[:, None])


def test_a_head_without_the_devices_features_ranks_as_if_structured_modelling_were_skipped(trained: TrainedSystem, asked):
    config = replace(trained.config, without_features=STRUCTURED_FEATURES)
    parts = {name: getattr(trained, name) for name in ("run", "corpus", "graph", "weights", "tables")}
    ranks = plan_ranks(TrainedSystem(config=config, **parts), *asked, age_events=1)
    for pool in ("fresh-full-100", "reuse-500", "local-reuse"):
        np.testing.assert_array_equal(ranks[:, plan_index(f"{pool}-device")], ranks[:, plan_index(f"{pool}-skip")])
    with pytest.raises(ValueError, match="without_features"):
        replace(config, without_features=("charm",))


def test_a_past_that_is_too_short_or_an_age_beyond_the_cache_is_refused(trained: TrainedSystem, asked):
    users, positions = asked
    with pytest.raises(ValueError, match="too short"):
        plan_ranks(trained, users, np.full_like(positions, 3), age_events=3)
    with pytest.raises(ValueError, match="20 events"):
        plan_ranks(trained, users, positions, age_events=21)
