"""What the contract suites of all kernels share."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest


def assert_trees_close(actual: Any, expected: Any, *, rtol: float, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def assert_trees_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def temporary_bytes(function: Callable, *inputs: Any) -> int:
    """Memory that the compiled function needs besides its inputs and outputs; skips the test where that is not known."""
    analysis = jax.jit(function).lower(*inputs).compile().memory_analysis()
    if analysis is None:
        pytest.skip("this backend gives no memory analysis")
    return analysis.temp_size_in_bytes
