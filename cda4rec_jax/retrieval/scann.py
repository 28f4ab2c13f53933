"""Approximate search on the host CPU by ScaNN (Guo et al., 2020, anisotropic vector quantisation)."""

import contextlib
import importlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval.index import (
    Found,
    Queries,
    Vectors,
    check_search,
    check_vectors,
    read_implementation,
    read_vectors,
    write_common,
)

_FILES = "scann"
_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class ScannConfig:
    """How ScaNN trades recall for time.

    The defaults keep recall@100 above .95 at 64 dimensions: always below ``tree_items`` items, above it on vectors with cluster
    structure, as trained item tables have. Vectors without any (independent normal numbers) need ``leaf_share`` near 1.
    """

    brute_force_items: int = 1000  # up to so many items ScaNN scores all exactly: quantisation saves nothing
    tree_items: int = 16384  # up to so many items all are scored by quantised vectors, without a partition
    leaf_share: float = 0.25  # share of the partition searched
    reorder_factor: int = 6  # exactly rescored items for each one that is asked for
    min_reorder: int = 256
    quantisation_threshold: float = 0.2  # of anisotropic quantisation, as the authors recommend


class ScannIndex:
    """ScaNN index. Two builds of the same vectors may differ in the last items found; a saved index does not change."""

    implementation = "scann"

    def __init__(self, vectors: Float[np.ndarray, "i d"], searcher: Any, config: ScannConfig) -> None:
        self._vectors = vectors
        self._searcher = searcher
        self._config = config

    @classmethod
    def build(cls, item_vectors: Vectors, config: ScannConfig | None = None) -> "ScannIndex":
        """Index of ``item_vectors``, where row 0 is padding.

        Raises:
          UserError: ScaNN is not installed, there is no item, or a value is not finite.
        """
        config = config or ScannConfig()
        vectors = check_vectors(item_vectors)
        items = vectors[1:]
        num_items = items.shape[0]
        builder = _scann_ops().builder(items, min(100, num_items), "dot_product")
        if num_items <= config.brute_force_items:
            return cls(vectors, _built(builder.score_brute_force()), config)
        if num_items > config.tree_items:
            num_leaves = math.isqrt(num_items)
            builder = builder.tree(num_leaves, max(1, round(num_leaves * config.leaf_share)), training_sample_size=num_items)
        builder = builder.score_ah(2, anisotropic_quantization_threshold=config.quantisation_threshold)
        return cls(vectors, _built(builder.reorder(min(config.min_reorder, num_items))), config)

    @property
    def num_items(self) -> int:
        return self._vectors.shape[0] - 1

    def search(self, queries: Queries, k: int) -> Found:
        """See ``Index.search``. Rows are shorter than ``k`` only where the searched part of the partition holds fewer items."""
        check_search(queries, k, self.num_items, self._vectors.shape[1])
        rows = np.ascontiguousarray(queries, np.float32)
        reorder = min(self.num_items, max(self._config.min_reorder, self._config.reorder_factor * k))
        options = {"final_num_neighbors": k}
        if self.num_items > self._config.brute_force_items:
            options["pre_reorder_num_neighbors"] = reorder
        if rows.shape[0] == 0:
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        if rows.shape[0] == 1:
            positions, scores = self._searcher.search(rows[0], **options)
            return _padded(positions[None], scores[None], k)
        positions, scores = self._searcher.search_batched_parallel(rows, **options)
        return _padded(positions, scores, k)

    def save(self, directory: Path) -> None:
        """See ``Index.save``."""
        write_common(directory, self.implementation, self._vectors)
        (directory / _FILES).mkdir(exist_ok=True)
        (directory / _FILES / _CONFIG).write_text(json.dumps(asdict(self._config), indent=2) + "\n")
        self._searcher.serialize(str(directory / _FILES), relative_path=True)

    @classmethod
    def load(cls, directory: Path) -> "ScannIndex":
        """See ``Index.load``; UserError where ScaNN is not installed, or the folder was written by another implementation."""
        implementation = read_implementation(directory)
        if implementation != cls.implementation:
            raise UserError(f"{directory} holds an index of implementation {implementation!r}; expected 'scann'.")
        scann_ops = _scann_ops()
        try:
            config = ScannConfig(**json.loads((directory / _FILES / _CONFIG).read_text()))
            searcher = scann_ops.load_searcher(str(directory / _FILES))
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{directory / _FILES} is missing or damaged ({error}). Build the index again.") from error
        return cls(read_vectors(directory), searcher, config)


def _scann_ops() -> Any:
    """The module of ScaNN that needs no TensorFlow."""
    try:
        return importlib.import_module("scann").scann_ops_pybind
    except ImportError as error:
        raise UserError(
            f"ScaNN cannot be imported here ({error}); it exists for Linux with Python below 3.14. Use the exact index: "
            "implementation='exact', which also loads a folder that ScaNN wrote."
        ) from error


def _built(builder: Any) -> Any:
    with _silent_native_code():
        return builder.build()


@contextlib.contextmanager
def _silent_native_code() -> Iterator[None]:
    """ScaNN's C++ writes log lines straight to file descriptor 2 and has no switch for them; its errors come as exceptions."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _padded(positions: Integer[np.ndarray, "b n"], scores: Float[np.ndarray, "b n"], k: int) -> Found:
    """ScaNN's 0-based positions as item indices, padded to ``k`` columns; NaN scores mark positions that it could not fill."""
    items = np.zeros((positions.shape[0], k), np.int32)
    padded_scores = np.full((positions.shape[0], k), -np.inf, np.float32)
    filled = np.isfinite(scores)
    num_found = positions.shape[1]
    items[:, :num_found] = np.where(filled, positions.astype(np.int32) + 1, 0)
    padded_scores[:, :num_found] = np.where(filled, scores, -np.inf)
    return items, padded_scores
