"""How the kernels' tests set up JAX and the checks of annotations."""

from collections.abc import Iterator

import jax
import jaxtyping
import pytest


@pytest.fixture
def float32_products() -> Iterator[None]:
    """Products of float32 in float32, for operations that leave their precision to JAX: accelerators round by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def unchecked_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user calls it: the annotations that only tests check would refuse bad shapes first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
