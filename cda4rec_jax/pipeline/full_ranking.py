"""Ranking of the whole catalogue by one agent alone: by the cloud agent (what early stopping watches, and what SASRec answers), or by
the device agent, which would have to hold the whole catalogue.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.agents.device import DeviceAgent
from cda4rec_jax.array_typing import Array, ItemVectors, Lengths
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Candidates, EgressLevel, HistoryBatch
from cda4rec_jax.metrics import MISS_RANK
from cda4rec_jax.pipeline.catalogue import Catalogue
from cda4rec_jax.pipeline.subtasks import (
    abstract_evidence,
    model_semantics,
    model_structure,
    release,
    score_features,
)
from cda4rec_jax.pipeline.system import SystemConfig


def full_ranks(
    cloud: CloudAgent,
    vectors: ItemVectors,
    categories: Float[Array, "i g"],
    history: HistoryBatch,
    *,
    history_length: int,
    profile_events: int,
    age_events: Lengths | None = None,
) -> Int[Array, "b"]:
    """Rank of each target among all items that the user has not seen, from a FULL abstract: ``1 + #{j != target: s_j >= s_target}``.

    ``MISS_RANK`` where the target is seen. ``age_events`` makes the abstract of each history as it was so many events ago; None is now.
    """
    num_users = history.items.shape[0]
    level = jnp.full((num_users,), EgressLevel.FULL.value, jnp.int32)
    abstract = release(
        history,
        categories,
        level,
        jnp.zeros((num_users,), jnp.int32) if age_events is None else age_events,
        max_items=history_length,
        history_length=history_length,
        profile_events=profile_events,
    )
    scores = model_semantics(cloud, vectors, abstract) @ vectors.T
    return ranks_of_unseen(scores, history.seen, history.targets)


def device_full_ranks(device: DeviceAgent, catalogue: Catalogue, history: HistoryBatch, config: SystemConfig) -> Int[Array, "b"]:
    """Rank of each target among all unseen items by the fusion head without any cloud score, on a device that holds every record.

    Candidates have the features that they have under the plan ``local-skip-device``, which ranks the resident items alone.
    """
    level = jnp.full(history.lengths.shape, EgressLevel.FULL.value, jnp.int32)
    sizes = {"history_length": config.history_length, "profile_events": config.profile_events}
    full = release(history, catalogue.categories, level, jnp.zeros_like(level), max_items=config.history_length, **sizes)
    structured = model_structure(device, full, abstract_evidence(catalogue, full))
    # Padding, row 0, stands first as it does in that plan: scores of the decoder are counted from the first candidate's.
    num_rows = catalogue.num_items + 1
    none = jnp.zeros((1, num_rows))
    every = Candidates(items=jnp.arange(num_rows)[None, :], scores=none, present=none, ranks=none)
    evidence, nothing = jax.tree.map(lambda table: table[None], catalogue.evidence), jnp.zeros((1,), jnp.int32)

    def one(user: Array) -> Array:
        asked = (structured, history.seen, history.targets)
        own, seen, target = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, user, 1), asked)
        features = score_features(
            every,
            evidence,
            own,
            age_events=jnp.zeros((1,)),
            level=nothing,
            num_items=catalogue.num_items,
            without=config.without_features,
        )
        return ranks_of_unseen(device.head(features), seen, target)[0]

    # One user after the other: the features of one are as large as the catalogue.
    return jax.lax.map(one, jnp.arange(len(history.lengths)))


def ranks_of_unseen(scores: Float[Array, "b i"], seen: Int[Array, "b seen"], targets: Lengths) -> Int[Array, "b"]:
    """Rank of each target among the items that are neither padding nor seen; every tie counts against the target.

    A target that is seen itself is no candidate, as in the slate of every plan, and has ``MISS_RANK``. The rank is 0 where a score is
    NaN, as nothing can raise under jit: see ``checked_ranks``.
    """
    target_scores = jnp.take_along_axis(scores, targets[:, None], axis=1)
    open_items = jax.vmap(lambda row, items: row.at[items].set(False).at[0].set(False))(jnp.ones(scores.shape, bool), seen)
    is_target = jnp.arange(scores.shape[1])[None, :] == targets[:, None]
    ranks = 1 + jnp.sum(open_items & ~is_target & (scores >= target_scores), axis=1)
    ranks = jnp.where(jnp.any(seen == targets[:, None], axis=1), MISS_RANK, ranks)
    return jnp.where(jnp.isnan(scores).any(axis=1), 0, ranks)


def checked_ranks(ranks: Int[np.ndarray, "n *p"]) -> Int[np.ndarray, "n *p"]:
    """The same ranks. Raises UserError where one is below 1, which stands for scores that are no numbers."""
    broken = np.any(ranks < 1, axis=tuple(range(1, ranks.ndim)))
    if broken.any():
        raise UserError(
            f"{broken.sum()} of {len(ranks)} users have scores that are NaN or infinite; ranks made of them would mean nothing. "
            "Where training diverged, train with a lower --learning-rate"
        )
    return ranks


def in_batches(count: int, size: int) -> list[np.ndarray]:
    """Indices 0..count-1 in equal batches of ``size``; the last one repeats its final index, so that every batch has one shape."""
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
