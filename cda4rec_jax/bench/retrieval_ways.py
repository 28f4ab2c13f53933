"""The ways to search one catalogue of the generated set at a recall, built; see ``bench.retrieval_crossover``."""

import bisect
import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from cda4rec_jax.bench.retrieval_systems import IndexSearch, Search
from cda4rec_jax.kernels.topk_dot import topk_dot
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.retrieval import (
    ExactIndex,
    HeldOut,
    PartitionedConfig,
    PartitionedIndex,
    QuantisedIndex,
    RecallNotReached,
    ScannIndex,
    exact_search,
    mean_recall,
    scann_available,
    tune_search,
)
from cda4rec_jax.retrieval.choice import Way

APPROXIMATE: Literal["approx_max_k"] = "approx_max_k"  # no index: what JAX offers by itself
SHARES = (1 / 64, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 1 / 2, 3 / 4, 1.0)  # of the leaves
FEW = 32  # queries that tell the recall of approx_max_k, which is slow


@dataclass(frozen=True, kw_only=True)
class Searched:
    """One way to search one catalogue, built."""

    way: Way | Literal["approx_max_k"]
    wanted: float  # recall; 1 of exact search
    recall: float  # found, on queries of which half chose the settings
    build_seconds: float  # compiling and finding the settings included
    search: Search
    leaf_share: float | None = None
    reordered: int | None = None

    @property
    def name(self) -> str:
        return self.way if self.wanted == 1.0 else f"{self.way} .{round(100 * self.wanted)}"

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "search"}


def built_ways(vectors: np.ndarray, queries: np.ndarray, k: int, recalls: Sequence[float], batch: int) -> list[Searched]:
    """All that can be had here and reach a recall; exact search, as ``ExactIndex`` makes it here, comes first."""
    compiled = jax.default_backend() == "cpu" and native_problem() is None
    truth, _ = exact_search(jnp.asarray(vectors), jnp.asarray(queries), k)
    held_out = HeldOut(queries=queries, exact=np.asarray(truth))
    found = [_exact("exact", IndexSearch(ExactIndex.build(vectors), k), held_out)]
    if jax.default_backend() == "cpu":
        by_xla = _exact("exact by XLA", IndexSearch(_ExactByXla.build(vectors), k), held_out)
        found = [*found, by_xla] if compiled else [by_xla]
    if compiled:
        found.append(_exact("quantised", IndexSearch(QuantisedIndex.build(vectors), k), held_out))
    if scann_available():
        found += _scann(vectors, held_out, recalls, batch)
    found += _partitioned(vectors, held_out, recalls)
    approximate = _approximate(vectors, k, max(recalls))
    recall = mean_recall(approximate(queries[:FEW]), held_out.exact[:FEW])
    return [*found, Searched(way=APPROXIMATE, wanted=max(recalls), recall=recall, build_seconds=0.0, search=approximate)]


class _ExactByXla(ExactIndex):
    """As ``ExactIndex`` is without a compiler."""

    def _find(self, table: Any, queries: Any, k: int, allowed: Any, excluded: Any) -> Any:
        return _search_by_xla(table, queries, k, allowed, excluded)


@partial(jax.jit, static_argnames=("k",))
def _search_by_xla(table: Any, queries: Any, k: int, allowed: Any, excluded: Any) -> Any:
    return topk_dot(table, queries, k, allowed=allowed, excluded=excluded, implementation="xla")


def _exact(way: Way, search: Search, held_out: HeldOut) -> Searched:
    start = time.perf_counter()
    recall = mean_recall(search(held_out.queries), held_out.exact)
    return Searched(way=way, wanted=1.0, recall=recall, build_seconds=time.perf_counter() - start, search=search)


def _scann(vectors: np.ndarray, held_out: HeldOut, recalls: Sequence[float], batch: int) -> Iterator[Searched]:
    start = time.perf_counter()
    built = ScannIndex.build(vectors)
    for wanted in recalls:
        with contextlib.suppress(RecallNotReached):
            index = tune_search(built, held_out, recall=wanted, batch=batch)
            yield Searched(
                way="scann",
                wanted=wanted,
                recall=held_out.recall(index),
                build_seconds=time.perf_counter() - start,
                search=IndexSearch(index, held_out.k),
                leaf_share=index.config.leaf_share if index.num_leaves else None,
                reordered=index.config.min_reorder if index.reorders else None,
            )


def _partitioned(vectors: np.ndarray, held_out: HeldOut, recalls: Sequence[float]) -> Iterator[Searched]:
    start = time.perf_counter()
    built = PartitionedIndex.build(vectors, PartitionedConfig(exact_items=0))
    enough = min(
        1.0, built.num_reordered(held_out.k) / built.num_items
    )  # with less, leaves hold too few items, and all are scored
    shares = [share for share in SHARES if share >= enough]

    @functools.cache
    def recall(share: float) -> float:
        index = built.with_leaf_share(share)
        return min(half.recall(index) for half in held_out.halves())

    for wanted in recalls:
        share = shares[min(bisect.bisect_left(shares, wanted, key=recall), len(shares) - 1)]
        if recall(share) >= wanted:
            yield Searched(
                way="partitioned",
                wanted=wanted,
                recall=recall(share),
                build_seconds=time.perf_counter() - start,
                search=IndexSearch(built.with_leaf_share(share), held_out.k),
                leaf_share=share,
            )


def _approximate(vectors: np.ndarray, k: int, target: float) -> Search:
    """``approx_max_k`` of all scores: partial reductions on a TPU, and a sort elsewhere."""
    table = jnp.asarray(vectors)

    @jax.jit
    def search(table: Float[Array, "i d"], queries: Float[Array, "b d"]) -> Int[Array, "b k"]:
        scores = jnp.where(jnp.arange(table.shape[0])[None] > 0, queries @ table.T, -jnp.inf)
        return jax.lax.approx_max_k(scores, k, recall_target=target)[1]

    return lambda rows: np.asarray(search(table, jnp.asarray(rows)))
