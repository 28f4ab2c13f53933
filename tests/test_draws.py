"""Draws through inverse distribution functions."""

import jax.numpy as jnp
import numpy as np
from scipy.stats import lognorm

from cda4rec_jax.draws import log_normal


def test_quantiles_are_those_of_scipy():
    tail = np.geomspace(1e-6, 0.5, 200)
    uniform = np.float32(np.round(np.concatenate([tail, 1.0 - tail]) * 2**23) / 2**23)
    np.testing.assert_allclose(log_normal(jnp.asarray(uniform), 0.35), lognorm.ppf(np.float64(uniform), 0.35), rtol=1e-4)


def test_the_smallest_and_the_largest_draw_give_finite_numbers():
    assert np.all(np.isfinite(log_normal(jnp.asarray([0.0, np.nextafter(np.float32(1), np.float32(0))]), 0.35)))
