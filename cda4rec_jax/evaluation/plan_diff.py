"""Plans of two runs over the same requests, and what they earn.

Requests are contexts v1 of test events. Prices are those of run A for both: the scales of the prices are measured by each run, and
utilities at different prices cannot be subtracted. Each planner decides with the costs and the exposure of its own run, as it does in
service.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import msgspec
import numpy as np
from jaxtyping import Bool, Float

from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.choices import Choices, brings, choose
from cda4rec_jax.evaluation.report import FAMILIES
from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, Link
from cda4rec_jax.metrics import Interval, paired_interval
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.runs import provenance
from cda4rec_jax.runs.artifacts import TrainedSystem

Progress = Callable[[str, int, int], None]
_SLICES = {"link": Link, "tier": DeviceTier, "consent": EgressLevel}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Some of the requests: how often the runs agree, and what run B (its plans and its agents) earns above run A."""

    name: str
    num_requests: int
    agreement: float
    gain: Interval  # by user


@dataclass(frozen=True, kw_only=True)
class PlanPair:
    """Requests in which run A chooses ``plan_a`` and run B ``plan_b``."""

    plan_a: str
    plan_b: str
    count: int


@dataclass(frozen=True, kw_only=True)
class PlanDiff:
    """Two runs over the same requests. Utilities are realised: links fail, and accuracy is that of the held-out event.

    Attributes:
        run_a, run_b: paths as they were given.
        dataset: name of the data of both.
        num_users, num_requests: users, with the same number of contexts each.
        price_scales: those of run A, which price both; ``price_scales_b`` are run B's own.
        all: over all requests. ``slices``: by link, tier and consent.
        utility: mean, by whose plans ("a", "b") and by whose agents answer: ``utility["b plans, a agents"]``.
        plans_b_minus_a: what the plans of B earn above those of A, by whose agents answer.
        families: requests by family of A's plan, then by family of B's.
        pairs: requests whose plans differ, by pair, most frequent first.
    """

    run_a: str
    run_b: str
    dataset: str
    num_users: int
    num_requests: int
    seed: int
    price_scales: dict[str, float]
    price_scales_b: dict[str, float]
    all: Slice
    slices: tuple[Slice, ...]
    utility: dict[str, float]
    plans_b_minus_a: dict[str, Interval]
    families: dict[str, dict[str, int]]
    pairs: tuple[PlanPair, ...]
    provenance: dict[str, Any]

    def to_json(self) -> str:
        """The same as one JSON object."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()


def diff_plans(
    run_a: TrainedSystem,
    run_b: TrainedSystem,
    *,
    num_requests: int = 1000,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> PlanDiff:
    """Compare the planners of two runs on at least ``num_requests`` contexts of test events of users that ``seed`` draws.

    Every user has the same number of contexts: one, or as many as it takes where there are fewer users than requests.

    Raises:
        UserError: a run without a planner, runs on other data or with other contexts, or fewer than 2 requests.
    """
    if num_requests < 2:
        raise UserError(f"--requests is {num_requests}: expected at least 2, since runs are compared across users")
    _check(run_a, run_b)
    num_users = run_a.corpus.interactions.num_users
    users = np.sort(np.random.default_rng(seed).permutation(num_users)[:num_requests])
    draws = -(-num_requests // len(users))
    world_a, world_b = run_a.world(), run_b.world()
    priced_b = replace(world_b, scales=world_a.scales)
    records = {}
    for name, run, world in (("a", run_a, world_a), ("b", run_b, priced_b)):
        records[name] = _records(run, world, users, draws, partial(progress, f"requests of run {name.upper()}"))
    choices = {name: _choices(run, records[name]) for name, run in (("a", run_a), ("b", run_b))}
    found = {agents: brings(records[agents], choices) for agents in records}
    earned = {(plans, agents): np.asarray(found[agents][plans]["utility"], np.float64) for plans in "ab" for agents in "ab"}
    return _compared(run_a, run_b, records["a"].requests.context, choices, earned, world_a, world_b, seed)


def _choices(run: TrainedSystem, records: PlanRecords) -> Choices:
    assert run.system.policy is not None
    return choose(records, run.system.policy.logits)


def _check(run_a: TrainedSystem, run_b: TrainedSystem) -> None:
    for run in (run_a, run_b):
        if run.system.policy is None:
            raise UserError(f"{run.run.path} holds a baseline ({run.run.kind}) without a planner: compare runs of a joint preset")
    ours, theirs = (run.corpus.interactions.fingerprint for run in (run_a, run_b))
    if ours != theirs:
        raise UserError(
            f"{run_a.run.path} and {run_b.run.path} were trained on different data (fingerprints {ours[:12]} and {theirs[:12]}), so "
            "they share no requests: train both on the same prepared folder, such as the data/ of one of them"
        )
    if run_a.config.space != run_b.config.space:
        raise UserError(
            f"{run_a.run.path} and {run_b.run.path} choose from different plans or pay different costs: compare runs whose planners have "
            "the same plans and cost terms"
        )
    for name in ("max_cache_age", "stored_events"):  # what a context takes from a run, beside its data
        kept_a, kept_b = (getattr(run.config, name) for run in (run_a, run_b))
        if kept_a != kept_b:
            raise UserError(
                f"the runs would see the same events in different contexts: {name} is {kept_a} in {run_a.run.path} and {kept_b} in "
                f"{run_b.run.path}. Compare runs of one preset"
            )


def _records(run: TrainedSystem, world: PlanningWorld, users: np.ndarray, draws: int, progress: Any) -> PlanRecords:
    positions = run.corpus.target_positions(Split.TEST)[users]
    return run.population.records(jax.device_put(run.weights), world, users, positions, draws=draws, progress=progress)


def _compared(
    run_a: TrainedSystem,
    run_b: TrainedSystem,
    context: Context,
    choices: dict[str, Choices],
    earned: dict[tuple[str, str], Float[np.ndarray, "draws n"]],
    world_a: PlanningWorld,
    world_b: PlanningWorld,
    seed: int,
) -> PlanDiff:
    agrees, gains = choices["a"] == choices["b"], earned["b", "b"] - earned["a", "a"]
    everything = np.ones(agrees.shape, bool)
    slices = []
    for field, values in _SLICES.items():
        for kind in values:
            rows = np.asarray(getattr(context, field)) == int(kind)
            if rows.any():
                name = kind.label if isinstance(kind, Link) else kind.name.lower()
                slices.append(_slice(f"{field} {name}", agrees, gains, rows))
    names = np.asarray(run_a.config.space.names)
    pairs = Counter(zip(names[choices["a"].ravel()].tolist(), names[choices["b"].ravel()].tolist(), strict=True))
    kinds = tuple(dict.fromkeys([*FAMILIES, *(plan.split("-")[0] for plan in names.tolist())]))
    families = {family: dict.fromkeys(kinds, 0) for family in kinds}
    for (plan_a, plan_b), count in pairs.items():
        families[plan_a.split("-")[0]][plan_b.split("-")[0]] += count
    return PlanDiff(
        run_a=str(run_a.run.path),
        run_b=str(run_b.run.path),
        dataset=run_a.corpus.interactions.name,
        num_users=agrees.shape[1],
        num_requests=agrees.size,
        seed=seed,
        price_scales={name: float(value) for name, value in vars(world_a.scales).items()},
        price_scales_b={name: float(value) for name, value in vars(world_b.scales).items()},
        all=_slice("all", agrees, gains, everything),
        slices=tuple(slices),
        utility={f"{plans} plans, {agents} agents": float(values.mean()) for (plans, agents), values in earned.items()},
        plans_b_minus_a={f"{agents} agents": _by_user(earned["b", agents] - earned["a", agents], everything) for agents in "ab"},
        families=families,
        pairs=tuple(
            PlanPair(plan_a=plan_a, plan_b=plan_b, count=count)
            for (plan_a, plan_b), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
            if plan_a != plan_b
        ),
        provenance=provenance(dataset_fingerprint=run_a.corpus.interactions.fingerprint),
    )


def _slice(name: str, agrees: Bool[np.ndarray, "draws n"], gains: Float[np.ndarray, "draws n"], rows: np.ndarray) -> Slice:
    return Slice(name=name, num_requests=int(rows.sum()), agreement=float(agrees[rows].mean()), gain=_by_user(gains, rows))


def _by_user(values: Float[np.ndarray, "draws n"], rows: Bool[np.ndarray, "draws n"]) -> Interval:
    """Mean over users of their means over the requests in ``rows``, with its interval."""
    counts = rows.sum(axis=0)
    means = (values * rows).sum(axis=0)[counts > 0] / counts[counts > 0]
    return paired_interval(means[:, None], np.zeros((len(means), 1)))
