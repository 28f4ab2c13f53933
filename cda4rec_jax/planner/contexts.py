"""Contexts: what is known before a request, the distribution (v1) that simulates it, and the features a policy reads.

What concerns the user (history, entropy, sessions) is computed from real data or absent. What concerns the situation (link,
device, consent, cache, prices) is simulated: a function of the event, the draw and the seed alone, so it is independent of the
user and the same for every system that is compared.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from cda4rec_jax.array_typing import Array, ContextFeatures, Histories, Lengths
from cda4rec_jax.draws import log_normal
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, Link
from cda4rec_jax.planner.utility import WeightScales

NUM_PRICES = 3  # of time, energy and exposure: at lambda = 1 they add up to dQ, and the best plan breaks even
MAX_RARE_COUNT = 5  # an item with this many train events or fewer is rare


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Context distribution, version 1. Fixed before training and never tuned to results.

    Links are in the order of ``Link``. Estimates of round trip and bandwidth are median * LogNormal(0, link_spread). Sources of
    the medians: round trips within the ranges of Grigorik, "High Performance Browser Networking", table 7-2; LTE bandwidth from
    Huang et al., MobiSys 2012 (medians 13 Mbit/s down, 6 up); 3G and EDGE bandwidth from WebPageTest's "3G Fast" and "2G/EDGE"
    connectivity profiles; WiFi set to a modest home line. Offline has no estimate: 0.

    Free memory is log-uniform between the tier's bounds: a third of the low-tier requests have no room for structured modelling.

    Shares count relative to their sum, and what has a share of 0 never occurs: a planner can be trained without a link or a tier.

    Raises:
      UserError: shares that are negative or not finite, all 0, or of another number than there are kinds.
    """

    seed: int = 0
    link_shares: tuple[float, ...] = (0.45, 0.35, 0.10, 0.03, 0.07)
    round_trip_ms: tuple[float, ...] = (15.0, 55.0, 150.0, 400.0, 0.0)
    uplink_kbps: tuple[float, ...] = (15_000.0, 6_000.0, 768.0, 200.0, 0.0)
    downlink_kbps: tuple[float, ...] = (40_000.0, 13_000.0, 1_600.0, 240.0, 0.0)
    link_spread: float = 0.35
    consent_shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)  # by EgressLevel
    tier_shares: tuple[float, ...] = (0.3, 0.4, 0.3)  # by DeviceTier
    free_memory_mb: tuple[tuple[float, float], ...] = ((96.0, 768.0), (192.0, 2048.0), (512.0, 8192.0))
    mean_cache_age_events: float = 3.0  # Geometric on 1, 2, ...
    max_log2_lambda: float = 3.0  # lambda_j is log-uniform on [1/8, 8]
    zero_weight_share: float = 0.1

    def __post_init__(self):
        for name, kinds in (("link_shares", Link), ("consent_shares", EgressLevel), ("tier_shares", DeviceTier)):
            shares = getattr(self, name)
            if len(shares) != len(kinds) or not all(0 <= share < math.inf for share in shares) or not any(shares):
                raise UserError(
                    f"{name} is {shares}: expected {len(kinds)} shares of at least 0, not all 0, in the order "
                    f"{', '.join(kind.name.lower() for kind in kinds)}"
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class UserFacts:
    """What the data says of each request's user, each [b]."""

    history_length: Float[Array, "b"]
    category_entropy: Float[Array, "b"]  # nats
    rare_share: Float[Array, "b"]
    session_count: Float[Array, "b"]  # 0 without timestamps
    hours_since_last: Float[Array, "b"]  # 0 without timestamps
    has_timestamps: Float[Array, "b"]
    max_cache_age: Float[Array, "b"]  # the oldest cache that can be replayed; a cache of age n was made n events ago


def user_facts(
    items: Histories,
    total_lengths: Lengths,
    item_categories: Float[Array, "i g"],
    train_counts: Int[Array, "i"],
    *,
    session_count: Float[Array, "b"],
    hours_since_last: Float[Array, "b"],
    has_timestamps: Float[Array, "b"],
    max_cache_age: Float[Array, "b"],
) -> UserFacts:
    """Facts of ``b`` histories (0 is padding); jittable.

    Entropy is that of the summed category vectors of the history, each item weighing 1 over its categories.
    """
    real = (items > 0).astype(jnp.float32)
    count = jnp.maximum(real.sum(axis=1), 1.0)
    categories = item_categories[items]
    per_item = categories / jnp.maximum(categories.sum(axis=2, keepdims=True), 1.0)
    mass = jnp.einsum("bl,blg->bg", real, per_item)
    shares = mass / jnp.maximum(mass.sum(axis=1, keepdims=True), 1e-9)
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), 0.0), axis=1)
    rare = (train_counts[items] <= MAX_RARE_COUNT).astype(jnp.float32)
    return UserFacts(
        history_length=total_lengths.astype(jnp.float32),
        category_entropy=entropy,
        rare_share=(rare * real).sum(axis=1) / count,
        session_count=session_count * has_timestamps,
        hours_since_last=hours_since_last * has_timestamps,
        has_timestamps=has_timestamps,
        max_cache_age=max_cache_age,
    )


