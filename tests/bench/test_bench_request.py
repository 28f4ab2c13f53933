"""``cda4rec bench request``: what it measures, what it writes, and what it refuses."""

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.bench import request, request_device, request_systems
from cda4rec_jax.bench.request_device import EMPTY, KERNELS, PATH
from cda4rec_jax.bench.request_systems import CHOICE, CONCURRENT, HEAVIEST, NAMED_PLANS, SEQUENTIAL, WHOLE
from cda4rec_jax.cli import main
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.runs.artifacts import load_trained
from cda4rec_jax.runtime.recommend import Recommender
from cda4rec_jax.runtime.recommend.planning import Situation
from cda4rec_jax.timing import TimingConfig

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
FEW_ROUNDS = TimingConfig(rounds=3, block_seconds=1e-6, warm_up_turns=2, attempts=1)


def test_the_command_measures_requests_branches_and_the_devices_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cda4rec_jax.timing.TimingConfig", lambda rounds: dataclasses.replace(FEW_ROUNDS, rounds=rounds))
    arguments = ["--run", str(CHECKPOINT), "--requests", "6", "--users", "3", "--rounds", "3", "--out", str(tmp_path)]
    assert main(["bench", "request", *arguments]) == 0
    told = capsys.readouterr().out
    assert all(words in told for words in (HEAVIEST, WHOLE, PATH, EMPTY, "uplink", "null", "first calls, compiling included"))
    assert {path.name for path in tmp_path.iterdir()} == {"request-synthetic.json", "request-synthetic.png"}
    found = json.loads((tmp_path / "request-synthetic.json").read_text())
    assert set(found["requests"]) == {*NAMED_PLANS, CHOICE, WHOLE}
    systems = [found["requests"], *(path["systems"] for path in found["device_path"])]
    for row in (row for rows in systems for row in rows.values()):
        assert row["threads"] >= 1 and row["version"].startswith("jax ") and row["first_call_seconds"] > 0
        assert row["latency"]["count"] == 6
        assert 0 < row["latency"]["p50_ms"] <= row["latency"]["p95_ms"] <= row["latency"]["p99_ms"]
    branches = found["branches"]["measurement"]
    assert found["branches"]["threads"] >= 1 and found["branches"]["version"].startswith("jax ")
    assert all(one["count"] >= 3 and one["p50_ms"] >= 50 for one in found["branches"]["latency"].values())
    (gain,) = branches["comparisons"]
    assert (gain["name"], gain["other"]) == (CONCURRENT, SEQUENTIAL) and gain["ratio"]["median"] > 1.0
    assert branches["nulls"].keys() == {CONCURRENT}
    assert [path["candidates"] for path in found["device_path"]] == [100, 112]
    for path in found["device_path"]:
        taken = {name: row["latency"]["p50_ms"] for name, row in path["systems"].items()}
        assert list(taken)[:2] == [PATH, KERNELS] and len(taken) == 8
        assert path["path_over_kernels"]["median"] > 0
        assert path["path_over_kernels_without_dispatch"] > taken[PATH] / taken[KERNELS]
    assert {"commit", "versions", "dataset_fingerprint"} <= set(found["provenance"])
    over_wifi, alone, local = found["waterfalls"]
    _check_waterfall(over_wifi, "planning structured abstract uplink semantic retrieval downlink ranking")
    _check_waterfall(local, "planning retrieval structured ranking")
    taken = {part["name"]: part["end_ms"] - part["start_ms"] for part in over_wifi["parts"]}
    assert taken["uplink"] > 1.0 and taken["downlink"] > 1.0
    assert {part["name"]: part["end_ms"] - part["start_ms"] for part in alone["parts"]}["uplink"] == 0.0


def _check_waterfall(waterfall: dict, names: str) -> None:
    parts = {part["name"]: part for part in waterfall["parts"]}
    assert set(parts) == set(names.split())
    assert all(0.0 <= part["start_ms"] <= part["end_ms"] <= waterfall["latency_ms"] for part in parts.values())
    assert parts["planning"]["end_ms"] <= min(part["start_ms"] for name, part in parts.items() if name != "planning")
    assert parts["ranking"]["start_ms"] >= max(part["end_ms"] for name, part in parts.items() if name != "ranking")
    starts = [part["start_ms"] for part in waterfall["parts"]]
    assert starts == sorted(starts)


def test_kernels_with_another_slate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_device, "unseen", lambda items, seen, num_items: np.ones(items.shape, bool))
    trained = load_trained(CHECKPOINT)
    with Recommender(trained) as recommender, ExitStack() as stack:
        devices = request_systems.devices_of(recommender, 1, stack)
        with pytest.raises(UserError, match="another slate than the runtime"):
            request_device.device_path(recommender, trained, devices, "fresh-full-100-device")


def test_bad_input_gets_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--run", tmp_path / "none"), "none"),
        (("--run", CHECKPOINT, "--requests", "0"), "expected at least 1 of each"),
        (("--run", CHECKPOINT, "--rounds", "1"), "expected at least 3"),
    ):
        assert main(["bench", "request", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


def test_a_plan_that_the_situation_forbids_is_not_measured_as_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_systems, "_SITUATION", Situation(consent=EgressLevel.PROFILE))
    with pytest.raises(UserError, match=f"{HEAVIEST} is forbidden"):
        request.bench_request(CHECKPOINT, requests=1, users=1, timing=FEW_ROUNDS, out=tmp_path)
