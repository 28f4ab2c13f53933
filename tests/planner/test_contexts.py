import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import DeviceTier, EgressLevel, Link
from cda4rec_jax.planner import ContextConfig, WeightScales, context_features, sample_contexts, typical_contexts, user_facts
from cda4rec_jax.planner.contexts import NUM_CONTEXT_FEATURES, weight_features

CONFIG = ContextConfig()
sample = jax.jit(sample_contexts, static_argnames="config")


@pytest.fixture
def contexts(facts, scales):
    return sample(facts, jnp.arange(4000), scales, 0, config=CONFIG)


def shares(column, size: int) -> np.ndarray:
    return np.bincount(np.asarray(column), minlength=size) / len(column)


def test_the_simulated_shares_are_those_of_distribution_v1(contexts):
    np.testing.assert_allclose(shares(contexts.link, 5), CONFIG.link_shares, atol=0.03)
    np.testing.assert_allclose(shares(contexts.consent, 4), CONFIG.consent_shares, atol=0.03)
    np.testing.assert_allclose(shares(contexts.tier, 3), CONFIG.tier_shares, atol=0.03)


def test_estimates_have_the_declared_median_and_offline_has_none(contexts):
    for link in Link:
        rows = np.asarray(contexts.link) == link
        assert np.median(np.asarray(contexts.round_trip_ms)[rows]) == pytest.approx(CONFIG.round_trip_ms[link], rel=0.15)
    offline = np.asarray(contexts.link) == Link.OFFLINE
    assert not np.asarray(contexts.uplink_kbps)[offline].any()


def test_cache_level_is_within_consent_and_absent_caches_have_age_0(contexts, facts):
    level, age = np.asarray(contexts.cache_level), np.asarray(contexts.cache_age_events)
    assert (level <= np.asarray(contexts.consent)).all()
    assert ((level == 0) == (age == 0)).all()
    assert (age <= np.maximum(np.asarray(facts.history_length) - 1, 0)).all() and age.max() <= 10
    full = (np.asarray(contexts.consent) == EgressLevel.FULL) & (level > 0)
    np.testing.assert_allclose(shares(level[full], 4)[1:], 1 / 3, atol=0.06)


def test_cache_age_is_geometric_with_mean_3_before_the_cut(facts, scales):
    uncut = dataclasses.replace(facts, history_length=facts.history_length + 1e4, max_cache_age=facts.max_cache_age + 1e4)
    context = sample(uncut, jnp.arange(4000), scales, 0, config=CONFIG)
    age = np.asarray(context.cache_age_events)[np.asarray(context.cache_level) > 0]
    assert age.mean() == pytest.approx(3.0, rel=0.1)
    assert (age == 1).mean() == pytest.approx(1 / 3, abs=0.04)


def test_weights_are_log_uniform_around_their_scale_and_one_in_ten_is_exactly_0(contexts):
    weights = np.asarray(contexts.utility_per_ms) * 3 * 80.0 / 0.04
    assert (weights == 0).mean() == pytest.approx(0.1, abs=0.02)
    positive = weights[weights > 0]
    assert positive.min() >= 1 / 8 - 1e-4 and positive.max() <= 8 + 1e-4
    assert np.median(positive) == pytest.approx(1.0, rel=0.2)


