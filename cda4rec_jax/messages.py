"""What travels along the arrows of the data flow, in the order in which it travels.

``SequenceBatch`` trains the agents. A request starts as a ``HistoryBatch`` (private, on the device) and a ``Context``; the planner
turns the context into a ``Plan``; the device releases a ``UserAbstract``; the cloud answers with a semantic embedding (``array_typing``)
and with ``Candidates`` and their ``Evidence``; ranking makes the ``Slate``; the ``Trace`` tells what happened.

Batched messages are pytrees of arrays with the axis letters of ``array_typing``. ``Plan``, ``Span`` and ``Trace`` describe one request
and are plain Python.
"""

import enum
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8, UInt16

from cda4rec_jax.array_typing import (
    Array,
    Attributes,
    CandidateItems,
    CandidateScores,
    Histories,
    Lengths,
    NeighbourItems,
    NeighbourWeights,
    PackedInts,
    SlateItems,
    Targets,
    WireText,
    WireVectors,
)


class EgressLevel(enum.IntEnum):
    """How much of the private history an abstract releases; also the unit in which a user gives consent."""

    NOTHING = 0
    PROFILE = 1
    RECENT = 2
    FULL = 3


RECENT_ITEMS = 10  # newest events that RECENT releases
MIN_KBPS = 1.0  # keeps times finite where there is no link


class Subtask(enum.StrEnum):
    """The six sub-tasks of a request, in causal order."""

    ABSTRACT = "abstract"
    PLANNING = "planning"
    SEMANTIC = "semantic"
    RETRIEVAL = "retrieval"
    STRUCTURED = "structured"
    RANKING = "ranking"


class Placement(enum.StrEnum):
    """Who does a sub-task."""

    DEVICE = "device"
    CLOUD = "cloud"
    REUSE = "reuse"  # semantic: the last embedding, whose age is known
    DEVICE_CACHE = "device_cache"  # retrieval: the candidates kept on the device
    SKIP = "skip"


class Link(enum.IntEnum):
    """The kind of link between device and cloud, best first."""

    WIFI = 0
    LTE = 1
    THREE_G = 2
    EDGE = 3
    OFFLINE = 4

    @property
    def label(self) -> str:
        """What people call it: ``3g`` for THREE_G."""
        return "3g" if self is Link.THREE_G else self.name.lower()


class DeviceTier(enum.IntEnum):
    """Compute class of the device."""

    LOW = 0
    MID = 1
    HIGH = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Packed training rows: each row holds whole segments, and a token attends to earlier tokens of its own segment only.

    A segment is one prefix token (profile, attributes and level of what the cloud would have been told) and item tokens.
    """

    item_indices: PackedInts  # 0 at prefixes and padding
    segment_ids: PackedInts  # 1, 2, ... within a row; 0 is padding
    positions: PackedInts  # 0, 1, ... within a segment
    targets: PackedInts  # the next item; 0 where there is no loss
    prefix_rows: PackedInts  # row of `prefixes` at a prefix token, 0 elsewhere (row 0 is all zero)
    prefixes: Float[Array, "s f"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class HistoryBatch:
    """The private state of ``b`` users before one target event. It lives on the device."""

    user_indices: Lengths
    event_ids: Lengths  # number of the target event in the dataset: what simulated conditions are a hash of
    items: Histories  # oldest first, padded with 0 at the end: the newest `l` events
    lengths: Lengths  # events in `items`
    total_lengths: Lengths  # events ever
    seen: Int[Array, "b seen"]  # every item of the user's past, in any order, padded with 0: what a slate must not repeat
    session_counts: Float[Array, "b"]  # 0 where the data has no real timestamps
    hours_since_last: Float[Array, "b"]  # 0 where the data has no real timestamps
    has_timestamps: Float[Array, "b"]
    attributes: Attributes
    targets: Targets  # 0 where the next event is not known


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Context:
    """What is known or estimated before a request; every field has shape [b] (evaluation stacks several draws: [draws, b]).

    Realised link and stage times are drawn afterwards (``links``); no planner sees them. A feature that the data cannot give is 0 and
    its ``has_*`` indicator is 0.
    """

    history_length: Float[Array, "*b"]
    cache_age_events: Float[Array, "*b"]  # events since the cached embedding was made; 0 where there is none
    cache_level: Int[Array, "*b"]  # EgressLevel it was made from; NOTHING where there is none
    category_entropy: Float[Array, "*b"]  # nats
    rare_share: Float[Array, "*b"]  # share of the history on items with 5 or fewer train events
    session_count: Float[Array, "*b"]
    hours_since_last: Float[Array, "*b"]
    has_timestamps: Float[Array, "*b"]  # 1 where the data has real timestamps
    tier: Int[Array, "*b"]  # DeviceTier
    free_memory_mb: Float[Array, "*b"]
    link: Int[Array, "*b"]  # Link, as believed
    round_trip_ms: Float[Array, "*b"]  # estimate
    uplink_kbps: Float[Array, "*b"]  # estimate
    downlink_kbps: Float[Array, "*b"]  # estimate
    consent: Int[Array, "*b"]  # EgressLevel
    utility_per_ms: Float[Array, "*b"]  # w_t: quality that the user gives up to save a millisecond
    utility_per_mj: Float[Array, "*b"]  # w_e
    utility_per_exposure: Float[Array, "*b"]  # w_p


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who does which sub-task of one request. ``planner.plan_space`` lists the 32 standard plans, and says which others can be run."""

    semantic: Placement  # CLOUD, REUSE or SKIP
    retrieval: Placement  # CLOUD or DEVICE_CACHE
    level: EgressLevel  # of the fresh abstract; NOTHING for reuse and local plans
    num_candidates: int
    structured: Placement  # DEVICE, CLOUD or SKIP
    ranking: Placement  # DEVICE or CLOUD

    @property
    def uses_link(self) -> bool:
        return self.retrieval is Placement.CLOUD

    def egress_level(self, cache_level: EgressLevel) -> EgressLevel:
        """Level of what leaves the device: a reused embedding leaves at the level that it was made from."""
        if not self.uses_link:
            return EgressLevel.NOTHING
        return cache_level if self.semantic is Placement.REUSE else self.level

    @property
    def name(self) -> str:
        """Short unique name: ``fresh-full-100-device``, ``reuse-20-skip``, ``local-reuse-skip``, ``cloud-full-cloud``.

        Where the cloud ranks, a number of candidates other than 100 is named: ``cloud-full-50-skip``.
        """
        if self.ranking is Placement.CLOUD:
            count = "" if self.num_candidates == 100 else f"{self.num_candidates}-"
            return f"cloud-{self.level.name.lower()}-{count}{self.structured}"
        if self.retrieval is Placement.DEVICE_CACHE:
            return f"local-{self.semantic}-{self.structured}"
        if self.semantic is Placement.REUSE:
            return f"reuse-{self.num_candidates}-{self.structured}"
        return f"fresh-{self.level.name.lower()}-{self.num_candidates}-{self.structured}"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class UserAbstract:
    """The only description of a user that may leave the device.

    The profile summarises the events that are *not* sent as ids, so nothing is sent twice and training (where a profile must not
    contain the events it predicts) and serving agree.
    """

    level: Int[Array, "b"]
    category_shares: UInt8[Array, "b g"]  # top 8 shares in 4 bits (0-15), 0 elsewhere
    length_bucket: Int[Array, "b"]  # 0: up to 5, 1: up to 20, 2: up to 100, 3: more events
    items: Histories  # released ids, oldest first, padded with 0 at the end
    attributes: Attributes  # 0 below FULL


