"""Delimited text, read fast when it is clean, and with every bad line named when it is not."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cda4rec_jax.data.assemble import RawEvents
from cda4rec_jax.errors import UserError

BLOCK_BYTES = 1 << 24  # bounds the memory of the string lists, not the file
SHOWN_LINES = 5


class Problems:
    """Collects what is wrong with a source, so that one error can tell all of it."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._bad_lines: Counter[Path] = Counter()

    def add(self, message: str) -> None:
        """A problem of a whole file or folder."""
        self._messages.append(message)

    def add_line(self, path: Path, line: int, message: str) -> None:
        """A problem of one line, counted from 1. The first few of a file are shown, the others counted."""
        self._bad_lines[path] += 1
        if self._bad_lines[path] <= SHOWN_LINES:
            self._messages.append(f"{path.name}, line {line}: {message}")

    def raise_if_any(self, source: Path) -> None:
        """Raises one UserError that tells every problem, if there is one."""
        hidden = [f"{path.name}: {n - SHOWN_LINES:,} more bad lines" for path, n in self._bad_lines.items() if n > SHOWN_LINES]
        if self._messages:
            listed = "\n".join(f"  - {message}" for message in self._messages + hidden)
            raise UserError(f"cannot read {source}; mend the following and try again:\n{listed}")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a file is written. ``columns`` is None where the first line names them; ``quoted`` follows the rules of CSV."""

    delimiter: str = "\t"
    encoding: str = "utf-8"
    columns: tuple[str, ...] | None = None
    quoted: bool = False


def column_names(header: list[str]) -> list[str]:
    """Names of a header's columns: RecBole writes ``name:type``, and some editors start the file with a mark."""
    return [name.removeprefix("\ufeff").split(":")[0].strip() for name in header]


def check_columns(path: Path, names: list[str], required: tuple[str, ...], layout: Layout, problems: Problems) -> bool:
    """Whether all required columns are there, each once; adds a problem for what is not."""
    missing = [name for name in required if name not in names]
    if missing:
        found = _listed(names) if any(names) else "an empty header"
        hint = _header_hint(names, missing, required, layout)
        problems.add(f"{path.name}: missing column {', '.join(missing)}; expected {', '.join(required)}, found {found}{hint}")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        problems.add(f"{path.name}: column {_listed(repeated)} occurs more than once in the header")
    return not missing and not repeated


def _header_hint(names: list[str], missing: list[str], required: tuple[str, ...], layout: Layout) -> str:
    """What probably happened to a header, and how to mend it."""
    if not any(names):
        return ""
    if len(names) == 1 and len(required) > 1:
        return f": are its columns separated by {_in_words(layout.delimiter)}?"
    if any(name.startswith('"') for name in names):
        return ": take the quotes away, ids and numbers need none"
    if missing == list(required):
        return ": the first line must name the columns"
    if missing == ["timestamp"]:
        return ": where only the order of a user's events is known, number them 0, 1, 2, ..."
    return ""


def _listed(names: list[str]) -> str:
    """The first names of a header, which may be anything at all."""
    shown = [name if name.isprintable() else ascii(name)[1:-1] for name in (name[:30] for name in names[:8])]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def _in_words(delimiter: str) -> str:
    return "tab" if delimiter == "\t" else f"'{delimiter}'"


def _not_text(layout: Layout, byte: int) -> str:
    return f"not {layout.encoding} text: byte 0x{byte:02x}; save the file as {layout.encoding}, and not compressed"


def read_events(path: Path, layout: Layout, columns: tuple[str, str, str], problems: Problems) -> RawEvents | None:
    """Reads users, items and timestamps from the columns so named. Quotes mean nothing here: ids and numbers need none.

    Returns:
        the events in file order, or None if ``problems`` has learned of a bad line, a missing column, or a file without events.
    """
    with path.open("rb") as file:
        try:
            names = list(layout.columns or column_names(_header(file, layout)))
        except UnicodeDecodeError as error:
            problems.add_line(path, 1, _not_text(layout, error.object[error.start]))
            return None
        if not check_columns(path, names, columns, layout, problems):
            return None
        reader = _EventReader(path, layout, names, columns, problems)
        for block in _blocks(file):
            reader.read(block)
    return reader.events()


