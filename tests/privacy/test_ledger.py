"""The ledger keeps what left, across restarts, and refuses files that are not its own."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.privacy.ledger import FieldBytes, Ledger


def record(ledger: Ledger, request_id: str = "a") -> int:
    return ledger.record(
        request_id=request_id,
        level=EgressLevel.RECENT,
        fields=[FieldBytes(name="item_ids", payload_bytes=31, level=EgressLevel.RECENT)],
        payload_bytes=60,
        sha256="ff",
    )


def test_entries_survive_closing_and_are_listed_oldest_first(tmp_path):
    path = tmp_path / "ledger.sqlite"
    first = Ledger(path, clock=lambda: 12.5)
    release_id = record(first)
    first.count_send(release_id)
    first.count_send(release_id)
    first.close()
    second = Ledger(path)
    record(second, "b")
    entries = second.entries()
    assert [entry.request_id for entry in entries] == ["a", "b"]
    assert (entries[0].unix_s, entries[0].sends, entries[1].sends) == (12.5, 2, 0)
    assert entries[0].fields == (FieldBytes(name="item_ids", payload_bytes=31, level=EgressLevel.RECENT),)
    assert [entry.request_id for entry in second.entries("b")] == ["b"]
    second.close()


def test_threads_share_a_ledger():
    ledger = Ledger()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: ledger.count_send(record(ledger, str(number))), range(64)))
    assert sorted(entry.request_id for entry in ledger.entries()) == sorted(map(str, range(64)))
    assert all(entry.sends == 1 for entry in ledger.entries())
    ledger.close()


def test_a_file_that_is_no_ledger_is_refused_and_left_as_it_was(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and long enough to be taken for one" * 40)
    before = text.read_bytes()
    with pytest.raises(UserError, match="no writable SQLite ledger"):
        Ledger(text)
    assert text.read_bytes() == before
    other = tmp_path / "other.sqlite"
    database = sqlite3.connect(other)
    database.execute("CREATE TABLE mine (x)")
    database.commit()
    database.close()
    with pytest.raises(UserError, match="ledger version 0, expected 2"):
        Ledger(other)


def test_a_path_that_cannot_be_opened_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="cannot open the ledger"):
        Ledger(tmp_path / "missing" / "ledger.sqlite")
