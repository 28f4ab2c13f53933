"""Which index is chosen: by interpolated times, among what can be had and reaches the recall; and what is said of it."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.bench.retrieval_data import hard_items, hard_queries
from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval import (
    ExactIndex,
    IndexTime,
    IndexTimes,
    PartitionedConfig,
    ScannConfig,
    ScannIndex,
    build_index,
    choice,
    choose_index,
    load_index,
    mean_recall,
    measured_times,
    scann_available,
)

needs_scann = pytest.mark.skipif(not scann_available(), reason="ScaNN is not installed here")
MILLION = Path(__file__).resolve().parents[2] / "experiments" / "results" / "retrieval-hard-1m-avx2.json"
PROVENANCE = {"cores": 2, "devices": ["cpu"]}


def row(way, num_items, call_ms, recall=1.0, **settings) -> IndexTime:
    return IndexTime(way=way, num_items=num_items, recall=recall, call_ms=call_ms, **settings)


TIMES = IndexTimes(
    backend="cpu",
    instructions="AVX2",
    width=64,
    k=100,
    batches=(1, 100),
    rows=(
        row("exact", 100, (1.0, 10.0)),
        row("exact", 10_000, (100.0, 1000.0)),
        row("exact by XLA", 100, (2.0, 20.0)),
        row("exact by XLA", 10_000, (200.0, 2000.0)),
        row("quantised", 100, (0.95, 40.0)),
        row("quantised", 10_000, (25.0, 4000.0)),
        row("scann", 100, (0.9, 90.0), 0.9, reordered=150),
        row("scann", 10_000, (5.0, 500.0), 0.9, leaf_share=0.2, reordered=300),
        row("scann", 100, (0.95, 95.0), 0.99, reordered=200),
        row("scann", 10_000, (9.0, 2000.0), 0.99, leaf_share=0.5, reordered=400),
        row("partitioned", 100, (50.0, 500.0), 0.9, leaf_share=1.0),
        row("partitioned", 10_000, (50.0, 100.0), 0.9, leaf_share=0.4),
    ),
    provenance=PROVENANCE,
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table above, on the machine of its times, which has everything."""
    monkeypatch.setattr(choice, "vector_instructions", lambda: "AVX2")
    monkeypatch.setattr(choice, "measured_times", {"cpu": TIMES}.get)
    monkeypatch.setattr(choice, "scann_available", lambda: True)
    monkeypatch.setattr(choice, "native_problem", lambda: None)


@pytest.mark.usefixtures("table")
def test_times_are_interpolated_in_the_logarithms_of_size_and_batch():
    chosen = choose_index(1000, recall=1.0)
    assert chosen.implementation == "quantised" and chosen.config is None
    assert "quantised: about 4.87 ms for one query over 1,000 items, at a recall@100 of 1; exact 10 ms" in chosen.reason
    assert "measured on cpu (2 cores with AVX2), width 64, at 100 and 10,000 items" in chosen.reason and not chosen.missing
    chosen = choose_index(10_000, batch=10, recall=1.0)
    assert "exact: about 316 ms" in chosen.reason and "; quantised 316 ms" in chosen.reason


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("num_items", "batch", "recall", "expected"),
    [
        (100, 1, 0.9, "quantised"),  # exact search is not
        (100, 1, 0.99, "exact"),  # quantised and ScaNN are faster by less than a tenth
        (100, 1, 1.0, "exact"),
        (10_000, 1, 1.0, "quantised"),
        (10_000, 1, 0.999, "quantised"),
        (10_000, 1, 0.95, "scann"),
        (10_000, 100, 0.99, "exact"),
        (10_000, 100, 0.9, "partitioned"),
        (10_000, 100, 0.5, "partitioned"),
    ],
)
def test_the_fastest_that_reaches_the_recall_is_chosen_and_the_simplest_of_equals(num_items, batch, recall, expected):
    assert choose_index(num_items, batch=batch, recall=recall).implementation == expected


@pytest.mark.usefixtures("table")
def test_settings_are_the_wider_ones_of_the_two_sizes_around():
    assert choose_index(10_000, recall=0.9).config == ScannConfig(leaf_share=0.2, reorder_factor=3.0, min_reorder=300)
    assert choose_index(9000, recall=0.95).config == ScannConfig(leaf_share=0.5, reorder_factor=4.0, min_reorder=400)
    assert choose_index(9000, batch=100, recall=0.9).config == PartitionedConfig(exact_items=0, leaf_share=1.0)


