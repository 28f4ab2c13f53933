"""Interactions: reading, validating, thinning, splitting, preparing."""

from cda4rec_jax.data.interactions import Finding, Interactions, before_last, k_core
from cda4rec_jax.data.prepare import PrepareReport, prepare, write_prepared
from cda4rec_jax.data.prepared import load_prepared
from cda4rec_jax.data.sources import read_interactions, read_source
from cda4rec_jax.data.splits import Split, prefix_lengths, targets, train_histories, train_lengths

__all__ = [
    "Finding",
    "Interactions",
    "PrepareReport",
    "Split",
    "before_last",
    "k_core",
    "load_prepared",
    "prefix_lengths",
    "prepare",
    "read_interactions",
    "read_source",
    "targets",
    "train_histories",
    "train_lengths",
    "write_prepared",
]
