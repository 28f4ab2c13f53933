"""Runs the plan of one request: two branches side by side, one deadline, a local plan in reserve, always exactly one slate."""

import math
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Placement, Plan, Slate, Span, Subtask, Trace
from cda4rec_jax.planner.utility import FAILURE_TIMEOUT_MS
from cda4rec_jax.privacy.gate import EgressDenied
from cda4rec_jax.privacy.levels import UplinkFields
from cda4rec_jax.runtime.clock import LinkRealisation, RequestClock
from cda4rec_jax.runtime.device_client import BranchFailed, CacheMissing, CloudFailed, DeviceClient, Exchange, Late, TransferLog
from cda4rec_jax.runtime.functions import CachedEmbedding, CandidatePool, DeviceFunctions, Ranked
from cda4rec_jax.runtime.replies import checked_reply


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """How requests are run.

    Attributes:
        real_delay: sleep the link's delays; otherwise they are only added to the request's clock.
        concurrent: run the branches side by side; one after the other serves to measure what that gains.
        failure_timeout_ms: wait for an answer where the link model says that none comes. A transport that really hangs is not
            interrupted: what ends the wait is its own time limit, or with ``concurrent`` the deadline.
        local_p99_ms: time that a local plan needs in 99 of 100 requests: a shorter deadline is refused, and this long before the
            deadline the device stops waiting.
        surprise_ratio: measured time over predicted time from which on the trace is flagged...
        surprise_margin_ms: ... if it is also so much longer: dispatch takes a multiple of the smallest predictions.
        high_regret: expected regret of the plan from which on the trace is flagged, in units of dQ (what asking the cloud is worth).
        workers: threads; two for each request that runs at the same time.
    """

    real_delay: bool = False
    concurrent: bool = True
    failure_timeout_ms: float = FAILURE_TIMEOUT_MS
    local_p99_ms: float = 25.0
    surprise_ratio: float = 2.0
    surprise_margin_ms: float = 5.0
    high_regret: float = 0.5
    workers: int = 8


_DEFAULT = ExecutorConfig()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the planner expects of the plan; sub-tasks that are not named are expected to take no time."""

    subtask_ms: Mapping[Subtask, float]
    link_ms: float  # both directions
    latency_ms: float
    regret: float = 0.0  # expected utility of the best allowed plan minus that of this one, in units of dQ


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, planned.

    Attributes:
        plan: to be run.
        fallback: the local plan that answers if ``plan`` cannot.
        link: what the request meets.
        planning_ms: time that planning took.
        deadline_ms: after the beginning of planning.
        prediction: None: the trace then predicts 0 and raises no flag for surprises.
        request_id: what the uplink and the ledger call it; random, never derived from the user.
    """

    plan: Plan
    fallback: Plan
    link: LinkRealisation
    planning_ms: float = 0.0
    deadline_ms: float = 10_000.0
    prediction: Prediction | None = None
    request_id: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        if self.fallback.uses_link:
            raise ValueError(f"fallback is {self.fallback.name}, which uses the link; expected a local plan")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The slate (b = 1), what happened, and for the device's cache the fresh embedding and candidates, None where none came."""

    slate: Slate
    trace: Trace
    embedding: CachedEmbedding | None
    pool: CandidatePool | None


@dataclass(kw_only=True)
class _Branch:
    """What runs beside structured modelling, and what it brought: candidates to rank, or a list that the cloud ranked."""

    clock: RequestClock
    spans: list[Span] = field(default_factory=list)
    end_ms: float = 0.0
    pool: CandidatePool | None = None
    ranked: Ranked | None = None
    embedding: CachedEmbedding | None = None


