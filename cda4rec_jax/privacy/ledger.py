"""The device's own record of what left it, in SQLite: when, in which request, which fields, how many bytes, and their hash.

The ledger holds no content: reading it tells what kind of thing left, never the thing.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel

LEDGER_VERSION = 2

_SCHEMA = """
CREATE TABLE releases (
    release_id INTEGER PRIMARY KEY,
    unix_s REAL NOT NULL,
    request_id TEXT NOT NULL,
    level INTEGER NOT NULL,
    fields TEXT NOT NULL,
    payload_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    sends INTEGER NOT NULL
)
"""


@dataclass(frozen=True, kw_only=True)
class FieldBytes:
    """One field of a release: its name, the bytes that its name and value take, and the lowest level at which it may leave."""

    name: str
    payload_bytes: int
    level: EgressLevel


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One release. ``sends`` counts how often its bytes were put on the link."""

    release_id: int
    unix_s: float
    request_id: str
    level: EgressLevel
    fields: tuple[FieldBytes, ...]
    payload_bytes: int
    sha256: str
    sends: int


class Ledger:
    """An append-only table of releases. Safe to share between threads.

    Args:
        path: SQLite file, made if it is not there; None keeps the ledger in memory.
        clock: unix time in seconds.

    Raises:
        UserError: the file cannot be opened or written, or is no ledger of this version.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        where = ":memory:" if path is None else str(path)
        try:
            self._database = sqlite3.connect(where, check_same_thread=False, isolation_level=None)
        except sqlite3.Error as error:
            raise UserError(f"cannot open the ledger {where} ({error}); give a path in a writable folder") from error
        try:
            self._prepare(where)
        except sqlite3.Error as error:
            self._database.close()
            raise UserError(f"{where} is no writable SQLite ledger ({error}); give another path") from error
        except UserError:
            self._database.close()
            raise

    def _prepare(self, where: str) -> None:
        # A full sync costs milliseconds a request; WAL with NORMAL survives a crash of the process, not a power cut.
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        # The write lock is taken before the version is read, so that two openers cannot both create the table.
        self._database.execute("BEGIN IMMEDIATE")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        (tables,) = self._database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if version == 0 and tables == 0:
            self._database.execute(_SCHEMA)
            self._database.execute(f"PRAGMA user_version={LEDGER_VERSION}")
        elif version != LEDGER_VERSION:
            self._database.execute("ROLLBACK")
            raise UserError(f"{where} has ledger version {version}, expected {LEDGER_VERSION}; give another path")
        self._database.execute("COMMIT")

    def record(
        self,
        *,
        request_id: str,
        level: EgressLevel,
        fields: Sequence[FieldBytes],
        payload_bytes: int,
        sha256: str,
    ) -> int:
        """Store one release, not yet sent, and return its ``release_id``. Raises sqlite3.Error if it cannot be stored."""
        listed = json.dumps([[each.name, each.payload_bytes, int(each.level)] for each in fields])
        row = (self._clock(), request_id, int(level), listed, payload_bytes, sha256)
        statement = (
            "INSERT INTO releases (unix_s, request_id, level, fields, payload_bytes, sha256, sends) VALUES (?, ?, ?, ?, ?, ?, 0)"
        )
        with self._lock:
            release_id = self._database.execute(statement, row).lastrowid
        assert release_id is not None
        return release_id

    def count_send(self, release_id: int) -> None:
        """Note that the bytes of a release are put on the link once more.

        Raises:
            sqlite3.Error: it cannot be stored.
            LookupError: there is no such release.
        """
        with self._lock:
            counted = self._database.execute("UPDATE releases SET sends = sends + 1 WHERE release_id = ?", (release_id,)).rowcount
        if counted != 1:
            raise LookupError(f"it holds no release {release_id}")

    def entries(self, request_id: str | None = None) -> list[LedgerEntry]:
        """All releases, oldest first, or those of one request."""
        columns = "release_id, unix_s, request_id, level, fields, payload_bytes, sha256, sends"
        query = f"SELECT {columns} FROM releases WHERE ? IS NULL OR request_id = ? ORDER BY release_id"
        with self._lock:
            rows = self._database.execute(query, (request_id, request_id)).fetchall()
        return [_entry(row) for row in rows]

    def close(self) -> None:
        with self._lock:
            self._database.close()


def _entry(row: tuple) -> LedgerEntry:
    release_id, unix_s, request_id, level, listed, payload_bytes, sha256, sends = row
    fields = tuple(
        FieldBytes(name=name, payload_bytes=size, level=EgressLevel(field_level))
        for name, size, field_level in json.loads(listed)
    )
    return LedgerEntry(
        release_id=release_id,
        unix_s=unix_s,
        request_id=request_id,
        level=EgressLevel(level),
        fields=fields,
        payload_bytes=payload_bytes,
        sha256=sha256,
        sends=sends,
    )
