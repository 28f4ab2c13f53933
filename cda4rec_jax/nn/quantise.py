"""Symmetric int8 rows: the form in which item vectors cross the link and live on a device."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8


def quantise_rows(x: Float[Array, "... d"]) -> tuple[Int8[Array, "... d"], Float[Array, "..."]]:
    """``(q, scale)`` with ``x`` within half a step of ``q * scale`` and ``scale = max|x| / 127`` of each row."""
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-12) / 127.0
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def dequantise_rows(q: Int8[Array, "... d"], scale: Float[Array, "..."]) -> Float[Array, "... d"]:
    """Inverse of ``quantise_rows``, up to rounding."""
    return q.astype(jnp.float32) * scale[..., None]
