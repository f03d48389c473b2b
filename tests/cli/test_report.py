"""The words of a table's cells, and its rows."""

from __future__ import annotations

import pytest

from moepack.report.routing import layer_bands
from moepack.report.tables import by_layer, figure
from moepack.routing import LayerRouting


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.32456, "0.325"), (45.51, "45.5"), (999.4, "999"), (1079.6, "1080"), (25_000.0, "25000")],
)
def test_figures_have_no_exponent(number: float, text: str) -> None:
    assert figure(number) == text


def test_neighbours_that_say_the_same_become_one_row() -> None:
    rows = [(0, ("a",)), (1, ("a",)), (2, ("b",)), (4, ("a",)), (5, ("a",)), (7, ("a",))]
    assert by_layer(rows) == [("0 to 1", "a"), ("2", "b"), ("4 to 7", "a")]


def routed(number: int, experts: int) -> LayerRouting:
    return LayerRouting(number, experts, 2, 1.0, 0.1, 0.8, 0.9)


def test_few_layers_have_a_row_each() -> None:
    assert layer_bands([routed(number, 8) for number in range(12)]) == [
        range(row, row + 1) for row in range(12)
    ]


def test_many_layers_are_shown_in_bands_of_one_shape_and_the_first_alone() -> None:
    layers = [routed(number, 8 if number < 50 else 16) for number in range(94)]
    bands = layer_bands(layers)
    assert bands[0] == range(1)
    assert [row for band in bands for row in band] == list(range(94))
    assert len(bands) <= 10
    for band in bands:
        assert len({layers[row].num_experts for row in band}) == 1
