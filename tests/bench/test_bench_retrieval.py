"""``cda4rec bench retrieval``: what it measures, what it writes, what it refuses, and the model of larger catalogues."""

import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cda4rec_jax.bench import peers, retrieval, retrieval_compared, retrieval_sizes, retrieval_systems, scale
from cda4rec_jax.bench.retrieval_compared import searched
from cda4rec_jax.bench.retrieval_sizes import MAPPED, in_its_own_process, measure_size
from cda4rec_jax.bench.retrieval_systems import (
    HNSWLIB,
    TUNED,
    IndexSearch,
    SearchSystem,
    built_systems,
    hard_data,
    makers,
    recall,
    systems_of,
    trained_data,
)
from cda4rec_jax.bench.scale import Check, Host, ScaleFound, ScaleModel, deployment
from cda4rec_jax.cli import main
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.retrieval import ExactIndex, RecallNotReached, ScannIndex, scann_available, tuning
from cda4rec_jax.timing import TimingConfig

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
FEW_ROUNDS = TimingConfig(rounds=3, block_seconds=1e-6, warm_up_turns=2, attempts=1)
needs_compiler = pytest.mark.skipif(native_problem() is not None, reason="there is no C++ compiler here")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries and calls, small tables, and no processes."""
    monkeypatch.setattr(retrieval_systems, "NUM_QUERIES", 64)
    monkeypatch.setattr(retrieval_systems, "SCANN_SETTINGS", ((0.5, 10.0),))
    monkeypatch.setattr(retrieval_systems, "PARTITIONED_SHARES", (1.0,))
    for name in ("tune_scann", "tune_search"):
        monkeypatch.setattr(retrieval_systems, name, partial(getattr(tuning, name), timing=FEW_ROUNDS))
    monkeypatch.setattr(retrieval, "EXACT_SHAPES", ((300, 16, 4.0),))
    monkeypatch.setattr(retrieval_compared, "CALLS", 20)
    monkeypatch.setattr(retrieval_sizes, "CALLS", 20)
    monkeypatch.setattr(retrieval_sizes, "in_its_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(scale, "IN_CACHE", (512, 1024))
    monkeypatch.setattr(scale, "READ_BYTES", 1 << 16)


@needs_compiler
def test_the_command_measures_and_writes_json_and_charts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "installed", lambda peer: peer == "numpy")
    monkeypatch.setattr("cda4rec_jax.timing.TimingConfig", lambda rounds: dataclasses.replace(FEW_ROUNDS, rounds=rounds))
    flags = ("--items", 300, "--batches", 1, 16, "--k", 10, "--sizes", 200, 400, "--rounds", 3, "--out", tmp_path)
    assert main(["bench", "retrieval", *map(str, flags)]) == 0
    told = capsys.readouterr().out
    assert "not installed: faiss, hnswlib, usearch, pynndescent, torch" in told and "aim: 4.0 times" in told
    found = json.loads((tmp_path / "retrieval-hard.json").read_text())
    assert [(one["num_items"], one["batch"], one["target"]) for one in found["searches"]] == [
        (300, 1, None),
        (300, 16, None),
        (300, 16, 4.0),
    ]
    for one in found["searches"]:
        rows = {row["system"]: row for row in one["systems"]}
        assert {"ours, exact", "ours, quantised", "numpy"} <= set(rows)
        assert ("plain jax" in rows) == (one["target"] is not None)
        for row in rows.values():
            assert row["recall"] > 0.99 and row["threads"] > 0 and row["version"] and row["latency"]["p99_ms"] > 0
            assert row["first_call_seconds"] > 0
            assert row["queries_per_second"] == pytest.approx(1e3 * one["batch"] / row["latency"]["p50_ms"])
        others = [x["ratio"]["median"] for x in one["measurement"]["comparisons"] if not x["other"].startswith("ours")]
        assert one["least_ratio"] == min(others) and one["tuned_over_hnswlib"] is None, "hnswlib is not there"
        assert ("ours, partitioned" in rows) == (one["target"] is None)
        if scann_available() and one["target"] is None:
            assert "for 0.955 in batches of 16" in rows[TUNED]["setting"] and one["adapter"]["batch"] == one["batch"]
            assert "of ScaNN's own search" in told
            assert one["adapter"]["threads"] > 0 and "scann" in one["adapter"]["version"]
            assert all(calls["count"] >= 3 and calls["p99_ms"] > 0 for calls in one["adapter"]["latency"].values())
    points = found["sizes"]["points"]
    assert {(point["system"], point["num_items"]) for point in points if point["system"] == MAPPED} == {
        (MAPPED, 200),
        (MAPPED, 400),
    }
    assert all(point["latency"]["p50_ms"] > 0 and point["threads"] > 0 for point in points)
    mapped = next(point for point in points if (point["system"], point["num_items"]) == (MAPPED, 400))
    assert mapped["file_bytes"] > 400 * (64 + 4 * 64 + 13)
    assert [check["num_items"] for check in found["scale"]["checks"]] == [200, 400]
    assert {path.name for path in tmp_path.glob("*.png")} == {"retrieval-hard-300.png", "retrieval-sizes.png"}


def test_the_item_table_of_a_run_is_searched_with_its_users() -> None:
    data = trained_data(CHECKPOINT, 5)
    assert data.name == "synthetic" and data.fingerprint
    assert data.items.shape[1] == data.queries.shape[1] and len(data.queries) == 64
    assert len(np.unique(data.queries, axis=0)) > 32, "users differ"
    best = 1 + np.argmax(data.queries @ data.items[1:].T, axis=1)
    np.testing.assert_array_equal(data.truth[:, 0], best)


def test_tuning_queries_are_none_of_the_measured_ones() -> None:
    for data in (hard_data(200, 5), trained_data(CHECKPOINT, 5)):
        assert len(data.tuning) == len(data.queries) // 2 >= 32
        assert not (data.tuning[:, None] == data.queries[None]).all(axis=2).any(), data.name


def test_what_is_not_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_systems, "MOST_ITEMS", {"numpy": 150, retrieval_systems.PARTITIONED: 150})

    def not_reached(*arguments: Any, **options: Any) -> None:
        raise RecallNotReached(10, 0.955, 0.9)

    monkeypatch.setattr(retrieval_systems, "tune_scann", not_reached)
    systems, left_out = built_systems(hard_data(200, 10), 10, ("numpy",), 16, lambda done, total: None)
    assert left_out["numpy"].startswith("only up to 150 items") and retrieval_systems.PARTITIONED in left_out
    assert "ours, exact" in {one.system for one in systems} and "numpy" not in {one.system for one in systems}
    assert not scann_available() or "recall@10 of 0.955 was not reached" in left_out[TUNED]


def test_scann_tuned_is_held_against_hnswlib_even_where_another_of_ours_is_the_fastest() -> None:
    data = hard_data(200, 10)
    index = ScannIndex.build(data.items) if scann_available() else ExactIndex.build(data.items)

    def slow(queries: np.ndarray, seconds: float = 2e-3) -> np.ndarray:
        time.sleep(seconds)
        return data.truth[: len(queries)]

    def system(name: str, run: Callable[[np.ndarray], np.ndarray]) -> SearchSystem:
        is_ours = name.startswith("ours")
        return SearchSystem(system=name, setting="", version="1", is_ours=is_ours, recall=1.0, build_seconds=1.0, run=run)

    systems = [system("ours, exact", lambda queries: data.truth[: len(queries)]), system(HNSWLIB, slow)]
    # So much slower that no pause of a busy machine can turn the order round.
    systems.append(system("hnswlib, Euclidean", partial(slow, seconds=1e-1)))
    if scann_available():
        systems.append(system(TUNED, IndexSearch(index, 10)))
    found = searched(data, systems, 16, 10, 0.95, None, FEW_ROUNDS, lambda done, total: None, {"usearch": "too slow"})
    assert found.ours == "ours, exact" and found.least_ratio == found.measurement.ratio("ours, exact", HNSWLIB).median > 1.0
    assert found.json()["left_out"] == {"usearch": "too slow"}
    if scann_available():
        assert found.tuned_over_hnswlib == found.measurement.ratio(TUNED, HNSWLIB), "the faster of its graphs"
        assert found.adapter is not None
        assert found.json()["tuned_over_hnswlib"]["target"] == 1.5


def test_batches_hold_every_query_and_a_short_list_repeats() -> None:
    data = hard_data(200, 5)
    rows = np.concatenate(data.batches(16))
    np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(data.queries, axis=0))
    assert [one.shape for one in data.batches(100)] == [(100, 64)]


def brute_force(items: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries @ items.T), axis=1)[:, :k]


class FakeIndex:
    """An index of any of the peers, by brute force; it takes whatever a peer's index takes."""

    hnsw = SimpleNamespace()

    def __init__(self, *arguments: Any, **options: Any):
        self.items = arguments[0] if arguments and isinstance(arguments[0], np.ndarray) else np.zeros((0, 0))

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None

    def add_items(self, items: np.ndarray) -> None:
        self.items = items

    def knn_query(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, None]:
        return brute_force(self.items, queries, k), None

    def query(self, queries: np.ndarray, k: int, epsilon: float) -> tuple[np.ndarray, None]:
        unit = self.items / np.linalg.norm(self.items, axis=1, keepdims=True)
        return brute_force(unit, queries, k), None


