"""Planners that are trained by each objective, on a tiny run and in earnest."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.errors import UserError
from cda4rec_jax.planner import Objective

Scripts = Callable[[str], ModuleType]
STEPS = 60


def test_objectives_are_compared_over_seeds_of_the_planner(
    scripts: Scripts, options: Any, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script, planners = scripts("objectives"), scripts("planners")
    train, learned = planners.train_planner, {}

    def watched(examples: Any, world: Any, config: Any, start: Any = None) -> Any:
        found = train(examples, world, config, start)
        learned[config.objective, config.seed] = jax.tree.leaves(nnx.state(found.policy, nnx.Param))
        return found

    monkeypatch.setattr(planners, "train_planner", watched)
    script.main(options, planner_seeds=2, draws=2, steps=STEPS)
    result = json.loads((tmp_path / "objectives-synthetic.json").read_text())
    assert list(learned) == [(objective, seed) for objective in Objective for seed in (0, 1)]
    kept = {path.name for path in (work / "synthetic" / "cells").glob(f"*-{STEPS}-steps-users100.npz")}
    assert {f"cda4rec-0-policy-{objective}-{seed}-{STEPS}-steps-users100.npz" for objective, seed in learned} <= kept

    found = result["planners"]
    assert list(found) == ["exact", "gumbel", "regression", "plug-in"]
    for name, one in found.items():
        for gain, other in (("minus_plug_in", "plug-in"), ("minus_exact", "exact")):
            assert (gain in one) == (name != other)
            if gain in one:
                assert one[gain]["mean"] == pytest.approx(one["utility"]["mean"] - found[other]["utility"]["mean"], abs=1e-9)
                assert one[gain]["low"] <= one[gain]["mean"] <= one[gain]["high"]
        assert sum(one["of_planners"]["utility"]) / 2 == pytest.approx(one["utility"]["mean"])
    assert found["plug-in"]["equal_to_plug_in"]["mean"] == 1
    for objective in (Objective.GUMBEL, Objective.REGRESSION):  # what is learned differs; so few decisions need not
        assert not all(map(np.array_equal, learned[objective, 0], learned[Objective.EXACT, 0]))
    assert 0 < found["exact"]["equal_to_plug_in"]["mean"] < 1  # training moves decisions, and not all of them
    first, second = found["exact"]["of_planners"]["utility"]
    assert first != second  # the seed of the planner counts

    page = (tmp_path / "objectives-synthetic.md").read_text()
    assert result["question"] in page and result["verdict"] in page and "| regression |" in page
    assert (tmp_path / "objectives-synthetic.png").stat().st_size > 10_000


def test_no_planner_is_refused_before_anything_is_trained(scripts: Scripts, options: Any):
    with pytest.raises(UserError, match="at least 1 planner"):
        scripts("objectives").main(options, planner_seeds=0)
