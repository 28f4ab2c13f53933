"""The fusion head: one score for each candidate from everything that the device knows."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from cda4rec_jax.agents.device.features import FEATURES, REQUEST_FEATURES, SEMANTIC_FEATURES, STRUCTURED_FEATURES
from cda4rec_jax.array_typing import Array, CandidateFeatures, CandidateScores
from cda4rec_jax.nn import Frozen

_LARGEST = 8.0  # standard deviations
_SMALLEST_DEVIATION = 1e-3  # below it a feature is constant and stays as it is
_CLOUD_PRESENT = FEATURES.index("cloud_present")
_STRUCTURED_PRESENT = FEATURES.index("structured_present")
_OF_REQUEST = np.asarray([FEATURES.index(name) for name in REQUEST_FEATURES])
_OF_CLOUD = np.asarray([name in SEMANTIC_FEATURES for name in FEATURES])[None, None]
_OF_STRUCTURED = np.asarray([name in STRUCTURED_FEATURES for name in FEATURES])[None, None]


class FusionHead(nnx.Module):
    """``x . w + r M x + silu(x W + b) . v`` over standardised features x, with those of the request r among them.

    The linear path keeps a young head close to the cloud's order. One head serves all plans, and by ``r M`` each feature has the weight
    that suits the level, the age of the embedding and what the device knows: without it, what serves one plan costs another (LOG).

    Features of several scales teach a head several times more slowly. Their means and deviations are measured on withheld positions
    (``standardise``); a feature that is absent is 0 after standardising too.
    """

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        size = len(FEATURES)
        start = jnp.zeros((size,)).at[FEATURES.index("cloud_score")].set(1.0)
        self.linear = nnx.Param(start.at[FEATURES.index("popularity")].set(0.1))
        self.by_request = nnx.Param(jnp.zeros((len(REQUEST_FEATURES), size)))
        self.hidden = nnx.Param(nnx.initializers.normal(size**-0.5)(rngs.params(), (size, hidden)))
        self.bias = nnx.Param(jnp.zeros((hidden,)))
        self.out = nnx.Param(nnx.initializers.normal(0.1 * hidden**-0.5)(rngs.params(), (hidden,)))
        self.mean = Frozen(jnp.zeros((size,)))
        self.deviation = Frozen(jnp.ones((size,)))

    def __call__(self, features: CandidateFeatures) -> CandidateScores:
        known = self._standardised(features)
        hidden = jax.nn.silu(known @ self.hidden[...] + self.bias[...][None, None, :])
        moderated = jnp.sum(known[..., _OF_REQUEST] * (known @ self.by_request[...].T), axis=-1)
        return known @ self.linear[...] + moderated + hidden @ self.out[...]

    def standardise(self, mean: Float[Array, "f"], deviation: Float[Array, "f"]) -> None:
        """Take these moments of the features, and keep what the head computes, up to clipping and absent features."""
        varies = (deviation > _SMALLEST_DEVIATION).at[jnp.asarray((_CLOUD_PRESENT, _STRUCTURED_PRESENT))].set(False)
        mean, deviation = jnp.where(varies, mean, 0.0), jnp.where(varies, deviation, 1.0)
        grown, moved = deviation / self.deviation[...], (mean - self.mean[...]) / self.deviation[...]
        self.bias[...] = self.bias[...] + moved @ self.hidden[...]
        self.hidden[...] = self.hidden[...] * grown[:, None]
        moderators, of_request = self.by_request[...], grown[_OF_REQUEST]
        linear = (self.linear[...] + moved[_OF_REQUEST] @ moderators) * grown
        self.linear[...] = linear.at[_OF_REQUEST].add(of_request * (moderators @ moved))
        self.by_request[...] = moderators * of_request[:, None] * grown[None]
        self.mean[...], self.deviation[...] = mean, deviation

    def _standardised(self, features: CandidateFeatures) -> CandidateFeatures:
        known = jnp.clip((features - self.mean[...][None, None]) / self.deviation[...][None, None], -_LARGEST, _LARGEST)
        structured = jnp.where(_OF_STRUCTURED, features[..., _STRUCTURED_PRESENT, None], 1.0)
        return known * jnp.where(_OF_CLOUD, features[..., _CLOUD_PRESENT, None], structured)
