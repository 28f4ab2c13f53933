"""Yardsticks on hand-made requests: what they are, and what they say of planted effects."""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest

from cda4rec_jax.evaluation.yardsticks import (
    QualityParts,
    Ratio,
    estimate_quotient,
    estimate_ratios,
    gap_closed,
    mean_of_ratios,
    mean_over,
    quality_parts,
    request_groups,
)
from cda4rec_jax.pipeline.planners import context_cells
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.planner import NUM_PLANS

VALUES = np.array([[1.0, 2.0, 3.0], [5.0, 2.0, 7.0]])
MEMBERS = np.array([[True, True, False], [True, False, False]])


def test_a_group_mean_counts_requests_and_not_users():
    found = estimate_ratios({"mean": mean_over(VALUES, MEMBERS)})["mean"]
    assert found.mean == pytest.approx((1 + 5 + 2) / 3)
    assert found.users == 2
    low, middle, high = np.array([found.low, found.mean, found.high], float)
    assert low <= middle <= high


def test_an_empty_group_has_no_estimate():
    found = estimate_ratios({"none": mean_over(VALUES, np.zeros_like(MEMBERS)), "all": mean_over(VALUES, MEMBERS)})
    assert (found["none"].mean, found["none"].users) == (None, 0)
    assert found["all"].mean is not None


def test_the_gap_that_is_closed_is_a_share_of_the_whole_gap():
    floor, ceiling = np.zeros((1, 4)), np.array([[1.0, 1.0, 1.0, 1.0]])
    half = gap_closed(np.array([[0.0, 1.0, 0.5, 0.5]]), floor, ceiling, np.ones((1, 4), bool))
    assert estimate_ratios({"half": half})["half"].mean == pytest.approx(0.5)


def test_intervals_are_clustered_by_user():
    """Ten requests of a user that say the same ten times are no more evidence than one."""
    users = np.random.default_rng(0).normal(size=(1, 50))
    once = estimate_ratios({"mean": mean_over(users, np.ones((1, 50), bool))})["mean"]
    often = estimate_ratios({"mean": mean_over(np.repeat(users, 10, axis=0), np.ones((10, 50), bool))})["mean"]
    assert (once.low, once.high) == pytest.approx((often.low, often.high))


def test_seeds_are_averaged_before_users_are_drawn():
    one, other = (Ratio(numerator=np.full(3, value), denominator=np.ones(3)) for value in (1.0, 3.0))
    assert estimate_ratios({"mean": mean_of_ratios([one, other])})["mean"].mean == 2.0


def test_a_quotient_of_means_over_different_requests():
    top, bottom = mean_over(VALUES, MEMBERS), mean_over(VALUES, ~MEMBERS)
    assert estimate_quotient(top, bottom).mean == pytest.approx((8 / 3) / (12 / 3))
    assert estimate_quotient(top, mean_over(VALUES, np.zeros_like(MEMBERS))).mean is None


def test_every_request_is_in_one_group_of_each_kind(make_records: Callable[[np.ndarray], PlanRecords]):
    context = make_records(np.ones((40, NUM_PLANS), np.int32)).requests.context
    for kind, groups in request_groups(context).items():
        counts = np.sum([members for members in groups.values()], axis=0)
        assert (counts == 1).all(), kind
    low = request_groups(context)["tier"]["low"]
    np.testing.assert_array_equal(low, context.tier == 0)


@pytest.fixture(scope="module")
def parts_of(make_records: Callable[[np.ndarray], PlanRecords]) -> Callable[..., QualityParts]:
    """``parts_of(effect)``: parts of quality = noise + ``effect(cell)``, with beliefs that are the effect and its negative."""
    made = make_records(np.ones((1200, NUM_PLANS), np.int32))
    cells = context_cells(jax.tree.map(lambda leaf: leaf[0], made.requests.context))
    noise = 0.05 * np.random.default_rng(0).normal(size=made.quality.shape)

    def parts(effect: Callable[[np.ndarray], np.ndarray]) -> QualityParts:
        planted = np.broadcast_to(effect(cells), made.quality.shape).astype(np.float32)
        return quality_parts(replace(made, quality=(planted + noise).astype(np.float32)), planted, -planted)

    return parts


def mean(ratio: Ratio) -> float:
    return float(ratio.numerator.sum() / ratio.denominator.sum())


def test_parts_of_quality_sum_to_its_variance_and_noise_explains_nothing(parts_of: Callable[..., QualityParts]):
    steps = np.linspace(0, 0.3, NUM_PLANS)[None]
    found = parts_of(lambda cells: steps)
    assert mean(found.plan) == pytest.approx(steps.var(), rel=0.05)
    assert mean(found.interaction) == pytest.approx(0.05**2, rel=0.1)
    assert abs(mean(found.cell)) < 0.02 * mean(found.interaction)
    assert mean(found.policy) == pytest.approx(0.0, abs=1e-9)


def test_what_a_cell_adds_is_found_and_a_wrong_belief_costs(parts_of: Callable[..., QualityParts]):
    sign = np.where(np.arange(NUM_PLANS) % 2 == 0, 1.0, -1.0)[None]
    found = parts_of(lambda cells: 0.1 * sign * np.where(cells % 2 == 0, 1.0, -1.0)[:, None])
    planted = mean(found.interaction) - 0.05**2
    assert planted > 0.005
    assert mean(found.cell) == pytest.approx(planted, rel=0.15)
    assert mean(found.policy) == pytest.approx(planted, rel=0.1)
    assert mean(found.oracle) < -2 * planted
