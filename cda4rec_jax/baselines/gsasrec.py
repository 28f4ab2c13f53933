"""gSASRec (Petrov and Macdonald, arXiv 2308.07192): SASRec with many negatives and generalised binary cross-entropy."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.array_typing import Array
from cda4rec_jax.baselines.fit import SequenceRecommender, fit_sequences
from cda4rec_jax.baselines.protocol import Watch, unwatched
from cda4rec_jax.baselines.sequences import TransformerConfig, decoder_model, next_item_scores, packing, without_profiles
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.training.losses import gbce_loss


@dataclass(frozen=True, kw_only=True)
class GSASRecConfig(TransformerConfig):
    """The two numbers of the paper, beside the sizes of SASRec."""

    num_negatives: int = 256  # k
    calibration: float = 0.75  # t


def fit_gsasrec(corpus: Corpus, config: GSASRecConfig = GSASRecConfig(), watch: Watch = unwatched) -> SequenceRecommender:
    """Train gSASRec on ids."""
    loss = partial(many_negatives_loss, num_negatives=config.num_negatives, calibration=config.calibration)
    score = partial(next_item_scores, history_length=config.history_length)
    model = decoder_model(corpus, config)
    return fit_sequences(without_profiles(corpus), model, loss, score, packing(config), config.fit, watch)


def many_negatives_loss(
    model: CloudAgent, batch: SequenceBatch, key: PRNGKeyArray, *, num_negatives: int, calibration: float
) -> Float[Array, ""]:
    """Generalised binary cross-entropy of the next item against uniformly drawn items, mean over tokens.

    The tokens of one row share their negatives, which makes scores a matrix product; each token's negatives are as uniform as the
    paper's, and so the expected gradient is the same.
    """
    sample_key, key = jax.random.split(key)
    vectors = model.items.vectors()
    hidden = model(batch, vectors, key)
    negatives = jax.random.randint(sample_key, (len(batch.targets), num_negatives), 1, vectors.shape[0])
    weights = (batch.targets > 0).astype(jnp.float32)
    row_means = jax.vmap(gbce_loss, (0, None, 0, 0, 0, None))(hidden, vectors, batch.targets, weights, negatives, calibration)
    counts = jnp.sum(weights, axis=1)
    return jnp.sum(counts * row_means) / jnp.maximum(jnp.sum(counts), 1.0)