def _choice(uniform: Array, shares: tuple[float, ...]) -> Array:
    """An index drawn with these shares of their sum; one of share 0 never comes."""
    reached = np.cumsum(shares)
    bounds = np.where(reached >= reached[-1], np.inf, reached / reached[-1])[:-1]
    return jnp.sum((uniform >= jnp.asarray(bounds, jnp.float32)).astype(jnp.int32))


def _situation(event_id: Array, draw: Array | int, config: ContextConfig) -> dict[str, Array]:
    """Simulated fields of one request: scalars, and ``lambdas`` [3]."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), event_id), draw)
    # One draw for everything, through inverse distribution functions: each random call of its own takes a second to compile.
    uniform = jax.random.uniform(key, (15,))
    spread = log_normal(uniform[6:9], config.link_spread)
    link = _choice(uniform[0], config.link_shares)
    consent = _choice(uniform[1], config.consent_shares)
    tier = _choice(uniform[2], config.tier_shares)
    low_mb, high_mb = jnp.asarray(config.free_memory_mb)[tier]
    level = jnp.where(consent > 0, 1 + jnp.floor(uniform[4] * consent).astype(jnp.int32), 0)
    stay = jnp.log1p(-1.0 / config.mean_cache_age_events)
    age = 1.0 + jnp.floor(jnp.log1p(-uniform[5]) / stay)
    log2_lambda = config.max_log2_lambda * (2.0 * uniform[9:12] - 1.0)
    is_zero = uniform[12:15] < config.zero_weight_share
    return {
        "link": link,
        "consent": consent,
        "tier": tier,
        "free_memory_mb": low_mb * (high_mb / low_mb) ** uniform[3],
        "round_trip_ms": jnp.asarray(config.round_trip_ms)[link] * spread[0],
        "uplink_kbps": jnp.asarray(config.uplink_kbps)[link] * spread[1],
        "downlink_kbps": jnp.asarray(config.downlink_kbps)[link] * spread[2],
        "cache_level": jnp.minimum(level, consent),
        "cache_age_events": age,
        "lambdas": jnp.where(is_zero, 0.0, 2.0**log2_lambda),
    }


def _context(facts: UserFacts, situation: dict[str, Array], scales: WeightScales) -> Context:
    situation = dict(situation)
    lambdas = situation.pop("lambdas")
    age = jnp.minimum(situation.pop("cache_age_events"), jnp.minimum(facts.history_length - 1.0, facts.max_cache_age))
    cache_level = jnp.where(age >= 1.0, situation.pop("cache_level"), int(EgressLevel.NOTHING))
    share = scales.quality_gap / NUM_PRICES
    return Context(
        history_length=facts.history_length,
        category_entropy=facts.category_entropy,
        rare_share=facts.rare_share,
        session_count=facts.session_count,
        hours_since_last=facts.hours_since_last,
        has_timestamps=facts.has_timestamps,
        cache_level=cache_level,
        cache_age_events=jnp.where(cache_level > 0, age, 0.0),
        utility_per_ms=lambdas[:, 0] * share / scales.latency_gap_ms,
        utility_per_mj=lambdas[:, 1] * share / scales.energy_gap_mj,
        utility_per_exposure=lambdas[:, 2] * share / scales.exposure_gap,
        **situation,
    )


def sample_contexts(
    facts: UserFacts, event_ids: Int[Array, "b"], weight_scales: WeightScales, draw: Int[Array, ""] | int, config: ContextConfig
) -> Context:
    """One context for each event; jittable, with ``draw`` traced or not.

    Args:
      facts: of the events' users.
      event_ids: a number of each event (up to 2^31) that does not depend on the system or on the batch.
      weight_scales: scales of the three weights.
      draw: which of an event's contexts (evaluation uses 0 to 7).
      config: the distribution.

    Every simulated field is a hash of (config.seed, event id, draw). A cache is at least one event old and at most
    min(history - 1, max_cache_age); where that leaves no age there is no cache. Its level is uniform on 1..consent, and without
    consent there is none.
    """
    return _context(facts, jax.vmap(lambda event_id: _situation(event_id, draw, config))(event_ids), weight_scales)


def typical_contexts(
    facts: UserFacts,
    weight_scales: WeightScales,
    *,
    link: Link = Link.WIFI,
    tier: DeviceTier = DeviceTier.MID,
    consent: EgressLevel = EgressLevel.FULL,
    cache_level: EgressLevel | None = None,
    config: ContextConfig,
) -> Context:
    """Declared instead of drawn: medians of the link, the middle of the tier's memory, a cache of mean age, every lambda 1.

    ``cache_level`` None means the consent's. Used for a single request whose situation the user names.
    """
    size = facts.history_length.shape[0]
    low_mb, high_mb = config.free_memory_mb[tier]
    level = consent if cache_level is None else cache_level
    values = {
        "free_memory_mb": (low_mb * high_mb) ** 0.5,
        "round_trip_ms": config.round_trip_ms[link],
        "uplink_kbps": config.uplink_kbps[link],
        "downlink_kbps": config.downlink_kbps[link],
        "cache_age_events": config.mean_cache_age_events,
    }
    kinds = {"link": link, "tier": tier, "consent": consent, "cache_level": level}
    situation: dict[str, Array] = {name: jnp.full((size,), value, jnp.float32) for name, value in values.items()}
    situation |= {name: jnp.full((size,), int(kind), jnp.int32) for name, kind in kinds.items()}
    return _context(facts, situation | {"lambdas": jnp.ones((size, 3))}, weight_scales)


def context_features(context: Context) -> ContextFeatures:
    """[b, 26] features of order 1: all of the context except its weights, on which no quality depends.

    Counts, times and rates enter as logs, enums as one-hots. The features of a cache that is not there are 0.
    """
    scaled = [
        jnp.log1p(context.history_length) / 5.0,
        jnp.log1p(context.cache_age_events) / 2.0,
        context.category_entropy / 3.0,
        context.rare_share,
        jnp.log1p(context.session_count) / 4.0,
        jnp.log1p(context.hours_since_last) / 6.0,
        context.has_timestamps,
        jnp.log1p(context.free_memory_mb) / 7.0,
        jnp.log1p(context.round_trip_ms) / 5.0,
        jnp.log1p(context.uplink_kbps) / 9.0,
        jnp.log1p(context.downlink_kbps) / 9.0,
    ]
    one_hots = [
        jax.nn.one_hot(context.cache_level, len(EgressLevel))[:, 1:],
        jax.nn.one_hot(context.tier, len(DeviceTier)),
        jax.nn.one_hot(context.link, len(Link)),
        jax.nn.one_hot(context.consent, len(EgressLevel)),
    ]
    return jnp.concatenate([jnp.stack(scaled, axis=1), *one_hots], axis=1)


NUM_CONTEXT_FEATURES = 26


def weight_features(context: Context, quality_scale: Float[Array, ""]) -> Float[Array, "b 3"]:
    """log(1 + price / quality_scale) of 100 ms, 100 mJ and full exposure: for policies that do not see costs."""
    prices = [100.0 * context.utility_per_ms, 100.0 * context.utility_per_mj, context.utility_per_exposure]
    return jnp.log1p(jnp.stack(prices, axis=1) / quality_scale)