@dataclass(kw_only=True)
class _Run:
    """State of one request while it runs. The cloud branch's thread writes to ``log`` only."""

    request: Request
    clock: RequestClock
    hedge_at_ms: float
    log: TransferLog = field(default_factory=TransferLog)
    spans: list[Span] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    def span(self, subtask: Subtask, placement: Placement, start_ms: float, end_ms: float, payload_bytes: int = 0) -> Span:
        prediction = self.request.prediction
        return Span(
            subtask=subtask,
            placement=placement,
            start_ms=start_ms,
            end_ms=end_ms,
            predicted_ms=prediction.subtask_ms.get(subtask, 0.0) if prediction else 0.0,
            payload_bytes=payload_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class _Structuring:
    """Structured modelling on its way, and the clock that it runs by."""

    clock: RequestClock
    result: Future[tuple[object, Span]]


class Executor:
    """Runs planned requests of one user's device. Safe to call from several threads; use as a context manager or ``close`` it.

    Cloud work and structured modelling run in two threads. What can go wrong in the cloud branch (gate, link, cloud, deadline)
    ends in the request's local plan; errors of the device's own functions are raised.
    """

    def __init__(self, functions: DeviceFunctions, client: DeviceClient, config: ExecutorConfig = _DEFAULT) -> None:
        self._functions = functions
        self._client = client
        self._config = config
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="request")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def execute(self, request: Request) -> Answer:
        """Run the request and return its one slate.

        Latency, on the request's clock: planning + max(cloud or cache branch, structured on the device) + ranking. If the cloud
        branch fails, the local plan's branch and ranking follow the failure; if it is not back ``local_p99_ms`` before the
        deadline, they follow that moment. Structured modelling that is late then, or out of memory, is left out.

        Flags of the trace: ``link_failed``, ``cloud_failed``, ``egress_denied``, ``cache_missing``, ``deadline_hedged`` say why
        the device answered alone; ``context_shift`` that link or cloud, ``device_exhausted`` that the device took more than
        ``surprise_ratio`` times what was predicted (or left structured modelling out: late, or out of memory); ``regret_high`` that the
        plan was a poor choice, expected to be worth less than the best allowed one by more than ``high_regret``.

        Raises:
            UserError: the deadline is shorter than planning and the local plan take.
        """
        config = self._config
        if request.deadline_ms < request.planning_ms + config.local_p99_ms:
            raise UserError(
                f"the deadline is {request.deadline_ms:.0f} ms, but planning took {request.planning_ms:.0f} ms and answering on"
                f" the device alone takes up to {config.local_p99_ms:.0f} ms; ask with a later deadline"
            )
        clock = RequestClock(request.planning_ms, config.real_delay)
        run = _Run(request=request, clock=clock, hedge_at_ms=request.deadline_ms - config.local_p99_ms)
        run.spans.append(run.span(Subtask.PLANNING, Placement.DEVICE, 0.0, request.planning_ms))
        plan = request.plan
        structuring = self._start_structured(run, plan) if config.concurrent else None
        try:
            branch = self._cloud_in_time(run) if plan.uses_link else self._local(run, plan)
        except (EgressDenied, BranchFailed) as failure:
            run.log.abandon()
            run.flags.append(failure.flag if isinstance(failure, BranchFailed) else "egress_denied")
            plan = request.fallback
            structuring = structuring or self._start_structured(run, plan)
            branch = self._local(run, plan)
        if not config.concurrent:
            clock.advance_to(branch.end_ms)
        structuring = structuring or self._start_structured(run, plan)
        plan, structured = self._join(run, plan, branch, structuring)
        return self._answer(run, plan, branch, structured)

    def _start_structured(self, run: _Run, plan: Plan) -> _Structuring | None:
        if plan.structured is not Placement.DEVICE:
            return None
        clock = run.clock.fork()
        return _Structuring(clock=clock, result=self._pool.submit(self._structured, run, clock))

    def _structured(self, run: _Run, clock: RequestClock) -> tuple[object, Span]:
        start_ms = clock.now_ms()
        state = self._functions.structured()
        return state, run.span(Subtask.STRUCTURED, Placement.DEVICE, start_ms, clock.now_ms())

    def _cloud_in_time(self, run: _Run) -> _Branch:
        """The cloud branch, if it ends in time; on failure the request's clock stands at the moment at which the device knows."""
        branch = _Branch(clock=run.clock.fork())
        try:
            if self._config.concurrent:
                left_ms = max(0.0, run.hedge_at_ms - run.clock.now_ms())
                self._pool.submit(self._cloud, run, branch).result(timeout=left_ms / 1e3)
            else:
                self._cloud(run, branch)
            if branch.end_ms > run.hedge_at_ms:
                raise Late(f"the candidates came after {branch.end_ms:.0f} ms")
        except TimeoutError as waited:
            run.clock.advance_to(run.hedge_at_ms)
            run.spans.extend(branch.spans)
            raise Late("the cloud branch has not come back") from waited
        except (EgressDenied, BranchFailed):
            run.clock.advance_to(min(branch.clock.now_ms(), run.hedge_at_ms))
            run.spans.extend(span for span in branch.spans if span.end_ms <= run.hedge_at_ms)
            raise
        run.spans.extend(branch.spans)
        return branch

    def _cloud(self, run: _Run, branch: _Branch) -> None:
        plan, clock, start_ms = run.request.plan, branch.clock, branch.clock.now_ms()
        fields, cached = self._fields(run, clock)
        uplink = self._client.release(fields)
        reused = plan.semantic is Placement.REUSE
        sent = (Subtask.SEMANTIC, Placement.REUSE) if reused else (Subtask.ABSTRACT, Placement.DEVICE)
        branch.spans.append(run.span(*sent, start_ms, clock.now_ms(), len(uplink.payload)))
        timeout_ms = max(0.0, min(self._config.failure_timeout_ms, run.hedge_at_ms - clock.now_ms()))
        exchanged = self._client.exchange(uplink, run.request.link, clock, run.log, timeout_ms)
        branch.spans.extend(_cloud_spans(run, exchanged))
        reply = checked_reply(exchanged.response, fields, self._functions)
        if reply.semantic is not None:
            branch.embedding = CachedEmbedding(values=reply.semantic, level=fields.level, age_events=0)
        if exchanged.response.ranked:
            branch.ranked = (reply.items, reply.scores)
        else:
            behind = cached or branch.embedding
            assert behind is not None
            try:
                branch.pool = self._functions.complete(reply.items, reply.scores, reply.evidence, behind)
            except ValueError as error:
                raise CloudFailed(str(error)) from error
        branch.end_ms = clock.now_ms()

    def _fields(self, run: _Run, clock: RequestClock) -> tuple[UplinkFields, CachedEmbedding | None]:
        """All that the plan wants to send, and the cached embedding if that is it."""
        plan = run.request.plan
        request_id = run.request.request_id
        deadline_unix_ms = time.time() * 1e3 + run.request.deadline_ms - clock.now_ms()
        if plan.semantic is Placement.REUSE:
            cached = self._functions.cached_embedding()
            if cached is None:
                raise CacheMissing(f"{plan.name} has no embedding to reuse")
            fields = UplinkFields(
                request_id=request_id,
                deadline_unix_ms=deadline_unix_ms,
                level=cached.level,
                num_candidates=plan.num_candidates,
                want_evidence=plan.structured is Placement.DEVICE,
                semantic_embedding=cached.values.astype("<f4").tobytes(),
            )
            return fields, cached
        abstract = self._functions.abstract(plan.level)
        fields = UplinkFields(
            request_id=request_id,
            deadline_unix_ms=deadline_unix_ms,
            level=plan.level,
            num_candidates=plan.num_candidates,
            want_evidence=plan.structured is Placement.DEVICE,
            want_ranking=plan.ranking is Placement.CLOUD,
            want_structured=plan.structured is Placement.CLOUD,
            category_shares=abstract.category_shares,
            length_bucket=abstract.length_bucket,
            item_ids=abstract.item_ids,
            attributes=abstract.attributes,
        )
        return fields, None

    def _local(self, run: _Run, plan: Plan) -> _Branch:
        branch = _Branch(clock=run.clock.fork())
        start_ms = branch.clock.now_ms()
        branch.pool = self._functions.cached_candidates(plan.semantic)
        branch.end_ms = branch.clock.now_ms()
        if plan.semantic is Placement.REUSE:
            run.spans.append(run.span(Subtask.SEMANTIC, Placement.REUSE, start_ms, start_ms))
        run.spans.append(run.span(Subtask.RETRIEVAL, Placement.DEVICE_CACHE, start_ms, branch.end_ms))
        return branch

    def _join(self, run: _Run, plan: Plan, branch: _Branch, structuring: _Structuring | None) -> tuple[Plan, object]:
        """Wait for both branches; the plan as it came out, and the device user state."""
        run.clock.advance_to(branch.end_ms)
        if structuring is None or plan.structured is not Placement.DEVICE:
            return plan, None
        # The branch's clock may be ahead of real time by delays that were only counted; structured modelling has its own.
        left_ms = max(0.0, run.hedge_at_ms - structuring.clock.now_ms())
        try:
            state, span = structuring.result.result(timeout=left_ms / 1e3)
            if span.end_ms > run.hedge_at_ms:
                raise TimeoutError
        except TimeoutError:
            structuring.result.cancel()
            run.clock.advance_to(run.hedge_at_ms)
            run.flags.append("device_exhausted")
            return replace(plan, structured=Placement.SKIP), None
        except MemoryError:
            run.clock.advance_to(structuring.clock.now_ms())
            run.flags.append("device_exhausted")
            return replace(plan, structured=Placement.SKIP), None
        run.spans.append(span)
        run.clock.advance_to(span.end_ms)
        return plan, state

    def _answer(self, run: _Run, plan: Plan, branch: _Branch, structured: object) -> Answer:
        start_ms = run.clock.now_ms()
        if branch.ranked is not None:
            items, scores = self._functions.finish(*branch.ranked)
        else:
            assert branch.pool is not None
            items, scores = self._functions.rank(branch.pool, structured)
            run.spans.append(run.span(Subtask.RANKING, Placement.DEVICE, start_ms, run.clock.now_ms()))
        latency_ms = run.clock.now_ms()
        if np.isnan(scores).any():
            raise ValueError("ranking gave a score that is not a number")
        prediction = run.request.prediction
        run.flags.extend(flag for flag in _surprises(run, self._config) if flag not in run.flags)
        trace = Trace(
            plan=run.request.plan,
            executed_plan=plan,
            spans=tuple(sorted(run.spans, key=lambda span: (span.start_ms, span.end_ms))),
            latency_ms=latency_ms,
            predicted_ms=prediction.latency_ms if prediction else 0.0,
            uplink_bytes=run.log.uplink_bytes,
            downlink_bytes=run.log.downlink_bytes,
            flags=tuple(run.flags),
        )
        slate = Slate(items=jnp.asarray(items[None, :]), scores=jnp.asarray(scores[None, :]))
        is_fresh = branch.embedding is not None
        return Answer(slate=slate, trace=trace, embedding=branch.embedding, pool=branch.pool if is_fresh else None)


