"""Causal grouped-query attention over packed rows."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from cda4rec_jax.kernels.segment_attention import segment_attention
from cda4rec_jax.nn.linear import linear
from cda4rec_jax.nn.rotary import Turns, rotate


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) with rotary positions."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, dropout_rate: float, *, rngs: nnx.Rngs):
        head_size = width // num_heads
        init = nnx.initializers.normal(width**-0.5)
        self.num_heads, self.num_kv_heads, self.head_size, self.dropout_rate = num_heads, num_kv_heads, head_size, dropout_rate
        self.qkv = nnx.Param(init(rngs.params(), (width, (num_heads + 2 * num_kv_heads) * head_size)))
        # Zero, so that an untrained block is the identity: noise as large as the item embeddings would drown them (LOG).
        self.out = nnx.Param(jnp.zeros((num_heads * head_size, width)))

    def __call__(
        self,
        x: Float[Array, "r t d"],
        segment_ids: Int[Array, "r t"],
        turns: Turns,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "r t d"]:
        rows, length, _ = x.shape
        qkv = linear(x, self.qkv[...]).reshape(rows, length, -1, self.head_size)
        query, keys, values = jnp.split(qkv, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        query, keys = rotate(query, turns) * self.head_size**-0.5, rotate(keys, turns)
        mixed = segment_attention(query, keys, values, segment_ids, dropout_rate=self.dropout_rate, dropout_key=key)
        return linear(mixed.reshape(rows, length, -1), self.out[...])
