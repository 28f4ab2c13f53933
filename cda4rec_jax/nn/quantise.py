"""Bytes: the form in which item vectors and weights of evidence cross the link and live on a device."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int8, UInt8


def quantise_rows(x: Float[Array, "... d"]) -> tuple[Int8[Array, "... d"], Float[Array, "..."]]:
    """``(q, scale)`` with ``x`` within half a step of ``q * scale`` and ``scale = max|x| / 127`` of each row."""
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-12) / 127.0
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def dequantise_rows(q: Int8[Array, "... d"], scale: Float[Array, "..."]) -> Float[Array, "... d"]:
    """Inverse of ``quantise_rows``, up to rounding."""
    return q.astype(jnp.float32) * scale[..., None]


def quantise_weights(weights: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """``max(1, round(255 sqrt(weight)))`` for a weight in (0, 1], 0 for none; larger weights are cut to 1.

    The scale is the same for every row and data set, so bytes of different rows compare and nothing is lost on the wire; the square
    root spends the bytes on the small weights, where nearly all pairs of items lie.
    """
    rounded = np.round(255 * np.sqrt(np.clip(weights, 0, 1)))
    return np.where(weights > 0, np.maximum(rounded, 1), 0).astype(np.uint8)


def dequantise_weights(weights: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Weights in [0, 1] of bytes: ``(byte / 255)^2``, off by at most 1/255 (at weight 1); 0 stays 0."""
    return jnp.square(weights.astype(jnp.float32) / 255)
