"""Approximate search by faiss, to be timed against. Needs the extra ``bench``."""

from collections.abc import Callable, Mapping
from functools import partial

import faiss  # pyright: ignore[reportMissingImports]
import numpy as np

PROBES = (4, 8, 16, 32, 64, 128)
BEAMS = (100, 200, 400, 800)  # of HNSW: how many neighbours a search keeps
NEIGHBOURS, BUILD_BEAM = 16, 200


def ivf(items: np.ndarray, k: int, threads: int) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    """Inverted lists of whole vectors, 4 times the root of the catalogue; row 0 of ``items`` is padding, and results are item indices."""
    faiss.omp_set_num_threads(threads)
    num_lists = max(1, min(round(4 * len(items) ** 0.5), len(items) // 40))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(items.shape[1]), items.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT)
    index.train(items[1:])
    index.add(items[1:])
    return {
        f"{num_lists} lists, {probes} searched": partial(_search, index, k, faiss.SearchParametersIVF(nprobe=probes))
        for probes in PROBES
        if probes < num_lists
    }


def hnsw(items: np.ndarray, k: int, threads: int) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    """Its graph; as ``ivf``."""
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWFlat(items.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_BEAM
    index.add(items[1:])
    return {
        f"M {NEIGHBOURS}, ef {beam}": partial(_search, index, k, faiss.SearchParametersHNSW(efSearch=beam))
        for beam in sorted({max(k, beam) for beam in BEAMS})
    }


def _search(index, k: int, parameters, queries: np.ndarray) -> np.ndarray:
    return 1 + index.search(queries, k, params=parameters)[1]
