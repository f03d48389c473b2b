"""Caches of a class that hold less than a token may use of it: no stack, so each is stepped.

See :mod:`moepack.class_ranks`. The rules are those of :mod:`moepack.residency`, over the order that
is known beforehand; only tokens that use the class are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from moepack.class_ranks import ClassTrace
from moepack.lane_clock import Flags
from moepack.plan import Policy

#: An expert's number, in the low bits of what it is worth.
_NUMBER_BITS = 16
_NUMBER = (1 << _NUMBER_BITS) - 1


def stepped_classes(
    trace: ClassTrace, policy: Policy, slots: Sequence[Sequence[int]], half_lives: Sequence[float]
) -> Iterator[tuple[int, int, tuple[Flags, Flags]]]:
    """Which activated, and which predicted, experts such caches hold when a token arrives.

    Parameters
    ----------
    slots
        Of each class those of its caches, each 1 or more.
    half_lives
        Of each class, in tokens, where the policy is ``lfu_decay``.

    Yields
    ------
    int, int, (bool [T, K], bool [T, R])
        A class, by its place, and a number of slots; what is held of its own experts.
    """
    order = trace.order(policy, half_lives)
    by_id = np.argsort(trace.ids, axis=2, kind="stable")
    worths = order.after.astype(np.int64) << _NUMBER_BITS | trace.ids
    worths = np.take_along_axis(worths, by_id, axis=2)
    for place, capacities in enumerate(slots):
        ids, guesses = trace.ids[:, place], trace.predicted[:, place]
        counts = (ids != trace.nobody).sum(axis=1)
        events = np.flatnonzero(counts)
        tokens = [
            token[:count]
            for token, count in zip(
                worths[events, place].tolist(), counts[events].tolist(), strict=True
            )
        ]
        start = [
            code << _NUMBER_BITS | number
            for number, code in enumerate(order.start[place, : trace.nobody].tolist())
        ]
        # What a token finds is what the last one left that used the class.
        last = np.searchsorted(events, np.arange(len(ids)))
        for capacity in capacities:
            first = [start[number] for number in trace.hot[place, :capacity].tolist()]
            contents, at = _walked(tokens, first, capacity)
            held = contents[np.append(at, len(contents) - 1)[last]]  # [T, slots]
            hits, ahead = (
                (asked[:, :, None] == held[:, None, :]).any(axis=2) for asked in (ids, guesses)
            )
            yield place, capacity, (hits, ahead)


def _walked(
    tokens: Sequence[Sequence[int]], first: Sequence[int], capacity: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.intp]]:
    """Step one cache.

    Parameters
    ----------
    tokens
        What the experts of each are worth from then on, with their numbers in the low bits, by
        ascending number.
    first
        What is held at the start.

    Returns
    -------
    contents : uint16 [states, slots]
        Numbers that are held, one row after the other.
    at : int [tokens]
        Which of them each token finds.
    """
    held = {worth & _NUMBER: worth for worth in first}
    contents, at = [tuple(held)], []
    for token in tokens:
        at.append(len(contents) - 1)
        missing = []
        for worth in token:
            if worth & _NUMBER in held:
                held[worth & _NUMBER] = worth
            else:
                missing.append(worth)
        if not missing:
            continue
        if len(token) <= capacity:
            _replace_worst(token, missing, held)
        else:
            held = _crowded(token, held, capacity)
        contents.append(tuple(held))
    return np.array(contents, dtype=np.uint16), np.array(at, dtype=np.intp)


def _replace_worst(token: Sequence[int], missing: Sequence[int], held: dict[int, int]) -> None:
    """Admit what is missing in place of the worst that the token does not use."""
    used = {worth & _NUMBER for worth in token}
    others = [worth for number, worth in held.items() if number not in used]
    if len(missing) == 1:
        del held[min(others) & _NUMBER]
    else:
        others.sort()
        for worth in others[: len(missing)]:
            del held[worth & _NUMBER]
    for worth in missing:
        held[worth & _NUMBER] = worth


def _crowded(token: Sequence[int], held: dict[int, int], capacity: int) -> dict[int, int]:
    """What is held after a token that uses more than there are slots, and lacks something.

    ``held`` has what its hits are worth from then on.
    """
    used = {worth & _NUMBER: worth for worth in token}
    # What is not wanted gives way once it is consumed, the worst first.
    victims = sorted([worth for number, worth in held.items() if number not in used], reverse=True)
    wanted = {*sorted(token)[-capacity:]}
    found = dict(held)
    for number, worth in used.items():
        if number in held:
            if worth not in wanted:
                victims.append(worth)
                victims.sort(reverse=True)
        elif worth in wanted and victims:
            del found[victims.pop() & _NUMBER]
            found[number] = worth
    return found
