"""Budgets that are calibrated on validation and held against test, on a tiny run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cda4rec_jax.planner.budgets import KnownRequests, Limited

Scripts = Callable[[str], ModuleType]


def stored(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "budgets-synthetic.json").read_text())
    assert result["question"] in (folder / "budgets-synthetic.md").read_text()
    assert (folder / "budgets-synthetic.png").stat().st_size > 10_000
    return result


def test_tighter_limits_have_higher_prices_and_are_kept_where_they_were_set(scripts: Scripts, options: Any, tmp_path: Path):
    scripts("budgets").main(options, draws=2)
    result = stored(tmp_path)
    rows = result["rows"]
    assert [(row["limited"], row["share"]) for row in rows] == [
        (limited, share) for limited in Limited for share in ("a quarter", "a half", "three quarters")
    ]
    assert not any(row["why_not"] for row in rows)
    for row in rows:
        ((limit,), (used,), (on_test,)) = (row[name] for name in ("limit", "on_validation", "on_test"))
        without = {name: values[0] for name, values in result["without_price"][row["limited"]].items()}
        assert without["least"] < limit < without["on_validation"] and used <= limit and row["multiplier"][0] > 0
        assert on_test < without["on_test"]
        assert row["relative_error"] == [pytest.approx(on_test / limit - 1)]
        assert row["within_aim"] == (abs(row["relative_error"][0]) <= result["aim"] == 0.05)
        lost = row["minus_without"]
        assert lost["low"] <= lost["mean"] <= lost["high"] and lost["users"] == 100
    for limited in Limited:
        quarter, half, three_quarters = (row for row in rows if row["limited"] == limited)
        assert quarter["multiplier"] >= half["multiplier"] >= three_quarters["multiplier"]
        assert quarter["limit"] < half["limit"] < three_quarters["limit"]
        assert quarter["on_test"] < three_quarters["on_test"]
    met = sum(row["within_aim"] for row in rows)
    assert f"{met} of 9 limits are met on test within 5%" in (tmp_path / "budgets-synthetic.md").read_text()


def test_what_the_policy_never_uses_has_rows_that_say_so(
    scripts: Scripts, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = scripts("budgets")
    whole = script.known_requests

    def without_exposure(requests: Any, logits: Any, limited: Limited) -> KnownRequests:
        known = whole(requests, logits, limited)
        return replace(known, spent=np.zeros_like(known.spent)) if limited is Limited.EXPOSURE else known

    monkeypatch.setattr(script, "known_requests", without_exposure)
    script.main(options, draws=2)
    rows = stored(tmp_path)["rows"]
    reasons = {row["limited"]: row["why_not"] for row in rows}
    assert reasons == {"calls": None, "p95_ms": None, "exposure": "the policy uses nothing of it"}
    assert all("limit" not in row for row in rows if row["why_not"])
    page = (tmp_path / "budgets-synthetic.md").read_text()
    assert "| exposure, a half of the way | the policy uses nothing of it |" in page and "of 6 limits" in page


def test_a_limit_needs_something_that_a_price_can_save(scripts: Scripts):
    same = np.full((4, 2), 7.0)
    known = KnownRequests(logits=np.zeros((4, 2)), mask=np.ones((4, 2), bool), units=same, spent=same, last_resort=0)
    assert scripts("budgets").calibrated(known, Limited.P95_MS, 0.5) is None
    cheaper = replace(known, logits=np.tile([0.0, 1.0], (4, 1)), units=same - [5.0, 0.0], spent=same - [5.0, 0.0])
    price = scripts("budgets").calibrated(cheaper, Limited.P95_MS, 0.5)
    assert price.budget.limit == 4.5 and price.used == price.least == 2.0 and price.multiplier >= 0.2
