"""Calibration: what a request takes on this machine, and how well the planner predicts it.

Real requests run through ``Recommender``: planned, released through the gate, over the wire to the cloud and back, ranked. Every plan
takes its turn in every round, beside the bare functions of every sub-task. The time of a request is cut into the parts that the cost
formula (``planner.costs``) adds up, so that nothing between two sub-tasks is lost; the median of each part is the measured cost profile.
Then other users ask, with every plan and over every link, and what the new profile predicts is held against what they wait for.

The link is virtual and exactly as estimated, so its time is the same on both sides but for the bytes: those are predicted, too. What is
aimed at is therefore the error of compute alone.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import DeviceTier, HistoryBatch, Link, Placement, Span, Subtask, Trace
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.pipeline.calibration import ROUNDS, Bucket, fit_times, in_turns, subtask_calls
from cda4rec_jax.planner import MeasuredTimes
from cda4rec_jax.runs import provenance
from cda4rec_jax.runs.artifacts import TrainedSystem, save_measured_times
from cda4rec_jax.runtime.clock import LinkRealisation
from cda4rec_jax.runtime.recommend.planning import LINK_NAMES, Situation
from cda4rec_jax.runtime.recommend.recommender import Answered, Recommender

USERS = 16  # whose requests are fitted; as many others validate
LEAST_ROUNDS = 3
TARGET_ERROR = 0.15  # median absolute percentage error of compute, as a share
LINKS = tuple(link for link in Link if link is not Link.OFFLINE)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class SubtaskTimes:
    """One sub-task in one shape: the bare function, and its part of real requests."""

    bucket: str
    alone: LatencySummary
    in_requests: LatencySummary


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One validation request: what was predicted, and what it took; in all, and without the time on the link."""

    plan: str
    link: str
    predicted_ms: float
    measured_ms: float
    predicted_compute_ms: float
    measured_compute_ms: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Prediction against measurement over some requests.

    Attributes:
        measured: waiting time of the requests.
        predicted_ms: median of the predictions, by nearest rank as those of ``measured``.
        error: median of |predicted - measured| / measured.
        compute_error: the same without the time on the link, of which both sides know.
        bias: median of (predicted - measured) / measured without the link; below 0 where requests take longer than predicted.
    """

    measured: LatencySummary
    predicted_ms: float
    error: float
    compute_error: float
    bias: float

    @classmethod
    def of(cls, requests: Sequence[Comparison]) -> "Agreement":
        predicted, measured, predicted_compute, measured_compute = np.asarray(
            [(one.predicted_ms, one.measured_ms, one.predicted_compute_ms, one.measured_compute_ms) for one in requests]
        ).T
        relative = (predicted_compute - measured_compute) / measured_compute
        return cls(
            measured=summarise_latency(measured),
            predicted_ms=summarise_latency(predicted).p50_ms,
            error=float(np.median(np.abs(predicted - measured) / measured)),
            compute_error=float(np.median(np.abs(relative))),
            bias=float(np.median(relative)),
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What ``calibrate`` found; as JSON, ``calibration.json`` of the run.

    Attributes:
        times: the new measured profile.
        subtasks: p50, p95 and p99 of everything behind it.
        overall, by_plan, by_link: agreement on the validation users.
        requests: all validation requests.
        left_out: requests of either kind whose plan the situation forbade, or that ended otherwise than planned.
        rounds, users: rounds of each kind, and users of each kind.
        load_average: of the machine over a minute, before and after; above 1 or so others worked at the same time.
        target: compute error that is aimed at.
        provenance: data, code, versions, machine, cores and time.
    """

    times: MeasuredTimes
    subtasks: tuple[SubtaskTimes, ...]
    overall: Agreement
    by_plan: Mapping[str, Agreement]
    by_link: Mapping[str, Agreement]
    requests: tuple[Comparison, ...]
    left_out: int
    rounds: int
    users: int
    load_average: tuple[float, float]
    target: float
    provenance: Mapping[str, object]

    @property
    def meets_target(self) -> bool:
        return self.overall.compute_error <= self.target


