import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.array_typing import Array
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.planner import (
    NUM_PLANS,
    PlanCosts,
    WeightScales,
    allowed,
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
    """Quality against the best local plan, costs against the plan that costs next to nothing, where best and local are allowed."""
    best, local, cheapest = plan_index("fresh-full-100-device"), plan_index("local-skip-device"), plan_index("local-skip-skip")
    quality = jnp.zeros((3, NUM_PLANS)).at[:, best].set(jnp.asarray([0.5, 0.7, 0.9])).at[:, local].set(0.2)
    latency = jnp.zeros((3, NUM_PLANS)).at[:, best].set(jnp.asarray([100.0, 300.0, 1e6])).at[:, local].set(99.0)
    latency = latency.at[:, cheapest].set(10.0)
    exposure = jnp.zeros((3, NUM_PLANS)).at[:, best].set(0.6)
    mask = jnp.ones((3, NUM_PLANS), bool).at[2, best].set(False)
    scales = WeightScales.from_quality_and_costs(quality, costs_of(3, latency, -5.0, exposure), mask)
    assert float(scales.quality_gap) == pytest.approx((0.3 + 0.5) / 2)
    assert float(scales.latency_gap_ms) == pytest.approx(190.0)
    assert float(scales.energy_gap_mj) == 1.0  # a gap of 0: the floor
    assert float(scales.exposure_gap) == pytest.approx(0.6)


def test_scales_have_floors_where_the_best_plan_is_local():
    quality = jnp.zeros((2, NUM_PLANS)).at[:, plan_index("local-skip-skip")].set(0.4)
    scales = WeightScales.from_quality_and_costs(quality, costs_of(2, 5.0), jnp.ones((2, NUM_PLANS), bool))
    assert float(scales.quality_gap) == pytest.approx(1e-3)
    assert float(scales.latency_gap_ms) == 1.0
    assert float(scales.exposure_gap) == pytest.approx(0.01)


def test_scales_that_are_not_positive_are_named():
    with pytest.raises(UserError, match=r"energy_gap_mj=0\.0"):
        WeightScales.of(quality_gap=0.1, latency_gap_ms=1.0, energy_gap_mj=0.0, exposure_gap=1.0)
