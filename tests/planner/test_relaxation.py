import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.planner import Objective, choice_weights, entropy, expected_utility, masked_softmax

LOGITS = jnp.asarray([[1.0, 2.0, 50.0, 0.0], [3.0, jnp.nan, -jnp.inf, 1.0]])
MASK = jnp.asarray([[True, True, False, False], [True, False, True, True]])


def test_masked_softmax_by_hand_is_exactly_0_where_forbidden():
    probabilities = np.asarray(masked_softmax(LOGITS, MASK))
    sigmoid = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(probabilities[0], [1 - sigmoid, sigmoid, 0, 0], rtol=1e-6)
    assert (probabilities[~np.asarray(MASK)] == 0.0).all() and probabilities[1, 2] == 0.0


def test_entropy_by_hand_with_zeros():
    probabilities = jnp.asarray([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(entropy(probabilities), [np.log(2), 0.0], rtol=1e-6)


@pytest.mark.parametrize("how", list(Objective))
def test_gradients_are_finite_and_reach_allowed_logits_alone(how):
    utilities = jnp.asarray([[1.0, 0.0, jnp.inf, jnp.nan], [0.0, 2.0, 0.5, 1.0]])

    def objective(logits, utilities):
        weights = choice_weights(logits, MASK, how, key=jax.random.key(0))
        return jnp.sum(expected_utility(weights, utilities, MASK) + entropy(masked_softmax(logits, MASK)))

    by_logits, by_utilities = jax.grad(objective, (0, 1))(LOGITS, utilities)
    assert np.isfinite(by_logits).all()
    assert (np.asarray(by_logits)[~np.asarray(MASK)] == 0).all() and np.asarray(by_logits)[0, 0] != 0
    assert (np.asarray(by_utilities) == 0).all()


def test_straight_through_samples_one_allowed_plan_with_the_frequency_of_its_probability():
    logits, mask = jnp.tile(LOGITS[:1], (4000, 1)), jnp.tile(MASK[:1], (4000, 1))
    weights = np.asarray(choice_weights(logits, mask, Objective.GUMBEL, key=jax.random.key(1)))
    assert (weights[:, 2:] == 0).all()
    np.testing.assert_allclose(weights.max(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(weights.mean(axis=0), masked_softmax(LOGITS, MASK)[0], atol=0.03)


def test_regression_sends_no_gradient_through_the_choice_and_sampling_the_exact_one_on_average():
    """The gradient of a straight-through choice compares the sampled plan with all others, so its mean points where the exact one does."""
    logits, mask, utilities = jnp.asarray([[0.0, 0.5, 1.0]]), jnp.ones((1, 3), bool), jnp.asarray([[3.0, 1.0, 2.0]])

    def gradient(objective, key):
        def gained(logits):
            return expected_utility(choice_weights(logits, mask, objective, key=key), utilities, mask)[0]

        return jax.grad(gained)(logits)[0]

    exact = gradient(Objective.EXACT, None)
    sampled = jax.vmap(lambda key: gradient(Objective.GUMBEL, key))(jax.random.split(jax.random.key(0), 2000)).mean(axis=0)
    assert not bool(gradient(Objective.REGRESSION, None).any())
    assert float(jnp.dot(exact, sampled) / (jnp.linalg.norm(exact) * jnp.linalg.norm(sampled))) > 0.99


def test_sampling_without_a_key_says_what_to_pass():
    with pytest.raises(ValueError, match="key"):
        choice_weights(LOGITS, MASK, Objective.GUMBEL)
