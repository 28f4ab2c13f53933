"""Item co-occurrence: what followed the items of a history, within a window, in the histories of others."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from scipy.sparse import coo_array, csr_array

from cda4rec_jax.baselines.counting import decayed_histories, train_counts
from cda4rec_jax.baselines.protocol import Watch, unwatched
from cda4rec_jax.data.splits import train_histories
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.pipeline.corpus import Corpus

BACK_OFF = 1e-6  # below the weight of any pair: items that never followed stand in the order of popularity


@dataclass(frozen=True, kw_only=True)
class CooccurrenceConfig:
    """How pairs are counted, and how far back a history counts."""

    window: int = 3  # events after an item that still follow it
    shrinkage: float = (
        20.0  # events added to every count of a denominator, so that one chance meeting of rare items weighs little
    )
    history_decay: float = 0.6  # weight of an event relative to the one after it
    history_length: int = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class Cooccurrence:
    """``s_c = sum over events j of the history of decay^age(j) * followed[j, c]``, plus a trace of popularity."""

    followed: csr_array  # float32 [i, i], row: the earlier item
    popularity: Float32[np.ndarray, "i"]  # 0 to 1
    config: CooccurrenceConfig

    @property
    def history_length(self) -> int:
        """Newest events that it reads."""
        return self.config.history_length

    @property
    def num_parameters(self) -> int:
        """Pairs that were seen."""
        return self.followed.nnz

    def score(self, history: HistoryBatch) -> Float32[np.ndarray, "b i"]:
        """Evidence from every event of the history, summed."""
        rows = decayed_histories(
            history, len(self.popularity) - 1, history_length=self.history_length, decay=self.config.history_decay
        )
        return csr_array(rows @ self.followed).toarray() + np.float32(BACK_OFF) * self.popularity[None, :]


def fit_cooccurrence(corpus: Corpus, config: CooccurrenceConfig = CooccurrenceConfig(), watch: Watch = unwatched) -> Cooccurrence:
    """Count directed pairs of the training events.

    ``followed[j, c] = f(j, c) / sqrt((n(j) + shrinkage)(n(c) + shrinkage))``, where f sums ``1 / gap`` for every time that c came
    ``gap`` events after j, up to ``window``, and n counts events.

    Raises:
        ValueError: the window is below 1.
    """
    del watch
    if config.window < 1:
        raise ValueError(f"window is {config.window}; expected at least 1")
    offsets, items = train_histories(corpus.interactions)
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    earlier, later, values = [], [], []
    for gap in range(1, config.window + 1):
        same_user = users[gap:] == users[:-gap]
        earlier.append(items[:-gap][same_user])
        later.append(items[gap:][same_user])
        values.append(np.full(int(same_user.sum()), 1.0 / gap))
    counts = train_counts(corpus.interactions)
    rows, columns = np.concatenate(earlier), np.concatenate(later)
    scale = np.sqrt(counts + config.shrinkage)
    weights = np.concatenate(values) / (scale[rows] * scale[columns])
    followed = csr_array(coo_array((weights, (rows, columns)), shape=(len(counts), len(counts))), dtype=np.float32)
    return Cooccurrence(followed=followed, popularity=(counts / max(counts.max(), 1)).astype(np.float32), config=config)
