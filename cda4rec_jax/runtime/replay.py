"""Stored traces under a run: how its planner decides the same contexts, and how well times and links were foreseen."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import msgspec
import numpy as np
from jaxtyping import Float

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Placement
from cda4rec_jax.metrics import Interval, paired_interval
from cda4rec_jax.planner import allowed
from cda4rec_jax.planner.counterfactual import forbidding_rules
from cda4rec_jax.planner.utility import utility
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.runtime.recommend.planning import score_plans
from cda4rec_jax.runtime.traces import RunIdentity, StoredTrace, batch_contexts, run_identity


@dataclass(frozen=True, kw_only=True)
class PlanChange:
    """Requests whose plan was ``before`` and is ``now``."""

    before: str
    now: str
    count: int
    forbidden: int  # of them, those to which ``before`` is forbidden now
    utility: float | None  # now minus before, mean over the others; None where there are none, or the planner tells no quality


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Median over ``count`` of |predicted - measured| / measured."""

    name: str
    count: int
    median_absolute_percentage_error: float


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What became of stored traces.

    Attributes:
        run: the run that decided again.
        num_traces, num_users: of the file; a user counts once in each session that wrote to it.
        num_same_run: traces that this very run wrote.
        num_asked_for: traces whose plan the caller had asked for: they are not compared.
        num_compared, num_equal: traces whose plan was chosen, and those whose plan is the same now.
        gain: mean expected utility of the plan now minus that of the stored one, by this run's quality and costs at the stored prices,
            over requests that allow both; the interval is by user. None where there is no such request.
        changes: requests whose plan differs, by pair of plans, most frequent first.
        forbidden: requests whose stored plan this run forbids, by rule.
        num_forbidden: the same, each counted once.
        latency: predicted against measured, whole requests that ran as planned.
        subtasks: predicted against measured compute, by sub-task and placement.
        num_failed: requests that ended with another plan than they began with.
        flags: traces that raised each flag.
    """

    run: RunIdentity
    num_traces: int
    num_users: int
    num_same_run: int
    num_asked_for: int
    num_compared: int
    num_equal: int
    gain: Interval | None
    changes: tuple[PlanChange, ...]
    forbidden: dict[str, int]
    num_forbidden: int
    latency: Accuracy | None
    subtasks: tuple[Accuracy, ...]
    num_failed: int
    flags: dict[str, int]

    def to_json(self) -> str:
        """The same as one JSON object."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()


def replay_traces(trained: TrainedSystem, traces: Sequence[StoredTrace]) -> Replay:
    """Decide every stored context again, with the planner of ``trained`` in the world that it was trained for.

    Raises:
        UserError: the run has no planner, or a stored plan is none of its plans.
    """
    policy = trained.system.policy
    if policy is None:
        raise UserError(f"{trained.run.path} holds a baseline ({trained.run.kind}) without a planner: replay needs a joint run")
    space = trained.config.space
    names = list(space.names)
    # What a plan became need not be a plan to choose: one of a user's own loses structured modelling and has no other to turn into.
    unknown = sorted({trace.plan for trace in traces} - set(names))
    if unknown:
        raise UserError(
            f"the traces hold plans that this run does not have: {', '.join(unknown)}. Replay them under their own run"
        )
    context = batch_contexts([trace.context for trace in traces])
    scores = jax.jit(partial(score_plans, policy))(trained.world(), context)
    # A planner that tells no quality says nothing of what a plan is worth.
    unknown_worth = np.full(scores.mask.shape, np.nan)
    worth = unknown_worth if scores.quality is None else np.asarray(utility(scores.quality, scores.costs, context), np.float64)
    mask, rows = np.asarray(scores.mask), np.arange(len(traces))
    now, before = np.asarray(scores.choices()), np.asarray([names.index(trace.plan) for trace in traces])
    chosen = np.asarray([trace.asked_for is None for trace in traces])
    gains = np.where(mask[rows, before], worth[rows, now] - worth[rows, before], np.nan)
    lost = chosen & ~mask[rows, before]
    forbidding = forbidding_rules(context, partial(allowed, space=space))
    rules = {rule: np.asarray(found)[rows, before] & lost for rule, found in forbidding.items()}
    users, identity = np.asarray([trace.user for trace in traces]), run_identity(trained)
    return Replay(
        run=identity,
        num_traces=len(traces),
        num_users=len(set(users)),
        num_same_run=sum(trace.run.weights == identity.weights for trace in traces),
        num_asked_for=int((~chosen).sum()),
        num_compared=int(chosen.sum()),
        num_equal=int((chosen & (now == before)).sum()),
        gain=_by_user(gains, users, chosen & ~np.isnan(gains)),
        changes=_changes([names[plan] for plan in before], [names[plan] for plan in now], gains, chosen & (now != before), lost),
        forbidden={rule: int(found.sum()) for rule, found in rules.items() if found.any()},
        num_forbidden=int(lost.sum()),
        latency=_request_accuracy(traces),
        subtasks=_subtask_accuracy(traces),
        num_failed=sum(trace.plan != trace.executed_plan for trace in traces),
        flags=dict(Counter(flag for trace in traces for flag in trace.flags).most_common()),
    )


