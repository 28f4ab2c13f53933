"""What crosses the link, as versioned messages in msgpack or JSON.

A message of another version, a truncated one, one with unknown fields or with arrays that do not fit raises ``WireError``.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np

from cda4rec_jax.messages import Evidence
from cda4rec_jax.privacy.gate import GatedUplink
from cda4rec_jax.privacy.levels import RequestId, UplinkFields

WIRE_VERSION = 3
EVIDENCE_FIELDS = frozenset(each.name for each in dataclasses.fields(Evidence))

_Dimension = Annotated[int, msgspec.Meta(ge=0, le=2**24)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]  # finite, so that a trace can add them up


class WireError(ValueError):
    """Bytes that are no message of this version. The message says what was expected."""


class Codec(enum.StrEnum):
    """Encoding of messages: msgpack in operation, JSON (bytes in base64) to be read by people."""

    MSGPACK = "msgpack"
    JSON = "json"


class Tensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An array as raw little-endian bytes in C order."""

    dtype: Literal["int8", "uint8", "uint16", "int32", "float32"]
    shape: Annotated[tuple[_Dimension, ...], msgspec.Meta(max_length=2)]
    data: bytes


class StageTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Time that the cloud spent on each of its sub-tasks; 0 where it did none. Structured runs beside semantic and retrieval."""

    semantic_ms: _Milliseconds
    retrieval_ms: _Milliseconds
    structured_ms: _Milliseconds
    ranking_ms: _Milliseconds


class RetrieveRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="retrieve", tag_field="kind"):
    """Device to cloud."""

    version: int
    fields: UplinkFields


class RetrieveResponse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="retrieved", tag_field="kind"):
    """Cloud to device: candidates in order of retrieval or, if the cloud ranked, in order of final score."""

    version: int
    request_id: RequestId
    items: Tensor  # int32 [c]
    scores: Tensor  # float32 [c]
    ranked: bool
    semantic: Tensor | None  # float32 [d]; a fresh embedding, for the device to keep
    evidence: dict[str, Tensor]  # fields of ``messages.Evidence``, [n] or [n, ...]: of the items that are not resident, in order
    times: StageTimes


class ErrorResponse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="error", tag_field="kind"):
    """Cloud to device: no answer, and why."""

    version: int
    request_id: str  # empty where the request could not be read
    code: Literal["bad_request", "too_late", "internal"]
    message: str


class _Header(msgspec.Struct):
    version: int


def pack(array: np.ndarray) -> Tensor:
    """The array as a ``Tensor``. Raises WireError for a dtype or number of axes that the wire does not carry."""
    name = array.dtype.name
    if name not in ("int8", "uint8", "uint16", "int32", "float32") or array.ndim > 2:
        raise WireError(
            f"cannot send {name}{list(array.shape)}: expected int8, uint8, uint16, int32 or float32 of at most 2 axes"
        )
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return Tensor(dtype=name, shape=array.shape, data=little.tobytes())


def unpack(tensor: Tensor) -> np.ndarray:
    """The array, read-only. Raises WireError if bytes and shape disagree."""
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    expected = int(np.prod(tensor.shape)) * dtype.itemsize
    if len(tensor.data) != expected:
        raise WireError(f"array of {tensor.dtype}{list(tensor.shape)} has {len(tensor.data)} bytes, expected {expected}")
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape).astype(tensor.dtype, copy=False)


def encode_uplink(gated: GatedUplink, codec: Codec = Codec.MSGPACK) -> bytes:
    """The request's bytes; only what the gate released becomes any. The same release always gives the same bytes."""
    if type(gated) is not GatedUplink:
        raise TypeError(f"only a GatedUplink leaves the device, got {type(gated).__name__}")
    return _encode(RetrieveRequest(version=WIRE_VERSION, fields=gated.fields), codec)


def encode_reply(reply: RetrieveResponse | ErrorResponse, codec: Codec = Codec.MSGPACK) -> bytes:
    """The reply's bytes."""
    return _encode(reply, codec)


def decode_request(payload: bytes, codec: Codec = Codec.MSGPACK) -> RetrieveRequest:
    """Raises WireError unless the bytes are a request of this version."""
    return _decode(payload, RetrieveRequest, codec)


def decode_reply(payload: bytes, codec: Codec = Codec.MSGPACK) -> RetrieveResponse | ErrorResponse:
    """Raises WireError unless the bytes are a reply of this version whose arrays fit together."""
    reply = _decode(payload, RetrieveResponse | ErrorResponse, codec)
    if isinstance(reply, RetrieveResponse):
        _check_response(reply)
    return reply


def candidates_of(response: RetrieveResponse) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
    """Items int32 [c], scores float32 [c] and evidence rows [n, ...] of a decoded response."""
    return unpack(response.items), unpack(response.scores), {name: unpack(rows) for name, rows in response.evidence.items()}


def _encode(message: msgspec.Struct, codec: Codec) -> bytes:
    return (msgspec.msgpack if codec is Codec.MSGPACK else msgspec.json).encode(message)


def _decode(payload: bytes, kind, codec: Codec):
    library = msgspec.msgpack if codec is Codec.MSGPACK else msgspec.json
    try:
        message = library.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        try:
            version = library.decode(payload, type=_Header).version
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WireError(f"{len(payload)} bytes are no {codec} message of version {WIRE_VERSION}: {error}") from error
        if version == WIRE_VERSION:
            raise WireError(f"message of version {version} does not fit: {error}") from error
        raise WireError(f"message of version {version}, expected {WIRE_VERSION}: update the older side") from error
    if message.version != WIRE_VERSION:
        raise WireError(f"message of version {message.version}, expected {WIRE_VERSION}: update the older side")
    return message


def _check_response(response: RetrieveResponse) -> None:
    items, scores, evidence = candidates_of(response)
    if items.ndim != 1 or items.dtype != np.int32 or scores.shape != items.shape or scores.dtype != np.float32:
        raise WireError(f"items {items.dtype}{list(items.shape)} and scores {scores.dtype}{list(scores.shape)} do not fit")
    if (items < 0).any() or np.isnan(scores).any():
        raise WireError("candidates hold a negative item or a score that is no number")
    unknown = sorted(set(evidence) - EVIDENCE_FIELDS)
    if unknown:
        raise WireError(f"unknown evidence {unknown}, expected {sorted(EVIDENCE_FIELDS)}")
    rows = {name: -1 if array.ndim == 0 else len(array) for name, array in evidence.items()}
    if len(set(rows.values())) > 1 or any(not 0 <= count <= len(items) for count in rows.values()):
        raise WireError(
            f"evidence has {rows} rows, expected equally many of each field, and at most one for each of {len(items)} items"
        )
    if response.semantic is not None and (response.semantic.dtype != "float32" or unpack(response.semantic).ndim != 1):
        raise WireError(f"semantic embedding is {response.semantic.dtype}{list(response.semantic.shape)}, expected float32 [d]")