def calibrate(
    trained: TrainedSystem,
    recommender: Recommender,
    rounds: int = ROUNDS,
    progress: Progress = lambda stage, done, total: None,
    seed: int = 0,
) -> Calibration:
    """Measure, fit, validate; and store ``cost_profile.json`` (the earlier one is kept in it) and ``calibration.json`` in the run.

    Args:
        trained: a finished run with both agents.
        recommender: of that run; from then on it predicts by the new profile.
        rounds: requests of every plan, and calls of every sub-task; as many requests validate.
        progress: hears of each stage how much is done, and of how much.
        seed: of the users.

    Raises:
        UserError: too few rounds or users, a directory that cannot be written.
    """
    interactions = trained.corpus.interactions
    if rounds < LEAST_ROUNDS:
        raise UserError(f"{rounds} rounds say nothing of a median: expected at least {LEAST_ROUNDS}")
    if interactions.num_users < 2:
        raise UserError(
            f"{interactions.name} has {interactions.num_users} users: one to measure and another to validate are needed"
        )
    users, load_before = min(USERS, interactions.num_users // 2), os.getloadavg()[0]
    order = np.random.default_rng(seed).permutation(interactions.num_users)[: 2 * users]
    histories = [recommender.history(interactions.user_ids[user]) for user in order]
    fitted, others = histories[:users], histories[users:]
    alone, parts, left_out = _measured(trained, recommender, fitted, rounds, progress)
    times = fit_times(parts)
    fingerprint = interactions.fingerprint
    save_measured_times(trained.run, times, of="whole requests", rounds=rounds, dataset_fingerprint=fingerprint)
    recommender.planner.expect(trained.world("measured"))
    requests, also_left_out = _validated(recommender, others, rounds, progress)
    found = Calibration(
        times=times,
        subtasks=tuple(
            SubtaskTimes(
                bucket=_named(bucket),
                alone=summarise_latency(np.asarray(alone[bucket])),
                in_requests=summarise_latency(np.asarray(parts[bucket])),
            )
            for bucket in alone
        ),
        overall=Agreement.of(requests),
        by_plan=_grouped(requests, lambda request: request.plan),
        by_link=_grouped(requests, lambda request: request.link),
        requests=tuple(requests),
        left_out=left_out + also_left_out,
        rounds=rounds,
        users=users,
        load_average=(load_before, os.getloadavg()[0]),
        target=TARGET_ERROR,
        provenance=provenance(dataset_fingerprint=fingerprint),
    )
    trained.run.write_json("calibration", found)
    return found


def request_parts(trace: Trace, link: LinkRealisation) -> dict[Bucket, float]:
    """The time of a request, in the parts that the cost formula adds up to its latency.

    What lies between two sub-tasks counts to the one that it prepares: all until the request arrives to the abstract, reading the
    reply and waking up to ranking. In local plans reading the cache has a part where structured modelling is skipped. Where it is not,
    the part of structured modelling lasts until both are done: it takes longer, except where the machine lets the cache wait.
    """
    plan, spans = trace.plan, {span.subtask: span for span in trace.spans}
    planned_ms = spans[Subtask.PLANNING].end_ms
    parts = {("planning_ms", ""): planned_ms}
    if plan.uses_link:
        arrived_ms = min(span.start_ms for span in trace.spans if span.placement is Placement.CLOUD)
        reuses = plan.semantic is Placement.REUSE
        sent = "reuse" if reuses else plan.level.name.lower()
        up_ms, down_ms = link.transfer_ms(trace.uplink_bytes, "up"), link.transfer_ms(trace.downlink_bytes, "down")
        abstract = "abstract_beside_ms" if plan.structured is Placement.DEVICE else "abstract_ms"
        parts[abstract, sent] = arrived_ms - planned_ms - up_ms - link.queue_ms
        if not reuses:
            parts["semantic_ms", sent] = _taken_ms(spans, Subtask.SEMANTIC)
        retrieval = "retrieval_evidence_ms" if plan.structured is Placement.DEVICE else "retrieval_ms"
        parts[retrieval, str(plan.num_candidates)] = _taken_ms(spans, Subtask.RETRIEVAL)
        pool, ready_ms = str(plan.num_candidates), spans[Subtask.RETRIEVAL].end_ms
        if plan.structured is Placement.CLOUD:
            parts["structured_cloud_ms", ""] = _taken_ms(spans, Subtask.STRUCTURED)
            ready_ms = max(ready_ms, spans[Subtask.STRUCTURED].end_ms)
        ready_ms += down_ms
    else:
        pool, ready_ms = "cache", spans[Subtask.RETRIEVAL].end_ms
        if plan.structured is Placement.SKIP:
            parts["cache_retrieval_ms", ""] = ready_ms - planned_ms
    if plan.structured is Placement.DEVICE:
        ready_ms = max(ready_ms, spans[Subtask.STRUCTURED].end_ms)
        if not plan.uses_link:
            parts["structured_ms", ""] = ready_ms - planned_ms
    if plan.ranking is Placement.CLOUD:
        ranking = ("ranking_cloud_ms", "cloud" if plan.structured is Placement.CLOUD else "skip")
    else:
        ranking = ("ranking_ms" if plan.structured is Placement.DEVICE else "ranking_skip_ms", pool)
    parts[ranking] = trace.latency_ms - ready_ms
    return parts


def _taken_ms(spans: Mapping[Subtask, Span], subtask: Subtask) -> float:
    span = spans[subtask]
    return span.end_ms - span.start_ms


def _measured(
    trained: TrainedSystem, recommender: Recommender, histories: Sequence[HistoryBatch], rounds: int, progress: Progress
) -> tuple[dict[Bucket, list[float]], dict[Bucket, list[float]], int]:
    """Milliseconds of every bucket, alone and as parts of requests, and the number of requests that were left out."""
    bare = subtask_calls(recommender.functions, trained.corpus, trained.config)
    asked = _requests(recommender, histories)
    taken = in_turns({**bare, **asked}, rounds, lambda done, total: progress("measuring sub-tasks", done, total))
    alone = {bucket: [taken_ms for taken_ms, _ in taken[bucket]] for bucket in bare}
    parts: dict[Bucket, list[float]] = {bucket: [] for bucket in bare}
    left_out = 0
    for index in asked:
        for _, answered in taken[index]:
            assert answered is not None
            if not _as_planned(answered, index):
                left_out += 1
                continue
            for bucket, part_ms in request_parts(answered.answer.trace, answered.request.link).items():
                # A plan of a user's own may want a number of candidates that no profile has times for: costs lie between those it has.
                if bucket in parts:
                    parts[bucket].append(part_ms)
    if empty := [_named(bucket) for bucket, values in parts.items() if not values]:
        raise UserError(f"no request of these users had {', '.join(empty)}: nothing to calibrate with; try more rounds")
    return alone, parts, left_out


def _validated(
    recommender: Recommender, histories: Sequence[HistoryBatch], rounds: int, progress: Progress
) -> tuple[list[Comparison], int]:
    """Requests of other users against their prediction, and the number of those that were left out."""
    taken = in_turns(
        _requests(recommender, histories), rounds, lambda done, total: progress("validating predictions", done, total)
    )
    answered = [(index, one) for index, turns in taken.items() for _, one in turns]
    counted = [_compared(one) for index, one in answered if _as_planned(one, index)]
    return counted, len(answered) - len(counted)


def _requests(recommender: Recommender, histories: Sequence[HistoryBatch]) -> dict[int, Callable[[int], Answered]]:
    """For every plan, a request of one user after the other, over one link after the other."""

    def ask(plan_index: int, number: int) -> Answered:
        # Users and links step at different paces, so that a plan meets every user over every link.
        situation = Situation(link=LINKS[(number + plan_index) % len(LINKS)], tier=DeviceTier.HIGH)
        history = histories[(number // len(LINKS) + number + plan_index) % len(histories)]
        return recommender.answer(history, situation, plan_index, draw=None)

    return {index: lambda number, index=index: ask(index, number) for index in range(recommender.space.num_plans)}


def _as_planned(answered: Answered, plan_index: int) -> bool:
    trace = answered.answer.trace
    return answered.choice.plan_index == plan_index and trace.executed_plan == trace.plan


def _compared(answered: Answered) -> Comparison:
    trace, link, prediction = answered.answer.trace, answered.request.link, answered.request.prediction
    assert prediction is not None
    link_ms = 0.0
    if trace.plan.uses_link:
        link_ms = link.transfer_ms(trace.uplink_bytes, "up") + link.transfer_ms(trace.downlink_bytes, "down") + link.queue_ms
    return Comparison(
        plan=trace.plan.name,
        link=LINK_NAMES[answered.situation.link],
        predicted_ms=prediction.latency_ms,
        measured_ms=trace.latency_ms,
        predicted_compute_ms=prediction.latency_ms - prediction.link_ms,
        measured_compute_ms=trace.latency_ms - link_ms,
    )


def _grouped(requests: Sequence[Comparison], key: Callable[[Comparison], str]) -> dict[str, Agreement]:
    groups: dict[str, list[Comparison]] = {}
    for request in requests:
        groups.setdefault(key(request), []).append(request)
    return {name: Agreement.of(group) for name, group in groups.items()}


def _named(bucket: Bucket) -> str:
    name, key = bucket
    return f"{name.removesuffix('_ms')} {key}".strip().replace("_", " ")
