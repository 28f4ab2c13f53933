"""What an index is, what every index checks, and the files that every index writes.

An index folder holds ``index.json`` (implementation, version, sizes) and ``vectors.npy``, so that the exact index can be loaded
from any of them; an approximate index adds its own files.
"""

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from cda4rec_jax.errors import UserError

INDEX_VERSION = 1
_META = "index.json"
_VECTORS = "vectors.npy"

Vectors = Float[Array, "i d"] | Float[np.ndarray, "i d"]
Queries = Float[Array, "b d"] | Float[np.ndarray, "b d"]
Found = tuple[Int[np.ndarray, "b k"], Float[np.ndarray, "b k"]]


@runtime_checkable
class Index(Protocol):
    """Maximum inner product search over item vectors, of which row 0 is padding and never returned."""

    @property
    def implementation(self) -> str:
        """Name of the implementation: ``exact`` or ``scann``."""
        ...

    @property
    def num_items(self) -> int:
        """Items that can be found: rows without the padding row."""
        ...

    def search(self, queries: Queries, k: int) -> Found:
        """The best ``k`` items of each query, best first: item indices (int32, 0 where none) and scores (float32, -inf there).

        Raises UserError if ``k`` exceeds the catalogue, or a query has another width or is not finite.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write into ``directory``, made if missing."""
        ...

    @classmethod
    def load(cls, directory: Path) -> "Index":
        """Read what ``save`` wrote; the folder may have moved. Raises UserError on anything else."""
        ...


def check_vectors(item_vectors: Vectors) -> Float[np.ndarray, "i d"]:
    """Item vectors as a contiguous float32 array on the host; UserError if there is no item or a value is not finite."""
    vectors = np.ascontiguousarray(item_vectors, np.float32)
    if vectors.shape[0] < 2:
        raise UserError(f"item vectors have {vectors.shape[0]} rows; expected row 0 (padding) and at least one item.")
    if not np.isfinite(vectors[1:]).all():
        raise UserError("item vectors hold NaN or infinite values; expected finite numbers. Did training diverge?")
    return vectors


def check_search(queries: Queries, k: int, num_items: int, width: int) -> None:
    """UserError if ``queries`` do not fit the index, or ``k`` does not fit the catalogue."""
    check_k(k, num_items)
    if queries.shape[1] != width:
        raise UserError(f"queries are {queries.shape[1]} wide; the index was built from item vectors of width {width}.")
    if not np.isfinite(np.asarray(queries)).all():
        raise UserError("queries hold NaN or infinite values; expected finite numbers.")


def check_k(k: int, num_items: int) -> None:
    """UserError if ``k`` is not between 1 and the number of items."""
    if not 1 <= k <= num_items:
        raise UserError(f"asked for {k} items of a catalogue of {num_items}; expected 1 to {num_items}.")


def write_common(directory: Path, implementation: str, vectors: Float[np.ndarray, "i d"]) -> None:
    """Write the files that every index has."""
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / _VECTORS, vectors)
    meta = {"implementation": implementation, "version": INDEX_VERSION, "rows": vectors.shape[0], "width": vectors.shape[1]}
    (directory / _META).write_text(json.dumps(meta, indent=2) + "\n")


def read_implementation(directory: Path) -> str:
    """Implementation that wrote an index folder; UserError if the folder is no index, or of another version."""
    path = directory / _META
    try:
        meta = json.loads(path.read_text())
        implementation, version = meta["implementation"], meta["version"]
    except OSError as error:
        raise UserError(f"{directory} is no index: {path} cannot be read ({error.strerror}). Build the index again.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Build the index again.") from error
    if version != INDEX_VERSION:
        raise UserError(f"{directory} has index version {version}; this package reads version {INDEX_VERSION}. Build it again.")
    return implementation


def read_vectors(directory: Path) -> Float[np.ndarray, "i d"]:
    """Item vectors of an index folder of any implementation."""
    read_implementation(directory)
    path = directory / _VECTORS
    try:
        return check_vectors(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}). Build the index again.") from error
