"""Approximate search by hnswlib, to be timed against. Needs the extra ``bench``."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import hnswlib  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
import numpy as np

BEAMS = (100, 150, 200, 300, 400, 600, 800)
NEIGHBOURS, BUILD_BEAM = 16, 200


def hnsw(items: np.ndarray, k: int, threads: int) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    """Its graph by inner products; row 0 of ``items`` is padding, and results are item indices."""
    return _searches(_graph("ip", items[1:], threads), k, lambda queries: queries)


def hnsw_euclidean(items: np.ndarray, k: int, threads: int) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    """The same by distances: a coordinate that gives all items one length makes the nearest item that of the largest inner product.

    See Bachrach et al. (2014). Where lengths differ a lot, as in trained item tables, a graph of distances is found through better.
    """
    lengths = np.square(items[1:]).sum(axis=1, keepdims=True)
    longer = np.concatenate([items[1:], np.sqrt(lengths.max() - lengths)], axis=1, dtype=np.float32)
    return _searches(_graph("l2", longer, threads), k, lambda queries: np.pad(queries, ((0, 0), (0, 1))))


def _graph(space: Literal["ip", "l2"], items: np.ndarray, threads: int):
    index = hnswlib.Index(space=space, dim=items.shape[1])
    index.init_index(max_elements=len(items), M=NEIGHBOURS, ef_construction=BUILD_BEAM)
    index.set_num_threads(threads)
    index.add_items(items)
    return index


def _searches(index, k: int, asked: Callable[[np.ndarray], np.ndarray]) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    beams = sorted({max(k, beam) for beam in BEAMS})
    return {f"M {NEIGHBOURS}, ef {beam}": partial(_search, index, k, asked, beam) for beam in beams}


def _search(index, k: int, asked: Callable[[np.ndarray], np.ndarray], beam: int, queries: np.ndarray) -> np.ndarray:
    index.set_ef(beam)  # settings take turns on one graph
    return 1 + index.knn_query(asked(queries), k)[0].astype(np.int64)
