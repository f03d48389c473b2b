"""Both lanes of a link to a device whose RAM is too small: from RAM, and from the disk past it.

- What RAM holds crosses the bus; the rest is read from the disk first, one read at a time, and then
  crosses the same bus, while the disk reads on.
- Each lane has a queue of its own, demands before what is fetched ahead, and takes the next of it
  when it has seen the last one off: the lane from RAM when its copy is over, that from the disk
  when its read is. What a lane has taken ends, whoever wants it.
- What is read lies in one of a few *bounces* until its copy is over; without one nothing is read.
- Of what is at the bus, that goes first which came first, from whichever lane. So what RAM has is
  not held up by the disk, and may be fetched ahead while a demand is still being read.

All arrays have lanes of the replay (independent ones) first; see :mod:`moepack.tier_timeline`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.lane_clock import NEVER, Columns, Costs, Flags, Seconds, of_lanes

#: One is read into while another is copied from.
LEAST_BOUNCES = 2

# The difference between two moments that counts as none.
_SAME_S = 1e-12

_Rows = npt.NDArray[np.intp]


class TierWork(NamedTuple):
    """What one pass of one layer has to do; see :class:`moepack.lane_clock.Work`.

    Attributes
    ----------
    fetch_s, ahead_s : [lanes, segments], [lanes, ahead]
        Seconds of the bus, 0 for nothing.
    read_s, ahead_read_s
        Seconds of the disk before that; 0 for what RAM holds.
    next_s, next_read_s : [lanes, next]
        What is asked for ahead of the next pass, in its order.
    """

    before_s: Seconds | float
    guess_s: Seconds | float
    after_s: Seconds | float
    compute_s: Seconds
    fetch_s: Seconds
    read_s: Seconds
    ahead_s: Seconds
    ahead_read_s: Seconds
    ahead_of: Columns
    next_s: Seconds
    next_read_s: Seconds
    costs: Costs = Costs()

    def take(self, lanes: Columns) -> TierWork:
        """That of some of the lanes."""
        fields: dict[str, Any] = self._asdict()
        costs = fields.pop("costs")
        taken = {name: of_lanes(values, lanes) for name, values in fields.items()}
        return TierWork(**taken, costs=costs.take(lanes))


class TierClock(NamedTuple):
    """Where a lane of the replay stands.

    Attributes
    ----------
    now_s, bus_s, ram_s, disk_s : [lanes]
        When the compute, the bus, the lane from RAM and the disk are free of what is under way, or
        was demanded.
    late_s, late_ends_s : [lanes]
        Seconds of the bus for what the disk is still reading for nobody, 0 for nothing; and when
        that is over, if nothing else is asked for. It is read at ``disk_s``.
    came_s, ends_s : [lanes, ahead]
        When what was asked for ahead of the next pass is at the bus, and is there, if nothing else
        is asked for.
    bounces_s : [lanes, bounces]
        When each is free, ascending.
    """

    now_s: Seconds
    bus_s: Seconds
    ram_s: Seconds
    disk_s: Seconds
    late_s: Seconds
    late_ends_s: Seconds
    came_s: Seconds
    ends_s: Seconds
    bounces_s: Seconds

    @classmethod
    def start(cls, lanes: int, ahead: int = 0, bounces: int = LEAST_BOUNCES) -> TierClock:
        """Everything idle at 0, nothing asked for."""
        now_s, bus_s, ram_s, disk_s, late_s, late_ends_s = np.zeros((6, lanes))
        came_s, ends_s = np.full((2, lanes, ahead), NEVER)
        free_s = np.zeros((lanes, bounces))
        return cls(now_s, bus_s, ram_s, disk_s, late_s, late_ends_s, came_s, ends_s, free_s)

    def take(self, lanes: Columns) -> TierClock:
        """Some of the lanes."""
        return TierClock(*(values[lanes] for values in self))

    def put(self, lanes: Columns, other: TierClock) -> None:
        """Overwrite some of the lanes."""
        for mine, values in zip(self, other, strict=True):
            mine[lanes] = values

    def later(self, seconds: Seconds) -> TierClock:
        """The same with so much more computed."""
        return self._replace(now_s=self.now_s + seconds)

    def since_now(self) -> TierClock:
        """The same with the compute free at 0."""
        now_s = self.now_s
        never = self.came_s >= NEVER
        return TierClock(
            np.zeros_like(now_s),
            self.bus_s - now_s,
            self.ram_s - now_s,
            self.disk_s - now_s,
            self.late_s,
            self.late_ends_s - now_s,
            np.where(never, NEVER, self.came_s - now_s[:, None]),
            np.where(never, NEVER, self.ends_s - now_s[:, None]),
            self.bounces_s - now_s[:, None],
        )

    def apart(self, other: TierClock) -> Flags:
        """Which lanes stand differently, both with the compute free at 0: what comes next tells.

        What has been free, or there, for a while could as well have been for longer.
        """
        differ = np.abs(self.late_s - other.late_s) > _SAME_S
        for mine, theirs in zip(self[1:], other[1:], strict=True):
            far = np.abs(np.maximum(mine, 0.0) - np.maximum(theirs, 0.0)) > _SAME_S
            differ |= far.reshape(len(far), -1).any(axis=1)
        return differ


class Cut(NamedTuple):
    """What the routing leaves of what was asked for ahead.

    ``ends_s`` [lanes, ahead] is set of what was at the bus by then. ``late_s`` are the bus's
    seconds of what the disk is still reading, 0 for nothing; then ``disk_s`` is when it has it.
    """

    begun: Flags
    ends_s: Seconds
    bus_s: Seconds
    ram_s: Seconds
    disk_s: Seconds
    late_s: Seconds
    bounces_s: Seconds


def last_of(bounces_s: Seconds, ends_s: Seconds) -> Seconds:
    """When bounces are free after further copies, which ended in order, [lanes, bounces].

    Parameters
    ----------
    ends_s : [lanes, copies]
        ``-NEVER`` for none.
    """
    return np.sort(np.hstack([bounces_s, ends_s]), axis=1)[:, -bounces_s.shape[1] :]


class LinkLanes:
    """Both lanes of a pass and the bus behind them: what is asked for, and when it is there.

    Columns are the late one, the segments, what is asked for ahead of the next pass, and one that
    never comes. A frame that something unwanted arrives in holds nobody up.
    """

    def __init__(
        self,
        work: TierWork,
        cut: Cut,
        demanded: Flags,
        coming: Flags,
        late: Flags,
        routed_s: Seconds,
        segments_per_expert: int,
        frames: int,
    ) -> None:
        lanes, segments = demanded.shape
        self._parts = segments_per_expert
        self._everyone = np.arange(lanes)
        self._routed_s = routed_s
        self._asked_s = routed_s + work.guess_s
        nothing = np.zeros((lanes, 1))
        self._first_next = 1 + segments
        self._never = self._first_next + work.next_s.shape[1]
        asked_fetch_s = np.where(demanded, work.fetch_s, 0.0)
        self._copy_s = np.hstack([cut.late_s[:, None], asked_fetch_s, work.next_s, nothing])
        self._read_s = np.hstack([nothing, work.read_s, work.next_read_s, nothing])
        # When every column was asked for; the late one has been read then.
        self._known_s = np.full(self._copy_s.shape, NEVER)
        # When each was at the bus, and when it is there.
        self.came_s = np.full(self._copy_s.shape, NEVER)
        self.ends_s = np.full(self._copy_s.shape, NEVER)
        self._cut = cut
        self._settled = False
        self._bus_s, self._ram_s, self._disk_s = (
            each.copy() for each in (cut.bus_s, cut.ram_s, cut.disk_s)
        )
        self._bounces_s = cut.bounces_s.copy()
        self._known_s[:, 0] = np.where(cut.late_s > 0.0, cut.disk_s, NEVER)
        #: The column that brings each segment.
        self.source = np.where(late, 0, 1 + np.arange(segments))
        self._order(work, demanded, coming)
        self._ask_first(demanded, frames)
        if (self._takers[self._everyone, self._taken] == self._never).all():
            # All that will be asked for has been: nothing can come between.
            self.before(self._everyone, np.full(lanes, NEVER))
            self._settled = True

    def _order(self, work: TierWork, demanded: Flags, coming: Flags) -> None:
        """The order of each lane: the late one, what completes a coming expert, demands, the next.

        And of the experts: what is demanded with a frame of its own, then what is asked for ahead.
        """
        lanes, parts = len(self._everyone), self._parts
        ahead = work.ahead_s.shape[1]
        experts = demanded.shape[1] // parts
        self._of_coming = coming.reshape(lanes, experts, parts).any(axis=2)
        rank = np.where(coming, work.ahead_of, ahead).reshape(lanes, experts, parts).min(axis=2)
        #: Of every expert its turn among those that are fetched.
        self.turn = np.where(self._of_coming, rank, ahead + np.arange(experts))
        key = np.repeat(self.turn, parts, axis=1) * parts + np.tile(np.arange(parts), experts)
        last = (ahead + experts) * parts
        keys = np.empty(self._copy_s.shape, dtype=np.intp)
        keys[:, 0] = -1
        keys[:, 1 : self._first_next] = key
        keys[:, self._first_next :] = last + np.arange(self._never + 1 - self._first_next)
        from_disk: Flags = self._read_s > 0.0
        from_disk[:, 0] = True
        there: Flags = self._copy_s > 0.0
        self._ram_order, self._disk_order = (
            self._in_turn(np.where(there & of_lane, keys, last + self._never + 1), there & of_lane)
            for of_lane in (~from_disk, from_disk)
        )
        self._ram_at = np.zeros(lanes, dtype=np.intp)
        self._disk_at = np.zeros(lanes, dtype=np.intp)
        # Experts that need a frame: columns of their first segment.
        firsts = 1 + parts * np.arange((self._never - 1) // parts)
        wants: Flags = np.any(there[:, 1 : self._never].reshape(lanes, -1, parts), axis=2)
        wants[:, :experts] &= ~self._of_coming
        place = np.where(wants, np.arange(len(firsts)), len(firsts))
        place.sort(axis=1)
        self._takers = np.where(place < len(firsts), np.append(firsts, 0)[place], self._never)
        self._takers = np.hstack([self._takers, np.full((lanes, 1), self._never)])
        self._taken = np.zeros(lanes, dtype=np.intp)

    def _in_turn(self, keys: Columns, members: Flags) -> Columns:
        longest = int(members.sum(axis=1).max(initial=0))
        order = np.argsort(keys, axis=1, kind="stable")[:, :longest]
        order = np.where(np.take_along_axis(members, order, axis=1), order, self._never)
        return np.hstack([order, np.full((len(keys), 1), self._never)])

    def _ask_first(self, demanded: Flags, frames: int) -> None:
        """What is asked for when the routing is known, as far as there are frames."""
        rests = demanded & np.repeat(self._of_coming, self._parts, axis=1)
        known_s = self._known_s[:, 1 : self._first_next]
        np.copyto(known_s, self._routed_s[:, None], where=rests)
        free = frames - self._of_coming.sum(axis=1)
        for turn in range(min(int(free.max(initial=0)), self._takers.shape[1] - 1)):
            rows = np.flatnonzero(turn < free)
            self.give(rows, self._routed_s[rows])

    def give(self, rows: _Rows, at_s: Seconds) -> None:
        """A frame is free: whoever is next takes it."""
        if self._settled:
            return
        first = self._takers[rows, self._taken[rows]]
        some = first < self._never
        rows, first, at_s = rows[some], first[some], at_s[some]
        self._taken[rows] += 1
        at_s = np.where(first < self._first_next, at_s, np.maximum(at_s, self._asked_s[rows]))
        for part in range(self._parts):
            self._known_s[rows, first + part] = at_s

    def arrival(self, rows: _Rows, segments: Columns, there_s: Seconds) -> Seconds:
        """When segments are there; ``there_s`` [lanes, segments] is set of those that were brought.

        The bus goes on until then.
        """
        found_s = there_s[rows, segments]
        unknown = np.abs(found_s) >= NEVER
        if unknown.any():
            some, columns = rows[unknown], self.source[rows[unknown], segments[unknown]]
            self.until(some, columns)
            found_s[unknown] = self.ends_s[some, columns]
        return found_s

    def until(self, rows: _Rows, columns: Columns) -> None:
        """Let the bus go on until these columns are there."""
        while True:
            waits = self.ends_s[rows, columns] >= NEVER
            if not waits.any():
                return
            rows, columns = rows[waits], columns[waits]
            moved = self._step(rows, np.full(len(rows), NEVER))
            assert moved.all(), "waiting for what was not asked for"

    def before(self, rows: _Rows, limit_s: Seconds) -> None:
        """Let the bus take all that comes to it before a moment."""
        if self._settled:
            return
        while len(rows):
            moved = self._step(rows, limit_s)
            rows, limit_s = rows[moved], limit_s[moved]

    def _step(self, rows: _Rows, limit_s: Seconds) -> Flags:
        """Take what comes next, if it comes before the limit; which rows did."""
        from_ram = self._ram_order[rows, self._ram_at[rows]]
        from_disk = self._disk_order[rows, self._disk_at[rows]]
        ram_came_s = np.maximum(self._known_s[rows, from_ram], self._ram_s[rows])
        begins_s = np.maximum(self._disk_s[rows], self._bounces_s[rows, 0])
        disk_came_s = np.maximum(self._known_s[rows, from_disk], begins_s)
        disk_came_s += self._read_s[rows, from_disk]
        ram = ram_came_s <= disk_came_s
        came_s = np.where(ram, ram_came_s, disk_came_s)
        moved: Flags = came_s < limit_s
        if not moved.all():
            rows, ram, came_s = rows[moved], ram[moved], came_s[moved]
            from_ram, from_disk = from_ram[moved], from_disk[moved]
        column = np.where(ram, from_ram, from_disk)
        end_s = np.maximum(self._bus_s[rows], came_s) + self._copy_s[rows, column]
        self._bus_s[rows] = end_s
        self.came_s[rows, column], self.ends_s[rows, column] = came_s, end_s
        self._ram_s[rows[ram]] = end_s[ram]
        self._ram_at[rows] += ram
        self._disk_at[rows] += ~ram
        read = rows[~ram]
        self._disk_s[read] = came_s[~ram]
        self._bounces_s[read, :-1] = self._bounces_s[read, 1:]
        self._bounces_s[read, -1] = end_s[~ram]
        return moved

    def clock(self, done_s: Seconds) -> TierClock:
        """Where the pass leaves everything; what is asked for ahead is carried on to its end."""
        self.before(self._everyone, np.full(len(done_s), NEVER))
        nexts = slice(self._first_next, self._never)
        # The lanes free of all but that: the next routing may cut it.
        cut, mine = self._cut, slice(0, self._first_next)
        over = self.ends_s[:, mine] < NEVER
        late = over[:, 0] & (self.came_s[:, 0] >= done_s)
        over[:, 0] &= ~late
        ends_s = np.where(over, self.ends_s[:, mine], -NEVER)
        read = self._read_s[:, mine] > 0.0
        read_ends_s = np.where(read & over, self.came_s[:, mine], -NEVER)
        read[:, 0] = True
        return TierClock(
            done_s,
            np.maximum(cut.bus_s, ends_s.max(axis=1)),
            np.maximum(cut.ram_s, np.where(read, -NEVER, ends_s).max(axis=1)),
            np.maximum(cut.disk_s, read_ends_s.max(axis=1)),
            np.where(late, cut.late_s, 0.0),
            np.where(late, self.ends_s[:, 0], 0.0),
            self.came_s[:, nexts],
            self.ends_s[:, nexts],
            last_of(cut.bounces_s, np.where(read, ends_s, -NEVER)),
        )
