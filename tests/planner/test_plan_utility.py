import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.array_typing import Array
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.planner import (
    NUM_PLANS,
    STANDARD,
    PlanCosts,
    WeightScales,
    allowed,
    expected_regret,
    plan_index,
    plan_quality,
    realised_utility,
    utility,
)


def costs_of(
    size: int, latency_ms: Array | float = 0.0, energy_mj: Array | float = 0.0, exposure: Array | float = 0.0
) -> PlanCosts:
    def full(value):
        return jnp.broadcast_to(jnp.asarray(value, jnp.float32), (size, NUM_PLANS))

    return PlanCosts(
        latency_ms=full(latency_ms),
        energy_mj=full(energy_mj),
        exposure=full(exposure),
        uplink_bytes=full(0.0),
        downlink_bytes=full(0.0),
    )


def test_quality_by_hand():
    ranks = jnp.asarray([[1, 3, 7, 100, 101, 0, -1]])
    np.testing.assert_allclose(plan_quality(ranks)[0], [1, 1 / 2, 1 / 3, 1 / np.log2(101), 0, 0, 0], rtol=1e-6)


def test_utility_by_hand(make_context):
    context = make_context(1, utility_per_ms=0.001, utility_per_mj=0.002, utility_per_exposure=0.5)
    worth = utility(jnp.full((1, NUM_PLANS), 0.9), costs_of(1, 100.0, 50.0, 0.4), context)
    np.testing.assert_allclose(worth, 0.9 - 0.1 - 0.1 - 0.2, rtol=1e-5)


def test_expected_regret_is_measured_from_the_best_allowed_plan():
    utilities = jnp.full((1, NUM_PLANS), 0.1).at[0, 3].set(0.9).at[0, 5].set(0.4)
    mask = jnp.ones((1, NUM_PLANS), bool).at[0, 3].set(False)
    regret = np.asarray(expected_regret(utilities, mask))[0]
    assert regret[5] == 0
    assert regret[0] == pytest.approx(0.3)


def test_a_failed_link_gives_the_quality_of_the_local_repair_plan_after_a_timeout(make_context):
    context = make_context(2, utility_per_ms=0.001, utility_per_mj=0.0, utility_per_exposure=0.5)
    fresh, local, skip = plan_index("fresh-full-100-device"), plan_index("local-reuse-device"), plan_index("local-skip-skip")
    quality = jnp.zeros((2, NUM_PLANS)).at[:, fresh].set(0.9).at[:, local].set(0.3)
    latency = jnp.zeros((NUM_PLANS,)).at[fresh].set(80.0).at[local].set(20.0)
    exposure = jnp.zeros((NUM_PLANS,)).at[fresh].set(0.2)
    costs = costs_of(2, latency[None, :], 0.0, exposure[None, :])
    failed = jnp.asarray([False, True])
    worth = realised_utility(quality, costs, context, failed=failed, mask=allowed(context), timeout_ms=300.0)
    assert float(worth[0, fresh]) == pytest.approx(0.9 - 0.08 - 0.1)
    assert float(worth[1, fresh]) == pytest.approx(0.3 - 0.32 - 0.1)
    assert float(worth[1, local]) == pytest.approx(0.3 - 0.02)
    assert float(worth[1, skip]) == 0.0


def test_the_answer_after_a_failure_respects_the_mask(make_context):
    context = make_context(1, cache_level=EgressLevel.NOTHING, utility_per_ms=0.0, utility_per_exposure=0.0, utility_per_mj=0.0)
    quality = jnp.zeros((1, NUM_PLANS)).at[:, plan_index("local-reuse-device")].set(0.9)
    quality = quality.at[:, plan_index("local-skip-device")].set(0.2)
    worth = realised_utility(quality, costs_of(1), context, failed=jnp.asarray([True]), mask=allowed(context))
    assert float(worth[0, plan_index("fresh-full-100-device")]) == pytest.approx(0.2)


