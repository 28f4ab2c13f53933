"""The replay on a tiny run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cda4rec_jax.data import load_prepared
from cda4rec_jax.errors import UserError

Scripts = Callable[[str], ModuleType]
STEPS = 3


def test_replay_holds_schedulers_against_each_other_at_equal_calls(
    scripts: Scripts,
    options: Any,
    work: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refits: list[dict[str, Any]],
):
    replay, trained_on = scripts("replay"), []

    def train(source: str, config: Any, path: Path, console: Any) -> None:  # a run that saw all events stands in
        trained_on.append((load_prepared(source), config))
        shutil.copytree(tiny_run, path)

    monkeypatch.setattr(replay, "train_resumed", train)
    found = replay.main(replace(options, users=40), steps=STEPS, draws=1, shares=(0.5,))
    result = json.loads((tmp_path / "replay-synthetic.json").read_text())
    assert (
        result["rows"] == json.loads(json.dumps(found["rows"]))
        and result["question"] in (tmp_path / "replay-synthetic.md").read_text()
    )
    assert (tmp_path / "replay-synthetic.png").stat().st_size > 10_000

    ((data, config),) = trained_on
    whole = load_prepared(work / "synthetic" / "data")
    lengths, kept = np.diff(whole.offsets), np.diff(data.offsets)
    np.testing.assert_array_equal(lengths - kept, np.where(lengths >= STEPS + 5, STEPS, 0))
    assert config.k_core == 1 and data.item_ids == whole.item_ids and result["requests_held_out_from_training"] == STEPS

    rows = {(row["scheduler"], row["asked_share"]): row for row in result["rows"]}
    always, never = rows["always-cloud", None], rows["never", None]
    assert always["share_of_calls"] == 1 and never["calls"] == 0 and always["relative"]["hit_rate@10"]["mean"] == 0
    for row in rows.values():
        assert row["relative"]["hit_rate@10"]["mean"] == pytest.approx(row["hit_rate@10"] / always["hit_rate@10"] - 1)
    assert rows["evenly spaced", 0.5]["share_of_calls"] == pytest.approx(0.5, abs=0.15)
    for row in result["at_budget"]:
        assert row["relative"]["mean"] == pytest.approx(rows[row["scheduler"], 0.3]["relative"]["hit_rate@10"]["mean"])
        others = {name: rows[name, 0.3]["hit_rate@10"] for name in ("evenly spaced", "random")}
        for name, hits in others.items():
            assert row[f"minus {name}"]["mean"] == pytest.approx(rows[row["scheduler"], 0.3]["hit_rate@10"] - hits)
    assert [row["age_events"] for row in result["by_age_of_the_cache"]] == [1, 2, 3]
    assert result["resident_items"] == 100 and "100 most popular items" in replay.page(result) and not refits

    replay.main(replace(options, users=40), steps=STEPS, draws=1, shares=(0.5,), resident_items=120)
    (refit,) = refits
    assert refit["system"] == replace(config.system, resident_items=120) and "before-last-3" in str(refit["path"])
    assert (tmp_path / "replay-synthetic-resident-120.json").exists() and len(trained_on) == 1


def test_bad_settings_of_a_replay_are_refused_before_anything_is_trained(scripts: Scripts, options: Any):
    for setting, message in (
        ({"steps": 1}, "at least 2 steps"),
        ({"shares": (1.0,)}, "shares in 0..1"),
        ({"steps": 500}, "fewer --steps"),
        ({"resident_items": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            scripts("replay").main(options, **setting)
