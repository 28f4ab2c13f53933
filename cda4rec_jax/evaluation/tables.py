"""Tables as text: for a console of 100 columns, and as Markdown."""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from cda4rec_jax.metrics import Interval


@dataclass(frozen=True, kw_only=True)
class Table:
    """A first column of names, and columns of numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def number(value: float, digits: int) -> str:
    """The value with this many decimals."""
    return f"{value:,.{digits}f}"


def interval_text(interval: Interval | None) -> str:
    """A mean difference and its interval, or a dash."""
    if interval is None:
        return "-"
    return f"{interval.mean_difference:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def print_table(console: Console, table: Table) -> None:
    """Print a table; on a terminal that is too narrow for it, cells go on in a second line."""
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    console.print(table.title, style="bold", highlight=False, markup=False)
    console.print(shown)


def markdown(table: Table) -> str:
    """A Markdown section with the table."""
    rules = ["---", *("---:" for _ in table.columns[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in (table.columns, rules, *table.rows)]
    return "\n".join([f"## {table.title}", "", *lines, ""])
