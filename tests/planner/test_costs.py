import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import DeviceTier, EgressLevel, Link, Subtask
from cda4rec_jax.planner import (
    NUM_PLANS,
    MeasuredTimes,
    PayloadSizes,
    TransferTimes,
    Workload,
    deployment_profile,
    measured_profile,
    plan_bytes,
    plan_costs,
    plan_index,
    predicted_transfer,
    subtask_ms,
)
from tests.times_0_1 import TIMES_0_1

TIMES = MeasuredTimes(
    planning_ms=1.0,
    abstract_ms={"profile": 1.5, "recent": 2.0, "full": 2.5, "reuse": 0.5},
    abstract_beside_ms={"profile": 2.5, "recent": 3.0, "full": 3.5, "reuse": 0.75},
    semantic_ms={"profile": 10.0, "recent": 20.0, "full": 40.0},
    retrieval_ms={"20": 3.0, "100": 4.0, "500": 5.0},
    retrieval_evidence_ms={"20": 3.5, "100": 5.0, "500": 8.0},
    cache_retrieval_ms=6.0,
    structured_ms=200.0,
    structured_cloud_ms=90.0,
    ranking_ms={"20": 7.0, "100": 8.0, "500": 9.0, "cache": 10.0},
    ranking_skip_ms={"20": 3.0, "100": 4.0, "500": 5.0, "cache": 5.5},
    ranking_cloud_ms={"skip": 11.0, "cloud": 13.0},
)
PROFILE = measured_profile(TIMES)
EXPOSURE = jnp.asarray([0.0, 0.1, 0.3, 0.8])
SIZES = PayloadSizes(
    header_bytes=100.0,
    profile_bytes=25.0,
    item_id_bytes=4.0,
    attributes_bytes=5.0,
    embedding_bytes=400.0,
    evidence_bytes=250.0,
    scored_item_bytes=10.0,
)


def at(values, name: str) -> float:
    return float(values[0, plan_index(name)])


def test_bytes_by_hand(make_context):
    up, down = plan_bytes(make_context(1, history_length=30.0), SIZES)
    assert at(up, "fresh-profile-20-skip") == 100 + 25
    assert at(up, "fresh-recent-20-skip") == 100 + 25 + 10 * 4
    assert at(up, "fresh-full-20-skip") == 100 + 25 + 30 * 4 + 5
    assert at(up, "reuse-20-skip") == 100 + 400
    assert at(up, "local-reuse-device") == at(down, "local-reuse-device") == 0
    assert at(down, "fresh-full-20-device") == 100 + 20 * 250 + 400
    assert at(down, "fresh-full-20-skip") == 100 + 20 * 10 + 400  # nobody reads evidence
    assert at(down, "reuse-20-device") == 100 + 20 * 250
    assert at(down, "cloud-full-cloud") == 100 + 100 * 10 + 400


def test_a_long_history_costs_no_more_than_the_events_that_are_read(make_context):
    sizes = replace(SIZES, history_events=50.0)
    short, long = (make_context(1, history_length=events) for events in (50.0, 5000.0))
    up, _ = plan_bytes(long, sizes)
    assert at(up, "fresh-full-20-skip") == 100 + 25 + 50 * 4 + 5
    assert at(up, "fresh-recent-20-skip") == 100 + 25 + 10 * 4
    profile = deployment_profile()
    np.testing.assert_array_equal(subtask_ms(profile, long, sizes), subtask_ms(profile, short, sizes))
    of_200 = subtask_ms(profile, long, SIZES)[0, plan_index("fresh-full-20-device")]
    of_50 = subtask_ms(profile, long, sizes)[0, plan_index("fresh-full-20-device")]
    for subtask in (Subtask.SEMANTIC, Subtask.STRUCTURED):
        assert of_50[list(Subtask).index(subtask)] < of_200[list(Subtask).index(subtask)]


def test_recent_releases_no_more_events_than_agents_read(make_context):
    up, _ = plan_bytes(make_context(1, history_length=30.0), replace(SIZES, history_events=6.0))
    assert at(up, "fresh-recent-20-skip") == 100 + 25 + 6 * 4


