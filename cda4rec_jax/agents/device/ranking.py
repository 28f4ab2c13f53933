"""The fusion head: one score for each candidate from everything that the device knows."""

import jax
import jax.numpy as jnp
from flax import nnx

from cda4rec_jax.agents.device.features import FEATURES
from cda4rec_jax.array_typing import CandidateFeatures, CandidateScores


class FusionHead(nnx.Module):
    """``features . w + silu(features W + b) . v``: the linear path keeps a young head close to the cloud's order."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        size = len(FEATURES)
        start = jnp.zeros((size,)).at[FEATURES.index("cloud_score")].set(1.0)
        self.linear = nnx.Param(start.at[FEATURES.index("popularity")].set(0.1))
        self.hidden = nnx.Param(nnx.initializers.normal(size**-0.5)(rngs.params(), (size, hidden)))
        self.bias = nnx.Param(jnp.zeros((hidden,)))
        self.out = nnx.Param(nnx.initializers.normal(0.1 * hidden**-0.5)(rngs.params(), (hidden,)))

    def __call__(self, features: CandidateFeatures) -> CandidateScores:
        hidden = jax.nn.silu(features @ self.hidden[...] + self.bias[...][None, None, :])
        return features @ self.linear[...] + hidden @ self.out[...]
