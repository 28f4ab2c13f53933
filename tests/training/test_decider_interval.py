"""Steps between those that move the deciders: who is withheld then, and what stays as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import load_corpus
from cda4rec_jax.training import RunConfig, StepConfig, Trainer


@pytest.fixture
def trainer(tiny_run: Path, tmp_path: Path) -> Trainer:
    """At the start of ``tiny_run``, with deciders on every third step."""
    run = RunDirectory.open(tiny_run)
    config = run.read_config("run", RunConfig)
    of_step = StepConfig(system=config.system, train=replace(config.train, decider_interval=3))
    exposure = tuple(run.read_json("exposure")["exposure"])
    return Trainer(load_corpus(run), of_step, config.packing, exposure, RunDirectory.create(tmp_path / "again", {}, run.kind))


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_only_every_nth_batch_has_withheld_users(trainer: Trainer):
    assert [trainer.source[step].withheld is not None for step in range(7)] == [True, False, False, True, False, False, True]


def test_between_them_trunks_move_and_deciders_and_their_optimiser_stay(trainer: Trainer):
    before = {name: arrays(getattr(trainer.state, name)) for name in ("trunk", "deciders", "decider_optimizer")}
    frozen = trainer._constants[0]
    state, values = trainer.state, {}
    for step in (1, 2):  # the warm-up starts at a learning rate of 0
        state, values = trainer._joint(state, trainer.layout.place_batch(trainer.source[step]), frozen, None, None)
    assert any(not np.array_equal(a, b) for a, b in zip(before["trunk"], arrays(state.trunk), strict=True))
    for name in ("deciders", "decider_optimizer"):
        assert all(np.array_equal(a, b) for a, b in zip(before[name], arrays(getattr(state, name)), strict=True))
    assert "planner_loss" not in values and np.isfinite(float(values["loss"]))
