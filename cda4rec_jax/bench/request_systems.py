"""What ``cda4rec bench request`` asks: users' devices that are ready, warm requests by plan, and two branches of equal length."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from cda4rec_jax.bench.systems import System, started
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel, HistoryBatch, Trace
from cda4rec_jax.privacy.gate import Gate
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.runtime import (
    NO_DELAY,
    Answer,
    DeviceClient,
    DeviceFunctions,
    Executor,
    ExecutorConfig,
    LinkRealisation,
    Request,
)
from cda4rec_jax.runtime.models import DeviceState, device_functions
from cda4rec_jax.runtime.recommend import Recommender
from cda4rec_jax.runtime.recommend.planning import Planned, Situation, choose, prediction_of
from cda4rec_jax.runtime.recommend.waterfall import stages_of
from cda4rec_jax.timing import Contestant

SLATE = 10
# Of each family the plan that asks for most: candidates, structured modelling, release.
HEAVIEST, LOCAL = "fresh-full-500-device", "local-reuse-device"
NAMED_PLANS = (HEAVIEST, "fresh-full-500-skip", "reuse-500-device", LOCAL, "cloud-full-cloud")
CHOICE, WHOLE = "planner's choice", "recommend(), all of it"
CONCURRENT, SEQUENTIAL = "side by side", "one after the other"
BRANCH_MS = 50.0
PATIENT_MS = 600_000.0  # deadline of a request that compiles
_SITUATION = Situation()


@dataclass(frozen=True, kw_only=True)
class Device:
    """One user's device, ready to ask: with history, and embedding and candidates of an earlier request."""

    user_id: str
    history: HistoryBatch
    state: DeviceState
    executor: Executor


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request, and how it was answered."""

    planned: Planned
    plan_index: int
    link: LinkRealisation
    answer: Answer

    @property
    def trace(self) -> Trace:
        return self.answer.trace


def devices_of(recommender: Recommender, users: int, stack: ExitStack) -> list[Device]:
    """Devices of users who stand at equal distances in the list of all; ``stack`` closes them."""
    chosen = np.linspace(0, len(recommender.user_ids) - 1, min(users, len(recommender.user_ids))).astype(int)
    devices = []
    for name in (recommender.user_ids[row] for row in chosen):
        history = recommender.history(name)
        state = recommender.state(history, recommender.planner.plan(history, _SITUATION))
        functions = device_functions(recommender.functions, state, SLATE)
        executor = _executor(recommender, functions, ExecutorConfig(), stack)
        devices.append(Device(user_id=name, history=history, state=state, executor=executor))
    return devices


def _executor(recommender: Recommender, functions: DeviceFunctions, config: ExecutorConfig, stack: ExitStack) -> Executor:
    ledger = Ledger()
    stack.callback(ledger.close)
    client = DeviceClient(recommender.service.handle, Gate(EgressLevel.FULL, ledger))
    return stack.enter_context(Executor(functions, client, config))


def ask(recommender: Recommender, device: Device, wanted: int | None, *, with_link: bool) -> Asked:
    """Plan and execute one request.

    Args:
        recommender: serves it.
        device: asks.
        wanted: index of the plan to follow; None takes the planner's choice.
        with_link: count the time of a WiFi link that is exactly as estimated; otherwise it takes none.

    Raises:
        UserError: the situation forbids the plan, or it ended in another one.
    """
    started_s = time.perf_counter()
    served = recommender.planner.decide(device.history, _SITUATION)
    planning_ms = 1e3 * (time.perf_counter() - started_s)
    planned = recommender.planner.explain(device.history, _SITUATION, served)
    choice = choose(planned, wanted)
    if wanted is not None and choice.plan_index != wanted:
        raise UserError(f"{choice.asked_for} is forbidden to {device.user_id!r}, whom {choice.decision.chosen.name} would answer")
    request = Request(
        plan=planned.costs.space.plans[choice.plan_index],
        fallback=planned.costs.space.plans[int(planned.fallback[0, choice.plan_index])],
        link=recommender.planner.estimated(planned) if with_link else NO_DELAY,
        planning_ms=planning_ms,
        prediction=prediction_of(planned, choice.plan_index),
        deadline_ms=PATIENT_MS,
    )
    answer = device.executor.execute(request)
    trace = answer.trace
    if trace.executed_plan != trace.plan:
        raise UserError(f"{trace.plan.name} ended as {trace.executed_plan.name} ({', '.join(trace.flags)}); nothing was measured")
    return Asked(planned=planned, plan_index=choice.plan_index, link=request.link, answer=answer)


def request_systems(recommender: Recommender, devices: Sequence[Device]) -> list[System]:
    """A request of each named plan, of the planner's choice, and the whole call of a user; compiled, and asked once by every device."""

    def asker(wanted: int | None) -> Callable[[Device], object]:
        return lambda device: ask(recommender, device, wanted, with_link=False)

    runs: dict[str, Callable[[Device], object]] = {plan: asker(recommender.space.index(plan)) for plan in NAMED_PLANS}
    runs[CHOICE] = asker(None)
    runs[WHOLE] = lambda device: recommender.recommend(device.user_id, k=SLATE)
    found = []
    for name, run in runs.items():
        one = started(System(name=name, version=f"jax {jax.__version__}", against=(), run=run, inputs=devices))
        for device in devices:
            run(device)
        found.append(one)
    return found


