"""The terms of the joint loss, by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.training.losses import (
    catalogue_loss,
    fusion_loss,
    gbce_loss,
    in_batch_loss,
    planner_loss,
    quality_loss,
    sampled_softmax_loss,
)


def test_catalogue_loss_is_the_mean_over_positions_with_a_target():
    vectors = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    hidden = jnp.asarray([[[2.0, 0.0], [0.0, 3.0], [9.0, 9.0]]])
    targets = jnp.asarray([[1, 1, 0]])
    expected = (math.log(math.exp(2) + 1) - 2 + math.log(1 + math.exp(3)) - 0) / 2
    np.testing.assert_allclose(catalogue_loss(hidden, vectors, targets, 128), expected, rtol=1e-5)


def test_catalogue_loss_without_targets_is_zero():
    assert float(catalogue_loss(jnp.ones((1, 2, 2)), jnp.ones((3, 2)), jnp.zeros((1, 2), int), 128)) == 0.0


def make_tokens(tokens: int = 6, num_rows: int = 9, width: int = 4, seed: int = 0):
    """Hidden states, item vectors, targets (one of them padding) and weights (one of them 0)."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(1, num_rows, tokens)
    targets[1] = 0
    weights = rng.uniform(0.5, 2.0, tokens)
    weights[3] = 0.0
    arrays = rng.normal(size=(tokens, width)), rng.normal(size=(num_rows, width)), targets, weights
    return tuple(jnp.asarray(array, jnp.int32 if array.dtype.kind == "i" else jnp.float32) for array in arrays)


def weighted_mean(losses: Any, targets: Any, weights: Any) -> float:
    weights = np.where(np.asarray(targets) > 0, np.asarray(weights), 0.0)
    return float(np.sum(weights * np.asarray(losses)) / np.sum(weights))


def test_label_smoothing_is_cross_entropy_with_a_mixed_label():
    hidden, vectors, targets, _ = make_tokens()
    logits = jnp.log(jax.nn.softmax(hidden @ vectors[1:].T))
    labels = 0.8 * jax.nn.one_hot(targets - 1, 8) + 0.2 / 8
    expected = weighted_mean(-jnp.sum(labels * logits, axis=1), targets, jnp.ones(6))
    np.testing.assert_allclose(catalogue_loss(hidden[None], vectors, targets[None], 128, 0.2), expected, rtol=1e-5)


def test_label_smoothing_gives_padding_no_gradient():
    hidden, vectors, targets, _ = make_tokens()
    gradient = jax.grad(lambda v: catalogue_loss(hidden[None], v, targets[None], 128, 0.2))(vectors)
    assert not np.any(gradient[0]) and np.all(np.any(gradient[1:], axis=1))


def test_sampled_softmax_corrects_each_negative_by_its_expected_draws_and_skips_hits():
    hidden, vectors, targets, _ = make_tokens()
    rng = np.random.default_rng(1)
    negatives = np.append(rng.integers(0, 9, 4), targets[2])  # an accidental hit
    log_q = rng.normal(size=9).astype(np.float32)[negatives] - 2
    losses = []
    for token in range(6):
        scores = np.asarray(vectors @ hidden[token])
        normaliser = math.exp(scores[targets[token]])
        for item, item_log_q in zip(negatives, log_q, strict=True):
            if item not in (0, targets[token]):
                normaliser += math.exp(scores[item]) / (5 * math.exp(item_log_q))
        losses.append(math.log(normaliser) - scores[targets[token]])
    actual = sampled_softmax_loss(hidden[None], vectors, targets[None], jnp.asarray(negatives), jnp.asarray(log_q), 128)
    np.testing.assert_allclose(actual, weighted_mean(losses, targets, jnp.ones(6)), rtol=1e-5)


