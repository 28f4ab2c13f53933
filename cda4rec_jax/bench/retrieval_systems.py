"""The systems of ``cda4rec bench retrieval``: our indices and those of others, at several settings each, NumPy to NumPy."""

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from cda4rec_jax.bench.retrieval_data import hard_items, hard_queries
from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.bench import exact_peers, torch_device
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.pipeline.request import RequestFunctions
from cda4rec_jax.retrieval import (
    ExactIndex,
    HeldOut,
    Index,
    PartitionedConfig,
    PartitionedIndex,
    QuantisedIndex,
    RecallNotReached,
    ScannConfig,
    ScannIndex,
    mean_recall,
    scann_available,
    setting_of,
    tune_scann,
    tune_search,
)
from cda4rec_jax.runs.artifacts import load_trained
from cda4rec_jax.timing import usable_cores

WIDTH = 64  # of generated items
NUM_QUERIES = 2048  # that are measured, with half as many for tuning
# Share of the leaves that ScaNN searches, and items that it scores again for each one wanted.
SCANN_SETTINGS = ((0.05, 3.0), (0.1, 3.0), (0.1, 8.0), (0.25, 6.0), (0.5, 10.0))
SCANN, TUNED, PARTITIONED, HNSWLIB = "ours, scann", "ours, scann tuned", "ours, partitioned", "hnswlib"
HNSWLIBS = (HNSWLIB, "hnswlib, Euclidean")
TUNED_RECALL = 0.955  # which the tuner is asked for, so that .95 is reached on other queries too
OTHER_RECALLS = (0.8, 0.9, 0.99)  # of the same build, for the curve
PARTITIONED_SHARES = (0.05, 0.1, 0.25, 0.4, 0.6)  # of the leaves
# Above so many items a system is left out: its graph or its partition would take long to build, or a batch of scores GB of memory.
MOST_ITEMS = {
    HNSWLIB: 1_000_000,
    PARTITIONED: 1_000_000,
    "faiss HNSW": 100_000,
    "usearch": 100_000,
    "pynndescent": 100_000,
    "torch": 100_000,
    "numpy": 100_000,
}

Search = Callable[[np.ndarray], np.ndarray]  # queries [b, d] to item indices [b, k]
Searches = Callable[[np.ndarray, int, int], Mapping[str, Search]]  # of items (row 0 is padding), k and threads, by setting


