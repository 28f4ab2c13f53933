"""``cda4rec bench dispatch``: what it measures, what it writes, and what it refuses."""

import json
import multiprocessing
from pathlib import Path

import jax
import numpy as np
import pytest

from cda4rec_jax.bench import dispatch, peers
from cda4rec_jax.bench.dispatch import ARRAYS, JIT, X
from cda4rec_jax.cli import main
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.rank_candidates.native import native_problem
from cda4rec_jax.timing import TimingConfig

FEW_ROUNDS = TimingConfig(rounds=3, block_seconds=1e-6, warm_up_turns=2, attempts=1)


def test_the_command_measures_calls_and_writes_json_and_a_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "CALLS", 200)
    monkeypatch.setattr(dispatch, "MOST_SECONDS", 600.0)  # a slow machine makes all calls too
    monkeypatch.setattr(dispatch, "REMOTE_REPEATS", 20)
    monkeypatch.setattr(peers, "installed", lambda peer: peer == "numpy")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("cda4rec_jax.timing.TimingConfig", lambda **given: FEW_ROUNDS)
    assert main(["bench", "dispatch", "--rounds", "3", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert not multiprocessing.active_children()
    assert "null" in told and "first calls, compiling included" in told and "not installed: onnxruntime, torch" in told
    assert {path.name for path in tmp_path.iterdir()} == {"dispatch.json", "dispatch.png"}
    found = json.loads((tmp_path / "dispatch.json").read_text())
    names = list(found["systems"])
    other = f"jit, async dispatch {'off' if found['async_dispatch'] else 'on'}"
    assert found["async_dispatch"] == jax.config.read("jax_cpu_enable_async_dispatch")
    assert names[:2] == [JIT, other] and names[-1] == "numpy, NumPy"
    assert {f"jit, {count}{kind} arrays" for count in ARRAYS for kind in ("", " NumPy")} <= set(names)
    assert ("jit, C++ custom call" in names) == (native_problem() is None)
    for name, row in found["systems"].items():
        assert name in told
        assert row["threads"] >= 1 and row["version"] and row["first_call_seconds"] > 0
        assert row["latency"]["count"] == 200
        assert 0 < row["latency"]["p50_ms"] <= row["latency"]["p95_ms"] <= row["latency"]["p99_ms"]
    ratios = {one["other"]: one["ratio"]["median"] for one in found["measurement"]["comparisons"]}
    assert set(ratios) == set(names) - {JIT}
    assert ratios["jit, 64 NumPy arrays"] > ratios["jit, 4 NumPy arrays"]
    assert ratios["nnx.jit, module of 64"] > 5.0 * ratios["jit, module of 64, constants"]


def test_a_call_with_another_result_is_refused() -> None:
    dispatch._system("right", jax.jit(lambda x: x + 1.0), X)
    with pytest.raises(UserError, match="'wrong' gives"):
        dispatch._system("wrong", lambda x: np.asarray(x) + 2.0, X)


def test_bad_input_gets_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--peers", "tensorflow"), "choose from onnxruntime, torch, numpy"),
        (("--rounds", "1"), "expected at least 3"),
        (("--out", Path(__file__)), "name another --out"),
    ):
        assert main(["bench", "dispatch", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
