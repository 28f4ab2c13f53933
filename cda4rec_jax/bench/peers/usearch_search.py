"""Approximate search by usearch, to be timed against. Needs the extra ``bench``."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import usearch.index  # pyright: ignore[reportMissingImports]

BEAMS = (100, 200, 400, 800)
NEIGHBOURS, BUILD_BEAM = 16, 200


def hnsw(items: np.ndarray, k: int, threads: int) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    """Its graph; row 0 of ``items`` is padding, and results are item indices."""
    index = usearch.index.Index(ndim=items.shape[1], metric="ip", dtype="f32", connectivity=NEIGHBOURS, expansion_add=BUILD_BEAM)
    index.add(np.arange(1, len(items)), items[1:], threads=threads)
    return {
        f"M {NEIGHBOURS}, ef {beam}": partial(_search, index, k, beam, threads)
        for beam in sorted({max(k, beam) for beam in BEAMS})
    }


def _search(index, k: int, beam: int, threads: int, queries: np.ndarray) -> np.ndarray:
    index.expansion_search = beam  # settings take turns on one graph
    keys = index.search(queries if len(queries) > 1 else queries[0], k, threads=threads).keys
    return keys.reshape(len(queries), -1).astype(np.int64)
