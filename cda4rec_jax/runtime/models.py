"""The trained models as the callables that the runtime runs: what one user's device holds, and what the cloud answers with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import cast

import jax
import numpy as np

from cda4rec_jax.messages import EgressLevel, Evidence, HistoryBatch, Placement, UserAbstract
from cda4rec_jax.pipeline.request import RequestFunctions
from cda4rec_jax.pipeline.subtasks import StructuredState, released_items
from cda4rec_jax.planner import CACHED_CANDIDATES
from cda4rec_jax.privacy.levels import UplinkFields
from cda4rec_jax.runtime.functions import (
    AbstractData,
    CachedEmbedding,
    CandidatePool,
    CloudFunctions,
    DeviceFunctions,
    EvidenceRows,
    Ranked,
)

_EVIDENCE_FIELDS = tuple(each.name for each in fields(Evidence))
# Ranking without structured user modelling reads popularity alone; the other fields are then empty.
_NO_EVIDENCE = {
    "vectors": np.zeros(0, np.int8),
    "vector_scales": np.zeros(0, np.float32),
    "text": np.zeros(0, np.int8),
    "text_scales": np.zeros(0, np.float32),
    "previous_items": np.zeros(0, np.int32),
    "previous_weights": np.zeros(0, np.uint8),
    "cooccurring_items": np.zeros(0, np.int32),
    "cooccurring_weights": np.zeros(0, np.uint8),
    "categories": np.zeros(0, np.uint8),
    "words": np.zeros(0, np.uint16),
    "word_weights": np.zeros(0, np.uint8),
}


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raises MemoryError where JAX is out of memory, which it tells by a word in an error of any kind."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError(str(error)) from error
        raise


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What one user's device holds before a request; what every request reads is where JAX computes.

    Attributes:
        history: the private past (b = 1).
        newest: what a FULL abstract would tell of it now, which is what structured modelling reads; it changes with the history alone.
        own_evidence: records of the items of ``newest``, leading axes [1, l].
        embedding: the last one that the cloud gave, or None.
        cache: the candidates that came with it; without it there are none.
    """

    history: HistoryBatch
    newest: UserAbstract
    own_evidence: Evidence
    embedding: CachedEmbedding | None
    cache: CandidatePool


def device_state(
    functions: RequestFunctions,
    cloud: CloudFunctions,
    history: HistoryBatch,
    cache_level: EgressLevel,
    cache_age_events: int,
) -> DeviceState:
    """The device's state after an earlier request, which is answered again here.

    Args:
        functions: compiled sub-tasks.
        cloud: what answered the earlier request.
        history: of one user, now.
        cache_level: of the earlier request; NOTHING if there was none.
        cache_age_events: events of the history since then.
    """
    history = jax.device_put(history)
    width = min(CACHED_CANDIDATES, functions.num_items)
    if cache_level is EgressLevel.NOTHING:
        none = np.zeros(width, np.int32)
        embedding, cache = None, _pool(functions, none, none.astype(np.float32), _rows(functions.evidence(none)), None)
    else:
        earlier = _abstract_data(functions.abstract(history, cache_level, cache_age_events))
        asked = UplinkFields(
            request_id="0" * 32,
            deadline_unix_ms=0.0,
            level=cache_level,
            num_candidates=width,
            category_shares=earlier.category_shares,
            length_bucket=earlier.length_bucket,
            item_ids=earlier.item_ids,
            attributes=earlier.attributes,
        )
        embedding = CachedEmbedding(values=cloud.encode(asked), level=cache_level, age_events=cache_age_events)
        items, scores = cloud.retrieve(embedding.values, width)
        cache = _pool(functions, items, scores, cloud.evidence(items, True), embedding)
    newest = functions.abstract(history, EgressLevel.FULL, 0)
    own = jax.device_put(functions.evidence(np.asarray(newest.items)))
    return DeviceState(history=history, newest=newest, own_evidence=own, embedding=embedding, cache=cache)


def device_functions(functions: RequestFunctions, state: DeviceState, k: int) -> DeviceFunctions:
    """The device's sub-tasks for the user of ``state``; slates have length ``k``."""

    def abstract(level: EgressLevel) -> AbstractData:
        return _abstract_data(state.newest if level is EgressLevel.FULL else functions.abstract(state.history, level, 0))

    @memory_errors()
    def structured() -> StructuredState:
        own = functions.structured(state.newest, state.own_evidence)
        jax.block_until_ready(own.state)
        return own

    def rank(pool: CandidatePool, own: object) -> Ranked:
        evidence = _whole(pool.evidence) if own is not None else _popularity(pool.evidence)
        embedding, history = pool.embedding, cast(StructuredState | None, own)
        semantic = None if embedding is None else embedding.values[None, :]
        age, level = (0.0, EgressLevel.NOTHING) if embedding is None else (float(embedding.age_events), embedding.level)
        asked = (semantic, age, level, state.history.seen, k)
        slate = functions.rank(
            pool.items[None, :], pool.scores[None, :], evidence, history, *asked, by_semantics=pool.by_semantics
        )
        return np.asarray(slate.items)[0], np.asarray(slate.scores)[0]

    def finish(items: np.ndarray, scores: np.ndarray) -> Ranked:
        slate = functions.finish(items[None, :], scores[None, :], state.history.seen, k)
        return np.asarray(slate.items)[0], np.asarray(slate.scores)[0]

    return DeviceFunctions(
        num_items=functions.num_items,
        embedding_size=functions.embedding_size,
        no_records=_rows(functions.evidence(np.zeros(0, np.int32))),
        abstract=abstract,
        structured=structured,
        cached_embedding=lambda: state.embedding,
        cached_candidates=partial(_cached_candidates, state.cache),
        complete=partial(_pool, functions),
        rank=rank,
        finish=finish,
    )


