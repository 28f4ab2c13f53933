"""Pooled differences are those of all users together, from what the tables of single datasets tell."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.metrics import paired_intervals

Scripts = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]


def test_pooled_interval_is_that_of_all_users_together(scripts: Scripts):
    pool, generator = scripts("pooled"), np.random.default_rng(0)
    samples = [generator.normal(mean, 1.0, size=(1, users, 1)) for mean, users in ((0.1, 4000), (-0.2, 900), (0.0, 300))]

    def interval(sample: np.ndarray) -> dict:
        (one,) = paired_intervals(sample, np.zeros_like(sample))
        return {"mean": one.mean_difference, "low": one.low, "high": one.high, "users": one.num_users}

    found = pool.pooled([interval(sample) for sample in samples], by_user=True)
    together = interval(np.concatenate(samples, axis=1))
    assert found["users"] == together["users"] == 5200
    assert found["mean"] == pytest.approx(together["mean"], abs=1e-12)
    assert [found["low"], found["high"]] == pytest.approx([together["low"], together["high"]], abs=0.003)  # of a width of .054
    alike = pool.pooled([interval(sample) for sample in samples], by_user=False)
    assert alike["mean"] == pytest.approx(np.mean([sample.mean() for sample in samples]), abs=1e-12)
    assert alike["high"] - alike["low"] > found["high"] - found["low"]  # as the smallest dataset weighs as much as the largest


def test_pools_the_tables_that_are_committed(scripts: Scripts, tmp_path: Path):
    result = scripts("pooled").main(out=tmp_path)
    assert json.loads((tmp_path / "pooled.json").read_text())["minus_sasrec_ce"] == result["minus_sasrec_ce"]
    table = json.loads((ROOT / "experiments" / "results" / "table-ml-100k.json").read_text())
    (row,) = [row for row in table["rows"] if row["system"] == "cda4rec"]
    of_table = row["minus_sasrec_ce"]["ndcg@10"]
    of_pool = result["minus_sasrec_ce"]["ml-100k"]["ndcg@10"]["cda4rec"]
    assert [of_pool[name] for name in ("mean", "low", "high")] == [of_table[name] for name in ("mean_difference", "low", "high")]
    assert "pooled, each user once" in (tmp_path / "pooled.md").read_text() and (tmp_path / "pooled.png").exists()


def test_tables_that_cannot_be_pooled_are_refused(scripts: Scripts, tmp_path: Path):
    pool = scripts("pooled")
    table = pool.TABLES[0]
    with pytest.raises(UserError, match="each of another dataset"):
        pool.main((table, table), tmp_path)
    with pytest.raises(UserError, match="each of another dataset"):
        pool.main((), tmp_path)
    with pytest.raises(UserError, match="no table that can be read"):
        pool.main((tmp_path / "absent.json",), tmp_path)
    lacking = json.loads(table.read_text())
    lacking["rows"] = [row for row in lacking["rows"] if row["system"] != "cda4rec"]
    (tmp_path / "table-lacking.json").write_text(json.dumps(lacking))
    with pytest.raises(UserError, match="does not compare cda4rec with sasrec-ce"):
        pool.main((tmp_path / "table-lacking.json",), tmp_path)
    assert not (tmp_path / "pooled.json").exists()
