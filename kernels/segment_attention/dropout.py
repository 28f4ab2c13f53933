"""Which attention weights are dropped: part of the specification, so that every implementation drops the same ones."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, PRNGKeyArray, UInt32


def dropout_seeds(key: PRNGKeyArray, rows: int, heads: int) -> UInt32[Array, "r n two"]:
    """Two random words for each row and head."""
    return jax.random.bits(key, (rows, heads, 2), jnp.uint32)


def keep_weights(
    seeds: UInt32[Array, "*seeds two"], query_positions: Int[Array, "*queries"], key_positions: Int[Array, "*keys"], rate: float
) -> Bool[Array, "*weights"]:
    """True with probability ``1 - rate``, as a pure function of the seeds and of a weight's place in its row; shapes broadcast.

    So a block can be drawn alone, the backward pass draws it again instead of keeping it, and padding a row changes nothing. Places
    (query position, key position) repeat from position 65,536 on.
    """
    places = (query_positions.astype(jnp.uint32) << 16) | key_positions.astype(jnp.uint32)
    return keep_places(seeds, places, rate)


def keep_places(seeds: UInt32[Array, "*seeds two"], places: UInt32[Array, "*places"], rate: float) -> Bool[Array, "*kept"]:
    """True with probability ``1 - rate``: places are hashed under two random words by two multiply-xorshift rounds.

    The constants are those of Wellons' lowbias32. On a CPU this takes a hundredth of the time of ``jax.random.bits``.
    """
    bits = places ^ seeds[..., 0]
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) ^ seeds[..., 1]
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits >= jnp.uint32(round(rate * 2**32))
