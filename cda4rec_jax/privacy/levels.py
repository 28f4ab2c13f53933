"""What may leave the device: the uplink's fields, and for each of them what it tells, from which level on, and how much of it.

Egress is denied by default: a field without a label here has no level at which it may leave.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec

from cda4rec_jax.messages import EgressLevel

MAX_PROFILE_CATEGORIES = 8
MAX_RECENT_ITEMS = 10
MAX_FULL_ITEMS = 200
MAX_ATTRIBUTES = 32
MAX_EMBEDDING_BYTES = 16_384  # 4,096 values in float32

RequestId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
NumCandidates = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
CategoryShare = tuple[Annotated[int, msgspec.Meta(ge=0, le=255)], Annotated[int, msgspec.Meta(ge=1, le=15)]]
LengthBucket = Annotated[int, msgspec.Meta(ge=0, le=3)]
ItemIndex = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
AttributeIndex = Annotated[int, msgspec.Meta(ge=0, le=65_535)]


class UplinkFields(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Everything that one request may carry to the cloud. It becomes bytes only through ``gate.Gate.release``.

    A fresh request carries the abstract (category shares, length bucket, ids, attributes) and no embedding; a reusing request
    carries the embedding alone, and then ``level`` is the level that the embedding was made from.
    """

    request_id: RequestId  # random, never derived from the user
    deadline_unix_ms: float  # absolute: the cloud does not begin work that nobody waits for
    level: EgressLevel
    num_candidates: NumCandidates
    want_evidence: bool = False  # rows of item-item evidence for ranking on the device
    want_ranking: bool = False  # the cloud ranks
    want_structured: bool = False  # the cloud also does structured user modelling
    category_shares: tuple[CategoryShare, ...] = ()  # (category index, share in 4 bits), of the events that are not in `item_ids`
    length_bucket: LengthBucket | None = None  # 0: up to 5 events, 1: up to 20, 2: up to 100, 3: more
    item_ids: tuple[ItemIndex, ...] = ()  # item indices, oldest first
    attributes: tuple[AttributeIndex, ...] = ()  # indices of the user's attribute columns
    semantic_embedding: bytes | None = None  # float32, little endian


@dataclass(frozen=True, kw_only=True)
class FieldLabel:
    """What a field tells of the user, and its budget: the most bytes of its value at each level at which it may leave.

    A level that is not among the keys of ``budget_bytes`` forbids the field.
    """

    tells: str
    budget_bytes: Mapping[EgressLevel, int]

    @property
    def minimum_level(self) -> EgressLevel:
        return min(self.budget_bytes)


def _from(level: EgressLevel, budget_bytes: int) -> dict[EgressLevel, int]:
    return {higher: budget_bytes for higher in EgressLevel if higher >= level}


_NOT_THE_USER = "nothing of the user"
LABELS: Mapping[str, FieldLabel] = {
    "request_id": FieldLabel(tells=_NOT_THE_USER, budget_bytes=_from(EgressLevel.NOTHING, 34)),
    "deadline_unix_ms": FieldLabel(tells=_NOT_THE_USER, budget_bytes=_from(EgressLevel.NOTHING, 9)),
    "level": FieldLabel(tells=_NOT_THE_USER, budget_bytes=_from(EgressLevel.NOTHING, 1)),
    "num_candidates": FieldLabel(tells=_NOT_THE_USER, budget_bytes=_from(EgressLevel.NOTHING, 3)),
    "want_evidence": FieldLabel(tells=_NOT_THE_USER, budget_bytes=_from(EgressLevel.NOTHING, 1)),
    "want_ranking": FieldLabel(tells=_NOT_THE_USER, budget_bytes=_from(EgressLevel.NOTHING, 1)),
    "want_structured": FieldLabel(tells=_NOT_THE_USER, budget_bytes=_from(EgressLevel.FULL, 1)),
    "category_shares": FieldLabel(tells="interests", budget_bytes=_from(EgressLevel.PROFILE, 1 + 4 * MAX_PROFILE_CATEGORIES)),
    "length_bucket": FieldLabel(tells="amount of activity", budget_bytes=_from(EgressLevel.PROFILE, 1)),
    "item_ids": FieldLabel(
        tells="single interactions",
        budget_bytes={EgressLevel.RECENT: 1 + 5 * MAX_RECENT_ITEMS, EgressLevel.FULL: 3 + 5 * MAX_FULL_ITEMS},
    ),
    "attributes": FieldLabel(tells="personal attributes", budget_bytes=_from(EgressLevel.FULL, 3 + 3 * MAX_ATTRIBUTES)),
    "semantic_embedding": FieldLabel(
        tells="whatever it was made from", budget_bytes=_from(EgressLevel.PROFILE, 3 + MAX_EMBEDDING_BYTES)
    ),
}

MAX_COUNTS: Mapping[str, Mapping[EgressLevel, int]] = {
    "category_shares": _from(EgressLevel.PROFILE, MAX_PROFILE_CATEGORIES),
    "item_ids": {EgressLevel.RECENT: MAX_RECENT_ITEMS, EgressLevel.FULL: MAX_FULL_ITEMS},
    "attributes": _from(EgressLevel.FULL, MAX_ATTRIBUTES),
}
