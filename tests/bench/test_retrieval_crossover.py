"""Indices against each other by size: every way is measured at the recall that was wanted, and verdict and table follow."""

import io
import json
from functools import partial
from typing import Any

import pytest
from rich.console import Console

from cda4rec_jax.bench import bench_retrieval, retrieval_ways
from cda4rec_jax.bench.harness import OtherLoad
from cda4rec_jax.bench.retrieval_crossover import CrossoverBenchmark, CrossoverPoint, bench_crossover
from cda4rec_jax.bench.retrieval_ways import APPROXIMATE, Searched
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.processor import vector_instructions
from cda4rec_jax.retrieval import IndexTimes, scann_available, tune_search
from cda4rec_jax.timing import Comparison, Measurement, Spread, TimingConfig

QUICK = TimingConfig(rounds=3, block_seconds=0.001, warm_up_turns=2, attempts=1)
PARTITIONED = "partitioned .90"


def way(name: Any, wanted: float, **settings) -> Searched:
    return Searched(way=name, wanted=wanted, recall=wanted, build_seconds=1.0, search=lambda rows: rows, **settings)


def point(num_items: int, p10: float, batch: int = 1) -> CrossoverPoint:
    ratio = Comparison(name=PARTITIONED, other="exact", ratio=Spread(median=p10 + 0.1, p10=p10, p90=p10 + 0.2))
    rates = {"exact": Spread(median=500.0, p10=400.0, p90=600.0), PARTITIONED: Spread(median=250.0, p10=200.0, p90=300.0)}
    measurement = Measurement(
        rounds=3,
        attempts=1,
        rates=rates,
        warm=dict.fromkeys(rates, True),
        comparisons=(ratio,),
        nulls={PARTITIONED: 1.0},
        null_bounds=(0.95, 1.05),
    )
    ways = (way("exact", 1.0), way("partitioned", 0.9, leaf_share=0.25))
    told: dict[str, Any] = {"first_call_seconds": {}, "latency": {}, "others": OtherLoad()}
    return CrossoverPoint(num_items=num_items, batch=batch, ways=ways, measurement=measurement, **told)


def test_the_crossover_is_the_size_from_which_on_no_measurement_was_lost():
    points = (point(10, 1.2), point(20, 0.9), point(40, 1.1), point(80, 1.5), point(10, 1.5, 4), point(20, 0.99, 4))
    found = CrossoverBenchmark(backend="cpu", device="cpu", width=24, k=5, points=points, provenance={})
    assert found.names == ["exact", PARTITIONED]
    assert found.crossovers(1) == {PARTITIONED: 40} and found.crossovers(4) == {PARTITIONED: None}
    assert found.points[0].calls_ms == {"exact": 2.0, PARTITIONED: 4.0}
    assert found._verdict(1) == f"beats exact search in batches of 1: {PARTITIONED} from 40 items on"


def test_the_table_has_a_row_for_each_way_and_size_with_the_times_of_all_batches():
    points = (point(10, 1.2), point(20, 1.2), point(10, 1.2, 4), point(20, 1.2, 4))
    times = CrossoverBenchmark(backend="cpu", device="cpu", width=24, k=5, points=points, provenance={"cores": 1}).times()
    assert (times.batches, times.sizes, times.k) == ((1, 4), [10, 20], 5)
    assert [(row.way, row.num_items, row.recall, row.call_ms, row.leaf_share) for row in times.rows[:2]] == [
        ("exact", 10, 1.0, (2.0, 2.0), None),
        ("partitioned", 10, 0.9, (4.0, 4.0), 0.25),
    ]
    assert len(times.rows) == 4 and times.provenance == {"cores": 1, "quiet": True}


def test_every_way_is_measured_at_its_recall_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval_ways, "tune_search", partial(tune_search, timing=QUICK))
    sections: dict[str, Any] = {"items": (), "exact": False, "sizes": (), "peers": ()}
    result = bench_retrieval(**sections, crossover=(600,), batches=(1, 8), k=10, timing=QUICK, out=tmp_path).crossover
    assert result is not None
    written = json.loads((tmp_path / "retrieval-crossover.json").read_text())
    assert not (tmp_path / "retrieval-hard.json").exists()
    assert [(one["num_items"], one["batch"]) for one in written["points"]] == [(600, 1), (600, 8)]
    assert set(written["points"][0]["ways"]) == set(result.names)
    for row in (row for one in written["points"] for row in one["ways"].values()):
        assert row["threads"] > 0 and row["version"].startswith("jax ") and row["first_call_seconds"] > 0
        assert 0 < row["latency"]["p50_ms"] <= row["latency"]["p95_ms"] <= row["latency"]["p99_ms"]
    (file,) = tmp_path.glob("times_cpu_*.json")
    times = IndexTimes.load(file)
    assert times.instructions == vector_instructions() and times == result.times()
    ways = {"exact by XLA", "partitioned"}
    ways |= {"scann"} if scann_available() else set()
    ways |= {"exact", "quantised"} if native_problem() is None else set()
    assert {row.way for row in times.rows} == ways
    for one in result.points:
        assert {each.way for each in one.ways} == ways | {APPROXIMATE}
        for each in one.ways:
            assert each.recall >= each.wanted and each.name in one.measurement.rates
    for row in times.rows:
        if row.way == "partitioned":
            assert (row.leaf_share or 0.0) >= 256 / 600, "fewer leaves hold too few items, and all would be scored"
    console = Console(width=200, file=io.StringIO(), record=True)
    result.print(console)
    told = console.export_text()
    assert "top 10 of 64 dimensions" in told and "beats exact search in batches of 8: " in told and "3 rounds" in told


@pytest.mark.parametrize(
    "wrong", [{"sizes": ()}, {"sizes": (100,)}, {"batches": (0,)}, {"batches": (10_000,)}, {"recalls": (1.0,)}]
)
def test_what_cannot_be_measured_raises(wrong, tmp_path):
    with pytest.raises(UserError, match=r"expected more than k items|expected numbers between 0 and 1"):
        bench_crossover(**({"sizes": (1000,)} | wrong), timing=QUICK, out=tmp_path)
