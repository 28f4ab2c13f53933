"""The linear map with a gradient of its own is the linear map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.nn.linear import linear


@pytest.mark.parametrize("rows", [(), (5,), (3, 4)])
def test_value_and_gradients_are_those_of_the_plain_product(rows: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((*rows, 6), (6, 7), (*rows, 7))
    x, weights, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    for function in (linear, jax.jit(linear)):
        out, pull_back = jax.vjp(function, x, weights)
        expected, pull_back_plain = jax.vjp(lambda x, weights: x @ weights, x, weights)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
        for actual, wanted in zip(pull_back(cotangent), pull_back_plain(cotangent), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_have_the_dtype_of_what_they_are_gradients_of() -> None:
    x, weights = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)
    d_x, d_weights = jax.grad(lambda x, weights: jnp.sum(linear(x, weights)), (0, 1))(x, weights)
    assert (d_x.dtype, d_weights.dtype) == (jnp.bfloat16, jnp.float32)