@pytest.mark.usefixtures("table")
def test_above_what_was_measured_scans_take_longer_in_proportion_and_the_reason_says_so():
    chosen = choose_index(10**6, batch=5000, recall=1.0)
    expected = 1000.0 * 100 * 50
    assert f"exact: about {expected:,.0f} ms for 5,000 queries over 1,000,000 items, at a recall@100 of 1;" in chosen.reason
    assert "at 10,000 items, the largest size, from which times were extrapolated: of scans in proportion" in chosen.reason
    assert "trees" not in chosen.reason, "none of them finds all"
    assert "the largest batch measured is 100, and the time in proportion" in chosen.reason
    assert ", quantised 2,500 ms, " in choose_index(10**6, recall=0.9).reason


@pytest.mark.usefixtures("table")
def test_above_what_was_measured_trees_take_longer_by_their_growth_and_recall_is_not_measured():
    chosen = choose_index(40_000, batch=100, recall=0.9)
    assert "partitioned: about 100 ms" in chosen.reason, "it was faster at 10,000 items than at 100, which is no growth"
    assert "with its recall@100 not measured there, but 0.9 at 10,000 items" in chosen.reason
    assert "of scans in proportion to the items and of trees by their growth from 100 items on" in chosen.reason
    assert "scann 2,000 ms" in chosen.reason, "without a tree at 100 items: in proportion"


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("before_ms", "expected_ms"), [(1.0, 25.0), (0.1, 45.0)], ids=["root", "at most in proportion"])
def test_a_tree_grows_by_the_power_of_the_size_between_the_two_largest(before_ms, expected_ms, monkeypatch):
    """5 ms at 10,000 items; from 1 ms at 400 on by the root of the size, to 25 times as many items."""
    sizes = (row("exact", 400, (4.0, 4.0)), row("exact", 10_000, (100.0, 100.0)))
    trees = [row("scann", size, (ms, ms), 0.9, leaf_share=0.2, reordered=150) for size, ms in ((400, before_ms), (10_000, 5.0))]
    times = dataclasses.replace(TIMES, rows=(*sizes, *trees))
    monkeypatch.setattr(choice, "measured_times", {"cpu": times}.get)
    num_items = 250_000 if expected_ms == 25.0 else 90_000
    assert f"scann: about {expected_ms:g} ms for one query" in choose_index(num_items, recall=0.9).reason


@pytest.mark.usefixtures("table")
def test_below_what_was_measured_the_nearest_size_counts_and_the_reason_says_so():
    chosen = choose_index(50, recall=0.9)
    assert "quantised: about 0.95 ms for one query over 50 items, at a recall@100 of 0.9" in chosen.reason
    assert "at 100 items, the nearest size, whose times these are" in chosen.reason


@pytest.mark.usefixtures("table")
def test_what_cannot_be_had_is_left_out_and_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(choice, "scann_available", lambda: False)
    chosen = choose_index(10_000, recall=0.9)
    assert chosen.implementation == "quantised" and "ScaNN is not installed" in chosen.reason and len(chosen.missing) == 1
    monkeypatch.setattr(choice, "native_problem", lambda: "no compiler")
    chosen = choose_index(10_000, recall=0.99)
    assert chosen.implementation == "exact" and "exact by XLA: about 200 ms" in chosen.reason
    assert "quantised" not in chosen.reason and "(no compiler)" in chosen.reason and len(chosen.missing) == 3


@pytest.mark.usefixtures("table")
def test_on_a_backend_without_measurements_the_rule_is_told():
    chosen = choose_index(10**6, backend="tpu")
    assert (chosen.implementation, chosen.config) == ("exact", None)
    assert "nothing has been measured on tpu" in chosen.reason and "cda4rec bench retrieval --items" in chosen.reason


@pytest.mark.usefixtures("table")
def test_the_reason_says_where_the_machine_was_not_quiet_if_the_times_rest_on_it(monkeypatch):
    disturbed = dataclasses.replace(TIMES, disturbed=((100, 1), (10_000, 1), (10_000, 100)))
    monkeypatch.setattr(choice, "measured_times", {"cpu": disturbed}.get)
    assert "the machine was not quiet for 1 of 100 and 1 of 10,000 items" in choose_index(1000).reason
    assert "the machine was not quiet for 1 of 10,000 and 100 of 10,000 items" in choose_index(10**6, batch=10).reason
    assert "not quiet" not in choose_index(100, batch=100).reason


def test_a_table_is_saved_and_loaded(tmp_path):
    times = dataclasses.replace(TIMES, disturbed=((100, 1), (10_000, 100)))
    assert IndexTimes.load(times.save(tmp_path)) == times
    assert (tmp_path / "times_cpu_avx2.json").read_text().count("num_items") == len(TIMES.rows)


