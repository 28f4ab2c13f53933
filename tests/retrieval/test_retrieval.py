"""Contract of every index against brute force by sorting, index folders, and the choice of implementation."""

import importlib
import importlib.util
import json
import logging
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot import quantised
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.retrieval import (
    ExactIndex,
    ScannConfig,
    ScannIndex,
    build_index,
    choose_index,
    compare,
    exact_search,
    load_index,
    scann_available,
)

needs_scann = pytest.mark.skipif(not scann_available(), reason="ScaNN is not installed here")
needs_compiler = pytest.mark.skipif(native_problem() is not None, reason="there is no C++ compiler here")
IMPLEMENTATIONS = [
    "exact",
    "sharded",
    *(pytest.param(name, marks=needs_compiler) for name in ("quantised", "mapped")),
    pytest.param("scann", marks=needs_scann),
    "partitioned",
]


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


def filtered_brute_force(vectors, queries, k, allowed=None, excluded=None) -> tuple[np.ndarray, np.ndarray]:
    scores = queries @ vectors.T
    scores[:, 0] = -np.inf
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    if excluded is not None:
        np.put_along_axis(scores, excluded.astype(np.int64), -np.inf, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    return np.where(best > -np.inf, order, 0), best


def assert_found(found, expected) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)


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
    with pytest.raises(UserError, match=r"queries are of shape \(2, 9\); expected an array of shape \(b, 16\)"):
        index.search(make_queries(2, width=9), 3)
    with pytest.raises(UserError, match="queries hold NaN"):
        index.search(make_queries(2) * np.float32(np.nan), 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_no_table_raises_before_numpy_or_jax_do(implementation, monkeypatch):
    """As users meet it: without the checks of annotations, which this suite adds and which would refuse it first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    vectors, queries = make_vectors(30), make_queries(2)
    with pytest.raises(UserError, match=r"item vectors have shape \(31,\); expected a table"):
        build_index(vectors[:, 0], implementation)
    index = build_index(vectors, implementation)

    def assert_refused(told: str, queries: Any, **filters: Any) -> None:
        with pytest.raises(UserError, match=told):
            index.search(queries, 3, **filters)

    expected = r"expected an array of shape \(b, 16\)"
    assert_refused(rf"queries are of shape \(16,\); {expected}", queries[0])
    assert_refused(rf"queries are of shape \(1, 2, 16\); {expected}", queries[None])
    assert_refused(rf"queries are of type list; {expected}", queries.tolist())
    expected = r"expected an array of shape \(2, s\)"
    assert_refused(rf"excluded is of type list; {expected}", queries, excluded=[1, 2])
    assert_refused(rf"excluded is of shape \(2,\); {expected}", queries, excluded=np.array([1, 2]))
    assert_refused(rf"excluded is of shape \(3, 1\); {expected}", queries, excluded=np.ones((3, 1), int))
    assert_refused(r"allowed is of type list; expected an array of shape \(31,\)", queries, allowed=[True] * 31)


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_save_that_fails_leaves_the_index_that_was_there(implementation, tmp_path, monkeypatch):
    vectors, queries = make_vectors(300), make_queries(3)
    build_index(vectors, implementation).save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("cda4rec_jax.retrieval.rows.write_rows_but_vectors", full)
    with pytest.raises(OSError, match="No space left"):
        build_index(make_vectors(200), implementation).save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert load_index(tmp_path).search(queries, 5)[0].max() < 301


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


def test_without_scann_none_does_without_and_says_so_but_asking_for_scann_raises(monkeypatch, caplog):
    without_scann(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert build_index(make_vectors(5)).implementation == choose_index(5).implementation != "scann"
    assert "ScaNN is not installed" in caplog.text
    with pytest.raises(UserError, match="ScaNN cannot be imported"):
        build_index(make_vectors(5), "scann")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_folder_of_another_index_is_read_or_refused_as_the_docstring_says(implementation, tmp_path):
    writer = "exact" if implementation == "sharded" else "sharded"
    build_index(make_vectors(5), writer).save(tmp_path)
    if implementation in ("exact", "quantised", "sharded"):
        assert load_index(tmp_path, implementation).num_items == 5
    else:
        with pytest.raises(UserError, match=f"implementation '{writer}'; expected '{implementation}'"):
            load_index(tmp_path, implementation)


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
    build_index(make_vectors(60), "scann").save(tmp_path / "other")
    (tmp_path / "other" / "vectors.npy").replace(tmp_path / "vectors.npy")
    (tmp_path / "other" / "present.npy").replace(tmp_path / "present.npy")
    with pytest.raises(UserError, match=r"scann is missing or damaged \(built from 50 items, expected 60\)"):
        load_index(tmp_path)
    shutil.rmtree(tmp_path / "scann")
    with pytest.raises(UserError, match="scann is missing or damaged"):
        load_index(tmp_path)


def test_comparing_on_no_query_raises():
    index = ExactIndex.build(make_vectors(5))
    with pytest.raises(UserError, match="no queries"):
        compare(index, index, make_queries(0), 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_filters_act_inside_of_the_search(implementation):
    """Seen items are the 40 best of each query, and the allow-list holds a third: what a search drops afterwards leaves nothing."""
    vectors, queries = make_vectors(300), make_queries(9)
    allowed = np.arange(301) % 3 == 1
    seen, _ = filtered_brute_force(vectors, queries, 40, allowed)
    index = build_index(vectors, implementation)
    for filters in ({"allowed": allowed}, {"excluded": seen}, {"allowed": allowed, "excluded": seen}):
        found = index.search(queries, 12, **filters)
        assert np.all(found[0] > 0)
        assert_found(found, filtered_brute_force(vectors, queries, 12, **filters))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_filters_leave_fewer_than_k_the_rest_is_item_0(implementation):
    vectors, queries = make_vectors(100), make_queries(2)
    allowed = np.isin(np.arange(101), (0, 5, 60, 99))
    seen = np.array([[60, 0], [0, 0]], np.int32)
    items, scores = build_index(vectors, implementation).search(queries, 6, allowed=allowed, excluded=seen)
    assert_found((items, scores), filtered_brute_force(vectors, queries, 6, allowed, seen))
    np.testing.assert_array_equal((items > 0).sum(axis=1), [2, 3])


@needs_scann
def test_filtered_quantised_search_keeps_recall_and_k():
    vectors, queries = make_vectors(3000), make_queries(20)
    seen, _ = brute_force(vectors, queries, 50)
    allowed = np.arange(3001) % 2 == 1
    items, _ = ScannIndex.build(vectors).search(queries, 100, allowed=allowed, excluded=seen)
    expected, _ = filtered_brute_force(vectors, queries, 100, allowed, seen)
    assert np.all(allowed[items]) and not (items[:, :, None] == seen[:, None]).any()
    assert np.mean([np.isin(*rows).mean() for rows in zip(expected, items, strict=True)]) >= 0.95


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_changed", (5, 60), ids=("few", "enough to build again"))
def test_upserted_and_deleted_items_are_searched_as_they_are_now(implementation, num_changed, tmp_path):
    """Changed items get the best scores there are; one of them is deleted, and so is one that was never changed."""
    vectors, queries = make_vectors(200), make_queries(9)
    index = build_index(vectors, implementation)
    new = 2 * queries[np.arange(num_changed) % 9]
    items = np.concatenate([[202], np.arange(10, 9 + num_changed)])  # 202 grows the index and leaves 201 empty
    index.upsert(items, new)
    index.delete(np.array([10, 150]))
    now = np.pad(vectors, ((0, 2), (0, 0)))
    now[items] = new
    exists = ~np.isin(np.arange(203), (0, 10, 150, 201))
    assert index.num_items == 199
    assert_found(index.search(queries, 20), filtered_brute_force(now, queries, 20, exists))
    index.save(tmp_path)
    for loaded in (load_index(tmp_path), load_index(tmp_path, "exact")):
        assert loaded.num_items == 199
        assert_found(loaded.search(queries, 20), filtered_brute_force(now, queries, 20, exists))
    index.upsert(np.array([10, 201]), vectors[[10, 20]])
    now[[10, 201]], exists[[10, 201]] = vectors[[10, 20]], True
    seen = items[None, :3].repeat(9, axis=0).astype(np.int32)
    assert_found(index.search(queries, 20, excluded=seen), filtered_brute_force(now, queries, 20, exists, seen))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bad_filters_and_changes_raise_and_change_nothing(implementation):
    vectors, queries = make_vectors(30), make_queries(2)
    index = build_index(vectors, implementation)
    with pytest.raises(UserError, match=r"allowed is of shape \(30,\)"):
        index.search(queries, 3, allowed=np.ones(30, bool))
    with pytest.raises(UserError, match="outside of 0 to 30"):
        index.search(queries, 3, excluded=np.full((2, 1), 31, np.int32))
    for items in ([0], [4, 4]):
        with pytest.raises(UserError, match="index below 1 or the same index twice"):
            index.upsert(np.array(items), vectors[: len(items)])
    with pytest.raises(UserError, match=r"shape \(1, 9\); expected \(1, 16\)"):
        index.upsert(np.array([3]), make_vectors(1, width=9)[1:])
    with pytest.raises(UserError, match="NaN"):
        index.upsert(np.array([3]), np.full((1, 16), np.nan, np.float32))
    for items in ([0], [31], [-1]):
        with pytest.raises(UserError, match="not in the index, which holds 30"):
            index.delete(np.array(items))
    index.delete(np.array([3]))
    with pytest.raises(UserError, match="not in the index, which holds 29"):
        index.delete(np.array([3]))
    with pytest.raises(UserError, match="asked for 30 items of a catalogue of 29"):
        index.search(queries, 30)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_folder_of_version_1_is_read(implementation, tmp_path):
    vectors, queries = make_vectors(40), make_queries(3)
    build_index(vectors, implementation).save(tmp_path)
    (tmp_path / "present.npy").unlink()
    meta = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(meta | {"version": 1}))
    assert_found(load_index(tmp_path).search(queries, 5), brute_force(vectors, queries, 5))


@needs_compiler
def test_quantised_search_is_exact_where_codes_tell_nothing():
    """One huge value in each vector leaves a code of 0 for all others, which decide."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2001, 16)).astype(np.float32)
    vectors[:, 3] = 1e4
    queries = rng.normal(size=(3, 16)).astype(np.float32)
    queries[:, 3] = 0.0
    queries[2] = 0.0  # all scores are equal
    found = build_index(vectors, "quantised").search(queries, 50)
    assert_found(found, brute_force(vectors, queries, 50))


def test_without_a_compiler_quantised_search_raises(monkeypatch):
    monkeypatch.setattr(quantised, "native_problem", lambda: "there is no C++ compiler")
    with pytest.raises(UserError, match=r"there is no C\+\+ compiler. Use the exact index"):
        build_index(make_vectors(5), "quantised")