class Part(NamedTuple):
    """A sub-task, or a step over the link, in milliseconds since the request began."""

    name: str
    where: str
    start_ms: float
    end_ms: float


@dataclass(frozen=True, kw_only=True)
class Waterfall:
    """When each part of one request ran: of all that were asked, the one with the median latency."""

    title: str
    plan: str
    latency_ms: float
    parts: tuple[Part, ...]


def waterfall_of(
    recommender: Recommender, devices: Sequence[Device], title: str, plan: str, count: int, *, with_link: bool
) -> Waterfall:
    """Ask ``count`` times, after every device did once, and keep the request with the median latency."""
    wanted = recommender.space.index(plan)
    for device in devices:
        ask(recommender, device, wanted, with_link=with_link)
    asked = [ask(recommender, devices[number % len(devices)], wanted, with_link=with_link) for number in range(count)]
    median = sorted(asked, key=lambda one: one.trace.latency_ms)[(count - 1) // 2]
    stages = stages_of(median.planned, median.plan_index, median.link, median.trace)
    parts = tuple(Part(one.name, one.where, *one.actual) for one in stages if one.actual is not None)
    return Waterfall(title=title, plan=plan, latency_ms=median.trace.latency_ms, parts=parts)


def branch_contestants(recommender: Recommender, devices: Sequence[Device], stack: ExitStack) -> list[Contestant]:
    """Requests whose branches both take 50 ms on the real clock, run side by side and one after the other.

    The cloud branch waits 25 ms for each direction of the link; the device branch computes.
    """
    link = LinkRealisation(transfer_ms=lambda payload_bytes, direction: BRANCH_MS / 2)
    plans, space = recommender.space.plans, recommender.space
    plan, fallback = plans[space.index(HEAVIEST)], plans[space.last_resort]

    def contestant(name: str, concurrent: bool) -> Contestant:
        config = ExecutorConfig(real_delay=True, concurrent=concurrent)
        executors = [
            _executor(recommender, _slowed(device_functions(recommender.functions, device.state, SLATE)), config, stack)
            for device in devices
        ]

        def call(number: int) -> float:
            request = Request(plan=plan, fallback=fallback, link=link, deadline_ms=PATIENT_MS)
            executors[number % len(executors)].execute(request)
            return 1.0

        return Contestant(name=name, call=call)

    return [contestant(CONCURRENT, True), contestant(SEQUENTIAL, False)]


def _slowed(functions: DeviceFunctions) -> DeviceFunctions:
    """Structured modelling again and again for 50 ms: a device that computes, not one that sleeps."""

    def structured() -> object:
        end_s = time.perf_counter() + BRANCH_MS / 1e3
        while True:
            state = functions.structured()
            if time.perf_counter() >= end_s:
                return state

    return dataclasses.replace(functions, structured=structured)
