"""SASRec as published (Kang and McAuley, arXiv 1808.09781): binary cross-entropy with one negative for each positive.

The blocks are those of the cloud agent (RMSNorm, rotary positions, SwiGLU), so that only the loss differs from preset ``sasrec``.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.array_typing import Array
from cda4rec_jax.baselines.fit import SequenceRecommender, fit_sequences
from cda4rec_jax.baselines.losses import binary_loss
from cda4rec_jax.baselines.protocol import Watch, unwatched
from cda4rec_jax.baselines.sequences import TransformerConfig, decoder_model, next_item_scores, packing, without_profiles
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.pipeline.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class SASRecBCEConfig(TransformerConfig):
    """The sizes of a transformer; the loss has nothing to set."""


def fit_sasrec_bce(corpus: Corpus, config: SASRecBCEConfig = SASRecBCEConfig(), watch: Watch = unwatched) -> SequenceRecommender:
    """Train SASRec with binary cross-entropy on ids."""
    score = partial(next_item_scores, history_length=config.history_length)
    model = decoder_model(corpus, config)
    return fit_sequences(without_profiles(corpus), model, one_negative_loss, score, packing(config), config.fit, watch)


def one_negative_loss(model: CloudAgent, batch: SequenceBatch, key: PRNGKeyArray) -> Float[Array, ""]:
    """Binary cross-entropy of the next item against one uniformly drawn item that is not of the same segment."""
    sample_key, key = jax.random.split(key)
    vectors = model.items.vectors()
    hidden = model(batch, vectors, key)
    negatives = jax.random.randint(sample_key, (*batch.targets.shape, 1), 1, vectors.shape[0])
    positive_scores = jnp.einsum("rtd,rtd->rt", hidden, vectors[batch.targets])
    negative_scores = jnp.einsum("rtd,rtkd->rtk", hidden, vectors[negatives])
    return binary_loss(positive_scores, negative_scores, jnp.asarray(batch.targets > 0), not_of_the_segment(negatives, batch))


def not_of_the_segment(negatives: Int[Array, "r t k"], batch: SequenceBatch) -> Bool[Array, "r t k"]:
    """Which negatives may stand.

    Drawing again, as the paper does, needs a loop; leaving such a negative out has the same expectation but for a factor.
    """
    same_segment = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    met = negatives[:, :, None, :] == batch.targets[:, None, :, None]
    return ~jnp.any(met & same_segment[..., None], axis=2)
