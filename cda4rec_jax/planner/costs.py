"""What each plan costs in a context: time, energy on the device, exposure, bytes. Pure, differentiable, one table of sub-tasks.

    latency = planning + max(abstract + uplink + queue + cloud + downlink, structured on the device) + ranking on the device
    cloud   = max(semantic + retrieval, structured in the cloud) + ranking in the cloud

A local plan has the retrieval from its cache in place of everything from uplink to downlink. A plan whose number of candidates lies between
two of CANDIDATE_COUNTS has times of retrieval and of ranking on the device that lie on the line between theirs; ranking in the cloud takes
the same time whatever their number.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cda4rec_jax.array_typing import Array, PlanValues
from cda4rec_jax.messages import MIN_KBPS, RECENT_ITEMS, Context, EgressLevel
from cda4rec_jax.planner.cost_profiles import CostProfile
from cda4rec_jax.planner.plan_space import CANDIDATE_COUNTS, STANDARD, PlanSpace, PlanTable

RELEASED_EVENTS = (0.0, 0.0, float(RECENT_ITEMS), np.inf)  # at most, by EgressLevel; FULL releases all that agents read
Scalar = float | Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PayloadSizes:
    """Bytes on the wire, and how long a history the agents read, as scalars; a pytree. The runtime's codec knows the true bytes."""

    history_events: Scalar = 200.0  # newest events that FULL releases and that structured modelling reads
    header_bytes: Scalar = 140.0  # request id, version, level, number of candidates: once in each direction
    profile_bytes: Scalar = 57.0  # 8 category shares and the length bucket
    item_id_bytes: Scalar = 3.0
    attributes_bytes: Scalar = 8.0
    embedding_bytes: Scalar = 256.0  # the semantic embedding, up when reused, down when fresh
    evidence_bytes: Scalar = 256.0  # one candidate with its id, score and record, less what the device holds of it, in the mean
    scored_item_bytes: Scalar = 8.0  # the same where its popularity is all that is wanted of the record


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PlanCosts:
    """Costs of every plan of ``space``; each field has shape [b, p]. Energy is the device's: battery, not the cloud's electricity."""

    latency_ms: Float[Array, "*b p"]
    energy_mj: Float[Array, "*b p"]
    exposure: Float[Array, "*b p"]  # share of the private history that leaks, 0 (nothing leaves) to about 1
    uplink_bytes: Float[Array, "*b p"]
    downlink_bytes: Float[Array, "*b p"]
    space: PlanSpace = field(default=STANDARD, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TransferTimes:
    """Time on the link, predicted or realised; 0 for plans that use no link."""

    uplink_ms: PlanValues
    downlink_ms: PlanValues
    queue_ms: Float[Array, "b"]


def _plan(column) -> Array:
    return jnp.asarray(column)[None, :]


def _read_events(context: Context, sizes: PayloadSizes) -> Float[Array, "b one"]:
    """Events of a history that agents read."""
    return jnp.minimum(context.history_length, sizes.history_events)[:, None]


def _released_events(context: Context, sizes: PayloadSizes, table: PlanTable) -> PlanValues:
    return jnp.minimum(_read_events(context, sizes), _plan(np.asarray(RELEASED_EVENTS, np.float32)[table.level]))


def plan_bytes(context: Context, sizes: PayloadSizes, space: PlanSpace = STANDARD) -> tuple[PlanValues, PlanValues]:
    """(uplink, downlink) bytes of every plan, [b, p] each; 0 for plans that use no link.

    Up: the header and either the abstract (profile, released ids, attributes at FULL) or the reused embedding. Down: the header,
    then the candidates with their evidence (scored items alone, where no structured modelling on the device reads it), and the
    embedding where it is fresh.
    """
    table = space.table
    fresh, link = _plan(table.semantic_cloud).astype(jnp.float32), _plan(table.uses_link).astype(jnp.float32)
    is_full = _plan(table.level == int(EgressLevel.FULL)).astype(jnp.float32)
    abstract = (
        sizes.profile_bytes + sizes.item_id_bytes * _released_events(context, sizes, table) + sizes.attributes_bytes * is_full
    )
    up = link * (sizes.header_bytes + fresh * abstract + (1.0 - fresh) * sizes.embedding_bytes)
    item_bytes = jnp.where(_plan(table.structured_device), sizes.evidence_bytes, sizes.scored_item_bytes)
    down = link * (sizes.header_bytes + _plan(table.candidates) * item_bytes + fresh * sizes.embedding_bytes)
    return up, jnp.broadcast_to(down, up.shape)


def predicted_transfer(
    context: Context, uplink_bytes: PlanValues, downlink_bytes: PlanValues, queue_ms: Float[Array, ""]
) -> TransferTimes:
    """Time on the link from the context's estimates alone: half a round trip + 8 * bytes / kbps each way, without losses; 0 for 0 bytes."""
    half_ms = 0.5 * context.round_trip_ms[:, None]

    def one_way_ms(payload_bytes: PlanValues, kbps: Float[Array, "b"]) -> PlanValues:
        return jnp.where(payload_bytes > 0, half_ms + 8.0 * payload_bytes / jnp.maximum(kbps, MIN_KBPS)[:, None], 0.0)

    return TransferTimes(
        uplink_ms=one_way_ms(uplink_bytes, context.uplink_kbps),
        downlink_ms=one_way_ms(downlink_bytes, context.downlink_kbps),
        queue_ms=jnp.broadcast_to(queue_ms, context.round_trip_ms.shape),
    )


def _at_counts(values: Float[Array, "*tier count"], table: PlanTable) -> Float[Array, "*tier p"]:
    """Values at the plans' numbers of candidates: linear between two of ``CANDIDATE_COUNTS``."""
    below = values[..., jnp.asarray(table.candidates_index)]
    if not table.candidates_fraction.any():
        return below
    above = values[..., jnp.asarray(np.minimum(table.candidates_index + 1, len(CANDIDATE_COUNTS) - 1))]
    return below + jnp.broadcast_to(table.candidates_fraction, below.shape) * (above - below)


def subtask_ms(
    profile: CostProfile, context: Context, sizes: PayloadSizes, space: PlanSpace = STANDARD
) -> Float[Array, "b p subtask"]:
    """Compute time of the six sub-tasks of every plan, in the order of ``messages.Subtask``; 0 where a plan skips one.

    Sending a kept embedding stands in the place of the abstract. Time on the link and the queue are not among them.
    """
    return jnp.stack(_subtask_columns(profile, context, sizes, space), axis=-1)


def _subtask_columns(profile: CostProfile, context: Context, sizes: PayloadSizes, space: PlanSpace) -> tuple[PlanValues, ...]:
    """The six of ``subtask_ms`` apart: stacking and taking apart again costs a decision more than all its sums."""
    table, tier = space.table, context.tier
    level, on_device = jnp.asarray(table.level), table.structured_device
    structured_events = _read_events(context, sizes)

    def device(by_tier: Float[Array, "tier"]) -> Float[Array, "b one"]:
        return by_tier[tier][:, None]

    abstract = jnp.where(_plan(table.uses_link), profile.abstract_ms[:, jnp.asarray(on_device, jnp.int32), level][tier], 0.0)
    semantic_cloud = _plan(profile.semantic_ms[level]) + profile.semantic_ms_per_event * _released_events(context, sizes, table)
    semantic = jnp.where(_plan(table.semantic_cloud), semantic_cloud, 0.0)

    def beside_structured(values: Float[Array, "*tier structured p"]) -> Float[Array, "*tier p"]:
        return jnp.where(jnp.broadcast_to(on_device, values[..., 0, :].shape), values[..., 1, :], values[..., 0, :])

    retrieval_cloud = _plan(beside_structured(_at_counts(profile.retrieval_ms, table)))
    retrieval = jnp.where(_plan(table.uses_link), retrieval_cloud, device(profile.cache_retrieval_ms))
    structured_device = device(profile.structured_ms) + device(profile.structured_ms_per_event) * structured_events
    structured_cloud = profile.structured_cloud_ms + profile.structured_cloud_ms_per_event * structured_events
    structured = jnp.where(_plan(table.structured_device), structured_device, 0.0)
    structured = structured + jnp.where(_plan(table.structured_cloud), structured_cloud, 0.0)
    of_counts, of_cache = profile.ranking_ms[..., :-1], profile.ranking_ms[..., -1:]
    from_cloud = beside_structured(_at_counts(of_counts, table))
    from_cache = beside_structured(jnp.broadcast_to(of_cache, (*of_cache.shape[:-1], space.num_plans)))
    ranking_device = jnp.where(_plan(table.uses_link), from_cloud, from_cache)
    ranking_cloud = _plan(profile.ranking_cloud_ms[jnp.asarray(table.structured_cloud, jnp.int32)])
    ranking = jnp.where(_plan(table.ranking_cloud), ranking_cloud, ranking_device[tier])
    planning = jnp.broadcast_to(device(profile.planning_ms), ranking.shape)
    return abstract, planning, semantic, retrieval, structured, ranking


def plan_costs(
    profile: CostProfile,
    context: Context,
    exposure_by_level: Float[Array, "level"],
    sizes: PayloadSizes,
    transfer: TransferTimes | None = None,
    space: PlanSpace = STANDARD,
) -> PlanCosts:
    """Costs of every plan.

    Args:
      profile: what sub-tasks cost.
      context: [b] requests.
      exposure_by_level: exposure of each EgressLevel; entry NOTHING is 0.
      sizes: bytes of what travels, and the events that are read.
      transfer: realised time on the link; None predicts it from the context's estimates.
      space: the plans.

    Returns:
      ``PlanCosts``; finite everywhere, also for plans that the context forbids.

    Energy: device power * compute time on the device + radio energy per KB (1000 bytes) + radio power * time on the link.
    """
    table = space.table
    up_bytes, down_bytes = plan_bytes(context, sizes, space)
    times = transfer or predicted_transfer(context, up_bytes, down_bytes, profile.queue_ms)
    abstract, planning, semantic, retrieval, structured, ranking = _subtask_columns(profile, context, sizes, space)
    link, in_cloud = _plan(table.uses_link), _plan(table.ranking_cloud)
    structured_device = jnp.where(_plan(table.structured_device), structured, 0.0)
    structured_cloud = structured - structured_device
    ranking_cloud = jnp.where(in_cloud, ranking, 0.0)
    ranking_device = ranking - ranking_cloud

    cloud_ms = jnp.maximum(semantic + retrieval, structured_cloud) + ranking_cloud
    link_ms = times.uplink_ms + times.downlink_ms
    branch_ms = jnp.where(link, abstract + link_ms + times.queue_ms[:, None] + cloud_ms, retrieval)
    latency_ms = planning + jnp.maximum(branch_ms, structured_device) + ranking_device

    cache_retrieval = jnp.where(link, 0.0, retrieval)
    device_ms = planning + abstract + cache_retrieval + structured_device + ranking_device
    radio_mj = (
        profile.radio_uplink_mj_per_kb[context.link][:, None] * up_bytes / 1000.0
        + profile.radio_downlink_mj_per_kb[context.link][:, None] * down_bytes / 1000.0
        + profile.radio_active_w[context.link][:, None] * link_ms
    )
    egress = jnp.where(_plan(table.semantic_reuse), context.cache_level[:, None], _plan(table.level))
    egress = jnp.where(link, egress, int(EgressLevel.NOTHING))
    return PlanCosts(
        latency_ms=latency_ms,
        energy_mj=profile.device_power_w[context.tier][:, None] * device_ms + radio_mj,
        exposure=exposure_by_level[egress],
        uplink_bytes=up_bytes,
        downlink_bytes=down_bytes,
        space=space,
    )
