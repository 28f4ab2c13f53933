"""Fronts and the area that they dominate, by hand."""

import numpy as np
import pytest

from cda4rec_jax.evaluation.pareto import hypervolume, pareto_front

COSTS, GAINS = np.array([1.0, 2.0, 3.0, 2.5, 1.0]), np.array([0.2, 0.5, 0.6, 0.4, 0.1])


def test_the_front_has_the_points_that_none_beats():
    np.testing.assert_array_equal(pareto_front(COSTS, GAINS), [True, True, True, False, False])


def test_equal_points_are_both_on_the_front():
    np.testing.assert_array_equal(pareto_front(np.ones(2), np.ones(2)), [True, True])


def test_hypervolume_is_the_area_under_the_staircase():
    # From 1 to 2 at .2, from 2 to 3 at .5, from 3 to 4 at .6; each above .1.
    found = hypervolume(COSTS, GAINS, cost_reference=4.0, gain_reference=0.1)
    assert found == pytest.approx(0.1 + 0.4 + 0.5)


def test_points_beyond_a_reference_add_nothing():
    assert hypervolume(np.array([5.0]), np.array([0.9]), cost_reference=4.0, gain_reference=0.1) == 0
    assert hypervolume(np.array([1.0]), np.array([0.05]), cost_reference=4.0, gain_reference=0.1) == 0


def test_resamples_are_measured_one_by_one_and_more_points_never_dominate_less():
    random = np.random.default_rng(0)
    costs, gains = random.uniform(0, 5, (20, 8)), random.uniform(0, 1, (20, 8))
    bounds = {"cost_reference": 4.0, "gain_reference": 0.1}
    together = hypervolume(costs, gains, **bounds)
    np.testing.assert_allclose(together, [hypervolume(*row, **bounds) for row in zip(costs, gains, strict=True)])
    assert (together >= hypervolume(costs[:, :5], gains[:, :5], **bounds) - 1e-12).all()
