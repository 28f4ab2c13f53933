"""Single planners over drawn requests agree with the answers of all planners, and prices can be set."""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.evaluation.answers import HINDSIGHT, ORACLE, PLUG_IN, Answers, answer, oracle_quality
from cda4rec_jax.evaluation.choices import brings, choose, choose_by_quality, choose_in_hindsight
from cda4rec_jax.evaluation.drawn import priced
from cda4rec_jax.metrics import MISS_RANK
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.planner import NUM_PLANS, PayloadSizes, RulesPlanner, WeightScales, deployment_profile

USERS = 40
RULES = RulesPlanner().logits


@pytest.fixture(scope="module")
def records(make_records: Callable[[np.ndarray], PlanRecords]) -> PlanRecords:
    ranks = np.random.default_rng(0).integers(1, 60, (USERS, NUM_PLANS)).astype(np.int32)
    return make_records(np.where(ranks > 50, MISS_RANK, ranks))


@pytest.fixture(scope="module")
def answered(records: PlanRecords) -> Answers:
    return answer(records, {"rules": RULES}, records.quality.mean(axis=0))


def test_they_choose_and_earn_what_answers_say(records: PlanRecords, answered: Answers):
    choices = {
        "rules": choose(records, RULES),
        PLUG_IN: choose_by_quality(records, records.quality.mean(axis=0)[None]),
        ORACLE: choose_by_quality(records, oracle_quality(records)),
        HINDSIGHT: choose_in_hindsight(records),
    }
    found = brings(records, choices)
    for name, chosen in choices.items():
        np.testing.assert_array_equal(chosen, answered.choices[answered.names.index(name)])
        for quantity in ("utility", "hit_rate@10", "latency_ms", "cloud_calls"):
            np.testing.assert_allclose(found[name][quantity].mean(axis=0), answered.of(name, quantity), rtol=1e-4, atol=1e-5)


def test_a_cloud_call_is_a_request_that_sends_bytes(records: PlanRecords):
    found = brings(records, {"rules": choose(records, RULES)})["rules"]
    np.testing.assert_array_equal(found["cloud_calls"], found["uplink_bytes"] > 0)
    assert 0 < found["cloud_calls"].mean() < 1


def test_priced_requests_differ_in_their_prices_alone(records: PlanRecords):
    scales = WeightScales.of(quality_gap=0.3, latency_gap_ms=100.0, energy_gap_mj=50.0, exposure_gap=0.5)
    level = jnp.asarray([0.0, 0.4, 0.6, 0.9])
    world = PlanningWorld(profile=deployment_profile(), exposure_by_level=level, sizes=PayloadSizes(), scales=scales)
    context = priced(records, world, (2.0, 0.0, 0.5)).requests.context
    np.testing.assert_allclose(context.utility_per_ms, 2.0 * 0.3 / 3 / 100.0, rtol=1e-5)
    assert (context.utility_per_mj == 0).all()
    np.testing.assert_allclose(context.utility_per_exposure, 0.5 * 0.3 / 3 / 0.5, rtol=1e-5)
    before = records.requests.context
    prices = {name: getattr(before, name) for name in ("utility_per_ms", "utility_per_mj", "utility_per_exposure")}
    again = replace(context, **prices)
    assert all(np.array_equal(getattr(again, name), value) for name, value in vars(before).items())