def _by_user(values: Float[np.ndarray, "n"], users: np.ndarray, counted: np.ndarray) -> Interval | None:
    """Mean over users of their means over counted requests, with its interval."""
    if not counted.any():
        return None
    _, owner = np.unique(users[counted], return_inverse=True)
    means = np.bincount(owner, weights=values[counted]) / np.bincount(owner)
    return paired_interval(means[:, None], np.zeros((len(means), 1)))


def _changes(
    before: list[str], now: list[str], gains: np.ndarray, differs: np.ndarray, forbidden: np.ndarray
) -> tuple[PlanChange, ...]:
    pairs: dict[tuple[str, str], list[int]] = {}
    for row in np.flatnonzero(differs).tolist():
        pairs.setdefault((before[row], now[row]), []).append(row)
    found = []
    for (old, new), rows in pairs.items():
        lost, known = int(forbidden[rows].sum()), gains[rows][~np.isnan(gains[rows])]
        worth = float(known.mean()) if len(known) else None
        found.append(PlanChange(before=old, now=new, count=len(rows), forbidden=lost, utility=worth))
    return tuple(sorted(found, key=lambda change: (-change.count, change.before, change.now)))


def _request_accuracy(traces: Sequence[StoredTrace]) -> Accuracy | None:
    as_planned = [trace for trace in traces if trace.plan == trace.executed_plan and trace.latency_ms > 0]
    return _accuracy("request", [(trace.predicted_ms, trace.latency_ms) for trace in as_planned])


def _subtask_accuracy(traces: Sequence[StoredTrace]) -> tuple[Accuracy, ...]:
    """Sub-tasks that take time (reusing an embedding is none), wherever they ran as planned."""
    times: dict[str, list[tuple[float, float]]] = {}
    for trace in traces:
        for span in trace.spans if trace.plan == trace.executed_plan else ():
            measured_ms = span.end_ms - span.start_ms
            if span.placement is not Placement.REUSE and measured_ms > 0:
                times.setdefault(f"{span.subtask}, {span.placement}", []).append((span.predicted_ms, measured_ms))
    found = [_accuracy(name, pairs) for name, pairs in sorted(times.items())]
    return tuple(each for each in found if each is not None)


def _accuracy(name: str, pairs: Sequence[tuple[float, float]]) -> Accuracy | None:
    if not pairs:
        return None
    predicted, measured = np.asarray(pairs).T
    error = float(np.median(np.abs(predicted - measured) / measured))
    return Accuracy(name=name, count=len(pairs), median_absolute_percentage_error=error)
