"""The terms of the joint loss, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.training.losses import catalogue_loss, fusion_loss, planner_loss, quality_loss


def test_catalogue_loss_is_the_mean_over_positions_with_a_target():
    vectors = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    hidden = jnp.asarray([[[2.0, 0.0], [0.0, 3.0], [9.0, 9.0]]])
    targets = jnp.asarray([[1, 1, 0]])
    expected = (math.log(math.exp(2) + 1) - 2 + math.log(1 + math.exp(3)) - 0) / 2
    np.testing.assert_allclose(catalogue_loss(hidden, vectors, targets, 128), expected, rtol=1e-5)


def test_catalogue_loss_without_targets_is_zero():
    assert float(catalogue_loss(jnp.ones((1, 2, 2)), jnp.ones((3, 2)), jnp.zeros((1, 2), int), 128)) == 0.0


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


def test_planner_loss_is_minus_utility_in_units_of_the_gap_minus_entropy():
    probabilities, utilities = jnp.asarray([[0.5, 0.5]]), jnp.asarray([[0.2, 0.4]])
    expected = -(0.3 / 0.1 + 0.02 * math.log(2))
    np.testing.assert_allclose(planner_loss(probabilities, utilities, jnp.asarray(0.1), jnp.asarray(0.02)), expected, rtol=1e-6)


def test_planner_loss_prefers_the_better_plan():
    def loss(logits):
        return planner_loss(jax.nn.softmax(logits), jnp.asarray([[0.0, 1.0]]), jnp.asarray(1.0), jnp.asarray(0.0))

    gradient = jax.grad(loss)(jnp.zeros((1, 2)))
    assert float(gradient[0, 0]) > 0 > float(gradient[0, 1])


def test_quality_loss_counts_allowed_plans_only():
    predicted, quality = jnp.asarray([[0.3, 9.0]]), jnp.asarray([[0.1, 0.0]])
    loss = quality_loss(predicted, quality, jnp.asarray([[True, False]]), jnp.asarray(0.1))
    np.testing.assert_allclose(loss, 4.0, rtol=1e-5)
