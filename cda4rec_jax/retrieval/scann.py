"""Approximate search on the host CPU by ScaNN (Guo et al., 2020, anisotropic vector quantisation)."""

import contextlib
import copy
import importlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval.exact import ExactIndex
from cda4rec_jax.retrieval.index import Found, Queries, Vectors, check_config, checked_queries
from cda4rec_jax.retrieval.rows import ItemRows, read_meta, read_rows, replacing_index, unreadable, write_rows
from cda4rec_jax.timing import usable_cores

_FILES = "scann"
_CONFIG = "config.json"
ScannCall = Callable[[Float[np.ndarray, "..."]], tuple[np.ndarray, np.ndarray]]
_PIECES = 2  # of a batch for each thread, so that a thread which is held up leaves its second one to others


def scann_available() -> bool:
    """Whether ScaNN is installed."""
    return importlib.util.find_spec("scann") is not None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the tuner found of a config, on the index that it built: another build of the same config is a little different."""

    num_items: int
    num_queries: int  # on which recall was taken: those that confirmed the choice, see ``tuning.tune_search``
    k: int
    recall: float  # mean share of the exact k items that were found; a little too high, as what fell short there was not chosen
    batch: int
    batch_ms: float
    single_ms: float  # of one query alone
    threads: int


@dataclass(frozen=True, kw_only=True)
class ScannConfig:
    """How ScaNN trades recall for time.

    The defaults keep recall@100 above .95 at 64 dimensions: always below ``tree_items`` items, above it on vectors with cluster
    structure, as trained item tables have. Vectors without any (independent normal numbers) need ``leaf_share`` near 1. ``tune_scann``
    finds what vectors of one's own need.
    """

    brute_force_items: int = 1000  # up to so many items ScaNN scores all exactly: quantisation saves nothing
    tree_items: int = 16384  # up to so many items all are scored by quantised vectors, without a partition
    leaves_per_root: float = 1.0  # leaves of the partition, for each one of the square root of the number of items
    soar_lambda: float | None = None  # items are in two leaves each, by SOAR with this weight (Sun et al., 2023; they advise 1.5)
    autopilot: bool = False  # ScaNN chooses its partition itself, above brute_force_items
    quantisation_threshold: float = 0.2  # of anisotropic quantisation, as the authors recommend
    leaf_share: float = 0.25  # share of the partition searched
    reorder_factor: float = 6.0  # exactly rescored items for each one that is asked for
    min_reorder: int = 256
    oversampling: int = 2  # items asked of ScaNN for each one that is wanted where a filter may take some away
    rebuild_share: float = 0.1  # of all rows: when more were upserted since the last build, upsert builds again
    threads: int | None = None  # that build, and search batches; None: the cores that this process may use. One query takes one
    measured: Measured | None = None  # by the tuner, if this config is its choice

    def __post_init__(self):
        limits = (
            ("brute_force_items", self.brute_force_items >= 0, "at least 0"),
            ("tree_items", self.tree_items >= 0, "at least 0"),
            ("leaves_per_root", self.leaves_per_root > 0, "above 0"),
            ("soar_lambda", self.soar_lambda is None or self.soar_lambda > 0, "above 0, or None for one leaf each"),
            ("quantisation_threshold", 0 < self.quantisation_threshold < 1, "between 0 and 1"),
            ("leaf_share", 0 < self.leaf_share <= 1, "above 0 and at most 1"),
            ("reorder_factor", self.reorder_factor >= 1, "at least 1"),
            ("min_reorder", self.min_reorder >= 1, "at least 1"),
            ("oversampling", self.oversampling >= 1, "at least 1"),
            ("rebuild_share", self.rebuild_share >= 0, "at least 0"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1, or None for the cores of this process"),
        )
        check_config(self, limits)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> "ScannConfig":
        """From what ``dataclasses.asdict`` made. Raises TypeError where the fields are others, UserError on a value."""
        measured = values.get("measured")
        values = {name: value for name, value in values.items() if name != "measured"}
        if "reorder_factor" in values:
            values["reorder_factor"] = float(values["reorder_factor"])  # earlier versions wrote a whole number
        config = cls(**values)
        return config if measured is None else replace(config, measured=Measured(**measured))


class ScannIndex:
    """ScaNN index. Two builds of the same vectors may differ in the last items found; a saved index does not change.

    Filters act on more items than are asked for. A query that has fewer than ``k`` left is searched exactly among the items that the
    filters allow, so a filtered search finds ``k`` items wherever there are so many. Items upserted since the last build are scored
    exactly beside ScaNN's, which knows their old vectors only.
    """

    implementation = "scann"

    def __init__(self, rows: ItemRows, searcher: Any, config: ScannConfig) -> None:
        self._config, self._threads = config, config.threads or usable_cores()
        self._adopt(rows, searcher)

    @classmethod
    def build(cls, item_vectors: Vectors, config: ScannConfig | None = None) -> "ScannIndex":
        """Index of ``item_vectors``, where row 0 is padding.

        Raises:
          UserError: ScaNN is not installed, there is no item, or a value is not finite.
        """
        config, rows = config or ScannConfig(), ItemRows.of(item_vectors)
        return cls(rows, _searcher(rows.vectors[1:], config), config)

    @property
    def num_items(self) -> int:
        return self._rows.num_items

    @property
    def config(self) -> ScannConfig:
        """What it was built with, and is searched with."""
        return self._config

    @property
    def threads(self) -> int:
        """Threads that search a batch."""
        return self._threads

    @property
    def num_leaves(self) -> int:
        """Of the partition; 0 where there is none."""
        return self._num_leaves

    @property
    def reorders(self) -> bool:
        """Whether quantised vectors choose the items that are scored exactly; otherwise all are."""
        return self._reorders

    def searched_with(self, config: ScannConfig) -> "ScannIndex":
        """The same build and threads, searched with the ``leaf_share``, ``reorder_factor`` and ``min_reorder`` of another config."""
        other = copy.copy(self)
        other._config, other._calls = replace(config, threads=self._config.threads), {}
        return other

    def search(
        self,
        queries: Queries,
        k: int,
        *,
        allowed: Bool[np.ndarray, "i"] | None = None,
        excluded: Int[np.ndarray, "b s"] | None = None,
    ) -> Found:
        """See ``Index.search``. Without filters, rows are shorter than ``k`` only where the searched leaves hold fewer items."""
        rows = checked_queries(queries, k, self._rows, allowed, excluded)
        if rows.shape[0] == 0:
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        if self._rows.usable(allowed) is None and excluded is None and self._changed.size == 0:
            return self._search_built(rows, k)
        if excluded is None:
            excluded = np.zeros((rows.shape[0], 0), np.int32)
        usable = self._rows.present if allowed is None else self._rows.present & allowed
        items, scores = self._search_filtered(rows, k, usable, excluded)
        short = scores[:, -1] == -np.inf
        if short.any():
            if self._exact is None:
                self._exact = ExactIndex(self._rows)
            items[short], scores[short] = self._exact.search(rows[short], k, allowed=usable, excluded=excluded[short])
        return items, scores

    def upsert(self, items: Int[np.ndarray, "n"], vectors: Vectors) -> None:
        """See ``Index.upsert``. Builds again when more than ``rebuild_share`` of the rows have changed since the last build."""
        rows = self._rows.upserted(items, vectors)
        changed = np.union1d(self._changed, np.asarray(items))
        if len(changed) > self._config.rebuild_share * rows.vectors.shape[0]:
            self._adopt(rows, _searcher(rows.vectors[1:], self._config))
        else:
            self._rows, self._changed, self._exact = rows, changed, None

    def delete(self, items: Int[np.ndarray, "n"]) -> None:
        """See ``Index.delete``."""
        self._rows, self._exact = self._rows.without(items), None

    def save(self, directory: Path) -> None:
        """See ``Index.save``. Builds again first where items were upserted since the last build."""
        if self._changed.size:
            self._adopt(self._rows, _searcher(self._rows.vectors[1:], self._config))
        with replacing_index(directory) as folder:
            write_rows(folder, self.implementation, self._rows)
            (folder / _FILES).mkdir()
            (folder / _FILES / _CONFIG).write_text(json.dumps(asdict(self._config), indent=2) + "\n")
            self._searcher.serialize(str(folder / _FILES), relative_path=True)

    @classmethod
    def load(cls, directory: Path) -> "ScannIndex":
        """See ``Index.load``; UserError where ScaNN is not installed, or the folder was written by another implementation."""
        implementation, _ = read_meta(directory)
        if implementation != cls.implementation:
            raise UserError(f"{directory} holds an index of implementation {implementation!r}; expected 'scann'.")
        scann_ops = _scann_ops()
        try:
            config = ScannConfig.of_json(json.loads((directory / _FILES / _CONFIG).read_text()))
            searcher = scann_ops.load_searcher(str(directory / _FILES))
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise unreadable(directory / _FILES, error) from error
        rows = read_rows(directory)
        if searcher.size() != len(rows.vectors) - 1:
            raise unreadable(directory / _FILES, f"built from {searcher.size()} items, expected {len(rows.vectors) - 1}")
        return cls(rows, searcher, config)

    def _adopt(self, rows: ItemRows, searcher: Any) -> None:
        """Rows that the searcher was built from."""
        self._rows, self._searcher = rows, searcher
        self._num_built = rows.vectors.shape[0] - 1
        built = searcher.config()
        leaves = re.search(r"num_children: (\d+)", built)
        self._num_leaves, self._reorders = int(leaves.group(1)) if leaves else 0, "exact_reordering" in built
        if self._threads > 1:
            searcher.set_num_threads(self._threads - 1)  # beside the thread that asks
        self._calls: dict[tuple[int, int], ScannCall] = {}  # by batch and k: making one takes longer than the call itself adds
        self._changed = np.zeros(0, np.int64)  # items upserted since then
        self._exact: ExactIndex | None = None

    def scann_call(self, batch: int, k: int) -> ScannCall:
        """ScaNN's own search as ``search`` makes it: from [d] for one query, else from [b, d], to 0-based positions and scores."""
        call = self._calls.get((batch, k))
        if call is None:
            call = self._calls[batch, k] = self._new_call(batch, k)
        return call

    def _new_call(self, batch: int, k: int) -> ScannCall:
        options: dict[str, int] = {"final_num_neighbors": k}
        if self._reorders:
            wanted = max(self._config.min_reorder, round(self._config.reorder_factor * k))
            options["pre_reorder_num_neighbors"] = min(self._num_built, wanted)
        if self._num_leaves:
            options["leaves_to_search"] = max(1, round(self._config.leaf_share * self._num_leaves))
        if batch == 1:
            return partial(self._searcher.search, **options)
        if self._threads == 1:
            return partial(self._searcher.search_batched, **options)
        options["batch_size"] = -(-batch // (_PIECES * self._threads))
        return partial(self._searcher.search_batched_parallel, **options)

    def _search_built(self, rows: Float[np.ndarray, "b d"], k: int) -> Found:
        """What ScaNN finds among the vectors that it was built from."""
        call = self.scann_call(rows.shape[0], k)
        if rows.shape[0] == 1:
            positions, scores = call(rows[0])
            return _padded(positions[None], scores[None], k)
        return _padded(*call(rows), k)

    def _search_filtered(
        self, rows: Float[np.ndarray, "b d"], k: int, usable: Bool[np.ndarray, "i"], excluded: Int[np.ndarray, "b s"]
    ) -> Found:
        """The best usable items among what ScaNN finds and what has changed; -inf where fewer than ``k`` are left."""
        found, found_scores = self._search_built(rows, min(self._num_built, self._config.oversampling * k + excluded.shape[1]))
        from_built = usable.copy()
        from_built[self._changed] = False
        changed = np.broadcast_to(self._changed.astype(np.int32), (rows.shape[0], self._changed.size))
        items = np.concatenate([found, changed], axis=1)
        scores = np.concatenate([found_scores, rows @ self._rows.vectors[self._changed].T], axis=1)
        keep = np.concatenate([from_built[found], usable[changed]], axis=1)
        keep &= ~(items[:, :, None] == excluded[:, None, :]).any(axis=2)
        scores = np.pad(np.where(keep, scores, -np.inf), ((0, 0), (0, k)), constant_values=-np.inf)
        items = np.where(scores > -np.inf, np.pad(items, ((0, 0), (0, k))), 0)
        order = np.lexsort((items, -scores), axis=1)[:, :k]
        return np.take_along_axis(items, order, axis=1), np.take_along_axis(scores, order, axis=1).astype(np.float32)


def _searcher(items: Float[np.ndarray, "n d"], config: ScannConfig) -> Any:
    """ScaNN's searcher over all rows but padding, by catalogue size."""
    num_items = items.shape[0]
    builder = _scann_ops().builder(items, min(100, num_items), "dot_product")
    builder.set_n_training_threads(config.threads or usable_cores())
    if num_items <= config.brute_force_items:
        return _built(builder.score_brute_force())
    if config.autopilot:
        return _built(builder.autopilot())
    if num_items > config.tree_items:
        num_leaves = min(num_items, max(1, round(config.leaves_per_root * math.sqrt(num_items))))
        searched = max(1, round(num_leaves * config.leaf_share))
        builder = builder.tree(num_leaves, searched, training_sample_size=num_items, soar_lambda=config.soar_lambda)
    builder = builder.score_ah(2, anisotropic_quantization_threshold=config.quantisation_threshold)
    return _built(builder.reorder(min(config.min_reorder, num_items)))


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
    """ScaNN's 0-based positions as item indices, padded to ``k`` columns; NaN scores mark positions that it could not fill.

    Positions and scores must be the caller's own: where all are filled they become the answer.
    """
    num_found = positions.shape[1]
    if num_found == k:
        worst = scores[:, -1]  # best first: where the last position is filled, all are
        if math.isfinite(worst.dot(worst)):
            items = positions.view(np.int32)
            items += 1
            return items, scores
    items = np.zeros((positions.shape[0], k), np.int32)
    padded_scores = np.full((positions.shape[0], k), -np.inf, np.float32)
    filled = np.isfinite(scores)
    items[:, :num_found] = np.where(filled, positions.astype(np.int32) + 1, 0)
    padded_scores[:, :num_found] = np.where(filled, scores, -np.inf)
    return items, padded_scores
