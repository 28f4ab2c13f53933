"""Nothing leaves the device above its level, over its budget, without a label, or around the gate."""

import copy
import hashlib
import pickle
import sqlite3
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.privacy.gate import EgressDenied, Gate, GatedUplink
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.privacy.levels import LABELS, UplinkFields

BASE = {"request_id": "0" * 32, "deadline_unix_ms": 1.0, "num_candidates": 100, "length_bucket": 1}
CANARY_ITEM = 0x5AFE_CA1D % 2**31
CANARY_ATTRIBUTE = 0xCA1D
RELEASING = [EgressLevel.PROFILE, EgressLevel.RECENT, EgressLevel.FULL]


@pytest.fixture
def ledger():
    ledger = Ledger()
    yield ledger
    ledger.close()


def fields(level: EgressLevel, **more) -> UplinkFields:
    return UplinkFields(**{**BASE, "level": level, **more})


def test_every_field_has_a_label_and_every_label_a_field():
    assert set(LABELS) == set(UplinkFields.__struct_fields__)


def test_a_gated_uplink_cannot_be_made_copied_changed_or_subclassed_outside_the_gate(ledger):
    gated = Gate(EgressLevel.FULL, ledger).release(fields(EgressLevel.PROFILE))
    with pytest.raises(TypeError, match=r"Gate\.release only"):
        GatedUplink(object(), gated.fields, gated.body, ledger, 1)
    for forge in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"Gate\.release only"):
            forge(gated)
    with pytest.raises(AttributeError, match="immutable"):
        gated.body = b"other"
    inner: Any = gated.fields
    with pytest.raises(AttributeError):
        inner.item_ids = (1,)
    with pytest.raises(TypeError, match=r"Gate\.release only"):
        type("Forged", (GatedUplink,), {})


@settings(max_examples=150, deadline=None)
@given(
    level=st.sampled_from(list(EgressLevel)),
    consent=st.sampled_from(list(EgressLevel)),
    num_items=st.integers(0, 210),
    attributes=st.booleans(),
    shares=st.integers(0, 9),
    structured=st.booleans(),
)
def test_canaries_above_the_level_or_the_consent_never_become_bytes(level, consent, num_items, attributes, shares, structured):
    ledger = Ledger()
    asked = fields(
        level,
        item_ids=(CANARY_ITEM,) * num_items,
        attributes=(CANARY_ATTRIBUTE,) if attributes else (),
        category_shares=tuple((index, 7) for index in range(shares)),
        want_structured=structured,
    )
    ids_allowed = {EgressLevel.RECENT: 10, EgressLevel.FULL: 200}.get(level, 0)
    allowed = (
        EgressLevel.NOTHING < level <= consent
        and num_items <= ids_allowed
        and shares <= 8
        and (level is EgressLevel.FULL or not (attributes or structured))
    )
    try:
        body = Gate(consent, ledger).release(asked).body
    except EgressDenied:
        assert not allowed
        assert ledger.entries() == []
    else:
        assert allowed
        if level < EgressLevel.RECENT:
            assert msgspec.msgpack.encode(CANARY_ITEM) not in body
        if level < EgressLevel.FULL:
            assert msgspec.msgpack.encode(CANARY_ATTRIBUTE) not in body
        assert len(ledger.entries()) == 1
    finally:
        ledger.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"request_id": "alice@example.org"}, "request_id"),
        ({"category_shares": ((3, 16),)}, "category_shares"),
        ({"category_shares": ((300, 4),)}, "category_shares"),
        ({"category_shares": ((3, 4), (3, 5))}, "twice"),
        ({"length_bucket": 40}, "length_bucket"),
        ({"length_bucket": None}, "needs length_bucket"),
        ({"item_ids": (0,)}, "item_ids"),
        ({"item_ids": ("tt0111161",)}, "item_ids"),
        ({"num_candidates": 2**40}, "num_candidates"),
        ({"deadline_unix_ms": float("nan")}, "deadline_unix_ms"),
        ({"attributes": tuple(range(33))}, "32"),
        ({"semantic_embedding": np.ones(4, "<f4").tobytes()}, "alone"),
        ({"semantic_embedding": b"abc", "length_bucket": None}, "float32"),
        ({"semantic_embedding": np.full(4, np.nan, "<f4").tobytes(), "length_bucket": None}, "float32"),
        ({"semantic_embedding": np.ones(5000, "<f4").tobytes(), "length_bucket": None}, "budget"),
        ({"item_ids": (np.int64(5),)}, "wrong form"),
    ],
)
def test_a_field_of_wrong_form_or_size_is_denied_by_name(ledger, wrong, message):
    with pytest.raises(EgressDenied, match=message):
        Gate(EgressLevel.FULL, ledger).release(fields(EgressLevel.FULL, **wrong))
    assert ledger.entries() == []


