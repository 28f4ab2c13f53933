"""Where the Pallas kernels of all operations run."""

from typing import Literal

import jax

from cda4rec_jax.errors import UserError

BACKENDS = {"triton": "gpu", "tpu": "tpu"}
LEAST_TRITON_WIDTH = 16  # of a product that Triton compiles


def check_backend(implementation: Literal["triton", "tpu"], interpret: bool) -> None:
    """UserError where JAX is on another backend and the kernel is not to be interpreted."""
    backend = BACKENDS[implementation]
    if jax.default_backend() != backend and not interpret:
        raise UserError(
            f"implementation {implementation!r} runs on a {backend.upper()}, and JAX is on {jax.default_backend()}: "
            "choose another, or None, or pass interpret=True to try it slowly."
        )
