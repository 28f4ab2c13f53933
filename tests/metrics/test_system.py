"""Latency summaries by hand."""

import numpy as np
import pytest

from cda4rec_jax.metrics import summarise_latency


def test_percentiles_are_latencies_that_occurred():
    summary = summarise_latency(np.arange(100.0, 0.0, -1.0))
    assert (summary.p50_ms, summary.p95_ms, summary.p99_ms, summary.max_ms) == (50, 95, 99, 100)
    assert (summary.count, summary.mean_ms) == (100, 50.5)


def test_one_request_is_its_own_summary():
    summary = summarise_latency(np.array([3.0]))
    assert summary.p50_ms == summary.p99_ms == summary.max_ms == summary.mean_ms == 3


@pytest.mark.parametrize("latencies", [[], [1.0, np.nan], [-1.0], [np.inf]])
def test_bad_latencies_raise(latencies):
    with pytest.raises(ValueError, match="latencies"):
        summarise_latency(np.array(latencies, np.float64))
