"""The kernel over an agent's weights is the agent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.agents.device import FEATURES, DeviceAgent, DeviceConfig, ranker_weights
from cda4rec_jax.kernels.rank_candidates import empty_cache, extend_history, score_candidates
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.nn import DecoderConfig, embed, last_hidden

EVENTS, WINDOW, CANDIDATES = 6, 9, 5


@pytest.fixture(scope="module")
def agent() -> DeviceAgent:
    """Two layers that share keys, every weight drawn: a young block is the identity."""
    decoder = DecoderConfig(width=12, num_layers=2, num_heads=2, num_kv_heads=1, mlp_hidden=10, dropout_rate=0.1)
    device = DeviceAgent(DeviceConfig(decoder=decoder, history_length=WINDOW - 1), 4, 3, rngs=nnx.Rngs(0))
    draws = nnx.Rngs(1)
    nnx.update(device, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(draws(), x.shape), nnx.state(device, nnx.Param)))
    device.head.standardise(0.1 * jnp.arange(float(len(FEATURES))), jnp.linspace(0.5, 2.0, len(FEATURES)))
    return device


def test_the_state_of_the_kernel_is_the_agents(agent: DeviceAgent) -> None:
    vectors = jax.random.normal(jax.random.key(2), (EVENTS + 1, 12))
    position = jnp.arange(WINDOW)[None, :]
    batch = SequenceBatch(
        item_indices=jnp.where(position <= EVENTS, position, 0),
        segment_ids=(position <= EVENTS).astype(jnp.int32),
        positions=position,
        targets=jnp.zeros_like(position),
        prefix_rows=(position == 0).astype(jnp.int32),
        prefixes=jnp.asarray([[0.0, 0.0, 0.0], [1.0, 0.0, 0.5]]),
    )
    expected = last_hidden(agent(batch, vectors), jnp.asarray([EVENTS + 1]))[0]
    weights, tokens = ranker_weights(agent, WINDOW - 1), embed(agent.prefix[...], batch, vectors)[0]
    state, _ = extend_history(weights, empty_cache(weights), tokens, EVENTS + 1)
    np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absent", ((), ("cloud_present",), ("structured_present",)), ids=str)
def test_the_scores_of_the_kernel_are_the_heads(agent: DeviceAgent, absent: tuple[str, ...]) -> None:
    rng = np.random.default_rng(3)
    vectors, scales = rng.integers(-127, 128, (CANDIDATES, 12), dtype=np.int8), np.full(CANDIDATES, 0.01, np.float32)
    features = rng.normal(size=(CANDIDATES, len(FEATURES))).astype(np.float32)
    for name in ("cloud_present", "structured_present"):
        features[:, FEATURES.index(name)] = name not in absent
    state = rng.normal(size=12).astype(np.float32)
    products = (vectors * scales[:, None]) @ state
    place = FEATURES.index("device_score")
    for without, difference in (((), (products - products[0]) / 2), (("device_score",), 0.0)):
        actual = score_candidates(ranker_weights(agent, WINDOW - 1, without), state, vectors, scales, features)
        expected = features.copy()
        expected[:, place] = difference
        np.testing.assert_allclose(actual, agent.head(jnp.asarray(expected)[None])[0], rtol=1e-4, atol=1e-4)


def test_later_changes_of_the_agent_are_not_seen(agent: DeviceAgent) -> None:
    before = ranker_weights(agent, WINDOW - 1)
    kept = dataclasses.replace(before, linear=before.linear.copy())
    agent.head.linear[...] = agent.head.linear[...] + 1.0
    np.testing.assert_array_equal(before.linear, kept.linear)
    agent.head.linear[...] = agent.head.linear[...] - 1.0
