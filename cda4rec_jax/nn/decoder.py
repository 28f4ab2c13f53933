"""The decoder family of both agents: RMSNorm, rotary positions, grouped-query attention, SwiGLU; pre-norm residual blocks."""

from dataclasses import dataclass

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from cda4rec_jax.nn.attention import Attention
from cda4rec_jax.nn.dropout import dropout
from cda4rec_jax.nn.mlp import SwiGLU
from cda4rec_jax.nn.norm import RMSNorm
from cda4rec_jax.nn.rotary import Turns, rotary_turns


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Size of one decoder."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_hidden: int
    dropout_rate: float
    attention_dropout_rate: float = 0.0  # of attention weights; no dataset tried is clearly better with it (LOG)

    def __post_init__(self):
        if self.width % self.num_heads or self.num_heads % self.num_kv_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"width {self.width}, num_heads {self.num_heads}, num_kv_heads {self.num_kv_heads}: heads must divide the width, "
                "key-value heads must divide the heads, and a head must have an even size"
            )


class Block(nnx.Module):
    """One pre-norm residual block."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config.width, config.num_heads, config.num_kv_heads, config.attention_dropout_rate, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, config.mlp_hidden, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "r t d"],
        segment_ids: Int[Array, "r t"],
        turns: Turns,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "r t d"]:
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        x = x + dropout(self.attention(self.attention_norm(x), segment_ids, turns, keys[0]), self.dropout_rate, keys[1])
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate, keys[2])


class Decoder(nnx.Module):
    """A stack of blocks over packed rows."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.head_size = config.width // config.num_heads
        self.dropout_rate = config.dropout_rate
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.width)

    def __call__(
        self,
        x: Float[Array, "r t d"],
        segment_ids: Int[Array, "r t"],
        positions: Int[Array, "r t"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "r t d"]:
        """Hidden states; dropout is on where there is a ``key``."""
        keys = [None] * (len(self.blocks) + 1) if key is None else list(jax.random.split(key, len(self.blocks) + 1))
        turns = rotary_turns(positions, self.head_size)
        x = dropout(x, self.dropout_rate, keys[0])
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x = block(x, segment_ids, turns, block_key)
        return self.final_norm(x)
