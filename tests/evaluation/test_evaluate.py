"""Evaluation of a trained run, end to end, and what bad input gets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.data import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation import Report, evaluate_run
from cda4rec_jax.evaluation.evaluate import _Job, _protocol
from cda4rec_jax.planner import PLANS
from cda4rec_jax.runs.artifacts import load_trained


@pytest.fixture(scope="module")
def copied_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that these tests may write to."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(tiny_run, path, ignore=shutil.ignore_patterns("results.json", "sasrec"))
    return path


@pytest.fixture(scope="module")
def sasrec_run(tiny_baseline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline that these tests may write to."""
    path = tmp_path_factory.mktemp("baseline") / "run"
    shutil.copytree(tiny_baseline, path, ignore=shutil.ignore_patterns("results.json"))
    return path


@pytest.fixture(scope="module")
def stages() -> list[str]:
    return []


@pytest.fixture(scope="module")
def report(copied_run: Path, stages: list[str]) -> Report:
    return evaluate_run(
        copied_run,
        json_file=copied_run.parent / "report.json",
        progress=lambda stage, done, total: stages.append(f"{stage} {done}/{total}"),
    )


def test_a_report_covers_all_plans_and_planners(report: Report):
    assert [row.name for row in report.systems] == ["popularity", "cloud agent, full catalogue"]
    assert [row.name for row in report.plans] == [plan.name for plan in PLANS]
    names = {row.name for row in report.planners}
    assert names == {f"fixed {plan.name}" for plan in PLANS} | {
        *("policy", "rules", "random", "plug-in", "context-oracle", "hindsight")
    }
    assert [row.name for row in report.planners if row.kind == "best fixed"] == [f"fixed {report.best_fixed}"]
    assert report.gate is not None


def test_rows_of_a_report_agree_with_each_other(report: Report):
    by_name = {row.name: row for row in report.planners}
    for row in report.planners:
        assert sum(row.families.values()) == pytest.approx(1)
        assert sum(row.plan_shares.values()) == pytest.approx(1)
        assert row.utility <= by_name["hindsight"].utility
        assert row.latency_ms["p50"] <= row.latency_ms["p95"]
        if row.policy_minus is not None:
            assert row.policy_minus.mean_difference == pytest.approx(by_name["policy"].utility - row.utility, abs=1e-5)
    local = next(row for row in report.plans if row.name == "local-skip-skip")
    assert by_name["fixed local-skip-skip"].metrics == pytest.approx(local.metrics)


def test_a_report_of_the_whole_test_split_stays_with_the_run(report: Report, copied_run: Path):
    stored = json.loads((copied_run / "results.json").read_text())
    assert stored == json.loads(report.to_json()) == json.loads((copied_run.parent / "report.json").read_text())
    assert stored["dataset_fingerprint"] == stored["provenance"]["dataset_fingerprint"]
    assert "contexts v1, 8 draws" in stored["protocol"]


def test_progress_is_told_to_the_end(report: Report, stages: list[str]):
    total = report.num_users
    assert f"validation requests {total}/{total}" in stages
    assert f"test requests {total}/{total}" in stages


def test_a_sample_is_compared_with_the_baseline_and_leaves_the_stored_report_alone(
    report: Report, copied_run: Path, sasrec_run: Path
):
    before = (copied_run / "results.json").read_bytes()
    part = evaluate_run(
        copied_run,
        baseline=sasrec_run,
        plans=["fresh-full-100-device"],
        split="validation",
        users=report.num_users - 1,
        profile="measured",
    )
    assert part.num_users == report.num_users - 1
    reference = next(row for row in part.systems if row.name.startswith("SASRec"))
    (plan,) = part.plans
    expected = plan.metrics["ndcg@10"] - reference.metrics["ndcg@10"]
    assert plan.minus_sasrec["ndcg@10"].mean_difference == pytest.approx(expected, abs=1e-6)
    fixed = {row.name for row in part.planners if row.kind in ("fixed", "best fixed")}
    assert fixed == {"fixed fresh-full-100-device", f"fixed {part.best_fixed}"}
    assert part.latency == "modelled (measured profile)"
    assert part.training_seconds.keys() == {"joint", "baseline"}
    assert (copied_run / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "unknown split 'train'"),
        ({"profile": "guessed"}, "unknown profile 'guessed'"),
        ({"plans": "some"}, "expected 'all' or a list"),
        ({"draws": 0}, "draws is 0"),
        ({"users": 1}, "users is 1"),
        ({"json_file": "/no/such/folder/report.json"}, "Cannot write"),
    ],
)
def test_bad_options_are_the_users_error_before_any_work(options: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        evaluate_run(tmp_path / "no-run", **options)


def test_a_missing_run_is_the_users_error(tmp_path: Path):
    with pytest.raises(UserError, match="no run at"):
        evaluate_run(tmp_path / "no-run")


def test_a_baseline_of_another_kind_is_the_users_error(copied_run: Path):
    with pytest.raises(UserError, match="a baseline is a run of preset sasrec"):
        evaluate_run(copied_run, baseline=copied_run)


def test_a_baseline_on_other_data_is_the_users_error(copied_run: Path, sasrec_run: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(sasrec_run, other)
    stored = json.loads((other / "provenance.json").read_text())
    (other / "provenance.json").write_text(json.dumps(stored | {"dataset_fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="trained on other data"):
        evaluate_run(copied_run, baseline=other)


def test_a_baseline_has_a_report_of_its_own(sasrec_run: Path):
    report = evaluate_run(sasrec_run)
    assert [row.name for row in report.systems] == ["popularity", "SASRec (full CE)"]
    assert report.plans == report.planners == []
    assert (sasrec_run / "results.json").exists()
    assert "policy" not in report.to_markdown()


def test_the_protocol_says_where_the_policy_is_measured_on_events_that_it_learned_from(tmp_path: Path):
    path = shutil.copytree(Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny", tmp_path / "run")
    trained = load_trained(path)

    def protocol(split: Split) -> str:
        users = np.arange(30)
        return _protocol(
            _Job(trained=trained, baseline=None, split=split, users=users, draws=8, seed=0, progress=lambda *_: None)
        )

    assert "within the sample" not in protocol(Split.VALIDATION), "it learned in joint training alone"
    trained.run.write_json("planner_training", {})
    assert "within the sample" in protocol(Split.VALIDATION) and "within the sample" not in protocol(Split.TEST)
