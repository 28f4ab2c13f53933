"""The items of an index: their vectors, which of them exist, and the files that every index writes.

An index folder holds ``index.json`` (implementation, version, sizes), ``vectors.npy`` and ``present.npy``, so that the exact index can be
loaded from any of them; an approximate index adds its own files. Folders of version 1 have no ``present.npy``: all their items exist.

A file is never written over, but replaced: a process that has mapped the old one into its memory goes on with that.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cda4rec_jax.errors import UserError

INDEX_VERSION = 2
_READABLE = (1, 2)
_ADVICE = "Restore it, or build the index again (training does)."
_META = "index.json"
VECTORS = "vectors.npy"
_PRESENT = "present.npy"
_PARTS = ".parts"  # folder of what is being written

Vectors = Float[Array, "i d"] | Float[np.ndarray, "i d"]


@dataclass(frozen=True, kw_only=True)
class ItemRows:
    """Row i is item i; row 0 is padding, and never present. Nothing changes in place."""

    vectors: Float[np.ndarray, "i d"]  # contiguous float32
    present: Bool[np.ndarray, "i"]

    @classmethod
    def of(cls, vectors: Vectors, present: Bool[np.ndarray, "i"] | None = None) -> "ItemRows":
        """All items but row 0, or those that are ``present``; UserError if there is no item, no table or a value is not finite."""
        rows = np.ascontiguousarray(vectors, np.float32)
        check_vectors(rows, first=1)
        if rows.shape[0] < 2:
            raise UserError(f"item vectors have {rows.shape[0]} rows; expected row 0 (padding) and at least one item.")
        present = np.ones(rows.shape[0], bool) if present is None else present.copy()
        present[0] = False
        return cls(vectors=rows, present=present)

    @cached_property
    def num_items(self) -> int:
        return int(np.count_nonzero(self.present))

    @cached_property
    def _complete(self) -> bool:
        return bool(self.present[1:].all())

    def usable(self, allowed: Bool[np.ndarray, "i"] | None) -> Bool[np.ndarray, "i"] | None:
        """Items that exist and are allowed; None where that is all rows but row 0."""
        if allowed is None:
            return None if self._complete else self.present
        usable = self.present & allowed
        return None if usable[1:].all() else usable

    def upserted(self, items: Int[np.ndarray, "n"], vectors: Vectors) -> "ItemRows":
        """With these vectors; item indices past the end make the table longer. UserError on a bad index, width or value."""
        items, new = np.asarray(items), np.asarray(vectors, np.float32)
        if items.size == 0:
            return self
        present = self.present_after(items, new)
        table = np.pad(self.vectors, ((0, len(present) - len(self.vectors)), (0, 0)))
        table[items] = new
        return ItemRows.of(table, present)

    def present_after(self, items: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, "rows"]:
        """Which rows exist once these vectors are upserted. UserError on a bad index or width."""
        if items.size and (items.min() < 1 or len(np.unique(items)) < len(items)):
            raise UserError("items to upsert hold an index below 1 or the same index twice; expected distinct indices from 1 on.")
        if vectors.shape != (len(items), self.vectors.shape[1]):
            raise UserError(f"vectors to upsert have shape {vectors.shape}; expected {(len(items), self.vectors.shape[1])}.")
        growth = max(0, int(items.max(initial=0)) + 1 - self.vectors.shape[0])
        present = np.pad(self.present, (0, growth))
        present[items] = True
        return present

    def without(self, items: Int[np.ndarray, "n"]) -> "ItemRows":
        """Without these items, whose indices stay theirs; UserError if one does not exist."""
        items = np.asarray(items)
        known = (items >= 1) & (items < len(self.present))
        if not known.all() or not self.present[items].all():
            raise UserError(
                f"cannot delete items that are not in the index, which holds {self.num_items}; asked for {items[:10]}."
            )
        present = self.present.copy()
        present[items] = False
        return ItemRows(vectors=self.vectors, present=present)


def check_vectors(rows: Float[np.ndarray, "..."], *, first: int) -> None:
    """UserError unless this is a table, of finite values from row ``first`` on."""
    if rows.ndim != 2:
        raise UserError(f"item vectors have shape {rows.shape}; expected a table of shape (i, d), with row 0 for padding.")
    if not np.isfinite(rows[first:]).all():
        raise UserError("item vectors hold NaN or infinite values; expected finite numbers. Did training diverge?")


@contextlib.contextmanager
def replacing_index(directory: Path) -> Iterator[Path]:
    """A folder inside of ``directory`` for the files of an index, which replace those of ``directory`` if the block ends without error.

    ``index.json`` goes first and comes last, so that a process that dies in between leaves no index rather than parts of two.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = directory / _PARTS
    shutil.rmtree(parts, ignore_errors=True)  # of a process that died
    parts.mkdir()
    try:
        yield parts
        (directory / _META).unlink(missing_ok=True)
        for part in sorted(parts.iterdir(), key=lambda part: part.name == _META):
            place = directory / part.name
            if place.is_dir():
                shutil.rmtree(place)
            part.replace(place)
    finally:
        shutil.rmtree(parts)


def write_rows(directory: Path, implementation: str, rows: ItemRows) -> None:
    """Write the files that every index has into the folder of ``replacing_index``."""
    np.save(directory / VECTORS, rows.vectors)
    write_rows_but_vectors(directory, implementation, rows)


def write_rows_but_vectors(directory: Path, implementation: str, rows: ItemRows) -> None:
    """For an index that has written its vectors itself."""
    np.save(directory / _PRESENT, rows.present)
    size, width = rows.vectors.shape
    meta = {"implementation": implementation, "version": INDEX_VERSION, "rows": size, "width": width}
    (directory / _META).write_text(json.dumps(meta, indent=2) + "\n")


def unreadable(part: Path, why: Exception | str) -> UserError:
    """The error for a part of an index that is missing or damaged; of a reason the first sentence, as NumPy's go on with bad advice."""
    reason = repr(why) if isinstance(why, KeyError) else str(why).partition(". ")[0]
    return UserError(f"{part} is missing or damaged ({reason}). {_ADVICE}")


def read_meta(directory: Path) -> tuple[str, int]:
    """Implementation that wrote an index folder, and the version; UserError if the folder is no index, or of another version."""
    path = directory / _META
    try:
        meta = json.loads(path.read_text())
        implementation, version = meta["implementation"], meta["version"]
    except OSError as error:
        raise UserError(f"{directory} is no index: {path} cannot be read ({error.strerror}). {_ADVICE}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error
    if version not in _READABLE:
        raise UserError(f"{directory} has index version {version}; this package reads versions {_READABLE}. Build it again.")
    return implementation, version


def read_rows(directory: Path, *, mapped: bool = False) -> ItemRows:
    """Items of an index folder of any implementation; vectors that are ``mapped`` stay in their file, and are trusted to be finite."""
    _, version = read_meta(directory)
    path = directory / VECTORS
    try:
        vectors = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        path = directory / _PRESENT
        present = np.load(path, allow_pickle=False) if version > 1 else None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if present is not None and present.shape != vectors.shape[:1]:
        raise unreadable(path, f"shape {present.shape} for {vectors.shape}")
    if mapped and present is not None:
        return ItemRows(vectors=vectors, present=present)
    return ItemRows.of(vectors, present)
