"""Candidates and their records, handed to a compiled program as few arrays: each one costs more than a microsecond, whatever its size."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.array_typing import Array, CandidateItems, CandidateScores
from cda4rec_jax.messages import Candidates, Evidence

Joined = tuple[Array, ...]  # flat, of unsigned integers, one for each size of a number


class Column(NamedTuple):
    """Numbers that every candidate has."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]  # of one candidate


_OWN = (Column("items", np.dtype(np.int32), ()), Column("scores", np.dtype(np.float32), ()))


@dataclass(frozen=True)
class Handover:
    """Joins what final ranking reads of one request's candidates on the host, and parts it inside of a program.

    Attributes:
        records: dtypes and widths of a candidate's records.
    """

    records: tuple[Column, ...]

    @classmethod
    def of(cls, evidence: Evidence) -> "Handover":
        """For requests whose records are like the ``evidence`` of any items, NumPy."""
        rows = {each.name: getattr(evidence, each.name) for each in fields(Evidence)}
        return cls(tuple(Column(name, each.dtype, each.shape[1:]) for name, each in rows.items()))

    @cached_property
    def _whole(self) -> list[list[Column]]:
        return _by_size([*_OWN, *self.records])

    @cached_property
    def _least(self) -> list[list[Column]]:
        return _by_size([*_OWN, *(column for column in self.records if column.name == "log_popularity")])

    def join(self, items: CandidateItems, scores: CandidateScores, evidence: Evidence, *, whole: bool) -> Joined:
        """One user's candidates (leading axes [1, c]) with all their records, or, if not ``whole``, with their popularity alone."""
        own, joined = {"items": items, "scores": scores}, []
        for columns in self._whole if whole else self._least:
            values = ((own[name] if name in own else getattr(evidence, name), dtype) for name, dtype, _ in columns)
            # NumPy takes several times as long to concatenate so small arrays.
            flat = b"".join([np.ascontiguousarray(rows, dtype).data for rows, dtype in values])
            joined.append(np.frombuffer(flat, f"u{columns[0].dtype.itemsize}"))
        return tuple(joined)

    def part(self, joined: Joined, *, whole: bool) -> tuple[Candidates, Evidence]:
        """What ``join`` was given; traceable. Records that it left out are empty, and so is the place of item 0, which has no score.

        An approximate index marks an empty place by a score of -inf, which no feature could hold.
        """
        found: dict[str, Any] = {name: jnp.zeros(0, dtype) for name, dtype, _ in self.records}
        for flat, columns in zip(joined, self._whole if whole else self._least, strict=True):
            rows, start = flat.shape[0] // sum(prod(column.shape) for column in columns), 0
            for name, dtype, shape in columns:
                end = start + rows * prod(shape)
                found[name] = jax.lax.bitcast_convert_type(flat[start:end], dtype).reshape(1, rows, *shape)
                start = end
        items, scores = found.pop("items"), found.pop("scores")
        candidates = Candidates.retrieved(items, jnp.where(items > 0, scores, 0.0))
        return replace(candidates, present=(items > 0).astype(jnp.float32)), Evidence(**found)


def _by_size(columns: Sequence[Column]) -> list[list[Column]]:
    def size(column: Column) -> int:
        return column.dtype.itemsize

    return [list(group) for _, group in groupby(sorted(columns, key=size), key=size)]
