"""Shapes that every implementation must agree on, and the workloads that matter."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """``num_rows`` counts the padding row."""

    name: str
    num_rows: int
    queries: int
    width: int
    k: int
    chunk_size: int = 16384
    dtype: str = "float32"  # of items and queries, in workloads


CONTRACT_CASES = (
    Case(name="one item", num_rows=2, queries=1, width=1, k=1),
    Case(name="all items", num_rows=50, queries=3, width=7, k=49, chunk_size=16),
    Case(name="whole chunks", num_rows=64, queries=9, width=8, k=5, chunk_size=16),
    Case(name="a last chunk of one item", num_rows=65, queries=2, width=8, k=20, chunk_size=16),
    Case(name="chunks of one item", num_rows=9, queries=2, width=2, k=3, chunk_size=1),
    Case(name="a threshold, odd everything", num_rows=1501, queries=67, width=13, k=11, chunk_size=601),
    Case(name="one query over parts of the items", num_rows=5003, queries=1, width=4, k=100),
    Case(name="more items wanted than a tile holds", num_rows=3001, queries=17, width=5, k=1200),
)

WORKLOAD_CASES = (
    Case(name="amazon-beauty, a batch", num_rows=12_102, queries=256, width=64, k=100),
    Case(name="amazon-beauty, training", num_rows=12_102, queries=512, width=128, k=500),
    Case(name="amazon-beauty, one query", num_rows=12_102, queries=1, width=64, k=100),
    Case(name="a million items, one query", num_rows=1_000_001, queries=1, width=64, k=100),
    Case(name="a million items, a batch", num_rows=1_000_001, queries=16, width=64, k=100),
)

ACCELERATOR_CASES = (
    Case(name="a million items, one query", num_rows=1_000_001, queries=1, width=128, k=100, dtype="bfloat16"),
    Case(name="a million items, a batch", num_rows=1_000_001, queries=256, width=128, k=100, dtype="bfloat16"),
    Case(name="amazon-beauty, a batch", num_rows=12_102, queries=256, width=64, k=100),
)
