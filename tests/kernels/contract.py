"""What the contract suites of all kernels share."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from cda4rec_jax.kernels.pallas_backend import BACKENDS

needs_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason=f"this is of a CPU, and JAX is on {jax.default_backend()}")


def needs_native(native_problem: Callable[[], str | None]) -> pytest.MarkDecorator:
    """For tests that run a kernel's C++ code: skips them where it cannot run."""
    problem = native_problem() if jax.default_backend() == "cpu" else f"it runs on a CPU, and JAX is on {jax.default_backend()}"
    return pytest.mark.skipif(problem is not None, reason=f"no native code: {problem}")


def interpreted(implementation: str | None) -> bool:
    """True for a Pallas kernel away from its own backend, where it is compiled."""
    return implementation in BACKENDS and BACKENDS[implementation] != jax.default_backend()


def assert_trees_close(actual: Any, expected: Any, *, rtol: float, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def assert_trees_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def temporary_bytes(function: Callable, *inputs: Any) -> int:
    """Memory that the compiled function needs besides its inputs and outputs; skips the test where that is not known."""
    if jax.default_backend() != "cpu":
        pytest.skip("the figure holds workspaces of the accelerator's libraries too")
    analysis = jax.jit(function).lower(*inputs).compile().memory_analysis()
    if analysis is None:
        pytest.skip("this backend gives no memory analysis")
    return analysis.temp_size_in_bytes
