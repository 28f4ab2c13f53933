"""Candidate retrieval: the items with the greatest inner product with a semantic user embedding."""

from cda4rec_jax.retrieval.build import Comparison, build_index, compare, load_index
from cda4rec_jax.retrieval.choice import Choice, IndexTime, IndexTimes, choose_index, measured_times
from cda4rec_jax.retrieval.exact import ExactIndex, exact_search
from cda4rec_jax.retrieval.index import Index, mean_recall
from cda4rec_jax.retrieval.mapped import MappedIndex
from cda4rec_jax.retrieval.partitioned import PartitionedConfig, PartitionedIndex
from cda4rec_jax.retrieval.quantised import QuantisedIndex
from cda4rec_jax.retrieval.scann import Measured, ScannConfig, ScannIndex, scann_available
from cda4rec_jax.retrieval.sharded import ShardedIndex
from cda4rec_jax.retrieval.tuning import HeldOut, RecallNotReached, Tuned, candidates_for, setting_of, tune_scann, tune_search

__all__ = [
    "Choice",
    "Comparison",
    "ExactIndex",
    "HeldOut",
    "Index",
    "IndexTime",
    "IndexTimes",
    "MappedIndex",
    "Measured",
    "PartitionedConfig",
    "PartitionedIndex",
    "QuantisedIndex",
    "RecallNotReached",
    "ScannConfig",
    "ScannIndex",
    "ShardedIndex",
    "Tuned",
    "build_index",
    "candidates_for",
    "choose_index",
    "compare",
    "exact_search",
    "load_index",
    "mean_recall",
    "measured_times",
    "scann_available",
    "setting_of",
    "tune_scann",
    "tune_search",
]
