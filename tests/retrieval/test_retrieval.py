"""Contract of every index against brute force by sorting, index folders, and the choice of implementation."""

import importlib
import importlib.util
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval import (
    ExactIndex,
    ScannConfig,
    ScannIndex,
    build_index,
    compare,
    exact_search,
    load_index,
    scann_available,
)

needs_scann = pytest.mark.skipif(not scann_available(), reason="ScaNN is not installed here")
IMPLEMENTATIONS = ["exact", pytest.param("scann", marks=needs_scann)]


def make_vectors(num_items: int, width: int = 16, clusters: int = 0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_items + 1, width))
    if clusters:
        vectors = 0.5 * vectors + rng.normal(size=(clusters, width))[rng.integers(0, clusters, num_items + 1)]
    vectors[0] = 100.0  # padding would win every search if it could be found
    return vectors.astype(np.float32)


def make_queries(count: int, width: int = 16, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries @ vectors[1:].T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order + 1, np.take_along_axis(scores, order, axis=1)


def without_scann(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", refuse)


@pytest.mark.parametrize("chunk_size", [7, 16, 50, 51, 1000])
@pytest.mark.parametrize("k", [1, 9, 50])
def test_exact_search_equals_sorting_for_any_chunk_size(chunk_size, k):
    vectors, queries = make_vectors(50), make_queries(4)
    items, scores = jax.jit(exact_search, static_argnames=("k", "chunk_size"))(vectors, queries, k=k, chunk_size=chunk_size)
    expected_items, expected_scores = brute_force(vectors, queries, k)
    np.testing.assert_array_equal(items, expected_items)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


def test_among_equal_scores_the_lower_index_comes_first():
    vectors = jnp.ones((20, 3))
    for chunk_size in (6, 100):
        items, _ = exact_search(vectors, jnp.ones((1, 3)), 7, chunk_size=chunk_size)
        np.testing.assert_array_equal(items[0], np.arange(1, 8))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_items", [1, 5, 300])
@pytest.mark.parametrize("batch", [1, 3])
def test_small_catalogues_are_searched_exactly(implementation, num_items, batch):
    vectors, queries = make_vectors(num_items), make_queries(batch)
    k = min(num_items, 20)
    items, scores = build_index(vectors, implementation).search(queries, k)
    expected_items, expected_scores = brute_force(vectors, queries, k)
    assert (items.dtype, scores.dtype, items.shape) == (np.int32, np.float32, (batch, k))
    np.testing.assert_array_equal(items, expected_items)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_query_gives_no_row(implementation):
    items, scores = build_index(make_vectors(30), implementation).search(make_queries(0), 4)
    assert items.shape == scores.shape == (0, 4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jax_and_numpy_arrays_give_the_same_answer(implementation):
    vectors, queries = make_vectors(30), make_queries(3)
    first, _ = build_index(vectors, implementation).search(queries, 5)
    second, _ = build_index(jnp.asarray(vectors), implementation).search(jnp.asarray(queries), 5)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [0, 31])
def test_k_outside_the_catalogue_raises(implementation, k):
    with pytest.raises(UserError, match=f"asked for {k} items of a catalogue of 30"):
        build_index(make_vectors(30), implementation).search(make_queries(1), k)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bad_vectors_and_queries_raise(implementation):
    vectors = make_vectors(30)
    with pytest.raises(UserError, match="at least one item"):
        build_index(vectors[:1], implementation)
    with pytest.raises(UserError, match="NaN"):
        build_index(np.where(np.arange(31)[:, None] == 7, np.nan, vectors).astype(np.float32), implementation)
    index = build_index(vectors, implementation)
    with pytest.raises(UserError, match="queries are 9 wide"):
        index.search(make_queries(2, width=9), 3)
    with pytest.raises(UserError, match="queries hold NaN"):
        index.search(make_queries(2) * np.float32(np.nan), 3)


@needs_scann
@pytest.mark.parametrize(
    ("clusters", "config", "k"),
    [
        pytest.param(0, ScannConfig(), 20, id="quantised, no structure, k 20"),
        pytest.param(0, ScannConfig(), 100, id="quantised, no structure, k 100"),
        pytest.param(0, ScannConfig(), 500, id="quantised, no structure, k 500"),
        pytest.param(30, ScannConfig(), 100, id="quantised, clusters, k 100"),
        pytest.param(30, ScannConfig(tree_items=2000, leaf_share=0.5), 100, id="partitioned, clusters, k 100"),
    ],
)
def test_scann_recall_is_at_least_95_percent(clusters, config, k):
    vectors = make_vectors(3000, clusters=clusters)
    queries = vectors[1:101] + 0.5 * make_queries(100)
    comparison = compare(ScannIndex.build(vectors, config), ExactIndex.build(vectors), queries, k)
    assert comparison.recall >= 0.95
    assert (comparison.k, comparison.num_queries) == (k, 100)
    assert comparison.index_ms > 0 and comparison.exact_ms > 0


@needs_scann
def test_scann_pads_where_the_searched_leaves_hold_fewer_items_than_k():
    config = ScannConfig(brute_force_items=10, tree_items=20, leaf_share=0.01)
    index = ScannIndex.build(make_vectors(400), config)
    items, scores = index.search(make_queries(5), 300)
    assert items.shape == (5, 300)
    assert np.any(items == 0)
    np.testing.assert_array_equal(items == 0, scores == -np.inf)
    for row in items:
        found = row[row > 0]
        assert len(found) > 0 and len(np.unique(found)) == len(found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_saved_index_answers_the_same_after_its_folder_moved(implementation, tmp_path):
    vectors, queries = make_vectors(1500, clusters=20), make_queries(8)
    index = build_index(vectors, implementation)
    index.save(tmp_path / "here" / "index")
    shutil.move(tmp_path / "here", tmp_path / "there")
    loaded = load_index(tmp_path / "there" / "index")
    assert (loaded.implementation, loaded.num_items) == (implementation, 1500)
    for found, expected in zip(loaded.search(queries, 50), index.search(queries, 50), strict=True):
        np.testing.assert_array_equal(found, expected)


@needs_scann
def test_scann_keeps_its_config_in_the_folder(tmp_path):
    config = ScannConfig(brute_force_items=10, tree_items=20, leaf_share=0.01)
    index = ScannIndex.build(make_vectors(400), config)
    index.save(tmp_path)
    queries = make_queries(5)
    np.testing.assert_array_equal(load_index(tmp_path).search(queries, 300)[0], index.search(queries, 300)[0])


@needs_scann
def test_a_scann_folder_without_scann_says_what_to_do_and_serves_exactly(tmp_path, monkeypatch):
    vectors, queries = make_vectors(100), make_queries(3)
    build_index(vectors, "scann").save(tmp_path)
    without_scann(monkeypatch)
    with pytest.raises(UserError, match="implementation='exact'"):
        load_index(tmp_path)
    np.testing.assert_array_equal(load_index(tmp_path, "exact").search(queries, 10)[0], brute_force(vectors, queries, 10)[0])


def test_without_scann_none_chooses_exact_and_says_so_but_asking_for_scann_raises(monkeypatch, caplog):
    without_scann(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert build_index(make_vectors(5)).implementation == "exact"
    assert "exact index serves" in caplog.text
    with pytest.raises(UserError, match="ScaNN cannot be imported"):
        build_index(make_vectors(5), "scann")


@needs_scann
def test_none_chooses_scann_where_it_is_installed():
    assert build_index(make_vectors(5)).implementation == "scann"


def test_folders_that_are_no_index_raise(tmp_path):
    with pytest.raises(UserError, match="is no index"):
        load_index(tmp_path)
    ExactIndex.build(make_vectors(5)).save(tmp_path)
    meta = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(UserError, match="index version 99"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(meta | {"implementation": "annoy"}))
    with pytest.raises(UserError, match="'annoy' is unknown"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(meta))
    (tmp_path / "vectors.npy").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"vectors\.npy is missing or damaged"):
        load_index(tmp_path)


@needs_scann
def test_a_damaged_scann_folder_raises(tmp_path):
    build_index(make_vectors(50), "scann").save(tmp_path)
    shutil.rmtree(tmp_path / "scann")
    with pytest.raises(UserError, match="scann is missing or damaged"):
        load_index(tmp_path)


def test_comparing_on_no_query_raises():
    index = ExactIndex.build(make_vectors(5))
    with pytest.raises(UserError, match="no queries"):
        compare(index, index, make_queries(0), 3)