def read_rows(path: Path, layout: Layout, required: tuple[str, ...], problems: Problems) -> Iterator[dict[str, str]]:
    """Yields the rows of a small table, by column name; bad lines and missing columns go to ``problems``."""
    try:
        text = path.read_bytes().decode(layout.encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.add_line(path, line, _not_text(layout, error.object[error.start]))
        return
    lines = io.StringIO(text.removeprefix("\ufeff").rstrip("\r\n"), newline=None)
    numbered = _quoted_lines(lines, path, problems) if layout.quoted else _plain_lines(lines, layout.delimiter)
    names = list(layout.columns or column_names(next(numbered, (1, []))[1]))
    if not check_columns(path, names, required, layout, problems):
        return
    for line, fields in numbered:
        if len(fields) == len(names):
            yield dict(zip(names, fields, strict=True))
        else:
            problems.add_line(path, line, f"expected {len(names)} fields, found {len(fields)}")


def _plain_lines(lines: io.StringIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    yield from ((number, line.rstrip("\n").split(delimiter)) for number, line in enumerate(lines, 1))


def _quoted_lines(lines: io.StringIO, path: Path, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Rows up to one that cannot be read, which goes to ``problems`` by the line where it begins: after it nothing can be told apart."""
    reader, begins = csv.reader(lines), 1
    try:
        for fields in reader:
            yield reader.line_num, fields
            begins = reader.line_num + 1
    except csv.Error as error:
        problems.add_line(path, begins, f"{error}: is there a quote that is not closed?")


def _header(file: BinaryIO, layout: Layout) -> list[str]:
    return file.readline().decode(layout.encoding).rstrip("\r\n").split(layout.delimiter)


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Whole lines in blocks, without the newline at the end of a block, nor blank lines at the end of the file."""
    block = file.read(BLOCK_BYTES) + file.readline()
    while block:
        following = file.read(BLOCK_BYTES) + file.readline()
        block = block.removesuffix(b"\n") if following else block.rstrip(b"\r\n")
        if block:
            yield block
        block = following


class _EventReader:
    """Reads blocks of lines into codes: at once where a block is clean, line by line to name what is bad where it is not."""

    def __init__(self, path: Path, layout: Layout, names: list[str], columns: tuple[str, str, str], problems: Problems) -> None:
        self._path, self._layout, self._problems = path, layout, problems
        self._width = len(names)
        self._places = tuple(names.index(column) for column in columns)
        self._columns = columns
        self._line = 1 if layout.columns else 2
        self._failed = False
        self._user_codes: dict[str, int] = {}
        self._item_codes: dict[str, int] = {}
        self._users: list[np.ndarray] = []
        self._items: list[np.ndarray] = []
        self._timestamps: list[np.ndarray] = []

    def read(self, block: bytes) -> None:
        """Takes in the next lines of the file."""
        block = block.replace(b"\r\n", b"\n")
        tabbed = block.replace(self._layout.delimiter.encode(), b"\t")
        if not self._read_clean(tabbed):
            self._failed = True
            self._name_bad_lines(tabbed)
        self._line += block.count(b"\n") + 1

    def events(self) -> RawEvents | None:
        """All events read, or None if there was a problem."""
        if not self._failed and not self._users:
            self._problems.add(f"{self._path.name}: the file is empty, expected one interaction a line")
            return None
        if self._failed:
            return None
        return RawEvents(
            user_ids=list(self._user_codes),
            item_ids=list(self._item_codes),
            users=np.concatenate(self._users),
            items=np.concatenate(self._items),
            timestamps=np.concatenate(self._timestamps),
        )

    def _read_clean(self, tabbed: bytes) -> bool:
        text_bytes = np.frombuffer(tabbed + b"\n", np.uint8)
        ends_line = text_bytes[(text_bytes == ord("\t")) | (text_bytes == ord("\n"))] == ord("\n")
        if len(ends_line) % self._width or not np.array_equal(
            ends_line, np.arange(len(ends_line)) % self._width == self._width - 1
        ):
            return False
        try:
            fields = tabbed.decode(self._layout.encoding).replace("\n", "\t").split("\t")
            user, item, time = (fields[place :: self._width] for place in self._places)
            timestamps = np.fromiter(map(float, time), np.float64, len(time))
        except ValueError:  # UnicodeDecodeError is one too
            return False
        self._users.append(_encode(user, self._user_codes))
        self._items.append(_encode(item, self._item_codes))
        self._timestamps.append(timestamps)
        return bool(np.isfinite(timestamps).all()) and "" not in self._user_codes and "" not in self._item_codes

    def _name_bad_lines(self, tabbed: bytes) -> None:
        for number, line in enumerate(tabbed.split(b"\n"), self._line):
            if message := self._fault(line):
                self._problems.add_line(self._path, number, message)

    def _fault(self, line: bytes) -> str:
        try:
            fields = line.decode(self._layout.encoding).split("\t")
        except UnicodeDecodeError as error:
            return _not_text(self._layout, line[error.start])
        if len(fields) != self._width:
            return f"expected {self._width} fields separated by {_in_words(self._layout.delimiter)}, found {len(fields)}: {line[:60]!r}"
        user, item, time = (fields[place] for place in self._places)
        if not user or not item:
            return f"{self._columns[0] if not user else self._columns[1]} is empty"
        try:
            finite = math.isfinite(float(time))
        except ValueError:
            finite = False
        return "" if finite else f"{self._columns[2]} must be a finite number, found {time!r}"


def _encode(ids: list[str], codes: dict[str, int]) -> np.ndarray:
    return np.fromiter((codes.setdefault(name, len(codes)) for name in ids), np.int64, len(ids))
