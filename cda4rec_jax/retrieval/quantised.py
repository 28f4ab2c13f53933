"""Exact search that scans 8-bit codes and scores again what they cannot rule out; for one or a few queries over many items."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cda4rec_jax.kernels.topk_dot.quantised import QuantisedItems, check_quantised, quantise_items, topk_dot_quantised
from cda4rec_jax.retrieval.exact import padded_excluded
from cda4rec_jax.retrieval.index import Found, Queries, Vectors, check_search
from cda4rec_jax.retrieval.rows import ItemRows, read_rows, write_rows


@partial(jax.jit, static_argnames=("k",))
def _search(
    table: QuantisedItems,
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"] | None,
    excluded: Int[Array, "b s"] | None,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    return topk_dot_quantised(table, queries, k, allowed=allowed, excluded=excluded)


class QuantisedIndex:
    """Index that finds exactly what ``ExactIndex`` finds, in five quarters of its memory; needs a CPU and a C++ compiler.

    Each answer is the exact top k: an item that the bounds on its score cannot rule out is scored in float32.
    """

    implementation = "quantised"

    def __init__(self, rows: ItemRows) -> None:
        check_quantised()
        self._rows, self._table = rows, quantise_items(rows.vectors)

    @classmethod
    def build(cls, item_vectors: Vectors) -> "QuantisedIndex":
        """Index of ``item_vectors``, where row 0 is padding; UserError if a value is not finite or the codes cannot be searched here."""
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
        check_search(queries, k, self._rows, allowed, excluded)
        rows = jnp.asarray(queries, jnp.float32)
        items, scores = _search(self._table, rows, k, self._rows.usable(allowed), padded_excluded(excluded))
        return np.asarray(items), np.asarray(scores)

    def upsert(self, items: Int[np.ndarray, "n"], vectors: Vectors) -> None:
        """See ``Index.upsert``. Quantises the whole table again."""
        self._rows = self._rows.upserted(items, vectors)
        self._table = quantise_items(self._rows.vectors)

    def delete(self, items: Int[np.ndarray, "n"]) -> None:
        """See ``Index.delete``."""
        self._rows = self._rows.without(items)

    def save(self, directory: Path) -> None:
        """See ``Index.save``. Codes are made again by ``load``."""
        write_rows(directory, self.implementation, self._rows)

    @classmethod
    def load(cls, directory: Path) -> "QuantisedIndex":
        """Quantised index from the folder of any index."""
        return cls(read_rows(directory))
