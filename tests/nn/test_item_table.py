"""The item table, quantised rows and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cda4rec_jax.nn import ItemTable, ItemTableConfig, dequantise_rows, dropout, quantise_rows


def table() -> ItemTable:
    text = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32))
    return ItemTable(ItemTableConfig(), text, 4, rngs=nnx.Rngs(0))


def test_an_item_is_its_id_embedding_plus_its_projected_text():
    items = table()
    expected = items.ids[...] + items.text[...] @ items.projection[...]
    np.testing.assert_allclose(items.vectors()[1:], expected[1:], atol=1e-6)


def test_padding_is_zero_and_gets_no_gradient():
    items = table()
    assert not np.any(items.vectors()[0])
    graph, params, rest = nnx.split(items, nnx.Param, ...)
    gradient = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, rest).vectors() ** 2))(params)
    assert not np.any(gradient["ids"][...][0])


def test_text_is_not_trained():
    state = nnx.state(table(), nnx.Param)
    assert set(state) == {"ids", "projection"}


def test_int8_rows_are_within_half_a_step():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32))
    q, scale = quantise_rows(x)
    assert q.dtype == jnp.int8
    assert np.all(np.abs(dequantise_rows(q, scale) - x) <= scale[:, None] * 0.5 + 1e-7)


def test_a_zero_row_survives_int8():
    q, scale = quantise_rows(jnp.zeros((2, 4)))
    np.testing.assert_array_equal(dequantise_rows(q, scale), jnp.zeros((2, 4)))


def test_dropout_keeps_the_mean_and_drops_its_share():
    dropped = dropout(jnp.ones((400, 250)), 0.3, jax.random.key(0))
    assert abs(float(jnp.mean(dropped == 0)) - 0.3) < 0.01
    assert abs(float(jnp.mean(dropped)) - 1.0) < 0.01


def test_dropout_without_a_key_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
