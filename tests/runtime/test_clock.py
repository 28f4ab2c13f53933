"""A virtual clock counts what a real one sleeps, and the link's delays are those of the link model."""

import time

import jax
import jax.numpy as jnp
import pytest

from cda4rec_jax.links.virtual_clock import Realisation, downlink_ms, uplink_ms
from cda4rec_jax.runtime.clock import RequestClock, realised_link


def test_a_virtual_delay_moves_the_clock_by_exactly_the_delay():
    clock = RequestClock(5.0, real_delay=False)
    before_ms, start_s = clock.now_ms(), time.perf_counter()
    assert clock.wait(lambda: 60_000.0) == 60_000.0
    assert time.perf_counter() - start_s < 30
    assert clock.now_ms() - before_ms >= 60_000
    assert before_ms >= 5.0


def test_forks_go_on_by_themselves():
    clock = RequestClock(0.0, real_delay=False)
    fork = clock.fork()
    fork.wait(lambda: 1e6)
    assert clock.now_ms() < 1e6 <= fork.now_ms()
    clock.advance_to(fork.now_ms())
    assert clock.now_ms() >= 1e6


def test_the_time_of_computing_a_delay_is_part_of_it():
    clock = RequestClock(0.0, real_delay=False)

    def slow_delay() -> float:
        time.sleep(0.3)
        return 200.0

    before_s, before_ms = time.perf_counter(), clock.now_ms()
    assert clock.wait(slow_delay) == 200.0
    moved_ms, taken_ms = clock.now_ms() - before_ms, (time.perf_counter() - before_s) * 1e3
    assert 200.0 <= moved_ms <= taken_ms - 100.0  # of 300 ms at least, 200 count


def test_a_delay_that_took_as_long_to_compute_is_not_slept(monkeypatch: pytest.MonkeyPatch):
    clock, sleep, slept = RequestClock(0.0, real_delay=True), time.sleep, []

    def slow_delay() -> float:
        sleep(0.03)
        return 20.0

    monkeypatch.setattr(time, "sleep", slept.append)
    assert clock.wait(slow_delay) == 20.0
    assert slept == []
    clock.wait(lambda: 60_000.0)
    assert 0 < slept[0] <= 60


def test_a_realised_link_agrees_with_the_link_model():
    losses = jnp.cumsum(jnp.asarray([[0.0] * 513, [0.0, 1.0] + [0.0] * 511]), axis=1)
    realisation = Realisation(
        round_trip_ms=jnp.asarray([40.0, 100.0]),
        uplink_kbps=jnp.asarray([1000.0, 500.0]),
        downlink_kbps=jnp.asarray([8000.0, 4000.0]),
        queue_ms=jnp.asarray([1.0, 2.5]),
        failed=jnp.asarray([False, True]),
        uplink_losses=losses,
        downlink_losses=losses,
        loss_probability=jnp.asarray([0.0, 0.1]),
    )
    first, second = realised_link(realisation, 0), realised_link(realisation, 1)
    assert (first.failed, second.failed, second.queue_ms) == (False, True, 2.5)
    assert first.transfer_ms(2000, "up") == pytest.approx(20 + 16)
    assert first.transfer_ms(2000, "down") == pytest.approx(20 + 2)
    assert second.transfer_ms(2000, "up") == pytest.approx(50 + 32 + 200)
    sizes = jnp.full((2, 1), 2000.0)
    for row, link in enumerate((first, second)):
        assert link.transfer_ms(2000, "up") == pytest.approx(float(uplink_ms(sizes, realisation)[row, 0]))
        assert link.transfer_ms(2000, "down") == pytest.approx(float(downlink_ms(sizes, realisation)[row, 0]))
    assert len(jax.tree.leaves(realisation)) == 8
