"""Benchmarks that a command runs, a module for each; ``harness`` is what they share (the method is ``cda4rec_jax.timing``).

``peers`` holds the systems of others, which only the extra ``bench`` installs.
"""

from cda4rec_jax.bench.dispatch import DispatchBenchmark, bench_dispatch
from cda4rec_jax.bench.kernels import KernelsBenchmark, bench_kernels
from cda4rec_jax.bench.plan import PlanBenchmark, bench_plan
from cda4rec_jax.bench.rank import RankBenchmark, bench_rank
from cda4rec_jax.bench.request import RequestBenchmark, bench_request
from cda4rec_jax.bench.retrieval import RetrievalBenchmark, bench_retrieval
from cda4rec_jax.bench.train import TrainBenchmark, bench_train
from cda4rec_jax.bench.train_accelerator import ACCELERATOR_PRESETS, bench_accelerator, lower_step

__all__ = [
    "ACCELERATOR_PRESETS",
    "DispatchBenchmark",
    "KernelsBenchmark",
    "PlanBenchmark",
    "RankBenchmark",
    "RequestBenchmark",
    "RetrievalBenchmark",
    "TrainBenchmark",
    "bench_accelerator",
    "bench_dispatch",
    "bench_kernels",
    "bench_plan",
    "bench_rank",
    "bench_request",
    "bench_retrieval",
    "bench_train",
    "lower_step",
]
