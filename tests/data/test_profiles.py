"""Profiles: by hand, and the same in NumPy and JAX."""

import jax.numpy as jnp
import numpy as np

from cda4rec_jax.data.profiles import length_bucket, prefix_features, prefix_size, quantise_shares


def test_shares_are_four_bits_of_the_root():
    np.testing.assert_array_equal(quantise_shares(np.array([[1.0, 1.0, 2.0, 0.0]], np.float32)), [[8, 8, 11, 0]])


def test_only_the_eight_largest_shares_are_named():
    counts = np.arange(1, 13, dtype=np.float32)[None]
    assert np.count_nonzero(quantise_shares(counts)) == 8
    assert not np.any(quantise_shares(counts)[0, :4])


def test_an_empty_history_has_no_shares():
    assert not np.any(quantise_shares(np.zeros((2, 5), np.float32)))


def test_length_buckets_have_the_documented_edges():
    np.testing.assert_array_equal(length_bucket(np.array([0, 5, 6, 20, 21, 100, 101])), [0, 0, 1, 1, 2, 2, 3])


def test_numpy_and_jax_agree():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, (20, 16)).astype(np.float32)
    bucket, level = rng.integers(0, 4, 20), rng.integers(1, 4, 20)
    attributes = rng.integers(0, 2, (20, 3)).astype(np.float32)
    shares = quantise_shares(counts)
    np.testing.assert_array_equal(shares, quantise_shares(jnp.asarray(counts)))
    plain = prefix_features(shares, bucket, attributes, level)
    traced = prefix_features(*(jnp.asarray(value) for value in (shares, bucket, attributes, level)))
    np.testing.assert_allclose(plain, traced, atol=1e-7)
    assert plain.shape == (20, prefix_size(16, 3))
