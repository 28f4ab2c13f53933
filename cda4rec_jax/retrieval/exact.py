"""Exact search, the reference of every other index. On catalogues of some ten thousand items it is also among the fastest."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from cda4rec_jax.retrieval.index import Found, Queries, Vectors, check_k, check_search, check_vectors, read_vectors, write_common


def exact_search(
    item_vectors: Float[Array, "i d"], queries: Float[Array, "b d"], k: int, *, chunk_size: int = 16384
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """The ``k`` items with the greatest ``q . e_i`` among rows 1 to i - 1, best first; among equals the lower index first.

    Pure and usable inside ``jax.jit`` (``k`` and ``chunk_size`` static). Only [b, chunk_size] scores exist at a time.

    Raises:
      UserError: ``k`` exceeds the catalogue.
    """
    num_rows = item_vectors.shape[0]
    check_k(k, num_rows - 1)
    chunk_size = min(chunk_size, num_rows)

    def best_of_chunk(chunk: int | Array) -> tuple[Int[Array, "b n"], Float[Array, "b n"]]:
        first_new = chunk * chunk_size
        # The last chunk overlaps the one before it instead of padding, which would copy the whole table.
        start = jnp.minimum(first_new, num_rows - chunk_size)
        scores = queries @ jax.lax.dynamic_slice_in_dim(item_vectors, start, chunk_size).T
        rows = start + jnp.arange(chunk_size)[None]
        scores = jnp.where(rows >= jnp.maximum(first_new, 1), scores, -jnp.inf).astype(jnp.float32)
        best, positions = jax.lax.top_k(scores, min(k, chunk_size))
        return (start + positions).astype(jnp.int32), best

    def merge(chunk: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        items, scores = (jnp.concatenate(pair, axis=1) for pair in zip(found, best_of_chunk(chunk), strict=True))
        best, positions = jax.lax.top_k(scores, k)
        return jnp.take_along_axis(items, positions, axis=1), best

    if chunk_size == num_rows:
        return best_of_chunk(0)
    none = (jnp.zeros((queries.shape[0], k), jnp.int32), jnp.full((queries.shape[0], k), -jnp.inf, jnp.float32))
    return jax.lax.fori_loop(0, -(-num_rows // chunk_size), merge, none)


_search = partial(jax.jit, static_argnames=("k",))(exact_search)


class ExactIndex:
    """Index that computes every inner product, compiled once for each batch size and ``k``."""

    implementation = "exact"

    def __init__(self, item_vectors: Vectors) -> None:
        self._vectors = jnp.asarray(check_vectors(item_vectors))

    @classmethod
    def build(cls, item_vectors: Vectors) -> "ExactIndex":
        """Index of ``item_vectors``, where row 0 is padding; UserError if a value is not finite."""
        return cls(item_vectors)

    @property
    def num_items(self) -> int:
        return self._vectors.shape[0] - 1

    def search(self, queries: Queries, k: int) -> Found:
        """See ``Index.search``."""
        check_search(queries, k, self.num_items, self._vectors.shape[1])
        items, scores = _search(self._vectors, jnp.asarray(queries, jnp.float32), k)
        return np.asarray(items), np.asarray(scores)

    def save(self, directory: Path) -> None:
        """See ``Index.save``."""
        write_common(directory, self.implementation, np.asarray(self._vectors))

    @classmethod
    def load(cls, directory: Path) -> "ExactIndex":
        """Exact index from the folder of any index."""
        return cls(read_vectors(directory))
