"""Devices between requests: caches, versions, and items that are not on offer."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.data.synthetic import SyntheticConfig, World, synthetic_world
from cda4rec_jax.evaluation.long_run import Deployment, Fleet, Shop, refused_plans, serve
from cda4rec_jax.evaluation.replay import Cache
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.planner import FixedPlan, plan_index
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained

REUSE, LOCAL, FRESH = (plan_index(name) for name in ("reuse-20-skip", "local-reuse-skip", "fresh-profile-20-skip"))


@pytest.fixture(scope="module")
def trained(tiny_run: Path) -> TrainedSystem:
    return load_trained(tiny_run)


@pytest.fixture(scope="module")
def world(trained: TrainedSystem) -> World:
    """A world with as many items as the tables of the run that serves in it."""
    return synthetic_world(SyntheticConfig(num_users=40, num_items=trained.corpus.interactions.num_items, retired=0.2))


@pytest.fixture(scope="module")
def shop(trained: TrainedSystem, world: World) -> Shop:
    return Shop(world=world, corpus=Corpus(interactions=world.interactions, text=trained.corpus.text))


@pytest.fixture(scope="module")
def deployments(trained: TrainedSystem) -> dict[int, Deployment]:
    """Two versions; the second one's cloud agent has other weights."""
    other = replace(trained, weights=jax.tree.map(lambda leaf: -leaf, trained.weights))
    return {version: Deployment.of(version, trained, cloud) for version, cloud in enumerate((trained, other))}


def test_items_that_are_not_on_offer_are_removed_like_seen_ones(shop: Shop, world: World):
    data, users = world.interactions, np.array([3, 9])
    positions = np.array([5, 7])
    history = shop.histories(users, positions, 20)
    closed = world.truth.catalogue.closed_at(data.timestamps[data.offsets[users] + positions])
    for row, user in enumerate(users):
        expected = set(data.history(int(user))[: positions[row]].tolist()) | set(np.flatnonzero(closed[row]).tolist())
        assert set(history.seen[row].tolist()) - {0} == expected and history.targets[row] not in expected


def test_only_a_plan_that_sends_the_embedding_of_another_version_is_refused():
    plans, other = np.array([REUSE, REUSE, LOCAL, FRESH]), np.array([True, False, True, True])
    assert refused_plans(plans, other).tolist() == [True, False, False, False]


def test_a_fleet_remembers_what_each_device_keeps():
    fleet, users = Fleet(5), np.array([1, 3])
    cache, version = fleet.found(users, jnp.array([2, 0]), 0)
    assert cache.level.tolist() == [2, 0] and cache.age_events.tolist() == [1, 0] and version.tolist() == [0, 0]
    fleet.keep(users[:1], Cache(level=jnp.array([1]), age_events=jnp.array([4.0])), np.array([0]))
    cache, version = fleet.found(users, jnp.array([2, 3]), 1)
    assert cache.level.tolist() == [1, 3] and cache.age_events.tolist() == [4, 1] and version.tolist() == [0, 1]


def test_devices_keep_their_models_when_the_cloud_gets_a_new_version(trained: TrainedSystem, deployments: dict[int, Deployment]):
    old, new = deployments[0], deployments[1]
    for kept, found in zip(*(jax.tree.leaves(each.catalogue.evidence) for each in (old, new)), strict=True):
        np.testing.assert_array_equal(kept, found)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), old.weights["device"], new.weights["device"]))
    assert not np.array_equal(old.catalogue.vectors, new.catalogue.vectors)


def test_an_old_embedding_is_refused_once_and_dropped(shop: Shop, world: World, deployments: dict[int, Deployment]):
    users = np.repeat(np.arange(40), 3)
    positions = np.tile([5, 6, 7], 40)
    first = positions == 5
    fleet = Fleet(40)
    before = serve(shop, deployments, 0, FixedPlan(LOCAL).logits, fleet, users[first], positions[first])
    assert not before["other_version"].any() and not before["calls"].any()
    after = serve(shop, deployments, 1, FixedPlan(REUSE).logits, fleet, users[~first], positions[~first])
    again = positions[~first] == 7
    refused = after["refused"] > 0
    assert refused[~again].any() and not refused[again & (np.roll(refused, 1))].any()
    assert (after["repaired"][refused] == 1).all() and (after["calls"][refused] == 1).all()
    assert (after["other_version"] >= after["refused"]).all()
    # Local plans go on with what the old version found, whatever the cloud runs.
    same = [Fleet(40), Fleet(40)]
    answers = [serve(shop, deployments, 0, FixedPlan(LOCAL).logits, fleet, users[first], positions[first]) for fleet in same]
    later = [
        serve(shop, deployments, version, FixedPlan(LOCAL).logits, fleet, users[~first], positions[~first])
        for version, fleet in enumerate(same)
    ]
    np.testing.assert_array_equal(answers[0]["rank"], answers[1]["rank"])
    np.testing.assert_array_equal(later[0]["rank"], later[1]["rank"])
    assert later[1]["other_version"].any() and not later[0]["other_version"].any()
