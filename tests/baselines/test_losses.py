"""Losses over sampled negatives, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.baselines import TransformerConfig
from cda4rec_jax.baselines.gsasrec import many_negatives_loss
from cda4rec_jax.baselines.losses import binary_loss
from cda4rec_jax.baselines.sasrec_bce import not_of_the_segment
from cda4rec_jax.baselines.sequences import decoder_model
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.training.losses import gbce_loss

POSITIVE = jnp.asarray([[2.0, 7.0]])
NEGATIVE = jnp.asarray([[[-1.0, 3.0], [7.0, 7.0]]])
REAL = jnp.asarray([[True, False]])


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def packed(corpus) -> tuple[CloudAgent, SequenceBatch]:
    """A model, and a row with two segments beside one with a single token."""
    model = decoder_model(corpus, TransformerConfig(width=8, num_layers=1, mlp_hidden=8, dropout_rate=0.0, id_scale=1.0))
    batch = SequenceBatch(
        item_indices=jnp.asarray([[0, 3, 0, 7, 3, 0], [0, 0, 0, 0, 0, 0]]),
        segment_ids=jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]]),
        positions=jnp.asarray([[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0]]),
        targets=jnp.asarray([[3, 5, 7, 3, 9, 0], [4, 0, 0, 0, 0, 0]]),
        prefix_rows=jnp.asarray([[1, 0, 2, 0, 0, 0], [3, 0, 0, 0, 0, 0]]),
        prefixes=jnp.zeros((4, model.prefix[...].shape[0])),
    )
    return model, batch


def test_binary_loss_counts_real_positions_and_allowed_negatives():
    allowed = jnp.asarray([[[True, False], [True, True]]])
    expected = -(math.log(sigma(2)) + math.log(1 - sigma(-1)))
    np.testing.assert_allclose(binary_loss(POSITIVE, NEGATIVE, REAL, allowed), expected, rtol=1e-6)


def test_binary_loss_without_a_real_position_is_zero():
    assert float(binary_loss(POSITIVE, NEGATIVE, jnp.zeros((1, 2), bool), jnp.ones((1, 2, 2), bool))) == 0.0


def test_binary_loss_stays_finite_at_huge_scores():
    huge, allowed = jnp.asarray([[-1e4, 0.0]]), jnp.ones((1, 2, 2), bool)
    value, gradient = jax.value_and_grad(lambda scores: binary_loss(scores, 1e4 * NEGATIVE, REAL, allowed))(huge)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_negative_of_the_same_segment_does_not_stand(corpus):
    negatives = jnp.asarray([[5, 7, 5, 9, 8, 2], [4, 4, 4, 4, 4, 4]])[..., None]
    found = not_of_the_segment(negatives, packed(corpus)[1])
    np.testing.assert_array_equal(found[0, :, 0], [False, True, True, False, True, True])
    assert not found[1, 0, 0]


def test_many_negatives_loss_is_a_mean_over_tokens_whose_row_shares_negatives(corpus):
    model, batch = packed(corpus)

    @jax.jit
    def losses(key):
        vectors = model.items.vectors()
        negatives = jax.random.randint(jax.random.split(key)[0], (2, 30), 1, len(vectors))
        hidden, targets = model(batch, vectors).reshape(12, -1), batch.targets.reshape(12)
        expected = gbce_loss(hidden, vectors, targets, jnp.ones((12,)), jnp.repeat(negatives, 6, axis=0), 0.5)
        return many_negatives_loss(model, batch, key, num_negatives=30, calibration=0.5), expected

    np.testing.assert_allclose(*losses(jax.random.key(0)), rtol=1e-5)
