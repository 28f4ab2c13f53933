"""The specification: all weights at once, never optimised."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32

from cda4rec_jax.kernels.segment_attention.dropout import keep_weights


def segment_attention_reference(
    query: Float[Array, "r t n h"],
    key: Float[Array, "r t m h"],
    value: Float[Array, "r t m h"],
    segment_ids: Int[Array, "r t"],
    bias: Float[Array, "n t"] | None,
    seeds: UInt32[Array, "r n two"] | None,
    kind: Literal["softmax", "silu"],
    rate: float,
) -> Float[Array, "r t n h"]:
    """``out_t = sum_{u that t reads} w_tu v_u``, with the weights of the docstring of ``segment_attention``."""
    positions = jnp.arange(query.shape[1])
    groups = query.shape[2] // key.shape[2]
    keys, values = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    logits = jnp.einsum("rtnh,runh->rntu", query, keys)
    distances = positions[:, None] - positions[None, :]
    if bias is not None:
        logits = logits + bias[None, :, jnp.maximum(distances, 0)]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    reads = (same & (segment_ids > 0)[:, :, None] & (distances >= 0)[None])[:, None]
    if kind == "softmax":
        # The softmax of nothing is 0 / 0, in the gradient too: a finite filler gives a padding token weights, which are then removed.
        weights = jax.nn.softmax(jnp.where(reads, logits, jnp.finfo(logits.dtype).min), axis=-1)
    else:
        weights = jax.nn.silu(logits) / jnp.maximum(jnp.sum(reads, axis=-1, keepdims=True), 1)
    weights = jnp.where(reads, weights, 0.0)
    if seeds is not None:
        keep = keep_weights(seeds[:, :, None, None], positions[None, None, :, None], positions[None, None, None, :], rate)
        weights = jnp.where(keep, weights / (1.0 - rate), 0.0)
    return jnp.einsum("rntu,runh->rtnh", weights, values)
