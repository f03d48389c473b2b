"""Plots in a terminal: marks of one character on a grid, readable without colour.

A series is told by its mark, never by its colour alone; lines join the points of one series where
they are free of other marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from moepack.report.scale import Axis

#: Columns that a plot takes at most, and the rows of its field.
WIDTH = 80
ROWS = 16


class Series(NamedTuple):
    """One line of a plot.

    Attributes
    ----------
    mark : str
        One character.
    joint : str
        One character: what the points are joined by.
    """

    name: str
    mark: str
    points: Sequence[tuple[float, float]]
    joint: str = "·"
    style: str = ""


class Plot:
    """A plot of several series over one pair of axes. The first series lies above the others."""

    def __init__(self, series: Sequence[Series], x: Axis, y: Axis, *, title: str) -> None:
        self._series = series
        self._x = x
        self._y = y
        self._title = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich draws it."""
        styles = {series.mark: series.style for series in self._series if series.style}
        for line in self.lines(min(WIDTH, options.max_width)):
            text = Text(line, no_wrap=True, overflow="crop")
            for place, character in enumerate(line):
                if character in styles:
                    text.stylize(styles[character], place, place + 1)
            yield text

    def lines(self, width: int, rows: int = ROWS) -> list[str]:
        """The plot as text of at most ``width`` columns, without blanks at the ends."""
        left = 1 + max((len(self._y.text(tick)) for tick in self._y.ticks), default=0)
        columns = width - left - 2
        field = _Field(columns, rows)
        placed = [(series, field.places(series, self._x, self._y)) for series in self._series]
        for series, places in reversed(placed):
            field.join(places, series.joint)
        for series, places in reversed(placed):
            field.mark(places, series.mark)
        at_row = {_place(self._y.share(tick), rows): tick for tick in self._y.ticks}
        lines = [self._title]
        for row in reversed(range(rows)):
            label = self._y.text(at_row[row]) if row in at_row else ""
            edge = "┤" if row in at_row else "│"
            lines.append(f"{label:>{left}} {edge}{field.row(row)}")
        lines += self._below(left, columns)
        lines += self._legend(width)
        return [line.rstrip() for line in lines]

    def _below(self, left: int, columns: int) -> list[str]:
        """The horizontal axis and its labels, those left out that would touch another."""
        places = {_place(self._x.share(tick), columns): tick for tick in self._x.ticks}
        line = "".join("┬" if place in places else "─" for place in range(columns))
        labels = [" "] * (left + 2 + columns)
        free = 0
        for place, tick in sorted(places.items()):
            text = self._x.text(tick)
            begin = min(left + 2 + place - len(text) // 2, len(labels) - len(text))
            if begin >= free:
                labels[begin : begin + len(text)] = text
                free = begin + len(text) + 1
        return [f"{'':>{left}} └{line}", "".join(labels)]

    def _legend(self, width: int) -> list[str]:
        """Mark and name of each series, in as many lines as they need."""
        lines = [""]
        for entry in (f"{series.mark} {series.name}" for series in self._series):
            joined = f"{lines[-1]}   {entry}" if lines[-1] else f"  {entry}"
            if len(joined) > width and lines[-1]:
                lines.append(f"  {entry}"[:width])
            else:
                lines[-1] = joined[:width]
        return lines


class _Field:
    """The grid between the axes; row 0 is at the bottom."""

    def __init__(self, columns: int, rows: int) -> None:
        self._cells = [[" "] * columns for _ in range(rows)]
        self._columns = columns
        self._rows = rows

    def row(self, row: int) -> str:
        """One row of the grid."""
        return "".join(self._cells[row])

    def places(self, series: Series, x: Axis, y: Axis) -> list[tuple[int, int]]:
        """Column and row of each point."""
        return [
            (_place(x.share(across), self._columns), _place(y.share(up), self._rows))
            for across, up in series.points
        ]

    def join(self, places: Sequence[tuple[int, int]], joint: str) -> None:
        """Draw what runs between the points, straight from each to the next."""
        for (left, row), (right, next_row) in pairwise(places):
            for column in range(left + 1, right):
                share = (column - left) / (right - left)
                self._cells[round(row + share * (next_row - row))][column] = joint

    def mark(self, places: Sequence[tuple[int, int]], mark: str) -> None:
        """Put a mark at every point."""
        for column, row in places:
            self._cells[row][column] = mark


def _place(share: float, cells: int) -> int:
    """The cell of a share of the axis; what lies outside it lands on its edge."""
    return min(cells - 1, max(0, round(share * (cells - 1))))
