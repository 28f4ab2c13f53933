"""Exact search that scans 8-bit codes and scores again what they cannot rule out; for one or a few queries over many items."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cda4rec_jax.kernels.topk_dot.quantised import QuantisedItems, check_quantised, quantise_items, topk_dot_quantised
from cda4rec_jax.retrieval.exact import ExactIndex
from cda4rec_jax.retrieval.rows import ItemRows


@partial(jax.jit, static_argnames=("k",))
def _search(
    table: QuantisedItems,
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"] | None,
    excluded: Int[Array, "b s"] | None,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    return topk_dot_quantised(table, queries, k, allowed=allowed, excluded=excluded)


class QuantisedIndex(ExactIndex):
    """Index that finds exactly what ``ExactIndex`` finds, in five quarters of its memory; needs a CPU and a C++ compiler.

    Each answer is the exact top k: an item that the bounds on its score cannot rule out is scored in float32. UserError where the codes
    cannot be searched.
    """

    implementation = "quantised"

    def __init__(self, rows: ItemRows) -> None:
        check_quantised()
        super().__init__(rows)

    def _table_of(self, vectors: Float[np.ndarray, "i d"]) -> Any:
        return quantise_items(vectors)

    def _find(self, table: Any, queries: Any, k: int, allowed: Any, excluded: Any) -> Any:
        return _search(table, queries, k, allowed, excluded)
