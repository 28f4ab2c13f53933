"""What every plan would answer: the target's rank, and the slate, under each plan, for a batch of users."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.agents.device import DeviceAgent, FusionHead, without_semantics, without_structure
from cda4rec_jax.array_typing import (
    Array,
    CandidateFeatures,
    CandidateItems,
    CandidateMask,
    CandidateScores,
    Lengths,
    PlanRanks,
    SemanticEmbeddings,
)
from cda4rec_jax.messages import Candidates, EgressLevel, HistoryBatch, Placement, Plan
from cda4rec_jax.metrics import MISS_RANK
from cda4rec_jax.pipeline.catalogue import Catalogue
from cda4rec_jax.pipeline.subtasks import (
    StructuredState,
    abstract_evidence,
    gather_evidence,
    local_candidates,
    model_semantics,
    model_structure,
    rank_slate,
    release,
    released_items,
    retrieve,
    score_features,
    unseen,
)
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.planner import CACHED_CANDIDATES, PLANS, STANDARD, PlanSpace

LOCAL = "local"  # the view of the plans that ask nobody


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class View:
    """One ranked pool of candidates: what a family of plans chooses from."""

    items: CandidateItems
    allowed: CandidateMask  # real, and not seen by the user
    features: CandidateFeatures  # all of them; ``Group`` says which of them a plan ranks by


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Result of every plan, in the order of the configuration's plan space."""

    ranks: PlanRanks  # 1 is best; MISS_RANK where the target is no candidate
    slates: Int[Array, "b p k"] | None  # None where none were asked for


class Group(NamedTuple):
    """Plans that rank one pool by the same features: they differ in K and in where things are done."""

    view: str
    semantic: bool  # by the semantic scores as well
    structured: bool  # by what structured user modelling adds as well

    def read(self, features: CandidateFeatures) -> CandidateFeatures:
        """The features of the view, with zeros in what these plans do not know."""
        features = features if self.semantic else without_semantics(features)
        return features if self.structured else without_structure(features)


Scores = dict[Group, CandidateScores]


def plan_group(plan: Plan) -> Group:
    """Where a plan belongs."""
    from_cloud = "reuse" if plan.semantic is Placement.REUSE else plan.level.name.lower()
    view = from_cloud if plan.uses_link else LOCAL
    return Group(view, plan.semantic is not Placement.SKIP, plan.structured is not Placement.SKIP)


GROUPS = tuple(dict.fromkeys(plan_group(plan) for plan in PLANS))  # plans of a user's own belong to these, too


def compute_views(
    cloud: CloudAgent,
    device: DeviceAgent,
    catalogue: Catalogue,
    history: HistoryBatch,
    cache_level: Lengths,
    cache_age_events: Float[Array, "b"],
    config: SystemConfig,
) -> dict[str, View]:
    """All pools of a batch. Retrieval runs once for each semantic view, at the largest K; smaller K are prefixes."""
    num_users, pool_size = history.items.shape[0], min(config.space.max_candidates, catalogue.num_items)
    sizes = {"history_length": config.history_length, "profile_events": config.profile_events}
    now = jnp.zeros((num_users,), jnp.int32)
    age = jnp.minimum(cache_age_events.astype(jnp.int32), config.max_cache_age)
    fresh = {level.name.lower(): jnp.full((num_users,), level.value, jnp.int32) for level in list(EgressLevel)[1:]}
    sources = {name: (level, now) for name, level in fresh.items()} | {"reuse": (cache_level, age)}

    def semantics(names: tuple[str, ...], max_items: int) -> SemanticEmbeddings:
        level, ages = (jnp.concatenate(column) for column in zip(*(sources[name] for name in names), strict=True))
        abstract = release(_repeat(history, len(names)), catalogue.categories, level, ages, max_items=max_items, **sizes)
        return model_semantics(cloud, catalogue.vectors, abstract)

    # Views are rows of one batch wherever their shapes agree: one program to compile, and the catalogue is read once.
    short, long = ("profile", "recent"), ("full", "reuse")
    of_short = semantics(short, released_items(EgressLevel.RECENT, config.history_length))
    semantic = jnp.concatenate([of_short, semantics(long, config.history_length)])
    # Without the barrier XLA on a CPU fuses the search into what reads its results, which then take seven times as long.
    candidates = jax.lax.optimization_barrier(retrieve(catalogue.vectors, semantic, pool_size))

    full = release(history, catalogue.categories, fresh["full"], now, max_items=config.history_length, **sizes)
    structured = model_structure(device, full, abstract_evidence(catalogue, full))
    rank = partial(_views, catalogue, history, structured, config.without_features)
    levels, ages = (jnp.concatenate(column) for column in zip(*(sources[name] for name in (*short, *long)), strict=True))
    views = rank((*short, *long), candidates, jnp.ones(candidates.items.shape), ages, levels)

    reused = jax.tree.map(lambda column: column[-num_users:, :CACHED_CANDIDATES], candidates)
    has_cache, resident = cache_level > 0, (catalogue.resident_items, catalogue.resident_vectors)
    local = local_candidates(reused, semantic[-num_users:], *resident, has_cache)
    has_score = has_cache[:, None] & (local.items > 0)
    return views | rank((LOCAL,), local, has_score.astype(jnp.float32), age, cache_level)


