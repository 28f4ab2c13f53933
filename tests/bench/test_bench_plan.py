"""``cda4rec bench plan``: what it measures, what it writes, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.bench import peers, plan, plan_systems
from cda4rec_jax.bench.peers.numpy_planning import NumpyDecision
from cda4rec_jax.bench.plan_systems import DECISION, NETWORK, network_of, setting_of, systems_of
from cda4rec_jax.cli import main
from cda4rec_jax.errors import UserError
from cda4rec_jax.planner.serving import ServedPlanner
from cda4rec_jax.timing import TimingConfig

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
FEW_ROUNDS = TimingConfig(rounds=3, block_seconds=1e-6, warm_up_turns=2, attempts=1)


@pytest.fixture(autouse=True)
def few_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_systems, "NUM_CONTEXTS", 4096)


def test_the_command_measures_a_runs_policy_and_writes_json_and_charts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "installed", lambda peer: peer == "numpy")
    monkeypatch.setattr("cda4rec_jax.timing.TimingConfig", lambda rounds: dataclasses.replace(FEW_ROUNDS, rounds=rounds))
    arguments = ["--run", str(CHECKPOINT), "--batches", "1", "64", "--rounds", "3", "--out", str(tmp_path)]
    assert main(["bench", "plan", *arguments]) == 0
    told = capsys.readouterr().out
    assert DECISION in told and NETWORK in told and "null" in told and "not installed: onnxruntime, torch" in told
    found = json.loads((tmp_path / "plan-synthetic.json").read_text())
    assert [one["batch"] for one in found["batches"]] == [1, 64]
    for one in found["batches"]:
        assert set(one["systems"]) == {DECISION, NETWORK, "numpy, network alone", "numpy, whole decision"}
        assert all(system["threads"] == (1 if one["batch"] == 1 else found["threads"]) for system in one["systems"].values())
        assert all(system["difference"] <= 1e-5 and system["version"] for system in one["systems"].values())
        latencies = [system["latency"] for system in one["systems"].values()]
        assert all(0 < latency["p50_ms"] <= latency["p95_ms"] <= latency["p99_ms"] for latency in latencies)
        assert len(one["measurement"]["comparisons"]) == 3
    assert {path.name for path in tmp_path.glob("*.png")} == {"plan-synthetic-1.png", "plan-synthetic-64.png"}


def test_the_decision_written_in_numpy_is_ours() -> None:
    setting = setting_of(None)
    network = network_of(setting.policy)
    plain = NumpyDecision(network, network.tau, setting.profile, setting.exposure_by_level, setting.sizes)
    ours = ServedPlanner(setting.policy, setting.profile, setting.exposure_by_level, setting.sizes)
    found, expected = plain(setting.requests), ours.scores(setting.requests)
    finite = np.isfinite(expected)
    assert 0 < finite.mean() < 1
    np.testing.assert_array_equal(finite, np.isfinite(found))
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-4, atol=1e-4)
    assert (plain.choices(setting.requests) == ours.choices(setting.requests)).mean() > 0.999


def test_a_system_with_other_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(network_of(setting_of(None).policy), tau=0.1)
    monkeypatch.setattr(plan_systems, "network_of", lambda policy: wrong)
    with pytest.raises(UserError, match=r"'numpy, whole decision' is .* off our outputs"):
        systems_of(setting_of(None), 1, ("numpy",), 1)


def test_bad_input_gets_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--peers", "tensorflow"), "choose from onnxruntime, torch, numpy"),
        (("--batches", "0"), "expected batches of at least 1 request"),
        (("--run", tmp_path / "none"), "none"),
    ):
        assert main(["bench", "plan", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    with pytest.raises(UserError, match="at least 1 call"):
        plan.bench_plan(batches=(1,), calls=0, timing=FEW_ROUNDS, out=tmp_path)
