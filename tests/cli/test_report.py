"""The words of a table's cells, and its rows."""

from __future__ import annotations

import pytest

from moepack.report.tables import by_layer, figure


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.32456, "0.325"), (45.51, "45.5"), (999.4, "999"), (1079.6, "1080"), (25_000.0, "25000")],
)
def test_figures_have_no_exponent(number: float, text: str) -> None:
    assert figure(number) == text


def test_neighbours_that_say_the_same_become_one_row() -> None:
    rows = [(0, ("a",)), (1, ("a",)), (2, ("b",)), (4, ("a",)), (5, ("a",)), (7, ("a",))]
    assert by_layer(rows) == [("0 to 1", "a"), ("2", "b"), ("4 to 7", "a")]
