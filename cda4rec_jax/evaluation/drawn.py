"""Requests in simulated contexts without the models: under another cost profile, or at other prices."""

from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Int

from cda4rec_jax.links import LinkConfig
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.pipeline.full_ranking import in_batches
from cda4rec_jax.pipeline.population import BATCH_USERS, PlanRecords, compiled_draw, compiled_redraw
from cda4rec_jax.planner import ContextConfig, plan_quality
from cda4rec_jax.planner.contexts import NUM_PRICES
from cda4rec_jax.runs.artifacts import TrainedSystem


def drawn_records(
    trained: TrainedSystem,
    world: PlanningWorld,
    ranks: Int[np.ndarray, "n p"],
    users: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n"],
    *,
    draws: int,
) -> PlanRecords:
    """What ``Population.records`` gives, from ``ranks`` that it gave before: no model is run.

    Outcomes depend on the cache of an event's first context alone, so ``world`` may be any.
    """
    drawing = {"contexts": ContextConfig(), "links": LinkConfig()}
    blocks = []
    for index in in_batches(len(users), BATCH_USERS):
        size = len(np.unique(index))
        history = trained.corpus.histories(users[index], positions[index], trained.config.stored_events)
        first = compiled_draw(world, history, trained.tables, 0, max_cache_age=trained.config.max_cache_age, **drawing)
        drawn = [first, *(compiled_redraw(world, first.context, history.event_ids, draw, **drawing) for draw in range(1, draws))]
        blocks.append(jax.tree.map(lambda *leaves, size=size: np.stack([np.asarray(leaf)[:size] for leaf in leaves]), *drawn))
    requests = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *blocks)
    return PlanRecords(users=users, ranks=ranks, quality=np.asarray(plan_quality(ranks)), requests=requests)


def priced(records: PlanRecords, world: PlanningWorld, lambdas: tuple[float, float, float]) -> PlanRecords:
    """The same requests, all at one price of time, energy and exposure: w_j = lambda_j dQ / (3 dC_j), as in contexts v1.

    Costs do not depend on prices; only what they are worth changes.
    """
    scales, context = world.scales, records.requests.context
    gaps = {"ms": scales.latency_gap_ms, "mj": scales.energy_gap_mj, "exposure": scales.exposure_gap}
    prices = {
        f"utility_per_{unit}": np.full_like(context.utility_per_ms, price * float(scales.quality_gap) / (NUM_PRICES * float(gap)))
        for price, (unit, gap) in zip(lambdas, gaps.items(), strict=True)
    }
    return replace(records, requests=replace(records.requests, context=replace(context, **prices)))
