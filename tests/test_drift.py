"""Predicted beside measured: ratios, and the band on both sides."""

from __future__ import annotations

import dataclasses

import pytest

from moepack.drift import compare
from moepack.forecast import Prediction
from moepack.yardstick import Pace

PREDICTION = Prediction(
    ttft_s=2.0,
    tpot_s=0.1,
    tokens_per_s=10.0,
    hit_rate=0.5,
    ready_rate=0.5,
    link_bytes_per_token=0.0,
    fast_bytes=1,
    slow_bytes=1,
    band=1.25,
)


@pytest.mark.parametrize(
    ("measured_s", "ratio", "in_band"),
    [
        (2.0, 1.0, True),
        (2.5, 1.25, True),
        (2.51, 1.255, False),
        (1.6, 0.8, True),
        (1.5, 0.75, False),
    ],
)
def test_the_band_is_a_factor_on_both_sides(measured_s: float, ratio: float, in_band: bool) -> None:
    drift = compare(PREDICTION, {"ttft_s": measured_s})["ttft_s"]
    assert drift.ratio == pytest.approx(ratio)
    assert drift.in_band is in_band


def test_what_was_not_measured_is_not_compared() -> None:
    assert compare(PREDICTION, {"tpot_s": None, "hit_rate": 0.5}).keys() == {"hit_rate"}


def test_nothing_predicted_and_nothing_measured_agree() -> None:
    drift = compare(PREDICTION, {"link_bytes_per_token": 0.0})["link_bytes_per_token"]
    assert (drift.ratio, drift.in_band) == (1.0, True)


def test_something_measured_where_nothing_was_predicted_is_outside() -> None:
    drift = compare(PREDICTION, {"link_bytes_per_token": 4096.0})["link_bytes_per_token"]
    assert (drift.ratio, drift.in_band) == (None, False)


@pytest.mark.parametrize(("taken", "in_band"), [(100, True), (99, True), (101, False)])
def test_the_budget_is_a_contract_not_a_band(taken: int, in_band: bool) -> None:
    planned = dataclasses.replace(PREDICTION, fast_bytes=100)
    assert compare(planned, {"peak_fast_bytes": taken})["peak_fast_bytes"].in_band is in_band


PACED = dataclasses.replace(PREDICTION, yardstick_s=2.0, ttft_wait_s=0.5, tpot_wait_s=0.04)


def test_times_are_compared_with_what_is_expected_of_the_processor_as_it_was() -> None:
    measured = {"ttft_s": 3.5, "tpot_s": 0.07, "tokens_per_s": 1 / 0.07, "hit_rate": 0.5}
    # Twice as slow beside prompts, half as slow beside tokens; waiting for the link stays.
    found = compare(PACED, measured, Pace(prompt_s=4.0, token_s=1.0))
    assert found["ttft_s"].expected == pytest.approx(0.5 + 2 * 1.5)
    assert found["tpot_s"].expected == pytest.approx(0.04 + 0.06 / 2)
    assert found["tokens_per_s"].expected == pytest.approx(1 / 0.07)
    assert [found[metric].ratio for metric in measured] == pytest.approx([1.0] * 4)
    assert found["ttft_s"].predicted == 2.0


@pytest.mark.parametrize(("measured_s", "in_band"), [(4.375, True), (4.38, False), (2.79, False)])
def test_the_band_is_as_wide_at_any_pace(measured_s: float, in_band: bool) -> None:
    drift = compare(PACED, {"ttft_s": measured_s}, Pace(prompt_s=4.0, token_s=1.0))["ttft_s"]
    assert drift.in_band is in_band


def test_without_a_yardstick_in_the_plan_the_prediction_stands_as_it_is() -> None:
    unknown = dataclasses.replace(PACED, yardstick_s=0.0)
    drift = compare(unknown, {"ttft_s": 2.0}, Pace(prompt_s=4.0, token_s=1.0))["ttft_s"]
    assert (drift.expected, drift.ratio) == (2.0, 1.0)
