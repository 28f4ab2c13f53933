"""Ranking of the whole catalogue by the cloud agent alone: what early stopping watches, and what SASRec answers."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.array_typing import Array, ItemVectors, Lengths
from cda4rec_jax.messages import EgressLevel, HistoryBatch
from cda4rec_jax.pipeline.subtasks import model_semantics, release


def full_ranks(
    cloud: CloudAgent,
    vectors: ItemVectors,
    categories: Float[Array, "i g"],
    history: HistoryBatch,
    *,
    history_length: int,
    profile_events: int,
) -> Int[Array, "b"]:
    """Rank of each target among all items that the user has not seen, from a FULL abstract: ``1 + #{j != target: s_j >= s_target}``."""
    num_users = history.items.shape[0]
    level = jnp.full((num_users,), EgressLevel.FULL.value, jnp.int32)
    abstract = release(
        history,
        categories,
        level,
        jnp.zeros((num_users,), jnp.int32),
        max_items=history_length,
        history_length=history_length,
        profile_events=profile_events,
    )
    scores = model_semantics(cloud, vectors, abstract) @ vectors.T
    return ranks_of_unseen(scores, history.seen, history.targets)


def ranks_of_unseen(scores: Float[Array, "b i"], seen: Int[Array, "b seen"], targets: Lengths) -> Int[Array, "b"]:
    """Rank of each target among the items that are neither padding nor seen; every tie counts against the target."""
    target_scores = jnp.take_along_axis(scores, targets[:, None], axis=1)
    open_items = jax.vmap(lambda row, items: row.at[items].set(False).at[0].set(False))(jnp.ones(scores.shape, bool), seen)
    is_target = jnp.arange(scores.shape[1])[None, :] == targets[:, None]
    return 1 + jnp.sum(open_items & ~is_target & (scores >= target_scores), axis=1)


def in_batches(count: int, size: int) -> list[np.ndarray]:
    """Indices 0..count-1 in equal batches of ``size``; the last one repeats its final index, so that every batch has one shape."""
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
