"""The clock of the replay over three tiers: a disk, a bus and one compute queue.

The rules are those of :mod:`moepack.timeline`, but for the link, which has two lanes as the
engine's transfer to a device has them (``transfer/cuda.py``); what they do to one another is told
in :mod:`moepack.link_lanes`. An engine that computes *as ready* takes, of what is missing, the
first in the order of asking that is there, and where nothing is there it waits for the first.

A pass is given what is fetched ahead of the next one too, since the two share the bus. All arrays
have lanes (of the replay: independent ones) first; seconds are relative to whatever they began
with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moepack.lane_clock import NEVER, Flags, Seconds
from moepack.link_lanes import Cut, LinkLanes, TierClock, TierWork, last_of


class TierOutcome(NamedTuple):
    """What a pass did; see :class:`moepack.timeline.Outcome`."""

    clock: TierClock
    ready: Flags
    demanded: Flags
    begun: Flags
    wait_s: Seconds
    saved_s: Seconds


def advance_tiers(
    clock: TierClock, work: TierWork, *, as_ready: bool, frames: int, segments_per_expert: int
) -> TierOutcome:
    """Run one pass of every lane; see :func:`moepack.timeline.advance`."""
    routed_s = clock.now_s + work.before_s
    cut = _cut(clock, work, routed_s)
    lacking = work.fetch_s > 0.0
    lanes, segments = lacking.shape
    ahead = work.ahead_s.shape[1]
    some = np.zeros((lanes, ahead + 1), dtype=np.bool_)
    some[:, :-1] = cut.begun
    coming: Flags = lacking & np.take_along_axis(some, work.ahead_of, axis=1)
    demanded = lacking & ~coming
    begin_s = routed_s + work.guess_s + work.after_s
    begin_s = begin_s + work.costs.of_ahead(cut.begun, demanded)
    work = work._replace(compute_s=work.compute_s + work.costs.of_demands(demanded))
    # Where each arrival is found: what came before the routing, the late one, what is demanded.
    there_s = np.full((lanes, ahead + 1), NEVER)
    np.copyto(there_s[:, :-1], cut.ends_s, where=cut.ends_s < NEVER)
    there_s = np.where(coming, np.take_along_axis(there_s, work.ahead_of, axis=1), -NEVER)
    late = coming & (there_s >= NEVER)
    queue = LinkLanes(work, cut, demanded, coming, late, routed_s, segments_per_expert, frames)
    shape = (lanes, segments // segments_per_expert, segments_per_expert)
    run = _as_ready if as_ready else _in_order
    done_s = run(queue, work, there_s, lacking, begin_s, shape)
    wait_s = done_s - begin_s - work.compute_s.sum(axis=1)
    ready = ~lacking | (coming & (there_s <= routed_s[:, None]))
    # Nothing is broken off: copies are handed over whole, and so is what they are read from.
    saved_s = np.zeros(lanes)
    return TierOutcome(queue.clock(done_s), ready, demanded, cut.begun, wait_s, saved_s)


def _cut(clock: TierClock, work: TierWork, routed_s: Seconds) -> Cut:
    """Drop what no lane has taken when the routing is known."""
    known_s = routed_s[:, None]
    came = clock.came_s < known_s
    from_disk = work.ahead_read_s > 0.0
    begun: Flags = came | (from_disk & (clock.came_s - work.ahead_read_s < known_s))
    bus_s, ram_s, disk_s = clock.bus_s, clock.ram_s, clock.disk_s
    bounces_s = clock.bounces_s
    over = (clock.late_s > 0.0) & (disk_s < routed_s)
    bus_s = np.where(over, np.maximum(bus_s, clock.late_ends_s), bus_s)
    late_s = np.where(over, 0.0, clock.late_s)
    if over.any():
        bounces_s = last_of(bounces_s, np.where(over, clock.late_ends_s, -NEVER)[:, None])
    if begun.any():
        ends_s = np.where(came, clock.ends_s, -NEVER)
        bus_s = np.maximum(bus_s, ends_s.max(axis=1))
        ram_s = np.maximum(ram_s, np.where(from_disk, -NEVER, ends_s).max(axis=1))
        read_s = np.where(begun & from_disk, clock.came_s, -NEVER)
        disk_s = np.maximum(disk_s, read_s.max(axis=1))
        bounces_s = last_of(bounces_s, np.where(from_disk, ends_s, -NEVER))
        reading = begun & ~came  # one at most: the disk reads one by one
        late_s = np.where(reading.any(axis=1), (work.ahead_s * reading).sum(axis=1), late_s)
    ends_s = np.where(came, clock.ends_s, NEVER)
    return Cut(begun, ends_s, bus_s, ram_s, disk_s, late_s, bounces_s)


def _in_order(
    queue: LinkLanes,
    work: TierWork,
    there_s: Seconds,
    lacking: Flags,
    begin_s: Seconds,
    shape: tuple[int, int, int],
) -> Seconds:
    """Compute in the order of summation; when the last segment has been."""
    _, experts, parts = shape
    done_s: Seconds = np.array(begin_s)
    flies = np.asarray(lacking.reshape(shape).any(axis=2))
    for expert in range(experts):
        for part in range(parts):
            column = expert * parts + part
            rows = np.flatnonzero(lacking[:, column])
            columns = np.full(len(rows), column)
            done_s[rows] = np.maximum(done_s[rows], queue.arrival(rows, columns, there_s))
            done_s += work.compute_s[:, column]
        rows = np.flatnonzero(flies[:, expert])
        queue.give(rows, done_s[rows])
    return done_s


def _as_ready(
    queue: LinkLanes,
    work: TierWork,
    there_s: Seconds,
    lacking: Flags,
    begin_s: Seconds,
    shape: tuple[int, int, int],
) -> Seconds:
    """Compute what is resident, then each time the first that is there, or else the first."""
    _, experts, parts = shape
    done_s: Seconds = begin_s + np.where(lacking, 0.0, work.compute_s).sum(axis=1)
    waiting = np.asarray(lacking.reshape(shape).any(axis=2))
    last = int(queue.turn.max(initial=0)) + 1
    for _ in range(int(waiting.sum(axis=1).max(initial=0))):
        rows = np.flatnonzero(waiting.any(axis=1))
        queue.before(rows, done_s[rows])
        ends_s = np.take_along_axis(queue.ends_s[rows], queue.source[rows], axis=1)
        known_s = there_s[rows]
        ends_s = np.where((known_s > -NEVER) & (known_s < NEVER), known_s, ends_s)
        ends_s = np.where(lacking[rows], ends_s, -NEVER).reshape(len(rows), experts, parts)
        there = ends_s.max(axis=2) <= done_s[rows, None]
        turn = np.where(waiting[rows], queue.turn[rows] + np.where(there, 0, last), 2 * last)
        picked = turn.argmin(axis=1)
        waiting[rows, picked] = False
        # What has come of it first, then what was demanded.
        first = picked * parts
        if parts == 2:
            swap = (known_s[np.arange(len(rows)), first] == -NEVER) & (
                known_s[np.arange(len(rows)), first + 1] > -NEVER
            )
        for part in range(parts):
            column = first + (part if parts == 1 else np.where(swap, 1 - part, part))
            lacks = lacking[rows, column]
            mine, columns = rows[lacks], column[lacks]
            done_s[mine] = np.maximum(done_s[mine], queue.arrival(mine, columns, there_s))
            done_s[mine] += work.compute_s[mine, columns]
        queue.give(rows, done_s[rows])
    return done_s
