"""Weeks of use on a tiny run that stands in for both versions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cda4rec_jax.data import load_prepared
from cda4rec_jax.data.synthetic import SyntheticConfig, synthetic_world
from cda4rec_jax.errors import UserError
from cda4rec_jax.planner import FixedPlan, plan_index
from cda4rec_jax.runs import RunDirectory

Scripts = Callable[[str], ModuleType]


def test_long_run_holds_a_frozen_policy_against_a_refreshed_one(
    scripts: Scripts, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    long_run, trained_on = scripts("long_run"), []

    def train(source: str, config: Any, path: Path, console: Any) -> None:
        trained_on.append(load_prepared(source))
        shutil.copytree(tiny_run, path)
        run = RunDirectory.open(path)
        statistics = run.load_arrays("statistics")
        statistics["train_counts"][:40] = 0  # items of which only the text is known
        run.save_arrays("statistics", statistics)

    refreshed = []

    def train_planner(examples: Any, world: Any, config: Any, policy: Any) -> SimpleNamespace:  # gives one that never calls
        refreshed.append(examples)
        return SimpleNamespace(policy=FixedPlan(plan_index("local-skip-skip")))

    monkeypatch.setattr(long_run, "train_resumed", train)
    monkeypatch.setattr(long_run, "train_planner", train_planner)
    options = long_run.Options(
        users=150,
        items=load_prepared(tiny_run / "data").num_items,  # of the tables of the run that stands in
        weeks=2,
        version_week=1,
        preset_name="tiny",
        refresh_steps=2,
        work=tmp_path,
        out=tmp_path,
    )
    long_run.main(options)
    result = json.loads((tmp_path / "long-run-synthetic.json").read_text())
    assert result["question"] in (tmp_path / "long-run-synthetic.md").read_text()
    assert (tmp_path / "long-run-synthetic.png").stat().st_size > 10_000
    first, second = result["weeks"]
    assert first["requests"] > 0 and first["cold_requests"] > 0
    for name, gain in first["gain"].items():
        assert gain["mean"] == 0, name  # both are the same policy in the first week
    assert first["frozen"]["refused"]["mean"] == 0
    assert second["refreshed weekly"]["calls"]["mean"] == 0 < second["frozen"]["calls"]["mean"]
    (examples,) = refreshed  # the last week's would serve nobody
    assert (
        examples.quality.shape[:2] == (2, first["requests"]) and (examples.context.cache_level <= examples.context.consent).all()
    )
    training, selecting = (set(examples.users[examples.selects == chosen]) for chosen in (False, True))
    assert training and selecting and not training & selecting
    for part in (first, second, result["all_weeks"], result["after_the_new_version"]):
        for name, gain in part["gain"].items():
            assert gain["mean"] == pytest.approx(part["refreshed weekly"][name]["mean"] - part["frozen"][name]["mean"], abs=1e-6)
        assert part["frozen"]["refused"]["mean"] <= part["frozen"]["repaired"]["mean"] <= part["frozen"]["calls"]["mean"] <= 1
    early, late = trained_on
    assert early.timestamps.max() < options.starts(0) <= late.timestamps.max() < options.starts(1)
    assert early.num_items == late.num_items and np.diff(early.offsets).min() >= 5


def test_what_happened_before_a_moment_keeps_items_and_whole_pasts(scripts: Scripts):
    long_run = scripts("long_run")
    data = synthetic_world(SyntheticConfig(num_users=60, num_items=80)).interactions
    moment = float(np.median(data.timestamps))
    found = long_run.events_before(data, moment)
    assert found.item_ids == data.item_ids and 2 <= found.num_users < data.num_users
    for place, user_id in enumerate(found.user_ids):
        user = data.user_ids.index(user_id)
        past = data.timestamps[data.offsets[user] : data.offsets[user + 1]] < moment
        np.testing.assert_array_equal(found.history(place), data.history(user)[past])
        assert all(values[place] == data.user_attributes[name][user] for name, values in found.user_attributes.items())
    with pytest.raises(UserError, match="later --first-week"):
        long_run.events_before(data, data.timestamps.min())


def test_weeks_that_make_no_sense_are_refused(scripts: Scripts):
    for setting in ({"weeks": 1}, {"version_week": 0}, {"version_week": 8}, {"refresh_steps": 0}):
        with pytest.raises(UserError, match="expected at least 2 weeks"):
            scripts("long_run").Options(**setting)
