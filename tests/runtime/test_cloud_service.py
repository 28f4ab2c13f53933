"""The cloud answers what it can, says why it cannot, and never raises."""

import time

import msgspec
import numpy as np
import pytest

from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.privacy.gate import Gate
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.privacy.levels import UplinkFields
from cda4rec_jax.runtime.cloud_service import CloudService
from cda4rec_jax.runtime.wire import (
    EVIDENCE_FIELDS,
    Codec,
    ErrorResponse,
    RetrieveResponse,
    candidates_of,
    decode_reply,
    encode_uplink,
)
from tests.runtime.fakes import NUM_ITEMS, WIDTH, cloud_functions, embedding_of, retrieve

FRESH = UplinkFields(
    request_id="ab" * 16,
    deadline_unix_ms=4e12,
    level=EgressLevel.FULL,
    num_candidates=6,
    length_bucket=1,
    item_ids=(5, 7),
)


def ask(fields: UplinkFields, codec=Codec.MSGPACK, clock=time.time, **overrides) -> RetrieveResponse | ErrorResponse:
    ledger = Ledger()
    payload = encode_uplink(Gate(EgressLevel.FULL, ledger).release(fields), codec)
    ledger.close()
    with CloudService(cloud_functions(**overrides), codec, clock) as service:
        return decode_reply(service.handle(payload), codec)


def retrieved(fields: UplinkFields) -> RetrieveResponse:
    reply = ask(fields)
    assert isinstance(reply, RetrieveResponse)
    return reply


def change(**values) -> UplinkFields:
    return msgspec.structs.replace(FRESH, **values)


@pytest.mark.parametrize("codec", list(Codec))
def test_a_fresh_request_gets_candidates_and_the_embedding_behind_them(codec):
    reply = ask(FRESH, codec)
    assert isinstance(reply, RetrieveResponse)
    items, scores, evidence = candidates_of(reply)
    expected_items, expected_scores = retrieve(embedding_of(2), 6)
    np.testing.assert_array_equal(items, expected_items)
    np.testing.assert_array_equal(scores, expected_scores)
    assert set(evidence) == {"log_popularity"}
    assert reply.semantic is not None
    assert set(candidates_of(retrieved(change(want_evidence=True)))[2]) == EVIDENCE_FIELDS


def test_a_reused_embedding_is_searched_as_it_is_and_not_sent_back():
    reused = change(item_ids=(), length_bucket=None, semantic_embedding=embedding_of(3).tobytes())
    reply = ask(reused, encode=lambda fields: pytest.fail("nothing to encode"))
    assert isinstance(reply, RetrieveResponse)
    np.testing.assert_array_equal(candidates_of(reply)[0], retrieve(embedding_of(3), 6)[0])
    assert reply.semantic is None
    assert reply.times.semantic_ms == 0


def test_the_cloud_ranks_with_structured_modelling_if_asked():
    reply = ask(change(want_ranking=True, want_structured=True))
    assert isinstance(reply, RetrieveResponse)
    items, scores, evidence = candidates_of(reply)
    expected_items, expected_scores = retrieve(embedding_of(2), 6)
    np.testing.assert_array_equal(items, expected_items[::-1])
    np.testing.assert_allclose(scores, 10 - expected_scores[::-1])
    assert reply.ranked
    assert evidence == {}


def test_more_candidates_than_items_are_cut_to_the_catalogue():
    assert len(candidates_of(retrieved(change(num_candidates=500)))[0]) == NUM_ITEMS


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        (change(item_ids=(NUM_ITEMS + 1,)), "bad_request", f"catalogue's {NUM_ITEMS}"),
        (change(item_ids=(), length_bucket=None, semantic_embedding=bytes(4)), "bad_request", f"expected {4 * WIDTH}"),
        (change(deadline_unix_ms=1.0), "too_late", "deadline"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(fields, code, message):
    reply = ask(fields)
    assert isinstance(reply, ErrorResponse)
    assert (reply.code, reply.request_id) == (code, fields.request_id)
    assert message in reply.message


def test_noise_is_answered_with_bad_request():
    with CloudService(cloud_functions()) as service:
        reply = decode_reply(service.handle(b"\x81\xa4nois"))
    assert isinstance(reply, ErrorResponse)
    assert reply.code == "bad_request"


def test_a_failure_of_the_model_is_an_answer_that_repeats_no_user_data(caplog):
    def fail(fields):
        raise RuntimeError(f"cannot encode {fields.item_ids}")

    reply = ask(FRESH, encode=fail)
    assert isinstance(reply, ErrorResponse)
    assert (reply.code, reply.message) == ("internal", "RuntimeError")