def _cloud_spans(run: _Run, exchanged: Exchange) -> list[Span]:
    """The cloud's sub-tasks by the times that it reports, from the moment at which the request arrived there."""
    times, arrived_ms, plan = exchanged.response.times, exchanged.arrived_ms, run.request.plan
    retrieving_ms = arrived_ms + times.semantic_ms
    ranking_ms = max(retrieving_ms + times.retrieval_ms, arrived_ms + times.structured_ms)
    down_bytes = exchanged.downlink_bytes
    ranks = plan.ranking is Placement.CLOUD
    spans = [
        run.span(
            Subtask.RETRIEVAL, Placement.CLOUD, retrieving_ms, retrieving_ms + times.retrieval_ms, 0 if ranks else down_bytes
        )
    ]
    if plan.semantic is Placement.CLOUD:
        spans.append(run.span(Subtask.SEMANTIC, Placement.CLOUD, arrived_ms, retrieving_ms))
    if plan.structured is Placement.CLOUD:
        spans.append(run.span(Subtask.STRUCTURED, Placement.CLOUD, arrived_ms, arrived_ms + times.structured_ms))
    if ranks:
        spans.append(run.span(Subtask.RANKING, Placement.CLOUD, ranking_ms, ranking_ms + times.ranking_ms, down_bytes))
    return spans


def _surprises(run: _Run, config: ExecutorConfig) -> list[str]:
    """Flags for a poor choice, and for what took much longer than predicted."""
    prediction = run.request.prediction
    if prediction is None:
        return []

    def surprising(taken_ms: float, predicted_ms: float) -> bool:
        return taken_ms > max(config.surprise_ratio * predicted_ms, predicted_ms + config.surprise_margin_ms)

    def surprises_at(*placements: Placement) -> bool:
        spans = [span for span in run.spans if span.placement in placements and span.subtask is not Subtask.PLANNING]
        return surprising(
            math.fsum(span.end_ms - span.start_ms for span in spans), math.fsum(span.predicted_ms for span in spans)
        )

    surprises = {
        "regret_high": prediction.regret > config.high_regret,
        "context_shift": surprising(run.log.transfer_ms, prediction.link_ms) or surprises_at(Placement.CLOUD),
        "device_exhausted": surprises_at(Placement.DEVICE, Placement.DEVICE_CACHE),
    }
    return [flag for flag, is_raised in surprises.items() if is_raised]
