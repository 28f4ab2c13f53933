"""The same training events as packed rows and as padded rows.

A segment is a stretch of one user's events, with its prefix token; ``data.packing`` puts several into a row. Here each can also get a row
of its own, padded to the longest: what is usual elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from cda4rec_jax.array_typing import Array
from cda4rec_jax.messages import SequenceBatch


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One user's stretch: a prefix token and item tokens, and the target of each."""

    item_indices: Int[np.ndarray, "tokens"]  # 0 at the prefix token, which comes first
    targets: Int[np.ndarray, "tokens"]
    prefix: Float[np.ndarray, "f"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class GatheredBatch:
    """Rows, and where in them the real tokens are, so that a loss need not be computed at padding."""

    rows: SequenceBatch
    positions: Int[Array, "real"]  # in the flattened rows; padded with 0
    targets: Int[Array, "real"]  # of these positions; 0 where `positions` is padded


def num_real_tokens(batch: SequenceBatch) -> int:
    """Tokens with a target: the unit in which all layouts are compared."""
    return int(np.count_nonzero(np.asarray(batch.targets)))


def segments_of(batch: SequenceBatch) -> list[Segment]:
    """The segments of packed rows, row by row."""
    found = []
    for row, ids in enumerate(batch.segment_ids):
        for segment in range(1, int(ids.max(initial=0)) + 1):
            tokens = np.flatnonzero(ids == segment)
            prefix = batch.prefixes[batch.prefix_rows[row, tokens[0]]]
            found.append(Segment(item_indices=batch.item_indices[row, tokens], targets=batch.targets[row, tokens], prefix=prefix))
    return found


def packed_rows(rows: Sequence[Sequence[Segment]], row_tokens: int) -> SequenceBatch:
    """Segments one after the other in each row, which is padded at the end to ``row_tokens``."""
    names = ("item_indices", "segment_ids", "positions", "targets", "prefix_rows")
    arrays = {name: np.zeros((len(rows), row_tokens), np.int32) for name in names}
    prefixes = [np.zeros_like(rows[0][0].prefix)]
    for row, segments in enumerate(rows):
        first = 0
        for number, segment in enumerate(segments, start=1):
            place = slice(first, first + len(segment.targets))
            arrays["item_indices"][row, place] = segment.item_indices
            arrays["targets"][row, place] = segment.targets
            arrays["segment_ids"][row, place] = number
            arrays["positions"][row, place] = np.arange(len(segment.targets))
            arrays["prefix_rows"][row, first] = len(prefixes)
            prefixes.append(segment.prefix)
            first = place.stop
    return SequenceBatch(prefixes=np.stack(prefixes), **arrays)


def padded_rows(segments: Sequence[Segment], length: int) -> SequenceBatch:
    """One row for each segment, padded at the end to ``length`` tokens."""
    return packed_rows([[segment] for segment in segments], length)


def gathered(rows: SequenceBatch, capacity: int | None = None) -> GatheredBatch:
    """With the places of the real tokens, in an array of ``capacity`` (None: as many as there are).

    Raises:
        ValueError: there are more real tokens than ``capacity``.
    """
    flat = np.asarray(rows.targets).reshape(-1)
    real = np.flatnonzero(flat).astype(np.int32)
    missing = 0 if capacity is None else capacity - len(real)
    if missing < 0:
        raise ValueError(f"{len(real)} real tokens do not fit into {capacity}")
    targets = np.pad(flat[real], (0, missing))
    return GatheredBatch(rows=rows, positions=np.pad(real, (0, missing)), targets=targets)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches that all systems train on: equally many segments and, on average, real tokens in every layout."""

    packed: tuple[SequenceBatch, ...]
    padded: tuple[GatheredBatch, ...]
    length: int  # tokens of a padded row

    @property
    def packed_fill(self) -> float:
        """Share of the packed tokens that is real."""
        return sum(map(num_real_tokens, self.packed)) / sum(batch.targets.size for batch in self.packed)

    @property
    def padded_fill(self) -> float:
        """Share of the padded tokens that is real."""
        return sum(num_real_tokens(batch.rows) for batch in self.padded) / sum(batch.rows.targets.size for batch in self.padded)


def both_layouts(packed: Sequence[SequenceBatch], length: int) -> Batches:
    """Packed batches, and their segments again in padded batches, whose number of rows is the mean number of segments.

    All batches of a layout have one shape: the segments are dealt out anew, and a rest that fills no batch is left out.

    Args:
        packed: NumPy arrays.
        length: tokens of a padded row, the longest segment there can be.
    """
    segments = [segment for batch in packed for segment in segments_of(batch)]
    rows = len(segments) // len(packed)
    padded = [padded_rows(segments[first : first + rows], length) for first in range(0, rows * len(packed), rows)]
    capacity = max(num_real_tokens(batch) for batch in padded)
    return Batches(packed=tuple(packed), padded=tuple(gathered(batch, capacity) for batch in padded), length=length)