def test_latency_by_hand(make_context):
    context = make_context(1, tier=DeviceTier.HIGH, round_trip_ms=50.0, uplink_kbps=1000.0, downlink_kbps=8000.0)
    costs = plan_costs(PROFILE, context, EXPOSURE, SIZES)
    up_ms, down_ms = 25 + 8 * 165 / 1000, 25 + 8 * (100 + 100 * 250 + 400) / 8000
    branch = 2 + up_ms + 20 + 4 + down_ms
    short_down_ms = 25 + 8 * (100 + 100 * 10 + 400) / 8000
    beside_branch = branch + 1 + 1  # sent beside structured modelling, and retrieval with the candidates' records
    short_branch = branch - down_ms + short_down_ms
    assert at(costs.latency_ms, "fresh-recent-100-skip") == pytest.approx(1 + short_branch + 4, rel=1e-5)
    assert at(costs.latency_ms, "fresh-recent-100-device") == pytest.approx(1 + max(beside_branch, 200) + 8, rel=1e-5)
    assert at(costs.latency_ms, "local-skip-skip") == pytest.approx(1 + 6 + 5.5)
    assert at(costs.latency_ms, "local-reuse-device") == pytest.approx(1 + 200 + 10)
    cloud_up, cloud_down = 25 + 8 * 250 / 1000, 25 + 8 * 1500 / 8000
    expected = 1 + 2.5 + cloud_up + max(40 + 4, 90) + 13 + cloud_down
    assert at(costs.latency_ms, "cloud-full-cloud") == pytest.approx(expected, rel=1e-5)


def test_energy_by_hand(make_context):
    context = make_context(1, tier=DeviceTier.HIGH, link=Link.WIFI)
    costs = plan_costs(PROFILE, context, EXPOSURE, SIZES)
    assert at(costs.energy_mj, "local-skip-skip") == pytest.approx(4.5 * (1 + 6 + 5.5))
    link_ms = 50 + 8 * 500 / 1000 + 8 * 5100 / 8000
    radio = 2.27 * 0.5 + 1.10 * 5.1 + 0.133 * link_ms
    assert at(costs.energy_mj, "reuse-20-device") == pytest.approx(4.5 * (1 + 0.75 + 200 + 7) + radio, rel=1e-5)


def test_exposure_is_that_of_what_leaves(make_context):
    costs = plan_costs(PROFILE, make_context(1, cache_level=EgressLevel.RECENT), EXPOSURE, SIZES)
    assert at(costs.exposure, "fresh-full-20-skip") == pytest.approx(0.8)
    assert at(costs.exposure, "reuse-20-skip") == pytest.approx(0.3)
    assert at(costs.exposure, "local-reuse-skip") == 0


def test_a_slower_tier_takes_longer_on_the_device_and_as_long_in_the_cloud(make_context):
    low = subtask_ms(PROFILE, make_context(1, tier=DeviceTier.LOW), SIZES)
    high = subtask_ms(PROFILE, make_context(1, tier=DeviceTier.HIGH), SIZES)
    index, order = plan_index("fresh-full-100-device"), list(Subtask)
    for subtask in Subtask:
        ratio = float(low[0, index, order.index(subtask)] / high[0, index, order.index(subtask)])
        assert ratio == pytest.approx(1.0 if subtask in (Subtask.SEMANTIC, Subtask.RETRIEVAL) else 4.5)


def test_realised_transfer_times_replace_the_predicted_ones(make_context):
    ones = jnp.ones((1, NUM_PLANS))
    transfer = TransferTimes(uplink_ms=100.0 * ones, downlink_ms=200.0 * ones, queue_ms=jnp.asarray([30.0]))
    costs = plan_costs(PROFILE, make_context(1, tier=DeviceTier.HIGH), EXPOSURE, SIZES, transfer)
    assert at(costs.latency_ms, "reuse-20-skip") == pytest.approx(1 + 0.5 + 100 + 30 + 3 + 200 + 3)
    assert at(costs.latency_ms, "local-skip-skip") == pytest.approx(12.5)


