"""Ranking metrics of leave-one-out evaluation, where each user has exactly one relevant item: the target.

All start from the rank of the target (1 is best), so a metric costs nothing once ranks are known. Ranks have any shape, such as
[b] or [b p]; values have the same shape, and the caller averages them.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

MISS_RANK = 2**30
"""Rank of a target that is no candidate: worse than any catalogue."""

Ranks = Int[Array, "*b"] | Int[np.ndarray, "*b"]


def hit_rate(ranks: Ranks, k: int) -> Float[Array, "*b"]:
    """``1 if rank <= k else 0``."""
    return _within(ranks, k).astype(jnp.float32)


def ndcg(ranks: Ranks, k: int) -> Float[Array, "*b"]:
    """``1 / log2(1 + rank) if rank <= k else 0``; with one relevant item the ideal gain is 1 (Järvelin and Kekäläinen, 2002)."""
    return jnp.where(_within(ranks, k), 1 / jnp.log2(1 + jnp.asarray(ranks).astype(jnp.float32)), 0.0)


def mrr(ranks: Ranks, k: int) -> Float[Array, "*b"]:
    """``1 / rank if rank <= k else 0``."""
    return jnp.where(_within(ranks, k), 1 / jnp.asarray(ranks).astype(jnp.float32), 0.0)


def target_rank(
    scores: Float[Array, "*b c"], is_target: Bool[Array, "*#b c"], is_candidate: Bool[Array, "*#b c"] | None = None
) -> Int[Array, "*b"]:
    """Rank of the target among candidates, ``1 + #{candidates j != target: s_j >= s_target}``: a tie never helps the target.

    Works on a whole catalogue (``is_target = arange(i) == target``) and on a candidate list (``is_target = items == target``).

    Args:
      scores: Score of each candidate; -inf is allowed.
      is_target: True at the target, at most once in a row; all False is a retrieval miss.
      is_candidate: False at padding, and at items that were removed. None takes all.

    Returns:
      The rank, or ``MISS_RANK`` where the target is no candidate.

    Raises:
      ValueError: A score is NaN and the scores are concrete. Under ``jax.jit``, where nothing can raise, a NaN counts as ahead of
        the target and a NaN target comes last, so NaN never looks good; call ``check_no_nan`` on the scores that come out.
    """
    if not isinstance(scores, Tracer):
        check_no_nan(scores)
    candidate = jnp.ones_like(is_target) if is_candidate is None else is_candidate
    is_target = is_target & candidate
    target_scores = jnp.max(jnp.where(is_target, scores, -jnp.inf), axis=-1, keepdims=True)
    ahead = candidate & ~is_target & ~(scores < target_scores)
    rank = 1 + jnp.sum(ahead, axis=-1, dtype=jnp.int32)
    return jnp.where(jnp.any(is_target, axis=-1), rank, jnp.int32(MISS_RANK))


def check_no_nan(scores: Float[Array, "..."] | Float[np.ndarray, "..."], name: str = "scores") -> None:
    """Raise ValueError if a value is NaN, with how many are. Waits for the array."""
    count = int(np.count_nonzero(np.isnan(np.asarray(scores))))
    if count:
        raise ValueError(f"{name} has {count} NaN of {scores.size}; expected none. Ranks made of them would mean nothing.")


def _within(ranks: Ranks, k: int) -> Bool[Array, "*b"]:
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    return jnp.asarray(ranks) <= k
