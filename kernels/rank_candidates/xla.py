"""The operation in plain JAX: runs everywhere, and is what other implementations fall short of or gain over."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Int8

from cda4rec_jax.array_typing import Array
from cda4rec_jax.kernels.rank_candidates.reference import EPSILON, LARGEST, ROTARY_BASE
from cda4rec_jax.kernels.rank_candidates.weights import KeyValueCache, RankerWeights


def extend_history_xla(
    weights: RankerWeights, cache: KeyValueCache, tokens: Float[Array, "t e"], num_tokens: int | Int[Array, ""]
) -> tuple[Float[Array, "e"], KeyValueCache]:
    """As ``api.extend_history``: the last layer computes its last token alone."""
    heads, kv_heads, size = weights.num_heads, weights.num_kv_heads, weights.head_size
    places, x = cache.keys.shape[-1], tokens
    positions = cache.length + jnp.arange(tokens.shape[0])
    came = jnp.arange(places) - cache.length  # which of the new tokens is at a place, if any
    fresh = (came >= 0) & (came < num_tokens)
    came = jnp.clip(came, 0, tokens.shape[0] - 1)
    all_keys, all_values = [], []
    for layer in range(weights.num_layers):
        normed = _normed(x, weights.attention_norm[layer])
        width = heads * size
        key, value = jnp.split((normed @ weights.qkv[layer][:, width:]).reshape(-1, 2 * kv_heads, size), 2, axis=1)
        key = _rotated(key, positions)
        keys = jnp.where(fresh[None, None, :], key.transpose(1, 2, 0)[:, :, came], cache.keys[layer])
        value = jnp.pad(value, ((0, 0), (0, 0), (0, cache.values.shape[-1] - size)))
        values = jnp.where(fresh[None, :, None], value.transpose(1, 0, 2)[:, came], cache.values[layer])
        all_keys.append(keys)
        all_values.append(values)
        if layer == weights.num_layers - 1:
            x, normed, positions = (jax.lax.dynamic_slice_in_dim(each, num_tokens - 1, 1) for each in (x, normed, positions))
        query = _rotated((normed @ weights.qkv[layer][:, :width]).reshape(-1, heads, size), positions) * size**-0.5
        query = query.reshape(query.shape[0], kv_heads, -1, size)
        visible = jnp.arange(places)[None, :] <= positions[:, None]
        logits = jnp.where(visible[None, None], jnp.einsum("tgrh,ghp->grtp", query, keys), -jnp.inf)
        # A weight of 0 times what an empty place holds must be 0.
        known = jnp.where((jnp.arange(places) < cache.length + num_tokens)[None, :, None], values[..., :size], 0.0)
        mixed = jnp.einsum("grtp,gph->tgrh", jax.nn.softmax(logits, axis=-1), known)
        x = x + mixed.reshape(mixed.shape[0], -1) @ weights.out[layer]
        gate, up = jnp.split(_normed(x, weights.mlp_norm[layer]) @ weights.gate_up[layer], 2, axis=1)
        x = x + (jax.nn.silu(gate) * up) @ weights.down[layer]
    length = cache.length + num_tokens
    fits = (num_tokens >= 1) & (num_tokens <= tokens.shape[0]) & (length <= weights.window)
    state = jnp.where(fits, _normed(x, weights.final_norm)[0], jnp.nan)
    return state, KeyValueCache(keys=jnp.stack(all_keys), values=jnp.stack(all_values), length=length)


def score_candidates_xla(
    weights: RankerWeights,
    state: Float[Array, "e"],
    vectors: Int8[Array, "c e"],
    vector_scales: Float[Array, "c"],
    features: Float[Array, "c f"],
) -> Float[Array, "c"]:
    """As ``api.score_candidates``."""
    products = (vectors.astype(state.dtype) @ state) * vector_scales
    differences = weights.score_scale * (products - products[:1])
    own = jnp.arange(features.shape[1]) == weights.score_feature
    features = jnp.where(own[None], differences[:, None], features)
    gates = jnp.concatenate([features, jnp.ones_like(features[:, :1])], axis=1)[:, weights.gates]
    standard = jnp.clip((features - weights.mean[None]) / weights.deviation[None], -LARGEST, LARGEST) * gates
    moderated = jnp.sum(standard[:, weights.moderating] * (standard @ weights.moderators.T), axis=1)
    hidden = jax.nn.silu(standard @ weights.hidden + weights.bias[None])
    return standard @ weights.linear + moderated + hidden @ weights.out_units


def _normed(x: Float[Array, "t e"], scale: Float[Array, "e"]) -> Float[Array, "t e"]:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON) * scale[None]


def _rotated(x: Float[Array, "t n h"], positions: Int[Array, "t"]) -> Float[Array, "t n h"]:
    frequencies = ROTARY_BASE ** (-jnp.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
    angles = positions[:, None].astype(x.dtype) * frequencies[None]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
