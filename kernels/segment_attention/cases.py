"""Shapes that every implementation must agree on, and the workloads that matter."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """``longest`` bounds the tokens of a segment; the last ``padding`` tokens of each row are padding."""

    name: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    head_size: int
    longest: int
    padding: int = 0
    block_size: int | None = None

    def segment_ids(self, seed: int) -> np.ndarray:
        """Segments of random lengths, numbered from 1 along each row, int32 [rows, length]."""
        rng = np.random.default_rng(seed)
        ids = np.zeros((self.rows, self.length), np.int32)
        for row in ids:
            sizes = rng.integers(1, self.longest + 1, self.length)
            row[: self.length - self.padding] = np.repeat(np.arange(self.length) + 1, sizes)[: self.length - self.padding]
        return ids


CONTRACT_CASES = (
    Case(name="one token", rows=1, length=1, heads=1, kv_heads=1, head_size=2, longest=1),
    Case(name="blocks of one token", rows=2, length=7, heads=2, kv_heads=2, head_size=3, longest=4, block_size=1),
    Case(name="whole blocks", rows=3, length=32, heads=2, kv_heads=2, head_size=4, longest=12, block_size=8),
    Case(name="a last block of one token", rows=2, length=33, heads=2, kv_heads=1, head_size=4, longest=20, block_size=16),
    Case(name="blocks of padding", rows=3, length=29, heads=4, kv_heads=2, head_size=2, longest=9, padding=18, block_size=5),
    Case(name="one segment", rows=2, length=24, heads=3, kv_heads=1, head_size=5, longest=99, block_size=7),
    Case(name="whole rows", rows=3, length=21, heads=6, kv_heads=2, head_size=3, longest=8, padding=2),
)

WORKLOAD_CASES = (
    Case(name="amazon-beauty cloud", rows=16, length=64, heads=2, kv_heads=2, head_size=64, longest=20),
    Case(name="amazon-beauty device", rows=16, length=64, heads=2, kv_heads=2, head_size=16, longest=20),
    Case(name="synthetic cloud", rows=64, length=64, heads=2, kv_heads=2, head_size=32, longest=20),
    Case(name="ml-1m cloud", rows=20, length=201, heads=2, kv_heads=2, head_size=64, longest=201),
    Case(name="long rows", rows=2, length=2048, heads=2, kv_heads=2, head_size=64, longest=200),
    Case(name="long segments", rows=2, length=2048, heads=2, kv_heads=2, head_size=64, longest=1_000_000),
)
