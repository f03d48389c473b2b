"""Axes of plots: where a value lies, and which values are worth a tick."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

# Multiples of a power of ten that make good ticks, few to many.
_MULTIPLES = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 2.0, 3.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
)

# An axis of one value reaches so far to both sides of it.
_ALONE = 1.25


class Axis(NamedTuple):
    """A logarithmic axis: equal distances are equal ratios.

    Attributes
    ----------
    low, high : float
        Its ends, 0 < low < high.
    ticks : tuple of float
        Ascending, none outside the ends.
    text : callable
        What is written at a tick.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    text: Callable[[float], str]

    def share(self, value: float) -> float:
        """Where a value lies: 0 at ``low``, 1 at ``high``."""
        return math.log(value / self.low) / math.log(self.high / self.low)


def axis(
    values: Iterable[float],
    text: Callable[[float], str],
    *,
    most_ticks: int,
    binary: bool = False,
    margin: float = 1.0,
) -> Axis:
    """An axis for some positive values.

    Parameters
    ----------
    binary
        Ticks at powers of two (and one and a half times them) instead of decimal ones.
    margin
        Factor that is left free beyond the least and the greatest value.
    """
    known = list(values)
    low, high = min(known), max(known)
    if high / low < 1 + 1e-9:
        margin = max(margin, _ALONE)
    low, high = low / margin, high * margin
    ticks = binary_ticks(low, high, most_ticks) if binary else decimal_ticks(low, high, most_ticks)
    return Axis(low, high, tuple(ticks), text)


def decimal_ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many round values between two positive ones, evenly spread on a log scale."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for multiples in _MULTIPLES:
        ticks = [
            multiple * 10.0**decade
            for decade in decades
            for multiple in multiples
            if low * (1 - 1e-9) <= multiple * 10.0**decade <= high * (1 + 1e-9)
        ]
        if len(ticks) <= most:
            found = ticks
    # Within less than a decade a constant step may give more.
    even = _even_ticks(low, high, most)
    return even if len(found) < 3 and len(even) > len(found) else found


def _even_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * multiple for multiple in (1, 2, 5, 10) if power * multiple >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)][:most]


def binary_ticks(low: float, high: float, most: int) -> list[float]:
    """The same for sizes in bytes: powers of two, or with one and a half times them, or fewer."""
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)

    def within(multiples: Sequence[float], every: int) -> list[float]:
        return [
            multiple * 2.0**power
            for power in powers
            if power % every == 0
            for multiple in multiples
            if low * (1 - 1e-9) <= multiple * 2.0**power <= high * (1 + 1e-9)
        ]

    choices = [within((1.0, 1.25, 1.5, 1.75), 1), within((1.0, 1.5), 1)]
    choices += [within((1.0,), every) for every in (1, 2, 3, 4, 5, 10)]
    return next((ticks for ticks in choices if len(ticks) <= most), [])
