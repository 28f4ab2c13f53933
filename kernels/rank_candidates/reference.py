"""The specification: a full pass of all tokens and no cache, never optimised."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int8

from cda4rec_jax.array_typing import Array
from cda4rec_jax.kernels.rank_candidates.weights import RankerWeights

EPSILON, ROTARY_BASE, LARGEST = 1e-6, 10_000.0, 8.0


def user_state_reference(weights: RankerWeights, tokens: Float[Array, "t e"]) -> Float[Array, "e"]:
    """Hidden state of the last of ``t`` tokens: causal pre-norm blocks of attention with rotary positions and of SwiGLU, then a norm."""
    length = tokens.shape[0]
    heads, kv_heads, size = weights.num_heads, weights.num_kv_heads, weights.head_size
    angles = jnp.arange(length)[:, None] / ROTARY_BASE ** (jnp.arange(0, size, 2)[None, :] / size)
    x = tokens
    for layer in range(weights.num_layers):
        qkv = _normed(x, weights.attention_norm[layer]) @ weights.qkv[layer]
        query, key, value = jnp.split(qkv.reshape(length, -1, size), [heads, heads + kv_heads], axis=1)
        query, key = _rotated(query, angles), _rotated(key, angles)
        key, value = (jnp.repeat(each, heads // kv_heads, axis=1) for each in (key, value))
        logits = jnp.einsum("tnh,snh->nts", query, key) * size**-0.5
        logits = jnp.where(jnp.tril(jnp.ones((length, length), bool))[None], logits, -jnp.inf)
        mixed = jnp.einsum("nts,snh->tnh", jax.nn.softmax(logits, axis=-1), value)
        x = x + mixed.reshape(length, -1) @ weights.out[layer]
        gate, up = jnp.split(_normed(x, weights.mlp_norm[layer]) @ weights.gate_up[layer], 2, axis=1)
        x = x + (jax.nn.silu(gate) * up) @ weights.down[layer]
    return _normed(x, weights.final_norm)[-1]


def score_candidates_reference(
    weights: RankerWeights,
    state: Float[Array, "e"],
    vectors: Int8[Array, "c e"],
    vector_scales: Float[Array, "c"],
    features: Float[Array, "c f"],
) -> Float[Array, "c"]:
    """``x . linear + x[moderating] M x + silu(x W + bias) . out_units`` for each candidate, where x are its standardised features.

    One of the features is ``score_scale (s . v_c - s . v_0)``, with the state s and the candidates' vectors v, the first candidate's
    among them. ``x_j = clip((feature_j - mean_j) / deviation_j, -8, 8) feature_gates(j)``: what a feature that says "absent" gates is 0.
    """
    products = (vectors * vector_scales[:, None]) @ state
    differences = weights.score_scale * (products - products[:1])
    features = features.at[:, weights.score_feature].set(differences)
    gates = jnp.concatenate([features, jnp.ones_like(features[:, :1])], axis=1)[:, weights.gates]
    standard = jnp.clip((features - weights.mean[None]) / weights.deviation[None], -LARGEST, LARGEST) * gates
    moderated = jnp.einsum("cr,rf,cf->c", standard[:, weights.moderating], weights.moderators, standard)
    hidden = jax.nn.silu(standard @ weights.hidden + weights.bias[None])
    return standard @ weights.linear + moderated + hidden @ weights.out_units


def _normed(x: Float[Array, "t e"], scale: Float[Array, "e"]) -> Float[Array, "t e"]:
    return x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + EPSILON) * scale[None]


def _rotated(x: Float[Array, "t n h"], angles: Float[Array, "t half"]) -> Float[Array, "t n h"]:
    """Channel pair (j, j + h/2) of each head turned by its angle."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
