"""Contexts that tests start from."""

from collections.abc import Callable

import jax.numpy as jnp
import pytest

from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, Link
from cda4rec_jax.planner import UserFacts, WeightScales


def _filled(size: int, **fields: float) -> Context:
    floats = {
        "history_length": 30.0,
        "cache_age_events": 2.0,
        "category_entropy": 1.0,
        "rare_share": 0.1,
        "session_count": 0.0,
        "hours_since_last": 0.0,
        "has_timestamps": 0.0,
        "free_memory_mb": 1000.0,
        "round_trip_ms": 50.0,
        "uplink_kbps": 1000.0,
        "downlink_kbps": 8000.0,
        "utility_per_ms": 1e-4,
        "utility_per_mj": 1e-4,
        "utility_per_exposure": 0.02,
    }
    enums = {"cache_level": EgressLevel.RECENT, "tier": DeviceTier.MID, "link": Link.LTE, "consent": EgressLevel.FULL}
    values = {name: jnp.full((size,), fields.get(name, value), jnp.float32) for name, value in floats.items()}
    values |= {name: jnp.full((size,), int(fields.get(name, float(value))), jnp.int32) for name, value in enums.items()}
    return Context(**values)


@pytest.fixture(scope="session")
def make_context() -> Callable[..., Context]:
    """``make_context(size, field=value, ...)``: equal requests where everything is allowed, except for the named fields."""
    return _filled


@pytest.fixture(scope="session")
def facts() -> UserFacts:
    """4,000 users with histories of 1 to 50 events."""
    size = 4000
    length = (jnp.arange(size) % 50 + 1).astype(jnp.float32)
    zero = jnp.zeros((size,))
    return UserFacts(
        history_length=length,
        category_entropy=zero + 1.0,
        rare_share=zero,
        session_count=zero,
        hours_since_last=zero,
        has_timestamps=zero,
        max_cache_age=zero + 10.0,
    )


@pytest.fixture(scope="session")
def scales() -> WeightScales:
    return WeightScales.of(quality_gap=0.04, latency_gap_ms=80.0, energy_gap_mj=100.0, exposure_gap=0.5)
