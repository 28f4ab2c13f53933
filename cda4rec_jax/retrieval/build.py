"""Choosing, loading and comparing indices."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.quantised import check_quantised
from cda4rec_jax.retrieval.choice import RECALL, Choice, choose_index
from cda4rec_jax.retrieval.exact import ExactIndex
from cda4rec_jax.retrieval.index import Index, Queries, mean_recall
from cda4rec_jax.retrieval.mapped import MappedIndex
from cda4rec_jax.retrieval.partitioned import PartitionedConfig, PartitionedIndex
from cda4rec_jax.retrieval.quantised import QuantisedIndex
from cda4rec_jax.retrieval.rows import Vectors, read_meta
from cda4rec_jax.retrieval.scann import ScannConfig, ScannIndex
from cda4rec_jax.retrieval.sharded import ShardedIndex

Implementation = Literal["exact", "quantised", "mapped", "scann", "sharded", "partitioned"]
_logger = logging.getLogger(__name__)


def build_index(
    item_vectors: Vectors, implementation: Implementation | Choice | None = None, *, batch: int = 1, recall: float = RECALL
) -> Index:
    """Index of ``item_vectors``, where row 0 is padding.

    Args:
        item_vectors: of all items.
        implementation: which index, or what ``choose_index`` chose; None asks it, and logs what is chosen and why.
        batch: queries of one call, which None chooses for.
        recall: share of the exact items to find, which None chooses for.

    Raises:
      UserError: The implementation is not installed or unknown, the vectors are no table, there is no item, or a value is not finite.
    """
    if isinstance(implementation, str):
        return _class_of(implementation).build(item_vectors)
    choice = implementation
    if choice is None:
        choice = choose_index(len(item_vectors) - 1, batch=batch, recall=recall)
        _logger.log(logging.WARNING if choice.missing else logging.INFO, "index: %s", choice.reason)
    if isinstance(choice.config, ScannConfig):
        return ScannIndex.build(item_vectors, choice.config)
    if isinstance(choice.config, PartitionedConfig):
        return PartitionedIndex.build(item_vectors, choice.config)
    return _class_of(choice.implementation).build(item_vectors)


def load_index(directory: Path, implementation: Implementation | None = None) -> Index:
    """Index from a folder that ``save`` wrote. None takes the implementation that wrote it.

    Folders of any implementation are read by ``exact``, ``quantised`` and ``sharded``, and their own alone by ``mapped``, ``scann`` and
    ``partitioned``. Where the codes of a ``quantised`` index cannot be searched, None takes ``exact``, which finds the same, and logs that.

    Raises:
      UserError: The folder is no index, damaged, of another version or not one that the implementation reads; or it needs ScaNN, and ScaNN
        is not installed.
    """
    name = implementation or read_meta(directory)[0]
    if implementation is None and name == "quantised":
        try:
            check_quantised()
        except UserError as problem:
            _logger.warning("%s", problem)
            name = "exact"
    return _class_of(name).load(directory)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An index against the exact one on the same queries, asked one at a time as in serving."""

    k: int
    num_queries: int
    recall: float  # mean share of the exact k items that the index found
    index_ms: float  # median time of one query
    exact_ms: float


def compare(index: Index, exact: Index, queries: Queries, k: int) -> Comparison:
    """Recall@k of ``index`` and the median time of a query for both, alternating. UserError if there is no query."""
    if queries.shape[0] == 0:
        raise UserError("no queries to compare on; expected at least one.")
    rows = np.asarray(queries, np.float32)
    for each in (index, exact):
        each.search(rows[:1], k)
    times_ms: dict[bool, list[float]] = {False: [], True: []}
    recalls = []
    for row in rows[:, None]:
        found = {}
        for is_exact, each in ((False, index), (True, exact)):
            start = time.perf_counter()
            found[is_exact], _ = each.search(row, k)
            times_ms[is_exact].append(1e3 * (time.perf_counter() - start))
        recalls.append(mean_recall(found[False], found[True]))
    return Comparison(
        k=k,
        num_queries=rows.shape[0],
        recall=float(np.mean(recalls)),
        index_ms=float(np.median(times_ms[False])),
        exact_ms=float(np.median(times_ms[True])),
    )


def _class_of(implementation: str) -> type[ExactIndex] | type[ScannIndex] | type[PartitionedIndex]:
    if implementation == "exact":
        return ExactIndex
    if implementation == "quantised":
        return QuantisedIndex
    if implementation == "mapped":
        return MappedIndex
    if implementation == "scann":
        return ScannIndex
    if implementation == "sharded":
        return ShardedIndex
    if implementation == "partitioned":
        return PartitionedIndex
    known = ", ".join(repr(one) for one in get_args(Implementation))
    raise UserError(f"index implementation {implementation!r} is unknown; expected one of {known}.")
