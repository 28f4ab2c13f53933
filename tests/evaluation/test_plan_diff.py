"""Two runs over the same requests: what agrees, what it earns, and what cannot be compared."""

import json
from dataclasses import fields, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.plan_diff import PlanDiff, diff_plans
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.planner import PLANS, realised_utility
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
NUM_USERS, NUM_REQUESTS = 200, 390  # two contexts of each user


class OtherWorld(TrainedSystem):
    """A run whose prices were drawn at four times the quality gap."""

    def world(self, profile: str | None = None) -> PlanningWorld:
        world = super().world(profile)
        return replace(world, scales=replace(world.scales, quality_gap=4.0 * world.scales.quality_gap))


@pytest.fixture(scope="module")
def trained() -> TrainedSystem:
    return load_trained(FOLDER)


@pytest.fixture(scope="module")
def other(trained: TrainedSystem) -> TrainedSystem:
    """The same agents, with a planner that overrates the last plans, and other prices."""

    def shift(path: tuple, leaf: np.ndarray) -> np.ndarray:
        is_mean = "mean_quality" in jax.tree_util.keystr(path)
        return leaf + np.linspace(0.0, 0.05, len(leaf)).astype(leaf.dtype) if is_mean else leaf

    values = {entry.name: getattr(trained, entry.name) for entry in fields(trained)}
    return OtherWorld(**values | {"weights": jax.tree_util.tree_map_with_path(shift, trained.weights)})


@pytest.fixture(scope="module")
def found(trained: TrainedSystem, other: TrainedSystem) -> PlanDiff:
    return diff_plans(trained, other, num_requests=NUM_REQUESTS)


def test_agreement_confusion_and_slices_count_the_same_requests(found: PlanDiff) -> None:
    differing = sum(pair.count for pair in found.pairs)
    assert 0 < differing < found.num_requests
    assert found.all.agreement == pytest.approx(1 - differing / found.num_requests)
    assert sum(sum(row.values()) for row in found.families.values()) == found.num_requests
    for field in ("link", "tier", "consent"):
        parts = [part for part in found.slices if part.name.startswith(field)]
        assert sum(part.num_requests for part in parts) == found.num_requests
        weighted = sum(part.num_requests * part.agreement for part in parts) / found.num_requests
        assert weighted == pytest.approx(found.all.agreement)


def test_utility_is_what_the_chosen_plans_realise_at_the_prices_of_run_a(
    found: PlanDiff, trained: TrainedSystem, other: TrainedSystem
) -> None:
    users = np.arange(NUM_USERS)
    positions = trained.corpus.target_positions(Split.TEST)
    records = trained.population.records(jax.device_put(trained.weights), trained.world(), users, positions, draws=2)
    requests, gains = records.requests, []
    for draw in range(2):
        now = jax.tree.map(lambda leaf, draw=draw: leaf[draw], requests)
        worth = np.asarray(realised_utility(records.quality, now.realised, now.context, failed=now.failed, mask=now.mask))
        for run, sign in ((trained, -1), (other, 1)):
            assert run.system.policy is not None
            plans = np.asarray(run.system.policy.logits(now.context, now.predicted, now.mask)).argmax(axis=1)
            gains.append(sign * worth[users, plans])
    expected = float(np.sum(gains) / (2 * NUM_USERS))
    assert found.plans_b_minus_a["a agents"].mean_difference == pytest.approx(expected, abs=1e-6)
    assert found.utility["b plans, a agents"] - found.utility["a plans, a agents"] == pytest.approx(expected, abs=1e-6)
    assert found.price_scales_b["quality_gap"] == pytest.approx(4 * found.price_scales["quality_gap"])
    # The agents are the same, so only the plans make a difference.
    assert found.all.gain == found.plans_b_minus_a["a agents"] == found.plans_b_minus_a["b agents"]


def test_json_names_both_runs_and_the_protocol(found: PlanDiff) -> None:
    told = json.loads(found.to_json())
    assert told["run_a"] == str(FOLDER) and told["num_requests"] == 2 * NUM_USERS
    names = {plan.name for plan in PLANS}
    assert all({pair["plan_a"], pair["plan_b"]} <= names for pair in told["pairs"])
    assert told["provenance"]["dataset_fingerprint"]


def test_what_cannot_be_compared_is_refused(trained: TrainedSystem) -> None:
    with pytest.raises(UserError, match="--requests is 1: expected at least 2"):
        diff_plans(trained, trained, num_requests=1)
    interactions = replace(trained.corpus.interactions, titles=("",) * trained.corpus.interactions.num_items)
    stranger = replace(trained, corpus=replace(trained.corpus, interactions=interactions))
    with pytest.raises(UserError, match=r"trained on different data .*: train both on the same prepared folder"):
        diff_plans(trained, stranger)
    forgetful = replace(trained, config=replace(trained.config, max_cache_age=2))
    with pytest.raises(UserError, match=r"different contexts: max_cache_age is 20 .* and 2 .*Compare runs of one preset"):
        diff_plans(trained, forgetful)
