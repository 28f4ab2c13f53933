"""Dropout that costs little on a CPU."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.kernels.segment_attention.dropout import keep_places


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Zero each element with probability ``rate`` and scale the others by ``1 / (1 - rate)``; the identity where ``key`` is None.

    Two random words are drawn from the key, and each element's place is hashed under them: a hundredth of the time that a random
    number for each element takes.
    """
    if key is None or rate == 0.0:
        return x
    seeds = jax.random.bits(key, (2,), jnp.uint32)
    places = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
    return jnp.where(keep_places(seeds, places, rate), x / (1.0 - rate), 0.0)
