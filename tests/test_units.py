"""Sizes, times and rates: what is printed can be read again, and nothing else can."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack import units


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("64K", 65_536),
        ("64k", 65_536),
        ("512M", 536_870_912),
        ("24G", 25_769_803_776),
        ("24GB", 25_769_803_776),
        ("24 GiB", 25_769_803_776),
        ("1.5G", 1_610_612_736),
        ("2T", 2_199_023_255_552),
        ("  7b ", 7),
    ],
)
def test_sizes_are_binary_whatever_the_spelling(text: str, size_bytes: int) -> None:
    assert units.parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "1e9", "1,5G", "24G/s", "24P", "nan", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        units.parse_size(text)


@pytest.mark.parametrize("text", ["8388608T", "9" * 400])
def test_what_no_machine_has_is_refused(text: str) -> None:
    assert units.parse_size("8388607T") < units.LIMIT_BYTES
    with pytest.raises(ValueError, match="no machine has"):
        units.parse_size(text)
    with pytest.raises(ValueError, match="no link has"):
        units.parse_rate(text)


@pytest.mark.parametrize(
    ("text", "rate"), [("2G", 2_147_483_648), ("2GiB/s", 2_147_483_648), ("800M/s", 838_860_800)]
)
def test_rates_may_say_per_second(text: str, rate: float) -> None:
    assert units.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["0", "0G/s", "fast", "2G/m"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a rate"):
        units.parse_rate(text)


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [("50us", 50e-6), ("50 µs", 50e-6), ("1.5ms", 1.5e-3), ("2s", 2.0), ("7ns", 7e-9)],
)
def test_durations_name_their_unit(text: str, duration_s: float) -> None:
    assert units.parse_duration(text) == pytest.approx(duration_s)


@pytest.mark.parametrize("text", ["5", "5 min", "-1s", ""])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        units.parse_duration(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_printed_size_reads_back_within_its_two_decimals(size_bytes: int) -> None:
    again = units.parse_size(units.format_size(size_bytes))
    assert again == pytest.approx(size_bytes, rel=0.0051)


@given(st.floats(min_value=1e-9, max_value=89))
def test_a_printed_duration_reads_back_within_its_three_digits(duration_s: float) -> None:
    text = units.format_duration(duration_s)
    assert units.parse_duration(text) == pytest.approx(duration_s, rel=0.0051)


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.000820, "820 us"),
        (0.00172, "1.72 ms"),
        (12.34, "12.3 s"),
        (754.2, "12 min 34 s"),
        (math.inf, "never"),
    ],
)
def test_durations_read_like_a_person_would_say_them(duration_s: float, text: str) -> None:
    assert units.format_duration(duration_s) == text


def test_rates_print_as_a_size_a_second() -> None:
    assert units.format_rate(1.5 * units.GIB) == "1.50 GiB/s"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0"),
        (512, "512"),
        (24 * units.GIB, "24G"),
        (units.GIB * 3 // 2, "1.5G"),
        (768 * units.MIB, "768M"),
        (1023 * units.MIB, "1023M"),
        (units.GIB - 1, "1G"),
        (100 * units.TIB, "100T"),
    ],
)
def test_a_short_size_is_what_one_would_type(size_bytes: int, text: str) -> None:
    assert units.short_size(size_bytes) == text
    assert units.parse_size(text) == pytest.approx(size_bytes, rel=0.005)