def test_gradient_of_smoothed_sampled_softmax_is_that_of_full_cross_entropy_on_average():
    """Negatives are drawn in proportion to 1 / rank; without the correction the gradient is off by a third."""
    hidden, vectors, targets, _ = make_tokens(tokens=20, num_rows=31, width=4)
    shares = 1 / np.arange(1, 31)
    log_q = jnp.log(jnp.asarray(np.concatenate([[1.0], shares / shares.sum()]), jnp.float32))

    def gradient(key, corrected):
        negatives = jax.random.categorical(key, log_q[1:], shape=(512,)) + 1
        q = log_q[negatives] if corrected else jnp.full((512,), -math.log(30.0))
        return jax.grad(lambda h, v: sampled_softmax_loss(h[None], v, targets[None], negatives, q, 128, 0.1), (0, 1))(
            hidden, vectors
        )

    keys = jax.random.split(jax.random.key(0), 100)
    means = [
        jax.tree.map(
            lambda leaf: jnp.mean(leaf, axis=0),
            jax.jit(lambda keys, on=on: jax.lax.map(lambda key: gradient(key, on), keys))(keys),
        )
        for on in (True, False)
    ]
    full = jax.grad(lambda h, v: catalogue_loss(h[None], v, targets[None], 128, 0.1), (0, 1))(hidden, vectors)
    corrected, plain = (
        max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(mean, full, strict=True)) for mean in means
    )
    assert corrected < 0.05
    assert plain > 0.3


def test_in_batch_loss_counts_every_other_target_once_by_its_probability_to_be_there():
    hidden, vectors, _, _ = make_tokens()
    targets = jnp.asarray([3, 0, 5, 0, 3, 2])  # four draws
    q = np.array([0.3, 0.9, 0.2, 0.1, 0.3, 0.05])
    inclusion = {int(item): 1 - (1 - share) ** 4 for item, share in zip(targets, q, strict=True)}
    losses = []
    for token in range(6):
        scores = np.asarray(vectors @ hidden[token])
        others = {3, 5, 2} - {int(targets[token])}
        normaliser = math.exp(scores[targets[token]]) + sum(math.exp(scores[item]) / inclusion[item] for item in others)
        losses.append(math.log(normaliser) - scores[targets[token]])
    log_q = jnp.asarray(np.log(q), jnp.float32)
    actual = in_batch_loss(hidden.reshape(2, 3, 4), vectors, targets.reshape(2, 3), log_q.reshape(2, 3), 128)
    np.testing.assert_allclose(actual, weighted_mean(losses, targets, jnp.ones(6)), rtol=1e-4)


def test_a_batch_of_one_item_has_no_negative():
    hidden, vectors, _, _ = make_tokens()
    value, gradient = jax.value_and_grad(lambda h: in_batch_loss(h, vectors, jnp.full((1, 6), 2), jnp.zeros((1, 6)), 128))(
        hidden[None]
    )
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("shared", (True, False), ids=("shared", "per token"))
def test_gbce_raises_the_positive_probability_to_beta(shared):
    hidden, vectors, targets, weights = make_tokens()
    negatives = np.random.default_rng(2).integers(1, 9, (6, 4))
    if shared:
        negatives = negatives[0]
    alpha = 4 / 7
    beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
    losses = []
    for token in range(6):
        probabilities = 1 / (1 + np.exp(-np.asarray(vectors @ hidden[token], np.float64)))
        loss = -beta * math.log(probabilities[targets[token]])
        for item in negatives if shared else negatives[token]:
            loss -= math.log(1 - probabilities[item]) if item != targets[token] else 0.0
        losses.append(loss / 5)
    actual = gbce_loss(hidden, vectors, targets, weights, jnp.asarray(negatives), 0.75)
    np.testing.assert_allclose(actual, weighted_mean(losses, targets, weights), rtol=1e-5)


def test_gbce_without_calibration_is_binary_cross_entropy():
    hidden, vectors, targets, weights = make_tokens()
    negatives = jnp.asarray([1, 2, 3])
    scores = hidden @ vectors.T
    positive = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    terms = jnp.where(negatives[None] != targets[:, None], jax.nn.softplus(scores[:, 1:4]), 0.0)
    expected = weighted_mean((jax.nn.softplus(-positive) + jnp.sum(terms, axis=1)) / 4, targets, weights)
    np.testing.assert_allclose(gbce_loss(hidden, vectors, targets, weights, negatives, 0.0), expected, rtol=1e-5)


def test_gbce_refuses_a_calibration_outside_0_to_1():
    hidden, vectors, targets, weights = make_tokens()
    with pytest.raises(UserError, match=r"calibration 1\.5"):
        gbce_loss(hidden, vectors, targets, weights, jnp.asarray([1]), 1.5)


def test_gbce_without_weights_is_zero_and_gives_padding_no_gradient():
    hidden, vectors, targets, weights = make_tokens()

    def loss(h, v, w):
        return gbce_loss(h, v, targets, w, jnp.asarray([1, 2, 0]), 0.5)

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(hidden, vectors, 0 * weights)))
    d_hidden, d_vectors = jax.grad(loss, (0, 1))(hidden, vectors, weights)
    assert not np.any(d_vectors[0]) and np.any(d_vectors)
    assert not np.any(d_hidden[1]) and not np.any(d_hidden[3])