def _repeat(tree: Any, times: int) -> Any:
    """Every leaf ``times`` over along its leading axis."""
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * times), tree)


def _views(
    catalogue: Catalogue,
    history: HistoryBatch,
    structured: StructuredState,
    without_features: tuple[str, ...],
    names: tuple[str, ...],
    candidates: Candidates,
    present: Float[Array, "b c"],
    age: Lengths,
    level: Lengths,
) -> dict[str, View]:
    """One view for each name, from candidates whose rows are all users for the first name, all users for the second, ..."""
    evidence = gather_evidence(catalogue, candidates.items)
    own, seen = _repeat(structured, len(names)), _repeat(history.seen, len(names))
    shared = {
        "present": present,
        "age_events": age.astype(jnp.float32),
        "level": level,
        "num_items": catalogue.num_items,
        "without": without_features,
    }
    stacked = View(
        items=candidates.items,
        allowed=unseen(candidates.items, seen, catalogue.num_items),
        features=score_features(candidates, evidence, own, **shared),
    )
    size = history.seen.shape[0]
    rows = {name: slice(number * size, (number + 1) * size) for number, name in enumerate(names)}
    return {name: jax.tree.map(lambda leaf, here=here: leaf[here], stacked) for name, here in rows.items()}


def score_views(head: FusionHead, views: dict[str, View]) -> Scores:
    """Scores of every group of plans; once each, whatever the number of plans."""
    return {group: head(group.read(views[group.view].features)) for group in GROUPS}


def _of_one_width(views: dict[str, View]) -> list[list[str]]:
    """Their names, apart by the number of candidates. Pools of one width go through one operation together.

    What is traced and compiled is the number of operations: one for each pool and plan made up a third of a decider step.
    """
    widths: dict[int, list[str]] = {}
    for name, view in views.items():
        widths.setdefault(view.items.shape[1], []).append(name)
    return list(widths.values())


def plan_limits(views: dict[str, View], space: PlanSpace = STANDARD) -> dict[Group, list[tuple[int, int]]]:
    """For each group: its plans, as (plan index, candidates that it may use)."""
    limits: dict[Group, list[tuple[int, int]]] = {}
    for index, plan in enumerate(space.plans):
        group = plan_group(plan)
        available = views[group.view].items.shape[1]
        limits.setdefault(group, []).append((index, available if group.view == LOCAL else min(plan.num_candidates, available)))
    return limits


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    """Pools of one width, for ``g`` groups of plans, and the ``q`` plans that rank them."""

    plans: Int[np.ndarray, "q"]  # by number
    groups: Int[np.ndarray, "q"]  # place of each one's group
    limits: Int[np.ndarray, "q"]  # candidates that it may use
    items: Int[Array, "g b c"]
    scores: Float[Array, "g b c"]
    allowed: Bool[Array, "g b c"]

    def is_target(self, targets: Lengths) -> Bool[Array, "g b c"]:
        """Where an allowed candidate is the target."""
        return (self.items == targets[None, :, None]) & self.allowed

    def at_limits(self, running: Shaped[Array, "g b c"]) -> Shaped[Array, "q b"]:
        """What has come together at the last candidate that each plan may use."""
        return running[self.groups, :, self.limits - 1]


