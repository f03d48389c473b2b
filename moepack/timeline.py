"""The clock of the replay: one serial link, one compute queue, many independent lanes at once.

A *pass* is one layer over one token (or over a whole prompt). Its experts are consumed as segments,
in one fixed order; what is missing crosses the link, one transfer at a time:

- what was asked for ahead goes while the layer before computes; once the routing is known, a
  transfer in flight finishes, a queued one that turned out wrong is dropped, and a queued one that
  was right is asked for like everything else that is missing;
- what is demanded goes before anything that is asked for ahead of the next layer;
- an engine that computes *as ready* takes resident segments first, another waits in the order of
  summation; either computes while the link works.

All arrays have lanes first. Seconds are relative to whatever the lane began with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]
Columns = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]

_NEVER = 1e30


class Clock(NamedTuple):
    """Where a lane stands, each [lanes].

    Attributes
    ----------
    now_s
        The compute is free.
    link_s
        The link is free of what it has begun or was asked for on demand.
    asked_s
        When the next layer's experts were asked for ahead.
    """

    now_s: Seconds
    link_s: Seconds
    asked_s: Seconds

    @classmethod
    def start(cls, lanes: int) -> Clock:
        """Everything idle at 0."""
        return cls(np.zeros(lanes), np.zeros(lanes), np.zeros(lanes))


class Work(NamedTuple):
    """What one pass of one layer has to do.

    Attributes
    ----------
    before_s, after_s : [lanes] or float
        Compute before the routing is known (attention, router), and that needs no routed expert
        (shared expert).
    compute_s : [lanes, segments]
        In the order of summation; 0 where a segment is not needed.
    fetch_s : [lanes, segments]
        Seconds of the link for a segment that is missing; 0 where it is resident or not needed.
    ahead_s : [lanes, ahead]
        Seconds of the link for what was asked for ahead, in its order; 0 for nothing.
    ahead_of : [lanes, segments]
        Which of these brings a segment; the number of columns where none does.
    """

    before_s: Seconds | float
    after_s: Seconds | float
    compute_s: Seconds
    fetch_s: Seconds
    ahead_s: Seconds
    ahead_of: Columns


class Outcome(NamedTuple):
    """What a pass did.

    Attributes
    ----------
    clock : Clock
        After the pass.
    ready : bool [lanes, segments]
        The segment was in the fast tier when the routing was known.
    demanded : bool [lanes, segments]
        It was fetched on demand.
    begun : bool [lanes, ahead]
        It was fetched ahead, needed or not.
    wait_s : [lanes]
        The compute waited for the link.
    """

    clock: Clock
    ready: Flags
    demanded: Flags
    begun: Flags
    wait_s: Seconds


def advance(
    clock: Clock, work: Work, *, as_ready: bool, frames: int, segments_per_expert: int
) -> Outcome:
    """Run one pass of every lane.

    Parameters
    ----------
    as_ready
        Whether resident segments are computed while others arrive; the shared expert then too.
    frames
        Experts in flight at once. Where they are fewer than a pass may lack, a fetch waits until
        the frame of an earlier one has been consumed (engines that consume in order only).
    segments_per_expert
        1 or 2: neighbouring segments that share a frame.
    """
    routed_s = clock.now_s + work.before_s
    link_s = clock.link_s
    missing = work.fetch_s > 0.0
    if work.ahead_s.shape[1]:
        ends_s = np.maximum(link_s, clock.asked_s)[:, None] + np.cumsum(work.ahead_s, axis=1)
        begun = (ends_s - work.ahead_s < routed_s[:, None]) & (work.ahead_s > 0.0)
        link_s = np.maximum(link_s, np.where(begun, ends_s, -_NEVER).max(axis=1))
        comes_s = np.full((len(ends_s), ends_s.shape[1] + 1), _NEVER)
        np.copyto(comes_s[:, :-1], ends_s, where=begun)
        brought_s = np.take_along_axis(comes_s, work.ahead_of, axis=1)
        coming = missing & (brought_s < _NEVER)
        demanded = missing & ~coming
        ready = ~missing | (coming & (brought_s <= routed_s[:, None]))
    else:
        begun = np.zeros(work.ahead_s.shape, dtype=np.bool_)
        brought_s = np.full(missing.shape, _NEVER)
        coming, demanded, ready = np.zeros_like(missing), missing, ~missing
    asked_s = np.where(demanded, work.fetch_s, 0.0)
    experts = missing.shape[1] // segments_per_expert
    if not as_ready and frames < experts:
        return _advance_in_frames(
            work, routed_s, link_s, brought_s, demanded, begun, ready, frames, segments_per_expert
        )
    arrives_s = np.maximum(link_s, routed_s)[:, None] + np.cumsum(asked_s, axis=1)
    link_s = np.where(demanded.any(axis=1), arrives_s[:, -1], link_s)
    arrives_s = np.where(coming, brought_s, np.where(demanded, arrives_s, -_NEVER))
    total_s = work.compute_s.sum(axis=1)
    if as_ready:
        # What arrives in flight comes before everything that is demanded now.
        late_s = np.where(ready, 0.0, work.compute_s).sum(axis=1)
        last_s = _suffix(np.where(demanded, work.compute_s, 0.0))
        behind_s = np.where(coming, late_s[:, None], last_s)
        total_s = total_s + work.after_s
        bound_s = np.where(ready, -_NEVER, arrives_s + behind_s).max(axis=1)
        done_s = np.maximum(routed_s + total_s, bound_s)
        now_s = done_s
    else:
        bound_s = (arrives_s + _suffix(work.compute_s)).max(axis=1)
        done_s = np.maximum(routed_s + total_s, bound_s)
        now_s = done_s + work.after_s
    wait_s = done_s - routed_s - total_s
    return Outcome(Clock(now_s, link_s, routed_s), ready, demanded, begun, wait_s)


def _suffix(values_s: Seconds) -> Seconds:
    """Sum of each column and all behind it."""
    return np.cumsum(values_s[:, ::-1], axis=1)[:, ::-1]


def _advance_in_frames(
    work: Work,
    routed_s: Seconds,
    link_s: Seconds,
    brought_s: Seconds,
    demanded: Flags,
    begun: Flags,
    ready: Flags,
    frames: int,
    segments_per_expert: int,
) -> Outcome:
    """The same in order, expert by expert: a fetch takes over the frame of an earlier one."""
    lanes, segments = demanded.shape
    everyone = np.arange(lanes)
    # When each frame was last given back; the fetches of a lane take them in turn.
    given_s = np.repeat(routed_s[:, None], frames, axis=1)
    turn = np.zeros(lanes, dtype=np.intp)
    done_s = routed_s.copy()
    link_s = link_s.copy()
    for first in range(0, segments, segments_per_expert):
        parts = range(first, first + segments_per_expert)
        fetched = demanded[:, parts].any(axis=1)
        link_s = np.where(fetched, np.maximum(link_s, given_s[everyone, turn]), link_s)
        arrives_s = []
        for part in parts:
            link_s = link_s + np.where(demanded[:, part], work.fetch_s[:, part], 0.0)
            late = np.where(ready[:, part], -_NEVER, brought_s[:, part])
            arrives_s.append(np.where(demanded[:, part], link_s, late))
        for part, arrival_s in zip(parts, arrives_s, strict=True):
            done_s = np.maximum(done_s, arrival_s) + work.compute_s[:, part]
        given_s[everyone[fetched], turn[fetched]] = done_s[fetched]
        turn[fetched] = (turn[fetched] + 1) % frames
    wait_s = done_s - routed_s - work.compute_s.sum(axis=1)
    now_s = done_s + work.after_s
    return Outcome(Clock(now_s, link_s, routed_s), ready, demanded, begun, wait_s)
