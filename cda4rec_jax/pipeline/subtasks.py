"""The six sub-tasks of a request as pure functions over a batch of users (planning lives in ``planner``)."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.agents.device import DeviceAgent
from cda4rec_jax.agents.device.features import candidate_features, cloud_features, structured_features, with_zeros
from cda4rec_jax.array_typing import (
    Array,
    CandidateFeatures,
    CandidateItems,
    CandidateScores,
    Histories,
    Lengths,
    SemanticEmbeddings,
)
from cda4rec_jax.data.profiles import length_bucket, prefix_features, quantise_shares
from cda4rec_jax.messages import RECENT_ITEMS, Candidates, EgressLevel, Evidence, HistoryBatch, SequenceBatch, Slate, UserAbstract
from cda4rec_jax.nn import dequantise_rows, last_hidden
from cda4rec_jax.pipeline.catalogue import Catalogue, Residents
from cda4rec_jax.planner import NEIGHBOUR_EVENTS, OWN_CANDIDATES, RESIDENT_CANDIDATES
from cda4rec_jax.retrieval.exact import exact_search


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StructuredState:
    """Result of structured user modelling: the device user state, and the events that candidates are compared with."""

    state: Float[Array, "b e"]
    items: Histories
    lengths: Lengths
    evidence: Evidence  # records of `items`, leading axes [b, l]


def released_items(level: EgressLevel, history_length: int) -> int:
    """Number of item ids that a level releases at most."""
    return {EgressLevel.RECENT: min(RECENT_ITEMS, history_length), EgressLevel.FULL: history_length}.get(level, 0)


def release(
    history: HistoryBatch,
    categories: Float[Array, "i g"],
    level: Int[Array, "b"],
    age_events: Int[Array, "b"],
    *,
    max_items: int,
    history_length: int,
    profile_events: int,
) -> UserAbstract:
    """User abstract: what ``level`` lets out of the history as it was ``age_events`` events ago.

    Args:
        max_items: width of the released ids; at least what the highest level of the batch releases.
        history_length: ids released at FULL.
        profile_events: newest events before the ids that the profile summarises.
    """
    known = jnp.maximum(history.lengths - age_events, 0)
    allowed = jnp.where(level == EgressLevel.FULL, history_length, jnp.where(level == EgressLevel.RECENT, RECENT_ITEMS, 0))
    count = jnp.minimum(known, jnp.minimum(allowed, max_items))
    start = known - count
    place = jnp.arange(max_items)[None, :]
    index = jnp.minimum(start[:, None] + place, history.items.shape[1] - 1)
    items = jnp.where(place < count[:, None], jnp.take_along_axis(history.items, index, axis=1), 0)
    position = jnp.arange(history.items.shape[1])[None, :]
    summarised = (position < start[:, None]) & (position >= (start - profile_events)[:, None])
    counts = jnp.einsum("bl,blg->bg", summarised.astype(jnp.float32), categories[history.items])
    return UserAbstract(
        level=level,
        category_shares=quantise_shares(counts),
        length_bucket=length_bucket(jnp.minimum(start, profile_events)),
        items=items,
        attributes=history.attributes * (level == EgressLevel.FULL)[:, None],
    )


def abstract_sequences(abstract: UserAbstract) -> tuple[SequenceBatch, Lengths]:
    """The abstract as token rows (a prefix, then the ids), and the number of real tokens of each row."""
    count = jnp.sum(abstract.items > 0, axis=1)
    rows, width = abstract.items.shape
    position = jnp.broadcast_to(jnp.arange(width + 1)[None, :], (rows, width + 1))
    prefixes = prefix_features(abstract.category_shares, abstract.length_bucket, abstract.attributes, abstract.level)
    sequences = SequenceBatch(
        item_indices=jnp.pad(abstract.items, ((0, 0), (1, 0))),
        segment_ids=(position <= count[:, None]).astype(jnp.int32),
        positions=position,
        targets=jnp.zeros((rows, width + 1), jnp.int32),
        prefix_rows=jnp.where(position == 0, 1 + jnp.arange(rows)[:, None], 0),
        prefixes=jnp.pad(prefixes, ((1, 0), (0, 0))),
    )
    return sequences, count + 1


def model_semantics(cloud: CloudAgent, vectors: Float[Array, "i d"], abstract: UserAbstract) -> SemanticEmbeddings:
    """Semantic user modelling: the abstract's embedding, in the space of the item vectors."""
    sequences, num_tokens = abstract_sequences(abstract)
    return last_hidden(cloud(sequences, vectors), num_tokens)