def test_costs_are_finite_offline(make_context):
    context = make_context(1, link=Link.OFFLINE, round_trip_ms=0.0, uplink_kbps=0.0, downlink_kbps=0.0)
    costs = plan_costs(deployment_profile(), context, EXPOSURE, SIZES)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(costs))


def test_the_modelled_deployment_counts_flops(make_context):
    workload = Workload(
        cloud_parameters=1e9,
        cloud_flops_per_s=1e12,
        cloud_overhead_ms=5.0,
        cloud_profile_tokens=10.0,
        cloud_tokens_per_event=2.0,
        device_parameters=1e9,
        device_flops_per_s=(1e11, 1e12, 1e13),
        device_dispatch_ms=(4.0, 2.0, 1.0),
    )
    times = subtask_ms(deployment_profile(workload), make_context(1, history_length=30.0, tier=DeviceTier.MID), SIZES)
    row = times[0, plan_index("fresh-full-20-device")]
    order = list(Subtask)
    assert float(row[order.index(Subtask.SEMANTIC)]) == pytest.approx(5 + 2e9 * (10 + 60) / 1e12 * 1e3)
    assert float(row[order.index(Subtask.STRUCTURED)]) == pytest.approx(2 + 2e9 * 30 / 1e12 * 1e3)
    assert deployment_profile().name == "deployment (modelled)"


def test_costs_are_differentiable_in_the_profile_and_in_the_estimates(make_context):
    context = make_context(3, history_length=30.0)

    def total(profile, round_trip_ms):
        changed = replace(context, round_trip_ms=round_trip_ms)
        costs = plan_costs(profile, changed, EXPOSURE, SIZES)
        return costs.latency_ms[:, plan_index("fresh-full-100-skip")].sum()

    by_profile, by_round_trip = jax.jit(jax.grad(total, (0, 1)))(deployment_profile(), context.round_trip_ms)
    np.testing.assert_allclose(by_round_trip, 1.0, rtol=1e-5)
    assert float(by_profile.semantic_ms[EgressLevel.FULL]) == pytest.approx(3.0)
    assert float(by_profile.semantic_ms_per_event) == pytest.approx(90.0)
    np.testing.assert_array_equal(by_profile.ranking_cloud_ms, 0.0)


def test_measured_times_survive_json():
    again = MeasuredTimes.from_json(json.loads(json.dumps(asdict(TIMES))))
    assert again == TIMES


def test_times_of_version_0_1_predict_what_they_predicted_then(make_context):
    costs = plan_costs(
        measured_profile(MeasuredTimes.from_json(TIMES_0_1)), make_context(1, tier=DeviceTier.HIGH), EXPOSURE, SIZES
    )
    transfer = predicted_transfer(make_context(1), *plan_bytes(make_context(1), SIZES), jnp.asarray(0.0))
    link = transfer.uplink_ms + transfer.downlink_ms
    assert at(costs.latency_ms, "local-skip-skip") == pytest.approx(1 + 6 + 8)
    assert at(costs.latency_ms - link, "reuse-500-skip") == pytest.approx(1 + 5 + 9, rel=1e-4)
    assert at(costs.latency_ms - link, "fresh-recent-100-skip") == pytest.approx(1 + 2 + 20 + 4 + 8, rel=1e-4)
    assert at(costs.latency_ms - link, "cloud-full-cloud") == pytest.approx(1 + 2 + 200 + 11, rel=1e-4)
    with pytest.raises(UserError, match="'100'"):
        MeasuredTimes.from_json(TIMES_0_1 | {"ranking_ms": {"20": 1.0}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planning_ms": float("nan")}, "planning_ms is nan"),
        ({"planning_ms": "fast"}, "fast"),
        ({"planning_ms": None}, "expected milliseconds"),
        ({"retrieval_ms": {"20": 1.0}}, r"retrieval_ms has keys \['20'\]"),
        ({"ranking_ms": 3.0}, "expected milliseconds"),
        ({"surprise_ms": 3.0}, "surprise_ms"),
    ],
)
def test_bad_measured_times_are_named(change, message):
    with pytest.raises(UserError, match=message):
        MeasuredTimes.from_json(asdict(TIMES) | change)
