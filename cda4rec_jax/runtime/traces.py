"""Traces of requests, one JSON object a line: what the planner saw, what it chose, and what came of it.

A line never holds a user's id or history. ``user`` is a hash with a salt that is drawn for each ``TraceLog`` and never stored: it
tells which lines of one session belong together, and nothing else. The context does describe the history in numbers (its length, its
spread over categories), so a file of traces is as private as a PROFILE; nothing here sends it anywhere.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, Link, Placement, Subtask, Trace
from cda4rec_jax.runs.artifacts import TrainedSystem

TRACE_VERSION = 1
_BEGIN = b'{"version":'  # of every line
SHOWN_PROBLEMS = 10  # bad lines of a file that a message quotes

_Amount = Annotated[float, msgspec.Meta(ge=0.0)]
_Bytes = Annotated[int, msgspec.Meta(ge=0)]


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which run decided."""

    weights: str  # ``weights_fingerprint``
    dataset_fingerprint: str
    commit: str | None  # of the code that trained it


class StoredContext(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``messages.Context`` of one request; enums by number."""

    history_length: _Amount
    cache_age_events: _Amount
    cache_level: EgressLevel
    category_entropy: _Amount
    rare_share: _Amount
    session_count: _Amount
    hours_since_last: _Amount
    has_timestamps: _Amount
    tier: DeviceTier
    free_memory_mb: _Amount
    link: Link
    round_trip_ms: _Amount
    uplink_kbps: _Amount
    downlink_kbps: _Amount
    consent: EgressLevel
    utility_per_ms: _Amount
    utility_per_mj: _Amount
    utility_per_exposure: _Amount


class StoredSpan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``messages.Span``."""

    subtask: Subtask
    placement: Placement
    start_ms: _Amount
    end_ms: _Amount
    predicted_ms: _Amount
    payload_bytes: _Bytes


class StoredTrace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request.

    Attributes:
        version: of this schema.
        time_unix_ms: when it ended.
        run, user: who decided for whom; see ``RunIdentity`` and the module.
        context: what the planner saw.
        asked_for: the plan that the caller asked for; None where the planner was free.
        plan, executed_plan: names; they differ where something went wrong on the way.
        spans, latency_ms, predicted_ms, uplink_bytes, downlink_bytes, flags: as in ``messages.Trace``.
    """

    version: Literal[1] = TRACE_VERSION
    time_unix_ms: _Amount
    run: RunIdentity
    user: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    context: StoredContext
    asked_for: str | None
    plan: str
    executed_plan: str
    spans: tuple[StoredSpan, ...]
    latency_ms: _Amount
    predicted_ms: _Amount
    uplink_bytes: _Bytes
    downlink_bytes: _Bytes
    flags: tuple[str, ...]


def weights_fingerprint(trained: TrainedSystem) -> str:
    """SHA-256 over all weights that serve, in the order of the tree: two runs have the same only if they decide and rank alike."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trained.weights):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def run_identity(trained: TrainedSystem) -> RunIdentity:
    """Identity of a run that is in memory."""
    provenance = trained.run.read_json("provenance")
    return RunIdentity(
        weights=weights_fingerprint(trained),
        dataset_fingerprint=trained.corpus.interactions.fingerprint,
        commit=provenance["commit"],
    )


class TraceLog:
    """Appends traces to a file; several processes may append to one.

    Args:
        path: file, made if it is not there. A line that a dying process left unfinished stays a line of its own.
        run: whose traces they are.

    Raises:
        UserError: the file cannot be written, or holds something else.
    """

    def __init__(self, path: Path | str, run: RunIdentity) -> None:
        self.path, self._run, self._salt = Path(path).expanduser(), run, secrets.token_bytes(32)
        try:
            if self._is_something_else():
                raise UserError(f"{self.path} holds something else than traces, which would be lost: name another file")
            self._write(b"\n" if self._is_torn() else b"")
        except OSError as error:
            raise UserError(
                f"cannot write traces to {self.path} ({error.strerror}): name a file in a folder that can be written"
            ) from error

    def append(self, user_id: str, context: Context, asked_for: str | None, trace: Trace) -> None:
        """Keep one request (b = 1) of a user."""
        stored = StoredTrace(
            time_unix_ms=time.time() * 1e3,
            run=self._run,
            user=hashlib.sha256(self._salt + user_id.encode()).hexdigest()[:32],
            context=stored_context(context),
            asked_for=asked_for,
            plan=trace.plan.name,
            executed_plan=trace.executed_plan.name,
            spans=tuple(StoredSpan(**vars(span)) for span in trace.spans),
            latency_ms=trace.latency_ms,
            predicted_ms=trace.predicted_ms,
            uplink_bytes=trace.uplink_bytes,
            downlink_bytes=trace.downlink_bytes,
            flags=trace.flags,
        )
        self._write(msgspec.json.encode(stored) + b"\n")

    def _is_something_else(self) -> bool:
        """Whether there is a file that does not begin as traces do, whole or torn."""
        if not self.path.is_file():
            return False
        with self.path.open("rb") as file:
            begin = file.read(len(_BEGIN))
        return bool(begin.strip()) and not _BEGIN.startswith(begin)

    def _is_torn(self) -> bool:
        """Whether the last line has no end."""
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def _write(self, line: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(line)


def stored_context(context: Context) -> StoredContext:
    """One request's context (b = 1) as plain values."""
    values: dict[str, Any] = {entry.name: np.asarray(getattr(context, entry.name)).item() for entry in fields(Context)}
    return msgspec.convert(values, StoredContext)


def batch_contexts(stored: Sequence[StoredContext]) -> Context:
    """The contexts as one batch, [b]."""
    enums = {"cache_level", "tier", "link", "consent"}
    columns = {name: [getattr(context, name) for context in stored] for name in StoredContext.__struct_fields__}
    return Context(**{name: jnp.asarray(column, jnp.int32 if name in enums else jnp.float32) for name, column in columns.items()})


def read_traces(path: Path | str) -> tuple[StoredTrace, ...]:
    """All traces of a file.

    Raises:
        UserError: no such file, no line in it, or lines that are no traces of this version: all of them, by number.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read traces from {path} ({error.strerror}): pass a file that --traces wrote") from error
    decoder, traces, problems = msgspec.json.Decoder(StoredTrace), [], []
    for number, line in enumerate(lines, start=1):
        try:
            traces.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise UserError(
            f"{path}: {len(problems)} of {len(lines)} lines are no traces of version {TRACE_VERSION}: "
            f"{'; '.join(problems[:SHOWN_PROBLEMS])}{more}. Take these lines out, or record again"
        )
    if not traces:
        raise UserError(f"{path} is empty: record traces with cda4rec plan record, or cda4rec recommend --traces")
    return tuple(traces)
