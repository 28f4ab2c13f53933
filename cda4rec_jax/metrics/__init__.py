"""Metrics: pure functions, per user first."""

from cda4rec_jax.metrics.ranking import MISS_RANK, check_no_nan, hit_rate, mrr, ndcg, target_rank
from cda4rec_jax.metrics.significance import Interval, paired_interval, paired_intervals, resampled_means
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency

__all__ = [
    "MISS_RANK",
    "Interval",
    "LatencySummary",
    "check_no_nan",
    "hit_rate",
    "mrr",
    "ndcg",
    "paired_interval",
    "paired_intervals",
    "resampled_means",
    "summarise_latency",
    "target_rank",
]
