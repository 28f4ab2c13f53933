"""From a batch of sequences to hidden states, the same for both agents."""

import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.array_typing import Array, ItemVectors, Lengths
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.nn.decoder import Decoder


def embed_and_decode(
    decoder: Decoder,
    prefix_weights: Float[Array, "f d"],
    batch: SequenceBatch,
    item_vectors: ItemVectors,
    key: PRNGKeyArray | None,
) -> Float[Array, "r t d"]:
    """``embed`` and the decoder over the tokens."""
    return decoder(embed(prefix_weights, batch, item_vectors), batch.segment_ids, batch.positions, key)


def embed(prefix_weights: Float[Array, "f d"], batch: SequenceBatch, item_vectors: ItemVectors) -> Float[Array, "r t d"]:
    """Token embeddings: an item's vector, or the projected prefix, in the dtype of the weights."""
    scale = item_vectors.shape[1] ** 0.5  # vectors have entries of about width**-0.5; the residual stream wants about 1
    dtype = prefix_weights.dtype
    tokens = jnp.take(item_vectors, batch.item_indices, axis=0).astype(dtype) * scale
    prefixes = jnp.take(batch.prefixes.astype(dtype) @ prefix_weights, batch.prefix_rows, axis=0)
    return tokens + prefixes * (batch.prefix_rows > 0)[..., None]


def last_hidden(hidden: Float[Array, "b t d"], num_tokens: Lengths) -> Float[Array, "b d"]:
    """Hidden state of the last of ``num_tokens`` tokens in each row."""
    return jnp.take_along_axis(hidden, (num_tokens - 1)[:, None, None], axis=1)[:, 0]
