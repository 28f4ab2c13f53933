"""Requests that are asked again under every fault: what ``faults.py`` runs.

In service the policy takes the plan of the highest expected utility, and the regret that is flagged is computed from that same utility: its
own choice has none. So the flag of a poor allocation tells plans that were forced, repaired or chosen by somebody else, and never an error
in what the policy believes.
"""

import dataclasses
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import Study

from cda4rec_jax.links import LinkConfig, Realisation, realise
from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, HistoryBatch, Placement, Plan, Subtask, Trace
from cda4rec_jax.metrics import MISS_RANK
from cda4rec_jax.pipeline.decisions import draw_requests
from cda4rec_jax.planner import (
    ContextConfig,
    PlanCosts,
    context_features,
    expected_regret,
    local_repair,
    plan_bytes,
    plan_quality,
    predicted_transfer,
    subtask_ms,
    utility,
)
from cda4rec_jax.planner.utility import MAX_QUALITY_RANK
from cda4rec_jax.privacy.gate import Gate
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.runtime import (
    NO_DELAY,
    DeviceClient,
    DeviceFunctions,
    Executor,
    LinkRealisation,
    Prediction,
    Request,
    realised_link,
)
from cda4rec_jax.runtime.models import DeviceState, device_functions, device_state, memory_errors
from cda4rec_jax.runtime.recommend import Recommender

NONE, POOR, WORST, FAILED, SHIFT, SLOW, MEMORY = (
    "no fault",
    "poor allocation: random plan",
    "poor allocation: worst plan",
    "link failure",
    "change of context",
    "slow device",
    "memory gone",
)
# The flag that tells each failure.
SCENARIOS = {
    POOR: "regret_high",
    WORST: "regret_high",
    FAILED: "link_failed",
    SHIFT: "context_shift",
    SLOW: "device_exhausted",
    MEMORY: "device_exhausted",
}
PATIENT_MS = 600_000.0  # deadline of a request that compiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Asked:
    """``n`` requests as they are planned, and what this machine and the link are expected to take. NumPy arrays."""

    context: Context
    mask: np.ndarray  # [n, p]
    costs: PlanCosts  # of the deployment, as the policy sees them
    worth: np.ndarray  # [n, p] expected utility
    regret: np.ndarray  # [n, p] in units of dQ
    fallback: np.ndarray  # [n, p]
    subtask_ms: np.ndarray  # [n, p, subtask]
    link_ms: np.ndarray  # [n, p]
    latency_ms: np.ndarray  # [n, p]
    met: Realisation


@dataclass(frozen=True, kw_only=True)
class Found:
    """One request that was run."""

    trace: Trace
    has_slate: bool  # one, of new and different items
    meets: bool  # its plan meets the fault of the scenario
    utility: float
    regret: float  # of the plan that was asked for


