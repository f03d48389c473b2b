"""Whether two profiles of one machine say the same, by the spreads that they state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moepack.hardware import HardwareProfile

#: What two measurements may differ by where both state no spread at all.
LEAST_ALLOWANCE = 0.05


class Figure(NamedTuple):
    """One number of a profile, with its spread (interquartile range over the median)."""

    name: str
    value: float
    spread: float


class Comparison(NamedTuple):
    """One number in two profiles.

    Attributes
    ----------
    ratio : float
        Second over first.
    allowed : float
        Within ``1 / allowed`` and ``allowed`` the two agree: each may be off by its spread.
    """

    name: str
    first: float
    second: float
    ratio: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """The two numbers differ by no more than their spreads."""
        return 1.0 / self.allowed <= self.ratio <= self.allowed


def figures(profile: HardwareProfile) -> Iterator[Figure]:
    """Every measured rate and time of a profile that has a spread."""
    for link_name, link in (("disk", profile.disk), ("bus", profile.bus)):
        for point in () if link is None else link.points:
            name = f"{link_name} at {point.size_bytes} bytes"
            yield Figure(name, point.bytes_per_s, point.spread)
    yield Figure("memory", profile.memory.bytes_per_s, profile.memory.spread)
    yield Figure("launch", profile.launch_s, profile.launch_spread)
    for curve in profile.matmul:
        for entry in curve.points:
            shape = f"{curve.dtype} {curve.rows} x {curve.columns} by {entry.tokens} tokens"
            name = f"{shape} on {curve.threads or profile.cores} threads"
            yield Figure(name, entry.flop_per_s, entry.spread)
    for rate in profile.attention:
        name = f"{rate.dtype} attention on {rate.threads or profile.cores} threads"
        yield Figure(f"{name}, one token", rate.cache_bytes_per_s, rate.spread)
        yield Figure(f"{name}, one token, shared keys", rate.grouped_bytes_per_s, rate.spread)
        yield Figure(f"{name}, a block", rate.block_flop_per_s, rate.spread)


def compare_profiles(first: HardwareProfile, second: HardwareProfile) -> list[Comparison]:
    """Every figure that both profiles have."""
    known = {figure.name: figure for figure in figures(first)}
    found = []
    for figure in figures(second):
        before = known.get(figure.name)
        if before is not None:
            allowed = max(1.0 + LEAST_ALLOWANCE, (1.0 + before.spread) * (1.0 + figure.spread))
            ratio = figure.value / before.value
            found.append(Comparison(figure.name, before.value, figure.value, ratio, allowed))
    return found
