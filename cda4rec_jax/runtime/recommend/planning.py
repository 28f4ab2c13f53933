"""From one user's history and a declared situation to the planner's decision, and afterwards to why it was made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from cda4rec_jax.array_typing import Array, Lengths, PlanLogits, PlanMask, PlanValues
from cda4rec_jax.links import LinkConfig, as_estimated, realise
from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, HistoryBatch, Link, Subtask
from cda4rec_jax.pipeline.catalogue import ItemTables
from cda4rec_jax.pipeline.decisions import PlanningWorld, facts_of
from cda4rec_jax.pipeline.request import over_flat_arrays
from cda4rec_jax.planner import (
    ContextConfig,
    Decision,
    LearnedPlanner,
    PlanCosts,
    TransferTimes,
    WeightScales,
    allowed,
    context_features,
    expected_regret,
    explain_decision,
    local_repair,
    permitted,
    plan_bytes,
    predicted_transfer,
    repair,
    sample_contexts,
    subtask_ms,
    typical_contexts,
    utility,
)
from cda4rec_jax.planner import choose as choose_plan
from cda4rec_jax.planner.serving import Served, ServedPlanner, pack
from cda4rec_jax.runtime.clock import LinkRealisation, realised_link
from cda4rec_jax.runtime.executor import Prediction

LINK_NAMES: Mapping[Link, str] = {link: link.label for link in Link}
_DECLARED = ("link", "tier", "consent")  # of a ``Situation``; static, for which programs are compiled


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a request's user or their device declares; all else of the context is typical."""

    link: Link = Link.WIFI
    tier: DeviceTier = DeviceTier.MID
    consent: EgressLevel = EgressLevel.FULL


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Planned:
    """One request (b = 1) as the policy sees it, and what this machine is expected to take for it.

    Attributes:
        context, mask, costs, logits: of the policy, which plans for the deployment that it was trained for.
        quality, tau: of a policy that tells them, else None.
        further, prices_count: further terms of the logit, and whether prices are among its terms, as ``LearnedPlanner`` has them.
        regret: of every plan: what the policy goes by (utility, for most) of the best allowed plan minus its own, in units of dQ, [1, p];
            None without quality.
        repaired: for every plan, what answers in its place where the mask forbids it; [p].
        fallback: for every plan, the local plan that answers where its link fails; [1, p].
        subtask_ms: expected compute time here, [1, p, subtask].
        transfer: expected time on the link.
        here: expected costs here.
    """

    context: Context
    mask: PlanMask
    costs: PlanCosts
    quality: PlanValues | None
    logits: PlanLogits
    tau: jax.Array | np.ndarray | None
    further: dict[str, PlanValues]
    prices_count: bool = field(metadata={"static": True})
    regret: PlanValues | None
    repaired: jax.Array | np.ndarray
    fallback: jax.Array | np.ndarray
    subtask_ms: jax.Array | np.ndarray
    transfer: TransferTimes
    here: PlanCosts


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a policy thinks of every plan in ``b`` contexts, in the world that it was trained for; each [b, p]."""

    mask: PlanMask
    costs: PlanCosts
    quality: PlanValues | None  # None where the planner tells none
    logits: PlanLogits

    def choices(self) -> Int[Array, "b"]:
        """The plan that is served in each context; traceable."""
        return choose_plan(self.logits, self.mask, self.costs.space)


def score_plans(policy: LearnedPlanner, trained_for: PlanningWorld, context: Context) -> Scores:
    """Mask, costs, learned quality and logits of every plan; traceable."""
    mask, costs = allowed(context, trained_for.space), trained_for.costs(context)
    return Scores(
        mask=mask,
        costs=costs,
        quality=policy.quality(context_features(context)),
        logits=permitted(policy.logits(context, costs, mask), mask),
    )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The plan to run and why: a forced plan is set against the policy's own choice, and repaired where it is not allowed."""

    plan_index: int
    decision: Decision
    asked_for: str | None


