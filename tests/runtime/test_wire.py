"""Every message survives the wire, and nothing that is not a message of this version is taken for one."""

import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.privacy.gate import Gate
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.privacy.levels import UplinkFields
from cda4rec_jax.runtime.wire import (
    WIRE_VERSION,
    Codec,
    ErrorResponse,
    RetrieveRequest,
    RetrieveResponse,
    StageTimes,
    WireError,
    decode_reply,
    decode_request,
    encode_reply,
    encode_uplink,
    pack,
    unpack,
)

FULL = UplinkFields(
    request_id="ab" * 16,
    deadline_unix_ms=1.7e12,
    level=EgressLevel.FULL,
    num_candidates=500,
    want_ranking=True,
    want_structured=True,
    category_shares=((3, 15), (100, 1)),
    length_bucket=3,
    item_ids=(5, 70_000),
    attributes=(2, 9),
)
REUSE = UplinkFields(
    request_id="00" * 16,
    deadline_unix_ms=1.0,
    level=EgressLevel.RECENT,
    num_candidates=20,
    want_evidence=True,
    semantic_embedding=np.arange(8, dtype="<f4").tobytes(),
)
RESPONSE = RetrieveResponse(
    version=WIRE_VERSION,
    request_id="ab" * 16,
    items=pack(np.array([4, 2, 0], np.int32)),
    scores=pack(np.array([1.5, 0.5, -np.inf], np.float32)),
    ranked=False,
    semantic=pack(np.ones(8, np.float32)),
    evidence={"vectors": pack(np.ones((3, 4), np.int8)), "log_popularity": pack(np.ones(3, np.float32))},
    times=StageTimes(semantic_ms=1.0, retrieval_ms=2.0, structured_ms=0.0, ranking_ms=0.5),
)
ERROR = ErrorResponse(version=WIRE_VERSION, request_id="", code="too_late", message="late")


def release(fields: UplinkFields):
    ledger = Ledger()
    gated = Gate(EgressLevel.FULL, ledger).release(fields)
    ledger.close()
    return gated


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("fields", [FULL, REUSE], ids=["fresh", "reuse"])
def test_requests_round_trip_and_are_the_same_bytes_each_time(codec, fields):
    gated = release(fields)
    payload = encode_uplink(gated, codec)
    assert decode_request(payload, codec) == RetrieveRequest(version=WIRE_VERSION, fields=fields)
    assert encode_uplink(gated, codec) == payload


def test_the_uplink_is_the_released_body_and_a_constant_header():
    gated, other = release(FULL), release(REUSE)
    payload, other_payload = encode_uplink(gated), encode_uplink(other)
    assert payload.endswith(gated.body)
    assert payload.removesuffix(gated.body) == other_payload.removesuffix(other.body)


def test_only_a_gated_uplink_becomes_bytes():
    with pytest.raises(TypeError):
        encode_uplink(FULL)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("reply", [RESPONSE, ERROR], ids=["response", "error"])
def test_replies_round_trip(codec, reply):
    assert decode_reply(encode_reply(reply, codec), codec) == reply


@given(
    dtype=st.sampled_from(["int8", "uint8", "uint16", "int32", "float32"]),
    shape=st.lists(st.integers(0, 5), max_size=2),
    reverse=st.booleans(),
)
def test_arrays_round_trip_bit_for_bit(dtype, shape, reverse):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    array = array.T if reverse else array
    back = unpack(pack(array))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_arrays_that_the_wire_does_not_carry_are_refused():
    with pytest.raises(WireError, match="float64"):
        pack(np.ones(3))
    with pytest.raises(WireError, match="at most 2 axes"):
        pack(np.ones((1, 1, 1), np.float32))


@pytest.mark.parametrize("codec", list(Codec))
def test_another_version_is_named(codec):
    newer = msgspec.structs.replace(ERROR, version=WIRE_VERSION + 1)
    with pytest.raises(WireError, match=f"version {WIRE_VERSION + 1}, expected {WIRE_VERSION}"):
        decode_reply(encode_reply(newer, codec), codec)
    library = msgspec.msgpack if codec is Codec.MSGPACK else msgspec.json
    stranger = library.encode({"kind": "retrieve", "version": 7, "something": "new"})
    with pytest.raises(WireError, match="version 7, expected"):
        decode_request(stranger, codec)


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("message", ["request", "reply"])
def test_every_truncation_is_refused(codec, message):
    payload, decode = (
        (encode_uplink(release(FULL), codec), decode_request)
        if message == "request"
        else (encode_reply(RESPONSE, codec), decode_reply)
    )
    for length in range(len(payload)):
        with pytest.raises(WireError):
            decode(payload[:length], codec)


@settings(max_examples=200, deadline=None)
@given(payload=st.binary(max_size=200), codec=st.sampled_from(list(Codec)))
def test_noise_is_refused_and_never_crashes(payload, codec):
    for decode in (decode_request, decode_reply):
        with pytest.raises(WireError):
            decode(payload, codec)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_flipped_byte_gives_a_message_or_a_wire_error(place, value):
    payload = bytearray(encode_reply(RESPONSE))
    payload[place % len(payload)] = value
    with contextlib.suppress(WireError):
        decode_reply(bytes(payload))


def test_a_reply_is_no_request():
    with pytest.raises(WireError):
        decode_request(encode_reply(RESPONSE))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scores": pack(np.ones(2, np.float32))}, "do not fit"),
        ({"items": pack(np.array([1, 2, 3], np.uint8))}, "do not fit"),
        ({"items": pack(np.array([-1, 2, 3], np.int32))}, "negative"),
        ({"scores": pack(np.array([np.nan, 2, 3], np.float32))}, "no number"),
        ({"evidence": {"vectors": pack(np.ones((4, 4), np.int8))}}, "at most one for each of 3 items"),
        ({"evidence": {"vectors": pack(np.ones((2, 4), np.int8)), "words": pack(np.ones((1, 4), np.uint16))}}, "equally many"),
        ({"evidence": {"diary": pack(np.ones(3, np.int8))}}, "diary"),
        ({"semantic": pack(np.ones((2, 4), np.float32))}, "semantic"),
        ({"items": msgspec.structs.replace(RESPONSE.items, shape=(4,))}, "expected 16"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(wrong, message):
    with pytest.raises(WireError, match=message):
        decode_reply(encode_reply(msgspec.structs.replace(RESPONSE, **wrong)))
