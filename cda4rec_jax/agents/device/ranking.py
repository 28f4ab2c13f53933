"""The fusion head: one score for each candidate from everything that the device knows."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from cda4rec_jax.agents.device.features import FEATURES, SEMANTIC_FEATURES, STRUCTURED_FEATURES
from cda4rec_jax.array_typing import Array, CandidateFeatures, CandidateScores
from cda4rec_jax.nn import Frozen

_LARGEST = 8.0  # standard deviations
_SMALLEST_DEVIATION = 1e-3  # below it a feature is constant and stays as it is
_CLOUD_PRESENT = FEATURES.index("cloud_present")
_STRUCTURED_PRESENT = FEATURES.index("structured_present")
_OF_CLOUD = np.asarray([name in SEMANTIC_FEATURES for name in FEATURES])[None, None]
_OF_STRUCTURED = np.asarray([name in STRUCTURED_FEATURES for name in FEATURES])[None, None]


class FusionHead(nnx.Module):
    """``x . w + silu(x W + b) . v`` over standardised features x: the linear path keeps a young head close to the cloud's order.

    Features of several scales teach a head several times more slowly. Their means and deviations are measured on withheld positions
    (``standardise``); a feature that is absent is 0 after standardising too.
    """

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        size = len(FEATURES)
        start = jnp.zeros((size,)).at[FEATURES.index("cloud_score")].set(1.0)
        self.linear = nnx.Param(start.at[FEATURES.index("popularity")].set(0.1))
        self.hidden = nnx.Param(nnx.initializers.normal(size**-0.5)(rngs.params(), (size, hidden)))
        self.bias = nnx.Param(jnp.zeros((hidden,)))
        self.out = nnx.Param(nnx.initializers.normal(0.1 * hidden**-0.5)(rngs.params(), (hidden,)))
        self.mean = Frozen(jnp.zeros((size,)))
        self.deviation = Frozen(jnp.ones((size,)))

    def __call__(self, features: CandidateFeatures) -> CandidateScores:
        known = self._standardised(features)
        hidden = jax.nn.silu(known @ self.hidden[...] + self.bias[...][None, None, :])
        return known @ self.linear[...] + hidden @ self.out[...]

    def standardise(self, mean: Float[Array, "f"], deviation: Float[Array, "f"]) -> None:
        """Take these moments of the features, and keep what the head computes, up to clipping and absent features."""
        varies = (deviation > _SMALLEST_DEVIATION).at[jnp.asarray((_CLOUD_PRESENT, _STRUCTURED_PRESENT))].set(False)
        mean, deviation = jnp.where(varies, mean, 0.0), jnp.where(varies, deviation, 1.0)
        grown, moved = deviation / self.deviation[...], (mean - self.mean[...]) / self.deviation[...]
        self.bias[...] = self.bias[...] + moved @ self.hidden[...]
        self.hidden[...] = self.hidden[...] * grown[:, None]
        self.linear[...] = self.linear[...] * grown
        self.mean[...], self.deviation[...] = mean, deviation

    def _standardised(self, features: CandidateFeatures) -> CandidateFeatures:
        known = jnp.clip((features - self.mean[...][None, None]) / self.deviation[...][None, None], -_LARGEST, _LARGEST)
        structured = jnp.where(_OF_STRUCTURED, features[..., _STRUCTURED_PRESENT, None], 1.0)
        return known * jnp.where(_OF_CLOUD, features[..., _CLOUD_PRESENT, None], structured)
