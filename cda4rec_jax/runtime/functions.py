"""The model work that the runtime calls: callables over numpy arrays of one request. The runtime itself knows no model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cda4rec_jax.messages import EgressLevel, Placement
from cda4rec_jax.privacy.levels import UplinkFields

EvidenceRows = Mapping[str, np.ndarray]  # fields of ``messages.Evidence`` by name, one row for each item
Ranked = tuple[np.ndarray, np.ndarray]  # items int32, scores float32, of equal length, best first


@dataclass(frozen=True, kw_only=True)
class AbstractData:
    """The user abstract at one level, as it is asked to leave; the gate refuses what is above the level."""

    category_shares: tuple[tuple[int, int], ...]  # (category index, share in 4 bits, at least 1), at most 8
    length_bucket: int
    item_ids: tuple[int, ...]  # item indices, oldest first
    attributes: tuple[int, ...]  # indices of the user's attribute columns


@dataclass(frozen=True, kw_only=True)
class CachedEmbedding:
    """The last semantic embedding that the device was given."""

    values: np.ndarray  # float32 [d]
    level: EgressLevel  # it was made from
    age_events: int  # events since


@dataclass(frozen=True, kw_only=True)
class CandidatePool:
    """Candidates as final ranking on the device gets them; it adds resident items to them.

    Attributes:
        items: int32 [c], in order of retrieval, 0 where there is none.
        scores: float32 [c], dot product with the semantic embedding.
        evidence: rows of the items, of which those of resident items are not read: all fields where structured user modelling takes
            part, else at least ``log_popularity``.
        embedding: behind the scores; None where the device has none, and so no candidates.
        by_semantics: False where ranking is not to read the scores.
    """

    items: np.ndarray
    scores: np.ndarray
    evidence: EvidenceRows
    embedding: CachedEmbedding | None
    by_semantics: bool = True


@dataclass(frozen=True, kw_only=True)
class DeviceFunctions:
    """The device's sub-tasks for one user. Called from several threads at once.

    Attributes:
        num_items: catalogue size; a larger item index in a reply is refused.
        embedding_size: d; a reply with an embedding of another size is refused.
        no_records: all fields of ``messages.Evidence`` with rows of no item: the types and widths in which records are read.
        abstract: the user abstract at a level.
        structured: structured user modelling over the private history; its result is handed to ``rank`` as it is. Raises MemoryError
            where the device has none left for it.
        cached_embedding: the embedding that may be reused, or None.
        cached_candidates: the candidate cache for a semantic placement: REUSE with scores, SKIP without.
        complete: (items int32 [c], their scores, the records that came with them, the embedding behind them) -> what is ranked.
            Raises ValueError where the records are not those of the items that are not resident.
        rank: (pool, result of ``structured`` or None) -> the slate: best first, items already seen removed, exactly k entries,
            item 0 with score -inf where fewer remain.
        finish: (items, scores) ranked by the cloud -> the slate, of the same form.
    """

    num_items: int
    embedding_size: int
    no_records: EvidenceRows
    abstract: Callable[[EgressLevel], AbstractData]
    structured: Callable[[], object]
    cached_embedding: Callable[[], CachedEmbedding | None]
    cached_candidates: Callable[[Placement], CandidatePool]
    complete: Callable[[np.ndarray, np.ndarray, EvidenceRows, CachedEmbedding], CandidatePool]
    rank: Callable[[CandidatePool, object], Ranked]
    finish: Callable[[np.ndarray, np.ndarray], Ranked]


@dataclass(frozen=True, kw_only=True)
class CloudFunctions:
    """The cloud's sub-tasks. Called from several threads at once; every user-derived value comes from the request.

    Attributes:
        num_items: catalogue size; a larger item index is refused, a larger number of candidates is cut to it.
        embedding_size: d; an embedding of another size is refused.
        encode: abstract of a fresh request -> semantic embedding, float32 [d].
        retrieve: (embedding float32 [d], K) -> K items int32 and their scores float32, best first.
        evidence: (items int32 [c], whole) -> rows of those items that are not resident, in their order: all fields of
            ``messages.Evidence``, or ``log_popularity`` alone.
        structured: structured user modelling over a FULL abstract; its result is handed to ``rank`` as it is.
        rank: (items, scores, abstract, result of ``structured`` or None) -> the same items by final score, best first.
    """

    num_items: int
    embedding_size: int
    encode: Callable[[UplinkFields], np.ndarray]
    retrieve: Callable[[np.ndarray, int], Ranked]
    evidence: Callable[[np.ndarray, bool], EvidenceRows]
    structured: Callable[[UplinkFields], object]
    rank: Callable[[np.ndarray, np.ndarray, UplinkFields, object], Ranked]
