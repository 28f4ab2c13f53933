"""MovieLens as GroupLens distributes it: ``ratings.dat`` with ``::`` between fields (1M, 10M), or ``ratings.csv`` (later).

A rating counts as an interaction, whatever its value. Formats: the README files at https://grouplens.org/datasets/movielens/
"""

from pathlib import Path

from cda4rec_jax.data.assemble import ItemText, RawTexts, Reading, assemble
from cda4rec_jax.data.formats.tables import Layout, Problems, read_events, read_rows
from cda4rec_jax.data.interactions import Finding

ATTRIBUTES = ("gender", "age", "occupation", "zip_code")
NO_GENRES = "(no genres listed)"


def recognises(folder: Path) -> bool:
    """Whether the folder holds MovieLens ratings."""
    return (folder / "ratings.dat").exists() or (folder / "ratings.csv").exists()


def read_movielens(folder: Path) -> Reading:
    """Reads ratings, titles, genres and, in the 1M release, user attributes.

    Raises:
        UserError: with everything that is wrong in any of the files.
    """
    problems = Problems()
    if (folder / "ratings.dat").exists():
        ratings = _dat("user", "item", "rating", "timestamp")
        events = read_events(folder / "ratings.dat", ratings, ("user", "item", "timestamp"), problems)
        items, findings = _read_items(folder / "movies.dat", _dat("movieId", "title", "genres"), problems)
    else:
        events = read_events(folder / "ratings.csv", Layout(delimiter=","), ("userId", "movieId", "timestamp"), problems)
        items, findings = _read_items(folder / "movies.csv", Layout(delimiter=",", quoted=True), problems)
    users = _read_users(folder / "users.dat", problems)
    problems.raise_if_any(folder)
    assert events is not None  # a missing table is among the problems
    texts = RawTexts(items=items, attribute_names=ATTRIBUTES if users else (), users=users, findings=findings)
    return assemble(folder.resolve().name, events, texts)


def _dat(*columns: str) -> Layout:
    return Layout(delimiter="::", encoding="latin-1", columns=columns)


def _read_items(path: Path, layout: Layout, problems: Problems) -> tuple[dict[str, ItemText], tuple[Finding, ...]]:
    if not path.exists():
        return {}, (Finding(action="missing", subject="item files", count=1, reason=f"no {path.name}: items have no text"),)
    items: dict[str, ItemText] = {}
    for row in read_rows(path, layout, ("movieId", "title", "genres"), problems):
        genres = tuple(genre for genre in row["genres"].split("|") if genre and genre != NO_GENRES)
        items[row["movieId"]] = ItemText(title=row["title"].strip(), categories=genres)
    return items, ()


def _read_users(path: Path, problems: Problems) -> dict[str, tuple[str, ...]]:
    if not path.exists():
        return {}
    rows = read_rows(path, _dat("user", *ATTRIBUTES), ("user",), problems)
    return {row["user"]: tuple(row[name] for name in ATTRIBUTES) for row in rows}
