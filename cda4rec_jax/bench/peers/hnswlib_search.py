"""Approximate search by hnswlib, to be timed against. Needs the extra ``bench``."""

from collections.abc import Callable, Mapping
from functools import partial

import hnswlib  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
import numpy as np

BEAMS = (100, 150, 200, 300, 400, 600, 800)
NEIGHBOURS, BUILD_BEAM = 16, 200


def hnsw(items: np.ndarray, k: int, threads: int) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    """Its graph; row 0 of ``items`` is padding, and results are item indices."""
    index = hnswlib.Index(space="ip", dim=items.shape[1])
    index.init_index(max_elements=len(items) - 1, M=NEIGHBOURS, ef_construction=BUILD_BEAM)
    index.set_num_threads(threads)
    index.add_items(items[1:])
    return {f"M {NEIGHBOURS}, ef {beam}": partial(_search, index, k, beam) for beam in sorted({max(k, beam) for beam in BEAMS})}


def _search(index, k: int, beam: int, queries: np.ndarray) -> np.ndarray:
    index.set_ef(beam)  # settings take turns on one graph
    return 1 + index.knn_query(queries, k)[0].astype(np.int64)
