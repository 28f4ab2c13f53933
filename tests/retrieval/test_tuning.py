"""The tuner reaches its target on the queries that confirm, its config survives a folder, and a search adds little to ScaNN's own."""

import dataclasses

import numpy as np
import pytest

from cda4rec_jax.bench.retrieval_adapter import ADAPTER, RAW, adapter_overhead
from cda4rec_jax.bench.retrieval_data import hard_items, hard_queries
from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval import (
    HeldOut,
    ScannConfig,
    ScannIndex,
    Tuned,
    candidates_for,
    load_index,
    scann_available,
    tune_scann,
    tune_search,
    tuning,
)
from cda4rec_jax.timing import TimingConfig

pytestmark = pytest.mark.skipif(not scann_available(), reason="ScaNN is not installed here")
K, WIDTH, NUM_ITEMS = 50, 32, 3000
QUICK = TimingConfig(rounds=3, block_seconds=0.002, warm_up_turns=2, attempts=1)
TREE = ScannConfig(tree_items=0, threads=2)


@pytest.fixture(scope="module")
def items() -> np.ndarray:
    return hard_items(NUM_ITEMS, WIDTH)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return hard_queries(200, WIDTH)


@pytest.fixture(scope="module")
def held_out(items, queries) -> HeldOut:
    return HeldOut.of(items, queries, K)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def tuned(items, queries, lines) -> Tuned:
    candidates = (ScannConfig(threads=2), TREE, dataclasses.replace(TREE, soar_lambda=1.5))
    return tune_scann(items, queries, K, recall=0.9, batch=32, candidates=candidates, timing=QUICK, progress=lines.append)


def test_the_target_is_reached_on_the_queries_that_confirm(tuned, held_out):
    measured = tuned.index.config.measured
    _, confirming = held_out.halves()
    assert confirming.recall(tuned.index) == measured.recall >= 0.9
    assert (measured.num_items, measured.num_queries, measured.k) == (NUM_ITEMS, 100, K)
    assert (measured.batch, measured.threads) == (32, 2)
    assert measured.batch_ms > 0 and measured.single_ms > 0


def test_every_build_is_reported_in_order_as_it_is_done(tuned, lines):
    assert lines == list(tuned.trials)
    assert [line.split(",")[0] for line in lines] == [f"build {number} of 3" for number in (1, 2, 3)]
    assert "no partition" in lines[0] and "SOAR 1.5" in lines[2] and "the fastest so far" in lines[0]


def test_a_build_is_searched_with_no_more_than_it_needs(items, held_out):
    """One leaf fewer misses the goal on the queries that chose."""
    index = tune_search(ScannIndex.build(items, TREE), held_out, recall=0.9, batch=32, timing=QUICK)
    leaves = round(index.config.leaf_share * index.num_leaves)
    assert 1 < leaves < index.num_leaves
    choosing, _ = held_out.halves()
    fewer = index.searched_with(dataclasses.replace(index.config, leaf_share=(leaves - 1) / index.num_leaves))
    assert choosing.recall(fewer) < choosing.recall(index)


def test_a_higher_target_costs_more_leaves_or_more_exact_scores(items, held_out):
    built = ScannIndex.build(items, TREE)
    low, high = (tune_search(built, held_out, recall=recall, batch=32, timing=QUICK).config for recall in (0.7, 0.98))
    assert high.leaf_share > low.leaf_share or high.min_reorder > low.min_reorder
    assert high.measured is not None and high.measured.recall >= 0.98


def test_what_was_measured_and_the_answers_survive_the_folder(tuned, queries, tmp_path):
    tuned.index.save(tmp_path)
    loaded = load_index(tmp_path)
    assert isinstance(loaded, ScannIndex)
    assert loaded.config == tuned.index.config
    (found, scores), (expected, expected_scores) = loaded.search(queries, K), tuned.index.search(queries, K)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)  # by SOAR two searches of one index differ in the last bits


def test_a_tuned_config_builds_another_index_like_it(items, tuned, held_out):
    assert held_out.recall(ScannIndex.build(items, tuned.index.config)) >= 0.85


def test_autopilot_can_be_built_saved_and_searched(items, held_out, tmp_path):
    index = ScannIndex.build(items, dataclasses.replace(TREE, autopilot=True))
    assert held_out.recall(index) >= 0.9
    index.save(tmp_path)
    np.testing.assert_array_equal(load_index(tmp_path).search(held_out.queries, K)[0], index.search(held_out.queries, K)[0])


