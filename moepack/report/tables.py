"""The two shapes that everything is shown in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, two columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in rows:
        grid.add_row(Text(name), Text(value))
    return grid


def columns(head: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, title in enumerate(head):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table
