"""Why a plan was chosen: the terms of its logit against those of the runner-up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from cda4rec_jax.array_typing import PlanLogits, PlanValues
from cda4rec_jax.messages import Context
from cda4rec_jax.planner.costs import PlanCosts
from cda4rec_jax.planner.utility import own_costs

NONE: Mapping[str, PlanValues] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class PlanTerms:
    """One plan's logit, taken apart. The terms are in units of utility and sum to ``total``; costs are predicted.

    A planner that tells no quality cannot be taken apart: its ``quality``, ``total`` and ``utility`` are None, and the other terms are what
    the plan costs, whatever the planner makes of that.
    """

    plan_index: int
    name: str
    logit: float
    quality: float | None
    time: float  # - w_t latency
    energy: float  # - w_e energy
    exposure: float  # - w_p exposure
    own: Mapping[str, float]  # - each cost term of a user's own, by name
    further: Mapping[str, float] = field(default_factory=dict)  # ``LearnedPlanner.further_terms``, by name
    prices_count: bool = True  # whether time, energy, exposure and own costs are terms of the logit, and not told beside it
    latency_ms: float
    energy_mj: float
    exposure_share: float
    uplink_bytes: float
    downlink_bytes: float

    @property
    def utility(self) -> float | None:
        """Quality less all prices, whether or not the planner looks at them."""
        if self.quality is None:
            return None
        return self.quality + self.time + self.energy + self.exposure + sum(self.own.values())

    @property
    def total(self) -> float | None:
        """What the planner goes by: quality, its further terms, and the prices if they count."""
        worth = self.utility if self.prices_count else self.quality
        return None if worth is None else worth + sum(self.further.values())

    @property
    def is_utility(self) -> bool:
        """Whether what the planner goes by is utility."""
        return self.prices_count and not self.further


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The chosen plan, and the runner-up (None where nothing else could have been chosen)."""

    chosen: PlanTerms
    runner_up: PlanTerms | None
    tau: float | None  # logit = total / tau; None where the logit is something else

    @property
    def margin(self) -> float | None:
        """``total`` by which the chosen plan is ahead; None without a runner-up, or where the planner tells no quality."""
        return None if self.runner_up is None else _above(self.chosen.total, self.runner_up.total)

    @property
    def utility_margin(self) -> float | None:
        """The same of utility: less than 0 where the planner goes by something else, and gives it up."""
        return None if self.runner_up is None else _above(self.chosen.utility, self.runner_up.utility)


def _above(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def ranked_terms(
    logits: PlanLogits,
    quality: PlanValues | None,
    costs: PlanCosts,
    context: Context,
    *,
    further: Mapping[str, PlanValues] = NONE,
    prices_count: bool = True,
    row: int = 0,
) -> tuple[PlanTerms, ...]:
    """The terms of every plan that one request allows, best first, as plain numbers.

    Where no plan has a logit above -inf they are those of the last resort, which is served then.

    Args:
      logits: a planner's scores, -inf at forbidden plans.
      quality: the quality that the planner believes in ([b, p]; ``Policy.quality``, or mean qualities for plug-in); None
        where it tells none.
      costs: predicted costs.
      context: the requests.
      further: the planner's ``further_terms``.
      prices_count: that of the planner.
      row: which request of the batch.
    """
    scores = np.asarray(logits[row], np.float64)
    order = [int(index) for index in np.argsort(-scores, kind="stable") if scores[index] > -np.inf]
    return _terms(order or [costs.space.last_resort], logits, quality, costs, context, further, prices_count, row)


def _terms(
    indices: Sequence[int],
    logits: PlanLogits,
    quality: PlanValues | None,
    costs: PlanCosts,
    context: Context,
    further: Mapping[str, PlanValues],
    prices_count: bool,
    row: int,
) -> tuple[PlanTerms, ...]:
    own = {name: np.asarray(values[row]) for name, values in own_costs(costs, context).items()}

    def terms(index: int) -> PlanTerms:
        latency_ms = float(costs.latency_ms[row, index])
        energy_mj = float(costs.energy_mj[row, index])
        exposure = float(costs.exposure[row, index])
        return PlanTerms(
            plan_index=index,
            name=costs.space.names[index],
            logit=float(logits[row, index]),
            quality=None if quality is None else float(quality[row, index]),
            time=-float(context.utility_per_ms[row]) * latency_ms,
            energy=-float(context.utility_per_mj[row]) * energy_mj,
            exposure=-float(context.utility_per_exposure[row]) * exposure,
            own={name: -float(values[index]) for name, values in own.items()},
            further={name: float(values[row, index]) for name, values in further.items()},
            prices_count=prices_count,
            latency_ms=latency_ms,
            energy_mj=energy_mj,
            exposure_share=exposure,
            uplink_bytes=float(costs.uplink_bytes[row, index]),
            downlink_bytes=float(costs.downlink_bytes[row, index]),
        )

    return tuple(terms(index) for index in indices)


def explain_decision(
    logits: PlanLogits,
    quality: PlanValues | None,
    costs: PlanCosts,
    context: Context,
    *,
    tau: float | None,
    further: Mapping[str, PlanValues] = NONE,
    prices_count: bool = True,
    row: int = 0,
    chosen: int | None = None,
) -> Decision:
    """The decision of one request: the plan that runs, and the best other one of ``ranked_terms``.

    Args:
      tau: the planner's temperature; None where its logit is not the sum of these terms / tau.
      further, prices_count: of the planner, as for ``ranked_terms``.
      chosen: index of the plan that runs, where it is not the planner's own choice.
    """
    ranked = ranked_terms(logits, quality, costs, context, further=further, prices_count=prices_count, row=row)
    # What is asked for may be a plan that the planner gives no score.
    first = ranked[0] if chosen is None else _terms([chosen], logits, quality, costs, context, further, prices_count, row)[0]
    second = next((terms for terms in ranked if terms.plan_index != first.plan_index), None)
    return Decision(chosen=first, runner_up=second, tau=None if tau is None else float(tau))
