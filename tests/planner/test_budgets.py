"""Budgets: what they count, the price that keeps them, and what happens when none does."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.planner import NUM_PLANS, STANDARD, PlanCosts, allowed, choose, plan_index
from cda4rec_jax.planner.budgets import Budget, Budgeted, KnownRequests, Limited, calibrate, priced_units

SIZE = 2000


def known(seed: int = 0, size: int = SIZE) -> KnownRequests:
    """Two plans: a cloud plan that is worth more or less than a local one, with noise on what its latency turns out to be."""
    random = np.random.default_rng(seed)
    logits = np.stack([np.zeros(size), random.normal(1.0, 1.0, size)], axis=1)
    units = np.stack([np.full(size, 5.0), random.uniform(50.0, 400.0, size)], axis=1)
    spent = units * random.lognormal(0.0, 0.2, (size, 2))
    mask = np.stack([np.ones(size, bool), random.uniform(size=size) < 0.9], axis=1)
    return KnownRequests(logits=logits, mask=mask, units=units, spent=spent, last_resort=0)


def calls(requests: KnownRequests) -> KnownRequests:
    is_call = np.broadcast_to(np.asarray([0.0, 1.0]), requests.units.shape)
    return replace(requests, units=is_call, spent=is_call)


def test_what_is_used_by_hand():
    spent = np.asarray([0.0, 1.0, 1.0, 0.0])
    assert Budget(limited=Limited.CALLS, limit=3.0, requests_per_day=8.0).used(spent) == 4.0
    assert Budget(limited=Limited.EXPOSURE, limit=0.2).used(spent) == 0.5
    assert Budget(limited=Limited.P95_MS, limit=100.0).used(np.arange(101.0)) == 95.0


@pytest.mark.parametrize("budget", [Budget(limited=Limited.CALLS, limit=3.0), Budget(limited=Limited.P95_MS, limit=200.0)])
def test_a_budget_is_used_up_and_holds_on_other_requests_within_5_percent(budget: Budget):
    pick = calls if budget.limited is Limited.CALLS else lambda requests: requests
    found = calibrate(pick(known(0)), budget)
    assert found.unlimited > budget.limit and found.multiplier > 0
    assert 0.99 * budget.limit <= found.used <= budget.limit
    assert pick(known(1)).used(budget, found.multiplier) == pytest.approx(budget.limit, rel=0.05)


def test_a_higher_price_never_makes_more_calls():
    budget, requests = Budget(limited=Limited.CALLS, limit=0.0), calls(known())
    used = [requests.used(budget, multiplier) for multiplier in (0.0, 0.5, 1.0, 2.0, 4.0, float("inf"))]
    assert used == sorted(used, reverse=True) and used[0] > used[2] > used[-1] == 0.0


def test_a_budget_that_is_kept_anyway_costs_nothing():
    found = calibrate(calls(known()), Budget(limited=Limited.CALLS, limit=10.0))
    assert found.multiplier == 0.0 and found.used == found.unlimited < 10.0


@pytest.mark.parametrize("multiplier", [0.0, 1.0, float("inf")])
def test_requests_without_a_score_take_the_last_resort_as_in_service(multiplier: float):
    logits = np.full((3, NUM_PLANS), np.nan)
    logits[0], logits[:, 0], logits[2, 5] = -np.inf, 9.0, 1.0
    mask = np.broadcast_to(np.arange(NUM_PLANS) > 0, logits.shape)  # the first plan is forbidden
    chosen = np.asarray(choose(jnp.asarray(logits), jnp.asarray(mask)))
    assert chosen.tolist() == [STANDARD.last_resort, STANDARD.last_resort, 5]
    spent = np.broadcast_to(100.0 + np.arange(NUM_PLANS), logits.shape)
    requests = KnownRequests(logits=logits, mask=mask, units=spent, spent=spent, last_resort=STANDARD.last_resort)
    used = requests.used(Budget(limited=Limited.EXPOSURE, limit=1.0), multiplier)
    assert used == pytest.approx(spent[np.arange(3), chosen].mean())


def test_a_budget_that_no_price_keeps_is_refused_with_the_closest_that_one_does():
    budget = Budget(limited=Limited.P95_MS, limit=2.0)
    least = known().used(budget, float("inf"))
    with pytest.raises(UserError, match=rf"2 ms at the quantile \.95.*at least {least:.4g}"):
        calibrate(known(), budget)


@pytest.mark.parametrize("text", ["calls", "calls=many", "cost=3"])
def test_a_budget_that_cannot_be_read_is_refused(text: str):
    with pytest.raises(UserError, match=f"'{text}' cannot be read: expected NAME=NUMBER"):
        Budget.parse(text)


@pytest.mark.parametrize(("text", "per_day"), [("exposure=-1", 10.0), ("p95_ms=nan", 10.0), ("calls=3", 0.0)])
def test_a_number_that_no_budget_has_is_told_as_such(text: str, per_day: float):
    with pytest.raises(UserError, match="expected a finite limit of at least 0 and more than 0 requests"):
        Budget.parse(text, per_day)


def test_exposure_in_percent_is_refused():
    with pytest.raises(UserError, match="exposure=20 limits nothing: it is a share of what a history tells, 0 to 1"):
        Budget.parse("exposure=20")


def test_the_price_moves_choices_away_from_what_is_limited_and_forbidden_plans_stay_forbidden(make_context):
    context = make_context(2, free_memory_mb=100.0)
    cloud, local = plan_index("cloud-full-skip"), plan_index("local-skip-skip")
    mask = allowed(context)
    zero = jnp.zeros((2, NUM_PLANS))
    costs = PlanCosts(
        latency_ms=zero.at[:, cloud].set(300.0),
        energy_mj=zero,
        exposure=zero.at[:, cloud].set(0.5),
        uplink_bytes=zero.at[:, cloud].set(200.0),
        downlink_bytes=zero,
    )
    planner = Scores(zero.at[:, cloud].set(0.9).at[:, local].set(0.5))
    for limited, unit in ((Limited.CALLS, 1.0), (Limited.EXPOSURE, 0.5), (Limited.P95_MS, 300.0)):
        np.testing.assert_allclose(priced_units(limited, costs)[0, cloud], unit)
        for multiplier, chosen in ((0.3 / unit, cloud), (0.5 / unit, local)):
            logits = Budgeted(planner=planner, limited=limited, multiplier=multiplier).logits(context, costs, mask)
            assert logits.argmax(axis=1).tolist() == [chosen, chosen]
            assert bool(jnp.isneginf(logits[~mask]).all())


class Scores:
    """A planner with fixed scores."""

    def __init__(self, scores):
        self.scores = scores

    def logits(self, context, costs, mask):
        del context, costs, mask
        return self.scores