def cloud_functions(functions: RequestFunctions, num_attributes: int) -> CloudFunctions:
    """The cloud's sub-tasks; ``num_attributes`` is the width of the users' attributes."""

    def read(released: UplinkFields) -> UserAbstract:
        return _user_abstract(functions, released, num_attributes)

    def retrieve(embedding: np.ndarray, num_candidates: int) -> Ranked:
        items, scores = functions.retrieve(embedding[None, :], num_candidates)
        return items[0], scores[0]

    def structured(released: UplinkFields) -> StructuredState:
        full = read(released)
        return jax.block_until_ready(functions.structured(full, functions.evidence(np.asarray(full.items))))

    def rank(items: np.ndarray, scores: np.ndarray, released: UplinkFields, own: object) -> Ranked:
        rows = _rows(functions.evidence(items))
        evidence = _whole(rows) if own is not None else _popularity(rows)
        history = cast(StructuredState | None, own)
        final = np.asarray(functions.score(items[None, :], scores[None, :], evidence, history, released.level))[0]
        final = np.where(items > 0, final, -np.inf).astype(np.float32)
        order = np.argsort(-final, kind="stable")
        return items[order], final[order]

    def evidence(items: np.ndarray, whole: bool) -> EvidenceRows:
        rows = _rows(functions.evidence(items[~functions.is_resident(items)]))
        return rows if whole else {"log_popularity": rows["log_popularity"]}

    return CloudFunctions(
        num_items=functions.num_items,
        embedding_size=functions.embedding_size,
        encode=lambda released: np.asarray(functions.semantic(read(released)))[0],
        retrieve=retrieve,
        evidence=evidence,
        structured=structured,
        rank=rank,
    )


def _abstract_data(abstract: UserAbstract) -> AbstractData:
    """Only what is there: shares above 0, real items, columns that the user has."""
    shares, items = np.asarray(abstract.category_shares)[0], np.asarray(abstract.items)[0]
    named = np.flatnonzero(shares)
    return AbstractData(
        category_shares=tuple(zip(named.tolist(), shares[named].tolist(), strict=True)),
        length_bucket=int(np.asarray(abstract.length_bucket)[0]),
        item_ids=tuple(items[items > 0].tolist()),
        attributes=tuple(np.flatnonzero(np.asarray(abstract.attributes)[0]).tolist()),
    )


def _user_abstract(functions: RequestFunctions, released: UplinkFields, num_attributes: int) -> UserAbstract:
    """The arrays that the abstract was before it travelled."""
    width = released_items(released.level, functions.config.history_length)
    shares = np.zeros((1, functions.num_categories), np.uint8)
    for category, share in released.category_shares:
        shares[0, category] = share
    ids = released.item_ids[-width:] if width else ()
    items = np.zeros((1, width), np.int32)
    items[0, : len(ids)] = ids
    attributes = np.zeros((1, num_attributes), np.float32)
    attributes[0, list(released.attributes)] = 1.0
    return UserAbstract(
        level=np.full(1, released.level.value, np.int32),
        category_shares=shares,
        length_bucket=np.full(1, released.length_bucket, np.int32),
        items=items,
        attributes=attributes,
    )


def _pool(
    functions: RequestFunctions, items: np.ndarray, scores: np.ndarray, sent: EvidenceRows, embedding: CachedEmbedding | None
) -> CandidatePool:
    """Candidates with a row for each in every field that was ``sent``: zeros where the item is resident."""
    missing = np.flatnonzero(~functions.is_resident(items))
    if any(len(column) != len(missing) for column in sent.values()):
        told = {name: len(column) for name, column in sent.items()}
        raise ValueError(f"records came for {told} items, expected {len(missing)}: those that are not resident")
    evidence = {}
    for name, column in sent.items():
        evidence[name] = np.zeros((len(items), *column.shape[1:]), column.dtype)
        evidence[name][missing] = column
    return CandidatePool(items=items, scores=scores, evidence=evidence, embedding=embedding)


def _cached_candidates(cache: CandidatePool, semantic: Placement) -> CandidatePool:
    return replace(cache, by_semantics=semantic is Placement.REUSE)


def _rows(evidence: Evidence) -> dict[str, np.ndarray]:
    return {name: getattr(evidence, name) for name in _EVIDENCE_FIELDS}


def _whole(rows: EvidenceRows) -> Evidence:
    return Evidence(**{name: rows[name][None, ...] for name in _EVIDENCE_FIELDS})


def _popularity(rows: EvidenceRows) -> Evidence:
    return Evidence(**_NO_EVIDENCE, log_popularity=rows["log_popularity"][None, :])
