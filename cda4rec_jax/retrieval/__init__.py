"""Candidate retrieval: the items with the greatest inner product with a semantic user embedding."""

from cda4rec_jax.retrieval.build import Comparison, build_index, compare, load_index, scann_available
from cda4rec_jax.retrieval.exact import ExactIndex, exact_search
from cda4rec_jax.retrieval.index import Index
from cda4rec_jax.retrieval.quantised import QuantisedIndex
from cda4rec_jax.retrieval.scann import ScannConfig, ScannIndex
from cda4rec_jax.retrieval.sharded import ShardedIndex

__all__ = [
    "Comparison",
    "ExactIndex",
    "Index",
    "QuantisedIndex",
    "ScannConfig",
    "ScannIndex",
    "ShardedIndex",
    "build_index",
    "compare",
    "exact_search",
    "load_index",
    "scann_available",
]
