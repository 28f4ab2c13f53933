"""RecBole atomic files: tab-separated tables ``NAME.inter``, ``NAME.item`` and ``NAME.user`` with a header of ``name:type``.

``.inter`` needs user_id, item_id and timestamp. ``.item`` and ``.user`` may be absent. A title is read from the column title,
movie_title, item_name or name; categories from categories or category, joined by " | ", or from class, genre or genres, joined by
blanks as in RecBole's own conversions. Every column of ``.user`` besides user_id becomes a user attribute.
Format: https://recbole.io/docs/user_guide/data/atomic_files.html
"""

from collections.abc import Callable
from pathlib import Path

from cda4rec_jax.data.assemble import ItemText, RawTexts, Reading, assemble
from cda4rec_jax.data.formats.tables import Layout, Problems, read_events, read_rows
from cda4rec_jax.data.interactions import Finding

LAYOUT = Layout()
TITLE_COLUMNS = ("title", "movie_title", "item_name", "name")
PIPED_COLUMNS = ("categories", "category")
BLANK_COLUMNS = ("class", "genre", "genres")


def recognises(folder: Path) -> bool:
    """Whether the folder holds RecBole atomic files."""
    return any(folder.glob("*.inter"))


def read_recbole(folder: Path) -> Reading:
    """Reads a folder of atomic files.

    Raises:
        UserError: with everything that is wrong in any of the files.
    """
    problems = Problems()
    tables = sorted(folder.glob("*.inter"))
    if len(tables) > 1:
        found = ", ".join(path.name for path in tables)
        problems.add(f"expected one .inter file, found {found}: give each dataset its own folder")
    problems.raise_if_any(folder)
    table = tables[0]
    events = read_events(table, LAYOUT, ("user_id", "item_id", "timestamp"), problems)
    items, item_findings = _read_items(table.with_suffix(".item"), problems)
    names, users, user_findings = _read_users(table.with_suffix(".user"), problems)
    problems.raise_if_any(folder)
    assert events is not None  # a missing table is among the problems
    texts = RawTexts(items=items, attribute_names=names, users=users, findings=item_findings + user_findings)
    return assemble(folder.resolve().name, events, texts)


def _read_items(path: Path, problems: Problems) -> tuple[dict[str, ItemText], tuple[Finding, ...]]:
    if not path.exists():
        return {}, (Finding(action="missing", subject="item files", count=1, reason=f"no {path.name}: items have no text"),)
    items: dict[str, ItemText] = {}
    repeats: list[str] = []
    text_of: Callable[[dict[str, str]], ItemText] | None = None
    for row in read_rows(path, LAYOUT, ("item_id",), problems):
        text_of = text_of or _item_text_reader(tuple(row))
        if items.setdefault(row["item_id"], text := text_of(row)) is not text:
            repeats.append(row["item_id"])
    return items, _repeats("items", path, repeats)


def _item_text_reader(columns: tuple[str, ...]) -> Callable[[dict[str, str]], ItemText]:
    title = next((name for name in TITLE_COLUMNS if name in columns), None)
    category = next((name for name in PIPED_COLUMNS + BLANK_COLUMNS if name in columns), None)
    separator = " | " if category in PIPED_COLUMNS else " "

    def text_of(row: dict[str, str]) -> ItemText:
        parts = [part.strip() for part in row[category].split(separator)] if category else []
        categories = tuple(dict.fromkeys(part for part in parts if part))
        return ItemText(title=row[title].strip() if title else "", categories=categories)

    return text_of


def _read_users(path: Path, problems: Problems) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], tuple[Finding, ...]]:
    names: tuple[str, ...] = ()
    users: dict[str, tuple[str, ...]] = {}
    repeats: list[str] = []
    rows = read_rows(path, LAYOUT, ("user_id",), problems) if path.exists() else ()
    for row in rows:
        names = names or tuple(name for name in row if name != "user_id")
        values = tuple(row[name] for name in names)
        if users.setdefault(row["user_id"], values) is not values:
            repeats.append(row["user_id"])
    return names, users, _repeats("users", path, repeats)


def _repeats(subject: str, path: Path, repeats: list[str]) -> tuple[Finding, ...]:
    if not repeats:
        return ()
    reason = f"described again in {path.name}: the first description holds"
    return (Finding(action="dropped", subject=subject, count=len(repeats), reason=reason, examples=tuple(repeats[:3])),)
