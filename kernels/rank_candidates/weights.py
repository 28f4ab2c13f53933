"""What the operation computes with: the weights of decoder and head as plain arrays, and the cache of a history."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from cda4rec_jax.array_typing import Array

LANES = 16  # places and channels of a cache are padded to a multiple, so that native code reads whole vectors


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RankerWeights:
    """A decoder of ``n`` layers over tokens of width ``e``, and a head of ``u`` hidden units over ``f`` features, ``r`` of which
    moderate what the others are worth.

    Attributes:
        attention_norm, mlp_norm, final_norm: scales of RMSNorm.
        qkv: queries of all heads, then keys, then values of the key-value heads.
        out, gate_up, down: other linear maps; gates come before what they let through.
        linear, moderators, hidden, bias, out_units, mean, deviation: of the head, see ``reference``.
        moderating: the features that moderate.
        gates: for each feature the feature that it is multiplied with after standardising, or ``f`` for none.
        score_scale: what a difference of inner products is multiplied with to be a feature; 0 leaves it out.
        num_heads, num_kv_heads: of attention.
        window: tokens of the longest history, its prefix included.
        score_feature: place of that feature.
    """

    attention_norm: Float[Array, "n e"]
    qkv: Float[Array, "n e q"]
    out: Float[Array, "n o e"]
    mlp_norm: Float[Array, "n e"]
    gate_up: Float[Array, "n e w"]
    down: Float[Array, "n m e"]
    final_norm: Float[Array, "e"]
    linear: Float[Array, "f"]
    moderators: Float[Array, "r f"]
    moderating: Int[Array, "r"]
    hidden: Float[Array, "f u"]
    bias: Float[Array, "u"]
    out_units: Float[Array, "u"]
    mean: Float[Array, "f"]
    deviation: Float[Array, "f"]
    gates: Int[Array, "f"]
    score_scale: Float[Array, ""]
    num_heads: int = field(metadata={"static": True})
    num_kv_heads: int = field(metadata={"static": True})
    window: int = field(metadata={"static": True})
    score_feature: int = field(metadata={"static": True})

    @property
    def num_layers(self) -> int:
        return self.qkv.shape[0]

    @property
    def width(self) -> int:
        return self.qkv.shape[1]

    @property
    def head_size(self) -> int:
        return self.out.shape[1] // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return self.down.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KeyValueCache:
    """Keys, turned by their positions, and values of the ``length`` tokens of a history read so far; anything in other places."""

    keys: Float[Array, "n heads h places"]
    values: Float[Array, "n heads places channels"]
    length: Int[Array, ""]


def empty_cache(weights: RankerWeights) -> KeyValueCache:
    """The cache of no token."""
    keys, values = (jnp.zeros(shape, weights.qkv.dtype) for shape in cache_shapes(weights))
    return KeyValueCache(keys=keys, values=values, length=jnp.zeros((), jnp.int32))


def cache_shapes(weights: RankerWeights) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of keys and values."""
    layers, heads, size, places = weights.num_layers, weights.num_kv_heads, weights.head_size, padded(weights.window)
    return (layers, heads, size, places), (layers, heads, places, padded(size))


def cache_size(weights: RankerWeights) -> int:
    """Numbers in keys and values of a cache."""
    return sum(map(math.prod, cache_shapes(weights)))


def padded(size: int) -> int:
    """The next multiple of ``LANES``."""
    return -(-size // LANES) * LANES
