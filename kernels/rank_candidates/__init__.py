"""The device's ranking of one request: user state from the history, then candidates' scores; a new event costs one step."""

from cda4rec_jax.kernels.rank_candidates.api import extend_history, rank_candidates, score_candidates
from cda4rec_jax.kernels.rank_candidates.serving import KnownHistory, ServedRanker
from cda4rec_jax.kernels.rank_candidates.weights import KeyValueCache, RankerWeights, empty_cache

__all__ = [
    "KeyValueCache",
    "KnownHistory",
    "RankerWeights",
    "ServedRanker",
    "empty_cache",
    "extend_history",
    "rank_candidates",
    "score_candidates",
]
