"""Where interactions come from: one function for every kind of source."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from cda4rec_jax.data.assemble import Reading, counts
from cda4rec_jax.data.formats import movielens, recbole
from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.data.prepared import load_prepared
from cda4rec_jax.data.prepared import recognises as is_prepared
from cda4rec_jax.data.synthetic import SyntheticConfig, synthetic_world
from cda4rec_jax.errors import UserError

SYNTHETIC = "synthetic"
EXPECTED = (
    "expected 'synthetic', a prepared folder (metadata.json), a RecBole folder (NAME.inter) or a MovieLens folder "
    f"({', '.join(movielens.RATINGS[:-1])} or {movielens.RATINGS[-1]})"
)


def read_interactions(source: str) -> Interactions:
    """Interactions of a source, as ``read_source``, for callers who need no account of what was dropped."""
    return read_source(source).interactions


def read_source(source: str) -> Reading:
    """Reads ``"synthetic"`` (or ``"synthetic:seed=1,users=500"``), a prepared folder, a RecBole folder or a MovieLens folder.

    Raises:
        UserError: if there is no such source, or with everything that is wrong in it.
    """
    if _is_synthetic(source):
        return _whole(_read_synthetic(source.removeprefix(SYNTHETIC).removeprefix(":")))
    folder = Path(source).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"data source {source!r} {what}: {EXPECTED}")
    try:
        if is_prepared(folder):
            return _whole(load_prepared(folder))
        if recbole.recognises(folder):
            return recbole.read_recbole(folder)
        if movielens.recognises(folder):
            return movielens.read_movielens(folder)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}; check that the file is there and readable") from error
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(f"data source {source!r} holds {found}: {EXPECTED}; docs/commands.md shows data of your own")


def source_name(source: str) -> str:
    """What a source is called, such as in the name of a run: ``"synthetic"``, or the name of the folder."""
    return SYNTHETIC if _is_synthetic(source) else Path(source).expanduser().resolve().name


def _is_synthetic(source: str) -> bool:
    return source == SYNTHETIC or source.startswith(f"{SYNTHETIC}:")


def _whole(interactions: Interactions) -> Reading:
    return Reading(interactions=interactions, found=counts(interactions), findings=())


def _read_synthetic(settings: str) -> Interactions:
    """``settings`` is empty or ``key=value,...``; a key is a field of SyntheticConfig, whose ``num_`` may be left out."""
    kinds: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(SyntheticConfig)}
    values: dict[str, Any] = {}
    problems = []
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        name = key if key in kinds else f"num_{key}"
        if name not in kinds:
            close = difflib.get_close_matches(key, [*kinds, *(kind.removeprefix("num_") for kind in kinds)], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(kinds)}"
            problems.append(f"unknown setting {key!r}: {hint}")
            continue
        try:
            values[name] = kinds[name](value)
        except ValueError:
            problems.append(f"{key} must be {'a whole number' if kinds[name] is int else 'a number'}, got {value!r}")
    if problems:
        raise UserError(f"cannot make the world of {SYNTHETIC}:{settings}: " + "; ".join(problems))
    return synthetic_world(SyntheticConfig(**values)).interactions
