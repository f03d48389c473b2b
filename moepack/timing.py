"""Timing a piece of work so that one hiccup of a busy machine does not decide."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple


class Timing(NamedTuple):
    """Several runs of one thing.

    Attributes
    ----------
    median_s : float
    spread : float
        Interquartile range over the median; 0 for a single run.
    repeats : int
    """

    median_s: float
    spread: float
    repeats: int


def summarise(durations_s: Sequence[float]) -> Timing:
    """Median and spread of runs that were timed (at least one)."""
    median_s = statistics.median(durations_s)
    if len(durations_s) == 1 or median_s == 0:
        return Timing(median_s, 0.0, len(durations_s))
    low_s, _, high_s = statistics.quantiles(durations_s, n=4, method="inclusive")
    return Timing(median_s, (high_s - low_s) / median_s, len(durations_s))


def measure(
    work: Callable[[], object],
    *,
    repeats: int = 15,
    limit_s: float = 1.0,
    synchronize: Callable[[], object] | None = None,
) -> Timing:
    """Run some work several times, after once to warm up.

    Parameters
    ----------
    repeats, limit_s
        Stops after so many runs, or at the first run that ends after so many seconds; at least
        one run counts.
    synchronize
        Waits until a device has done what it was given; part of what is timed.
    """
    durations_s: list[float] = []
    _run(work, synchronize)
    begin_s = perf_counter()
    while len(durations_s) < repeats:
        durations_s.append(_run(work, synchronize))
        if perf_counter() - begin_s > limit_s:
            break
    return summarise(durations_s)


def _run(work: Callable[[], object], synchronize: Callable[[], object] | None) -> float:
    begin_s = perf_counter()
    work()
    if synchronize is not None:
        synchronize()
    return perf_counter() - begin_s


class Stopwatch:
    """Tells how long each of several pieces of work took, one after the other.

    Parameters
    ----------
    synchronize
        Waits until a device has done what it was given; part of what is timed.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._synchronize = synchronize
        self._since_s = perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since this was made."""
        if self._synchronize is not None:
            self._synchronize()
        now_s = perf_counter()
        lap_s, self._since_s = now_s - self._since_s, now_s
        return lap_s


def rounded(value: float) -> float:
    """Four significant digits: more than any measurement here has."""
    return float(f"{value:.4g}")