@dataclass(frozen=True, kw_only=True)
class SearchData:
    """Items, queries that are none of them, what exact search finds for those, and further queries to tune on."""

    name: str
    fingerprint: str
    items: Float[np.ndarray, "i d"]  # row 0 is padding
    queries: Float[np.ndarray, "q d"]
    truth: Int[np.ndarray, "q k"]
    tuning: Float[np.ndarray, "t d"]

    @property
    def num_items(self) -> int:
        return len(self.items) - 1

    def batches(self, batch: int) -> list[np.ndarray]:
        """The queries in rotation, at least one batch."""
        whole = max(1, len(self.queries) // batch)
        return [
            np.ascontiguousarray(np.resize(self.queries, (whole * batch, self.queries.shape[1]))[i::whole]) for i in range(whole)
        ]


@dataclass(frozen=True, kw_only=True)
class SearchSystem:
    """One system at one setting, with the recall that it reaches."""

    system: str
    setting: str
    version: str
    is_ours: bool
    recall: float
    build_seconds: float  # of the index, which its settings share
    run: Search

    @property
    def name(self) -> str:
        """Unique among all."""
        return f"{self.system}: {self.setting}" if self.setting else self.system


def hard_data(num_items: int, k: int) -> SearchData:
    """The generated set, without clusters: what approximate search finds hardest."""
    queries = hard_queries(_with_tuning(NUM_QUERIES), WIDTH)
    return _with_truth("hard", f"hard set, {num_items} items, seed 0", hard_items(num_items, WIDTH), queries, k)


def trained_data(run: Path, k: int) -> SearchData:
    """The item table of a finished joint run, and the semantic embeddings of its users before their test events; every third tunes."""
    trained = load_trained(run)
    if trained.system.policy is None:
        raise UserError(f"{run} holds a baseline, which has no semantic embeddings: --run takes a joint run")
    items = np.array(trained.catalogue.vectors, np.float32)
    functions = RequestFunctions(trained.system, trained.catalogue, trained.config, ExactIndex.build(items))
    positions = trained.corpus.target_positions(Split.TEST)
    users = np.arange(len(positions))[: _with_tuning(NUM_QUERIES)]
    queries = [
        np.asarray(functions.semantic(functions.abstract(history, EgressLevel.FULL, 0)))
        for history in (trained.corpus.histories(user, positions[user], trained.config.stored_events) for user in users[:, None])
    ]
    interactions = trained.corpus.interactions
    return _with_truth(interactions.name, interactions.fingerprint, items, np.concatenate(queries).astype(np.float32), k)


def _with_tuning(num_queries: int) -> int:
    """Queries of which two thirds are so many."""
    return num_queries * 3 // 2


def _with_truth(name: str, fingerprint: str, items: np.ndarray, queries: np.ndarray, k: int) -> SearchData:
    if k >= len(items) - 1:
        raise UserError(f"asked for {k} of {len(items) - 1} items: expected fewer")
    is_tuning = np.arange(len(queries)) % 3 == 2
    measured = queries[~is_tuning]
    truth, _ = ExactIndex.build(items).search(measured, k)
    return SearchData(name=name, fingerprint=fingerprint, items=items, queries=measured, truth=truth, tuning=queries[is_tuning])


def built_systems(
    data: SearchData, k: int, peers: Sequence[str], batch: int, progress: Callable[[int, int], None]
) -> tuple[list[SearchSystem], dict[str, str]]:
    """Every system at every setting, ScaNN tuned for ``batch`` among them; and why others were left out, by name."""
    making, systems, left_out = makers(peers), [], {}
    if scann_available():
        making[TUNED] = (None, partial(_of_tuned, data.tuning, batch))
    for done, (name, (package, make)) in enumerate(making.items()):
        progress(done, len(making))
        if data.num_items > MOST_ITEMS.get(name, data.num_items):
            left_out[name] = f"only up to {MOST_ITEMS[name]:,} items, since building or a batch would take too much above"
            continue
        try:
            systems += systems_of(name, package, make, data, k, usable_cores())
        except UserError as problem:
            left_out[name] = str(problem)
    progress(len(making), len(making))
    return systems, left_out


def makers(peers: Sequence[str]) -> dict[str, tuple[str | None, Searches]]:
    """For each system the package it comes from (None: this one), and how it is made. A further index of ours is one line here."""
    found: dict[str, tuple[str | None, Searches]] = {"ours, exact": (None, partial(_of_index, ExactIndex.build))}
    if native_problem() is None and jax.default_backend() == "cpu":
        found["ours, quantised"] = (None, partial(_of_index, QuantisedIndex.build))
    found[PARTITIONED] = (None, _of_partitioned)
    if scann_available():
        found[SCANN] = (None, _of_scann)
    if "faiss" in peers:
        from cda4rec_jax.bench.peers import faiss_search

        found["faiss IVF"] = ("faiss", faiss_search.ivf)
        found["faiss HNSW"] = ("faiss", faiss_search.hnsw)
    if "hnswlib" in peers:
        from cda4rec_jax.bench.peers import hnswlib_search

        for name, make in zip(HNSWLIBS, (hnswlib_search.hnsw, hnswlib_search.hnsw_euclidean), strict=True):
            found[name] = ("hnswlib", make)
    if "usearch" in peers:
        from cda4rec_jax.bench.peers import usearch_search

        found["usearch"] = ("usearch", usearch_search.hnsw)
    if "pynndescent" in peers:
        from cda4rec_jax.bench.peers import pynndescent_search

        found["pynndescent"] = ("pynndescent", pynndescent_search.descent)
    for peer, name in (("faiss", "faiss flat"), ("torch", "torch"), ("numpy", "numpy")):
        if peer in peers:
            found[name] = (peer, partial(_of_exact_peer, name))
    return found


def systems_of(name: str, package: str | None, make: Searches, data: SearchData, k: int, threads: int) -> list[SearchSystem]:
    """Every setting of one system, built, with its recall."""
    start = time.perf_counter()
    searches = make(data.items, k, threads)
    build_seconds = time.perf_counter() - start
    unmeasured = SearchSystem(
        system=name,
        setting="",
        version=version_of(package),
        is_ours=package is None,
        recall=0.0,
        build_seconds=build_seconds,
        run=lambda queries: queries,
    )
    return [replace(unmeasured, setting=setting, run=search, recall=recall(search, data)) for setting, search in searches.items()]


def recall(search: Search, data: SearchData) -> float:
    """Mean share of the exact items that a search finds."""
    parts = range(0, len(data.queries), 64)  # plain searches hold all scores
    return mean_recall(np.concatenate([search(data.queries[start : start + 64]) for start in parts]), data.truth)


def version_of(package: str | None) -> str:
    """Of a peer's package, with the device of torch if that is none of the CPU's; of what our indices stand on."""
    if package is None:
        return f"jax {jax.__version__}" + (f", scann {importlib.metadata.version('scann')}" if scann_available() else "")
    distributions = importlib.metadata.packages_distributions().get(package, [package])
    on_gpu = package == "torch" and torch_device() == "cuda"
    return f"{distributions[0]} {importlib.metadata.version(distributions[0])}{' on the GPU' if on_gpu else ''}"


@dataclass(frozen=True)
class IndexSearch:
    """An index as a function of queries alone."""

    index: Index
    k: int

    def __call__(self, queries: np.ndarray) -> np.ndarray:
        return self.index.search(queries, self.k)[0]


def _of_index(build: Callable[[np.ndarray], Index], items: np.ndarray, k: int, threads: int) -> Mapping[str, Search]:
    return {"": IndexSearch(build(items), k)}


def _of_scann(items: np.ndarray, k: int, threads: int) -> Mapping[str, Search]:
    built = ScannIndex.build(items, ScannConfig(threads=threads))
    return {
        f"{share:.0%} of leaves, reorder {factor:g} k" if built.num_leaves else f"no tree, reorder {factor:g} k": IndexSearch(
            built.searched_with(ScannConfig(leaf_share=share, reorder_factor=factor)), k
        )
        for share, factor in SCANN_SETTINGS
    }


def _of_tuned(queries: np.ndarray, batch: int, items: np.ndarray, k: int, threads: int) -> Mapping[str, Search]:
    """The tuner's choice for ``TUNED_RECALL`` on these queries, and its build searched for the other recalls that it reaches."""
    best = tune_scann(items, queries, k, recall=TUNED_RECALL, batch=batch).index
    held_out, found = HeldOut.of(items, queries, k), {TUNED_RECALL: best}
    for recall in OTHER_RECALLS if best.reorders else ():
        with contextlib.suppress(RecallNotReached):
            found[recall] = tune_search(best, held_out, recall=recall, batch=batch)
    return {
        f"for {recall:g} in batches of {batch}: {setting_of(index)}": IndexSearch(index, k) for recall, index in found.items()
    }


def _of_partitioned(items: np.ndarray, k: int, threads: int) -> Mapping[str, Search]:
    built = PartitionedIndex.build(items, PartitionedConfig(exact_items=0))
    indices = (built.with_leaf_share(share) for share in PARTITIONED_SHARES)
    return {f"{index.leaves_searched} of {index.num_leaves} leaves": IndexSearch(index, k) for index in indices}


def _of_exact_peer(name: str, items: np.ndarray, k: int, threads: int) -> Mapping[str, Search]:
    return {"": exact_peers(items, k, threads, (name,))[name]}
