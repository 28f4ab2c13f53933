"""Why a plan was chosen: the terms of its logit against those of the runner-up."""

from dataclasses import dataclass

import numpy as np

from cda4rec_jax.array_typing import PlanLogits, PlanValues
from cda4rec_jax.messages import Context
from cda4rec_jax.planner.costs import PlanCosts
from cda4rec_jax.planner.plan_space import PLANS


@dataclass(frozen=True, kw_only=True)
class PlanTerms:
    """One plan's logit, taken apart. The four terms are in units of utility and sum to ``utility``; costs are predicted."""

    plan_index: int
    name: str
    quality: float
    time: float  # - w_t latency
    energy: float  # - w_e energy
    exposure: float  # - w_p exposure
    latency_ms: float
    energy_mj: float
    exposure_share: float
    uplink_bytes: float
    downlink_bytes: float

    @property
    def utility(self) -> float:
        return self.quality + self.time + self.energy + self.exposure


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The chosen plan, and the runner-up (None where nothing else could have been chosen)."""

    chosen: PlanTerms
    runner_up: PlanTerms | None
    tau: float  # logit = utility / tau, for a policy

    @property
    def margin(self) -> float | None:
        """Utility by which the chosen plan is ahead."""
        return None if self.runner_up is None else self.chosen.utility - self.runner_up.utility


def explain_decision(
    logits: PlanLogits, quality: PlanValues, costs: PlanCosts, context: Context, *, tau: float, row: int = 0
) -> Decision:
    """The decision of one request, as plain numbers.

    Args:
      logits: a planner's scores, -inf at forbidden plans.
      quality: the quality that the planner believes in ([b, p]; ``Policy.quality``, or mean qualities for plug-in).
      costs: predicted costs.
      context: the requests.
      tau: the planner's temperature.
      row: which request of the batch.

    Raises:
      ValueError: no plan of the row has a logit above -inf.
    """
    scores = np.asarray(logits[row], np.float64)
    order = np.argsort(-scores, kind="stable")
    if not scores[order[0]] > -np.inf:
        raise ValueError(f"row {row} forbids every plan: pass the logits of a planner, masked by plan_space.allowed")

    def terms(index: int) -> PlanTerms:
        latency_ms = float(costs.latency_ms[row, index])
        energy_mj = float(costs.energy_mj[row, index])
        exposure = float(costs.exposure[row, index])
        return PlanTerms(
            plan_index=index,
            name=PLANS[index].name,
            quality=float(quality[row, index]),
            time=-float(context.utility_per_ms[row]) * latency_ms,
            energy=-float(context.utility_per_mj[row]) * energy_mj,
            exposure=-float(context.utility_per_exposure[row]) * exposure,
            latency_ms=latency_ms,
            energy_mj=energy_mj,
            exposure_share=exposure,
            uplink_bytes=float(costs.uplink_bytes[row, index]),
            downlink_bytes=float(costs.downlink_bytes[row, index]),
        )

    second = int(order[1])
    return Decision(chosen=terms(int(order[0])), runner_up=terms(second) if scores[second] > -np.inf else None, tau=float(tau))
