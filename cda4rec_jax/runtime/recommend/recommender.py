"""One user's slate from a trained run: plan, release through the gate, ask the cloud over the wire, rank, and tell it all."""

import difflib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import jax
import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import DeviceTier, EgressLevel, HistoryBatch, Link, Plan, Trace
from cda4rec_jax.pipeline.request import RequestFunctions
from cda4rec_jax.privacy.gate import Gate
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.privacy.levels import LABELS
from cda4rec_jax.retrieval import load_index
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.runtime.clock import NO_DELAY, LinkRealisation
from cda4rec_jax.runtime.cloud_service import CloudService
from cda4rec_jax.runtime.device_client import DeviceClient
from cda4rec_jax.runtime.executor import Answer, Executor, ExecutorConfig, Request
from cda4rec_jax.runtime.models import DeviceState, cloud_functions, device_functions, device_state
from cda4rec_jax.runtime.recommend.planning import LINK_NAMES, Choice, Planned, RequestPlanner, Situation, choose, prediction_of
from cda4rec_jax.runtime.recommend.recommendation import Recommendation, ReleasedField, SlateItem
from cda4rec_jax.runtime.recommend.waterfall import stages_of
from cda4rec_jax.runtime.traces import TraceLog

LINKS: Mapping[str, Link] = {name: link for link, name in LINK_NAMES.items()}
TIERS: Mapping[str, DeviceTier] = {tier.name.lower(): tier for tier in DeviceTier}
LEVELS: Mapping[str, EgressLevel] = {level.name.lower(): level for level in EgressLevel}
RECENT_TITLES = 3
WARM_DEADLINE_MS = 600_000.0  # a first call compiles

