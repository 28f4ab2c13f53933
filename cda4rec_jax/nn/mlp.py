"""The gated feed-forward block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from cda4rec_jax.nn.linear import linear


class SwiGLU(nnx.Module):
    """``(silu(x W_gate) * (x W_up)) W_down`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate_up = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width, 2 * hidden)))
        self.down = nnx.Param(jnp.zeros((hidden, width)))  # an untrained block is the identity, as in attention

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        gate, up = jnp.split(linear(x, self.gate_up[...]), 2, axis=-1)
        return linear(jax.nn.silu(gate) * up, self.down[...])