def test_scales_by_hand():
    """Quality against the best local plan; costs between the first and the last decile of what each request may choose from."""
    best, local = plan_index("fresh-full-100-device"), plan_index("local-skip-device")
    quality = jnp.zeros((4, NUM_PLANS)).at[:, best].set(jnp.asarray([0.5, 0.7, 0.6, 0.6])).at[:, local].set(0.2)
    tenths = (
        jnp.full((4, NUM_PLANS), 1e6).at[:, :10].set(jnp.arange(10.0)[None, :] * jnp.asarray([[10.0], [20.0], [30.0], [1e6]]))
    )
    mask = jnp.zeros((4, NUM_PLANS), bool).at[:, :10].set(True)
    mask = mask.at[3].set(~jnp.asarray(STANDARD.table.uses_link))  # offline: nothing to choose between device and cloud
    everything = jnp.ones((4, NUM_PLANS), bool)
    scales = WeightScales.from_quality_and_costs(quality, everything, costs_of(4, tenths, -5.0, 1e-3 * tenths), mask)
    assert float(scales.quality_gap) == pytest.approx((0.3 + 0.5 + 0.4 + 0.4) / 4)
    assert float(scales.latency_gap_ms) == pytest.approx(20.0 * (8.1 - 0.9))
    assert float(scales.energy_gap_mj) == 1.0  # no spread: the floor
    assert float(scales.exposure_gap) == pytest.approx(0.02 * (8.1 - 0.9))


def test_scales_have_floors_where_the_best_plan_is_local():
    quality, everything = jnp.zeros((2, NUM_PLANS)).at[:, plan_index("local-skip-skip")].set(0.4), jnp.ones((2, NUM_PLANS), bool)
    scales = WeightScales.from_quality_and_costs(quality, everything, costs_of(2, 5.0), everything)
    assert float(scales.quality_gap) == pytest.approx(1e-3)
    assert float(scales.latency_gap_ms) == 1.0
    assert float(scales.exposure_gap) == pytest.approx(0.01)


def test_scales_of_two_halves_agree_although_noise_picks_another_best_plan_in_each():
    """All cloud plans are equally good and cost very different energy: what the best of them costs is a matter of luck."""
    random, size = np.random.default_rng(3), 4000
    cloud = np.asarray(STANDARD.table.uses_link)
    quality = 0.2 + 0.1 * cloud[None] + 0.3 * random.normal(size=(size, 1)) + 0.05 * random.normal(size=(size, NUM_PLANS))
    energy = np.linspace(1.0, 500.0, NUM_PLANS)[None] * random.lognormal(sigma=0.3, size=(size, 1))
    everything = np.ones((size, NUM_PLANS), bool)

    def scales_of(rows: slice) -> WeightScales:
        costs = costs_of(size // 2, 10.0 + energy[rows] / 3, energy[rows], 1e-3 * energy[rows])
        return WeightScales.from_quality_and_costs(
            jnp.asarray(quality[rows]), jnp.asarray(everything[rows]), costs, jnp.asarray(everything[rows])
        )

    def energy_of_the_best(rows: slice) -> float:
        best = int(np.where(cloud, quality[rows].mean(axis=0), -np.inf).argmax())
        return float(np.median(energy[rows, best]))

    halves = slice(0, size // 2), slice(size // 2, size)
    one, other = (np.asarray([float(value) for value in vars(scales_of(half)).values()]) for half in halves)
    np.testing.assert_allclose(one, other, rtol=0.04)
    np.testing.assert_allclose(one[0], 0.1, atol=0.004)  # not inflated by choosing the luckiest of 28 equal plans
    lucky = [energy_of_the_best(half) for half in halves]
    assert max(lucky) > 1.5 * min(lucky)


def test_scales_that_are_not_positive_are_named():
    with pytest.raises(UserError, match=r"energy_gap_mj=0\.0"):
        WeightScales.of(quality_gap=0.1, latency_gap_ms=1.0, energy_gap_mj=0.0, exposure_gap=1.0)
