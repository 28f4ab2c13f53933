"""EASE (Steck, arXiv 1905.03375): a linear item-item model with a closed form."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from scipy.linalg import get_lapack_funcs
from scipy.sparse import csr_array

from cda4rec_jax.baselines.counting import decayed_histories
from cda4rec_jax.baselines.protocol import Watch, unwatched
from cda4rec_jax.data.splits import train_histories
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.pipeline.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class EASEConfig:
    """Regularisation, and how a history is read."""

    regularisation: float = 250.0  # lambda, in users
    history_decay: float = 1.0  # weight of an event relative to the one after it; 1 is EASE as published, which knows no order
    history_length: int = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class EASE:
    """``s = x B``, where x has ``decay^age`` at the items of the history."""

    weights: Float32[np.ndarray, "i i"]  # B; row and column 0 are padding and 0
    config: EASEConfig

    @property
    def history_length(self) -> int:
        """Newest events that it reads."""
        return self.config.history_length

    @property
    def num_parameters(self) -> int:
        """All pairs of two items."""
        return (len(self.weights) - 1) * (len(self.weights) - 2)

    def score(self, history: HistoryBatch) -> Float32[np.ndarray, "b i"]:
        """Rows of B at the items of the history, weighted and summed."""
        num_items, config = len(self.weights) - 1, self.config
        rows = decayed_histories(history, num_items, history_length=config.history_length, decay=config.history_decay)
        return rows @ self.weights


def fit_ease(corpus: Corpus, config: EASEConfig = EASEConfig(), watch: Watch = unwatched) -> EASE:
    """Invert the regularised Gram matrix of the training events, in a few float64 matrices of items x items.

    ``B = argmin |X - X B|^2 + lambda |B|^2`` with a zero diagonal, X the binary users x items matrix. With
    ``P = (X^T X + lambda I)^-1`` that is ``B_jk = -P_jk / P_kk`` for j != k.

    Raises:
        ValueError: the regularisation is not above 0, without which the matrix may have no inverse.
    """
    del watch
    if config.regularisation <= 0:
        raise ValueError(f"regularisation is {config.regularisation}; expected above 0")
    offsets, items = train_histories(corpus.interactions)
    num_items = corpus.interactions.num_items
    seen = csr_array((np.ones(len(items)), items - 1, offsets), shape=(len(offsets) - 1, num_items))
    seen.sum_duplicates()
    seen.data[:] = 1.0
    gram = np.asfortranarray((seen.T @ seen).toarray())
    gram[np.diag_indices(num_items)] += config.regularisation
    # The matrix is symmetric and positive definite: Cholesky needs half the work and memory of a general inverse.
    factorise, invert = get_lapack_funcs(("potrf", "potri"), (gram,))
    factor, failed = factorise(gram, lower=1, overwrite_a=1)
    inverse, failed_too = invert(factor, lower=1, overwrite_c=1)
    if failed or failed_too:
        raise ValueError(f"the Gram matrix of {num_items} items is singular in float64: raise the regularisation")
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    weights = np.zeros((num_items + 1, num_items + 1), np.float32)
    weights[1:, 1:] = inverse / -np.diag(inverse)[None, :]
    np.fill_diagonal(weights, 0.0)
    return EASE(weights=weights, config=config)