CROSS_ENTROPIES = {
    "full": lambda h, v, t, **o: catalogue_loss(h, v, t, 128, 0.2, **o),
    "sampled": lambda h, v, t, **o: sampled_softmax_loss(h, v, t, jnp.asarray([1, 2, 0]), jnp.full(3, -2.0), 128, 0.2, **o),
    "in batch": lambda h, v, t, **o: in_batch_loss(h, v, t, jnp.full(t.shape, -2.0), 128, 0.2, **o),
}


@pytest.mark.parametrize("loss", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
def test_without_targets_a_loss_and_its_gradients_are_zero(loss):
    hidden, vectors, targets, _ = make_tokens()
    result = jax.value_and_grad(lambda h, v: loss(h, v, 0 * targets[None]), (0, 1))(hidden[None], vectors)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("loss", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
def test_padding_gets_no_gradient_and_smoothing_reaches_every_item(loss):
    hidden, vectors, targets, _ = make_tokens()
    d_hidden, d_vectors = jax.grad(lambda h, v: loss(h, v, targets[None], num_items=7), (0, 1))(hidden[None], vectors)
    assert not np.any(d_vectors[0]) and not np.any(d_vectors[8]) and np.all(np.any(d_vectors[1:8], axis=1))
    assert not np.any(d_hidden[0, 1]) and np.all(np.isfinite(d_hidden))


@pytest.mark.parametrize("loss", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
def test_a_part_of_a_batch_is_divided_by_the_targets_of_the_whole(loss):
    hidden, vectors, targets, _ = make_tokens()
    inputs = (hidden[None], vectors, targets[None])
    np.testing.assert_allclose(loss(*inputs, num_targets=jnp.asarray(50.0)), loss(*inputs) * 5 / 50, rtol=1e-6)


def test_fusion_loss_weighs_plans_by_practice_and_skips_misses():
    losses = jnp.asarray([[1.0, 3.0], [5.0, 7.0]])
    present = jnp.asarray([[True, True], [False, True]])
    probabilities = jnp.asarray([[0.0, 1.0], [1.0, 0.0]])
    # rho = half of 1/2, half of pi: [.25, .75] and [.75, .25]; the second user's first plan missed.
    expected = (0.25 * 1 + 0.75 * 3 + 0.25 * 7) / (0.25 + 0.75 + 0.25)
    np.testing.assert_allclose(fusion_loss(losses, present, probabilities, jnp.asarray(0.5)), expected, rtol=1e-6)


def test_fusion_loss_sends_no_gradient_to_the_policy():
    gradient = jax.grad(lambda pi: fusion_loss(jnp.asarray([[1.0, 3.0]]), jnp.ones((1, 2), bool), pi, jnp.asarray(0.5)))
    np.testing.assert_array_equal(gradient(jnp.asarray([[0.3, 0.7]])), jnp.zeros((1, 2)))


def test_fusion_loss_without_any_hit_is_zero():
    assert float(fusion_loss(jnp.ones((2, 3)), jnp.zeros((2, 3), bool), jnp.full((2, 3), 1 / 3), jnp.asarray(0.5))) == 0.0


def test_planner_loss_is_minus_utility_in_units_of_the_gap():
    probabilities, utilities = jnp.asarray([[0.5, 0.5]]), jnp.asarray([[0.2, 0.4]])
    loss = planner_loss(probabilities, utilities, jnp.ones((1, 2), bool), jnp.asarray(0.1))
    np.testing.assert_allclose(loss, -0.3 / 0.1, rtol=1e-6)


def test_planner_loss_prefers_the_better_plan():
    def loss(logits):
        return planner_loss(jax.nn.softmax(logits), jnp.asarray([[0.0, 1.0]]), jnp.ones((1, 2), bool), jnp.asarray(1.0))

    gradient = jax.grad(loss)(jnp.zeros((1, 2)))
    assert float(gradient[0, 0]) > 0 > float(gradient[0, 1])


def test_quality_loss_counts_allowed_plans_only():
    predicted, quality = jnp.asarray([[0.3, 9.0]]), jnp.asarray([[0.1, 0.0]])
    loss = quality_loss(predicted, quality, jnp.asarray([[True, False]]), jnp.asarray(0.1))
    np.testing.assert_allclose(loss, 4.0, rtol=1e-5)
