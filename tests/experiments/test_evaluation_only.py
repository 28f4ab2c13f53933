"""Experiments that train nothing beyond the system and its rivals, on a tiny run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cda4rec_jax.errors import UserError

Scripts = Callable[[str], ModuleType]


def stored(folder: Path, stem: str) -> dict[str, Any]:
    """The result, after a look at the files beside it."""
    result = json.loads((folder / f"{stem}.json").read_text())
    assert {"question", "dataset", "protocol", "seeds", "provenance"} <= result.keys()
    assert result["question"] in (folder / f"{stem}.md").read_text()
    assert (folder / f"{stem}.png").stat().st_size > 10_000
    return result


def test_without_device_says_what_is_lost_in_every_condition(scripts: Scripts, options: Any, tmp_path: Path):
    scripts("without_device").main(options)
    result = stored(tmp_path, "without-device-synthetic")
    rows = [result["overall"], *result["by_history_length"], *result["by_staleness"]]
    assert result["overall"]["users"] == 100 == sum(row["users"] for row in result["by_history_length"])
    for row in rows:
        assert row["plan_without"].endswith("-skip") and row["plan_with"].endswith("-device")
        found = row["ndcg@10"]
        if not row["users"]:  # nobody's past is that long
            assert found["lost"] == {"mean": None, "low": None, "high": None, "users": 0}
            continue
        assert found["lost"]["mean"] == pytest.approx(found["with"]["mean"] - found["without"]["mean"])
    assert all(row["plan_with"].split("-")[0] in ("reuse", "local") for row in result["by_staleness"][1:])


def test_staleness_follows_the_age_of_the_clouds_view(scripts: Scripts, options: Any, work: Path, tmp_path: Path):
    scripts("staleness").main(options)
    result = stored(tmp_path, "staleness-synthetic")
    rows = result["rows"]
    assert [row["lag_events"] for row in rows] == [0, 1, 3, 5, 10]
    users = [row["users"] for row in rows]
    assert users == sorted(users, reverse=True) and {row["users_of_all_lags"]["users"] for row in rows} == {users[-1]}
    alone = {row["users_of_all_lags"]["ndcg@10"]["device"]["mean"] for row in rows}
    clouds = {row["users_of_all_lags"]["ndcg@10"]["cloud"]["mean"] for row in rows}
    assert len(alone) == 1 and len(clouds) > 1
    assert all(0 <= row["cloud_weight"] <= 1 and 0 < row["recall_of_pool"] <= 1 for row in rows)
    weights = result["bytes"]
    assert weights["catalogue_mb"] == pytest.approx(weights["record_bytes"] * result["num_items"] / 1e6)
    cells = {path: path.stat().st_mtime_ns for path in (work / "synthetic" / "cells").glob("*.npz")}
    scripts("staleness").main(options)  # again, from what is kept
    assert cells == {path: path.stat().st_mtime_ns for path in (work / "synthetic" / "cells").glob("*.npz")}
    for file in cells:
        if "mixture-age0" in file.name:
            assert np.load(file)["ranks"].min() >= 1


def test_cold_start_splits_users_by_target_and_by_history(scripts: Scripts, options: Any, tmp_path: Path):
    scripts("cold_start").main(options)
    result = stored(tmp_path, "cold-start-synthetic")
    for part in ("by_train_events_of_the_target", "by_history_length"):
        assert sum(group["users"] for group in result[part]) == 100
        means = [(group["users"], group["ndcg@10"]["popularity"]["mean"]) for group in result[part] if group["users"]]
        whole = sum(users * mean for users, mean in means) / 100
        assert whole == pytest.approx(result["overall"]["ndcg@10"]["popularity"]["mean"])
    found = result["overall"]["ndcg@10"]
    assert found["minus_sasrec_ce"]["mean"] == pytest.approx(found["cda4rec"]["mean"] - found["sasrec-ce"]["mean"])


def test_model_sizes_report_accuracy_milliseconds_and_bytes(scripts: Scripts, options: Any, tmp_path: Path):
    scripts("model_sizes").main(options, cloud_widths=(16,), device_widths=(8,))
    (row,) = stored(tmp_path, "model-sizes-synthetic")["rows"]
    assert 0 < row["ndcg@10"]["fused"]["mean"] < 1 and row["ndcg@10"]["fused_minus_reference"]["mean"] == 0.0
    late, all_users = row["ndcg@10"]["lagging"], row["ndcg@10"]["fused"]
    assert (
        0 < late["users"] <= all_users["users"]
        and 0 < late["mean"] < 1
        and row["ndcg@10"]["lagging_minus_reference"]["mean"] == 0.0
    )
    assert all(value > 0 for value in (*row["ms"].values(), *row["bytes"].values()))
    assert row["ms"]["longest_path"] <= row["ms"]["cloud"] + row["ms"]["device"]


def test_a_given_run_is_taken_as_the_system(scripts: Scripts, options: Any, tiny_run: Path, tmp_path: Path):
    of_data = scripts("harness").Study(options)
    of_run = scripts("harness").Study(replace(options, data=None, run=tiny_run, work=tmp_path))
    assert of_run.run_path("cda4rec", 0) == tiny_run.resolve() and of_run.folder.parent.parent == tmp_path
    assert of_run.config == of_data.config and of_run.interactions.fingerprint == of_data.interactions.fingerprint
    ranks = [study.test_ranks("fresh-full-100-device")[0] for study in (of_data, of_run)]
    np.testing.assert_array_equal(*ranks)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": None}, "--data"),
        ({"run": Path("somewhere")}, "--data"),
        ({"seeds": 0}, "at least 1 seed"),
        ({"users": 1}, "at least 2 users"),
        ({"data": None, "run": Path("nowhere")}, "no run at"),
    ],
)
def test_options_that_make_no_sense_are_refused(scripts: Scripts, options: Any, changed: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        scripts("harness").Study(replace(options, **changed))


def test_widths_that_heads_do_not_divide_are_refused_before_anything_is_trained(scripts: Scripts, options: Any):
    with pytest.raises(UserError, match="cloud width 18"):
        scripts("model_sizes").main(options, cloud_widths=(18,), device_widths=(8,))
