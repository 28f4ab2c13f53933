"""Shapes that every implementation must agree on, and the workloads that matter."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """``num_items`` counts the padding row."""

    name: str
    tokens: int
    num_items: int
    width: int
    chunk_size: int = 256
    dtype: str = "float32"  # of the hidden states, in workloads


CONTRACT_CASES = (
    Case(name="one token", tokens=1, num_items=5, width=3),
    Case(name="one item", tokens=7, num_items=2, width=4, chunk_size=3),
    Case(name="whole chunks", tokens=32, num_items=17, width=8, chunk_size=8),
    Case(name="a last chunk of one token", tokens=33, num_items=50, width=8, chunk_size=16),
    Case(name="odd everything", tokens=131, num_items=101, width=13, chunk_size=37),
    Case(name="chunks of one token", tokens=5, num_items=9, width=2, chunk_size=1),
    Case(name="fewer tokens than a chunk", tokens=20, num_items=300, width=16),
)

WORKLOAD_CASES = (
    Case(name="amazon-beauty step", tokens=1024, num_items=12_102, width=128),
    Case(name="ml-1m step", tokens=4096, num_items=3_417, width=64),
)

ACCELERATOR_CASES = (
    Case(name="a hundred thousand items", tokens=8192, num_items=131_072, width=128, dtype="bfloat16"),
    Case(name="a million items", tokens=8192, num_items=1_000_000, width=128, dtype="bfloat16"),
)
