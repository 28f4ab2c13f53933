"""What planners get for what they choose."""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest

from cda4rec_jax.evaluation import answers as answers_module
from cda4rec_jax.evaluation.answers import HINDSIGHT, ORACLE, Answers, answer, fixed_name, fixed_names
from cda4rec_jax.metrics import MISS_RANK
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.planner import NUM_PLANS, PLANS, STANDARD, RandomPlanner, RulesPlanner, plan_index, realised_utility

USERS = 40
FRESH, LOCAL = "fresh-full-100-skip", "local-skip-skip"


@pytest.fixture(scope="module")
def records(make_records: Callable[[np.ndarray], PlanRecords]) -> PlanRecords:
    ranks = np.random.default_rng(0).integers(1, 60, (USERS, NUM_PLANS)).astype(np.int32)
    return make_records(np.where(ranks > 50, MISS_RANK, ranks))


@pytest.fixture(scope="module")
def answered(records: PlanRecords) -> Answers:
    return answer(records, {"rules": RulesPlanner().logits, "random": RandomPlanner().logits}, records.quality.mean(axis=0))


def draw_of(records: PlanRecords, draw: int):
    return jax.tree.map(lambda leaf: leaf[draw], records.requests)


def test_every_planner_answers_every_request_with_an_allowed_plan(records: PlanRecords, answered: Answers):
    assert answered.names == (*fixed_names(), "rules", "random", "plug-in", ORACLE, HINDSIGHT)
    mask = records.requests.mask
    for choices in answered.choices:
        assert np.take_along_axis(mask, choices[..., None].astype(int), axis=2).all()


def test_a_fixed_plan_is_chosen_wherever_it_is_allowed(records: PlanRecords, answered: Answers):
    index = plan_index(FRESH)
    chosen = answered.choices[answered.names.index(fixed_name(FRESH))]
    np.testing.assert_array_equal(chosen == index, records.requests.mask[..., index])


def test_utility_is_the_realised_utility_of_the_choice(records: PlanRecords, answered: Answers):
    expected = np.zeros(USERS)
    choices = answered.choices[answered.names.index("plug-in")]
    for draw in range(len(choices)):
        requests = draw_of(records, draw)
        values = realised_utility(
            records.quality, requests.realised, requests.context, failed=requests.failed, mask=requests.mask
        )
        expected += np.asarray(values)[np.arange(USERS), choices[draw]] / len(choices)
    np.testing.assert_allclose(answered.of("plug-in", "utility"), expected, rtol=1e-4, atol=1e-6)


def test_nothing_exceeds_the_hindsight_optimum(answered: Answers):
    utility = answered.per_user["utility"]
    assert (utility <= answered.of(HINDSIGHT, "utility")[None, :] + 1e-6).all()


def test_latency_is_what_utility_counts(records: PlanRecords):
    """With a price on milliseconds alone and nothing to win, utility is the negative latency; also where links fail."""
    context = records.requests.context
    ones = np.ones_like(context.utility_per_ms)
    priced = replace(context, utility_per_ms=ones, utility_per_mj=0 * ones, utility_per_exposure=0 * ones)
    failed = np.broadcast_to(np.arange(USERS) % 2 == 0, records.requests.failed.shape)
    requests = replace(records.requests, context=priced, failed=np.asarray(failed))
    worthless = replace(records, quality=np.zeros_like(records.quality), requests=requests)
    found = answer(worthless, {}, np.zeros(NUM_PLANS))
    np.testing.assert_allclose(found.latency_ms.mean(axis=1), -found.per_user["utility"], rtol=1e-4)


def test_a_local_plan_answers_where_the_link_fails(records: PlanRecords):
    ranks = np.broadcast_to(np.where(STANDARD.table.uses_link, 1, 100), records.ranks.shape)
    failing = replace(records.requests, failed=np.ones_like(records.requests.failed))
    found = answer(replace(records, ranks=np.asarray(ranks, np.int32), requests=failing), {}, np.zeros(NUM_PLANS))
    for plan in PLANS:
        assert (found.of(fixed_name(plan.name), "hit_rate@20") == 0).all()
    working = replace(records.requests, failed=np.zeros_like(records.requests.failed))
    found = answer(replace(records, ranks=np.asarray(ranks, np.int32), requests=working), {}, np.zeros(NUM_PLANS))
    allowed = records.requests.mask[..., plan_index(FRESH)].mean(axis=0)
    served = found.of(fixed_name(FRESH), "hit_rate@5")
    assert (served >= allowed - 1e-6).all()
    assert served.max() == 1


def test_nothing_leaves_the_device_under_a_local_plan(answered: Answers):
    for quantity in ("uplink_bytes", "downlink_bytes", "exposure"):
        assert (answered.of(fixed_name(LOCAL), quantity) == 0).all()
        assert answered.of(fixed_name(FRESH), quantity).mean() > 0


def test_answers_do_not_depend_on_how_users_are_batched(records: PlanRecords, answered: Answers, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers_module, "BLOCK_USERS", 15)
    again = answer(records, {"rules": RulesPlanner().logits, "random": RandomPlanner().logits}, records.quality.mean(axis=0))
    for name in again.names:
        row = answered.names.index(name)
        np.testing.assert_array_equal(again.choices[again.names.index(name)], answered.choices[row])
        np.testing.assert_allclose(again.of(name, "utility"), answered.of(name, "utility"), rtol=1e-5, atol=1e-6)


def test_the_oracle_profits_from_quality_that_depends_on_the_context(make_records: Callable[[np.ndarray], PlanRecords]):
    """Fresh plans answer long histories only, local plans short ones only: no fixed plan can do both."""
    made = make_records(np.ones((400, NUM_PLANS), np.int32))
    long = made.requests.context.history_length[0] > 50
    good = np.where(long[:, None], STANDARD.table.uses_link[None, :], ~STANDARD.table.uses_link[None, :])
    ranks = np.where(good, 1, MISS_RANK).astype(np.int32)
    requests = made.requests
    free = {name: 0 * requests.context.utility_per_ms for name in ("utility_per_ms", "utility_per_mj", "utility_per_exposure")}
    requests = replace(requests, context=replace(requests.context, **free))
    found = answer(replace(made, ranks=ranks, quality=good.astype(np.float32), requests=requests), {}, np.zeros(NUM_PLANS))
    fixed = max(found.of(name, "utility").mean() for name in fixed_names())
    assert found.of(ORACLE, "utility").mean() > fixed + 0.2
