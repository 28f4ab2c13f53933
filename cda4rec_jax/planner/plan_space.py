"""The plans there are to choose from, which of them a context allows, and what to do when the wanted plan is not allowed.

``STANDARD`` holds the 32 plans of this project. A ``PlanSpace`` with plans of a user's own begins with them, so that an index, a name and
a planner that knows the standard plans mean the same in every space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array, PlanMask, PlanValues
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context, EgressLevel, Link, Placement, Plan

RELEASING_LEVELS = (EgressLevel.PROFILE, EgressLevel.RECENT, EgressLevel.FULL)
CANDIDATE_COUNTS = (20, 100, 500)
CACHED_CANDIDATES = 100  # that a device keeps from its last call, beside the resident items, whose records it always holds
RESIDENT_CANDIDATES = 100  # that a device finds for an embedding among the resident items
OWN_CANDIDATES = 200  # that it finds there by its own user state
NEIGHBOUR_EVENTS = 5  # newest events, whose neighbours it looks for there

# Free memory a plan needs on the device: weights and activations of a .3B-parameter model at 4 bits (150 MB of weights), and the
# activations of ranking 500 candidates at once; smaller candidate sets fit in what the app holds anyway.
STRUCTURED_MEMORY_MB = 192.0
LARGE_RANKING_MEMORY_MB = 64.0


def fresh_plan(level: EgressLevel, num_candidates: int, structured: Placement) -> Plan:
    """The cloud models the user from an abstract at ``level`` and finds candidates; the device ranks them."""
    return Plan(
        semantic=Placement.CLOUD,
        retrieval=Placement.CLOUD,
        level=level,
        num_candidates=num_candidates,
        structured=structured,
        ranking=Placement.DEVICE,
    )


def reuse_plan(num_candidates: int, structured: Placement) -> Plan:
    """The device sends its cached embedding back, the cloud finds candidates, and the device ranks them."""
    return Plan(
        semantic=Placement.REUSE,
        retrieval=Placement.CLOUD,
        level=EgressLevel.NOTHING,
        num_candidates=num_candidates,
        structured=structured,
        ranking=Placement.DEVICE,
    )


def cloud_plan(level: EgressLevel, num_candidates: int, structured: Placement) -> Plan:
    """The cloud does everything but the abstract."""
    return Plan(
        semantic=Placement.CLOUD,
        retrieval=Placement.CLOUD,
        level=level,
        num_candidates=num_candidates,
        structured=structured,
        ranking=Placement.CLOUD,
    )


def _local_plan(semantic: Placement, structured: Placement) -> Plan:
    return Plan(
        semantic=semantic,
        retrieval=Placement.DEVICE_CACHE,
        level=EgressLevel.NOTHING,
        num_candidates=CACHED_CANDIDATES,
        structured=structured,
        ranking=Placement.DEVICE,
    )


_DEVICE_OR_SKIP = (Placement.DEVICE, Placement.SKIP)

PLANS: tuple[Plan, ...] = (
    *(fresh_plan(level, k, structured) for level in RELEASING_LEVELS for k in CANDIDATE_COUNTS for structured in _DEVICE_OR_SKIP),
    *(reuse_plan(k, structured) for k in CANDIDATE_COUNTS for structured in _DEVICE_OR_SKIP),
    *(_local_plan(semantic, structured) for semantic in (Placement.REUSE, Placement.SKIP) for structured in _DEVICE_OR_SKIP),
    *(cloud_plan(level, 100, Placement.SKIP) for level in RELEASING_LEVELS),
    cloud_plan(EgressLevel.FULL, 100, Placement.CLOUD),
)
NUM_PLANS = len(PLANS)
MAX_PLANS = 255  # evaluation keeps choices in a byte


@dataclass(frozen=True, kw_only=True)
class PlanTable:
    """The plans as columns: numpy constants of shape [p], ready for jitted code."""

    level: np.ndarray  # int, EgressLevel of the fresh abstract
    candidates: np.ndarray  # float, number of candidates
    candidates_index: np.ndarray  # int, position in CANDIDATE_COUNTS of the largest count that is not above it
    candidates_fraction: np.ndarray  # float in [0, 1), how far it is from there to the next count
    uses_link: np.ndarray  # bool
    semantic_cloud: np.ndarray  # bool
    semantic_reuse: np.ndarray  # bool
    structured_device: np.ndarray  # bool
    structured_cloud: np.ndarray  # bool
    ranking_cloud: np.ndarray  # bool
    memory_mb: np.ndarray  # float, free memory needed on the device


def _plan_table(plans: tuple[Plan, ...]) -> PlanTable:
    def column(values: list) -> np.ndarray:
        return np.asarray(values)

    needs_structured = column([plan.structured is Placement.DEVICE for plan in plans])
    ranks_many = column([plan.num_candidates > 100 and plan.ranking is Placement.DEVICE for plan in plans])
    candidates = column([plan.num_candidates for plan in plans]).astype(np.float32)
    place = np.interp(candidates, CANDIDATE_COUNTS, np.arange(len(CANDIDATE_COUNTS)))
    return PlanTable(
        level=column([int(plan.level) for plan in plans]),
        candidates=candidates,
        candidates_index=place.astype(np.int64),
        candidates_fraction=(place % 1.0).astype(np.float32),
        uses_link=column([plan.uses_link for plan in plans]),
        semantic_cloud=column([plan.semantic is Placement.CLOUD for plan in plans]),
        semantic_reuse=column([plan.semantic is Placement.REUSE for plan in plans]),
        structured_device=needs_structured,
        structured_cloud=column([plan.structured is Placement.CLOUD for plan in plans]),
        ranking_cloud=column([plan.ranking is Placement.CLOUD for plan in plans]),
        memory_mb=(needs_structured * STRUCTURED_MEMORY_MB + ranks_many * LARGE_RANKING_MEMORY_MB).astype(np.float32),
    )


def plan_problems(plan: Plan) -> list[str]:
    """Why a plan cannot be run, in words; empty where it can.

    - Candidates come from the cloud, for an embedding that is fresh (from an abstract at a releasing level) or reused (level NOTHING), and
      there are as many of them as costs are known for; or from the device's cache, with a reused embedding or none, all of them.
    - The cloud ranks from a fresh abstract, without what the device knows; it models structure at FULL, for its own ranking.
    """
    low, high = CANDIDATE_COUNTS[0], CANDIDATE_COUNTS[-1]
    fresh, local = plan.semantic is Placement.CLOUD, plan.retrieval is Placement.DEVICE_CACHE
    in_cloud = plan.ranking is Placement.CLOUD
    checks = {
        "retrieval must be CLOUD or DEVICE_CACHE": local or plan.retrieval is Placement.CLOUD,
        "ranking must be DEVICE or CLOUD": in_cloud or plan.ranking is Placement.DEVICE,
        "structured must be DEVICE, CLOUD or SKIP": plan.structured in (Placement.DEVICE, Placement.CLOUD, Placement.SKIP),
        "semantic must be CLOUD or REUSE with retrieval CLOUD, REUSE or SKIP with DEVICE_CACHE": plan.semantic
        in ((Placement.REUSE, Placement.SKIP) if local else (Placement.CLOUD, Placement.REUSE)),
        "level must be PROFILE, RECENT or FULL where semantic is CLOUD, else NOTHING": fresh
        == (plan.level is not EgressLevel.NOTHING),
        f"num_candidates must be a whole number from {low} to {high}": isinstance(plan.num_candidates, int)
        and low <= plan.num_candidates <= high,
        f"num_candidates must be {CACHED_CANDIDATES} with retrieval DEVICE_CACHE": not local
        or plan.num_candidates == CACHED_CANDIDATES,
        "ranking CLOUD needs semantic CLOUD, and structured CLOUD or SKIP": not in_cloud
        or (fresh and plan.structured is not Placement.DEVICE),
        "structured CLOUD needs level FULL and ranking CLOUD": plan.structured is not Placement.CLOUD
        or (in_cloud and plan.level is EgressLevel.FULL),
    }
    return [f"{plan.name}: {rule}" for rule, holds in checks.items() if not holds]


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


RESERVED_TERMS = ("quality", "time", "energy", "exposure", "utility")  # terms that every plan has
CostTerm = Callable[..., PlanValues]
"""A cost of a user's own: a named pure function ``(context, costs, table) -> [b, p]`` in units of utility, with the ``PlanCosts`` of the
requests and the ``PlanTable`` of the space. Utility is less by it, and it is 0 or more where a plan is dear."""


@dataclass(frozen=True, kw_only=True)
class PlanSpace:
    """The plans there are to choose from, and what they cost beyond time, energy and exposure.

    A value: hashable, equal where its plans and terms are, and static wherever it travels in a tree of arrays.

    Attributes:
        plans: the standard plans, then a user's own, which differ from all others by name.
        cost_terms: of the user's own; a function's ``__name__`` is the term's.

    Raises:
        UserError: the plans do not begin with the standard ones, two have one name, or one cannot be run; two terms have one name, or
            one has none.
    """

    plans: tuple[Plan, ...] = PLANS
    cost_terms: tuple[CostTerm, ...] = ()

    def __post_init__(self):
        problems = [problem for plan in self.plans for problem in plan_problems(plan)]
        if self.plans[: len(PLANS)] != PLANS:
            problems.append(f"the first {len(PLANS)} plans are not the standard ones: put plans of your own after them")
        if len(self.plans) > MAX_PLANS:
            problems.append(f"{len(self.plans)} plans are more than {MAX_PLANS}")
        for kind, names in (("plans", [plan.name for plan in self.plans]), ("cost terms", list(self.term_names))):
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                problems.append(f"several {kind} have the name {', '.join(repeated)}: each must differ from all others")
        if unfit := [name for name in self.term_names if not name.isidentifier() or name in RESERVED_TERMS]:
            problems.append(f"cost terms may not be called {', '.join(unfit)}: write each as a function with a name of its own")
        if problems:
            raise UserError("bad plan space: " + "; ".join(problems))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.plans, self.cost_terms))

    @property
    def num_plans(self) -> int:
        return len(self.plans)

    @property
    def own_plans(self) -> tuple[Plan, ...]:
        """The plans that are not standard."""
        return self.plans[len(PLANS) :]

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the cost terms."""
        return tuple(getattr(term, "__name__", repr(term)) for term in self.cost_terms)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the plans."""
        return tuple(plan.name for plan in self.plans)

    @cached_property
    def table(self) -> PlanTable:
        """The plans as columns."""
        return _plan_table(self.plans)

    @cached_property
    def last_resort(self) -> int:
        """Index of ``local-skip-skip``, which every context allows."""
        return self.index("local-skip-skip")

    @cached_property
    def max_candidates(self) -> int:
        """The largest number of candidates that a plan asks for."""
        return max(plan.num_candidates for plan in self.plans)

    @cached_property
    def features(self) -> Float[np.ndarray, "p f"]:
        """phi(plan): what a policy may know of a plan, each feature in [0, 1].

        Columns: fresh level PROFILE, RECENT, FULL; semantic CLOUD, REUSE; log of the number of candidates over that of 500; uses the
        link; structured DEVICE, CLOUD; ranking CLOUD.
        """
        table = self.table
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
        return np.stack([np.asarray(column, np.float32) for column in columns], axis=1)

    @cached_property
    def repair_order(self) -> Int[np.ndarray, "p p"]:
        """Row w lists the plans to try when w is wanted, padded with the last resort."""
        rows = np.full((self.num_plans, self.num_plans), self.last_resort)
        for wanted_index, wanted in enumerate(self.plans):
            keys = {index: _repair_key(wanted, other) for index, other in enumerate(self.plans) if index != wanted_index}
            order = sorted((key, index) for index, key in keys.items() if key is not None)
            row = [wanted_index, *(index for _, index in order)]
            rows[wanted_index, : len(row)] = row
        return rows

    def index(self, name: str) -> int:
        """Position of the plan called ``name``.

        Raises:
          UserError: no plan has that name.
        """
        if name not in self.names:
            raise UserError(f"unknown plan {name!r}: expected one of {', '.join(self.names)}")
        return self.names.index(name)


STANDARD = PlanSpace()


def plan_index(name: str) -> int:
    """Position of the standard plan called ``name``, in every space. Raises UserError where there is none."""
    return STANDARD.index(name)


def allowed(context: Context, space: PlanSpace = STANDARD) -> PlanMask:
    """Plans that the context permits; jittable. True at [b, p] where all of these hold:

    - the level of what would leave is within consent (a reused embedding leaves at the level that it was made from);
    - a plan that reuses the cached embedding finds one;
    - a plan that uses the link finds it believed up;
    - the device has the free memory that structured modelling and ranking 500 candidates need.

    ``local-skip-skip`` is always allowed, so no row is empty.
    """
    table = space.table
    cache_level, consent = context.cache_level[:, None], context.consent[:, None]
    is_reuse, uses_link = jnp.asarray(table.semantic_reuse)[None, :], jnp.asarray(table.uses_link)[None, :]
    egress = jnp.where(is_reuse & uses_link, cache_level, jnp.asarray(table.level)[None, :])
    mask = (
        (egress <= consent)
        & (~is_reuse | (cache_level > EgressLevel.NOTHING))
        & (~uses_link | (context.link[:, None] != Link.OFFLINE))
        & (jnp.asarray(table.memory_mb)[None, :] <= context.free_memory_mb[:, None])
    )
    return mask | (jnp.arange(space.num_plans) == space.last_resort)[None, :]


def repair(plan_indices: Int[Array, "b"], mask: PlanMask, space: PlanSpace = STANDARD) -> Int[Array, "b"]:
    """The first allowed plan of the declared repair order of each wanted plan; jittable.

    The order: the plan itself; the same kind at the same level, then at lower levels; then reuse; then local. Within a step
    structured modelling is kept if it can be (CLOUD may become DEVICE, either may become SKIP, SKIP stays SKIP), then as many
    candidates as can be, never more than wanted. A row whose order is exhausted gets ``local-skip-skip``.
    """
    order = jnp.asarray(space.repair_order)[plan_indices]
    first = jnp.argmax(jnp.take_along_axis(mask, order, axis=1), axis=1)
    return jnp.take_along_axis(order, first[:, None], axis=1)[:, 0]


def local_repair(mask: PlanMask, space: PlanSpace = STANDARD) -> Int[Array, "b p"]:
    """For each plan, the local plan that answers when its link fails: [b, p] indices of plans that use no link. Jittable."""
    order = jnp.asarray(space.repair_order)
    local_mask: Bool[Array, "b p"] = mask & ~jnp.asarray(space.table.uses_link)[None, :]
    permitted = local_mask[:, order]  # [b, p, p]
    first = jnp.argmax(permitted, axis=2)
    return order[jnp.arange(space.num_plans)[None, :], first]
