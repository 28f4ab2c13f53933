"""Popularity: every user is offered the items with most training events."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from cda4rec_jax.baselines.counting import train_counts
from cda4rec_jax.baselines.protocol import Watch, unwatched
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.pipeline.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class PopularityConfig:
    """Popularity has nothing to set."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Popularity:
    """``s_j = n_j``, the training events of item j."""

    counts: Float32[np.ndarray, "i"]
    history_length: int = 1  # of which nothing is read

    @property
    def num_parameters(self) -> int:
        """One count for each item."""
        return len(self.counts) - 1

    def score(self, history: HistoryBatch) -> Float32[np.ndarray, "b i"]:
        """The counts, the same for everybody."""
        return np.broadcast_to(self.counts, (len(history.items), len(self.counts)))


def fit_popularity(corpus: Corpus, config: PopularityConfig = PopularityConfig(), watch: Watch = unwatched) -> Popularity:
    """Count the training events."""
    del config, watch
    return Popularity(counts=train_counts(corpus.interactions).astype(np.float32))
