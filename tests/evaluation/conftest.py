"""Requests with hand-made outcomes."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.links import LinkConfig
from cda4rec_jax.pipeline.decisions import PlanningWorld, requests_of
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.planner import (
    NUM_PLANS,
    ContextConfig,
    PayloadSizes,
    UserFacts,
    WeightScales,
    deployment_profile,
    plan_quality,
    sample_contexts,
)

DRAWS = 3


@pytest.fixture(scope="session")
def make_records() -> Callable[[np.ndarray], PlanRecords]:
    """``make_records(ranks [n, p])``: contexts v1 of n users, three each, with these ranks of the target."""
    scales = WeightScales.of(quality_gap=0.1, latency_gap_ms=100.0, energy_gap_mj=100.0, exposure_gap=0.8)
    world = PlanningWorld(
        profile=deployment_profile(),
        exposure_by_level=jnp.asarray([0.0, 0.4, 0.6, 0.9]),
        sizes=PayloadSizes(),
        scales=scales,
    )

    @jax.jit
    def draw_one(facts, events, draw, cached):
        drawn = sample_contexts(facts, events, scales, draw, ContextConfig())
        shared = sample_contexts(facts, events, scales, cached, ContextConfig())
        names = ("cache_level", "cache_age_events", "consent")
        context = replace(drawn, **{name: getattr(shared, name) for name in names})
        return requests_of(world, context, events, draw, LinkConfig())

    def make(ranks: np.ndarray) -> PlanRecords:
        size = len(ranks)
        length = (5 + 7 * jnp.arange(size) % 90).astype(jnp.float32)
        zero = jnp.zeros((size,))
        facts = UserFacts(
            history_length=length,
            category_entropy=zero,
            rare_share=zero,
            session_count=zero,
            hours_since_last=zero,
            has_timestamps=zero,
            max_cache_age=zero + 20.0,
        )
        drawn = [draw_one(facts, jnp.arange(size), draw, 0) for draw in range(DRAWS)]
        requests = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *drawn)
        assert ranks.shape == (size, NUM_PLANS)
        return PlanRecords(users=np.arange(size), ranks=ranks, quality=np.asarray(plan_quality(ranks)), requests=requests)

    return make