class Lab:
    """Requests that are asked again under every fault."""

    def __init__(
        self,
        trained: TrainedSystem,
        recommender: Recommender,
        users: np.ndarray,
        positions: np.ndarray,
        link_factor: float,
        slowdown: int,
    ):
        self._recommender, self._plans = recommender, recommender.space.plans
        self._link_factor, self._slowdown = link_factor, slowdown
        self._histories = trained.corpus.histories(users, positions, trained.config.stored_events)
        self._k = min(MAX_QUALITY_RANK, recommender.functions.num_items)
        self.asked = _asked(trained, self._histories)
        self._warm: set[Plan] = set()

    def run(self, study: Study) -> dict[str, list[Found]]:
        """Every request in every scenario, by scenario."""
        found: dict[str, list[Found]] = {name: [] for name in (NONE, *SCENARIOS)}
        with study.console.status("asking") as status:
            for row in range(len(self._histories.lengths)):
                status.update(f"request {row + 1:,} of {len(self._histories.lengths):,}, {len(found)} scenarios each")
                state = self._state(row)
                for name, results in found.items():
                    results.append(self._ask(row, state, name))
        return found

    def _state(self, row: int) -> DeviceState:
        history: HistoryBatch = jax.tree.map(lambda leaf: leaf[row : row + 1], self._histories)
        context = self.asked.context
        level, age = EgressLevel(int(context.cache_level[row])), int(context.cache_age_events[row])
        return device_state(self._recommender.functions, self._recommender.cloud, history, level, age)

    def _ask(self, row: int, state: DeviceState, scenario: str) -> Found:
        index = self._allocate(row, scenario)
        plan, fallback = self._plans[index], self._plans[int(self.asked.fallback[row, index])]
        consent = EgressLevel(int(self.asked.context.consent[row]))
        functions = device_functions(self._recommender.functions, state, self._k)
        for each in {plan, replace(plan, structured=Placement.SKIP), fallback, replace(fallback, structured=Placement.SKIP)}:
            if each not in self._warm:  # no measured time shall be one of compiling
                self._execute(functions, consent, Request(plan=each, fallback=fallback, link=NO_DELAY, deadline_ms=PATIENT_MS))
                self._warm.add(each)
        request = Request(plan=plan, fallback=fallback, link=self._link(row, scenario), prediction=self._prediction(row, index))
        items, trace = self._execute(self._faulty(functions, scenario), consent, request)
        return Found(
            trace=trace,
            has_slate=_is_slate(items, state.history, self._k),
            meets=self._meets(row, index, scenario),
            utility=self._utility(row, index, items, trace),
            regret=float(self.asked.regret[row, index]),
        )

    def _allocate(self, row: int, scenario: str) -> int:
        """The plan that is expected to be worth most, or what a poor allocator takes instead."""
        worth = np.where(self.asked.mask[row], self.asked.worth[row], np.nan)
        best = int(np.nanargmax(worth))
        if scenario == POOR:
            others = np.setdiff1d(np.flatnonzero(self.asked.mask[row]), best)
            return int(np.random.default_rng([0, row]).choice(others)) if len(others) else best
        return int(np.nanargmin(worth)) if scenario == WORST else best

    def _meets(self, row: int, index: int, scenario: str) -> bool:
        plan = self._plans[index]
        if scenario in (POOR, WORST):
            return index != self._allocate(row, NONE)
        if scenario in (FAILED, SHIFT):
            return plan.uses_link
        if scenario == MEMORY:
            return plan.structured is Placement.DEVICE
        if scenario == SLOW:
            return plan.ranking is Placement.DEVICE
        return True

    def _execute(self, functions: DeviceFunctions, consent: EgressLevel, request: Request) -> tuple[np.ndarray, Trace]:
        with closing(Ledger()) as ledger:
            client = DeviceClient(self._recommender.service.handle, Gate(consent, ledger))
            with Executor(functions, client) as executor:
                answer = executor.execute(request)
        return np.asarray(answer.slate.items), answer.trace

    def _link(self, row: int, scenario: str) -> LinkRealisation:
        met = realised_link(self.asked.met, row)
        factor = self._link_factor if scenario == SHIFT else 1.0
        return LinkRealisation(
            transfer_ms=lambda payload_bytes, direction: factor * met.transfer_ms(payload_bytes, direction),
            failed=scenario == FAILED,
            queue_ms=met.queue_ms,
        )

    def _faulty(self, functions: DeviceFunctions, scenario: str) -> DeviceFunctions:
        def slow(function: Callable[..., Any]) -> Callable[..., Any]:
            def repeated(*arguments: Any) -> Any:
                for _ in range(self._slowdown - 1):
                    function(*arguments)
                return function(*arguments)

            return repeated

        @memory_errors()
        def fail() -> object:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory, says the fault")

        if scenario == SLOW:
            names = ("abstract", "structured", "cached_candidates", "complete", "rank")
            return dataclasses.replace(functions, **{name: slow(getattr(functions, name)) for name in names})
        return dataclasses.replace(functions, structured=fail) if scenario == MEMORY else functions

    def _prediction(self, row: int, index: int) -> Prediction:
        return Prediction(
            subtask_ms=dict(zip(Subtask, self.asked.subtask_ms[row, index].tolist(), strict=True)),
            link_ms=float(self.asked.link_ms[row, index]),
            latency_ms=float(self.asked.latency_ms[row, index]),
            regret=float(self.asked.regret[row, index]),
        )

    def _utility(self, row: int, index: int, items: np.ndarray, trace: Trace) -> float:
        context, costs = self.asked.context, self.asked.costs
        places = np.flatnonzero(items[0] == self._histories.targets[row])
        rank = int(places[0]) + 1 if len(places) else MISS_RANK
        paid = context.utility_per_ms[row] * trace.latency_ms + context.utility_per_mj[row] * costs.energy_mj[row, index]
        exposed = context.utility_per_exposure[row] * costs.exposure[row, index] if trace.uplink_bytes else 0.0
        return float(np.asarray(plan_quality(np.full((1, 1), rank)))[0, 0] - paid - exposed)


def _asked(trained: TrainedSystem, history: HistoryBatch) -> Asked:
    policy, world, measured = trained.system.policy, trained.world("deployment"), trained.world("measured")
    assert policy is not None
    asked = draw_requests(
        world,
        history,
        trained.tables,
        0,
        max_cache_age=trained.config.max_cache_age,
        contexts=ContextConfig(),
        links=LinkConfig(),
    )
    context, mask, space = asked.context, asked.mask, world.space
    # Times were measured on this machine, whatever device a context names: only the highest tier is taken as it is.
    here = replace(context, tier=jnp.full_like(context.tier, int(DeviceTier.HIGH)))
    transfer = predicted_transfer(here, *plan_bytes(here, measured.sizes, space), measured.profile.queue_ms)
    worth = utility(policy.quality(context_features(context)), asked.predicted, context)
    found = Asked(
        context=context,
        mask=mask,
        costs=asked.predicted,
        worth=worth,
        regret=expected_regret(worth, mask) / world.scales.quality_gap,
        fallback=local_repair(mask, space),
        subtask_ms=subtask_ms(measured.profile, here, measured.sizes, space),
        link_ms=transfer.uplink_ms + transfer.downlink_ms,
        latency_ms=measured.costs(here, transfer).latency_ms,
        met=realise(context, history.event_ids, 0, measured.profile.queue_ms, LinkConfig()),
    )
    return jax.tree.map(np.asarray, found)


def _is_slate(items: np.ndarray, history: HistoryBatch, k: int) -> bool:
    real = items[items > 0].tolist()
    return items.shape == (1, k) and len(real) == len(set(real)) > 0 and not set(real) & set(history.seen[0].tolist())
