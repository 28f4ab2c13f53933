"""Candidate retrieval: the items with the greatest inner product with a semantic user embedding."""

from cda4rec_jax.retrieval.build import Comparison, build_index, compare, load_index, scann_available
from cda4rec_jax.retrieval.exact import ExactIndex, exact_search
from cda4rec_jax.retrieval.index import Index, mean_recall
from cda4rec_jax.retrieval.mapped import MappedIndex
from cda4rec_jax.retrieval.partitioned import PartitionedConfig, PartitionedIndex
from cda4rec_jax.retrieval.quantised import QuantisedIndex
from cda4rec_jax.retrieval.scann import Measured, ScannConfig, ScannIndex
from cda4rec_jax.retrieval.sharded import ShardedIndex
from cda4rec_jax.retrieval.tuning import HeldOut, RecallNotReached, Tuned, candidates_for, tune_scann, tune_search

__all__ = [
    "Comparison",
    "ExactIndex",
    "HeldOut",
    "Index",
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
    "compare",
    "exact_search",
    "load_index",
    "mean_recall",
    "scann_available",
    "tune_scann",
    "tune_search",
]
