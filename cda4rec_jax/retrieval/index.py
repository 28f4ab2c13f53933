"""What an index is, and what every index checks."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval.rows import ItemRows, Vectors

Queries = Float[Array, "b d"] | Float[np.ndarray, "b d"]
Found = tuple[Int[np.ndarray, "b k"], Float[np.ndarray, "b k"]]


@runtime_checkable
class Index(Protocol):
    """Maximum inner product search over item vectors, of which row 0 is padding and never returned.

    An item keeps its index for ever: ``delete`` leaves a gap, and ``upsert`` of the same index fills it.
    """

    @property
    def implementation(self) -> str:
        """Name of the implementation: ``exact``, ``quantised``, ``mapped``, ``scann``, ``sharded`` or ``partitioned``."""
        ...

    @property
    def num_items(self) -> int:
        """Items that can be found."""
        ...

    @classmethod
    def build(cls, item_vectors: Vectors) -> "Index":
        """Index of all rows but row 0. Raises UserError if there is no item or a value is not finite."""
        ...

    def search(
        self,
        queries: Queries,
        k: int,
        *,
        allowed: Bool[np.ndarray, "i"] | None = None,
        excluded: Int[np.ndarray, "b s"] | None = None,
    ) -> Found:
        """The best ``k`` items of each query, best first: item indices (int32, 0 where none) and scores (float32, -inf there).

        Filters act inside of the search: what they take away makes room for other items, so that ``k`` remain wherever there are so many.

        Args:
            queries: one vector for each user.
            k: items to find.
            allowed: False at items that no query may find, such as those outside of the wanted categories; one value for each row.
            excluded: items that the query of this row must not find, such as those already seen; 0 where there is none.

        Raises UserError if ``k`` exceeds the catalogue, a query has another width or is not finite, or a filter does not fit.
        """
        ...

    def upsert(self, items: Int[np.ndarray, "n"], vectors: Vectors) -> None:
        """Add these items, or replace their vectors. Raises UserError on an index below 1 or given twice, a width or a value."""
        ...

    def delete(self, items: Int[np.ndarray, "n"]) -> None:
        """Make these items unfindable. Raises UserError if one is not in the index."""
        ...

    def save(self, directory: Path) -> None:
        """Write into ``directory``, made if missing."""
        ...

    @classmethod
    def load(cls, directory: Path) -> "Index":
        """Read what ``save`` wrote; the folder may have moved. Raises UserError on anything else."""
        ...


def checked_queries(
    queries: Queries,
    k: int,
    rows: ItemRows,
    allowed: Bool[np.ndarray, "i"] | None,
    excluded: Int[np.ndarray, "b s"] | None,
) -> Float[np.ndarray, "b d"]:
    """The queries in contiguous float32; UserError if they or filters do not fit the index, or ``k`` does not fit the catalogue."""
    check_k(k, rows.num_items)
    size, width = rows.vectors.shape
    shape = _shape(queries)
    if len(shape) != 2 or shape[1] != width:
        raise UserError(
            f"queries are {_told(queries)}; expected an array of shape (b, {width}), one row for each query, as wide as item vectors."
        )
    asked = np.ascontiguousarray(queries, np.float32)
    if not _is_finite(asked):
        raise UserError("queries hold NaN or infinite values; expected finite numbers.")
    if allowed is not None and _shape(allowed) != (size,):
        raise UserError(
            f"allowed is {_told(allowed)}; expected an array of shape ({size},), one value for each row of the index, row 0 too."
        )
    if excluded is not None:
        if len(_shape(excluded)) != 2 or len(excluded) != len(asked):
            raise UserError(
                f"excluded is {_told(excluded)}; expected an array of shape ({len(asked)}, s), one row for each query; 0 fills up a row."
            )
        if excluded.size and not 0 <= excluded.min() <= excluded.max() < size:
            raise UserError(f"excluded holds item indices outside of 0 to {size - 1}, the rows of the index.")
    return asked


def check_config(config: Any, limits: Iterable[tuple[str, bool, str]]) -> None:
    """UserError that names every field out of its limits; ``limits`` has (field, whether its value fits, what was expected)."""
    wrong = [f"{name} is {getattr(config, name)}, expected {expected}" for name, fits, expected in limits if not fits]
    if wrong:
        raise UserError(f"{type(config).__name__} does not fit: {'; '.join(wrong)}.")


def _shape(values: Any) -> tuple[int, ...]:
    """Of an array; () of anything else."""
    return getattr(values, "shape", ())


def _told(values: Any) -> str:
    """The shape of an array, and the type of anything else."""
    return f"of shape {values.shape}" if hasattr(values, "shape") else f"of type {type(values).__name__}"


def _is_finite(values: Float[np.ndarray, "b d"]) -> bool:
    """A sum of squares is finite only where every value is; where it is not, it may have overflowed, and each value is looked at."""
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def mean_recall(found: Int[np.ndarray, "b k"], exact: Int[np.ndarray, "b k"]) -> float:
    """Mean over queries of the share of the exact items that were found."""
    return float(np.mean([np.isin(*rows).mean() for rows in zip(exact, found, strict=True)]))


def check_k(k: int, num_items: int) -> None:
    """UserError if ``k`` is not between 1 and the number of items."""
    if not 1 <= k <= num_items:
        raise UserError(f"asked for {k} items of a catalogue of {num_items}; expected 1 to {num_items}.")