_Named = TypeVar("_Named", bound=IntEnum)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One request (b = 1): whose, in which situation, what was planned and chosen, what the link did, and how it was answered."""

    history: HistoryBatch
    situation: Situation
    planned: Planned
    choice: Choice
    request: Request
    answer: Answer


class Recommender:
    """Serves the users of one run: their devices and the cloud in one process, with gate, wire and link between them.

    Use as a context manager or ``close`` it.

    Args:
        trained: a finished run with both agents.
        real_delay: wait for the link on a real clock; otherwise its time is computed.
        traces: takes one line for each request; None keeps none.
        ledger_file: where what leaves the devices is recorded for good; None records it for as long as this lives.

    Raises:
        UserError: the run is a baseline without device agent and planner, or its index cannot be loaded; or the file is no ledger that
            can be written.
    """

    def __init__(
        self, trained: TrainedSystem, real_delay: bool = False, traces: TraceLog | None = None, ledger_file: Path | None = None
    ) -> None:
        system = trained.system
        if system.device is None or system.policy is None:
            raise UserError(
                f"{trained.run.path} holds a baseline ({trained.run.kind}) without device agent and planner: recommending needs a "
                "run of a joint preset"
            )
        corpus = trained.corpus
        self.functions = RequestFunctions(system, trained.catalogue, trained.config, load_index(trained.run.index_folder))
        self.cloud = cloud_functions(self.functions, corpus.attributes[0].shape[1])
        self._trained_for = trained.world()
        self.planner = RequestPlanner(
            system.policy, trained.tables, self._trained_for, trained.world("measured"), trained.config.max_cache_age
        )
        self.service = CloudService(self.cloud)
        self._corpus, self._stored_events, self.space = corpus, trained.config.stored_events, trained.config.space
        self._rows = {user_id: row for row, user_id in enumerate(corpus.interactions.user_ids)}
        self._ledger = Ledger(ledger_file)
        self._real_delay, self._traces = real_delay, traces
        self._compiled: set[object] = set()

    def close(self) -> None:
        self.service.close()
        self._ledger.close()

    def __enter__(self) -> "Recommender":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def user_ids(self) -> tuple[str, ...]:
        """External ids of all users."""
        return self._corpus.interactions.user_ids

    def recommend(
        self,
        user_id: str,
        *,
        link: Link | str | None = None,
        tier: DeviceTier | str | None = None,
        consent: EgressLevel | str | None = None,
        k: int = 10,
        plan: str | None = None,
        draw: int = 0,
    ) -> Recommendation:
        """The next ``k`` items for a user after the whole known history; exactly one slate, whatever the link does.

        Args:
            user_id: external id.
            link: ``wifi``, ``lte``, ``3g``, ``edge`` or ``offline``; None is WiFi.
            tier: ``low``, ``mid`` or ``high``; None is mid.
            consent: ``nothing``, ``profile``, ``recent`` or ``full``; None is full.
            k: length of the slate; fewer items come where fewer candidates are left.
            plan: name of the plan to follow instead of the planner's choice; repaired where the situation forbids it.
            draw: which draw of the link model the request meets.

        Raises:
            UserError: unknown user, plan, link, tier or consent; ``k`` does not fit the catalogue.
        """
        situation = Situation(
            link=_named(link, LINKS, "link", Link.WIFI),
            tier=_named(tier, TIERS, "device tier", DeviceTier.MID),
            consent=_named(consent, LEVELS, "consent", EgressLevel.FULL),
        )
        if not 1 <= k <= self.functions.num_items:
            raise UserError(f"asked for {k} items of a catalogue of {self.functions.num_items:,}; expected 1 to that many")
        wanted = None if plan is None else self.space.index(plan)
        return self._tell(user_id, k, self.answer(self.history(user_id), situation, wanted, k=k, draw=draw))

    def answer(
        self, history: HistoryBatch, situation: Situation, wanted: int | None = None, *, k: int = 10, draw: int | None = 0
    ) -> Answered:
        """One request, and everything that was decided, met and done in it; nothing of it is compiled while it is timed.

        Args:
            history: of ``history``.
            situation: link, device and consent.
            wanted: index of the plan to follow; None takes the planner's choice.
            k: length of the slate.
            draw: of the link model; None: the link is exactly as it was estimated.
        """
        if situation not in self._compiled:
            self.planner.plan(history, situation)
            self._compiled.add(situation)
        started_s = time.perf_counter()
        served = self.planner.decide(history, situation)
        planning_ms = (time.perf_counter() - started_s) * 1e3
        planned = self.planner.explain(history, situation, served)
        choice = choose(planned, wanted)
        request, answer = self._serve(history, planned, choice, planning_ms, k, draw)
        return Answered(history=history, situation=situation, planned=planned, choice=choice, request=request, answer=answer)

    def serve_drawn(self, user_id: str, draw: int, k: int = 10) -> Trace:
        """One request of a user in the context of draw ``draw`` of distribution v1; its link does what that draw says.

        Raises:
            UserError: unknown user.
        """
        history = self.history(user_id)
        context = self.planner.draw(history, draw)
        self.planner.decide_context(context)  # compiled, where it is the first one
        started_s = time.perf_counter()
        served = self.planner.decide_context(context)
        planning_ms = (time.perf_counter() - started_s) * 1e3
        planned = replace(self.planner.of_context(context), logits=served.scores[None, :])
        return self._serve(history, planned, choose(planned, None), planning_ms, k, draw)[1].trace

    def _serve(
        self, history: HistoryBatch, planned: Planned, choice: Choice, planning_ms: float, k: int, draw: int | None
    ) -> tuple[Request, Answer]:
        """Execute what was chosen: what the executor was asked, and the answer. Without a draw the link is as it was estimated."""
        plans = self.space.plans
        plan, fallback = plans[choice.plan_index], plans[int(planned.fallback[0, choice.plan_index])]
        state = self.state(history, planned)
        met = self.planner.estimated(planned) if draw is None else self.planner.meet(planned, history.event_ids, draw)
        self._compile(history, planned, (plan, fallback), k, met)
        prediction = prediction_of(planned, choice.plan_index)
        request = Request(plan=plan, fallback=fallback, link=met, planning_ms=planning_ms, prediction=prediction)
        consent = EgressLevel(int(planned.context.consent[0]))
        answer = self._execute(state, consent, self._ledger, request, k, self._real_delay)
        if self._traces is not None:
            user_id = self.user_ids[int(history.user_indices[0])]
            self._traces.append(user_id, planned.context, choice.asked_for, answer.trace)
        return request, answer

    def history(self, user_id: str) -> HistoryBatch:
        """The user's whole past (b = 1). Raises UserError for an unknown user, with the ids that come closest."""
        row = self._rows.get(user_id)
        if row is None:
            known = self.user_ids
            close = difflib.get_close_matches(user_id, known, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"ids look like {', '.join(known[:3])}"
            raise UserError(f"unknown user {user_id!r}; {hint}")
        users = np.asarray([row])
        lengths = np.diff(self._corpus.interactions.offsets)[users]
        return self._corpus.histories(users, lengths, self._stored_events)

    def state(self, history: HistoryBatch, planned: Planned) -> DeviceState:
        """What the user's device holds, with the cache that the context tells of."""
        level, age = EgressLevel(int(planned.context.cache_level[0])), int(planned.context.cache_age_events[0])
        return device_state(self.functions, self.cloud, history, level, age)

    def _compile(self, history: HistoryBatch, planned: Planned, plans: tuple[Plan, ...], k: int, met: LinkRealisation) -> None:
        """Run each plan once unseen, so that no measured time is one of compiling; for a made-up user, so that nothing real leaves."""
        met.transfer_ms(1, "up")
        met.transfer_ms(1, "down")
        new = [plan for plan in dict.fromkeys(plans) if (plan, k) not in self._compiled]
        if not new:
            return
        state = self.state(_nobodys(history), planned)
        local = next(other for other in reversed(self.space.plans) if not other.uses_link)
        for plan in new:
            ledger = Ledger()
            trial = Request(plan=plan, fallback=local, link=NO_DELAY, deadline_ms=WARM_DEADLINE_MS)
            self._execute(state, EgressLevel.FULL, ledger, trial, k, real_delay=False)
            ledger.close()
            self._compiled.add((plan, k))

    def _execute(
        self, state: DeviceState, consent: EgressLevel, ledger: Ledger, request: Request, k: int, real_delay: bool
    ) -> Answer:
        client = DeviceClient(self.service.handle, Gate(consent, ledger))
        config = ExecutorConfig(real_delay=real_delay)
        with Executor(device_functions(self.functions, state, k), client, config) as executor:
            return executor.execute(request)

    def _tell(self, user_id: str, k: int, answered: Answered) -> Recommendation:
        planned, history, request = answered.planned, answered.history, answered.request
        interactions, trace, slate = self._corpus.interactions, answered.answer.trace, answered.answer.slate
        items, scores = np.asarray(slate.items)[0], np.asarray(slate.scores)[0]
        past = history.items[0, : int(history.lengths[0])][-RECENT_TITLES:]
        return Recommendation(
            user_id=user_id,
            num_events=int(history.total_lengths[0]),
            recent_titles=tuple(interactions.titles[item - 1] or interactions.item_ids[item - 1] for item in past.tolist()),
            k=k,
            items=tuple(
                SlateItem(
                    rank=rank,
                    item_id=interactions.item_ids[item - 1],
                    title=interactions.titles[item - 1],
                    score=float(score),
                )
                for rank, (item, score) in enumerate(zip(items.tolist(), scores, strict=True), start=1)
                if item > 0
            ),
            situation=answered.situation,
            cache_level=EgressLevel(int(planned.context.cache_level[0])),
            cache_age_events=int(planned.context.cache_age_events[0]),
            choice=answered.choice,
            plan=trace.plan,
            executed_plan=trace.executed_plan,
            planned_for=self._trained_for.profile.name,
            stages=stages_of(planned, answered.choice.plan_index, request.link, trace),
            latency_ms=trace.latency_ms,
            predicted_ms=trace.predicted_ms,
            real_delay=self._real_delay,
            released=self._released(request.request_id, trace),
            uplink_bytes=trace.uplink_bytes,
            downlink_bytes=trace.downlink_bytes,
            flags=trace.flags,
        )

    def _released(self, request_id: str, trace: Trace) -> tuple[ReleasedField, ...]:
        """What left, from the ledger's rows of the request; the rest of the bytes are the frame that the wire puts around."""
        released = [
            ReleasedField(
                name=field.name,
                tells=LABELS[field.name].tells,
                payload_bytes=field.payload_bytes * entry.sends,
                level=field.level,
            )
            for entry in self._ledger.entries(request_id)
            for field in entry.fields
            if entry.sends
        ]
        frame_bytes = trace.uplink_bytes - sum(field.payload_bytes for field in released)
        if released:
            frame = ReleasedField(
                name="(frame)", tells="nothing of the user", payload_bytes=frame_bytes, level=EgressLevel.NOTHING
            )
            released.append(frame)
        return tuple(released)


def _nobodys(history: HistoryBatch) -> HistoryBatch:
    """A past of the same shapes that tells nothing: item 1 in every place, no attributes, nothing to leave out of a slate."""
    blank, length = jax.tree.map(np.zeros_like, history), np.full_like(history.lengths, history.items.shape[1])
    return replace(blank, items=np.ones_like(history.items), lengths=length, total_lengths=length)


def _named(value: _Named | str | None, names: Mapping[str, _Named], what: str, default: _Named) -> _Named:
    if value is None:
        return default
    if isinstance(value, str):
        if value not in names:
            raise UserError(f"unknown {what} {value!r}; expected one of {', '.join(names)}")
        return names[value]
    return value