@pytest.mark.usefixtures("table")
def test_times_of_other_instructions_are_named_as_such(monkeypatch):
    monkeypatch.setattr(choice, "vector_instructions", lambda: "aarch64")
    assert "(2 cores with AVX2, while this machine has aarch64)" in choose_index(1000).reason


@pytest.mark.parametrize("here", ["AVX-512", "AVX2", "aarch64"])
def test_the_committed_tables_have_exact_search_and_scann_at_every_size(here, monkeypatch):
    monkeypatch.setattr(choice, "vector_instructions", lambda: here)
    times = measured_times.__wrapped__("cpu")
    assert times is not None and times.instructions == ("AVX2" if here == "aarch64" else here)
    assert times.provenance["commit"] and times.provenance["versions"]["scann"]
    assert bool(times.disturbed) != times.provenance["quiet"]
    assert all(size in times.sizes and batch in times.batches for size, batch in times.disturbed)
    for size in times.sizes:
        ways = {one.way for one in times.rows if one.num_items == size}
        assert {"exact", "exact by XLA", "quantised", "scann"} <= ways
    for one in times.rows:
        assert len(one.call_ms) == len(times.batches) and min(one.call_ms) > 0
        has_tree = one.way == "partitioned" or (one.way == "scann" and one.num_items > ScannConfig().tree_items)
        assert (one.leaf_share is not None) == has_tree


def test_what_is_extrapolated_to_a_million_items_is_near_what_was_measured_there(monkeypatch):
    monkeypatch.setattr(choice, "vector_instructions", lambda: "AVX2")
    times, searches = measured_times.__wrapped__("cpu"), json.loads(MILLION.read_text(encoding="utf-8"))["searches"]
    assert times is not None and times.sizes[-1] < 10**6 and {one["batch"] for one in searches} == {1, 256}
    for one in searches:
        assert one["num_items"] == 10**6
        ways: tuple[tuple[choice.Way, str, str], ...] = (
            ("exact", "ours, exact", ""),
            ("quantised", "ours, quantised", ""),
            ("scann", "ours, scann tuned", "for 0.955"),
        )
        for way, system, setting in ways:
            (found,) = [row for row in one["systems"] if row["system"] == system and row["setting"].startswith(setting)]
            offer = choice._offer(times, way, 10**6, one["batch"], 0.95)
            assert offer is not None and 0.7 < offer.call_ms / found["latency"]["p50_ms"] < 1.4, (way, one["batch"])


@needs_scann
@pytest.mark.parametrize("num_items", [3000, 30_000])
def test_what_is_chosen_between_measured_sizes_reaches_its_recall(num_items):
    """On vectors without clusters, as the table was measured on."""
    vectors, queries = hard_items(num_items, 64), hard_queries(256, 64)
    index = build_index(vectors, recall=0.95)
    assert isinstance(index, ScannIndex) and index.config == choose_index(num_items, recall=0.95).config
    exact, _ = ExactIndex.build(vectors).search(queries, 100)
    assert mean_recall(index.search(queries, 100)[0], exact) > 0.94


@pytest.mark.usefixtures("table")
def test_none_builds_what_is_chosen_and_logs_why(caplog):
    vectors = hard_items(100, 64)
    with caplog.at_level(logging.INFO):
        assert build_index(vectors, recall=1.0).implementation == "exact"
        assert build_index(vectors, batch=100, recall=0.9).implementation == "exact"
    assert caplog.messages[0].startswith("index: exact: about 1 ms for one query over 100 items, at a recall@100 of 1")
    assert caplog.messages[1].startswith("index: exact: about 10 ms for 100 queries over 100 items, at a recall@100 of 0.9")


@pytest.mark.parametrize("wrong", [{"num_items": 0}, {"batch": 0}, {"recall": 0.0}, {"recall": 1.5}])
def test_what_makes_no_sense_raises(wrong):
    with pytest.raises(UserError, match="expected at least 1 item"):
        choose_index(**({"num_items": 10} | wrong))


def test_a_quantised_folder_serves_exactly_where_codes_cannot_be_searched(tmp_path, monkeypatch, caplog):
    vectors, queries = hard_items(50, 64), hard_queries(3, 64)
    ExactIndex.build(vectors).save(tmp_path)
    (tmp_path / "index.json").write_text((tmp_path / "index.json").read_text().replace('"exact"', '"quantised"'))
    monkeypatch.setattr("cda4rec_jax.kernels.topk_dot.quantised.native_problem", lambda: "no compiler")
    index = load_index(tmp_path)
    assert index.implementation == "exact" and "no compiler" in caplog.text
    np.testing.assert_array_equal(index.search(queries, 5)[0], ExactIndex.build(vectors).search(queries, 5)[0])
    with pytest.raises(UserError, match="no compiler"):
        load_index(tmp_path, "quantised")
