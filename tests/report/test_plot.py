"""Plots in a terminal: points land where they should, and nothing leaves its columns."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moepack.report.plot import Plot, Series
from moepack.report.scale import axis
from moepack.units import GIB, format_duration, short_size

BUDGETS = [4.0 * GIB, 8.0 * GIB, 16.0 * GIB]


def plot(*series: Series) -> Plot:
    points = [point for one in series for point in one.points]
    return Plot(
        series,
        axis([across for across, _ in points], short_size, most_ticks=8, binary=True),
        axis([up for _, up in points], format_duration, most_ticks=6),
        title="time per token over fast memory",
    )


def field(lines: list[str]) -> list[str]:
    """What stands right of the vertical axis, from the top."""
    return [line.split(edge, 1)[1] for line in lines for edge in "┤│" if edge in line[:14]]


def where(rows: list[str], mark: str) -> list[tuple[int, int]]:
    return sorted(
        (column, row)
        for row, line in enumerate(rows)
        for column, character in enumerate(line)
        if character == mark
    )


def test_points_land_at_their_share_of_the_axes() -> None:
    lines = plot(Series("plan", "*", [(BUDGETS[0], 0.4), (BUDGETS[1], 0.2), (BUDGETS[2], 0.1)]))
    rows = field(lines.lines(80, rows=9))
    columns = max(len(row) for row in rows)
    assert where(rows, "*") == [(0, 0), (round((columns - 1) / 2), 4), (columns - 1, 8)]


def test_points_are_joined_straight() -> None:
    shown = plot(Series("plan", "*", [(BUDGETS[0], 0.4), (BUDGETS[2], 0.1)], joint="-"))
    rows = field(shown.lines(40, rows=5))
    columns = max(len(row) for row in rows)
    for column, row in where(rows, "-"):
        assert row == pytest.approx(4 * column / (columns - 1), abs=0.501)
    assert len(where(rows, "-")) == columns - 2


def test_a_mark_is_never_hidden_by_a_line() -> None:
    above = Series("plan", "*", [(BUDGETS[0], 0.2), (BUDGETS[2], 0.2)], "-")
    below = Series("other", "o", [(BUDGETS[0], 0.4), (BUDGETS[1], 0.2), (BUDGETS[2], 0.1)])
    rows = field(plot(above, below).lines(60))
    assert len(where(rows, "*")) == 2
    assert len(where(rows, "o")) == 3


def test_axes_tell_their_values_and_units() -> None:
    text = "\n".join(
        plot(Series("plan", "*", list(zip(BUDGETS, (0.4, 0.2, 0.1), strict=True)))).lines(80)
    )
    for label in ("4G", "8G", "16G", "100 ms", "200 ms", "400 ms", "* plan"):
        assert label in text


@pytest.mark.parametrize(
    "points",
    [
        [(BUDGETS[0], 0.3)],
        [(BUDGETS[0], 0.3), (BUDGETS[1], 0.3), (BUDGETS[2], 0.3)],
        [(BUDGETS[0], 0.3), (BUDGETS[0], 0.2)],
    ],
)
def test_one_point_or_one_value_can_be_drawn(points: list[tuple[float, float]]) -> None:
    rows = field(plot(Series("plan", "*", points)).lines(80))
    assert 1 <= len(where(rows, "*")) <= len(points)


POINTS = st.lists(
    st.tuples(st.floats(2.0**20, 2.0**41), st.floats(1e-6, 80.0)), min_size=1, max_size=20
).map(sorted)


@given(st.lists(POINTS, min_size=1, max_size=5), st.integers(40, 100))
def test_no_line_is_wider_than_asked_for(
    lines: list[list[tuple[float, float]]], width: int
) -> None:
    shown = plot(
        *(
            Series(f"a strategy with a rather long name {index}", "abcde"[index], points)
            for index, points in enumerate(lines)
        )
    )
    assert all(len(line) <= width for line in shown.lines(width))


def test_eighty_columns_are_enough_for_a_console_without_colour() -> None:
    points = list(zip(BUDGETS, (0.4, 0.2, 0.1), strict=True))
    out = io.StringIO()
    console = Console(file=out, width=80, no_color=True)
    console.print(plot(Series("plan", "●", points, style="bold blue")))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out.getvalue()
    assert sum(line.count("●") for line in lines) == 3 + 1  # and the legend
