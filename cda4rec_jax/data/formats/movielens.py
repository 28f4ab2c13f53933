"""MovieLens as GroupLens distributes it: ``u.data`` (100K), ``ratings.dat`` with ``::`` between fields (1M, 10M), ``ratings.csv`` (later).

A rating counts as an interaction, whatever its value. Formats: the README files at https://grouplens.org/datasets/movielens/
"""

from pathlib import Path

from cda4rec_jax.data.assemble import ItemText, RawTexts, Reading, assemble
from cda4rec_jax.data.formats.tables import Layout, Problems, read_events, read_rows
from cda4rec_jax.data.interactions import Finding

RATINGS = ("u.data", "ratings.dat", "ratings.csv")
ATTRIBUTES = ("gender", "age", "occupation", "zip_code")
NO_GENRES = "(no genres listed)"
# The 100K release has a column of 0 and 1 for each genre, after one for films of none.
GENRES_100K = (
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir"),
    *("Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def recognises(folder: Path) -> bool:
    """Whether the folder holds MovieLens ratings."""
    return any((folder / name).exists() for name in RATINGS)


def read_movielens(folder: Path) -> Reading:
    """Reads ratings, titles, genres and, in the 100K and 1M releases, user attributes.

    Raises:
        UserError: with everything that is wrong in any of the files.
    """
    problems = Problems()
    if (folder / "u.data").exists():
        ratings = Layout(columns=("user", "item", "rating", "timestamp"))
        films = _piped("movieId", "title", "released", "released_on_video", "address", "none", *GENRES_100K)
        events = read_events(folder / "u.data", ratings, ("user", "item", "timestamp"), problems)
        items, findings = _read_items(folder / "u.item", films, problems)
        users = _read_users(folder / "u.user", _piped("user", "age", "gender", "occupation", "zip_code"), problems)
    elif (folder / "ratings.dat").exists():
        ratings = _dat("user", "item", "rating", "timestamp")
        events = read_events(folder / "ratings.dat", ratings, ("user", "item", "timestamp"), problems)
        items, findings = _read_items(folder / "movies.dat", _dat("movieId", "title", "genres"), problems)
        users = _read_users(folder / "users.dat", _dat("user", *ATTRIBUTES), problems)
    else:
        events = read_events(folder / "ratings.csv", Layout(delimiter=","), ("userId", "movieId", "timestamp"), problems)
        items, findings = _read_items(folder / "movies.csv", Layout(delimiter=",", quoted=True), problems)
        users = {}
    problems.raise_if_any(folder)
    assert events is not None  # a missing table is among the problems
    texts = RawTexts(items=items, attribute_names=ATTRIBUTES if users else (), users=users, findings=findings)
    return assemble(folder.resolve().name, events, texts)


def _dat(*columns: str) -> Layout:
    return Layout(delimiter="::", encoding="latin-1", columns=columns)


def _piped(*columns: str) -> Layout:
    return Layout(delimiter="|", encoding="latin-1", columns=columns)


def _read_items(path: Path, layout: Layout, problems: Problems) -> tuple[dict[str, ItemText], tuple[Finding, ...]]:
    if not path.exists():
        return {}, (Finding(action="missing", subject="item files", count=1, reason=f"no {path.name}: items have no text"),)
    items: dict[str, ItemText] = {}
    for row in read_rows(path, layout, layout.columns or ("movieId", "title", "genres"), problems):
        genres = row["genres"].split("|") if "genres" in row else [name for name in GENRES_100K if row[name] == "1"]
        categories = tuple(genre for genre in genres if genre and genre != NO_GENRES)
        items[row["movieId"]] = ItemText(title=row["title"].strip(), categories=categories)
    return items, ()


def _read_users(path: Path, layout: Layout, problems: Problems) -> dict[str, tuple[str, ...]]:
    if not path.exists():
        return {}
    rows = read_rows(path, layout, ("user",), problems)
    return {row["user"]: tuple(row[name] for name in ATTRIBUTES) for row in rows}