class FakeFaissIndex(FakeIndex):
    def add(self, items: np.ndarray) -> None:
        self.items = items

    def search(self, queries: np.ndarray, k: int, params: Any = None) -> tuple[None, np.ndarray]:
        return None, brute_force(self.items, queries, k)


class FakeUsearchIndex(FakeIndex):
    def add(self, keys: np.ndarray, items: np.ndarray, threads: int) -> None:
        self.keys, self.items = keys, items

    def search(self, queries: np.ndarray, k: int, threads: int) -> Any:
        found = self.keys[brute_force(self.items, np.atleast_2d(queries), k)]
        return SimpleNamespace(keys=found[0] if queries.ndim == 1 else found)


def test_every_peer_gives_our_item_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers count from 0 and know no padding row; stand-ins search exactly, so any shift costs all recall."""
    fake_usearch = SimpleNamespace(index=SimpleNamespace(Index=FakeUsearchIndex))
    faiss = ("IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat", "SearchParametersIVF", "SearchParametersHNSW")
    fakes = {
        "faiss": SimpleNamespace(
            METRIC_INNER_PRODUCT=0, omp_set_num_threads=lambda count: None, **dict.fromkeys(faiss, FakeFaissIndex)
        ),
        "hnswlib": SimpleNamespace(Index=FakeIndex),
        "usearch": fake_usearch,
        "usearch.index": fake_usearch.index,
        "pynndescent": SimpleNamespace(NNDescent=FakeIndex),
    }
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("faiss", "hnswlib", "usearch", "pynndescent"):
        monkeypatch.delitem(sys.modules, f"cda4rec_jax.bench.peers.{name}_search", raising=False)
    monkeypatch.setattr(retrieval_systems, "version_of", lambda package: "stand-in")
    data = hard_data(400, 10)
    making = {name: made for name, made in makers(("faiss", "hnswlib", "usearch", "pynndescent", "numpy")).items() if made[0]}
    assert set(making) > {"faiss IVF", "faiss HNSW", "hnswlib", "hnswlib, Euclidean", "usearch", "pynndescent", "numpy"} - {
        "faiss flat"
    }
    del making["faiss flat"]  # its own module looks for the package on disk
    for name, (package, make) in making.items():
        for one in systems_of(name, package, make, data, 10, 1):
            assert one.recall > 0.99, one.name
            single = one.run(data.queries[:1])
            assert single.shape == (1, 10) and np.isin(single, data.truth[0]).mean() > 0.9, one.name


def test_recall_is_the_mean_share_of_the_exact_items() -> None:
    data = hard_data(200, 4)
    half = lambda queries: np.pad(data.truth[: len(queries), :2], ((0, 0), (0, 2)))  # noqa: E731
    assert recall(half, data) == 0.5


@needs_compiler
def test_a_size_is_measured_in_a_process_of_its_own() -> None:
    point = in_its_own_process(measure_size, MAPPED, 2000, 10)
    assert (point.system, point.num_items) == (MAPPED, 2000) and point.latency.count > 20
    if Path("/proc/self/status").is_file():
        assert 2000 * 64 < point.resident_bytes < point.peak_bytes


def test_the_model_by_hand() -> None:
    host = Host(name="h", cores=2, memory_bytes=1000, read_bytes_per_second=100.0)
    model = ScaleModel(bytes_per_item=10, overhead_ms=5.0, scanned_items_per_second=20.0)
    assert model.scan_ms(100, host, overlap=True) == 5.0 + 1e3 * 100 * 10 / 100.0, "bound by memory"
    slow = dataclasses.replace(model, scanned_items_per_second=2.0)
    assert slow.scan_ms(100, host, overlap=True) == 5.0 + 1e3 * 100 / 4.0, "bound by cores"
    assert model.scan_ms(100, host) == 5.0 + 1e3 * (10.0 + 2.5)
    assert model.shards(100, host, 5.0 + 1e5) == 2, "800 of 1,000 bytes are for the index"
    assert model.shards(100, host, 5.0 + 1250.0) == 10, "a tenth of 12.5 seconds"
    with pytest.raises(ValueError, match="leave nothing"):
        model.shards(100, host, 5.0)
    assert Check(num_items=1, measured_ms=4.0, roofline_ms=3.0, no_overlap_ms=5.0).errors == (-0.25, 0.25)


def test_a_deployment_meets_the_deadline_and_one_shard_needs_no_merge() -> None:
    model = ScaleModel(bytes_per_item=77, overhead_ms=0.1, scanned_items_per_second=1e8)
    host = Host(name="h", cores=4, memory_bytes=1 << 34, read_bytes_per_second=1e10)
    few, many = (deployment(model, host, num_items, 10) for num_items in (1_000_000, 1_000_000_000))
    assert few is not None and many is not None
    assert (few.shards, few.merge_ms) == (1, 0.0)
    assert many.shards > 100 and many.merge_ms > scale.ROUND_TRIP_MS
    assert many.query_ms <= scale.DEADLINE_MS + 1e-3, "scan and merge together"
    assert deployment(dataclasses.replace(model, overhead_ms=scale.DEADLINE_MS), host, 1_000_000, 10) is None
    assert many.memory_bytes_per_host <= scale.MEMORY_SHARE * host.memory_bytes


def test_the_bound_by_which_hosts_are_counted_is_told_with_the_errors_of_both() -> None:
    points = ((10, 4.0, 3.0, 5.0), (20, 4.0, 4.4, 8.0))
    checks = tuple(Check(num_items=n, measured_ms=m, roofline_ms=low, no_overlap_ms=high) for n, m, low, high in points)
    host = Host(name="h", cores=2, memory_bytes=1000, read_bytes_per_second=100.0)
    model = ScaleModel(bytes_per_item=10, overhead_ms=5.0, scanned_items_per_second=20.0)
    console = Console(width=200, file=io.StringIO(), record=True)
    ScaleFound(model=model, host=host, checks=checks, deployments=()).print(console)
    told = console.export_text()
    assert "without overlap, which is +25%, +100% off the measured points; the roofline is -25%, +10% off" in told


def test_bad_input_gets_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--peers", "annoy"), "choose from faiss, hnswlib, usearch, pynndescent, torch, numpy"),
        (("--batches", "0"), "expected positive numbers"),
        (("--items", "50"), "asked for 100 of 50 items"),
        (("--crossover", "50"), "expected more than k items"),
        (("--run", tmp_path / "none"), "none"),
    ):
        assert main(["bench", "retrieval", "--out", str(tmp_path / "out"), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in " ".join(error.split()) and "Traceback" not in error
    with pytest.raises(UserError, match="asked for 200 of 200"):
        hard_data(200, 200)
