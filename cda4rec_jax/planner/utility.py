"""What a plan is worth: quality minus the price of time, energy and exposure, and the scales those prices are drawn at."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from cda4rec_jax.array_typing import Array, PlanMask, PlanRanks, PlanValues
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context
from cda4rec_jax.planner.costs import PlanCosts
from cda4rec_jax.planner.plan_space import LAST_RESORT, PLAN_TABLE, local_repair

MAX_QUALITY_RANK = 100
FAILURE_TIMEOUT_MS = 500.0  # wait for an answer that never comes, before the local plan takes over

# Floors of the weight scales: a gap below its floor says that the pair hardly differs, and a price scaled by it would explode.
MIN_QUALITY_GAP = 1e-3
MIN_LATENCY_GAP_MS = 1.0
MIN_ENERGY_GAP_MJ = 1.0
MIN_EXPOSURE_GAP = 0.01


def plan_quality(ranks: PlanRanks) -> PlanValues:
    """Q = 1 / log2(1 + rank) for ranks 1 to 100, and 0 past them or on a miss (a rank below 1)."""
    counted = (ranks >= 1) & (ranks <= MAX_QUALITY_RANK)
    return jnp.where(counted, 1.0 / jnp.log2(1.0 + jnp.maximum(ranks, 1).astype(jnp.float32)), 0.0)


def cost_in_utility(costs: PlanCosts, context: Context) -> PlanValues:
    """W . c = w_t latency + w_e energy + w_p exposure, in units of quality."""
    return (
        context.utility_per_ms[:, None] * costs.latency_ms
        + context.utility_per_mj[:, None] * costs.energy_mj
        + context.utility_per_exposure[:, None] * costs.exposure
    )


def utility(quality: PlanValues, costs: PlanCosts, context: Context) -> PlanValues:
    """U = quality - w_t latency - w_e energy - w_p exposure."""
    return quality - cost_in_utility(costs, context)


def realised_utility(
    quality: PlanValues,
    costs: PlanCosts,
    context: Context,
    *,
    failed: Bool[Array, "b"],
    mask: PlanMask,
    timeout_ms: float = FAILURE_TIMEOUT_MS,
) -> PlanValues:
    """Utility of what really happens, for evaluation and for E_pi[U]; [b, p].

    Args:
      quality: of every plan, had its link worked.
      costs: realised, from ``plan_costs`` with realised transfer times.
      context: its weights price the costs.
      failed: the link that was believed up fails in this request.
      mask: ``allowed(context)``.
      timeout_ms: how long the device waits before it answers alone.

    Where the link fails, a plan that uses it gets the quality of its local repair plan (``plan_space.local_repair``) and the
    latency timeout + that plan's latency. Energy and exposure stay the plan's own: the radio tried, and what was sent has left.
    """
    answering = local_repair(mask)
    hit = failed[:, None] & jnp.asarray(PLAN_TABLE.uses_link)[None, :]
    local_latency_ms = jnp.take_along_axis(costs.latency_ms, answering, axis=1)
    local_quality = jnp.take_along_axis(quality, answering, axis=1)
    happened = PlanCosts(
        latency_ms=jnp.where(hit, timeout_ms + local_latency_ms, costs.latency_ms),
        energy_mj=costs.energy_mj,
        exposure=costs.exposure,
        uplink_bytes=costs.uplink_bytes,
        downlink_bytes=costs.downlink_bytes,
    )
    return utility(jnp.where(hit, local_quality, quality), happened, context)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class WeightScales:
    """dQ and dC_j, from which the weights of a context are drawn: w_j = lambda_j dQ / (3 dC_j). Scalars, all positive."""

    quality_gap: Float[Array, ""]
    latency_gap_ms: Float[Array, ""]
    energy_gap_mj: Float[Array, ""]
    exposure_gap: Float[Array, ""]

    @classmethod
    def of(cls, *, quality_gap: float, latency_gap_ms: float, energy_gap_mj: float, exposure_gap: float) -> "WeightScales":
        """From plain numbers, such as those of a config or a JSON file.

        Raises:
          UserError: one of them is not a positive finite number.
        """
        values = {
            "quality_gap": quality_gap,
            "latency_gap_ms": latency_gap_ms,
            "energy_gap_mj": energy_gap_mj,
            "exposure_gap": exposure_gap,
        }
        bad = [f"{name}={value}" for name, value in values.items() if not 0 < value < float("inf")]
        if bad:
            raise UserError(f"weight scales must be positive finite numbers, got {', '.join(bad)}")
        return cls(**{name: jnp.asarray(value, jnp.float32) for name, value in values.items()})

    @classmethod
    def from_quality_and_costs(cls, quality: PlanValues, costs: PlanCosts, mask: PlanMask) -> "WeightScales":
        """Scales of a validation set, on the host.

        The best plan has the highest mean quality over the requests that allow it, and the best local plan likewise among the
        plans that use no link. Over the requests that allow both, dQ is their mean quality gap: what asking the cloud is worth.
        dC_j is the median cost of the best plan above ``local-skip-skip``, which costs next to nothing (a good local plan can
        take as long as the best one, and a price drawn from that gap would explode). A gap below its floor (MIN_* of this
        module), also a negative one, becomes the floor.
        """
        allowed, values = np.asarray(mask), np.asarray(quality)
        counts = allowed.sum(axis=0)
        means = np.where(counts > 0, (values * allowed).sum(axis=0) / np.maximum(counts, 1), -np.inf)
        best = int(means.argmax())
        local = int(np.where(PLAN_TABLE.uses_link, -np.inf, means).argmax())
        rows = allowed[:, best] & allowed[:, local]
        if not rows.any():
            rows = np.ones_like(rows)

        def gap(table: PlanValues, reference: int) -> np.ndarray:
            columns = np.asarray(table)[rows]
            return columns[:, best] - columns[:, reference]

        return cls.of(
            quality_gap=max(float(gap(quality, local).mean()), MIN_QUALITY_GAP),
            latency_gap_ms=max(float(np.median(gap(costs.latency_ms, LAST_RESORT))), MIN_LATENCY_GAP_MS),
            energy_gap_mj=max(float(np.median(gap(costs.energy_mj, LAST_RESORT))), MIN_ENERGY_GAP_MJ),
            exposure_gap=max(float(np.median(gap(costs.exposure, LAST_RESORT))), MIN_EXPOSURE_GAP),
        )