def test_confirming_queries_may_be_harder_than_those_that_choose(items):
    """Even rows are copies of one query and need few leaves; odd rows need many."""
    queries = hard_queries(200, WIDTH, seed=0)
    queries[::2] = queries[0]
    uneven = HeldOut.of(items, queries, K)
    index = tune_search(ScannIndex.build(items, TREE), uneven, recall=0.95, batch=32, timing=QUICK)
    choosing, confirming = uneven.halves()
    assert choosing.recall(index) >= 0.95 and confirming.recall(index) >= 0.95


def test_a_target_out_of_reach_says_what_was_reached_and_what_to_do(items, queries, monkeypatch):
    monkeypatch.setattr(tuning, "_REORDER_FACTORS", (1.0,))  # so that codes alone choose the five
    with pytest.raises(UserError, match=r"recall@5 of 1 was not reached: 0\.\d+ is the most.*build_index\(vectors, 'exact'\)"):
        tune_scann(items, queries, 5, recall=1.0, batch=32, candidates=[TREE], timing=QUICK)


@pytest.mark.parametrize(
    ("count", "recall", "batch", "message"),
    [
        (31, 0.9, 1, "got 31 held-out queries"),
        (40, 0.0, 1, "got recall 0 and batch 1"),
        (40, 1.1, 1, "got recall 1.1"),
        (40, 0.9, 0, "batch 0"),
    ],
)
def test_bad_settings_raise(items, queries, count, recall, batch, message):
    with pytest.raises(UserError, match=message):
        tune_scann(items, queries[:count], K, recall=recall, batch=batch, candidates=[ScannConfig()], timing=QUICK)


def test_candidates_of_a_small_catalogue_are_one_and_of_a_large_one_all_have_a_partition():
    assert candidates_for(1000) == (ScannConfig(),)
    assert any(candidate.tree_items >= 20_000 for candidate in candidates_for(20_000))
    large = candidates_for(1_000_000)
    assert all(candidate.tree_items == 0 for candidate in large)
    assert {candidate.leaves_per_root for candidate in large} == {0.5, 1.0, 2.0}


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_any_number_of_threads_keeps_recall_also_from_a_folder(items, held_out, tmp_path, threads):
    index = ScannIndex.build(items, dataclasses.replace(TREE, leaf_share=1.0, threads=threads))
    assert index.threads == threads
    index.save(tmp_path)
    for same in (index, load_index(tmp_path)):
        assert isinstance(same, ScannIndex) and same.threads == threads
        assert held_out.recall(same) >= 0.95


@pytest.mark.parametrize(
    "wrong",
    [
        {"brute_force_items": -1},
        {"tree_items": -1},
        {"leaves_per_root": 0.0},
        {"soar_lambda": -1.5},
        {"quantisation_threshold": 1.0},
        {"leaf_share": -3.0},
        {"leaf_share": 1.1},
        {"leaf_share": float("nan")},
        {"reorder_factor": 0.5},
        {"min_reorder": 0},
        {"oversampling": 0},
        {"rebuild_share": -0.1},
        {"threads": 0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_raise(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=rf"ScannConfig does not fit: {name} is {value}, expected .+\.$"):
        ScannConfig(**wrong)


def test_all_wrong_settings_are_told_at_once():
    with pytest.raises(
        UserError, match=r"leaf_share is 0\.0, expected above 0 and at most 1; oversampling is 0, expected at least 1"
    ):
        ScannConfig(leaf_share=0.0, oversampling=0)


def test_the_overhead_is_the_time_of_the_search_minus_that_of_scann(items, queries):
    index = ScannIndex.build(items, TREE)
    for batch in (1, 64):
        each = adapter_overhead(index, queries, K, batch, timing=QUICK)
        assert each.batch == batch
        assert set(each.measurement.rates) == {ADAPTER, RAW}
        assert each.share == pytest.approx(1.0 / each.measurement.ratio(ADAPTER, RAW).median - 1.0)
        assert each.added_us == pytest.approx(each.share * each.raw_us)
    with pytest.raises(UserError, match="got 200 queries for batches of"):
        adapter_overhead(index, queries, K, 256, timing=QUICK)
