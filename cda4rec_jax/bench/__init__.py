"""Benchmarks that a command runs: ``harness`` is what they share (the method is ``cda4rec_jax.timing``), ``train`` the first of them.

``peers`` holds the systems of others, which only the extra ``bench`` installs.
"""

from cda4rec_jax.bench.train import TrainBenchmark, bench_train
from cda4rec_jax.bench.train_accelerator import ACCELERATOR_PRESETS, bench_accelerator, lower_step

__all__ = ["ACCELERATOR_PRESETS", "TrainBenchmark", "bench_accelerator", "bench_train", "lower_step"]
