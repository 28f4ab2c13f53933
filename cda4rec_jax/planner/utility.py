"""What a plan is worth: quality minus the price of time, energy and exposure, and the scales those prices are drawn at."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from cda4rec_jax.array_typing import Array, PlanMask, PlanRanks, PlanValues
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context
from cda4rec_jax.planner.costs import PlanCosts
from cda4rec_jax.planner.plan_space import local_repair

MAX_QUALITY_RANK = 100
FAILURE_TIMEOUT_MS = 500.0  # wait for an answer that never comes, before the local plan takes over

# Floors of the weight scales: a gap below its floor says that the pair hardly differs, and a price scaled by it would explode.
MIN_QUALITY_GAP = 1e-3
MIN_LATENCY_GAP_MS = 1.0
MIN_ENERGY_GAP_MJ = 1.0
MIN_EXPOSURE_GAP = 0.01

HALVINGS = 16  # of the requests, over which dQ is the mean
COST_QUANTILES = (0.1, 0.9)  # without the few plans that are far dearer than all others


def plan_quality(ranks: PlanRanks) -> PlanValues:
    """Q = 1 / log2(1 + rank) for ranks 1 to 100, and 0 past them or on a miss (a rank below 1)."""
    counted = (ranks >= 1) & (ranks <= MAX_QUALITY_RANK)
    return jnp.where(counted, 1.0 / jnp.log2(1.0 + jnp.maximum(ranks, 1).astype(jnp.float32)), 0.0)


def cost_in_utility(costs: PlanCosts, context: Context) -> PlanValues:
    """W . c = w_t latency + w_e energy + w_p exposure, and a user's own cost terms, in units of quality."""
    priced = (
        context.utility_per_ms[:, None] * costs.latency_ms
        + context.utility_per_mj[:, None] * costs.energy_mj
        + context.utility_per_exposure[:, None] * costs.exposure
    )
    for value in own_costs(costs, context).values():
        priced = priced + value
    return priced


def own_costs(costs: PlanCosts, context: Context) -> dict[str, PlanValues]:
    """The cost terms of a user's own in the space of ``costs``, by name, in units of utility.

    Raises:
      UserError: a term is of another shape than [b, p].
    """
    found = {}
    for name, term in zip(costs.space.term_names, costs.space.cost_terms, strict=True):
        value = jnp.asarray(term(context, costs, costs.space.table))
        if value.shape != costs.latency_ms.shape:
            raise UserError(
                f"cost term {name} has shape {value.shape}, expected one value for each request and plan, {costs.latency_ms.shape}: "
                "fields of the context are [b] and need [:, None], columns of the plan table are [p] and need [None, :]"
            )
        found[name] = value
    return found


def utility(quality: PlanValues, costs: PlanCosts, context: Context) -> PlanValues:
    """U = quality - w_t latency - w_e energy - w_p exposure - own cost terms."""
    return quality - cost_in_utility(costs, context)


def expected_regret(utilities: PlanValues, mask: PlanMask) -> PlanValues:
    """How much less each plan is expected to be worth than the best allowed one: max over the mask of U, minus U; [b, p]."""
    best = jnp.max(jnp.where(mask, utilities, -jnp.inf), axis=1, keepdims=True)
    return best - utilities


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
      mask: ``allowed(context, costs.space)``.
      timeout_ms: how long the device waits before it answers alone.

    Where the link fails, a plan that uses it gets the quality of its local repair plan (``plan_space.local_repair``) and the
    latency timeout + that plan's latency. Energy, exposure and bytes stay the plan's own: the radio tried, and what was sent has left.
    """
    answering = local_repair(mask, costs.space)
    hit = failed[:, None] & jnp.asarray(costs.space.table.uses_link)[None, :]
    local_latency_ms = jnp.take_along_axis(costs.latency_ms, answering, axis=1)
    local_quality = jnp.take_along_axis(quality, answering, axis=1)
    happened = replace(costs, latency_ms=jnp.where(hit, timeout_ms + local_latency_ms, costs.latency_ms))
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
    def from_quality_and_costs(cls, quality: PlanValues, possible: PlanMask, costs: PlanCosts, mask: PlanMask) -> "WeightScales":
        """Scales of some validation requests, on the host. No single plan decides: of several equal plans, noise picks another each time.

        dQ is what asking the cloud is worth: the mean quality of the best plan that uses the link above that of the best plan that
        uses none. Both are chosen on one half of the requests and measured on the other, and dQ is the mean over ``HALVINGS`` random
        halvings, so no plan is measured on the requests that chose it.

        dC_j is what there is to choose: the range between the quantiles ``COST_QUANTILES`` of cost j over the allowed plans of a
        request, median over the requests that may use the link (the others have only local plans). It does not depend on quality.

        A gap below its floor (MIN_* of this module), also a negative one, becomes the floor.

        Args:
          quality: of every plan.
          possible: plans whose quality counts in each request, such as those that it could serve were all of them permitted.
          costs: predicted.
          mask: ``allowed(context)``.
        """
        uses_link, permitted = costs.space.table.uses_link, np.asarray(mask)
        online = np.any(permitted & uses_link[None], axis=1)
        tables = (costs.latency_ms, costs.energy_mj, costs.exposure)
        latency, energy, exposure = (_spread(np.asarray(table), permitted, online) for table in tables)
        return cls.of(
            quality_gap=max(_cloud_gain(np.asarray(quality, np.float64), np.asarray(possible), uses_link), MIN_QUALITY_GAP),
            latency_gap_ms=max(latency, MIN_LATENCY_GAP_MS),
            energy_gap_mj=max(energy, MIN_ENERGY_GAP_MJ),
            exposure_gap=max(exposure, MIN_EXPOSURE_GAP),
        )


def _cloud_gain(quality: Float[np.ndarray, "b p"], possible: Bool[np.ndarray, "b p"], uses_link: Bool[np.ndarray, "p"]) -> float:
    """Cross-fitted mean quality of the best plan that uses the link above that of the best that uses none; 0 if none can tell."""
    random, gains = np.random.default_rng(0), []
    for _ in range(HALVINGS):
        half = random.permutation(len(quality)) % 2 == 0
        for choosing, measured in ((half, ~half), (~half, half)):
            counts = possible[choosing].sum(axis=0)
            sums = np.where(possible, quality, 0.0)[choosing].sum(axis=0)
            means = np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)
            cloud, local = (int(np.where(kind, means, -np.inf).argmax()) for kind in (uses_link, ~uses_link))
            rows = measured & possible[:, cloud] & possible[:, local]
            if rows.any():
                gains.append((quality[rows, cloud] - quality[rows, local]).mean())
    return float(np.mean(gains)) if gains else 0.0


def _spread(cost: Float[np.ndarray, "b p"], mask: Bool[np.ndarray, "b p"], online: Bool[np.ndarray, "b"]) -> float:
    """Median over the ``online`` requests of the range between ``COST_QUANTILES`` over their plans; 0 without any."""
    if not online.any():
        return 0.0
    low, high = np.nanquantile(np.where(mask, cost, np.nan)[online], COST_QUANTILES, axis=1)
    return float(np.median(high - low))
