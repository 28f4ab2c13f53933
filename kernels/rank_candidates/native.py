"""The C++ custom calls, of float32 on a CPU, and the form in which they read the weights."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int8

from cda4rec_jax.array_typing import Array
from cda4rec_jax.kernels.native_build import provide
from cda4rec_jax.kernels.rank_candidates.reference import ROTARY_BASE
from cda4rec_jax.kernels.rank_candidates.weights import KeyValueCache, RankerWeights, cache_size, padded

_EXTEND, _SCORE, _REQUEST = (f"cda4rec_jax_{name}" for name in ("extend_history", "score_candidates", "rank_request"))


def extend_history_native(
    weights: RankerWeights, cache: KeyValueCache, tokens: Float[Array, "t e"], num_tokens: int | Int[Array, ""]
) -> tuple[Float[Array, "e"], KeyValueCache]:
    """As ``api.extend_history``, of float32 on a CPU. ``native_problem`` must have returned None."""
    results = [jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in (cache.keys, cache.values, weights.final_norm)]
    # The caches are written where they are; XLA copies them first where the caller keeps them.
    call = jax.ffi.ffi_call(_EXTEND, results, vmap_method="sequential", input_output_aliases={1: 0, 2: 1})
    with jax.ensure_compile_time_eval():  # weights that a jitted function closes over are packed once
        packed = _packed_decoder(weights)
    keys, values, state = call(
        packed,
        cache.keys,
        cache.values,
        cache.length,
        tokens,
        num_tokens,
        heads=np.int64(weights.num_heads),
        head_size=np.int64(weights.head_size),
        mlp_hidden=np.int64(weights.mlp_hidden),
        window=np.int64(weights.window),
    )
    return state, KeyValueCache(keys=keys, values=values, length=cache.length + num_tokens)


def score_candidates_native(
    weights: RankerWeights,
    state: Float[Array, "e"],
    vectors: Int8[Array, "c e"],
    vector_scales: Float[Array, "c"],
    features: Float[Array, "c f"],
) -> Float[Array, "c"]:
    """As ``api.score_candidates``, of float32 on a CPU. ``native_problem`` must have returned None."""
    result = jax.ShapeDtypeStruct(vector_scales.shape, jnp.float32)
    call = jax.ffi.ffi_call(_SCORE, result, vmap_method="sequential")
    with jax.ensure_compile_time_eval():
        head = _packed_head(weights)
    return call(*head, state, vectors, vector_scales, features, score_feature=np.int64(weights.score_feature))


def rank_request_native(
    weights: RankerWeights,
    cache: Float[Array, "cache"] | None,
    request: Float[Array, "request"],
    num_tokens: int,
    num_candidates: int,
) -> tuple[Float[Array, "c"], Float[Array, "cache"]]:
    """The whole of one request that ``serving`` has packed, and the cache with its tokens, written in the place of ``cache``."""
    with jax.ensure_compile_time_eval():
        packed, head = _packed_decoder(weights), _packed_head(weights)
    results = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (cache_size(weights), num_candidates)]
    call = jax.ffi.ffi_call(_REQUEST, results, input_output_aliases={} if cache is None else {4: 0})
    sizes = {
        "layers": weights.num_layers,
        "width": weights.width,
        "heads": weights.num_heads,
        "kv_heads": weights.num_kv_heads,
        "head_size": weights.head_size,
        "mlp_hidden": weights.mlp_hidden,
        "window": weights.window,
        "score_feature": weights.score_feature,
        "num_tokens": num_tokens,
        "candidates": num_candidates,
    }
    given = jnp.zeros(0) if cache is None else cache
    cache, scores = call(packed, *head, given, request, **{name: np.int64(size) for name, size in sizes.items()})
    return scores, cache


@functools.cache
def native_problem() -> str | None:
    """Makes the custom calls available; None, or what stands in the way. See ``native_build.provide``."""
    targets = {_EXTEND: "ExtendHistory", _SCORE: "ScoreCandidates", _REQUEST: "RankRequest"}
    return provide(Path(__file__).with_name("native.cc"), targets)


def _packed_decoder(weights: RankerWeights) -> Float[Array, "packed"]:
    """One array, in the order in which it is read; scales of norms and of logits are multiplied into what follows them.

    Heads, hidden units and outputs are padded with zeros to whole vectors. Cosines and sines of all positions come last.
    """
    heads, kv_heads, size, layers = weights.num_heads, weights.num_kv_heads, weights.head_size, weights.num_layers
    scales = jnp.concatenate([jnp.full(heads, size**-0.5), jnp.ones(2 * kv_heads)])
    qkv = (weights.attention_norm[:, :, None] * weights.qkv).reshape(layers, weights.width, -1, size) * scales[
        None, None, :, None
    ]
    out = weights.out.reshape(layers, heads, size, -1)
    gate_up = (weights.mlp_norm[:, :, None] * weights.gate_up).reshape(layers, weights.width, 2, -1)
    whole = [_padded(qkv, 3), _padded(_padded(out, 2), 3), _padded(gate_up, 3), _padded(weights.down, 2)]
    by_layer = jnp.concatenate([each.reshape(layers, -1) for each in whole], axis=1)
    frequencies = ROTARY_BASE ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(weights.window, dtype=jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([by_layer.ravel(), weights.final_norm, jnp.cos(angles).ravel(), jnp.sin(angles).ravel()])


def _packed_head(weights: RankerWeights) -> tuple[Float[Array, "packed"], Int[Array, "f"], Int[Array, "r"]]:
    """Its numbers in the order in which they are read, and the features that gate and moderate."""
    parts = [weights.score_scale[None], weights.linear, weights.mean, 1.0 / weights.deviation, weights.moderators.T.ravel()]
    numbers = jnp.concatenate([*parts, weights.bias, weights.out_units, weights.hidden.ravel()])
    return numbers, weights.gates.astype(jnp.int32), weights.moderating.astype(jnp.int32)


def _padded(x: Array, axis: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padded(x.shape[axis]) - x.shape[axis])
    return jnp.pad(x, widths)
