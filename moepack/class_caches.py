"""Caches of a class that hold less than a token may use of it: no stack, so each is stepped.

See :mod:`moepack.class_ranks`. The rules are those of :mod:`moepack.residency`, over the order that
is known beforehand; only tokens that use the class are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moepack.class_ranks import ClassTrace
from moepack.plan import Policy
from moepack.timeline import Flags

#: An expert's number, in the low bits of what it is worth.
_NUMBER_BITS = 16
_NUMBER = (1 << _NUMBER_BITS) - 1


def stepped_classes(
    trace: ClassTrace, policy: Policy, slots: Sequence[int], half_lives: Sequence[float]
) -> tuple[Flags, Flags]:
    """Which activated, and which predicted, experts such caches hold when a token arrives.

    Parameters
    ----------
    slots
        Of each class: 1 or more.
    half_lives
        Of each class, in tokens, where the policy is ``lfu_decay``.

    Returns
    -------
    activated : bool [T, V, K]
    predicted : bool [T, V, R]
    """
    activated = np.zeros(trace.ids.shape, dtype=np.bool_)
    predicted = np.zeros(trace.predicted.shape, dtype=np.bool_)
    order = trace.order(policy, half_lives)
    by_id = np.argsort(trace.ids, axis=2, kind="stable")
    worths = order.after.astype(np.int64) << _NUMBER_BITS | trace.ids
    worths = np.take_along_axis(worths, by_id, axis=2)
    for place, capacity in enumerate(slots):
        ids, guesses = trace.ids[:, place], trace.predicted[:, place]
        counts = (ids != trace.nobody).sum(axis=1)
        events = np.flatnonzero(counts)
        tokens = worths[events, place].tolist()
        used = [token[:count] for token, count in zip(tokens, counts[events].tolist(), strict=True)]
        start = [
            int(code) << _NUMBER_BITS | number
            for number, code in enumerate(order.start[place, : trace.nobody].tolist())
        ]
        first = [start[number] for number in trace.hot[place, :capacity].tolist()]
        contents, at = _walked(used, first, capacity)
        # What is held when a token arrives is what the last one left that used the class.
        known = np.append(at, len(contents) - 1)
        held = contents[known[np.searchsorted(events, np.arange(len(ids)))]]  # [T, slots]
        for column in held.T:
            activated[:, place] |= ids == column[:, None]
            predicted[:, place] |= guesses == column[:, None]
    return activated, predicted


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
        missing = [worth for worth in token if (worth & _NUMBER) not in held]
        if not missing:
            for worth in token:
                held[worth & _NUMBER] = worth
            continue
        numbers = {worth & _NUMBER for worth in token}
        others = sorted(worth for number, worth in held.items() if number not in numbers)
        if len(token) <= capacity:
            staying = others[len(others) - (capacity - len(token)) :]
            held = {worth & _NUMBER: worth for worth in (*token, *staying)}
        else:
            held = _crowded(token, held, others, capacity)
        contents.append(tuple(held))
    return np.array(contents, dtype=np.uint16), np.array(at, dtype=np.intp)


def _crowded(
    token: Sequence[int], held: dict[int, int], others: list[int], capacity: int
) -> dict[int, int]:
    """What is held after a token that uses more than there are slots.

    ``others`` is what the token does not use of what is held, ascending.
    """
    wanted = {*sorted(token)[-capacity:]}
    hits = {worth & _NUMBER for worth in token} & held.keys()
    victims = others[::-1]  # the last goes first
    found = {worth & _NUMBER: worth for worth in others}
    found |= {worth & _NUMBER: worth for worth in token if worth & _NUMBER in hits}
    for worth in token:
        if worth & _NUMBER in hits:
            if worth not in wanted:
                victims.append(worth)
                victims.sort(reverse=True)
        elif worth in wanted and victims:
            del found[victims.pop() & _NUMBER]
            found[worth & _NUMBER] = worth
    return found
