import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax import links
from cda4rec_jax.links import LinkConfig, Realisation
from cda4rec_jax.messages import Context, Link

SIZE = 1000
IDS = jnp.arange(SIZE)
realise = jax.jit(links.realise, static_argnames="config")
uplink_ms, downlink_ms = jax.jit(links.uplink_ms), jax.jit(links.downlink_ms)


def context_on(link: Link) -> Context:
    floats = {field.name: jnp.zeros((SIZE,)) for field in dataclasses.fields(Context)}
    enums = {name: jnp.zeros((SIZE,), jnp.int32) for name in ("cache_level", "tier", "consent")}
    known = {"round_trip_ms": 50.0, "uplink_kbps": 1000.0, "downlink_kbps": 8000.0} if link is not Link.OFFLINE else {}
    estimates = {name: jnp.full((SIZE,), value) for name, value in known.items()}
    return Context(**(floats | enums | estimates | {"link": jnp.full((SIZE,), int(link))}))


def by_hand(losses: list[float]) -> Realisation:
    cumulative = jnp.asarray([[*losses, *[losses[-1]] * (513 - len(losses))]])
    one = jnp.ones((1,))
    return Realisation(
        round_trip_ms=150.0 * one,
        uplink_kbps=1000.0 * one,
        downlink_kbps=2000.0 * one,
        queue_ms=0.0 * one,
        failed=one > 1,
        uplink_losses=cumulative,
        downlink_losses=cumulative * 2,
        loss_probability=0.5 * one,
    )


def test_realised_transfer_times_by_hand():
    link = by_hand([0.0, 0.0, 1.0])  # the second packet is lost; a loss costs 2 * 150 ms
    sizes = jnp.asarray([[0.0, 1.0, 1460.0, 1461.0]])
    expected_up = [0.0, 75 + 0.008, 75 + 11.68, 75 + 11.688 + 300]
    np.testing.assert_allclose(uplink_ms(sizes, link)[0], expected_up, rtol=1e-6)
    expected_down = [0.0, 75 + 0.004, 75 + 5.84, 75 + 5.844 + 600]
    np.testing.assert_allclose(downlink_ms(sizes, link)[0], expected_down, rtol=1e-6)


def test_packets_beyond_the_tracked_ones_lose_their_expected_share():
    link = by_hand([0.0])
    sizes = jnp.asarray([[1460.0 * 514]])
    expected = 75 + 8 * 1460 * 514 / 1000 + 2 * 0.5 * 300
    np.testing.assert_allclose(uplink_ms(sizes, link)[0], [expected], rtol=1e-6)


def test_the_mean_of_realised_times_is_the_expected_time():
    config = LinkConfig(spread=0.0)
    link = realise(context_on(Link.EDGE), IDS, 0, 0.0, config=config)
    expected = 25 + 20 + 14 * config.loss_probability[Link.EDGE] * 200  # 20,000 bytes are 14 packets
    assert float(downlink_ms(jnp.full((SIZE, 1), 20_000.0), link).mean()) == pytest.approx(expected, rel=0.1)


def test_more_bytes_never_take_less_time():
    link = realise(context_on(Link.EDGE), IDS, 0, 0.0, config=LinkConfig())
    sizes = jnp.broadcast_to(jnp.linspace(1.0, 200_000.0, 40)[None, :], (SIZE, 40))
    assert bool((jnp.diff(uplink_ms(sizes, link), axis=1) >= 0).all())


def test_what_a_request_meets_varies_around_the_estimate_as_declared():
    link = realise(context_on(Link.LTE), IDS, 0, 8.0, config=LinkConfig())
    logs = np.log(np.asarray(link.round_trip_ms) / 50.0)
    assert logs.mean() == pytest.approx(0.0, abs=0.05) and logs.std() == pytest.approx(0.35, rel=0.1)
    assert float(link.queue_ms.mean()) == pytest.approx(8.0, rel=0.15)


def test_links_fail_with_their_probability_and_offline_always():
    config, contexts = LinkConfig(), jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(context_on, Link))

    @jax.jit
    def failed(draw):
        return jax.vmap(lambda context: links.realise(context, IDS, draw, 0.0, config).failed)(contexts)

    found = np.stack([failed(draw) for draw in range(20)])
    assert found.mean(axis=(0, 2)) == pytest.approx(config.failure_probability, abs=0.005)
    assert found[:, Link.OFFLINE].all()


def test_a_realisation_is_a_function_of_seed_event_and_draw():
    context, rows = context_on(Link.WIFI), jnp.asarray([9, 2])
    whole = realise(context, IDS, 3, 5.0, config=LinkConfig())
    part = realise(jax.tree.map(lambda x: x[rows], context), rows, 3, 5.0, config=LinkConfig())
    for few, all_of_them in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(few, all_of_them[rows], rtol=1e-6)
    for changed in (realise(context, IDS, 4, 5.0, config=LinkConfig()), realise(context, IDS, 3, 5.0, config=LinkConfig(seed=2))):
        assert not np.array_equal(changed.round_trip_ms, whole.round_trip_ms)


def test_times_are_finite_offline():
    link = realise(context_on(Link.OFFLINE), IDS, 0, 5.0, config=LinkConfig())
    assert bool(jnp.isfinite(uplink_ms(jnp.full((SIZE, 2), 1e5), link)).all())


def test_probabilities_that_are_none_are_refused():
    with pytest.raises(ValueError, match="failure_probability"):
        LinkConfig(failure_probability=(0.1, 0.2))
