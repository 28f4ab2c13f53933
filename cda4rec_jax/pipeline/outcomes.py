"""What every plan would answer: the target's rank, and the slate, under each plan, for a batch of users."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from cda4rec_jax.messages import EgressLevel, HistoryBatch, Placement, Plan
from cda4rec_jax.metrics import MISS_RANK
from cda4rec_jax.pipeline.catalogue import Catalogue
from cda4rec_jax.pipeline.subtasks import (
    abstract_evidence,
    gather_evidence,
    model_semantics,
    model_structure,
    rank_slate,
    release,
    released_items,
    retrieve,
    score_features,
    unseen,
    with_residents,
)
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.planner import PLANS, RESIDENT_CANDIDATES, STANDARD, PlanSpace

REUSE = "reuse"  # the view through the embedding that the device keeps
SMOOTH_RANK_TEMPERATURE = 0.5  # in logits
VIEWS = (*(level.name.lower() for level in list(EgressLevel)[1:]), REUSE)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class View:
    """What a family of plans ranks: ``c`` candidates of the cloud, best first, and ``m`` resident items (``subtasks.with_residents``)."""

    items: CandidateItems  # [b, c + m]
    allowed: CandidateMask  # real, and not seen by the user
    features: CandidateFeatures  # all of them; ``Group`` says which of them a plan ranks by
    places: Int[
        Array, "b m"
    ]  # of the resident items among the candidates: c where one is none of them, -1 where it is a second time

    @property
    def num_candidates(self) -> int:
        return self.items.shape[1] - self.places.shape[1]


class Pool(NamedTuple):
    """Which part of a view a plan ranks: so many candidates of the cloud, and of the resident items those that are none of these."""

    candidates: int
    residents: int

    def mask(self, num_candidates: int, places: Int[Array, "*b m"]) -> Bool[Array, "*b w"]:
        """True where a view of so many candidates, with its resident items at ``places`` among them, is in the pool."""
        of_cloud = jnp.broadcast_to(jnp.arange(num_candidates) < self.candidates, (*places.shape[:-1], num_candidates))
        of_device = jnp.broadcast_to(jnp.arange(places.shape[-1]) < self.residents, places.shape)
        return jnp.concatenate([of_cloud, of_device & (places >= self.candidates)], axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Result of every plan, in the order of the configuration's plan space."""

    ranks: PlanRanks  # 1 is best; MISS_RANK where the target is no candidate, 0 where a score is NaN
    slates: Int[Array, "b p k"] | None  # None where none were asked for


class Group(NamedTuple):
    """Plans that score one view by the same features: they differ in the pool and in where things are done."""

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
    view = plan.level.name.lower() if plan.semantic is Placement.CLOUD else REUSE
    return Group(view, plan.semantic is not Placement.SKIP, plan.structured is not Placement.SKIP)


def plan_pool(plan: Plan, view: View) -> Pool:
    """What a plan ranks of its view. A device finds resident items by its user state where it models one; the cloud ranks its own alone."""
    residents = view.places.shape[1] if plan.structured is Placement.DEVICE else RESIDENT_CANDIDATES
    return Pool(min(plan.num_candidates, view.num_candidates), residents if plan.ranking is Placement.DEVICE else 0)


GROUPS = tuple(dict.fromkeys(plan_group(plan) for plan in PLANS))  # plans of a user's own belong to these, too


