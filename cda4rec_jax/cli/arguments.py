"""What several commands take: the words of a situation, and numbers that must be positive."""

from typing import Literal

from cda4rec_jax.errors import UserError

Link = Literal["wifi", "lte", "3g", "edge", "offline"]
Device = Literal["low", "mid", "high"]
Level = Literal["nothing", "profile", "recent", "full"]


def require_positive(value: int | float | None, flag: str, *, or_zero: bool = False) -> None:
    """UserError where a number that was given is not above 0, or not 0 or more."""
    if value is not None and not (value > 0 or (or_zero and value == 0)):
        raise UserError(f"{flag} must be {'0 or more' if or_zero else 'above 0'}, got {value}")
