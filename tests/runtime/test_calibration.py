"""Calibration cuts requests into parts that add up, fits their medians, predicts other users' requests, and keeps what was before."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cda4rec_jax.cli import main
from cda4rec_jax.cli.calibrate import _agreement, _subtasks, exposure_table
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import DeviceTier, Link
from cda4rec_jax.pipeline.calibration import WARM_UP_ROUNDS, fit_times, in_turns
from cda4rec_jax.planner import PLANS, MeasuredTimes, measured_profile, plan_index
from cda4rec_jax.processor import cpu_model
from cda4rec_jax.runs.artifacts import load_trained
from cda4rec_jax.runtime.calibration import Agreement, Comparison, calibrate, request_parts
from cda4rec_jax.runtime.recommend import Recommender
from cda4rec_jax.runtime.recommend.planning import Situation
from cda4rec_jax.training import PlannerTraining, train_planner_run
from tests.planner.own_planner import OWN_PLANS
from tests.times_0_1 import TIMES_0_1

COMMITTED = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
VERSION_0_1 = {"times": TIMES_0_1}
ROUNDS = 3
ONE_OF_EACH_KIND = [
    plan_index(name)
    for name in (
        *("fresh-profile-20-skip", "fresh-full-500-device", "reuse-100-device"),
        *("local-reuse-device", "local-skip-skip", "cloud-recent-skip", "cloud-full-cloud"),
    )
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """The committed run with a planner that has plans of its own, and with a cost profile of version 0.1."""
    path = tmp_path_factory.mktemp("calibrated") / "run"
    config = PlannerTraining(steps=1, users_per_step=16, cache_draws=1, users=80)
    train_planner_run(COMMITTED, path, config, planner="tests.planner.own_planner:Priced")
    (path / "cost_profile.json").write_text(json.dumps(VERSION_0_1))
    return load_trained(path)


@pytest.fixture(scope="module")
def recommender(trained):
    with Recommender(trained) as recommender:
        yield recommender


@pytest.fixture(scope="module")
def calibrated(trained, recommender):
    """The run's path, what calibrating found on it, and the stages of which it told."""
    stages = {}
    found = calibrate(trained, recommender, ROUNDS, lambda stage, done, total: stages.update({stage: (done, total)}))
    return trained.run.path, found, stages


def test_every_call_has_one_turn_in_every_round():
    told, order = [], []
    calls = {name: lambda number, name=name: order.append(name) or number for name in "abc"}
    found = in_turns(calls, 5, lambda done, total: told.append((done, total)))
    assert [[number for _, number in turns] for turns in found.values()] == [list(range(5))] * 3
    rounds = np.reshape(order, (WARM_UP_ROUNDS + 5, 3))
    assert all(sorted(row) == ["a", "b", "c"] for row in rounds) and len({tuple(row) for row in rounds}) > 1
    assert told == [(done, WARM_UP_ROUNDS + 5) for done in range(1, WARM_UP_ROUNDS + 6)]
    assert all(taken_ms >= 0 for turns in found.values() for taken_ms, _ in turns)


def test_a_bucket_without_samples_is_named():
    with pytest.raises(TypeError, match="abstract_ms"):
        fit_times({("planning_ms", ""): [1.0, 2.0]})


def test_the_parts_of_a_request_add_up_to_its_latency(trained, recommender):
    history = recommender.history(trained.corpus.interactions.user_ids[5])
    for index in ONE_OF_EACH_KIND:
        answered = recommender.answer(history, Situation(link=Link.LTE, tier=DeviceTier.HIGH), index, draw=None)
        trace, link = answered.answer.trace, answered.request.link
        assert trace.plan == PLANS[index] == trace.executed_plan
        parts = {name: value for (name, _), value in request_parts(trace, link).items()}
        assert min(parts.values()) >= 0
        up_ms, down_ms = link.transfer_ms(trace.uplink_bytes, "up"), link.transfer_ms(trace.downlink_bytes, "down")
        retrieval = parts.get("retrieval_ms", 0.0) + parts.get("retrieval_evidence_ms", 0.0)
        cloud = max(parts.get("semantic_ms", 0.0) + retrieval, parts.get("structured_cloud_ms", 0.0))
        branch = (
            parts.get("abstract_ms", 0.0)
            + parts.get("abstract_beside_ms", 0.0)
            + up_ms
            + cloud
            + down_ms
            + parts.get("cache_retrieval_ms", 0.0)
        )
        ranking = sum(value for name, value in parts.items() if name.startswith("ranking"))
        total = parts["planning_ms"] + max(branch, parts.get("structured_ms", 0.0)) + ranking
        assert total == pytest.approx(trace.latency_ms, rel=1e-3), trace.plan.name


