"""What several commands take: the words of a situation, numbers that must be positive, and paths."""

from pathlib import Path
from typing import Literal

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from cda4rec_jax.errors import UserError

Link = Literal["wifi", "lte", "3g", "edge", "offline"]
Device = Literal["low", "mid", "high"]
Level = Literal["nothing", "profile", "recent", "full"]

ARGUMENT_TYPES = ConstructorRegistry()  # how commands read their arguments, where tyro reads them in another way


@ARGUMENT_TYPES.primitive_rule
def _expanded_path(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Every path with its ~ expanded: a shell leaves it as it is in ``--out=~/run``."""
    if type_info.type is not Path:
        return None

    def path_of(words: list[str]) -> Path:
        try:
            return Path(words[0]).expanduser()
        except RuntimeError as error:  # tyro tells a ValueError to the user
            raise ValueError(f"{words[0]}: {error}") from error

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=path_of,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def require_positive(value: int | float | None, flag: str, *, or_zero: bool = False) -> None:
    """UserError where a number that was given is not above 0, or not 0 or more."""
    if value is not None and not (value > 0 or (or_zero and value == 0)):
        raise UserError(f"{flag} must be {'0 or more' if or_zero else 'above 0'}, got {value}")
