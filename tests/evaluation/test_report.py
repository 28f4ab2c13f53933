"""A report as JSON, on a console of 100 columns, and as Markdown."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation import Gate, PlannerRow, Report, SystemRow
from cda4rec_jax.metrics import Interval
from cda4rec_jax.planner import PLANS

METRICS = {f"{name}@{k}": 0.123456789 for name in ("hit_rate", "ndcg", "mrr") for k in (5, 10, 20)}
INTERVAL = Interval(mean_difference=-0.25, low=-0.5, high=0.125, confidence=0.95, num_users=30, num_resamples=2000)


def system(name: str, ndcg: float) -> SystemRow:
    return SystemRow(name=name, num_users=30, metrics={**METRICS, "ndcg@10": ndcg}, minus_sasrec={"ndcg@10": INTERVAL})


def planner(name: str, kind: str, utility: float) -> PlannerRow:
    return PlannerRow(
        name=name,
        kind=kind,
        utility=utility,
        policy_minus=None if kind == "policy" else INTERVAL,
        metrics=METRICS,
        latency_ms={"mean": 1234.5, "p50": 123.0, "p95": 12345.0},
        energy_mj=10.0,
        exposure=0.5,
        uplink_bytes=1234.0,
        downlink_bytes=123456.0,
        families={"fresh": 1.0, "reuse": 0.0, "local": 0.0, "cloud": 0.0},
        plan_shares={PLANS[0].name: 1.0},
    )


@pytest.fixture
def report() -> Report:
    best = planner("fixed fresh-profile-500-device", "best fixed", -1.0)
    fixed = [planner(f"fixed {plan.name}", "fixed", 0.001 * place) for place, plan in enumerate(PLANS)]
    fixed = [row for row in fixed if row.name != best.name]
    named = [planner("policy", "policy", 0.3), planner("context-oracle", "oracle", 0.3), planner("hindsight", "upper bound", 0.4)]
    return Report(
        dataset="made",
        dataset_fingerprint="f" * 64,
        kind="joint",
        split="test",
        num_users=30,
        num_items=1000,
        protocol="leave-one-out in time",
        latency="modelled (deployment profile)",
        systems=[system("cloud agent, full catalogue", 0.1)],
        plans=[system(plan.name, 0.01 * place) for place, plan in enumerate(PLANS)],
        planners=[*fixed, best, *named],
        best_fixed="fresh-profile-500-device",
        gate=Gate(
            plug_in_top_share=0.4,
            plug_in_plans=5,
            oracle_gain=INTERVAL,
            quality_gap=0.05,
            oracle_gain_in_gaps=0.2,
            passed=True,
        ),
        scales={"quality_gap": 0.05},
        exposure_by_level=[0.0, 0.4, 0.6, float("nan")],
        training_seconds={"joint": 100.0},
        provenance={"commit": "c" * 40, "dirty": False, "cores": 2, "cpu_model": "a processor", "time": "2026-01-01T00:00:00"},
    )


def printed(report: Report) -> list[str]:
    stream = io.StringIO()
    report.print(Console(file=stream, width=100))
    return stream.getvalue().splitlines()


def test_json_holds_every_plan_and_planner_with_six_digits(report: Report):
    value = json.loads(report.to_json())
    assert [row["name"] for row in value["plans"]] == [plan.name for plan in PLANS]
    assert len(value["planners"]) == len(report.planners)
    assert value["systems"][0]["metrics"]["mrr@20"] == 0.123457
    assert value["exposure_by_level"][3] is None


def test_a_written_report_replaces_the_old_one_and_leaves_nothing_beside_it(report: Report, tmp_path: Path):
    file = tmp_path / "report.json"
    file.write_text("old")
    report.write_json(file)
    assert json.loads(file.read_text()) == json.loads(report.to_json())
    assert list(tmp_path.iterdir()) == [file]


def test_an_unwritable_path_is_the_users_error(report: Report, tmp_path: Path):
    with pytest.raises(UserError, match="Cannot write"):
        report.write_json(tmp_path / "missing" / "report.json")


def test_print_fits_100_columns_without_cutting_a_cell(report: Report):
    lines = printed(report)
    assert max(map(len, lines)) <= 100
    assert "…" not in "\n".join(lines)
    assert any("modelled (deployment profile)" in line for line in lines)


def test_print_shows_the_best_and_says_how_many_are_left(report: Report):
    text = "\n".join(printed(report))
    assert "23 more with --json and in the run's results.json" in text  # 8 best and the reference plan
    for name in ("cloud-full-cloud", "fresh-full-100-device", "fixed fresh-profile-500-device *", "hindsight (upper bound)"):
        assert name in text
    assert "fresh-profile-20-skip" not in text
    assert text.index("hindsight") < text.index("context-oracle") < text.index("fixed cloud-full-cloud")


def test_markdown_holds_all_rows(report: Report):
    text = report.to_markdown()
    assert all(f"| fixed {plan.name} " in text for plan in PLANS)
    assert "## Accuracy\n" in text