def compute_views(
    cloud: CloudAgent,
    device: DeviceAgent,
    catalogue: Catalogue,
    history: HistoryBatch,
    cache_level: Lengths,
    cache_age_events: Float[Array, "b"],
    config: SystemConfig,
    names: tuple[str, ...] = VIEWS,
) -> dict[str, View]:
    """Views of a batch: all, or those of these names. Retrieval runs once for each, at the largest K; smaller K are prefixes."""
    num_users, pool_size = history.items.shape[0], min(config.space.max_candidates, catalogue.num_items)
    sizes = {"history_length": config.history_length, "profile_events": config.profile_events}
    now = jnp.zeros((num_users,), jnp.int32)
    age = jnp.minimum(cache_age_events.astype(jnp.int32), config.max_cache_age)
    at_level = {level.name.lower(): jnp.full((num_users,), level.value, jnp.int32) for level in list(EgressLevel)[1:]}
    sources = {name: (level, now) for name, level in at_level.items()} | {REUSE: (cache_level, age)}
    sources = {name: sources[name] for name in VIEWS if name in names}

    def semantics(names: tuple[str, ...], max_items: int) -> SemanticEmbeddings:
        level, ages = (jnp.concatenate(column) for column in zip(*(sources[name] for name in names), strict=True))
        abstract = release(_repeat(history, len(names)), catalogue.categories, level, ages, max_items=max_items, **sizes)
        return model_semantics(cloud, catalogue.vectors, abstract)

    # Views are rows of one batch wherever their shapes agree: one program to compile, and the catalogue is read once.
    short = tuple(name for name in sources if name in VIEWS[:2])
    widths = {
        short: released_items(EgressLevel.RECENT, config.history_length),
        tuple(sources)[len(short) :]: config.history_length,
    }
    semantic = jnp.concatenate([semantics(few, width) for few, width in widths.items() if few])
    levels, ages = (jnp.concatenate(column) for column in zip(*sources.values(), strict=True))
    known = levels > EgressLevel.NOTHING  # the level of a cached embedding, where there is none
    full = release(history, catalogue.categories, at_level["full"], now, max_items=config.history_length, **sizes)
    structured = _repeat(model_structure(device, full, abstract_evidence(catalogue, full)), len(sources))
    found = retrieve(catalogue.vectors, semantic, pool_size)
    found = replace(found, items=jnp.where(known[:, None], found.items, 0))
    candidates, places = with_residents(found, semantic, known, structured, catalogue.residents, catalogue.num_items)
    stacked = View(
        items=candidates.items,
        allowed=unseen(candidates.items, _repeat(history.seen, len(sources)), catalogue.num_items),
        features=score_features(
            candidates,
            gather_evidence(catalogue, candidates.items),
            structured,
            age_events=ages.astype(jnp.float32),
            level=levels,
            num_items=catalogue.num_items,
            without=config.without_features,
        ),
        places=places,
    )
    rows = {name: slice(number * num_users, (number + 1) * num_users) for number, name in enumerate(sources)}
    return {name: jax.tree.map(lambda leaf, here=here: leaf[here], stacked) for name, here in rows.items()}


def _repeat(tree: Any, times: int) -> Any:
    """Every leaf ``times`` over along its leading axis."""
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * times), tree)


def score_views(head: FusionHead, views: dict[str, View]) -> Scores:
    """Scores of every group of plans; once each, whatever the number of plans."""
    return {group: head(group.read(views[group.view].features)) for group in GROUPS if group.view in views}


@dataclass(frozen=True, kw_only=True)
class _Rankings:
    """The views that ``g`` groups of plans score, stacked, and what each of the ``p`` plans of these groups ranks of them.

    Plans go through one operation together: what is traced and compiled is the number of operations, and one for each plan and pool made
    up a third of a decider step.
    """

    groups: Int[np.ndarray, "p"]  # place of each plan's group
    pools: tuple[Pool, ...]  # of each plan
    num_candidates: int
    items: Int[Array, "g b w"]
    scores: Float[Array, "g b w"]
    allowed: Bool[Array, "g b w"]
    places: Int[Array, "g b m"]

    @classmethod
    def of(cls, scores: Scores, views: dict[str, View], space: PlanSpace) -> "_Rankings":
        groups, plans = list(scores), [plan for plan in space.plans if plan_group(plan) in scores]
        width = views[groups[0].view].num_candidates
        stacked = {
            name: jnp.stack([getattr(views[group.view], name) for group in groups]) for name in ("items", "allowed", "places")
        }
        return cls(
            groups=np.asarray([groups.index(plan_group(plan)) for plan in plans]),
            pools=tuple(plan_pool(plan, views[plan_group(plan).view]) for plan in plans),
            num_candidates=width,
            scores=jnp.stack([scores[group] for group in groups]),
            **stacked,
        )

    def is_target(self, targets: Lengths) -> Bool[Array, "g b w"]:
        """Where an allowed candidate is the target."""
        return (self.items == targets[None, :, None]) & self.allowed

    def over_pools(self, total: Callable[[Bool[Array, "g b w"]], Shaped[Array, "g b"]]) -> Shaped[Array, "b p"]:
        """``total`` of what each plan ranks, told where that is; once for each pool that there is."""
        distinct = list(dict.fromkeys(self.pools))
        totals = jnp.stack([total(self.allowed & pool.mask(self.num_candidates, self.places)) for pool in distinct])
        return totals[np.asarray([distinct.index(pool) for pool in self.pools]), self.groups].T


