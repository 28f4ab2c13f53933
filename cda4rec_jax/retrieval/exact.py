"""Exact search, the reference of every other index. On catalogues of some ten thousand items it is also among the fastest."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cda4rec_jax.kernels.topk_dot import topk_dot
from cda4rec_jax.retrieval.index import Found, Queries, Vectors, check_k, checked_queries
from cda4rec_jax.retrieval.rows import ItemRows, read_rows, replacing_index, write_rows

_LEAST_EXCLUDED = 8


def exact_search(
    item_vectors: Float[Array, "i d"], queries: Float[Array, "b d"], k: int, *, chunk_size: int = 16384
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """The ``k`` items with the greatest ``q . e_i`` among rows 1 to i - 1, best first; among equals the lower index first.

    Pure and usable inside ``jax.jit`` (``k`` and ``chunk_size`` static). Only [b, chunk_size] scores exist at a time. Always by XLA, for
    training and evaluation: the same rounding with or without a compiler on the machine, and programs that a mesh can partition.

    Raises:
      UserError: ``k`` exceeds the catalogue.
    """
    check_k(k, item_vectors.shape[0] - 1)
    items, scores = topk_dot(item_vectors, queries, k, chunk_size=chunk_size, implementation="xla")
    return items, scores.astype(jnp.float32)


@partial(jax.jit, static_argnames=("k",))
def filtered_search(
    vectors: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"] | None,
    excluded: Int[Array, "b s"] | None,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """As ``exact_search``, with the filters of ``Index.search``, and compiled; by the fastest implementation of the backend."""
    return topk_dot(vectors, queries, k, allowed=allowed, excluded=excluded)


def padded_excluded(excluded: Int[np.ndarray, "b s"] | None) -> Int[np.ndarray, "b padded"] | None:
    """With a width rounded up to a power of two, so that few programs are compiled."""
    if excluded is None:
        return None
    width = max(_LEAST_EXCLUDED, 1 << max(0, excluded.shape[1] - 1).bit_length())
    return np.pad(excluded, ((0, 0), (0, width - excluded.shape[1])))


class ExactIndex:
    """Index that computes every inner product, compiled once for each batch size, ``k`` and power of two of excluded items."""

    implementation = "exact"

    def __init__(self, rows: ItemRows) -> None:
        self._rows, self._table = rows, self._table_of(rows.vectors)

    def _table_of(self, vectors: Float[np.ndarray, "i d"]) -> Any:
        """What ``_find`` searches."""
        return jnp.asarray(vectors)

    def _find(self, table: Any, queries: Any, k: int, allowed: Any, excluded: Any) -> Any:
        return filtered_search(table, queries, k, allowed, excluded)

    @classmethod
    def build(cls, item_vectors: Vectors) -> "ExactIndex":
        """Index of ``item_vectors``, where row 0 is padding; UserError if a value is not finite."""
        return cls(ItemRows.of(item_vectors))

    @property
    def num_items(self) -> int:
        return self._rows.num_items

    def search(
        self,
        queries: Queries,
        k: int,
        *,
        allowed: Bool[np.ndarray, "i"] | None = None,
        excluded: Int[np.ndarray, "b s"] | None = None,
    ) -> Found:
        """See ``Index.search``."""
        rows = checked_queries(queries, k, self._rows, allowed, excluded)  # jit takes NumPy 10 us sooner than jnp.asarray does
        items, scores = self._find(self._table, rows, k, self._rows.usable(allowed), padded_excluded(excluded))
        return np.asarray(items), np.asarray(scores)

    def upsert(self, items: Int[np.ndarray, "n"], vectors: Vectors) -> None:
        """See ``Index.upsert``. Makes the table anew; one that grew is compiled for again."""
        self._rows = self._rows.upserted(items, vectors)
        self._table = self._table_of(self._rows.vectors)

    def delete(self, items: Int[np.ndarray, "n"]) -> None:
        """See ``Index.delete``."""
        self._rows = self._rows.without(items)

    def save(self, directory: Path) -> None:
        """See ``Index.save``. What is made of the vectors is made again by ``load``."""
        with replacing_index(directory) as folder:
            write_rows(folder, self.implementation, self._rows)

    @classmethod
    def load(cls, directory: Path) -> "ExactIndex":
        """Index from the folder of any index."""
        return cls(read_rows(directory))
