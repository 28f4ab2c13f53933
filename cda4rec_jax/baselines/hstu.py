"""HSTU (Zhai et al., arXiv 2402.17152) on ids: pointwise SiLU attention with a bias for each distance, gated by a fourth projection.

Published with sampled softmax and timestamps. Here it has cross-entropy over the whole catalogue and no timestamps, so that it
differs from preset ``sasrec`` by its layers alone.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.array_typing import Array, ItemVectors, PackedInts
from cda4rec_jax.baselines.fit import SequenceRecommender, fit_sequences
from cda4rec_jax.baselines.protocol import Watch, unwatched
from cda4rec_jax.baselines.sequences import (
    SequenceConfig,
    embed_tokens,
    full_cross_entropy,
    item_table,
    next_item_scores,
    packing,
    without_profiles,
)
from cda4rec_jax.kernels.segment_attention import segment_attention
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.nn import dropout
from cda4rec_jax.nn.norm import RMSNorm
from cda4rec_jax.pipeline.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class HSTUConfig(SequenceConfig):
    """Sizes of the transducer."""

    num_layers: int = 4
    num_heads: int = 2

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide width {self.width}")


class TransductionUnit(nnx.Module):
    """One layer: ``U, V, Q, K = silu(norm(X) W)``, ``A = silu(Q K^T + bias[distance]) / n``, ``X + (norm(A V) * U) W_out``.

    The paper divides by the length of the longest sequence, this by the n tokens that a token reads; the norm takes either away.
    """

    def __init__(self, config: HSTUConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.num_heads, self.dropout_rate = config.num_heads, config.dropout_rate
        self.input_norm, self.mixed_norm = RMSNorm(width), RMSNorm(width)
        self.uvqk = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width, 4 * width)))
        self.distance_bias = nnx.Param(jnp.zeros((config.num_heads, config.history_length + 1)))
        self.out = nnx.Param(jnp.zeros((width, width)))  # an untrained layer is the identity, as a block of the decoder

    def __call__(self, x: Float[Array, "r t d"], segment_ids: PackedInts, key: PRNGKeyArray | None) -> Float[Array, "r t d"]:
        gate, *projected = jnp.split(jax.nn.silu(self.input_norm(x) @ self.uvqk[...]), 4, axis=-1)
        values, query, keys = (part.reshape(*part.shape[:2], self.num_heads, -1) for part in projected)
        # A row may be longer than any of its segments; distances beyond those never meet.
        bias = jnp.pad(self.distance_bias[...], ((0, 0), (0, x.shape[1])))[:, : x.shape[1]]
        mixed = segment_attention(query, keys, values, segment_ids, bias=bias, kind="silu").reshape(x.shape)
        return x + dropout(self.mixed_norm(mixed) * gate, self.dropout_rate, key) @ self.out[...]


class HSTU(nnx.Module):
    """A stack of transduction units over packed rows."""

    def __init__(self, num_items: int, config: HSTUConfig, *, rngs: nnx.Rngs):
        self.items = item_table(num_items, config, rngs=rngs)
        self.begin = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (config.width,)))
        self.units = nnx.List([TransductionUnit(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.width)
        self.dropout_rate = config.dropout_rate

    def __call__(self, batch: SequenceBatch, item_vectors: ItemVectors, key: PRNGKeyArray | None = None) -> Float[Array, "r t d"]:
        """Hidden states of all tokens; dropout is on where there is a ``key``."""
        keys = [None] * (len(self.units) + 1) if key is None else list(jax.random.split(key, len(self.units) + 1))
        x = dropout(embed_tokens(batch, item_vectors, self.begin[...]), self.dropout_rate, keys[0])
        for unit, unit_key in zip(self.units, keys[1:], strict=True):
            x = unit(x, batch.segment_ids, unit_key)
        return self.final_norm(x)


def fit_hstu(corpus: Corpus, config: HSTUConfig = HSTUConfig(), watch: Watch = unwatched) -> SequenceRecommender:
    """Train HSTU on ids."""
    model = HSTU(corpus.interactions.num_items, config, rngs=nnx.Rngs(config.fit.seed))
    score = partial(next_item_scores, history_length=config.history_length)
    return fit_sequences(without_profiles(corpus), model, full_cross_entropy, score, packing(config), config.fit, watch)
