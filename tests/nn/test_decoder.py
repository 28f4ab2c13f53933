"""The decoder: what a token may read, and that packing changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.nn import Decoder, DecoderConfig

CONFIG = DecoderConfig(width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_hidden=24, dropout_rate=0.3)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Blocks start as the identity; these have weights as if they were trained."""
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(1)
    nnx.update(decoder, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(rngs(), x.shape), nnx.state(decoder, nnx.Param)))
    return decoder


def run(decoder: Decoder, x: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(decoder(jnp.asarray(x), jnp.asarray(segments), jnp.asarray(positions)))


def test_packed_segments_equal_segments_alone(decoder):
    x = np.random.default_rng(0).normal(size=(1, 9, 16)).astype(np.float32)
    packed = run(decoder, x, np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]]), np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]]))
    first = run(decoder, x[:, :4], np.ones((1, 4), int), np.arange(4)[None])
    second = run(decoder, x[:, 4:7], np.ones((1, 3), int), np.arange(3)[None])
    np.testing.assert_allclose(packed[:, :4], first, atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:7], second, atol=1e-5)


def test_a_row_of_several_blocks_equals_its_segments_alone(decoder):
    x = np.random.default_rng(5).normal(size=(1, 300, 16)).astype(np.float32)
    positions = np.tile(np.arange(150), (2, 1))
    packed = run(decoder, x, np.repeat([[1, 2]], 150, axis=1), positions.reshape(1, 300))
    alone = run(decoder, x.reshape(2, 150, 16), np.ones((2, 150), int), positions)
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=1e-4)


def test_a_token_reads_no_later_token(decoder):
    x = np.random.default_rng(1).normal(size=(1, 6, 16)).astype(np.float32)
    changed = x.copy()
    changed[:, 4:] += 1.0
    segments, positions = np.ones((1, 6), int), np.arange(6)[None]
    before, after = run(decoder, x, segments, positions), run(decoder, changed, segments, positions)
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-3


def test_padding_and_row_order_change_nothing(decoder):
    x = np.random.default_rng(2).normal(size=(3, 5, 16)).astype(np.float32)
    segments, positions = np.ones((3, 5), int), np.tile(np.arange(5), (3, 1))
    plain = run(decoder, x, segments, positions)
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(run(decoder, x[order], segments, positions), plain[order], atol=1e-6)
    padded = np.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=7.0)
    more = run(decoder, padded, np.pad(segments, ((0, 0), (0, 3))), np.pad(positions, ((0, 0), (0, 3))))
    np.testing.assert_allclose(more[:, :5], plain, atol=1e-5)
    assert np.isfinite(more).all()


def test_only_relative_positions_matter(decoder):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 5, 16)).astype(np.float32))
    segments = jnp.ones((1, 5), int)
    here = decoder(x, segments, jnp.arange(5)[None])
    later = decoder(x, segments, 7 + jnp.arange(5)[None])
    np.testing.assert_allclose(here, later, atol=1e-4)


def test_dropout_is_on_only_with_a_key(decoder):
    x = jnp.ones((1, 4, 16))
    segments, positions = jnp.ones((1, 4), int), jnp.arange(4)[None]
    silent = decoder(x, segments, positions)
    np.testing.assert_array_equal(silent, decoder(x, segments, positions))
    assert float(jnp.abs(decoder(x, segments, positions, jax.random.key(0)) - silent).max()) > 1e-3


def test_an_untrained_decoder_only_normalises():
    x = np.random.default_rng(4).normal(size=(1, 5, 16)).astype(np.float32)
    hidden = run(Decoder(CONFIG, rngs=nnx.Rngs(0)), x, np.ones((1, 5), int), np.arange(5)[None])
    np.testing.assert_allclose(hidden, x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)), rtol=1e-4)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads must divide the width"):
        DecoderConfig(width=10, num_layers=1, num_heads=4, num_kv_heads=4, mlp_hidden=8, dropout_rate=0.0)
