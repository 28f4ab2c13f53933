"""Deciders that are trained again on the trunks of a finished run, and joint systems without text."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.presets import preset
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import load_corpus
from cda4rec_jax.training import job, refit_deciders

STOPPED_AND_RESUMED = """
import signal, sys
from cda4rec_jax.cli.process import set_up_process
from cda4rec_jax.presets import preset
from cda4rec_jax.training import Interrupted, refit_deciders, train_run

set_up_process()

def watch(progress):
    if progress.phase == "refit" and progress.values and progress.step == 30:
        signal.raise_signal(signal.SIGINT)

run, again = sys.argv[1:]
ignored = "", preset("tiny"), run  # it goes on with its own data and configuration
try:
    train_run(*ignored, resume=True, watch=watch)
    sys.exit("was not stopped")
except Interrupted:
    train_run(*ignored, resume=True)
refit_deciders(run, again, practice_steps=3)
"""


def test_trunks_are_trained_again_under_the_same_deciders_and_deciders_on_the_same_trunks(tiny_run: Path, tmp_path: Path):
    paths = tmp_path / "run", tmp_path / "again"
    # As if `tiny_run` were one that trains its trunks again, and had been stopped before.
    shutil.copytree(tiny_run, paths[0])
    (paths[0] / "training.json").unlink()
    stored = json.loads((paths[0] / "config.json").read_text())
    stored["config"]["run"]["train"] |= {"refit_trunks": True, "policy_steps": 40}
    (paths[0] / "config.json").write_text(json.dumps(stored))
    done = subprocess.run([sys.executable, "-c", STOPPED_AND_RESUMED, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    once, run, again = (RunDirectory.open(path).load_weights("final") for path in (tiny_run, *paths))
    deciders = {path for path in run if "head" in path or "policy" in path}
    assert all(np.array_equal(once[path], run[path]) for path in deciders if "head" in path)
    trunks = {path for path in run if path not in deciders and not np.array_equal(once[path], run[path])}
    assert {"cloud/items/ids/value", "device/projection/value"} <= trunks
    rows = RunDirectory.open(paths[0] / "refit").metrics()
    assert {row["phase"] for row in rows} == {"refit", "validation"} and [row["step"] for row in rows].count(30) == 1
    assert all("fusion_loss" not in row for row in rows)
    # The policy alone went on before the new trunks, as far as that was of use to users who did not train it.
    last = RunDirectory.open(paths[0])
    alone = last.read_json("planner_training")
    steps = [row["step"] for row in last.metrics() if row["phase"] == "policy"]
    utilities = {row["step"]: row["utility"] for row in alone["curve"]}
    assert steps == list(range(steps[0], steps[0] + 40, 2)) and utilities[alone["best_step"]] == max(utilities.values())
    moved = any(not np.array_equal(once[path], run[path]) for path in deciders if "policy" in path)
    assert moved == (alone["best_step"] > 0)
    # New deciders leave the trunks as they are.
    measured = {"device/head/mean/value", "device/head/deviation/value"}  # of the same trunks
    changed = {path for path in run if not np.array_equal(run[path], again[path])}
    assert changed <= deciders and {path for path in deciders if "head" in path and path not in measured} <= changed
    renewed = RunDirectory.open(paths[1])
    assert [row["phase"] for row in renewed.metrics()] == ["practice", "planner", *["policy"] * 20]
    assert renewed.has("training.json") and renewed.has("cost_profile.json")


def test_a_run_without_deciders_cannot_be_refitted(tiny_baseline: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no deciders"):
        refit_deciders(tiny_baseline, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_joint_system_without_text_keeps_categories_when_it_is_loaded_again(tiny_run: Path, tmp_path: Path):
    config = replace(preset("tiny"), text_dimensions=0)
    run = RunDirectory.create(tmp_path / "run", {"run": config}, config.kind)
    run.data_folder.symlink_to(tiny_run / "data")
    made = job._corpus(config, run)
    assert made.prefix_size == load_corpus(run).prefix_size == load_corpus(RunDirectory.open(tiny_run)).prefix_size
    assert made.text.shape == (made.interactions.num_items + 1, 1) and not made.text.any()


def test_a_run_is_never_replaced_by_one_that_is_made_of_it(tmp_path: Path):
    run = shutil.copytree(Path(__file__).parents[2] / "checkpoints" / "synthetic-tiny", tmp_path / "run")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="is the run itself"):
        refit_deciders(run, tmp_path / "." / "run", overwrite=True)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
