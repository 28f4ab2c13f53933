"""From which size on the partitioned index pays: every system is measured at equal leaves, and the verdict follows from the ratios."""

import io
import json

import pytest
from rich.console import Console

from cda4rec_jax.bench.harness import OtherLoad
from cda4rec_jax.bench.retrieval_crossover import (
    APPROXIMATE,
    EXACT,
    PARTITIONED,
    SCANN,
    CrossoverBenchmark,
    CrossoverPoint,
    bench_crossover,
)
from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval import PartitionedConfig, scann_available
from cda4rec_jax.timing import Comparison, Measurement, Spread, TimingConfig

QUICK = TimingConfig(rounds=3, block_seconds=0.001, warm_up_turns=2, attempts=1)


def point(num_items: int, p10: float, batch: int = 1) -> CrossoverPoint:
    ratio = Comparison(name=PARTITIONED, other=EXACT, ratio=Spread(median=p10 + 0.1, p10=p10, p90=p10 + 0.2))
    rate = Spread(median=500.0, p10=400.0, p90=600.0)
    measurement = Measurement(
        rounds=3,
        attempts=1,
        rates={PARTITIONED: rate, EXACT: rate},
        warm={PARTITIONED: True, EXACT: True},
        comparisons=(ratio,),
        nulls={PARTITIONED: 1.0},
        null_bounds=(0.95, 1.05),
    )
    return CrossoverPoint(
        num_items=num_items,
        batch=batch,
        leaves=10,
        leaves_searched=3,
        reordered=60,
        build_seconds=1.0,
        recall={PARTITIONED: 0.96, EXACT: 1.0},
        measurement=measurement,
        others=OtherLoad(),
    )


def test_the_crossover_is_the_size_from_which_on_no_measurement_was_lost():
    points = (point(10, 1.2), point(20, 0.9), point(40, 1.1), point(80, 1.5), point(10, 1.5, 4), point(20, 0.99, 4))
    found = CrossoverBenchmark(device="cpu", width=24, k=5, target=0.95, points=points, provenance={})
    assert (found.crossover(1), found.crossover(4)) == (40, None)
    assert found.points[0].call_ms(PARTITIONED) == 2.0
    assert found.points[0].call_ms(SCANN) is None


def test_every_system_is_measured_and_written(tmp_path):
    config = PartitionedConfig(iterations=2, reorder_factor=3, min_reorder=30)
    result = bench_crossover((600,), batches=(1, 8), width=24, k=10, target=0.5, config=config, timing=QUICK, out=tmp_path)
    written = json.loads((tmp_path / "retrieval-crossover-cpu.json").read_text())
    assert written["points"][0]["leaves_searched"] < written["points"][0]["leaves"]
    assert [one["batch"] for one in written["points"]] == [1, 8]
    systems = {PARTITIONED, EXACT, APPROXIMATE} | ({SCANN} if scann_available() else set())
    for one in result.points:
        assert set(one.recall) == set(one.measurement.rates) == systems
        assert one.recall[EXACT] == 1.0 and one.recall[PARTITIONED] > 0.45
        assert one.reordered == 30
    console = Console(width=200, file=io.StringIO(), record=True)
    result.print(console)
    assert "recall@10 of 0.5 wanted" in console.export_text()


@pytest.mark.parametrize("wrong", [{"sizes": ()}, {"sizes": (100,)}, {"batches": (0,)}, {"batches": (10_000,)}, {"target": 0.0}])
def test_what_cannot_be_measured_raises(wrong, tmp_path):
    with pytest.raises(UserError, match="expected more than k items"):
        bench_crossover(**({"sizes": (1000,)} | wrong), timing=QUICK, out=tmp_path)
