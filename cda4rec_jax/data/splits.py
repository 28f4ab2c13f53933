"""Leave-one-out in time: a user's last event is the test target, the one before the validation target, the others train."""

import enum

import numpy as np
from jaxtyping import Int32, Int64

from cda4rec_jax.data.interactions import Interactions


class Split(enum.StrEnum):
    """Which events of a user are predicted."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


def train_lengths(interactions: Interactions) -> Int64[np.ndarray, "users"]:
    """Training events of each user: n - 2 of n."""
    return np.diff(interactions.offsets) - 2


def prefix_lengths(interactions: Interactions, split: Split) -> Int64[np.ndarray, "users"]:
    """Events before each user's target, which is also the target's position: n - 2 (validation) or n - 1 (test) of n.

    Raises:
        ValueError: for the training split, in which every event but the first is a target.
    """
    if split == Split.TRAIN:
        raise ValueError("the training split has no single target per user: use train_histories")
    return np.diff(interactions.offsets) - (2 if split == Split.VALIDATION else 1)


def targets(interactions: Interactions, split: Split) -> Int32[np.ndarray, "users"]:
    """Item index of each user's validation or test target."""
    return interactions.items[interactions.offsets[:-1] + prefix_lengths(interactions, split)]


def train_histories(interactions: Interactions) -> tuple[Int64[np.ndarray, "offsets"], Int32[np.ndarray, "events"]]:
    """Offsets [u + 1] and item indices of the training events alone: the only input of popularity and co-occurrence tables."""
    lengths = train_lengths(interactions)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return offsets, interactions.items[position + np.repeat(interactions.offsets[:-1], lengths)]