def target_ranks(scores: Scores, views: dict[str, View], targets: Lengths, space: PlanSpace = STANDARD) -> PlanRanks:
    """``1 + #{j != target: s_j >= s_target}`` among each plan's allowed candidates; ``MISS_RANK`` where the target is none.

    An item that is a candidate and resident, too, is in a view twice, and in a pool once. Its own score there is the one that counts.
    Of some views alone there are ranks of the plans alone that rank one of these, in their order.
    """
    rankings = _Rankings.of(scores, views, space)
    is_target = rankings.is_target(targets)

    def rank(pool: Bool[Array, "g b w"]) -> Int[Array, "g b"]:
        own = is_target & pool
        target_score = jnp.sum(jnp.where(own, rankings.scores, 0.0), axis=2, keepdims=True)
        above = jnp.sum(pool & ~own & (rankings.scores >= target_score), axis=2)
        return jnp.where(jnp.any(own, axis=2), 1 + above, MISS_RANK).astype(jnp.int32)

    return rankings.over_pools(rank)


def marked_ranks(scores: Scores, views: dict[str, View], targets: Lengths, space: PlanSpace = STANDARD) -> PlanRanks:
    """``target_ranks``, but 0 for a user with a score that is NaN, to whom every comparison gives the first rank: see ``checked_ranks``."""
    broken = jnp.any(jnp.stack([jnp.isnan(own).any(axis=1) for own in scores.values()]), axis=0)
    return jnp.where(broken[:, None], 0, target_ranks(scores, views, targets, space))


def plan_slates(scores: Scores, views: dict[str, View], k: int, space: PlanSpace = STANDARD) -> Int[Array, "b p k"]:
    """The slate of length ``k`` under every plan; 0 where fewer candidates remain."""
    slates = []
    for plan in space.plans:
        group = plan_group(plan)
        view = views[group.view]
        pool = plan_pool(plan, view).mask(view.num_candidates, view.places)
        slates.append(rank_slate(view.items, scores[group], view.allowed & pool, k).items)
    return jnp.stack(slates, axis=1)


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
    return Outcomes(ranks=marked_ranks(scores, views, history.targets, space), slates=slates)


def fusion_losses(
    scores: Scores, views: dict[str, View], targets: Lengths, space: PlanSpace = STANDARD, ndcg_weight: float = 0.0
) -> tuple[Float[Array, "b p"], Bool[Array, "b p"]]:
    """What the fusion head is to minimise for each plan, and where there is anything (a retrieval miss has none).

    Cross-entropy of the target among the plan's allowed candidates, less ``ndcg_weight`` times its smoothed ndcg ``1 / log2(1 + r)``, of
    ``r = 1 + sum_j sigmoid((s_j - s_target) / T)`` over the other ones (ApproxNDCG: Qin, Liu and Li, Information Retrieval 13, 2010).
    Cross-entropy looks at targets far down as well, which no slate shows; ndcg alone would have no gradient for them at all.
    """
    rankings = _Rankings.of(scores, views, space)
    is_target = rankings.is_target(targets)

    def loss(pool: Bool[Array, "g b w"]) -> Float[Array, "g b"]:
        own = is_target & pool
        target_score = jnp.sum(jnp.where(own, rankings.scores, 0.0), axis=2)
        value = jax.nn.logsumexp(jnp.where(pool, rankings.scores, -1e9), axis=2) - target_score
        if ndcg_weight:
            above = jax.nn.sigmoid((rankings.scores - target_score[..., None]) / SMOOTH_RANK_TEMPERATURE)
            rank = 1.0 + jnp.sum(jnp.where(pool & ~own, above, 0.0), axis=2)
            value = value - ndcg_weight / jnp.log2(1.0 + rank)
        return jnp.where(jnp.any(own, axis=2), value, 0.0)

    return rankings.over_pools(loss), rankings.over_pools(lambda pool: jnp.any(is_target & pool, axis=2))
