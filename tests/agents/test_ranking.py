"""The fusion head."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cda4rec_jax.agents.device import FEATURES, FusionHead
from cda4rec_jax.agents.device.features import REQUEST_FEATURES

CLOUD_PRESENT, STRUCTURED_PRESENT = FEATURES.index("cloud_present"), FEATURES.index("structured_present")


def features(key: int = 0) -> jax.Array:
    drawn = (
        jax.random.normal(jax.random.key(key), (3, 20, len(FEATURES))) * jnp.linspace(0.1, 2.0, len(FEATURES))[None, None] + 0.3
    )
    return drawn.at[..., jnp.asarray([CLOUD_PRESENT, STRUCTURED_PRESENT])].set(1.0)


def moments(given: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.mean(given, (0, 1)), jnp.std(given, (0, 1))


def drawn_head() -> FusionHead:
    """Moderating weights start at 0, where nothing could be seen of them."""
    head = FusionHead(8, rngs=nnx.Rngs(0))
    head.by_request[...] = 0.2 * jax.random.normal(jax.random.key(7), head.by_request.shape)
    return head


def centred(scores: jax.Array) -> np.ndarray:
    return np.asarray(scores - scores.mean(axis=1, keepdims=True))


def test_standardising_keeps_what_a_head_computes():
    given, head = features(), drawn_head()
    before = head(given)
    head.standardise(*moments(given))
    np.testing.assert_allclose(centred(head(given)), centred(before), atol=1e-5)
    head.standardise(jnp.full(len(FEATURES), 0.2), jnp.full(len(FEATURES), 3.0))
    np.testing.assert_allclose(centred(head(given)), centred(before), atol=1e-5)


def test_the_hidden_layer_then_reads_features_of_one_scale():
    given, head = features(), drawn_head()
    head.standardise(*moments(given))
    known = (given - head.mean[...][None, None]) / head.deviation[...][None, None]
    varies = np.asarray([name not in ("cloud_present", "structured_present") for name in FEATURES])
    np.testing.assert_allclose(np.std(np.asarray(known), (0, 1))[varies], 1.0, rtol=1e-4)


def test_features_that_are_absent_count_nothing_after_standardising():
    given, head = features(), drawn_head()
    head.standardise(*moments(given))
    skipped = given.at[..., STRUCTURED_PRESENT:].set(0.0)
    other = skipped.at[..., STRUCTURED_PRESENT + 1 :].set(5.0)
    np.testing.assert_allclose(head(skipped), head(other), atol=1e-6)


def test_an_outlier_is_cut():
    given, head = features(), drawn_head()
    head.standardise(*moments(given))
    far = given.at[0, 0, FEATURES.index("popularity")].set(1e3)
    farther = given.at[0, 0, FEATURES.index("popularity")].set(1e6)
    np.testing.assert_allclose(head(far), head(farther), atol=1e-6)


def test_what_a_feature_is_worth_follows_the_request():
    """The weight of the text under a PROFILE abstract alone moves the scores there and nowhere else."""
    given, head = features(), FusionHead(8, rngs=nnx.Rngs(0))
    levels = [FEATURES.index(name) for name in ("level_profile", "level_recent", "level_full")]
    profile, full = (given.at[..., jnp.asarray(levels)].set(jnp.asarray(level)) for level in ([1.0, 0, 0], [0, 0, 1.0]))
    before = head(profile), head(full)
    row, column = REQUEST_FEATURES.index("level_profile"), FEATURES.index("text_last")
    head.by_request[...] = head.by_request[...].at[row, column].set(2.0)
    np.testing.assert_allclose(head(profile) - before[0], 2.0 * profile[..., column], atol=1e-5)
    np.testing.assert_allclose(head(full), before[1], atol=1e-6)
