"""BERT4Rec (Sun et al., arXiv 1904.06690): a bidirectional model that restores masked items; the next item is one more mask at the end.

Its blocks are those of the other models (RMSNorm, rotary positions, SwiGLU). Dropout of attention weights, which the others go without,
and the loss over the whole catalogue are as published.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, PRNGKeyArray

from cda4rec_jax.array_typing import Array, ItemVectors, PackedInts
from cda4rec_jax.baselines.fit import SequenceRecommender, fit_sequences
from cda4rec_jax.baselines.protocol import Watch, unwatched
from cda4rec_jax.baselines.sequences import (
    LOSS_CHUNK,
    TransformerConfig,
    history_sequences,
    item_table,
    packing,
    without_profiles,
)
from cda4rec_jax.messages import HistoryBatch, SequenceBatch
from cda4rec_jax.nn import dropout, last_hidden
from cda4rec_jax.nn.mlp import SwiGLU
from cda4rec_jax.nn.norm import RMSNorm
from cda4rec_jax.nn.rotary import Turns, rotary_turns, rotate
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.training.losses import catalogue_loss


@dataclass(frozen=True, kw_only=True)
class BERT4RecConfig(TransformerConfig):
    """What is masked."""

    mask_share: float = 0.2  # of the items; the paper takes .2 on ML-1M and .6 on Beauty
    last_item_share: float = 0.1  # of the segments, in which only the last item is masked, as in a request


class BidirectionalBlock(nnx.Module):
    """A pre-norm block whose attention reads before and after a token; it starts as the identity."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.num_heads, self.dropout_rate = config.num_heads, config.dropout_rate
        self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.qkv = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width, 3 * width)))
        self.out = nnx.Param(jnp.zeros((width, width)))
        self.mlp = SwiGLU(width, config.mlp_hidden, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "r t d"],
        readable: Bool[Array, "r t u"],
        turns: Turns,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "r t d"]:
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        qkv = (self.attention_norm(x) @ self.qkv[...]).reshape(*x.shape[:2], 3 * self.num_heads, -1)
        query, key_vectors, values = jnp.split(qkv, 3, axis=2)
        query, key_vectors = rotate(query, turns) * query.shape[-1] ** -0.5, rotate(key_vectors, turns)
        logits = jnp.einsum("rtnh,runh->rntu", query, key_vectors)
        # A finite mask keeps the softmax of a padding token (which reads nothing) free of NaN.
        weights = jax.nn.softmax(jnp.where(readable[:, None], logits, -1e9), axis=-1)
        weights = dropout(weights, self.dropout_rate, keys[0])
        mixed = jnp.einsum("rntu,runh->rtnh", weights, values).reshape(x.shape)
        x = x + dropout(mixed @ self.out[...], self.dropout_rate, keys[1])
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate, keys[2])


class BERT4Rec(nnx.Module):
    """Blocks in which a token reads all tokens of its segment, before and after it."""

    def __init__(self, num_items: int, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.items = item_table(num_items, config, rngs=rngs)
        self.mask = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (config.width,)))
        self.blocks = nnx.List([BidirectionalBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.width)
        self.head_size, self.dropout_rate = config.width // config.num_heads, config.dropout_rate

    def __call__(
        self,
        items: PackedInts,
        masked: Bool[Array, "r t"],
        segment_ids: PackedInts,
        positions: PackedInts,
        item_vectors: ItemVectors,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "r t d"]:
        """Hidden states of all tokens; what ``items`` holds at a masked token is never read. Dropout is on where there is a ``key``."""
        keys = [None] * (len(self.blocks) + 1) if key is None else list(jax.random.split(key, len(self.blocks) + 1))
        tokens = jnp.take(item_vectors, jnp.where(masked, 0, items), axis=0) * item_vectors.shape[1] ** 0.5
        x = jnp.where(masked[..., None], self.mask[...][None, None, :], tokens)
        x = dropout(x, self.dropout_rate, keys[0])
        readable = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]
        turns = rotary_turns(positions, self.head_size)
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x = block(x, readable, turns, block_key)
        return self.final_norm(x)


def draw_masks(key: PRNGKeyArray, segment_ids: PackedInts, *, mask_share: float, last_item_share: float) -> Bool[Array, "r t"]:
    """Which tokens are masked: each with ``mask_share``, but in ``last_item_share`` of the segments the last one alone."""
    token_key, segment_key = jax.random.split(key)
    rows, tokens = segment_ids.shape
    is_last = segment_ids != jnp.pad(segment_ids, ((0, 0), (0, 1)))[:, 1:]
    # A row has at most as many segments as tokens, and segment 0 is padding.
    last_alone = jax.random.uniform(segment_key, (rows, tokens + 1)) < last_item_share
    last_alone = jnp.take_along_axis(last_alone, segment_ids, axis=1)
    drawn = jax.random.uniform(token_key, segment_ids.shape) < mask_share
    return jnp.where(last_alone, is_last, drawn) & (segment_ids > 0)


def masked_item_loss(
    model: BERT4Rec, batch: SequenceBatch, key: PRNGKeyArray, *, mask_share: float, last_item_share: float
) -> Float[Array, ""]:
    """Mean cross-entropy of the masked items over the whole catalogue.

    The targets of a packed segment are all its items, from the first on, and so they are the sequence here.
    """
    mask_key, key = jax.random.split(key)
    masked = draw_masks(mask_key, batch.segment_ids, mask_share=mask_share, last_item_share=last_item_share)
    vectors = model.items.vectors()
    hidden = model(batch.targets, masked, batch.segment_ids, batch.positions, vectors, key)
    wanted = jnp.where(masked, batch.targets, 0).reshape(-1)
    # Logits over the catalogue cost most of a step, so tokens without a mask get none; the room left is more than is ever masked.
    room = min(wanted.size, round(wanted.size * (1.2 * mask_share + last_item_share)) + 8)
    chosen = jnp.argsort(wanted == 0, stable=True)[:room]
    return catalogue_loss(hidden.reshape(-1, hidden.shape[-1])[chosen][None], vectors, wanted[chosen][None], LOSS_CHUNK)


def masked_end_scores(model: BERT4Rec, history: HistoryBatch, *, history_length: int) -> Float[Array, "b i"]:
    """``hidden . e_i`` for every item at a mask after the last event of each history."""
    vectors = model.items.vectors()
    rows, num_tokens = history_sequences(history, vectors.shape[0] - 1, history_length)
    # The rows begin with a token that is no item: without it there is room for the mask at the end.
    items = jnp.roll(rows.item_indices, -1, axis=1)
    is_end = rows.positions == num_tokens[:, None] - 1
    return last_hidden(model(items, is_end, rows.segment_ids, rows.positions, vectors), num_tokens) @ vectors.T


def fit_bert4rec(corpus: Corpus, config: BERT4RecConfig = BERT4RecConfig(), watch: Watch = unwatched) -> SequenceRecommender:
    """Train BERT4Rec on ids."""
    model = BERT4Rec(corpus.interactions.num_items, config, rngs=nnx.Rngs(config.fit.seed))
    loss = partial(masked_item_loss, mask_share=config.mask_share, last_item_share=config.last_item_share)
    score = partial(masked_end_scores, history_length=config.history_length)
    return fit_sequences(without_profiles(corpus), model, loss, score, packing(config), config.fit, watch)