def test_a_denial_does_not_repeat_the_value(ledger):
    with pytest.raises(EgressDenied) as denial:
        Gate(EgressLevel.FULL, ledger).release(fields(EgressLevel.PROFILE, item_ids=(CANARY_ITEM,)))
    assert str(CANARY_ITEM) not in str(denial.value)


def test_a_field_without_a_label_is_denied(ledger):
    class Wider(UplinkFields, frozen=True, kw_only=True):
        whole_diary: str = ""

    with pytest.raises(EgressDenied, match="whole_diary"):
        Gate(EgressLevel.FULL, ledger).release(Wider(**BASE, level=EgressLevel.FULL, whole_diary="dear diary"))


def test_an_embedding_leaves_at_the_level_it_was_made_from(ledger):
    embedding = np.arange(4, dtype="<f4").tobytes()
    gate = Gate(EgressLevel.RECENT, ledger)
    reuse = {**BASE, "length_bucket": None, "semantic_embedding": embedding}
    assert gate.release(UplinkFields(**reuse, level=EgressLevel.RECENT)).fields.semantic_embedding == embedding
    with pytest.raises(EgressDenied, match="consents to RECENT"):
        gate.release(UplinkFields(**reuse, level=EgressLevel.FULL))
    with pytest.raises(EgressDenied, match="NOTHING"):
        gate.release(UplinkFields(**reuse, level=EgressLevel.NOTHING))


def test_revoked_consent_stops_releases_and_resends_at_once(ledger):
    gate = Gate(EgressLevel.FULL, ledger)
    gated = gate.release(fields(EgressLevel.RECENT, item_ids=(5,)))
    gate.authorise_send(gated)
    gate.revoke(EgressLevel.PROFILE)
    with pytest.raises(EgressDenied, match="consent is now PROFILE"):
        gate.authorise_send(gated)
    with pytest.raises(EgressDenied, match="consents to PROFILE"):
        gate.release(fields(EgressLevel.RECENT, item_ids=(5,)))
    gate.release(fields(EgressLevel.PROFILE))
    with pytest.raises(ValueError, match="cannot raise"):
        gate.revoke(EgressLevel.FULL)


def test_one_release_is_one_ledger_row_however_often_it_is_sent(ledger):
    gate = Gate(EgressLevel.FULL, ledger)
    gated = gate.release(fields(EgressLevel.RECENT, item_ids=(5, 6)))
    for _ in range(3):
        gate.authorise_send(gated)
    (entry,) = ledger.entries()
    assert (entry.sends, entry.level) == (3, EgressLevel.RECENT)
    assert entry.sha256 == hashlib.sha256(gated.body).hexdigest()
    assert entry.payload_bytes == len(gated.body)


def test_a_send_that_no_row_counts_is_denied(ledger):
    other = Ledger()
    gated = Gate(EgressLevel.FULL, other).release(fields(EgressLevel.PROFILE))
    gate = Gate(EgressLevel.FULL, ledger)
    gate.release(fields(EgressLevel.PROFILE))  # its row has the same number
    with pytest.raises(EgressDenied, match="another ledger"):
        gate.authorise_send(gated)
    assert [entry.sends for entry in (*ledger.entries(), *other.entries())] == [0, 0]
    other._database.execute("DELETE FROM releases")
    with pytest.raises(EgressDenied, match="holds no release 1"):
        Gate(EgressLevel.FULL, other).authorise_send(gated)
    other.close()


def test_the_ledger_lists_what_left_byte_by_byte(ledger):
    asked = fields(EgressLevel.FULL, item_ids=(5, 600), attributes=(2,), category_shares=((1, 15),), want_evidence=True)
    gated = Gate(EgressLevel.FULL, ledger).release(asked)
    listed = ledger.entries()[0].fields
    # One more byte is the header of the map.
    assert 1 + sum(each.payload_bytes for each in listed) == len(gated.body)
    levels = {each.name: each.level for each in listed}
    assert levels["item_ids"] is EgressLevel.RECENT
    assert levels["attributes"] is EgressLevel.FULL
    assert levels["request_id"] is EgressLevel.NOTHING


def test_nothing_leaves_that_the_ledger_cannot_record(ledger, monkeypatch):
    def fail(**_):
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr(ledger, "record", fail)
    with pytest.raises(EgressDenied, match="disk full"):
        Gate(EgressLevel.FULL, ledger).release(fields(EgressLevel.PROFILE))
