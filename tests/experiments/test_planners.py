"""The experiments on planners, on a tiny run. Planners that they train alone start and end as plug-in: training has tests of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from cda4rec_jax.data import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import DeviceTier, Link

Scripts = Callable[[str], ModuleType]


@pytest.fixture
def trainings(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(world, configuration) of every planner that an experiment trains alone."""
    asked = []
    planners = scripts("planners")

    def untrained(examples: Any, world: Any, config: Any, start: Any = None) -> Any:
        asked.append((world, config))
        return SimpleNamespace(policy=planners.new_planner(examples, world, config) if start is None else start)

    monkeypatch.setattr(planners, "train_planner", untrained)
    return asked


def stored(folder: Path, stem: str) -> dict[str, Any]:
    result = json.loads((folder / f"{stem}.json").read_text())
    assert result["question"] in (folder / f"{stem}.md").read_text()
    assert (folder / f"{stem}.png").stat().st_size > 10_000
    return result


def test_drawn_records_are_those_that_the_models_give(scripts: Scripts, options: Any):
    study = scripts("harness").Study(options)
    users, positions = study.of_split(Split.TEST)
    trained = study.ours(0)
    whole = trained.population.records(jax.device_put(trained.weights), trained.world(), users, positions, draws=2)
    again = scripts("planners").records_of(study, 0, Split.TEST, "deployment", 2)
    for one, other in zip(jax.tree.leaves(whole.requests), jax.tree.leaves(again.requests), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_array_equal(whole.ranks, again.ranks)
    measured = scripts("planners").records_of(study, 0, Split.TEST, "measured", 2)
    np.testing.assert_array_equal(measured.requests.context.link, again.requests.context.link)
    assert not np.allclose(measured.requests.predicted.latency_ms, again.requests.predicted.latency_ms)


def test_planner_decisions_by_every_yardstick(scripts: Scripts, options: Any, trainings: list[Any], tmp_path: Path):
    script = scripts("planner_decisions")
    script.main(options, draws=2, steps=1)
    result = stored(tmp_path, "planner-decisions-synthetic")
    assert set(result["profiles"]) == {"deployment", "measured"}
    for found in result["profiles"].values():
        utility, regret = ({name: one["mean"] for name, one in found["overall"][kind].items()} for kind in ("utility", "regret"))
        assert max(utility, key=lambda name: utility[name]) == "hindsight"
        for name in utility:
            assert regret[name] == pytest.approx(utility["context-oracle"] - utility[name], abs=1e-6)
        for groups in found["by_group"].values():
            assert sum(group["share_of_requests"]["mean"] for group in groups.values()) == pytest.approx(1)
        share = found["quality"]
        assert share["interaction"]["mean"] > share["cell"]["mean"]
    without = [config for _, config in trainings if config.contexts.tier_shares[DeviceTier.LOW] == 0]
    assert len(trainings) == 3 and len(without) == 1  # kept for the second profile
    assert without[0].contexts.link_shares[Link.THREE_G] == 0 < without[0].contexts.link_shares[Link.WIFI]


def test_pareto_compares_one_policy_with_many(scripts: Scripts, options: Any, trainings: list[Any], tmp_path: Path):
    script = scripts("pareto")
    script.main(options, draws=1, trained_strengths=(2.0,), steps=2)  # steps of its own: what another test kept is not found
    result = stored(tmp_path, "pareto-synthetic")
    assert len(result["points"]["fixed plans"]) == 32
    assert set(result["points"][script.SINGLE]) == {"time 2", "energy 2", "exposure 2", "all 2"}
    one = result["points"][script.ONE]
    latency = [one[f"time {strength:g}"]["latency_ms"]["mean"] for strength in script.STRENGTHS]
    assert latency[-1] < latency[0] <= one["none"]["latency_ms"]["mean"]
    for volumes in result["hypervolume"].values():
        assert all(volume["low"] <= volume["mean"] <= volume["high"] for volume in volumes.values())
        assert 0 < volumes[script.FIXED]["mean"] <= 1
    alone, *single = (world.scales for world, _ in trainings)
    dear = single[0]
    assert float(dear.latency_gap_ms) == pytest.approx(float(alone.latency_gap_ms) / 2)
    assert float(dear.exposure_gap) > 1e20


def test_faults_are_told_by_their_flags(scripts: Scripts, options: Any, tmp_path: Path):
    script, lab = scripts("faults"), scripts("fault_lab")
    script.main(options, requests=4)
    result = stored(tmp_path, "faults-synthetic")
    rows = result["scenarios"]
    assert all(row["slates"] == row["requests"] == 4 for row in rows.values())
    assert rows[lab.NONE]["link_failed"]["mean"] == rows[lab.NONE]["regret_high"]["mean"] == 0
    for name in (lab.FAILED, lab.MEMORY):
        if rows[name]["meet_it"]:
            assert rows[name][rows[name]["flag"]]["mean"] == 1
    worst = rows[lab.WORST]
    assert worst["meet_it"] and worst["expected_regret"]["mean"] > rows[lab.NONE]["expected_regret"]["mean"] == 0
    with pytest.raises(UserError, match="slowdown"):
        script.main(options, slowdown=1)
