"""``cda4rec bench rank``: what it measures, what it writes, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest

from cda4rec_jax.bench import peers, rank, rank_systems
from cda4rec_jax.bench.peers.numpy_ranking import NumpyRanking
from cda4rec_jax.bench.rank_systems import case_setting
from cda4rec_jax.bench.rank_systems import rank_systems as systems_of
from cda4rec_jax.cli import main
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.rank_candidates.cases import SMALL_CASE
from cda4rec_jax.kernels.rank_candidates.native import native_problem
from cda4rec_jax.timing import TimingConfig

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
FEW_ROUNDS = TimingConfig(rounds=3, block_seconds=1e-6, warm_up_turns=2, attempts=1)
SMALL = dataclasses.replace(SMALL_CASE, tokens=9)
OURS = [
    f"ours, {implementation}, {what}"
    for implementation in (("native", "xla") if native_problem() is None else ("xla",))
    for what in ("full pass", "one new event")
]


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_systems, "NUM_REQUESTS", 4)
    monkeypatch.setattr(rank, "WORKLOAD_CASES", (SMALL, dataclasses.replace(SMALL, candidates=3)))
    monkeypatch.setattr(peers, "installed", lambda peer: peer in ("numpy", "jax"))


def test_the_command_measures_a_runs_agent_and_writes_json_and_a_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cda4rec_jax.timing.TimingConfig", lambda rounds: dataclasses.replace(FEW_ROUNDS, rounds=rounds))
    arguments = ["--run", str(CHECKPOINT), "--candidates", "7", "--rounds", "3", "--out", str(tmp_path)]
    assert main(["bench", "rank", *arguments]) == 0
    told = capsys.readouterr().out
    assert "7 candidates" in told and "null" in told and "not installed: onnxruntime, torch" in told
    found = json.loads((tmp_path / "rank-synthetic.json").read_text())
    (size,) = found["sizes"]
    assert size["candidates"] == 7 and set(size["systems"]) == {*OURS, "plain jax", "numpy"}
    for one in size["systems"].values():
        assert one["threads"] == 1
        assert one["difference"] <= 1e-4 and one["version"] and one["first_call_seconds"] > 0
        assert 0 < one["latency"]["p50_ms"] <= one["latency"]["p95_ms"] <= one["latency"]["p99_ms"]
    assert len(size["measurement"]["comparisons"]) == 5
    assert {path.name for path in tmp_path.glob("*.png")} == {"rank-synthetic.png"}


def test_without_a_run_every_size_is_measured(tmp_path: Path) -> None:
    found = rank.bench_rank(peers=("numpy",), calls=10, timing=FEW_ROUNDS, out=tmp_path)
    assert [len(one.setting.requests[0].features) for one in found.sizes] == [5, 3]
    names = {"rank-random-weights.json", "rank-random-weights-1.png", "rank-random-weights-2.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_system_with_other_scores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(NumpyRanking):
        def __call__(self, *given):
            return super().__call__(*given) * 1.01

    monkeypatch.setattr(rank_systems, "NumpyRanking", Wrong)
    with pytest.raises(UserError, match=r"'numpy' is .* off"):
        systems_of(case_setting(SMALL), ("numpy",))


def test_bad_input_gets_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--peers", "tensorflow"), "choose from onnxruntime, torch, jax, numpy"),
        (("--candidates", "0"), "expected at least 1 of each"),
        (("--run", tmp_path / "none"), "none"),
    ):
        assert main(["bench", "rank", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