def retrieve(vectors: Float[Array, "i d"], semantic: SemanticEmbeddings, num_candidates: int) -> Candidates:
    """Candidate retrieval by exact maximum inner product, best first."""
    items, scores = _search(vectors, semantic, num_candidates)
    return Candidates.retrieved(items, scores)


def _search(
    vectors: Float[Array, "i d"], queries: Float[Array, "b d"], count: int
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    # Without the barrier XLA on a CPU fuses the search into what reads its results, which then take seven times as long.
    return jax.lax.optimization_barrier(exact_search(vectors, queries, count))


def with_residents(
    found: Candidates,
    semantic: SemanticEmbeddings,
    known: Bool[Array, "b"],
    structured: StructuredState | None,
    residents: Residents,
    num_items: int,
) -> tuple[Candidates, Int[Array, "b m"]]:
    """What a device ranks: the ``c`` candidates that it was sent, and what it finds for itself among the resident items.

    First the best ``RESIDENT_CANDIDATES`` for the embedding, or the most popular ones where none is ``known``. Then, with structured user
    modelling, the best ``OWN_CANDIDATES`` by the device user state, and what occurs beside the last ``NEIGHBOUR_EVENTS`` events. Each
    has a semantic score. Its place among the resident items tells its expected place in a catalogue of ``num_items``, of which any may
    be resident; those found by the history come after all others.

    Returns:
        All of them, and the place of each resident item among the candidates: ``c`` where it is none of them, -1 where it stands among
        the resident ones before.
    """
    count, kept = residents.items.shape[0], known[:, None]
    number = min(RESIDENT_CANDIDATES, count)
    rows, scores = _search(residents.vectors, semantic, number)
    rows = jnp.where(kept, rows, 1 + jnp.arange(number))
    ranks = (1.0 + jnp.arange(number)) * ((num_items + 1) / (count + 1)) - 1.0
    if structured is not None and count > number:
        by_state, _ = _search(residents.own_vectors, structured.state, min(OWN_CANDIDATES, count - number))
        more = jnp.concatenate([by_state, residents.rows_of(_neighbours(structured))], axis=1)
        rows, ranks = jnp.concatenate([rows, more], axis=1), jnp.pad(ranks, (0, more.shape[1]), mode="edge")
        scores = jnp.concatenate([scores, jnp.einsum("bd,bmd->bm", semantic, residents.vectors[more])], axis=1)
    resident = Candidates(
        items=jnp.where(rows > 0, residents.items[rows - 1], 0),
        scores=jnp.where(kept, scores, 0.0),
        present=jnp.broadcast_to(kept.astype(jnp.float32), rows.shape),
        ranks=jnp.broadcast_to(ranks, rows.shape),
    )
    is_first = places_among(resident.items, resident.items, num_items) == jnp.arange(rows.shape[1])[None, :]
    places = jnp.where(is_first, places_among(resident.items, found.items, num_items), -1)
    return jax.tree.map(lambda *columns: jnp.concatenate(columns, axis=1), found, resident), places


def _neighbours(structured: StructuredState) -> Int[Array, "b m"]:
    """Items that most often occur in one history with the newest events, from the records of these; 0 where there are fewer."""
    newest = structured.lengths[:, None] - 1 - jnp.arange(NEIGHBOUR_EVENTS)[None, :]
    rows = jnp.take_along_axis(structured.evidence.cooccurring_items, jnp.maximum(newest, 0)[..., None], axis=1)
    return jnp.where(newest[..., None] >= 0, rows, 0).reshape(len(newest), -1)


def places_among(items: Int[Array, "b m"], candidates: CandidateItems, num_items: int) -> Int[Array, "b m"]:
    """Place of each of ``items`` in the same user's ``candidates``; their number where it is none of them."""
    count = candidates.shape[1]

    def one(asked: Array, row: Array) -> Array:
        return jnp.full((num_items + 1,), count).at[row].min(jnp.arange(count))[asked]

    return jax.vmap(one)(items, candidates)


def each_once(candidates: Candidates, places: Int[Array, "b m"]) -> Candidates:
    """What ``with_residents`` gave, without the resident items that are there already."""
    number = candidates.items.shape[1] - places.shape[1]
    is_new = jnp.pad(places == number, ((0, 0), (number, 0)), constant_values=True)
    return replace(candidates, items=jnp.where(is_new, candidates.items, 0))


def model_structure(device: DeviceAgent, abstract: UserAbstract, evidence: Evidence) -> StructuredState:
    """Structured user modelling over a FULL abstract and the records of its items (leading axes [b, l]).

    On the device nothing of this abstract leaves; in the cloud it runs on what FULL consent released. The result is the same.
    """
    sequences, num_tokens, vectors = structure_sequences(abstract, evidence)
    state = last_hidden(device(sequences, vectors), num_tokens)
    return StructuredState(state=state, items=abstract.items, lengths=num_tokens - 1, evidence=evidence)


def structure_sequences(abstract: UserAbstract, evidence: Evidence) -> tuple[SequenceBatch, Lengths, Float[Array, "i e"]]:
    """What the device agent reads of a FULL abstract: token rows, their real tokens, and the item vectors that the tokens point into."""
    sequences, num_tokens = abstract_sequences(abstract)
    vectors = dequantise_rows(evidence.vectors, evidence.vector_scales)
    flat = jnp.concatenate([jnp.zeros((1, vectors.shape[-1])), vectors.reshape(-1, vectors.shape[-1])])
    # Tokens point into the records at hand: a device has vectors of its own history only, never the table.
    places = 1 + jnp.arange(abstract.items.size).reshape(abstract.items.shape)
    places = jnp.pad(jnp.where(abstract.items > 0, places, 0), ((0, 0), (1, 0)))
    sequences = SequenceBatch(
        item_indices=places,
        segment_ids=sequences.segment_ids,
        positions=sequences.positions,
        targets=sequences.targets,
        prefix_rows=sequences.prefix_rows,
        prefixes=sequences.prefixes,
    )
    return sequences, num_tokens, flat


def gather_evidence(catalogue: Catalogue, items: Int[Array, "..."]) -> Evidence:
    """Records of the given items, as they would travel."""
    return jax.tree.map(lambda table: table[items], catalogue.evidence)


def abstract_evidence(catalogue: Catalogue, abstract: UserAbstract) -> Evidence:
    """Records of the items of an abstract; a device keeps those of its own history."""
    return gather_evidence(catalogue, abstract.items)


def score_features(
    candidates: Candidates,
    evidence: Evidence,
    structured: StructuredState | None,
    *,
    age_events: Float[Array, "b"],
    level: Lengths,
    num_items: int,
    without: tuple[str, ...] = (),
) -> CandidateFeatures:
    """What final ranking knows of each candidate; the fusion head makes the score of it.

    Args:
        evidence: records of the candidates; without structured user modelling only the popularity is read.
        structured: None where structured user modelling was skipped.
        age_events, level: of the semantic embedding behind these scores.
        without: names of features that are 0 for every candidate.
    """
    cloud = cloud_features(candidates, evidence.log_popularity, age_events=age_events, level=level)
    own = None
    if structured is not None:
        own = structured_features(
            structured.items, structured.lengths, structured.evidence, structured.state, evidence, num_items
        )
    features = candidate_features(cloud, own)
    return with_zeros(features, without) if without else features


def unseen(items: CandidateItems, seen: Int[Array, "b seen"], num_items: int) -> Bool[Array, "b c"]:
    """True at real items that the user has not seen."""

    def one(candidates: Array, history: Array) -> Array:
        return jnp.zeros((num_items + 1,), bool).at[history].set(True).at[0].set(True)[candidates]

    return ~jax.vmap(one)(items, seen)


def rank_slate(items: CandidateItems, scores: CandidateScores, allowed: Bool[Array, "b c"], k: int) -> Slate:
    """The k best allowed candidates; equal scores keep the order of retrieval."""
    masked = jnp.where(allowed, scores, -jnp.inf)
    if items.shape[1] < k:
        items = jnp.pad(items, ((0, 0), (0, k - items.shape[1])))
        masked = jnp.pad(masked, ((0, 0), (0, k - masked.shape[1])), constant_values=-jnp.inf)
    best, index = jax.lax.top_k(masked, k)
    chosen = jnp.take_along_axis(items, index, axis=1)
    return Slate(items=jnp.where(jnp.isfinite(best), chosen, 0), scores=best)