def test_a_context_depends_on_event_and_draw_alone_and_not_on_the_batch(facts, scales):
    def take(rows):
        return jax.tree.map(lambda x: x[rows], facts)

    rows = jnp.asarray([7, 3, 19])
    shuffled = sample(take(rows), rows, scales, 2, config=CONFIG)
    whole = sample(facts, jnp.arange(4000), scales, jnp.asarray(2), config=CONFIG)
    for few, all_of_them in zip(jax.tree.leaves(shuffled), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(few, all_of_them[rows])
    other = sample(take(rows), rows, scales, 3, config=CONFIG)
    assert not np.array_equal(other.free_memory_mb, shuffled.free_memory_mb)


def test_simulated_fields_do_not_depend_on_the_user(facts, scales):
    ids = jnp.full((4000,), 5)
    context = sample(facts, ids, scales, 0, config=CONFIG)
    for name in ("link", "consent", "tier", "round_trip_ms", "free_memory_mb", "utility_per_ms"):
        assert len(np.unique(np.asarray(getattr(context, name)))) == 1


def test_new_scales_do_not_compile_again(facts, scales):
    traces = []

    @jax.jit
    def step(scales: WeightScales):
        traces.append(1)
        return sample_contexts(facts, jnp.arange(4000), scales, 0, CONFIG).utility_per_ms.sum()

    step(scales)
    step(WeightScales.of(quality_gap=0.1, latency_gap_ms=9.0, energy_gap_mj=7.0, exposure_gap=0.2))
    assert len(traces) == 1


def test_a_typical_context_is_what_was_declared(facts, scales):
    context = typical_contexts(facts, scales, link=Link.EDGE, tier=DeviceTier.LOW, consent=EgressLevel.RECENT, config=CONFIG)
    assert float(context.round_trip_ms[9]) == 400.0
    assert int(context.tier[9]) == DeviceTier.LOW and int(context.cache_level[9]) == EgressLevel.RECENT
    assert float(context.utility_per_ms[9]) == pytest.approx(0.04 / 3 / 80.0)
    assert int(context.cache_level[0]) == EgressLevel.NOTHING  # one event of history: no older state to cache


def test_features_are_finite_of_order_1_and_ignore_the_weights(contexts):
    features = np.asarray(context_features(contexts))
    assert features.shape == (4000, NUM_CONTEXT_FEATURES)
    assert np.isfinite(features).all() and np.abs(features).max() < 3
    free = dataclasses.replace(contexts, utility_per_ms=jnp.zeros((4000,)))
    np.testing.assert_array_equal(context_features(free), features)
    assert (np.asarray(weight_features(free, jnp.asarray(0.04)))[:, 0] == 0).all()


def test_user_facts_of_hand_made_histories():
    categories = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    one = jnp.ones((2,))
    facts = user_facts(
        jnp.asarray([[1, 2, 3], [1, 1, 0]]),
        jnp.asarray([3, 2]),
        categories,
        jnp.asarray([0, 100, 5, 6]),
        session_count=one,
        hours_since_last=one * 2,
        has_timestamps=jnp.asarray([1.0, 0.0]),
        max_cache_age=one,
    )
    np.testing.assert_allclose(facts.category_entropy, [np.log(2), 0.0], atol=1e-6)
    np.testing.assert_allclose(facts.rare_share, [1 / 3, 0.0])
    np.testing.assert_allclose(facts.session_count, [1.0, 0.0])
    np.testing.assert_allclose(facts.hours_since_last, [2.0, 0.0])


@pytest.mark.parametrize(
    ("link", "tier"), [(Link.WIFI, DeviceTier.LOW), (Link.THREE_G, DeviceTier.MID), (Link.OFFLINE, DeviceTier.HIGH)]
)
def test_what_has_a_share_of_0_never_occurs_and_the_others_keep_their_proportions(facts, scales, link, tier):
    """Wherever it stands in its order: a link and a tier that a planner shall not be trained on."""
    links = tuple(0.0 if kind is link else 1.0 + kind for kind in Link)
    tiers = tuple(0.0 if kind is tier else 1.0 + kind for kind in DeviceTier)
    drawn = sample(facts, jnp.arange(4000), scales, 0, config=ContextConfig(link_shares=links, tier_shares=tiers))
    for column, wanted, left_out in ((drawn.link, links, link), (drawn.tier, tiers, tier)):
        found = shares(column, len(wanted))
        assert found[left_out] == 0.0
        np.testing.assert_allclose(found, np.asarray(wanted) / sum(wanted), atol=0.03)


@pytest.mark.parametrize("tiers", [(0.0, 0.0, 0.0), (1.0, -0.1, 0.1), (0.5, 0.5)])
def test_shares_that_are_no_distribution_are_refused(tiers):
    with pytest.raises(UserError, match=r"tier_shares.*expected 3 shares.*low, mid, high"):
        ContextConfig(tier_shares=tiers)
