"""What the sequence baselines share: their data, their sizes, the loss over the whole catalogue, and scores of the next item.

A packed row holds whole segments of users' histories. A begin token, the same for every user, predicts the first item of a segment,
and each item the next one. Baselines know ids only: no profile, no attributes, no item text.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.agents.cloud import CloudAgent, CloudConfig
from cda4rec_jax.array_typing import Array, ItemVectors, Lengths
from cda4rec_jax.baselines.fit import FitConfig
from cda4rec_jax.data.packing import PackingConfig
from cda4rec_jax.messages import EgressLevel, HistoryBatch, SequenceBatch
from cda4rec_jax.nn import DecoderConfig, ItemTable, ItemTableConfig, last_hidden
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.subtasks import abstract_sequences, release
from cda4rec_jax.training.losses import catalogue_loss

LOSS_CHUNK = 128  # tokens whose logits over the whole catalogue exist at a time


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Sizes that every sequence model has, and how it is trained."""

    width: int = 64  # of item vectors
    num_layers: int = 2
    history_length: int = 50  # items that the model reads
    row_tokens: int = 64  # at least history_length + 1
    dropout_rate: float = 0.4
    id_scale: float = 0.16  # entries of the item vectors at the start, in units of width**-0.5
    fit: FitConfig = field(default_factory=FitConfig)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(SequenceConfig):
    """A sequence model of attention blocks."""

    num_heads: int = 2
    mlp_hidden: int = 64

    @property
    def decoder(self) -> DecoderConfig:
        """The blocks, in the words of ``nn``."""
        return DecoderConfig(
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            mlp_hidden=self.mlp_hidden,
            dropout_rate=self.dropout_rate,
        )


@runtime_checkable
class NextItemModel(Protocol):
    """A causal model over packed rows; the cloud agent is one."""

    items: ItemTable

    def __call__(self, batch: SequenceBatch, item_vectors: ItemVectors, key: PRNGKeyArray | None = None) -> Float[Array, "r t d"]:
        """Hidden states, in the space of the item vectors; dropout is on where there is a ``key``."""
        ...


def without_profiles(corpus: Corpus, *, text: bool = False) -> Corpus:
    """The corpus without categories and attributes, and without item text unless ``text``."""
    ids = np.zeros((corpus.interactions.num_items + 1, 1), np.float32)
    return Corpus(interactions=corpus.interactions, text=corpus.text if text else ids, ids_only=True)


def packing(config: SequenceConfig) -> PackingConfig:
    """Whole histories, and prefixes that say nothing."""
    return PackingConfig(
        history_length=config.history_length,
        row_tokens=config.row_tokens,
        recent_share=0.0,
        profile_targets=0.0,
        profile_events=0,
    )


def item_table(num_items: int, config: SequenceConfig, *, rngs: nnx.Rngs) -> ItemTable:
    """Item vectors of ids alone."""
    table = ItemTableConfig(id_scale=config.id_scale, text_dropout_rate=0.0)
    return ItemTable(table, jnp.zeros((num_items + 1, 1)), config.width, rngs=rngs)


def decoder_model(corpus: Corpus, config: TransformerConfig, *, text_scale: float = 0.0) -> CloudAgent:
    """The cloud agent at one level and without a profile, which is SASRec's decoder; a ``text_scale`` above 0 reads item text.

    Its blocks start as the identity: with item vectors as small as ``id_scale`` makes them, noise of untrained blocks would drown them.
    """
    corpus = without_profiles(corpus, text=text_scale > 0)
    table = ItemTableConfig(id_scale=config.id_scale, text_scale=text_scale, text_dropout_rate=0.1 if text_scale > 0 else 0.0)
    cloud = CloudConfig(decoder=config.decoder, item_table=table, history_length=config.history_length)
    return CloudAgent(cloud, jnp.asarray(corpus.text), corpus.prefix_size, rngs=nnx.Rngs(config.fit.seed))


def embed_tokens(batch: SequenceBatch, item_vectors: ItemVectors, begin: Float[Array, "d"]) -> Float[Array, "r t d"]:
    """Input of a model: ``sqrt(d) e_i`` at items, ``begin`` at the first token of a segment."""
    tokens = jnp.take(item_vectors, batch.item_indices, axis=0) * item_vectors.shape[1] ** 0.5
    return jnp.where((batch.prefix_rows > 0)[..., None], begin[None, None, :], tokens)


def full_cross_entropy(model: NextItemModel, batch: SequenceBatch, key: PRNGKeyArray) -> Float[Array, ""]:
    """Mean cross-entropy of the next item over the whole catalogue."""
    text_key, key = jax.random.split(key)
    vectors = model.items.vectors(text_key)
    return catalogue_loss(model(batch, vectors, key), vectors, batch.targets, LOSS_CHUNK)


def history_sequences(history: HistoryBatch, num_items: int, history_length: int) -> tuple[SequenceBatch, Lengths]:
    """Histories as rows of a begin token and items, and the number of real tokens of each row."""
    num_users = len(history.items)
    anonymous = replace(history, attributes=jnp.zeros((num_users, 0)))
    abstract = release(
        anonymous,
        jnp.zeros((num_items + 1, 0)),
        jnp.full((num_users,), EgressLevel.FULL.value, jnp.int32),
        jnp.zeros((num_users,), jnp.int32),
        max_items=history_length,
        history_length=history_length,
        profile_events=0,
    )
    return abstract_sequences(abstract)


def next_item_scores(model: NextItemModel, history: HistoryBatch, *, history_length: int) -> Float[Array, "b i"]:
    """``hidden . e_i`` for every item, after the last event of each history."""
    vectors = model.items.vectors()
    sequences, num_tokens = history_sequences(history, vectors.shape[0] - 1, history_length)
    return last_hidden(model(sequences, vectors), num_tokens) @ vectors.T
