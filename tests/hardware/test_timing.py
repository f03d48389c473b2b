from __future__ import annotations

from time import perf_counter, sleep

import pytest

from moepack.timing import measure, rounded, summarise


def test_one_hiccup_does_not_decide() -> None:
    timing = summarise([1.0, 1.1, 0.9, 1.0, 50.0])
    assert timing.median_s == 1.0
    assert timing.repeats == 5
    assert timing.spread == pytest.approx(0.1)  # quartiles 1.0 and 1.1


def test_a_single_run_has_no_spread() -> None:
    assert summarise([2.0]) == (2.0, 0.0, 1)
    assert summarise([0.0, 0.0]) == (0.0, 0.0, 2)


def test_the_work_is_warmed_up_and_then_repeated() -> None:
    runs: list[float] = []
    timing = measure(lambda: runs.append(perf_counter()), repeats=5, limit_s=60.0)
    assert len(runs) == 6
    assert timing.repeats == 5


def test_the_time_limit_ends_the_repeats() -> None:
    timing = measure(lambda: sleep(0.03), repeats=1000, limit_s=0.1)
    assert 1 <= timing.repeats <= 4
    assert timing.median_s >= 0.03


def test_the_device_is_waited_for_inside_the_time() -> None:
    timing = measure(lambda: None, repeats=2, synchronize=lambda: sleep(0.02))
    assert timing.median_s >= 0.02


def test_four_digits() -> None:
    assert rounded(1234567.0) == 1235000.0
    assert rounded(0.000123456) == 0.0001235
