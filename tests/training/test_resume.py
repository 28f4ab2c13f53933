"""A run that was killed or stopped at any moment goes on as if nothing had happened, bit for bit."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cda4rec_jax.cli import main
from cda4rec_jax.runs import RunDirectory

# As the fixture `tiny_run` in conftest.py, which is the uninterrupted run.
TINY = ["--preset", "tiny", "--data", "synthetic:users=300,items=150", "--checkpoint-minutes", "0"]
PROGRAM = "import sys; from cda4rec_jax.cli import main; sys.exit(main())"
DEADLINE_S = 400


def losses(run: Path) -> list[dict[str, Any]]:
    """Every logged number but the clock's."""
    return [{name: value for name, value in row.items() if name != "elapsed_s"} for row in RunDirectory.open(run).metrics()]


def assert_equals_the_uninterrupted_run(run: Path, uninterrupted: Path) -> None:
    assert losses(run) == losses(uninterrupted)
    weights, expected = (RunDirectory.open(path).load_weights("final") for path in (run, uninterrupted))
    assert all(np.array_equal(weights[name], expected[name]) for name in expected) and weights.keys() == expected.keys()
    assert RunDirectory.open(run).read_json("planner") == RunDirectory.open(uninterrupted).read_json("planner")


def last_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return max((row["step"] for row in RunDirectory.open(run).metrics()), default=-1) if file.is_file() else -1


def newest_checkpoint(run: Path) -> int:
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def train(*arguments: str) -> tuple[int, str]:
    """Run the command to its end; exit code and stderr, its spaces made single."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "train", *arguments], capture_output=True, text=True, timeout=DEADLINE_S
    )
    return done.returncode, " ".join(done.stderr.split())


def signal_when(ready: Callable[[], bool], number: signal.Signals, *arguments: str) -> tuple[int, str]:
    """As ``train``, but send a signal as soon as ``ready`` says so."""
    command = [sys.executable, "-c", PROGRAM, "train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not ready():
                assert process.poll() is None and time.monotonic() < deadline, "training ended before it was to be stopped"
                time.sleep(0.005)
            process.send_signal(number)
            _, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    return process.returncode, " ".join(errors.split())


def checkpoints_every(minutes: float, run: Path) -> None:
    """Change how often a run saves itself from its next start on."""
    file = run / "config.json"
    stored = json.loads(file.read_text())
    stored["config"]["run"]["train"]["checkpoint_minutes"] = minutes
    file.write_text(json.dumps(stored))


def test_a_run_that_is_killed_then_stopped_then_killed_again_ends_as_one_that_was_not(tiny_run: Path, tmp_path: Path) -> None:
    run, num_joint_steps = tmp_path / "run", max(row["step"] for row in losses(tiny_run) if row["phase"] == "joint")
    resume = ("--resume", "--out", str(run))
    # Killed while agents train.
    assert signal_when(lambda: newest_checkpoint(run) >= 10, signal.SIGKILL, *TINY, "--out", str(run))[0] == -signal.SIGKILL
    assert newest_checkpoint(run) < 30
    # Ctrl-C while agents train, when nothing else would have saved them.
    checkpoints_every(60, run)
    code, message = signal_when(lambda: last_logged(run) >= 40, signal.SIGINT, *resume)
    assert (code, message) == (130, f"cda4rec: stopped; the run is saved. Continue it with: cda4rec train --out {run} --resume")
    assert 40 <= newest_checkpoint(run) < num_joint_steps
    # Killed while the planner trains.
    checkpoints_every(0, run)
    planning = signal_when(lambda: newest_checkpoint(run) > num_joint_steps, signal.SIGKILL, *resume)
    assert planning[0] == -signal.SIGKILL and not (run / "training.json").exists()
    assert train(*resume) == (0, "")
    assert_equals_the_uninterrupted_run(run, tiny_run)


def test_resuming_a_finished_run_changes_nothing(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    assert main(["train", "--resume", "--out", str(tiny_run)]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before
