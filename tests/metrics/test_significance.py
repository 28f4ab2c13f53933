"""The paired bootstrap: means by hand, clustering by user, coverage, determinism, and bad input."""

import time

import numpy as np
import pytest

from cda4rec_jax.metrics import paired_interval, paired_intervals


def test_mean_difference_is_the_mean_over_users_of_means_over_contexts():
    values = np.array([[1.0, 0.0], [1.0, 1.0]])
    baseline = np.array([[0.0, 0.0], [1.0, 0.5]])
    interval = paired_interval(values, baseline)
    assert interval.mean_difference == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert (interval.num_users, interval.num_resamples, interval.confidence) == (2, 2000, 0.95)


def test_a_constant_difference_has_an_interval_of_no_width():
    baseline = np.random.default_rng(0).normal(size=(50, 3))
    interval = paired_interval(baseline + 0.25, baseline)
    assert interval.low == pytest.approx(0.25) and interval.high == pytest.approx(0.25)
    assert interval.excludes_zero


def test_equal_systems_do_not_exclude_zero():
    values = np.random.default_rng(0).normal(size=(50, 3))
    assert not paired_interval(values, values).excludes_zero


def test_interval_agrees_with_the_normal_approximation():
    differences = np.random.default_rng(1).normal(0.1, 1, size=(2000, 1))
    interval = paired_interval(differences, np.zeros_like(differences), num_resamples=4000)
    error = 1.96 * differences.std() / np.sqrt(2000)
    assert interval.low == pytest.approx(differences.mean() - error, abs=0.1 * error)
    assert interval.high == pytest.approx(differences.mean() + error, abs=0.1 * error)


def test_repeating_a_users_contexts_does_not_narrow_the_interval():
    values = np.random.default_rng(2).normal(size=(200, 1))
    once = paired_interval(values, np.zeros_like(values))
    eightfold = np.repeat(values, 8, axis=1)
    again = paired_interval(eightfold, np.zeros_like(eightfold))
    assert (once.low, once.high) == pytest.approx((again.low, again.high))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    samples = [rng.exponential(1.0, size=(100, 1)) for _ in range(200)]
    covered = [
        interval.low <= 1.0 <= interval.high
        for interval in (paired_interval(s, np.zeros_like(s), num_resamples=300) for s in samples)
    ]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_the_seed_decides_the_interval_and_other_systems_do_not():
    rng = np.random.default_rng(4)
    values, baseline = rng.normal(size=(3, 80, 2)), rng.normal(size=(1, 80, 2))
    together = paired_intervals(values, baseline, seed=7)
    for system, interval in enumerate(together):
        alone = paired_interval(values[system], baseline[0], seed=7)
        assert (interval.low, interval.high) == pytest.approx((alone.low, alone.high))
    other = paired_intervals(values, baseline, seed=8)[0]
    assert other.low != together[0].low


def test_bad_input_raises():
    ones = np.ones((4, 2))
    with pytest.raises(ValueError, match="no users"):
        paired_interval(ones[:0], ones[:0])
    with pytest.raises(ValueError, match="NaN"):
        paired_interval(ones * np.nan, ones)
    with pytest.raises(ValueError, match="confidence is 95"):
        paired_interval(ones, ones, confidence=95.0)


def test_two_thousand_resamples_of_22k_users_and_forty_systems_take_seconds():
    values = np.random.default_rng(5).normal(size=(40, 22_363, 1)).astype(np.float32)
    start = time.process_time()
    paired_intervals(values, values[:1])
    assert time.process_time() - start < 20