def test_calibrating_measures_every_shape_and_stores_it_with_its_origin(calibrated):
    path, found, stages = calibrated
    stored = json.loads((path / "cost_profile.json").read_text())
    assert MeasuredTimes.from_json(stored["times"]) == found.times == load_trained(path).measured_times
    assert stored["of"] == "whole requests" and stored["rounds"] == ROUNDS
    assert {"cores", "cpu_model", "versions", "commit", "time"} <= stored["provenance"].keys()
    assert set(stages) == {"measuring sub-tasks", "validating predictions"}
    assert {value for value in stages.values()} == {(ROUNDS + WARM_UP_ROUNDS,) * 2}
    names = {one.bucket for one in found.subtasks}
    assert len(names) == 31 and {"ranking skip cache", "abstract reuse", "planning"} <= names
    assert all(0 < one.in_requests.p50_ms <= one.in_requests.p95_ms and one.alone.count == ROUNDS for one in found.subtasks)
    planning = next(one for one in found.subtasks if one.bucket == "planning")
    assert planning.in_requests.count <= (len(PLANS) + len(OWN_PLANS)) * ROUNDS


def test_the_earlier_profile_is_kept(calibrated):
    path, _, _ = calibrated
    (earlier,) = json.loads((path / "cost_profile.json").read_text())["earlier"]
    assert earlier == VERSION_0_1


def test_prediction_is_held_against_other_requests(calibrated):
    path, found, _ = calibrated
    plans = (*PLANS, *OWN_PLANS)  # also those whose number of candidates was not measured
    assert set(found.by_plan) == {plan.name for plan in plans} and set(found.by_link) == {"wifi", "lte", "3g", "edge"}
    assert len(found.requests) + found.left_out >= len(plans) * ROUNDS
    assert all(request.measured_ms > request.measured_compute_ms - 1e-6 for request in found.requests)
    assert found.meets_target == (found.overall.compute_error <= found.target)
    stored = json.loads((path / "calibration.json").read_text())
    assert stored["overall"]["error"] == found.overall.error
    assert len(stored["requests"]) == len(found.requests)
    # A prediction is the fitted profile's: planning, the cache and ranking, of a plan that waits for nothing else.
    times, local = found.times, next(request for request in found.requests if request.plan == "local-skip-skip")
    expected = times.planning_ms + times.cache_retrieval_ms + times.ranking_skip_ms["cache"]
    assert local.predicted_ms == pytest.approx(expected, rel=1e-5)
    assert local.predicted_compute_ms == local.predicted_ms


def test_recommend_and_evaluation_use_the_new_profile(calibrated):
    path, found, _ = calibrated
    trained = load_trained(path)
    assert float(trained.world("measured").profile.planning_ms[DeviceTier.HIGH]) == pytest.approx(found.times.planning_ms)
    assert trained.world("deployment").profile.name == "deployment (modelled)"


def test_times_of_another_processor_are_told_once(calibrated, monkeypatch, caplog):
    trained = load_trained(calibrated[0])
    trained.world("measured")
    assert not caplog.records
    monkeypatch.setattr("cda4rec_jax.runs.artifacts.cpu_model", lambda: "abacus")
    for _ in range(2):
        trained.world("measured")
    (warning,) = caplog.records
    assert f"({cpu_model()}, and this is abacus)" in warning.getMessage() and "cda4rec calibrate" in warning.getMessage()


def test_agreement_by_hand():
    sides = ((11.0, 10.0, 3.0, 2.0), (9.0, 10.0, 1.0, 2.0), (13.0, 10.0, 2.5, 2.0))
    requests = [
        Comparison(plan="p", link="wifi", predicted_ms=a, measured_ms=b, predicted_compute_ms=c, measured_compute_ms=d)
        for a, b, c, d in sides
    ]
    found = Agreement.of(requests)
    assert found.error == pytest.approx(0.1) and found.compute_error == pytest.approx(0.5) and found.bias == pytest.approx(0.25)
    assert found.predicted_ms == 11.0 and found.measured.p50_ms == 10.0


def test_what_a_person_sees_names_plans_links_and_both_controls(calibrated):
    path, found, _ = calibrated
    shown = io.StringIO()
    console = Console(width=80, file=shown)
    for part in (_subtasks(found), _agreement(found), exposure_table(load_trained(path).run.read_json("exposure"))):
        console.print(part)
    text = shown.getvalue()
    assert "…" not in text, "a number is cut off"
    assert all(plan.name in text for plan in (*PLANS, *OWN_PLANS))
    assert "null control" in text and "positive control" in text
    assert f"{found.overall.error:.1%}" in text and f"compute {found.overall.compute_error:.1%}" in " ".join(text.split())


def test_profiles_of_version_0_1_still_load():
    times = MeasuredTimes.from_json(TIMES_0_1)
    assert times.abstract_ms["reuse"] == 0.0 and times.ranking_ms["cache"] == times.ranking_skip_ms["100"]
    assert measured_profile(times).ranking_ms.shape == (len(DeviceTier), 2, 4)


def test_too_few_rounds_are_the_users_to_mend(trained, recommender):
    with pytest.raises(UserError, match="2 rounds"):
        calibrate(trained, recommender, 2)


def test_the_command_tells_a_mistake_in_one_line(trained, capfd):
    assert main(["calibrate", "--run", str(trained.run.path), "--rounds", "2"]) == 2
    assert "2 rounds" in capfd.readouterr().err
    assert main(["calibrate", "--run", str(trained.run.path / "nowhere")]) == 2
    assert "There is no run" in capfd.readouterr().err
