"""What the baselines without gradients count: training events, and histories as rows of a matrix."""

import numpy as np
from jaxtyping import Int64
from scipy.sparse import csr_array

from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.data.splits import train_histories
from cda4rec_jax.messages import HistoryBatch


def train_counts(interactions: Interactions) -> Int64[np.ndarray, "i"]:
    """Training events by item_index; row 0 is padding and 0."""
    return np.bincount(train_histories(interactions)[1], minlength=interactions.num_items + 1).astype(np.int64)


def decayed_histories(history: HistoryBatch, num_items: int, *, history_length: int, decay: float) -> csr_array:
    """Float32 [b, i]: ``decay^age`` at the ``history_length`` newest items of each history, where the last has age 0; 0 elsewhere.

    An item that comes more than once counts by its newest event.
    """
    items, lengths = np.asarray(history.items), np.asarray(history.lengths)
    age = lengths[:, None] - 1 - np.arange(items.shape[1])[None, :]
    # Histories are oldest first, and of repeated indices the last assignment stays.
    rows, columns = np.nonzero((age >= 0) & (age < history_length))
    dense = np.zeros((len(items), num_items + 1), np.float32)
    dense[rows, items[rows, columns]] = decay ** age[rows, columns]
    return csr_array(dense)
