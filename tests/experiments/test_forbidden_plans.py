"""The count of forbidden plans and of bytes after a withdrawal runs, finds none, and would find some."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.planner import PLANS, plan_index
from cda4rec_jax.privacy.gate import Gate


def test_no_forbidden_plan_is_chosen_and_no_byte_leaves_after_a_withdrawal(
    scripts: Callable[[str], ModuleType], tiny_run: Path, tmp_path: Path
) -> None:
    script = scripts("forbidden_plans")
    result = script.main(requests=5000, executed=18, run=tiny_run, out=tmp_path)
    assert result["forbidden"] == result["nonzero_probabilities"] == result["mask_disagreements"] == 0
    assert result["bytes_after_withdrawal"] == 0
    assert all(one["requests"] == 5000 and one["one_by_one"] > 0 for one in result["planners"].values())
    assert sum(count > 0 for count in result["planners"]["random"]["chosen"].values()) == len(PLANS)
    consent = result["consent"]
    assert all(one["withdrawn"] == 3 and one["without_slate"] == 0 for one in consent.values())
    assert all(consent[moment]["bytes_before"] > 0 for moment in ("cloud", "resend", "late reset"))
    (stored,) = tmp_path.glob("forbidden-plans-*.json")
    assert json.loads(stored.read_text()) == json.loads(json.dumps(result))
    assert "0 forbidden choices, 0 bytes" in stored.with_suffix(".md").read_text()
    assert stored.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_gate_that_does_not_look_again_is_found_out(
    scripts: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    consent = scripts("consent")
    monkeypatch.setattr(Gate, "authorise_send", lambda self, gated: None)
    service = consent.cloud()
    trial, _ = consent.run_trial(PLANS[plan_index("fresh-full-100-device")], "resend", EgressLevel.PROFILE, service)
    service.close()
    assert trial.sends == 2 and trial.bytes_after == trial.bytes_before > 0


def test_the_mask_stated_a_second_time_forbids_what_it_should(scripts: Callable[[str], ModuleType]) -> None:
    script = scripts("forbidden_plans")
    rows = np.ones((2, len(script.CONTEXT_FIELDS)), np.float32)
    rows[:, script.COLUMNS["free_memory_mb"]] = (255.9, 256.0)
    rows[:, script.COLUMNS["consent"]] = EgressLevel.RECENT
    may = {plan.name: script.mask_by_rules(rows, plan).tolist() for plan in PLANS}
    assert may["fresh-recent-500-device"] == [False, True]
    assert may["fresh-full-20-skip"] == [False, False]
    assert may["fresh-recent-500-skip"] == [True, True]
    assert may["local-skip-skip"] == [True, True]
    rows[:, script.COLUMNS["free_memory_mb"]] = np.nan
    assert script.mask_by_rules(rows, PLANS[plan_index("local-reuse-skip")]).tolist() == [False, False]
