"""The only door out of the device.

``Gate.release`` is the only maker of ``GatedUplink``, and the wire encodes nothing else. A field above the request's level, above
the user's consent, over its budget, of a wrong form or without a label is refused with ``EgressDenied``; nothing is dropped
silently.

The guard stops mistakes, not a hostile program in the same process: Python has no such boundary.
"""

import hashlib
import sqlite3
import threading
from typing import final

import msgspec
import numpy as np

from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.privacy.ledger import FieldBytes, Ledger
from cda4rec_jax.privacy.levels import LABELS, MAX_COUNTS, UplinkFields

_TOKEN = object()
_ABSTRACT_FIELDS = ("category_shares", "length_bucket", "item_ids", "attributes")


class EgressDenied(Exception):
    """The gate let nothing out. The message names the field and the rule, never the value."""


@final
class GatedUplink:
    """Fields that may leave the device, as the gate saw them. Only the gate makes one; resending it resends the same bytes.

    Attributes:
        fields: what leaves; immutable.
        body: its canonical msgpack bytes, whose hash the ledger holds.
        ledger: where it is recorded, and its sends are counted.
        release_id: its row there.
    """

    __slots__ = ("body", "fields", "ledger", "release_id")

    body: bytes
    fields: UplinkFields
    ledger: Ledger
    release_id: int

    def __init__(self, token: object, fields: UplinkFields, body: bytes, ledger: Ledger, release_id: int) -> None:
        if token is not _TOKEN:
            raise TypeError("a GatedUplink comes from Gate.release only")
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "body", body)
        object.__setattr__(self, "ledger", ledger)
        object.__setattr__(self, "release_id", release_id)

    def __init_subclass__(cls, **kwargs: object) -> None:
        raise TypeError("GatedUplink cannot be subclassed: it comes from Gate.release only")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"GatedUplink is immutable: cannot set {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"GatedUplink is immutable: cannot delete {name}")

    def __reduce__(self) -> str:
        raise TypeError("a GatedUplink cannot be copied or pickled: it comes from Gate.release only")


class Gate:
    """Checks every uplink against labels, budgets and the user's consent of this moment, and records it before it can leave.

    Safe to share between threads. Withdrawn consent holds for every later ``release`` and every later send.
    """

    def __init__(self, consent: EgressLevel, ledger: Ledger) -> None:
        self._consent = consent
        self._ledger = ledger
        self._lock = threading.Lock()

    @property
    def consent(self) -> EgressLevel:
        """The highest level at which anything may leave now."""
        return self._consent

    def revoke(self, consent: EgressLevel = EgressLevel.NOTHING) -> None:
        """Lower the consent at once. Raises ValueError if ``consent`` is above the present one."""
        with self._lock:
            if consent > self._consent:
                raise ValueError(f"consent is {self._consent.name}; revoke cannot raise it to {consent.name}")
            self._consent = consent

    def release(self, fields: UplinkFields) -> GatedUplink:
        """Let the fields out, the whole of what is to leave: one row in the ledger, and an object that the wire accepts.

        Raises:
            EgressDenied: a rule forbids a field, or the ledger cannot record the release.
        """
        with self._lock:
            checked, listed, body = _check(fields, self._consent)
            try:
                release_id = self._ledger.record(
                    request_id=checked.request_id,
                    level=checked.level,
                    fields=listed,
                    payload_bytes=len(body),
                    sha256=hashlib.sha256(body).hexdigest(),
                )
            except sqlite3.Error as error:
                raise EgressDenied(f"the ledger cannot record the release ({error}), so nothing leaves") from error
        return GatedUplink(_TOKEN, checked, body, self._ledger, release_id)

    def authorise_send(self, gated: GatedUplink) -> None:
        """Call before each time the bytes are put on the link: consent is checked again, and the send is counted.

        Raises:
            EgressDenied: consent was withdrawn since the release, the release is in another ledger, or the ledger cannot count the send.
        """
        with self._lock:
            if gated.fields.level > self._consent:
                raise EgressDenied(f"consent is now {self._consent.name}; {gated.fields.level.name} stays here")
            if gated.ledger is not self._ledger:
                raise EgressDenied("the release is in another ledger than this gate's, so nothing leaves")
            try:
                self._ledger.count_send(gated.release_id)
            except (sqlite3.Error, LookupError) as error:
                raise EgressDenied(f"the ledger cannot count the send ({error}), so nothing leaves") from error


def _check(fields: UplinkFields, consent: EgressLevel) -> tuple[UplinkFields, list[FieldBytes], bytes]:
    """The validated fields, their listing, and their canonical bytes; or EgressDenied."""
    if not isinstance(fields, UplinkFields):
        raise EgressDenied(f"got {type(fields).__name__}; only UplinkFields may leave")
    unknown = sorted(set(type(fields).__struct_fields__) - set(LABELS))
    if unknown:
        raise EgressDenied(f"no label for the fields {unknown}: what has no label does not leave")
    try:
        present = msgspec.to_builtins(fields, builtin_types=(bytes,))
        checked = msgspec.convert(present, UplinkFields, builtin_types=(bytes,))
    except (msgspec.ValidationError, TypeError) as error:
        raise EgressDenied(f"a field has a wrong form: {error}") from error
    if checked.level > consent:
        raise EgressDenied(f"the request is of level {checked.level.name}, the user consents to {consent.name}")
    if checked.level is EgressLevel.NOTHING:
        raise EgressDenied("a request of level NOTHING tells nothing of the user: run a local plan instead")
    _check_form(checked)
    listed = [_check_field(name, value, checked.level) for name, value in present.items()]
    return checked, listed, msgspec.msgpack.encode(checked)


def _check_field(name: str, value: object, level: EgressLevel) -> FieldBytes:
    label = LABELS[name]
    if level not in label.budget_bytes:
        raise EgressDenied(f"{name} leaves from level {label.minimum_level.name} on; this request is of level {level.name}")
    most = MAX_COUNTS.get(name, {}).get(level)
    if most is not None and isinstance(value, tuple | list) and len(value) > most:
        raise EgressDenied(f"{name} has {len(value)} entries; {level.name} allows {most}")
    size = len(msgspec.msgpack.encode(value))
    if size > label.budget_bytes[level]:
        raise EgressDenied(f"{name} takes {size} bytes; its budget is {label.budget_bytes[level]}")
    # An embedding tells whatever it was made from, and that is the level of the request.
    leaves_at = level if name == "semantic_embedding" else label.minimum_level
    return FieldBytes(name=name, payload_bytes=size + len(msgspec.msgpack.encode(name)), level=leaves_at)


def _check_form(fields: UplinkFields) -> None:
    embedding = fields.semantic_embedding
    if embedding is None:
        if fields.length_bucket is None:
            raise EgressDenied("a fresh request needs length_bucket; a reusing one needs semantic_embedding")
    else:
        mixed = [name for name in _ABSTRACT_FIELDS if getattr(fields, name) not in ((), None)]
        if mixed:
            raise EgressDenied(f"a reused embedding leaves alone, without {mixed}")
        if len(embedding) == 0 or len(embedding) % 4 or not np.isfinite(np.frombuffer(embedding, "<f4")).all():
            raise EgressDenied("semantic_embedding is not a row of finite float32 values")
    categories = [index for index, _ in fields.category_shares]
    if len(set(categories)) < len(categories):
        raise EgressDenied("category_shares names a category twice")
    if not np.isfinite(fields.deadline_unix_ms):
        raise EgressDenied("deadline_unix_ms is not finite")
