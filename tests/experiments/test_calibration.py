"""Experiments on what a request takes and on what it gives away, on a tiny run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cda4rec_jax.metrics.system import summarise_latency
from cda4rec_jax.planner import PLANS
from cda4rec_jax.runs import provenance
from cda4rec_jax.runtime.calibration import Agreement, Calibration, Comparison, SubtaskTimes

COMMITTED = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
LEVELS = ("profile", "recent", "full")
Scripts = Callable[[str], ModuleType]


def stand_in(trained: Any, recommender: Any, rounds: int, progress: Any) -> Calibration:
    """For ``calibrate``, which tests/runtime/test_calibration.py runs in earnest: every plan over two links, compute a tenth too slow."""
    requests = [
        Comparison(
            plan=plan.name,
            link=link,
            predicted_ms=link_ms + 2.0,
            measured_ms=1.25 * (link_ms + 2.0),
            predicted_compute_ms=2.0,
            measured_compute_ms=2.2,
        )
        for plan in PLANS
        for link, link_ms in (("wifi", 20.0), ("3g", 160.0))
    ]
    once = summarise_latency(np.asarray([1.0, 2.0, 3.0]))
    return Calibration(
        times=trained.measured_times,
        subtasks=(SubtaskTimes(bucket="planning", alone=once, in_requests=once),),
        overall=Agreement.of(requests),
        by_plan={plan.name: Agreement.of([one for one in requests if one.plan == plan.name]) for plan in PLANS},
        by_link={link: Agreement.of([one for one in requests if one.link == link]) for link in ("wifi", "3g")},
        requests=tuple(requests),
        left_out=0,
        rounds=rounds,
        users=16,
        load_average=(0.5, 0.6),
        target=0.15,
        provenance=provenance(dataset_fingerprint=trained.corpus.interactions.fingerprint),
    )


def test_calibration_tells_and_draws_what_was_found(scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scripts("calibration"), "calibrate", stand_in)
    result = scripts("calibration").main(COMMITTED, rounds=3, out=tmp_path)
    stored = json.loads((tmp_path / "calibration-synthetic.json").read_text())
    assert stored["num_requests"] == 2 * len(PLANS) and stored["meets_target"] and "requests" not in stored
    assert stored["overall"]["error"] == pytest.approx(1 - 1 / 1.25)
    page = (tmp_path / "calibration-synthetic.md").read_text()
    assert result["question"] in page and "9.1%, within the aim of 15%" in page and "with it 20.0%" in page
    assert all(f"| {name} |" in page for name in (*stored["by_plan"], "wifi", "planning"))
    assert (tmp_path / "calibration-synthetic.png").stat().st_size > 10_000


def test_privacy_exposure_holds_both_attacks_against_their_controls(scripts: Scripts, tmp_path: Path):
    options = scripts("harness").Options(run=COMMITTED, work=tmp_path / "work", out=tmp_path)
    result: dict[str, Any] = scripts("privacy_exposure").main(options)
    recovery = result["history_recovery"]
    assert recovery["raw history"]["mean"] == 1.0
    for level in LEVELS:
        assert recovery["nothing"]["mean"] < recovery[level]["low"] and recovery[level]["users"] == 200
        assert recovery[f"null {level}"]["mean"] == pytest.approx(recovery["nothing"]["mean"], abs=0.03)
    kept = json.loads((COMMITTED / "exposure.json").read_text())
    assert recovery["profile"]["mean"] == pytest.approx(kept["recall"]["1"], abs=1e-3)
    assert [one["attribute"] for one in result["attribute_inference"]] == ["age_band", "gender", "region"]
    for one in result["attribute_inference"]:
        assert [one["levels"][level]["told"] for level in LEVELS] == [False, False, True]
        assert one["raw history"]["auc"]["mean"] > 0.53
        # The attribute itself is not among what the attack reads: it would be guessed without a mistake.
        assert one["levels"]["full"]["inferred"]["accuracy"] < 0.9
        nulls = [one["levels"][level]["null"]["auc"]["mean"] for level in LEVELS]
        assert sum(nulls) / 3 == pytest.approx(0.5, abs=0.06)
    page = (tmp_path / "privacy-exposure-synthetic.md").read_text()
    assert "told where disclosed" in page and "positive control" in page
    assert (tmp_path / "privacy-exposure-synthetic.png").stat().st_size > 10_000
