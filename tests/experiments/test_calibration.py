"""Experiments on what a request takes and on what it gives away, on a tiny run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

COMMITTED = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
LEVELS = ("profile", "recent", "full")
Scripts = Callable[[str], ModuleType]


def test_calibration_draws_what_it_stores_in_the_run(scripts: Scripts, tmp_path: Path):
    shutil.copytree(COMMITTED, tmp_path / "run")
    result = scripts("calibration").main(tmp_path / "run", rounds=3, out=tmp_path)
    stored = json.loads((tmp_path / "calibration-synthetic.json").read_text())
    kept = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert stored["requests"] == kept["requests"] and stored["overall"] == kept["overall"]
    assert stored["meets_target"] == (kept["overall"]["error"] <= kept["target"])
    page = (tmp_path / "calibration-synthetic.md").read_text()
    assert result["question"] in page and all(f"| {name} |" in page for name in (*kept["by_plan"], "wifi", "planning"))
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
