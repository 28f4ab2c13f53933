"""What the attacks share: what was released, and ridge regression from releases to what is private."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True, kw_only=True)
class Release:
    """What left the devices of ``u`` users at one level.

    Attributes:
        features: float [u, f]: everything but ids, as numbers (shares, one-hot length bucket, attributes, embedding); f may be 0.
        items: int [u, r] released item indices, 0 is padding; r may be 0.
    """

    features: np.ndarray
    items: np.ndarray

    def shuffled(self, seed: int) -> "Release":
        """The same releases, each at some other user: the null control."""
        order = np.random.default_rng([seed, 1]).permutation(len(self.features))
        return Release(features=self.features[order], items=self.items[order])

    def multi_hot(self, num_items: int) -> sparse.csr_matrix:
        """Released ids, float32 [u, i] of zeros and ones; column j is item j + 1."""
        rows, columns = np.nonzero(self.items)
        return binary(rows, self.items[rows, columns], len(self.items), num_items)


def silent(num_users: int) -> Release:
    """What leaves at level NOTHING."""
    return Release(features=np.zeros((num_users, 0), np.float32), items=np.zeros((num_users, 0), np.int32))


def whole(offsets: np.ndarray, items: np.ndarray) -> Release:
    """Raw histories, user j's being ``items[offsets[j]:offsets[j+1]]``: the positive control."""
    lengths = np.diff(offsets)
    padded = np.zeros((len(lengths), int(lengths.max())), np.int32)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    padded[rows, np.arange(offsets[0], offsets[-1]) - np.repeat(offsets[:-1], lengths)] = items[offsets[0] : offsets[-1]]
    return Release(features=np.zeros((len(lengths), 0), np.float32), items=padded)


def multi_hot(offsets: np.ndarray, items: np.ndarray, num_items: int) -> sparse.csr_matrix:
    """Whole histories, float32 [u, i] of zeros and ones; column j is item j + 1."""
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return binary(rows, items[offsets[0] : offsets[-1]], len(offsets) - 1, num_items)


def binary(rows: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> sparse.csr_matrix:
    """1 at every (row, item), however often it is given."""
    matrix = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, items - 1)), shape=(num_users, num_items))
    matrix.data[:] = 1.0  # a repeated item was summed
    return matrix


def right_singular_vectors(matrix: sparse.csr_matrix, rank: int, seed: int) -> np.ndarray:
    """The leading ones, float32 [columns, rank], by a randomised decomposition."""
    from sklearn.utils.extmath import randomized_svd  # takes a second to import, and only attacks need it

    return randomized_svd(matrix, rank, random_state=seed)[2].T.astype(np.float32)


def design(features: np.ndarray, released: sparse.csr_matrix, basis: np.ndarray | None) -> np.ndarray:
    """One row a user: the features, then the released ids, in the space of ``basis`` [i, rank] where there is one."""
    if released.nnz == 0:
        return features.astype(np.float32)
    ids = released.toarray() if basis is None else np.asarray(released @ basis)
    return np.concatenate([features.astype(np.float32), ids.astype(np.float32)], axis=1)


class Ridge:
    """Ridge regression on standardised columns, fitted once for every strength.

    guess(x) = z (Z'Z + strength n I)^-1 Z'Y with z and Z standardised by the n fitted rows; 0 at infinite strength.

    Args:
        rows: float [n, f] of ``design``.
        target: float [n, t], each column of mean 0.
    """

    def __init__(self, rows: np.ndarray, target: np.ndarray):
        self._mean, spread = rows.mean(axis=0, keepdims=True), rows.std(axis=0, keepdims=True)
        # A column that is constant among the attacker's users carries nothing to learn from; it must not be blown up.
        self._scale = np.where(spread > 1e-6, spread, np.inf).astype(np.float32)
        standardised = (rows - self._mean) / self._scale
        self._values, self._vectors = np.linalg.eigh(standardised.T @ standardised)
        self._projected = self._vectors.T @ (standardised.T @ target)
        self._num_rows, self._width = target.shape

    def guess(self, rows: np.ndarray, strength: float) -> np.ndarray:
        """Float32 [u, t]."""
        if np.isinf(strength):
            return np.zeros((len(rows), self._width), np.float32)
        damping = np.maximum(self._values, 0.0)[:, None] + strength * self._num_rows
        return ((rows - self._mean) / self._scale) @ (self._vectors @ (self._projected / damping)).astype(np.float32)
