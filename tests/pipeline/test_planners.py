"""The plug-in planner and the cells of the context oracle."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from cda4rec_jax.messages import Context, EgressLevel
from cda4rec_jax.pipeline.planners import (
    CELLS_PER_LENGTH,
    NUM_LENGTHS,
    PRIOR_REQUESTS,
    PlugIn,
    context_cells,
    cross_fitted_quality,
    mean_quality,
    possible_plans,
)
from cda4rec_jax.planner import NUM_PLANS, PLANS, PlanCosts, plan_index

CONTEXT = {
    "history_length": 30.0,
    "cache_age_events": 2.0,
    "category_entropy": 1.0,
    "rare_share": 0.1,
    "session_count": 0.0,
    "hours_since_last": 0.0,
    "has_timestamps": 0.0,
    "free_memory_mb": 1000.0,
    "round_trip_ms": 50.0,
    "uplink_kbps": 1000.0,
    "downlink_kbps": 8000.0,
    "utility_per_ms": 0.0,
    "utility_per_mj": 0.0,
    "utility_per_exposure": 0.0,
}


def context_of(size: int, **fields: list[float]) -> Context:
    kinds = {"cache_level": 1, "tier": 1, "link": 1, "consent": 3}
    values = {name: jnp.asarray(fields.get(name, [value] * size), jnp.float32) for name, value in CONTEXT.items()}
    values |= {name: jnp.asarray(fields.get(name, [value] * size), jnp.int32) for name, value in kinds.items()}
    return Context(**values)


def costs_of(latency_ms: np.ndarray) -> PlanCosts:
    zero = jnp.zeros(latency_ms.shape)
    latency = jnp.asarray(latency_ms, jnp.float32)
    return PlanCosts(latency_ms=latency, energy_mj=zero, exposure=zero, uplink_bytes=zero, downlink_bytes=zero)


def test_plug_in_weighs_mean_quality_against_the_costs_of_the_context():
    quality = np.zeros((1, NUM_PLANS), np.float32)
    quality[0, 3], quality[0, 7] = 0.3, 0.2
    latency = np.zeros((2, NUM_PLANS))
    latency[:, 3] = 100.0
    context = context_of(2, utility_per_ms=[0.0005, 0.002])  # 100 ms are worth .05, then .2
    logits = PlugIn(quality=quality).logits(context, costs_of(latency), jnp.ones((2, NUM_PLANS), bool))
    np.testing.assert_array_equal(np.argmax(logits, axis=1), [3, 7])
    np.testing.assert_allclose(logits[:, 3], [0.25, 0.1], rtol=1e-6)


def test_plug_in_never_chooses_a_forbidden_plan():
    quality = np.zeros((1, NUM_PLANS), np.float32)
    quality[0, 3] = 0.3
    mask = jnp.ones((1, NUM_PLANS), bool).at[0, 3].set(False)
    logits = PlugIn(quality=quality).logits(context_of(1), costs_of(np.zeros((1, NUM_PLANS))), mask)
    assert logits[0, 3] == -jnp.inf
    assert np.isfinite(np.delete(np.asarray(logits[0]), 3)).all()


def test_plans_that_reuse_are_possible_only_with_a_cache():
    possible = np.asarray(possible_plans(context_of(2, cache_level=[EgressLevel.NOTHING, EgressLevel.PROFILE])))
    reuses = np.array(["reuse" in plan.name for plan in PLANS])
    np.testing.assert_array_equal(possible[0], ~reuses)
    assert possible[1].all()


def test_mean_quality_leaves_out_what_does_not_count():
    quality = np.array([[1.0, 0.5], [0.0, 0.5], [0.5, 0.5]])
    counted = np.array([[True, False], [True, False], [False, False]])
    np.testing.assert_allclose(mean_quality(quality, counted), [0.5, 0.0])


def test_cells_tell_length_age_and_consent_apart():
    context = context_of(
        5, history_length=[5, 6, 5, 5, 1000], cache_age_events=[2, 2, 1, 2, 20], consent=[3, 3, 3, 2, 3], cache_level=[1] * 5
    )
    cells = context_cells(context)
    assert len(set(cells.tolist())) == 5
    assert cells.max() == NUM_LENGTHS * CELLS_PER_LENGTH - 1
    np.testing.assert_array_equal(cells // CELLS_PER_LENGTH, [0, 1, 0, 0, NUM_LENGTHS - 1])


def test_cross_fitting_never_uses_the_fold_that_it_scores():
    rng = np.random.default_rng(0)
    quality = rng.uniform(size=(40, 4)).astype(np.float32)
    counted, cells = np.ones((40, 4), bool), np.zeros(40, np.int64)
    folds = np.arange(40) % 2
    before = cross_fitted_quality(quality, counted, cells, folds)
    changed = quality.copy()
    changed[folds == 0] = 0.0
    after = cross_fitted_quality(changed, counted, cells, folds)
    np.testing.assert_array_equal(after[folds == 0], before[folds == 0])
    np.testing.assert_allclose(after[folds == 1], 0.0)
    np.testing.assert_allclose(before[folds == 0], np.broadcast_to(quality[folds == 1].mean(0), (20, 4)), rtol=1e-5)


def test_a_cell_counts_as_much_as_its_prior_at_the_stated_number_of_requests():
    size = int(PRIOR_REQUESTS)
    quality = np.concatenate([np.ones((size, 1)), np.zeros((size, 1))]).astype(np.float32)
    cells = np.repeat([0, 1], size)  # two cells of one length, whose mean is .5 like that of all
    quality, cells = np.concatenate([quality, quality]), np.concatenate([cells, cells])
    folds = np.repeat([0, 1], 2 * size)
    found = cross_fitted_quality(quality, np.ones(quality.shape, bool), cells, folds)
    np.testing.assert_allclose(found[cells == 0], 0.75)
    np.testing.assert_allclose(found[cells == 1], 0.25)


def test_an_oracle_row_differs_where_its_cell_differs():
    """With a quality for each request, PlugIn is the context oracle."""
    quality = np.zeros((2, NUM_PLANS), np.float32)
    fresh, local = plan_index("fresh-full-100-device"), plan_index("local-reuse-device")
    quality[0, fresh], quality[1, local] = 1.0, 1.0
    context = replace(context_of(2), history_length=jnp.asarray([3.0, 300.0]))
    logits = PlugIn(quality=quality).logits(context, costs_of(np.zeros((2, NUM_PLANS))), jnp.ones((2, NUM_PLANS), bool))
    np.testing.assert_array_equal(np.argmax(logits, axis=1), [fresh, local])
