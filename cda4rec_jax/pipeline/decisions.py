"""From a private history to everything that a planner is asked, and to what then really happens."""

import math
from dataclasses import dataclass, field, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array
from cda4rec_jax.links import LinkConfig, Realisation, downlink_ms, realise, uplink_ms
from cda4rec_jax.messages import Context, HistoryBatch
from cda4rec_jax.pipeline.catalogue import Catalogue, ItemTables
from cda4rec_jax.planner import (
    STANDARD,
    ContextConfig,
    CostProfile,
    PayloadSizes,
    PlanCosts,
    PlanSpace,
    TransferTimes,
    UserFacts,
    WeightScales,
    allowed,
    plan_bytes,
    plan_costs,
    sample_contexts,
    user_facts,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PlanningWorld:
    """What there is to choose from, and what it costs and exposes, measured or modelled before the planner learns."""

    profile: CostProfile
    exposure_by_level: Float[Array, "level"]
    sizes: PayloadSizes
    scales: WeightScales
    space: PlanSpace = field(default=STANDARD, metadata={"static": True})

    def costs(self, context: Context, transfer: TransferTimes | None = None) -> PlanCosts:
        """Costs of every plan; None predicts the time on the link from the context's estimates."""
        return plan_costs(self.profile, context, self.exposure_by_level, self.sizes, transfer, self.space)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Requests:
    """``b`` requests as a planner meets them, and what happens after it has chosen."""

    context: Context
    mask: Bool[Array, "*b p"]
    predicted: PlanCosts
    realised: PlanCosts
    failed: Bool[Array, "*b"]


def facts_of(history: HistoryBatch, tables: ItemTables, max_cache_age: int) -> UserFacts:
    """What a planner may know of the users."""
    age = jnp.minimum(jnp.maximum(history.lengths - 1, 0), max_cache_age)
    return user_facts(
        history.items,
        history.total_lengths,
        tables.categories,
        tables.train_counts,
        session_count=history.session_counts,
        hours_since_last=history.hours_since_last,
        has_timestamps=history.has_timestamps,
        max_cache_age=age.astype(jnp.float32),
    )


def payload_sizes(catalogue: Catalogue, history_length: int) -> PayloadSizes:
    """Bytes of what travels, from the shapes of what there is. Records of resident items stay where they are.

    A candidate counts as resident as often as a training event's item is, which is less than it is: models find popular items first.
    """
    scored, elsewhere = 4 + 4, 1.0 - np.asarray(catalogue.residents.share)  # item index and score
    return PayloadSizes(
        history_events=float(history_length),
        embedding_bytes=4.0 * catalogue.vectors.shape[1],
        evidence_bytes=np.asarray(scored + elsewhere * record_bytes(catalogue)),
        scored_item_bytes=np.asarray(scored + elsewhere * catalogue.evidence.log_popularity.dtype.itemsize),
    )


def record_bytes(catalogue: Catalogue) -> int:
    """Bytes of the record of one item."""
    return sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(catalogue.evidence))


def resident_item_bytes(catalogue: Catalogue) -> float:
    """Bytes of what a device holds of one resident item: its record, and its item vector in 8 bits with a scale."""
    return record_bytes(catalogue) + catalogue.residents.vectors.shape[1] + 4.0


def realised_costs(world: PlanningWorld, context: Context, realisation: Realisation) -> PlanCosts:
    """Costs of every plan over the link as it turned out."""
    up_bytes, down_bytes = plan_bytes(context, world.sizes, world.space)
    transfer = TransferTimes(
        uplink_ms=uplink_ms(up_bytes, realisation),
        downlink_ms=downlink_ms(down_bytes, realisation),
        queue_ms=realisation.queue_ms,
    )
    return world.costs(context, transfer)


def requests_of(
    world: PlanningWorld, context: Context, event_ids: Int[Array, "b"], draw: Array | int, links: LinkConfig
) -> Requests:
    """Mask and predicted costs of the contexts, and the realised ones under draw ``draw`` of the links."""
    realisation = realise(context, event_ids, draw, world.profile.queue_ms, links)
    return Requests(
        context=context,
        mask=allowed(context, world.space),
        predicted=world.costs(context),
        realised=realised_costs(world, context, realisation),
        failed=realisation.failed,
    )


def draw_requests(
    world: PlanningWorld,
    history: HistoryBatch,
    tables: ItemTables,
    draw: Array | int,
    *,
    max_cache_age: int,
    contexts: ContextConfig,
    links: LinkConfig,
) -> Requests:
    """Draw ``draw`` of context distribution v1 for the target events of ``history``; the same for every system compared."""
    facts = facts_of(history, tables, max_cache_age)
    context = sample_contexts(facts, history.event_ids, world.scales, draw, contexts)
    return requests_of(world, context, history.event_ids, draw, links)


def redraw_requests(
    world: PlanningWorld,
    drawn: Context,
    event_ids: Int[Array, "b"],
    draw: Array | int,
    *,
    contexts: ContextConfig,
    links: LinkConfig,
) -> Requests:
    """Another draw of the same events, with the user, the cache and the consent of the context that was ``drawn`` before.

    Outcomes depend on the cache alone, so that one pass over the models serves several contexts.
    """
    kept = {field.name: getattr(drawn, field.name) for field in fields(UserFacts) if field.name != "max_cache_age"}
    facts = UserFacts(**kept, max_cache_age=jnp.zeros_like(drawn.history_length))  # the cache is kept anyway
    again = sample_contexts(facts, event_ids, world.scales, draw, contexts)
    context = replace(again, cache_level=drawn.cache_level, cache_age_events=drawn.cache_age_events, consent=drawn.consent)
    return requests_of(world, context, event_ids, draw, links)