class RequestPlanner:
    """Plans requests by a trained policy.

    Args:
        policy: trained.
        tables: of items, for what is typical of a history.
        trained_for: costs that the policy was trained with.
        measured: costs as they were measured on this machine.
        max_cache_age: events after which a device drops its embedding.
    """

    def __init__(
        self, policy: LearnedPlanner, tables: ItemTables, trained_for: PlanningWorld, measured: PlanningWorld, max_cache_age: int
    ) -> None:
        self._served = ServedPlanner(
            policy, trained_for.profile, trained_for.exposure_by_level, trained_for.sizes, trained_for.space
        )
        self._tables = tables

        def request(tables: ItemTables, history: HistoryBatch, **situation: Any) -> jax.Array:
            return pack(_typical_context(history, tables, trained_for.scales, max_cache_age=max_cache_age, **situation))[0]

        def drawn(history: HistoryBatch, draw: jax.Array) -> Context:
            return sample_contexts(
                facts_of(history, tables, max_cache_age), history.event_ids, trained_for.scales, draw, ContextConfig()
            )

        self._request = jax.jit(request, static_argnames=_DECLARED)
        self._of_context = partial(over_flat_arrays(policy, _planned), trained_for)
        self._draw, self._pack = jax.jit(drawn), jax.jit(lambda context: pack(context)[0])
        self._realise = jax.jit(partial(realise, config=LinkConfig()))
        self._measured = measured
        self.policy, self.trained_for, self.max_cache_age = policy, trained_for, max_cache_age

    def expect(self, measured: PlanningWorld) -> None:
        """Predict by these costs from now on; nothing is compiled again, and nothing is decided otherwise."""
        self._measured = measured

    def decide(self, history: HistoryBatch, situation: Situation) -> Served:
        """The plan of one request, from its history on: what a user waits for. Each situation is compiled once."""
        return self._served(np.asarray(self._request(self._tables, history, **vars(situation))))

    def decide_context(self, context: Context) -> Served:
        """The plan of a request (b = 1) whose context is known."""
        return self._served(np.asarray(self._pack(context)))

    def explain(self, history: HistoryBatch, situation: Situation, served: Served) -> Planned:
        """Everything about the request that was decided so; NumPy arrays. Its context alone is compiled for each situation."""
        scales, age = self.trained_for.scales, self.max_cache_age
        context = _typical_context(history, self._tables, scales, max_cache_age=age, **vars(situation))
        return replace(self.of_context(context), logits=served.scores[None, :])

    def plan(self, history: HistoryBatch, situation: Situation) -> Planned:
        """Decide and explain."""
        return self.explain(history, situation, self.decide(history, situation))

    def of_context(self, context: Context) -> Planned:
        """The same for a request (b = 1) whose context is known."""
        return jax.tree.map(np.asarray, self._of_context(self._measured, context))

    def draw(self, history: HistoryBatch, draw: int) -> Context:
        """Draw ``draw`` of context distribution v1 for a request (b = 1)."""
        return self._draw(history, draw)

    def meet(self, planned: Planned, event_ids: Lengths, draw: int) -> LinkRealisation:
        """What the request meets on the link: draw ``draw`` of the link model."""
        return realised_link(self._realise(planned.context, event_ids, draw, self._measured.profile.queue_ms), 0)

    def estimated(self, planned: Planned) -> LinkRealisation:
        """A link that is exactly as the request's context estimates it, and loses nothing."""
        return realised_link(as_estimated(planned.context, self._measured.profile.queue_ms), 0)


def choose(planned: Planned, plan_index: int | None) -> Choice:
    """The policy's choice, or the plan that is asked for."""
    forced = None if plan_index is None else int(planned.repaired[plan_index])
    tau = None if planned.tau is None else float(planned.tau)
    decision = explain_decision(
        planned.logits,
        planned.quality,
        planned.costs,
        planned.context,
        tau=tau,
        further=planned.further,
        prices_count=planned.prices_count,
        chosen=forced,
    )
    return Choice(
        plan_index=decision.chosen.plan_index,
        decision=decision,
        asked_for=None if plan_index is None else planned.costs.space.names[plan_index],
    )


def prediction_of(planned: Planned, plan_index: int) -> Prediction:
    """What this machine and the link are expected to take for a plan."""
    return Prediction(
        subtask_ms=_by_subtask(planned.subtask_ms[0, plan_index]),
        link_ms=float(planned.transfer.uplink_ms[0, plan_index] + planned.transfer.downlink_ms[0, plan_index]),
        latency_ms=float(planned.here.latency_ms[0, plan_index]),
        regret=0.0 if planned.regret is None else float(planned.regret[0, plan_index]),
    )


def _by_subtask(times_ms: Any) -> Mapping[Subtask, float]:
    return dict(zip(Subtask, np.asarray(times_ms).tolist(), strict=True))


@partial(jax.jit, static_argnames=("max_cache_age", *_DECLARED))
def _typical_context(
    history: HistoryBatch,
    tables: ItemTables,
    scales: WeightScales,
    *,
    max_cache_age: int,
    link: Link,
    tier: DeviceTier,
    consent: EgressLevel,
) -> Context:
    facts = facts_of(history, tables, max_cache_age)
    return typical_contexts(facts, scales, link=link, tier=tier, consent=consent, config=ContextConfig())


def _planned(policy: LearnedPlanner, trained_for: PlanningWorld, measured: PlanningWorld, context: Context) -> Planned:
    scores, space = score_plans(policy, trained_for, context), trained_for.space
    # The times were measured on this machine, whatever device the situation names: only the highest tier is taken as it is.
    here = replace(context, tier=jnp.full_like(context.tier, int(DeviceTier.HIGH)))
    transfer = predicted_transfer(here, *plan_bytes(here, measured.sizes, space), measured.profile.queue_ms)
    further, regret = dict(policy.further_terms(context, scores.costs)), None
    if scores.quality is not None:
        worth = utility(scores.quality, scores.costs, context) if policy.prices_count else scores.quality
        worth = sum(further.values(), start=worth)
        regret = expected_regret(worth, scores.mask) / trained_for.scales.quality_gap
    return Planned(
        context=context,
        mask=scores.mask,
        costs=scores.costs,
        quality=scores.quality,
        logits=scores.logits,
        tau=policy.tau(),
        further=further,
        prices_count=policy.prices_count,
        regret=regret,
        repaired=repair(jnp.arange(space.num_plans), jnp.broadcast_to(scores.mask, (space.num_plans, space.num_plans)), space),
        fallback=local_repair(scores.mask, space),
        subtask_ms=subtask_ms(measured.profile, here, measured.sizes, space),
        transfer=transfer,
        here=measured.costs(here, transfer),
    )
