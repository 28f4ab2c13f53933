"""How words of the command line become values, the words of a situation, and numbers that must be positive."""

from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from cda4rec_jax.errors import UserError

Link = Literal["wifi", "lte", "3g", "edge", "offline"]
Device = Literal["low", "mid", "high"]
Level = Literal["nothing", "profile", "recent", "full"]

ARGUMENT_TYPES = ConstructorRegistry()  # how commands read their arguments, where tyro reads them in another way


@ARGUMENT_TYPES.primitive_rule
def _of_one_word(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers, words and paths, also where they may be left out: tyro's own help and errors would speak of None then.

    Every path has its ~ expanded: a shell leaves it as it is in ``--out=~/run``.
    """
    kind, optional = _required(type_info.type)
    if kind not in _WORDS:
        return None
    expected, read = _WORDS[kind]

    def value_of(words: list[str]) -> Any:
        try:
            return read(words[0])
        except (ValueError, RuntimeError) as error:  # tyro tells a ValueError to the user
            raise ValueError(f"got {words[0]!r}, expected {expected}") from error

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=value_of,
        is_instance=lambda value: isinstance(value, kind) or (optional and value is None),
        str_from_instance=lambda value: [_NONE if value is None else str(value)],
    )


@ARGUMENT_TYPES.primitive_rule
def _of_named_words(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """One of a few words, where it may be left out."""
    kind, optional = _required(type_info.type)
    if not optional or get_origin(kind) is not Literal:
        return None
    names = get_args(kind)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(names) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or value in names,
        str_from_instance=lambda value: [value or _NONE],
        choices=names,
    )


@ARGUMENT_TYPES.primitive_rule
def _of_some_words(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Any number of words, where they may be left out."""
    kind, optional = _required(type_info.type)
    if not optional or kind != tuple[str, ...]:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[STR ...]",
        instance_from_str=tuple,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [_NONE] if value is None else list(value),
    )


def _required(asked: Any) -> tuple[Any, bool]:
    """The type without None, and whether None was among it."""
    kinds = get_args(asked) if get_origin(asked) in (Union, UnionType) else ()
    return (kinds[0], True) if len(kinds) == 2 and kinds[1] is NoneType else (asked, False)


_NONE = "none"  # as the default of what may be left out is told
_WORDS: dict[type, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a number", float),
    str: ("a word", str),
    Path: ("a path of a user that exists", lambda word: Path(word).expanduser()),
}


def require_positive(value: int | float | None, flag: str, *, or_zero: bool = False) -> None:
    """UserError where a number that was given is not above 0, or not 0 or more."""
    if value is not None and not (value > 0 or (or_zero and value == 0)):
        raise UserError(f"{flag} must be {'0 or more' if or_zero else 'above 0'}, got {value}")
