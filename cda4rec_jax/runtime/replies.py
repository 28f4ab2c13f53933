"""A reply, held against what was asked for and against what the device's own functions can read."""

from dataclasses import dataclass

import numpy as np

from cda4rec_jax.privacy.levels import UplinkFields
from cda4rec_jax.runtime.device_client import CloudFailed
from cda4rec_jax.runtime.functions import DeviceFunctions, EvidenceRows
from cda4rec_jax.runtime.wire import EVIDENCE_FIELDS, RetrieveResponse, candidates_of, unpack

LARGEST = 1e6  # no number of a model comes near it; far above it, ranking would overflow to what is no number


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The arrays of a reply that can be used."""

    items: np.ndarray  # int32 [c]
    scores: np.ndarray  # float32 [c], bounded where there is an item
    evidence: EvidenceRows  # whether there are rows for the right items, ``DeviceFunctions.complete`` knows
    semantic: np.ndarray | None  # float32 [d]


def checked_reply(response: RetrieveResponse, fields: UplinkFields, functions: DeviceFunctions) -> Reply:
    """The reply to a request with ``fields``.

    Raises:
        CloudFailed: it is not of the kind that was asked for; or an item, a number, a width or a type is none that the device reads.
    """
    items, scores, evidence = candidates_of(response)
    needed = frozenset() if response.ranked else EVIDENCE_FIELDS if fields.want_evidence else {"log_popularity"}
    if response.ranked is not fields.want_ranking or not needed <= set(evidence):
        raise CloudFailed("the reply is not of the kind that was asked for")
    expected = min(fields.num_candidates, functions.num_items)
    if len(items) != expected:
        raise CloudFailed(f"{len(items)} candidates came, expected {expected}")
    if (items > functions.num_items).any():
        raise CloudFailed(f"item {items.max()} is above the catalogue's {functions.num_items}")
    if not _bounded(scores[items > 0]):
        raise CloudFailed("a score is not finite, or too large")
    for name, rows in evidence.items():
        own = functions.no_records[name]
        if rows.dtype != own.dtype or rows.shape[1:] != own.shape[1:]:
            raise CloudFailed(f"{name} is {rows.dtype}{list(rows.shape[1:])} an item, expected {own.dtype}{list(own.shape[1:])}")
        if rows.dtype.kind == "f" and not _bounded(rows):
            raise CloudFailed(f"a number of {name} is not finite, or too large")
    semantic = None if response.semantic is None else unpack(response.semantic)
    if semantic is None and not response.ranked and fields.semantic_embedding is None:
        raise CloudFailed("the reply holds no embedding")
    if semantic is not None and (semantic.shape != (functions.embedding_size,) or not _bounded(semantic)):
        raise CloudFailed(f"the embedding is not {functions.embedding_size} finite numbers of usual size")
    return Reply(items=items, scores=scores, evidence=evidence, semantic=semantic)


def _bounded(values: np.ndarray) -> bool:
    return bool((np.abs(values) <= LARGEST).all())  # False for what is no number
