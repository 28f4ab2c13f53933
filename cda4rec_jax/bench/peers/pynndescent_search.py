"""Approximate search by pynndescent, to be timed against. Needs the extra ``bench``."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pynndescent  # pyright: ignore[reportMissingImports]

EPSILONS = (0.0, 0.1, 0.2, 0.3)
NEIGHBOURS = 30


def descent(items: np.ndarray, k: int, threads: int) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    """Its graph; row 0 of ``items`` is padding, and results are item indices.

    Its graph is one of a metric, which the inner product is not: one more coordinate gives all items the same norm, and the angle then
    orders them as the inner product does (Bachrach et al., 2014).
    """
    squared = np.sum(items[1:] ** 2, axis=1, keepdims=True)
    rows = np.concatenate([items[1:], np.sqrt(squared.max() - squared)], axis=1).astype(np.float32)
    index = pynndescent.NNDescent(rows, metric="cosine", n_neighbors=NEIGHBOURS, n_jobs=threads, random_state=0)
    index.prepare()
    return {f"{NEIGHBOURS} neighbours, epsilon {epsilon}": partial(_search, index, k, epsilon) for epsilon in EPSILONS}


def _search(index, k: int, epsilon: float, queries: np.ndarray) -> np.ndarray:
    return 1 + index.query(np.pad(queries, ((0, 0), (0, 1))), k=k, epsilon=epsilon)[0]
