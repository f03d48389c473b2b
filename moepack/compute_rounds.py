"""Several measurements of one model's compute put together as one profile.

Rounds are told for one speed of the processor and their medians taken; and of profiles that use
more and more threads, that one is taken which is worth its threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moepack.compute import ComputeProfile, block_seconds, token_seconds
from moepack.timing import summarise

if TYPE_CHECKING:
    from moepack.model_spec import ModelSpec

#: More threads are taken where they need less than this share of the time. A smaller gain is not
#: worth it: where the cores have other work, threads wait for one another ten times as long.
WORTHWHILE = 0.8


def median_profile(spec: ModelSpec, rounds: Sequence[ComputeProfile]) -> ComputeProfile:
    """Point by point the median of several rounds; the spread is that of whole passes."""
    passes = (token_seconds, block_seconds)
    spread = max(
        summarise([seconds(spec, profile) for profile in rounds]).spread for seconds in passes
    )
    merged = _merged(rounds, lambda seconds: summarise(seconds).median_s)
    return replace(merged, spread=round(spread, 3))


def at_pace(profile: ComputeProfile, factor: float) -> ComputeProfile:
    """The same on a processor that takes ``factor`` times as long for everything."""
    merged = _merged([profile], lambda seconds: seconds[0] * factor)
    return replace(merged, yardstick_s=profile.yardstick_s * factor)


def _merged(
    profiles: Sequence[ComputeProfile], number: Callable[[Sequence[float]], float]
) -> ComputeProfile:
    """The first, with every time of a piece made from all of theirs."""
    first, times = profiles[0], ("head_s", "rounded_head_s", "layers")
    return replace(
        first,
        **{name: _made([getattr(each, name) for each in profiles], number) for name in times},
    )


def _made(items: Sequence[Any], number: Callable[[Sequence[float]], float]) -> Any:
    """What takes the place of values that stand in the same place of several profiles.

    Every float below a profile's layers is a time, and what is not known in some is left to the
    others. Whatever else there is, numbers of layers, of tokens, and names, is alike in all.
    """
    there = [item for item in items if item is not None]
    first = there[0] if there else None
    if isinstance(first, float):
        return number(there)
    if isinstance(first, tuple):
        return tuple(_made(each, number) for each in zip(*there, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return replace(
            first,
            **{name: _made([getattr(each, name) for each in there], number) for name in names},
        )
    return first


def worthwhile_threads(spec: ModelSpec, profiles: Sequence[ComputeProfile]) -> ComputeProfile:
    """Of profiles with ascending numbers of threads, the last that earns its threads.

    Compared over a prompt of one block and a quarter as many new tokens; see :data:`WORTHWHILE`.
    """

    def nominal_s(profile: ComputeProfile) -> float:
        tokens = max(profile.layers[0].attention.tokens) / 4
        return block_seconds(spec, profile) + tokens * token_seconds(spec, profile)

    best = profiles[0]
    for other in profiles[1:]:
        if nominal_s(other) < WORTHWHILE * nominal_s(best):
            best = other
    return best
