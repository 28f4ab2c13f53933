"""The quantised search over files that stay on disk: for catalogues that do not fit into memory, or that only serving reads.

Beside the files that every index has, the folder holds the 8-bit codes and the bounds of ``kernels.topk_dot.quantised``, as they lie in
memory. A search reads all codes and, of the float32 vectors, only the few hundred rows that the codes cannot rule out; so what it needs
in memory is d + 13 bytes for each item instead of 5 d + 13. While memory is free, Linux also keeps the pages around those rows, and
counts them as the process's; it takes them back without writing anything.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.quantised import BLOCK, QuantisedItems, check_quantised, quantise_rows
from cda4rec_jax.retrieval.index import Vectors
from cda4rec_jax.retrieval.quantised import QuantisedIndex
from cda4rec_jax.retrieval.rows import (
    VECTORS,
    ItemRows,
    check_vectors,
    read_meta,
    read_rows,
    replacing_index,
    unreadable,
    write_rows,
    write_rows_but_vectors,
)

CHUNK_ROWS = 1 << 16  # that are in memory at the same time while files are written
Rows = Float[np.ndarray, "_ _"]  # some of the table
_TABLE = ("codes.npy", "scales.npy", "residuals.npy", "norms.npy")


class MappedIndex(QuantisedIndex):
    """Index that finds exactly what ``ExactIndex`` finds, from memory-mapped files; needs a CPU and a C++ compiler.

    ``build_streamed`` makes it of a catalogue that is never in memory as a whole. ``build`` and ``upsert`` write into a folder for
    temporary files, which goes when the index goes.
    """

    implementation = "mapped"

    def __init__(self, folder: Path, rows: ItemRows, scratch: "_Scratch | None" = None) -> None:
        check_quantised()
        self._rows, self._scratch = rows, scratch
        self._table = _mapped_table(folder, rows)

    @classmethod
    def build_streamed(cls, chunks: Iterable[Rows], directory: Path) -> "MappedIndex":
        """Write the files of an index into ``directory``, made if missing, and open it.

        Args:
            chunks: the item vectors in order, some rows at a time; the first row of all is padding.
            directory: becomes an index, or another one, only when all is written.

        Raises:
            UserError: there is no item, chunks differ in width, or a value is not finite.
        """
        return cls._written(chunks, directory, None)

    @classmethod
    def build(cls, item_vectors: Vectors) -> "MappedIndex":
        """Index of ``item_vectors``, where row 0 is padding, in temporary files; UserError if a value is not finite."""
        return cls._temporary(_pieces(np.asarray(item_vectors)), None)

    def upsert(self, items: Int[np.ndarray, "n"], vectors: Vectors) -> None:
        """See ``Index.upsert``. Writes all files anew, however few items change: give it many at once."""
        if len(items) == 0:
            return
        present, order = self._rows.present_after(items, np.asarray(vectors, np.float32)), np.argsort(items)
        items, vectors = np.asarray(items)[order], np.asarray(vectors, np.float32)[order]
        changed = self._temporary(_replaced(self._rows.vectors, len(present), items, vectors), present)
        self._rows, self._scratch, self._table = changed._rows, changed._scratch, changed._table

    def save(self, directory: Path) -> None:
        """See ``Index.save``."""
        table = self._table
        with replacing_index(directory) as folder:
            # From the memory that they are mapped to: another index may have replaced the files by now.
            for name, array in zip(_TABLE, (table.codes, table.scales, table.residuals, table.norms), strict=True):
                np.save(folder / name, np.asarray(array))
            write_rows(folder, self.implementation, self._rows)

    @classmethod
    def load(cls, directory: Path) -> "MappedIndex":
        """See ``Index.load``; reads nothing but headers. UserError also where another implementation wrote the folder."""
        implementation, _ = read_meta(directory)
        if implementation != cls.implementation:
            raise UserError(f"{directory} holds an index of implementation {implementation!r}; expected {cls.implementation!r}.")
        return cls(directory, read_rows(directory, mapped=True))

    @classmethod
    def _temporary(cls, chunks: Iterable[Rows], present: Bool[np.ndarray, "i"] | None) -> "MappedIndex":
        scratch = _Scratch()
        index = cls._written(chunks, scratch.folder, present)
        index._scratch = scratch
        return index

    @classmethod
    def _written(cls, chunks: Iterable[Rows], directory: Path, present: Bool[np.ndarray, "i"] | None) -> "MappedIndex":
        check_quantised()
        with replacing_index(directory) as folder:
            files = [_GrowingFile(folder / name) for name in (VECTORS, *_TABLE)]
            try:
                for rows in _whole_blocks(chunks):
                    for file, values in zip(files, (rows, *quantise_rows(rows)), strict=True):
                        file.append(values)
            finally:
                for file in files:
                    file.close()
            if files[0].length < 2:
                raise UserError(f"item vectors have {files[0].length} rows; expected row 0 (padding) and at least one item.")
            if present is None:
                present = np.arange(files[0].length) > 0
            rows = ItemRows(vectors=np.load(folder / VECTORS, mmap_mode="r"), present=present)
            write_rows_but_vectors(folder, cls.implementation, rows)
        return cls(directory, rows)


class _Scratch:
    """A folder that goes when nothing refers to this any more."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cda4rec-index-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _mapped_table(folder: Path, rows: ItemRows) -> QuantisedItems:
    """The files as arrays of JAX that share their pages. UserError if one is missing, or does not fit the vectors."""
    size, width = rows.vectors.shape
    blocks = -(-size // BLOCK)
    shapes = ((blocks, width, BLOCK), *[(blocks * BLOCK,)] * 3)
    arrays: list[np.ndarray] = []
    for name, shape in zip(_TABLE, shapes, strict=True):
        try:
            found = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise unreadable(folder / name, error) from error
        if found.shape != shape:
            raise unreadable(folder / name, f"shape {found.shape}, expected {shape}")
        arrays.append(found)
    items, codes, scales, residuals, norms = (_shared(array) for array in (rows.vectors, *arrays))
    return QuantisedItems(items=items, codes=codes, scales=scales, residuals=residuals, norms=norms)


def _shared(array: np.ndarray) -> Array:
    """The same memory as an array of JAX: a copy would be what this index is there to avoid."""
    return jax.device_put(array, jax.devices("cpu")[0], may_alias=True)


def _pieces(vectors: Float[np.ndarray, "i d"]) -> Iterator[Rows]:
    return (vectors[start : start + CHUNK_ROWS] for start in range(0, len(vectors), CHUNK_ROWS))


def _replaced(
    table: Float[np.ndarray, "i d"], length: int, items: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]
) -> Iterator[Rows]:
    """Pieces of the table with these rows in place of its own, and zeros up to ``length``; ``items`` rise."""
    for start in range(0, length, CHUNK_ROWS):
        piece = table[start : start + CHUNK_ROWS]
        piece = np.pad(piece, ((0, min(CHUNK_ROWS, length - start) - len(piece)), (0, 0)))
        first, last = np.searchsorted(items, (start, start + CHUNK_ROWS))
        piece[items[first:last] - start] = vectors[first:last]
        yield piece


