"""The cloud's side of the link: bytes in, bytes out, no state of any user in between."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.privacy.levels import UplinkFields
from cda4rec_jax.runtime.functions import CloudFunctions
from cda4rec_jax.runtime.wire import (
    WIRE_VERSION,
    Codec,
    ErrorResponse,
    RetrieveResponse,
    StageTimes,
    WireError,
    decode_request,
    encode_reply,
    pack,
)

_log = logging.getLogger(__name__)


class CloudService:
    """Answers requests. Safe to call from several threads; use as a context manager or ``close`` it.

    Args:
        functions: the cloud's sub-tasks.
        codec: of requests and replies.
        clock: unix time in seconds, against which a request's deadline is held.
    """

    def __init__(self, functions: CloudFunctions, codec: Codec = Codec.MSGPACK, clock: Callable[[], float] = time.time) -> None:
        self._functions = functions
        self._codec = codec
        self._clock = clock
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="cloud-structured")

    def handle(self, payload: bytes) -> bytes:
        """The reply to a request. Never raises: what goes wrong is an ``ErrorResponse``, whose message repeats no user data."""
        try:
            request = decode_request(payload, self._codec)
        except WireError as error:
            return self._refuse("", "bad_request", str(error))
        fields = request.fields
        if self._clock() * 1e3 > fields.deadline_unix_ms:
            return self._refuse(fields.request_id, "too_late", "the deadline was over when the request came")
        problem = self._problem(fields)
        if problem:
            return self._refuse(fields.request_id, "bad_request", problem)
        try:
            return encode_reply(self._answer(fields), self._codec)
        except Exception as error:  # the device must hear of every failure, whatever it is
            _log.exception("request %s failed", fields.request_id)
            return self._refuse(fields.request_id, "internal", type(error).__name__)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "CloudService":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _problem(self, fields: UplinkFields) -> str | None:
        expected = self._functions.embedding_size
        if any(item > self._functions.num_items for item in fields.item_ids):
            return f"an item index is above the catalogue's {self._functions.num_items}"
        if fields.semantic_embedding is not None and len(fields.semantic_embedding) != 4 * expected:
            return f"semantic_embedding has {len(fields.semantic_embedding)} bytes, expected {4 * expected}"
        if fields.want_structured and fields.level is not EgressLevel.FULL:
            return f"structured modelling needs a request of level FULL, this one is of level {fields.level.name}"
        return None

    def _refuse(self, request_id: str, code: Literal["bad_request", "too_late", "internal"], message: str) -> bytes:
        reply = ErrorResponse(version=WIRE_VERSION, request_id=request_id, code=code, message=message)
        return encode_reply(reply, self._codec)

    def _answer(self, fields: UplinkFields) -> RetrieveResponse:
        functions = self._functions
        structuring = self._pool.submit(_timed, functions.structured, fields) if fields.want_structured else None
        reused = fields.semantic_embedding
        if reused is None:
            semantic, semantic_ms = _timed(functions.encode, fields)
        else:
            semantic, semantic_ms = np.frombuffer(reused, "<f4").astype(np.float32, copy=False), 0.0
        num_candidates = min(fields.num_candidates, functions.num_items)
        (items, scores), retrieval_ms = _timed(functions.retrieve, semantic, num_candidates)
        structured, structured_ms = (None, 0.0) if structuring is None else structuring.result()
        evidence, evidence_ms, ranking_ms = {}, 0.0, 0.0
        if fields.want_ranking:
            (items, scores), ranking_ms = _timed(functions.rank, items, scores, fields, structured)
        else:
            evidence, evidence_ms = _timed(functions.evidence, items, fields.want_evidence)
        return RetrieveResponse(
            version=WIRE_VERSION,
            request_id=fields.request_id,
            items=pack(items),
            scores=pack(scores),
            ranked=fields.want_ranking,
            semantic=pack(semantic) if reused is None else None,
            evidence={name: pack(rows) for name, rows in evidence.items()},
            times=StageTimes(
                semantic_ms=semantic_ms,
                retrieval_ms=retrieval_ms + evidence_ms,
                structured_ms=structured_ms,
                ranking_ms=ranking_ms,
            ),
        )


def _timed(function: Callable, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return result, (time.perf_counter() - start) * 1e3
