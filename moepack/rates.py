"""What a machine does in a second: links, memory, matrix products, as curves that were measured.

``spread`` is everywhere the interquartile range of the repeats over their median; 0 where nothing
was measured.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from moepack.records import record
from moepack.units import MIB


@record
class LinkPoint:
    """How fast transfers of one size go, one after the other: the median of the repeats."""

    size_bytes: int
    bytes_per_s: float
    repeats: int
    spread: float

    def __post_init__(self) -> None:
        require_positive(
            size_bytes=self.size_bytes, bytes_per_s=self.bytes_per_s, repeats=self.repeats
        )
        _require_spread(self.spread)

    @property
    def duration_s(self) -> float:
        """Seconds of the link for one transfer."""
        return self.size_bytes / self.bytes_per_s


#: What several transfers at once hide is the time between them. Large ones hide that by themselves
#: and are better one by one: what was asked for first can be computed while the next one comes,
#: and less of what turns out wrong is under way. (Seen on experts of 12 MiB: 199 ms a token with
#: one reader, 215, 237 and 248 with two, three and four, though four alone read faster.)
IN_FLIGHT_BYTES = 4 * MIB


@record
class LinkCurve:
    """A link: bandwidth over the size of a transfer.

    Attributes
    ----------
    readers : int
        Transfers in flight at once: the fewest that go about as fast as any number does.
    latency_s : float
        From asking for the smallest transfer to having it, on an idle link.
    past_cache : bool
        Whether every byte came from the device. False: the page cache (or a disk that is memory)
        was measured, which says nothing about reading a model that does not fit in it.
    how : str
        What was measured, or assumed.
    points : tuple of LinkPoint
        Ascending in size.
    """

    readers: int
    latency_s: float
    past_cache: bool
    how: str
    points: tuple[LinkPoint, ...]

    def __post_init__(self) -> None:
        require_positive(readers=self.readers, latency_s=self.latency_s)
        _require_ascending("size_bytes of the points", [point.size_bytes for point in self.points])

    def readers_for(self, size_bytes: float) -> int:
        """Transfers of one size that are best in flight at once, at most :attr:`readers`.

        As many as keep :data:`IN_FLIGHT_BYTES` in flight, at least one.
        """
        return max(1, min(self.readers, int(IN_FLIGHT_BYTES / size_bytes)))

    def seconds(self, size_bytes: int) -> float:
        """Seconds of the link for one transfer among others of its size.

        Log-log between the points; below the first, the first one's (latency is all there is);
        beyond the last, the additional bytes at its rate.
        """
        last = self.points[-1]
        if size_bytes > last.size_bytes:
            return last.duration_s + (size_bytes - last.size_bytes) / last.bytes_per_s
        return _interpolate(
            size_bytes,
            [point.size_bytes for point in self.points],
            [point.duration_s for point in self.points],
        )


@record
class MemoryRate:
    """Bytes per second that the computing device reads from its memory."""

    bytes_per_s: float
    spread: float

    def __post_init__(self) -> None:
        require_positive(bytes_per_s=self.bytes_per_s)
        _require_spread(self.spread)


@record
class MatmulPoint:
    """Rate for one number of tokens: two operations for each weight and token."""

    tokens: int
    flop_per_s: float
    spread: float

    def __post_init__(self) -> None:
        require_positive(tokens=self.tokens, flop_per_s=self.flop_per_s)
        _require_spread(self.spread)


@record
class MatmulCurve:
    """Matrix products with weights [rows, columns] read from memory, over the number of tokens.

    ``dtype`` as safetensors spells it; ``threads`` that torch used, None for as many as there are.
    """

    dtype: Literal["BF16", "F16", "F32"]
    rows: int
    columns: int
    points: tuple[MatmulPoint, ...]
    threads: int | None = None

    def __post_init__(self) -> None:
        require_positive(rows=self.rows, columns=self.columns)
        _require_ascending("tokens of the points", [point.tokens for point in self.points])

    @property
    def elements(self) -> int:
        """Of the weights."""
        return self.rows * self.columns

    def flop_per_s(self, tokens: float) -> float:
        """Rate at a number of tokens: log-log between the points, flat outside."""
        return _interpolate(
            tokens,
            [point.tokens for point in self.points],
            [point.flop_per_s for point in self.points],
        )

    def seconds(self, tokens: float) -> float:
        """Seconds of one product of this shape."""
        return 2 * tokens * self.elements / self.flop_per_s(tokens)


def product_seconds(curves: Sequence[MatmulCurve], tokens: float, elements: int) -> float:
    """Seconds of one product of any shape, from those that were measured for its dtype.

    Log-log over the elements of the weights between the measured shapes; below the smallest as
    long as that (all of it is overhead); beyond the largest, at its rate.
    """
    curves = sorted(curves, key=lambda curve: curve.elements)
    largest = curves[-1]
    if elements > largest.elements:
        return 2 * tokens * elements / largest.flop_per_s(tokens)
    return _interpolate(
        elements,
        [curve.elements for curve in curves],
        [curve.seconds(tokens) for curve in curves],
    )


@record
class AttentionRate:
    """torch's scaled dot-product attention.

    Attributes
    ----------
    cache_bytes_per_s, grouped_bytes_per_s : float
        Keys and values that one token reads in a second: where each head has its own, and where
        several share them.
    block_flop_per_s : float
        Rate of a block that attends to itself: two operations for each channel of keys and of
        values, head, token and row, masked rows included.
    threads : int or None
        That torch used; None for as many as there are.
    """

    dtype: Literal["BF16", "F16", "F32"]
    cache_bytes_per_s: float
    grouped_bytes_per_s: float
    block_flop_per_s: float
    spread: float
    threads: int | None = None

    def __post_init__(self) -> None:
        require_positive(
            cache_bytes_per_s=self.cache_bytes_per_s,
            grouped_bytes_per_s=self.grouped_bytes_per_s,
            block_flop_per_s=self.block_flop_per_s,
        )
        _require_spread(self.spread)


def require_positive(**values: float) -> None:
    """Refuse, by name, a value that is not a positive finite number.

    Raises
    ------
    ValueError
        Which a record that is being read turns into the error of its document.
    """
    for name, value in values.items():
        if not (0 < value < math.inf):
            raise ValueError(f"{name} is {value}, expected more than 0")


def _require_spread(spread: float) -> None:
    if not (0 <= spread < math.inf):
        raise ValueError(f"a spread is {spread}, expected 0 or more")


def _require_ascending(what: str, values: Sequence[int]) -> None:
    if not values:
        raise ValueError(f"{what}: there are none, expected at least one, ascending")
    for before, after in pairwise(values):
        if before >= after:
            raise ValueError(f"{what}: {after} comes after {before}, expected ascending")


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Log-log between the points, flat outside them."""
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    right = bisect_right(xs, x)
    share = math.log(x / xs[right - 1]) / math.log(xs[right] / xs[right - 1])
    return ys[right - 1] * math.exp(share * math.log(ys[right] / ys[right - 1]))