def _whole_blocks(chunks: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows in pieces that fill whole blocks, all but the last; checked."""
    rest: np.ndarray | None = None
    for chunk in chunks:
        rows = np.asarray(chunk, np.float32)
        check_vectors(rows, first=1 if rest is None else 0)
        if rest is not None and rows.shape[1:] != rest.shape[1:]:
            raise UserError(f"item vectors come in widths {rest.shape[1]} and {rows.shape[1]}; expected one.")
        rest = rows if rest is None else np.concatenate([rest, rows])
        whole = len(rest) // BLOCK * BLOCK
        yield np.ascontiguousarray(rest[:whole])
        rest = rest[whole:]
    if rest is not None and len(rest):
        yield np.ascontiguousarray(rest)


class _GrowingFile:
    """A .npy file that is appended to: NumPy leaves room in the header for the length, which is written at the end."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._first: np.ndarray | None = None
        self.length = 0

    def append(self, values: np.ndarray) -> None:
        """Behind all that is there; the first values decide dtype and shape."""
        if self._first is None:
            self._first = values[:0]
            self._write_header()
        self._file.write(values.tobytes())
        self.length += len(values)

    def close(self) -> None:
        """With the length that it has now."""
        if self._first is not None:
            self._file.seek(0)
            self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        assert self._first is not None
        header = {"shape": (self.length, *self._first.shape[1:]), "fortran_order": False, "descr": self._first.dtype.str}
        np.lib.format.write_array_header_1_0(self._file, header)
