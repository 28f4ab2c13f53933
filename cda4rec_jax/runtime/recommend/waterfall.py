"""When each part of a request ran: as it was expected beforehand, and as it came out."""

from dataclasses import dataclass

from cda4rec_jax.messages import Placement, Plan, Span, Subtask, Trace
from cda4rec_jax.runtime.clock import LinkRealisation
from cda4rec_jax.runtime.recommend.planning import Planned, prediction_of

LINK = "link"
_PLANNING = (str(Subtask.PLANNING), str(Placement.DEVICE))
Interval = tuple[float, float]  # start and end, in milliseconds since the request began


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A sub-task, or a transfer over the link, whose times come from the link model.

    Attributes:
        name: of the sub-task; ``uplink``, ``downlink`` or ``no answer`` for the link.
        where: placement; ``link``.
        expected: None where the plan did not contain it.
        actual: None where it did not happen.
    """

    name: str
    where: str
    expected: Interval | None
    actual: Interval | None


def stages_of(planned: Planned, plan_index: int, link: LinkRealisation, trace: Trace) -> tuple[Stage, ...]:
    """All stages of a request, by the time at which they began."""
    expected = _expected(planned, plan_index)
    actual = _actual(trace, link)
    keys = [*expected, *(key for key in actual if key not in expected)]
    stages = [Stage(name=key[0], where=key[1], expected=expected.get(key), actual=actual.get(key)) for key in keys]

    def began(stage: Stage) -> Interval:
        interval = stage.actual or stage.expected
        assert interval is not None
        return interval

    return tuple(sorted(stages, key=began))


def _expected(planned: Planned, plan_index: int) -> dict[tuple[str, str], Interval]:
    """By the formula of ``planner.costs``."""
    plan, times = planned.costs.space.plans[plan_index], prediction_of(planned, plan_index).subtask_ms
    found: dict[tuple[str, str], Interval] = {}

    def add(name: str, where: str, start_ms: float, taken_ms: float) -> float:
        found[str(name), str(where)] = (start_ms, start_ms + taken_ms)
        return start_ms + taken_ms

    begun = add(Subtask.PLANNING, Placement.DEVICE, 0.0, times[Subtask.PLANNING])
    structured_end = begun
    if plan.structured is Placement.DEVICE:
        structured_end = add(Subtask.STRUCTURED, Placement.DEVICE, begun, times[Subtask.STRUCTURED])
    if not plan.uses_link:
        branch_end = add(Subtask.RETRIEVAL, Placement.DEVICE_CACHE, begun, times[Subtask.RETRIEVAL])
    else:
        branch_end = _expected_cloud(planned, plan_index, begun, add)
    if plan.ranking is Placement.DEVICE:
        add(Subtask.RANKING, Placement.DEVICE, max(branch_end, structured_end), times[Subtask.RANKING])
    return found


def _expected_cloud(planned: Planned, plan_index: int, begun: float, add) -> float:
    plan, times = planned.costs.space.plans[plan_index], prediction_of(planned, plan_index).subtask_ms
    transfer = planned.transfer
    if plan.semantic is Placement.CLOUD:
        begun = add(Subtask.ABSTRACT, Placement.DEVICE, begun, times[Subtask.ABSTRACT])
    else:
        begun += times[Subtask.ABSTRACT]  # sending the kept embedding, which is no sub-task of its own
    arrived = add("uplink", LINK, begun, float(transfer.uplink_ms[0, plan_index])) + float(transfer.queue_ms[0])
    ended = arrived
    if plan.semantic is Placement.CLOUD:
        ended = add(Subtask.SEMANTIC, Placement.CLOUD, arrived, times[Subtask.SEMANTIC])
    ended = add(Subtask.RETRIEVAL, Placement.CLOUD, ended, times[Subtask.RETRIEVAL])
    if plan.structured is Placement.CLOUD:
        ended = max(ended, add(Subtask.STRUCTURED, Placement.CLOUD, arrived, times[Subtask.STRUCTURED]))
    if plan.ranking is Placement.CLOUD:
        ended = add(Subtask.RANKING, Placement.CLOUD, ended, times[Subtask.RANKING])
    return add("downlink", LINK, ended, float(transfer.downlink_ms[0, plan_index]))


def _actual(trace: Trace, link: LinkRealisation) -> dict[tuple[str, str], Interval]:
    found = {
        (str(span.subtask), str(span.placement)): (span.start_ms, span.end_ms) for span in trace.spans if not _is_instant(span)
    }
    if not trace.plan.uses_link or not trace.uplink_bytes:
        return found
    sent_ms = min((span.end_ms for span in trace.spans if _sends(span, trace.plan)), default=found[_PLANNING][1])
    if not trace.executed_plan.uses_link:
        local_ms = [span.start_ms for span in trace.spans if span.placement is Placement.DEVICE_CACHE]
        found["no answer", LINK] = (sent_ms, max(sent_ms, *local_ms))
        return found
    found["uplink", LINK] = (sent_ms, sent_ms + link.transfer_ms(trace.uplink_bytes, "up"))
    answered_ms = max(span.end_ms for span in trace.spans if span.placement is Placement.CLOUD)
    found["downlink", LINK] = (answered_ms, answered_ms + link.transfer_ms(trace.downlink_bytes, "down"))
    return found


def _is_instant(span: Span) -> bool:
    """Reusing an embedding is no work."""
    return span.placement is Placement.REUSE


def _sends(span: Span, plan: Plan) -> bool:
    return span.subtask is (Subtask.SEMANTIC if plan.semantic is Placement.REUSE else Subtask.ABSTRACT)
