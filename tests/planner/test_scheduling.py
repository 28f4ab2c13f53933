"""A planner that pays for calls, and looks at what a fresh cache is worth to later requests."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.messages import Context, EgressLevel
from cda4rec_jax.planner import (
    NUM_PLANS,
    STANDARD,
    PayloadSizes,
    PlanCosts,
    Policy,
    PolicyConfig,
    allowed,
    choose,
    context_features,
    deployment_profile,
    explain_decision,
    plan_costs,
    plan_index,
    ranked_terms,
)
from cda4rec_jax.planner.scheduling import MIN_REQUESTS, OLDEST, CallScheduler, QualityByAge, freshness_values

FRESH, LOCAL = plan_index("fresh-full-20-skip"), plan_index("local-reuse-skip")
PRICE = 0.25
USES_LINK = STANDARD.table.uses_link


@pytest.fixture(scope="module")
def scheduler() -> CallScheduler:
    """To the policy any two plans are equal but the local one, .1 better; a cache loses .1 of its worth with every event."""
    policy = Policy(PolicyConfig(), rngs=nnx.Rngs(0))
    policy.standardise(jnp.asarray(0.05), jnp.zeros(NUM_PLANS).at[LOCAL].set(0.1))
    freshness = np.zeros((4, 4, 6))
    freshness[:, 1:, 1:] = 0.5 - 0.1 * np.arange(5)
    return CallScheduler.of(policy, PRICE, freshness)


def costs_of(context: Context) -> PlanCosts:
    return plan_costs(deployment_profile(), context, jnp.asarray([0.0, 0.3, 0.6, 0.9]), PayloadSizes())


def test_it_calls_where_the_cache_has_become_too_old(scheduler: CallScheduler, make_context: Callable[..., Context]) -> None:
    """Calling is worth -.25 + .5; at age a, not calling is worth .1 and a cache of .5 - .1 a, but at least .1."""
    calls = []
    for age in range(1, 12):
        context = make_context(1, cache_age_events=age, utility_per_ms=age)  # prices of time rise, and do not matter
        mask = allowed(context)
        plan = int(choose(scheduler.logits(context, costs_of(context), mask), mask)[0])
        assert USES_LINK[plan] or plan == LOCAL
        calls.append(bool(USES_LINK[plan]))
    assert calls == [False] * 3 + [True] * 8


def test_the_terms_sum_to_the_logit_and_nothing_forbidden_has_one(
    scheduler: CallScheduler, make_context: Callable[..., Context]
) -> None:
    context = make_context(3, cache_age_events=4, consent=EgressLevel.RECENT)
    costs, mask = costs_of(context), allowed(context)
    logits = np.asarray(scheduler.logits(context, costs, mask))
    further = scheduler.further_terms(context, costs)
    assert list(further) == ["price_of_a_call", "worth_to_later_requests"]
    whole = np.asarray(scheduler.quality(context_features(context)) + sum(further.values()))
    np.testing.assert_allclose(logits[np.asarray(mask)], whole[np.asarray(mask)], rtol=1e-6)
    assert (logits[~np.asarray(mask)] == -np.inf).all() and not np.asarray(mask)[:, FRESH].any()
    np.testing.assert_allclose(further["price_of_a_call"][0], -PRICE * USES_LINK, rtol=1e-6)
    later = np.asarray(further["worth_to_later_requests"])[0]
    assert later[plan_index("fresh-recent-20-skip")] == pytest.approx(0.5 - 0.1) and later[LOCAL] == 0


def test_an_explanation_tells_costs_beside_the_sum(scheduler: CallScheduler, make_context: Callable[..., Context]) -> None:
    context = make_context(1, cache_age_events=5)
    costs, mask = costs_of(context), allowed(context)
    logits, quality = scheduler.logits(context, costs, mask), scheduler.quality(context_features(context))
    terms = {"further": scheduler.further_terms(context, costs), "prices_count": scheduler.prices_count}
    ranked = ranked_terms(logits, quality, costs, context, **terms)
    for plan in ranked:
        assert plan.total == pytest.approx(plan.logit, abs=1e-6) and not plan.is_utility
        assert plan.quality is not None
        assert plan.utility == pytest.approx(plan.quality + plan.time + plan.energy + plan.exposure)
        assert plan.time < 0
    decision = explain_decision(logits, quality, costs, context, tau=float(scheduler.tau()), chosen=LOCAL, **terms)
    assert decision.runner_up is not None and USES_LINK[decision.runner_up.plan_index]
    assert decision.margin is not None
    assert decision.margin == pytest.approx(0.1 + 0.1 - (0.5 - PRICE), abs=1e-6)
    assert (
        decision.utility_margin is not None and decision.utility_margin > decision.margin
    )  # calling is dearer in all that it leaves out


def test_a_table_of_fewer_ages_goes_on_as_it_ends_and_one_of_more_is_refused() -> None:
    policy = Policy(PolicyConfig(), rngs=nnx.Rngs(0))
    found = CallScheduler.of(policy, 0.0, np.broadcast_to(np.array([0.0, 3.0, 2.0]), (4, 4, 3))).freshness[...]
    np.testing.assert_array_equal(found[2, 1], [0.0, 3.0, *[2.0] * (OLDEST - 1)])
    with pytest.raises(ValueError, match="has 12 ages, expected at most 11"):
        CallScheduler.of(policy, 0.0, np.zeros((4, 4, 12)))


def test_an_age_that_few_requests_can_have_is_worth_what_the_age_before_it_is() -> None:
    rows = {1: 40, 2: MIN_REQUESTS, 3: MIN_REQUESTS - 1}
    reuses = STANDARD.table.semantic_reuse

    def quality_under(level: int, age: int) -> np.ndarray:
        return np.tile(np.where(reuses, 0.5 / age - 0.01 * level, 0.6), (rows[age], 1))

    found = QualityByAge.estimated(quality_under, 3).quality
    np.testing.assert_allclose(found[2, :, LOCAL], [0.0, 0.48, 0.23, 0.23])
    np.testing.assert_allclose(found[:, :, FRESH], 0.6)


def test_a_higher_price_makes_a_fresh_cache_worth_less() -> None:
    quality = np.full((4, 4, NUM_PLANS), 0.2)
    quality[:, :, USES_LINK] = 0.5
    values = [freshness_values(QualityByAge(quality=quality), price)[3, 3, 1] for price in (0.0, 0.1, 0.2, 1.0)]
    np.testing.assert_allclose(values, [4.5, 3.6, 2.7, 1.8], atol=1e-5)  # .9 / (1 - .9) = 9 times the best of .5 - price and .2
