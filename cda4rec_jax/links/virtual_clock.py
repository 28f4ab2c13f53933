"""What the link does to one request, as a pure function of a seed: no real clock is read."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array
from cda4rec_jax.draws import log_normal
from cda4rec_jax.links.profiles import MIN_RETRANSMIT_MS, PACKET_BYTES, LinkConfig
from cda4rec_jax.messages import MIN_KBPS, Context

TRACKED_PACKETS = 512  # packets of one transfer with a fate of their own (750 KB); later ones lose their expected share


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Realisation:
    """What ``b`` requests meet. No planner sees it. All plans of a request meet the same, packet by packet."""

    round_trip_ms: Float[Array, "b"]
    uplink_kbps: Float[Array, "b"]
    downlink_kbps: Float[Array, "b"]
    queue_ms: Float[Array, "b"]  # wait for the cloud model
    failed: Bool[Array, "b"]  # nothing comes back; always True offline
    uplink_losses: Float[Array, "b n"]  # entry j: packets lost among the first j
    downlink_losses: Float[Array, "b n"]
    loss_probability: Float[Array, "b"]


def realise(
    context: Context,
    event_ids: Int[Array, "b"],
    draw: Int[Array, ""] | int,
    mean_queue_ms: Float[Array, ""] | float,
    config: LinkConfig,
) -> Realisation:
    """Draws what each request meets; jittable, and a hash of (config.seed, event id, draw).

    round trip and bandwidths = estimate * LogNormal(0, spread); queue = Exponential(mean_queue_ms); a link believed up fails with
    its ``failure_probability``; each packet is lost with its ``loss_probability``.
    """

    def one(event_id: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), event_id), draw)
        return jax.random.uniform(key, (5 + 2 * TRACKED_PACKETS,))

    # One draw for everything, through inverse distribution functions: each random call of its own takes a second to compile.
    uniform = jax.vmap(one)(event_ids)
    factors = log_normal(uniform[:, :3], config.spread)
    queue, failure = -jnp.log1p(-uniform[:, 3]), uniform[:, 4]
    packets = uniform[:, 5:].reshape(-1, 2, TRACKED_PACKETS)
    loss_probability = jnp.asarray(config.loss_probability)[context.link]
    is_lost = (packets < loss_probability[:, None, None]).astype(jnp.float32)
    losses = jnp.pad(jnp.cumsum(is_lost, axis=2), ((0, 0), (0, 0), (1, 0)))
    return Realisation(
        round_trip_ms=context.round_trip_ms * factors[:, 0],
        uplink_kbps=context.uplink_kbps * factors[:, 1],
        downlink_kbps=context.downlink_kbps * factors[:, 2],
        queue_ms=mean_queue_ms * queue,
        failed=failure < jnp.asarray(config.failure_probability)[context.link],
        uplink_losses=losses[:, 0],
        downlink_losses=losses[:, 1],
        loss_probability=loss_probability,
    )


def as_estimated(context: Context, mean_queue_ms: Float[Array, ""] | float) -> Realisation:
    """What requests meet where every estimate comes true: nothing fails, no packet is lost, the queue takes its mean."""
    nothing = jnp.zeros_like(context.round_trip_ms)
    losses = jnp.zeros((*nothing.shape, TRACKED_PACKETS + 1))
    return Realisation(
        round_trip_ms=jnp.asarray(context.round_trip_ms),
        uplink_kbps=jnp.asarray(context.uplink_kbps),
        downlink_kbps=jnp.asarray(context.downlink_kbps),
        queue_ms=nothing + mean_queue_ms,
        failed=nothing > 0,
        uplink_losses=losses,
        downlink_losses=losses,
        loss_probability=nothing,
    )


def retransmit_ms(round_trip_ms: Float[Array, "b"]) -> Float[Array, "b"]:
    """What one lost packet costs: max(200 ms, 2 round trips)."""
    return jnp.maximum(MIN_RETRANSMIT_MS, 2.0 * round_trip_ms)


def _transfer_ms(
    payload_bytes: Float[Array, "b x"], round_trip_ms: Float[Array, "b"], kbps: Float[Array, "b"], lost: Float[Array, "b x"]
) -> Float[Array, "b x"]:
    travel_ms = 0.5 * round_trip_ms[:, None] + 8.0 * payload_bytes / jnp.maximum(kbps, MIN_KBPS)[:, None]
    return jnp.where(payload_bytes > 0, travel_ms + lost * retransmit_ms(round_trip_ms)[:, None], 0.0)


def _realised_ms(payload_bytes: Array, round_trip_ms: Array, kbps: Array, losses: Array, loss_probability: Array) -> Array:
    packets = jnp.ceil(payload_bytes / PACKET_BYTES)
    tracked = jnp.minimum(packets, TRACKED_PACKETS).astype(jnp.int32)
    lost = jnp.take_along_axis(losses, tracked, axis=1) + (packets - tracked) * loss_probability[:, None]
    return _transfer_ms(payload_bytes, round_trip_ms, kbps, lost)


def uplink_ms(payload_bytes: Float[Array, "b x"], realisation: Realisation) -> Float[Array, "b x"]:
    """Realised time up: half a round trip + 8 * bytes / kbps + lost packets * max(200 ms, 2 round trips); 0 for 0 bytes.

    A payload of n packets loses what the first n packets of the request lose, so more bytes never take less time. A lost packet
    is lost once.
    """
    return _realised_ms(
        payload_bytes,
        realisation.round_trip_ms,
        realisation.uplink_kbps,
        realisation.uplink_losses,
        realisation.loss_probability,
    )


def downlink_ms(payload_bytes: Float[Array, "b x"], realisation: Realisation) -> Float[Array, "b x"]:
    """Realised time down, like ``uplink_ms``."""
    return _realised_ms(
        payload_bytes,
        realisation.round_trip_ms,
        realisation.downlink_kbps,
        realisation.downlink_losses,
        realisation.loss_probability,
    )