WORD_BUCKETS = 1 << 15


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the device may know of items: one record for each item of the leading axes, as it travels on the wire."""

    vectors: WireVectors  # int8 item vectors of the device agent
    vector_scales: Float[Array, "..."]
    text: WireText  # int8 text features, unit norm before rounding
    text_scales: Float[Array, "..."]
    previous_items: NeighbourItems  # items that this one directly followed most often
    previous_weights: NeighbourWeights
    cooccurring_items: NeighbourItems  # items most often in the same history, cosine normalised
    cooccurring_weights: NeighbourWeights
    categories: UInt8[Array, "... q"]  # up to q category indices + 1; 0 is none
    words: UInt16[Array, "... w"]  # hashes of the title's words, below WORD_BUCKETS; 0 is none
    word_weights: UInt8[Array, "... w"]  # their TF-IDF
    log_popularity: Float[Array, "..."]  # log(1 + train events), scaled to 0-1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What is ranked at last: items, 0 where there is none, and what retrieval knows of them."""

    items: CandidateItems
    scores: CandidateScores  # dot product with the semantic embedding; 0 where there is none
    present: Float[Array, "b c"]  # 1 where there is such a product
    ranks: Float[Array, "b c"]  # place in the catalogue by that product, from 0; expected, where a part of it was searched

    @classmethod
    def retrieved(cls, items: CandidateItems, scores: CandidateScores) -> "Candidates":
        """What a search of the whole catalogue found, best first."""
        # Constants are NumPy arrays: a request need not make them where JAX computes.
        ranks = np.broadcast_to(np.arange(items.shape[1], dtype=np.float32), items.shape)
        return cls(items=items, scores=scores, present=np.ones(items.shape, np.float32), ranks=ranks)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Slate:
    """The answer: items best first, 0 where fewer than k remain, with their final scores (-inf at 0)."""

    items: SlateItems
    scores: Float[Array, "b k"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """One sub-task of one request on the request's clock."""

    subtask: Subtask
    placement: Placement
    start_ms: float
    end_ms: float
    predicted_ms: float
    payload_bytes: int = 0  # bytes that it put on the link


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What happened in one request: where, when, how many bytes, what was predicted, and what went wrong."""

    plan: Plan
    executed_plan: Plan  # differs from `plan` where the link failed or consent was revoked
    spans: tuple[Span, ...]
    latency_ms: float
    predicted_ms: float
    uplink_bytes: int
    downlink_bytes: int
    flags: tuple[str, ...] = field(default=())  # those of ``runtime.executor.Executor.execute``
