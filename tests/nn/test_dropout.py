"""Dropout: how many elements stay, that they are not alike, and what is left of the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.nn import dropout

SHAPE = (64, 64, 32)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_the_share_that_stays_is_one_minus_the_rate_and_the_mean_is_kept(rate: float):
    dropped = np.asarray(dropout(jnp.ones(SHAPE), rate, jax.random.key(0)))
    stays = dropped > 0
    sigma = (rate * (1 - rate) / stays.size) ** 0.5
    assert stays.mean() == pytest.approx(1 - rate, abs=4 * sigma)
    np.testing.assert_allclose(dropped[stays], 1 / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize("kind", ["threefry2x32", "unsafe_rbg"])
def test_elements_and_keys_are_uncorrelated(kind: str):
    masks = [np.asarray(dropout(jnp.ones(SHAPE), 0.5, jax.random.key(seed, impl=kind))) > 0 for seed in range(2)]
    signs = [2.0 * mask - 1.0 for mask in masks]
    bound = 5 / masks[0].size ** 0.5
    assert abs((signs[0] * signs[1]).mean()) < bound  # two keys
    for axis in range(3):
        for distance in (1, 2, 16):
            assert abs((signs[0] * np.roll(signs[0], distance, axis)).mean()) < bound


def test_the_same_key_drops_the_same_elements_and_no_key_drops_nothing():
    x = jnp.ones((5, 7))
    np.testing.assert_array_equal(dropout(x, 0.5, jax.random.key(3)), dropout(x, 0.5, jax.random.key(3)))
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(3)), x)
