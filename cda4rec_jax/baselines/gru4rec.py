"""GRU4Rec (Hidasi et al., arXiv 1511.06939) with cross-entropy over the whole catalogue in place of its sampled losses."""

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
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.nn import dropout
from cda4rec_jax.pipeline.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class GRU4RecConfig(SequenceConfig):
    """Sizes of the recurrent layers."""

    num_layers: int = 1
    hidden: int = 128


class GRULayer(nnx.Module):
    """A gated recurrent unit (Cho et al., arXiv 1406.1078) whose state is 0 at the start of each segment."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_uniform()
        self.hidden = hidden
        self.inputs = nnx.Param(init(rngs.params(), (width, 3 * hidden)))
        self.recurrent = nnx.Param(jnp.concatenate([nnx.initializers.orthogonal()(rngs.params(), (hidden, hidden))] * 3, axis=1))
        self.bias = nnx.Param(jnp.zeros((3 * hidden,)))
        self.candidate_bias = nnx.Param(jnp.zeros((hidden,)))

    def __call__(self, x: Float[Array, "r t d"], positions: PackedInts) -> Float[Array, "r t g"]:
        """``h' = (1 - z) n + z h`` with ``n = tanh(x W_n + r (h U_n + c))`` and gates ``r, z = sigma(x W + h U + b)``."""
        inputs = x @ self.inputs[...] + self.bias[...][None, None, :]
        recurrent, candidate_bias = self.recurrent[...], self.candidate_bias[...][None, :]

        def step(state: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
            given, position = token
            state = jnp.where((position > 0)[:, None], state, 0.0)
            reset_in, update_in, candidate_in = jnp.split(given, 3, axis=1)
            reset_own, update_own, candidate_own = jnp.split(state @ recurrent, 3, axis=1)
            candidate = jnp.tanh(candidate_in + jax.nn.sigmoid(reset_in + reset_own) * (candidate_own + candidate_bias))
            update = jax.nn.sigmoid(update_in + update_own)
            state = (1.0 - update) * candidate + update * state
            return state, state

        start = jnp.zeros((x.shape[0], self.hidden))
        _, states = jax.lax.scan(step, start, (jnp.swapaxes(inputs, 0, 1), positions.T))
        return jnp.swapaxes(states, 0, 1)


class GRU4Rec(nnx.Module):
    """Recurrent layers, and a projection into the space of the item vectors, which are shared by input and output."""

    def __init__(self, num_items: int, config: GRU4RecConfig, *, rngs: nnx.Rngs):
        self.items = item_table(num_items, config, rngs=rngs)
        self.begin = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (config.width,)))
        widths = [config.width] + [config.hidden] * (config.num_layers - 1)
        self.layers = nnx.List([GRULayer(width, config.hidden, rngs=rngs) for width in widths])
        self.out = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), (config.hidden, config.width)))
        self.dropout_rate = config.dropout_rate

    def __call__(self, batch: SequenceBatch, item_vectors: ItemVectors, key: PRNGKeyArray | None = None) -> Float[Array, "r t d"]:
        """Hidden states of all tokens; dropout is on where there is a ``key``."""
        keys = [None] * (len(self.layers) + 1) if key is None else list(jax.random.split(key, len(self.layers) + 1))
        x = dropout(embed_tokens(batch, item_vectors, self.begin[...]), self.dropout_rate, keys[0])
        for layer, layer_key in zip(self.layers, keys[1:], strict=True):
            x = dropout(layer(x, batch.positions), self.dropout_rate, layer_key)
        return x @ self.out[...]


def fit_gru4rec(corpus: Corpus, config: GRU4RecConfig = GRU4RecConfig(), watch: Watch = unwatched) -> SequenceRecommender:
    """Train GRU4Rec on ids."""
    model = GRU4Rec(corpus.interactions.num_items, config, rngs=nnx.Rngs(config.fit.seed))
    score = partial(next_item_scores, history_length=config.history_length)
    return fit_sequences(without_profiles(corpus), model, full_cross_entropy, score, packing(config), config.fit, watch)
