"""Accuracy from target ranks, and the ranks of systems that need no plan."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.metrics import MISS_RANK, hit_rate, mrr, ndcg

CUTOFFS = (5, 10, 20)
HISTORY_STARTS = (1, 6, 11, 21, 51)  # events of the histories that are reported apart
METRICS: dict[str, Callable] = {
    f"{name}@{k}": lambda ranks, metric=metric, k=k: metric(ranks, k)
    for name, metric in (("hit_rate", hit_rate), ("ndcg", ndcg), ("mrr", mrr))
    for k in CUTOFFS
}


def mean_metrics(ranks: Int[np.ndarray, "b"]) -> dict[str, float]:
    """Mean of every metric over requests, by name such as ``ndcg@10``."""
    return {name: float(np.asarray(metric(ranks)).mean(dtype=np.float64)) for name, metric in METRICS.items()}


def groups_of(numbers: Int[np.ndarray, "b"], starts: Sequence[int]) -> dict[str, Bool[np.ndarray, "b"]]:
    """Members of each group by a label such as ``6-20``: from one of ``starts`` to before the next, the last without an end.

    Groups without members are left out.
    """
    groups = {}
    for start, end in zip(starts, (*starts[1:], None), strict=True):
        label = f"{start} and more" if end is None else str(start) if end == start + 1 else f"{start}-{end - 1}"
        inside = (numbers >= start) & (True if end is None else numbers < end)
        if inside.any():
            groups[label] = inside
    return groups


def popularity_ranks(
    train_counts: Int[np.ndarray, "i"],
    interactions: Interactions,
    users: Int[np.ndarray, "b"],
    positions: Int[np.ndarray, "b"],
) -> Int[np.ndarray, "b"]:
    """Rank of each target when all unseen items are ordered by training events: ``1 + #{j != target: n_j >= n_target}``.

    ``train_counts`` has the training events by item_index, with padding in row 0; ``positions`` are those of each user's target,
    and what came before it is seen. A target that is seen itself is no candidate, as in the slate of every plan: ``MISS_RANK``.
    """
    ordered = np.sort(train_counts[1:])
    begins = interactions.offsets[users]
    targets = interactions.items[begins + positions]
    at_least = len(ordered) - np.searchsorted(ordered, train_counts[targets], side="left")
    rows = np.repeat(np.arange(len(users)), positions)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(positions) - positions, positions)
    past = np.stack([rows, interactions.items[begins[rows] + place]])
    past = np.unique(past, axis=1)  # an item that was seen twice is removed once
    removed, repeats = train_counts[past[1]] >= train_counts[targets[past[0]]], past[1] == targets[past[0]]
    ranks = at_least - np.bincount(past[0], weights=removed, minlength=len(users)).astype(np.int64)
    ranks[past[0][repeats]] = MISS_RANK
    return ranks


def per_user(ranks: Int[np.ndarray, "b"], name: str) -> Float[np.ndarray, "b one"]:
    """One metric of each user, as one context each."""
    return np.asarray(METRICS[name](ranks), np.float64)[:, None]
