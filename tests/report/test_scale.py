"""Axes: values lie where they should, and ticks are round and few."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.report.scale import axis, binary_ticks, decimal_ticks

POSITIVE = st.floats(min_value=1e-9, max_value=1e12)


def test_equal_ratios_are_equal_distances() -> None:
    found = axis([1.0, 100.0], str, most_ticks=5)
    assert [found.share(value) for value in (1, 10, 100)] == pytest.approx([0, 0.5, 1])


def test_a_margin_is_left_on_both_sides() -> None:
    found = axis([2.0, 8.0], str, most_ticks=5, margin=2.0)
    assert (found.low, found.high) == (1.0, 16.0)


def test_one_value_lies_in_the_middle_of_its_axis() -> None:
    found = axis([7.0, 7.0, 7.0], str, most_ticks=5)
    assert found.share(7.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (1.0, 10.0, 4, [1, 2, 5, 10]),
        (1.0, 1000.0, 4, [1, 10, 100, 1000]),
        (0.03, 0.3, 8, [0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3]),
        (57.0, 60.0, 5, [57, 58, 59, 60]),
    ],
)
def test_decimal_ticks_are_round(low: float, high: float, most: int, ticks: list[float]) -> None:
    most = max(most, len(ticks))
    assert decimal_ticks(low, high, most) == pytest.approx(ticks)


def test_ticks_of_sizes_are_powers_of_two_and_halves_between() -> None:
    gib = 2.0**30
    wide = [gib * size for size in (4, 6, 8, 12, 16, 24)]
    assert binary_ticks(4 * gib, 24 * gib, 6) == wide
    assert binary_ticks(4 * gib, 24 * gib, 4) == [4 * gib, 8 * gib, 16 * gib]


@given(POSITIVE, st.floats(min_value=1.001, max_value=1e6), st.integers(2, 12))
def test_ticks_ascend_inside_the_axis_and_are_no_more_than_asked_for(
    low: float, ratio: float, most: int
) -> None:
    high = low * ratio
    for ticks in (decimal_ticks(low, high, most), binary_ticks(low, high, most)):
        assert len(ticks) <= most
        assert all(a < b for a, b in itertools.pairwise(ticks))
        assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in ticks)
        assert all(math.isfinite(tick) for tick in ticks)
