"""The two shapes that everything is shown in, and the words of their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

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


def columns(
    head: Sequence[str], rows: Iterable[Sequence[str | Text]], *, texts: Sequence[str] = ()
) -> Table:
    """A table whose first column is text and whose others are figures, but for those of ``texts``.

    The last column may be broken into lines if it is text.
    """
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, title in enumerate(head):
        left = not index or title in texts
        broken = index == len(head) - 1 and left
        table.add_column(title, justify="left" if left else "right", no_wrap=not broken)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def figure(number: float) -> str:
    """Three significant digits, or all of those before the point: ``0.325``, ``45.5``, ``1080``."""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def by_layer(rows: Iterable[tuple[int, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Rows with the layer's number in front; neighbours that say the same become one."""
    merged = []
    for cells, group in groupby(rows, key=lambda row: row[1]):
        layers = [layer for layer, _ in group]
        name = str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
        merged.append((name, *cells))
    return merged
