"""Rotary position embedding (Su et al., arXiv 2104.09864)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def rotary_angles(positions: Int[Array, "r t"], head_size: int, base: float = 10_000.0) -> Float[Array, "r t half"]:
    """Angle of each pair of channels: ``position / base^(2 j / head_size)``."""
    frequencies = base ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    return positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]


def rotate(x: Float[Array, "r t n h"], angles: Float[Array, "r t half"]) -> Float[Array, "r t n h"]:
    """Turn channel pair (j, j + h/2) of each head by its angle; products are in the dtype of the angles, the result in that of x."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