def _rankings(scores: Scores, views: dict[str, View], space: PlanSpace) -> list[_Ranking]:
    limits, found = plan_limits(views, space), []
    for names in _of_one_width(views):
        groups = [group for group in limits if group.view in names]
        plans = [(plan, place, limit) for place, group in enumerate(groups) for plan, limit in limits[group]]
        columns = dict(zip(("plans", "groups", "limits"), np.asarray(plans).T, strict=True))
        items, allowed = (jnp.stack([getattr(views[group.view], field) for group in groups]) for field in ("items", "allowed"))
        found.append(_Ranking(items=items, allowed=allowed, scores=jnp.stack([scores[group] for group in groups]), **columns))
    return found


def _in_plan_order(rankings: list[_Ranking], rows: list[Shaped[Array, "_ b"]]) -> Shaped[Array, "b p"]:
    """Rows of the plans of each ranking as columns in the order of the plan space."""
    return jnp.concatenate(rows)[np.argsort(np.concatenate([ranking.plans for ranking in rankings]))].T


def target_ranks(scores: Scores, views: dict[str, View], targets: Lengths, space: PlanSpace = STANDARD) -> PlanRanks:
    """``1 + #{j != target: s_j >= s_target}`` among each plan's allowed candidates; ``MISS_RANK`` where the target is none."""
    rankings, rows = _rankings(scores, views, space), []
    for ranking in rankings:
        is_target = ranking.is_target(targets)
        target_score = jnp.sum(jnp.where(is_target, ranking.scores, 0.0), axis=2, keepdims=True)
        above = ranking.allowed & ~is_target & (ranking.scores >= target_score)
        # Running counts give every prefix of the pool at once.
        found, better = jnp.cumsum(is_target, axis=2), jnp.cumsum(above, axis=2)
        rows.append(ranking.at_limits(jnp.where(found > 0, 1 + better, MISS_RANK).astype(jnp.int32)))
    return _in_plan_order(rankings, rows)


def plan_slates(scores: Scores, views: dict[str, View], k: int, space: PlanSpace = STANDARD) -> Int[Array, "b p k"]:
    """The slate of length ``k`` under every plan; 0 where fewer candidates remain."""
    slates = {}
    for group, plans in plan_limits(views, space).items():
        view, score = views[group.view], scores[group]
        for index, limit in plans:
            slates[index] = rank_slate(view.items[:, :limit], score[:, :limit], view.allowed[:, :limit], k).items
    return jnp.stack([slates[index] for index in range(len(slates))], axis=1)


def outcomes(
    cloud: CloudAgent,
    device: DeviceAgent,
    catalogue: Catalogue,
    history: HistoryBatch,
    cache_level: Lengths,
    cache_age_events: Float[Array, "b"],
    config: SystemConfig,
    k: int = 0,
) -> Outcomes:
    """The slate and the target's rank under every plan; jit it with ``config`` and ``k`` static.

    A plan that the context forbids has an outcome too; masking is the planner's work.
    """
    views = compute_views(cloud, device, catalogue, history, cache_level, cache_age_events, config)
    scores, space = score_views(device.head, views), config.space
    slates = plan_slates(scores, views, k, space) if k else None
    return Outcomes(ranks=target_ranks(scores, views, history.targets, space), slates=slates)


def fusion_cross_entropy(
    scores: Scores, views: dict[str, View], targets: Lengths, space: PlanSpace = STANDARD
) -> tuple[Float[Array, "b p"], Bool[Array, "b p"]]:
    """Cross-entropy of the target among each plan's allowed candidates, and where there is one (a retrieval miss has none)."""
    rankings, losses, present = _rankings(scores, views, space), [], []
    for ranking in rankings:
        is_target = ranking.is_target(targets)
        found = ranking.at_limits(jnp.cumsum(is_target, axis=2) > 0)
        target_score = jnp.sum(jnp.where(is_target, ranking.scores, 0.0), axis=2)
        masked = jnp.where(ranking.allowed, ranking.scores, -1e9)
        sizes, of_size = np.unique(ranking.limits, return_inverse=True)
        totals = jnp.stack([jax.nn.logsumexp(masked[..., :size], axis=2) for size in sizes])
        losses.append(jnp.where(found, totals[of_size, ranking.groups] - target_score[ranking.groups], 0.0))
        present.append(found)
    return _in_plan_order(rankings, losses), _in_plan_order(rankings, present)
