"""The 32 plans, which of them a context allows, and what to do when the wanted plan is not allowed."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array, PlanMask
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context, EgressLevel, Link, Placement, Plan

RELEASING_LEVELS = (EgressLevel.PROFILE, EgressLevel.RECENT, EgressLevel.FULL)
CANDIDATE_COUNTS = (20, 100, 500)
LOCAL_CANDIDATES = 100  # items of the device's candidate cache

# Free memory a plan needs on the device: weights and activations of a .3B-parameter model at 4 bits (150 MB of weights), and the
# activations of ranking 500 candidates at once; smaller candidate sets fit in what the app holds anyway.
STRUCTURED_MEMORY_MB = 192.0
LARGE_RANKING_MEMORY_MB = 64.0


def _fresh(level: EgressLevel, num_candidates: int, structured: Placement) -> Plan:
    return Plan(
        semantic=Placement.CLOUD,
        retrieval=Placement.CLOUD,
        level=level,
        num_candidates=num_candidates,
        structured=structured,
        ranking=Placement.DEVICE,
    )


def _reuse(num_candidates: int, structured: Placement) -> Plan:
    return Plan(
        semantic=Placement.REUSE,
        retrieval=Placement.CLOUD,
        level=EgressLevel.NOTHING,
        num_candidates=num_candidates,
        structured=structured,
        ranking=Placement.DEVICE,
    )


def _local(semantic: Placement, structured: Placement) -> Plan:
    return Plan(
        semantic=semantic,
        retrieval=Placement.DEVICE_CACHE,
        level=EgressLevel.NOTHING,
        num_candidates=LOCAL_CANDIDATES,
        structured=structured,
        ranking=Placement.DEVICE,
    )


def _cloud(level: EgressLevel, structured: Placement) -> Plan:
    return Plan(
        semantic=Placement.CLOUD,
        retrieval=Placement.CLOUD,
        level=level,
        num_candidates=100,
        structured=structured,
        ranking=Placement.CLOUD,
    )


_DEVICE_OR_SKIP = (Placement.DEVICE, Placement.SKIP)

PLANS: tuple[Plan, ...] = (
    *(_fresh(level, k, structured) for level in RELEASING_LEVELS for k in CANDIDATE_COUNTS for structured in _DEVICE_OR_SKIP),
    *(_reuse(k, structured) for k in CANDIDATE_COUNTS for structured in _DEVICE_OR_SKIP),
    *(_local(semantic, structured) for semantic in (Placement.REUSE, Placement.SKIP) for structured in _DEVICE_OR_SKIP),
    *(_cloud(level, Placement.SKIP) for level in RELEASING_LEVELS),
    _cloud(EgressLevel.FULL, Placement.CLOUD),
)
NUM_PLANS = len(PLANS)


def plan_index(name: str) -> int:
    """Position of the plan called ``name`` in ``PLANS``.

    Raises:
      UserError: no plan has that name.
    """
    names = [plan.name for plan in PLANS]
    if name not in names:
        raise UserError(f"unknown plan {name!r}: expected one of {', '.join(names)}")
    return names.index(name)


@dataclass(frozen=True, kw_only=True)
class PlanTable:
    """The plans as columns: numpy constants of shape [p], ready for jitted code."""

    level: np.ndarray  # int, EgressLevel of the fresh abstract
    candidates: np.ndarray  # float, number of candidates
    candidates_index: np.ndarray  # int, position in CANDIDATE_COUNTS
    uses_link: np.ndarray  # bool
    semantic_cloud: np.ndarray  # bool
    semantic_reuse: np.ndarray  # bool
    structured_device: np.ndarray  # bool
    structured_cloud: np.ndarray  # bool
    ranking_cloud: np.ndarray  # bool
    memory_mb: np.ndarray  # float, free memory needed on the device


def plan_table(plans: Sequence[Plan]) -> PlanTable:
    """Columns of ``plans``; every number of candidates must be one of ``CANDIDATE_COUNTS``."""

    def column(values: list) -> np.ndarray:
        return np.asarray(values)

    needs_structured = column([plan.structured is Placement.DEVICE for plan in plans])
    ranks_many = column([plan.num_candidates > 100 for plan in plans])
    return PlanTable(
        level=column([int(plan.level) for plan in plans]),
        candidates=column([plan.num_candidates for plan in plans]).astype(np.float32),
        candidates_index=column([CANDIDATE_COUNTS.index(plan.num_candidates) for plan in plans]),
        uses_link=column([plan.uses_link for plan in plans]),
        semantic_cloud=column([plan.semantic is Placement.CLOUD for plan in plans]),
        semantic_reuse=column([plan.semantic is Placement.REUSE for plan in plans]),
        structured_device=needs_structured,
        structured_cloud=column([plan.structured is Placement.CLOUD for plan in plans]),
        ranking_cloud=column([plan.ranking is Placement.CLOUD for plan in plans]),
        memory_mb=(needs_structured * STRUCTURED_MEMORY_MB + ranks_many * LARGE_RANKING_MEMORY_MB).astype(np.float32),
    )


PLAN_TABLE = plan_table(PLANS)
LAST_RESORT = plan_index("local-skip-skip")


def plan_features() -> Float[Array, "p f"]:
    """phi(plan): what a policy may know of a plan, each feature in [0, 1].

    Columns: fresh level PROFILE, RECENT, FULL; semantic CLOUD, REUSE; log of the number of candidates over that of 500; uses the
    link; structured DEVICE, CLOUD; ranking CLOUD.
    """
    table = PLAN_TABLE
    columns = [
        *(table.level == int(level) for level in RELEASING_LEVELS),
        table.semantic_cloud,
        table.semantic_reuse,
        np.log(table.candidates) / np.log(CANDIDATE_COUNTS[-1]),
        table.uses_link,
        table.structured_device,
        table.structured_cloud,
        table.ranking_cloud,
    ]
    return jnp.asarray(np.stack([np.asarray(column, np.float32) for column in columns], axis=1))


def allowed(context: Context) -> PlanMask:
    """Plans that the context permits; jittable. True at [b, p] where all of these hold:

    - the level of what would leave is within consent (a reused embedding leaves at the level that it was made from);
    - a plan that reuses the cached embedding finds one;
    - a plan that uses the link finds it believed up;
    - the device has the free memory that structured modelling and ranking 500 candidates need.

    ``local-skip-skip`` is always allowed, so no row is empty.
    """
    table = PLAN_TABLE
    cache_level, consent = context.cache_level[:, None], context.consent[:, None]
    is_reuse, uses_link = jnp.asarray(table.semantic_reuse)[None, :], jnp.asarray(table.uses_link)[None, :]
    egress = jnp.where(is_reuse & uses_link, cache_level, jnp.asarray(table.level)[None, :])
    mask = (
        (egress <= consent)
        & (~is_reuse | (cache_level > EgressLevel.NOTHING))
        & (~uses_link | (context.link[:, None] != Link.OFFLINE))
        & (jnp.asarray(table.memory_mb)[None, :] <= context.free_memory_mb[:, None])
    )
    return mask | (jnp.arange(NUM_PLANS) == LAST_RESORT)[None, :]


def _repair_key(wanted: Plan, other: Plan) -> tuple[int, int, int] | None:
    """Rank of ``other`` among the replacements of ``wanted`` (lower is tried first), or None where it is none."""
    if wanted.structured is other.structured:
        downgrade = 0
    elif (wanted.structured, other.structured) == (Placement.CLOUD, Placement.DEVICE):
        downgrade = 1
    elif other.structured is Placement.SKIP:
        downgrade = 2
    else:
        return None
    if not other.uses_link:
        reuses = other.semantic is Placement.REUSE
        return None if reuses and wanted.semantic is Placement.SKIP else (20, downgrade, 0 if reuses else 1)
    if not wanted.uses_link or other.num_candidates > wanted.num_candidates:
        return None
    if other.semantic is Placement.REUSE:
        return 10, downgrade, -other.num_candidates
    same_kind = (wanted.semantic, wanted.ranking) == (other.semantic, other.ranking)
    if not same_kind or other.level > wanted.level:
        return None
    return EgressLevel.FULL - other.level, downgrade, -other.num_candidates


def _repair_order() -> np.ndarray:
    """[p, p]: row w lists the plans to try when w is wanted, padded with the last resort."""
    rows = np.full((NUM_PLANS, NUM_PLANS), LAST_RESORT)
    for wanted_index, wanted in enumerate(PLANS):
        keys = {index: _repair_key(wanted, other) for index, other in enumerate(PLANS) if index != wanted_index}
        order = sorted((key, index) for index, key in keys.items() if key is not None)
        row = [wanted_index, *(index for _, index in order)]
        rows[wanted_index, : len(row)] = row
    return rows


REPAIR_ORDER = _repair_order()


def repair(plan_indices: Int[Array, "b"], mask: PlanMask) -> Int[Array, "b"]:
    """The first allowed plan of the declared repair order of each wanted plan; jittable.

    The order: the plan itself; the same kind at the same level, then at lower levels; then reuse; then local. Within a step
    structured modelling is kept if it can be (CLOUD may become DEVICE, either may become SKIP, SKIP stays SKIP), then as many
    candidates as can be, never more than wanted. A row whose order is exhausted gets ``local-skip-skip``.
    """
    order = jnp.asarray(REPAIR_ORDER)[plan_indices]
    first = jnp.argmax(jnp.take_along_axis(mask, order, axis=1), axis=1)
    return jnp.take_along_axis(order, first[:, None], axis=1)[:, 0]


def local_repair(mask: PlanMask) -> Int[Array, "b p"]:
    """For each plan, the local plan that answers when its link fails: [b, p] indices of plans that use no link. Jittable."""
    local_mask: Bool[Array, "b p"] = mask & ~jnp.asarray(PLAN_TABLE.uses_link)[None, :]
    permitted = local_mask[:, jnp.asarray(REPAIR_ORDER)]  # [b, p, p]
    first = jnp.argmax(permitted, axis=2)
    return jnp.asarray(REPAIR_ORDER)[jnp.arange(NUM_PLANS)[None, :], first]
