"""Rotary position embedding (Su et al., arXiv 2104.09864)."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

Turns = tuple[Float[Array, "r t half"], Float[Array, "r t half"]]


def rotary_turns(positions: Int[Array, "r t"], head_size: int, base: float = 10_000.0) -> Turns:
    """Cosine and sine of the angle of each pair of channels, ``position / base^(2 j / head_size)``."""
    frequencies = base ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    # XLA on a CPU would fuse them into every product and make them again for each head and layer, one number at a time.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(x: Float[Array, "r t n h"], turns: Turns) -> Float[Array, "r t n h"]:
    """Turn channel pair (j, j + h/2) of each head by its angle; products are in the dtype of the turns, the result in that of x."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (part[:, :, None, :] for part in turns)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
