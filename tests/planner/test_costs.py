import dataclasses
import json

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
    subtask_ms,
)

TIMES = MeasuredTimes(
    planning_ms=1.0,
    abstract_ms=2.0,
    semantic_ms={"profile": 10.0, "recent": 20.0, "full": 40.0},
    retrieval_ms={"20": 3.0, "100": 4.0, "500": 5.0},
    cache_retrieval_ms=6.0,
    structured_ms=200.0,
    ranking_ms={"20": 7.0, "100": 8.0, "500": 9.0},
    ranking_cloud_ms=11.0,
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


def test_full_releases_at_most_200_events(make_context):
    up, _ = plan_bytes(make_context(1, history_length=5000.0), SIZES)
    assert at(up, "fresh-full-20-skip") == 100 + 25 + 200 * 4 + 5


def test_latency_by_hand(make_context):
    context = make_context(1, tier=DeviceTier.HIGH, round_trip_ms=50.0, uplink_kbps=1000.0, downlink_kbps=8000.0)
    costs = plan_costs(PROFILE, context, EXPOSURE, SIZES)
    up_ms, down_ms = 25 + 8 * 165 / 1000, 25 + 8 * (100 + 100 * 250 + 400) / 8000
    branch = 2 + up_ms + 20 + 4 + down_ms
    short_down_ms = 25 + 8 * (100 + 100 * 10 + 400) / 8000
    short_branch = branch - down_ms + short_down_ms
    assert at(costs.latency_ms, "fresh-recent-100-skip") == pytest.approx(1 + short_branch + 8, rel=1e-5)
    assert at(costs.latency_ms, "fresh-recent-100-device") == pytest.approx(1 + max(branch, 200) + 8, rel=1e-5)
    assert at(costs.latency_ms, "local-skip-skip") == pytest.approx(1 + 6 + 8)
    assert at(costs.latency_ms, "local-reuse-device") == pytest.approx(1 + 200 + 8)
    cloud_up, cloud_down = 25 + 8 * 250 / 1000, 25 + 8 * 1500 / 8000
    expected = 1 + 2 + cloud_up + max(40 + 4, 200) + 11 + cloud_down
    assert at(costs.latency_ms, "cloud-full-cloud") == pytest.approx(expected, rel=1e-5)


def test_energy_by_hand(make_context):
    context = make_context(1, tier=DeviceTier.HIGH, link=Link.WIFI)
    costs = plan_costs(PROFILE, context, EXPOSURE, SIZES)
    assert at(costs.energy_mj, "local-skip-skip") == pytest.approx(4.5 * (1 + 6 + 8))
    link_ms = 50 + 8 * 500 / 1000 + 8 * 5100 / 8000
    radio = 2.27 * 0.5 + 1.10 * 5.1 + 0.133 * link_ms
    assert at(costs.energy_mj, "reuse-20-device") == pytest.approx(4.5 * (1 + 200 + 7) + radio, rel=1e-5)


def test_exposure_is_that_of_what_leaves(make_context):
    costs = plan_costs(PROFILE, make_context(1, cache_level=EgressLevel.RECENT), EXPOSURE, SIZES)
    assert at(costs.exposure, "fresh-full-20-skip") == pytest.approx(0.8)
    assert at(costs.exposure, "reuse-20-skip") == pytest.approx(0.3)
    assert at(costs.exposure, "local-reuse-skip") == 0


def test_a_slower_tier_takes_longer_on_the_device_and_as_long_in_the_cloud(make_context):
    low = subtask_ms(PROFILE, make_context(1, tier=DeviceTier.LOW))
    high = subtask_ms(PROFILE, make_context(1, tier=DeviceTier.HIGH))
    index, order = plan_index("fresh-full-100-device"), list(Subtask)
    for subtask in Subtask:
        ratio = float(low[0, index, order.index(subtask)] / high[0, index, order.index(subtask)])
        assert ratio == pytest.approx(1.0 if subtask in (Subtask.SEMANTIC, Subtask.RETRIEVAL) else 4.5)


def test_realised_transfer_times_replace_the_predicted_ones(make_context):
    ones = jnp.ones((1, NUM_PLANS))
    transfer = TransferTimes(uplink_ms=100.0 * ones, downlink_ms=200.0 * ones, queue_ms=jnp.asarray([30.0]))
    costs = plan_costs(PROFILE, make_context(1, tier=DeviceTier.HIGH), EXPOSURE, SIZES, transfer)
    assert at(costs.latency_ms, "reuse-20-skip") == pytest.approx(1 + 100 + 30 + 3 + 200 + 7)
    assert at(costs.latency_ms, "local-skip-skip") == pytest.approx(15.0)


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
    times = subtask_ms(deployment_profile(workload), make_context(1, history_length=30.0, tier=DeviceTier.MID))
    row = times[0, plan_index("fresh-full-20-device")]
    order = list(Subtask)
    assert float(row[order.index(Subtask.SEMANTIC)]) == pytest.approx(5 + 2e9 * (10 + 60) / 1e12 * 1e3)
    assert float(row[order.index(Subtask.STRUCTURED)]) == pytest.approx(2 + 2e9 * 30 / 1e12 * 1e3)
    assert deployment_profile().name == "deployment (modelled)"


def test_costs_are_differentiable_in_the_profile_and_in_the_estimates(make_context):
    context = make_context(3, history_length=30.0)

    def total(profile, round_trip_ms):
        changed = dataclasses.replace(context, round_trip_ms=round_trip_ms)
        costs = plan_costs(profile, changed, EXPOSURE, SIZES)
        return costs.latency_ms[:, plan_index("fresh-full-100-skip")].sum()

    by_profile, by_round_trip = jax.jit(jax.grad(total, (0, 1)))(deployment_profile(), context.round_trip_ms)
    np.testing.assert_allclose(by_round_trip, 1.0, rtol=1e-5)
    assert float(by_profile.semantic_ms[EgressLevel.FULL]) == pytest.approx(3.0)
    assert float(by_profile.semantic_ms_per_event) == pytest.approx(90.0)
    assert float(by_profile.ranking_cloud_ms) == 0.0


def test_measured_times_survive_json():
    again = MeasuredTimes.from_json(json.loads(json.dumps(dataclasses.asdict(TIMES))))
    assert again == TIMES


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
        MeasuredTimes.from_json(dataclasses.asdict(TIMES) | change)
