"""The attack measures what it claims: both controls hold, and telling more exposes more."""

import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.privacy.attacks.history_recovery import AttackConfig, exposure_by_level, history_recovery
from cda4rec_jax.privacy.attacks.ridge import Release

NUM_CATEGORIES = 8
QUICK = AttackConfig(rank=48, ridge_strengths=(0.01, 0.1), max_victims=150, max_holdout=60)


def population(num_users: int, num_items: int, mean_length: int, seed: int = 0):
    """Users with category tastes over a skewed catalogue: (histories, category of each item)."""
    rng = np.random.default_rng(seed)
    categories = rng.integers(0, NUM_CATEGORIES, num_items)
    popularity = 1 / np.arange(1, num_items + 1) ** 0.8
    histories = []
    for length in rng.poisson(mean_length, num_users):
        weights = popularity * (rng.dirichlet(np.full(NUM_CATEGORIES, 0.2))[categories] + 0.01)
        histories.append(1 + rng.choice(num_items, size=max(4, length), replace=False, p=weights / weights.sum()))
    return histories, categories


def csr(histories):
    return np.concatenate([[0], np.cumsum([len(each) for each in histories])]), np.concatenate(histories).astype(np.int32)


def release(histories, categories, num_ids: int) -> Release:
    """Category shares of what is not sent as ids, and the last ids."""
    ids = np.zeros((len(histories), num_ids), np.int32)
    features = np.zeros((len(histories), NUM_CATEGORIES), np.float32)
    for user, history in enumerate(histories):
        kept = max(0, len(history) - num_ids)
        ids[user, : len(history) - kept] = history[kept:]
        features[user] = np.bincount(categories[history[:kept] - 1], minlength=NUM_CATEGORIES) / max(1, kept)
    return Release(features=features, items=ids)


@pytest.fixture(scope="module", params=[200, 48], ids=["reduced catalogue", "whole catalogue"])
def world(request):
    histories, categories = population(400, request.param, 12)
    releases = {
        EgressLevel.PROFILE: release(histories, categories, 0),
        EgressLevel.RECENT: release(histories, categories, 10),
        EgressLevel.FULL: release(histories, categories, 200),
    }
    return releases, *csr(histories), request.param


@pytest.fixture(scope="module")
def report(world):
    return exposure_by_level(*world, config=QUICK)


def test_positive_control_recovers_whole_histories(report):
    assert report.raw_recall == 1.0  # by its ids
    assert report.regressed_recall > report.nothing_recall + 0.2  # without them


def test_null_control_recovers_no_more_than_popularity(report):
    assert report.nothing_recall < 0.8
    for recall in report.null_recall.values():
        assert recall == pytest.approx(report.nothing_recall, abs=0.03)


def test_exposure_is_zero_for_nothing_and_grows_with_the_level(report):
    nothing, profile, recent, full = report.exposure
    assert nothing == 0.0
    assert 0.05 < profile < recent < full <= 1.0


def test_a_profile_of_pure_noise_exposes_nothing(world):
    releases, offsets, items, num_items = world
    noise = np.random.default_rng(3).normal(size=releases[EgressLevel.PROFILE].features.shape).astype(np.float32)
    shown = {EgressLevel.PROFILE: Release(features=noise, items=np.zeros((len(noise), 0), np.int32))}
    assert exposure_by_level(shown, offsets, items, num_items, QUICK).exposure[1] < 0.03


def test_a_level_that_is_not_released_counts_as_the_lower_one(world):
    releases, offsets, items, num_items = world
    report = exposure_by_level({EgressLevel.RECENT: releases[EgressLevel.RECENT]}, offsets, items, num_items, QUICK)
    assert report.exposure[1] == 0.0
    assert report.exposure[3] == report.exposure[2] > 0


def test_the_attack_is_deterministic(world):
    releases, offsets, items, num_items = world
    first, second = (history_recovery(releases[EgressLevel.RECENT], offsets, items, num_items, QUICK) for _ in range(2))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_recall_is_hits_over_what_can_be_found():
    # Everyone owns the same two items of 30: popularity ranks both first, and finds 2 of min(3, 2).
    offsets, items = np.arange(0, 82, 2), np.tile(np.array([4, 9], np.int32), 40)
    silent = Release(features=np.zeros((40, 0), np.float32), items=np.zeros((40, 0), np.int32))
    recall = history_recovery(silent, offsets, items, 30, AttackConfig(k=3))
    np.testing.assert_array_equal(recall, np.ones(40))
    # With k = 1 one item can be found, and is.
    np.testing.assert_array_equal(history_recovery(silent, offsets, items, 30, AttackConfig(k=1)), np.ones(40))


def test_too_few_users_or_items_are_the_users_to_mend():
    histories, categories = population(12, 60, 6)
    with pytest.raises(UserError, match="12 users"):
        exposure_by_level({EgressLevel.PROFILE: release(histories, categories, 0)}, *csr(histories), 60)
    histories, categories = population(30, 20, 6)
    with pytest.raises(UserError, match="20 items"):
        exposure_by_level({EgressLevel.PROFILE: release(histories, categories, 0)}, *csr(histories), 20)
