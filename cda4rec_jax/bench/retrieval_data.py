"""Vectors to measure retrieval on: a generated set that is hard for approximate search."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from cda4rec_jax.errors import UserError

RANK = 24  # of the part of the vectors that is no noise
_NOISE = 0.3  # norm of the noise, where that of the rest is 1
_NORMS = (0.7, 1.3)
_CHUNK = 65_536  # vectors of one random stream
_BASIS, _ITEMS, _QUERIES = range(3)  # streams of a seed


def hard_items(num_items: int, width: int, seed: int = 0) -> Float[np.ndarray, "i d"]:
    """Item vectors without clusters, float32, in rows 1 to ``num_items``; row 0 is padding, and zero.

    ``e = s u / |u|`` with ``u = z B + .3 n``: z is Gaussian in 24 dimensions, B a random orthonormal basis, n Gaussian noise in
    all dimensions (z B and n both with an expected squared norm of 1), and s uniform in [.7, 1.3]. A function of its arguments
    alone; the items of a larger table begin with those of a smaller one.

    Raises:
      UserError: there is no item, or the width is below 24.
    """
    return np.concatenate([np.zeros((1, width), np.float32), _vectors(num_items, width, seed, _ITEMS)])


def hard_item_chunks(num_items: int, width: int, seed: int = 0) -> Iterator[Float[np.ndarray, "_ _"]]:
    """The rows of ``hard_items`` in order, some at a time, for tables that are never in memory as a whole. UserError as there."""
    yield np.zeros((1, width), np.float32)
    yield from _chunks(num_items, width, seed, _ITEMS)


def hard_queries(num_queries: int, width: int, seed: int = 0) -> Float[np.ndarray, "b d"]:
    """Queries from the distribution of ``hard_items`` of the same seed and width, none of them an item. UserError as there."""
    return _vectors(num_queries, width, seed, _QUERIES)


def _vectors(count: int, width: int, seed: int, stream: int) -> Float[np.ndarray, "n d"]:
    vectors = np.empty((count, width), np.float32)
    for chunk, rows in enumerate(_chunks(count, width, seed, stream)):
        vectors[chunk * _CHUNK : (chunk + 1) * _CHUNK] = rows
    return vectors


def _chunks(count: int, width: int, seed: int, stream: int) -> Iterator[Float[np.ndarray, "_ _"]]:
    if count < 1 or width < RANK:
        raise UserError(f"asked for {count} vectors of width {width}; expected at least one, and a width of at least {RANK}.")
    basis, _ = np.linalg.qr(np.random.default_rng((seed, _BASIS)).standard_normal((width, RANK)))
    mixing = (basis.T / np.sqrt(RANK)).astype(np.float32)
    for chunk, start in enumerate(range(0, count, _CHUNK)):
        rng = np.random.default_rng((seed, stream, chunk))
        latent = rng.standard_normal((_CHUNK, RANK), np.float32)
        noise = rng.standard_normal((_CHUNK, width), np.float32)
        norms = rng.uniform(*_NORMS, (_CHUNK, 1)).astype(np.float32)
        rows = latent @ mixing + np.float32(_NOISE / np.sqrt(width)) * noise
        rows *= norms / np.linalg.norm(rows, axis=1, keepdims=True)
        yield rows[: count - start]
