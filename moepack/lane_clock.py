"""Independent lanes of a replay: where each stands, and what a pass asks of it.

All arrays have lanes first. Seconds are relative to whatever the lane began with. How a pass runs
is told in :mod:`moepack.timeline`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]
Columns = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]

#: Stands for a moment that does not come: finite, so that differences are numbers.
NEVER = 1e30

# The difference between two moments that counts as none.
_SAME_S = 1e-12


class Clock(NamedTuple):
    """Where a lane stands.

    Attributes
    ----------
    now_s : [lanes]
        The compute is free.
    link_s : [lanes]
        The link is free of what it has begun or was asked for on demand.
    asked_s : [lanes, slots]
        When the next layer's experts may be fetched: the first of them that lacks something, the
        second, and so on; all alike where there is one column.
    """

    now_s: Seconds
    link_s: Seconds
    asked_s: Seconds

    @classmethod
    def start(cls, lanes: int, slots: int = 1) -> Clock:
        """Everything idle at 0."""
        return cls(np.zeros(lanes), np.zeros(lanes), np.zeros((lanes, slots)))

    def take(self, lanes: Columns) -> Clock:
        """Some of the lanes."""
        return Clock(*(values[lanes] for values in self))

    def put(self, lanes: Columns, other: Clock) -> None:
        """Overwrite some of the lanes."""
        for mine, values in zip(self, other, strict=True):
            mine[lanes] = values

    def later(self, seconds: Seconds) -> Clock:
        """The same with so much more computed."""
        return self._replace(now_s=self.now_s + seconds)

    def since_now(self) -> Clock:
        """The same with the compute free at 0."""
        now_s = self.now_s
        return Clock(now_s - now_s, self.link_s - now_s, self.asked_s - now_s[:, None])

    def apart(self, other: Clock) -> Flags:
        """Which lanes stand differently, both with the compute free at 0: what comes next tells.

        A link that has been free for a while could as well have been for longer, but for what was
        asked for ahead in the meantime.
        """
        busy = [np.maximum(clock.link_s, 0.0) for clock in (self, other)]
        asked = [np.maximum(clock.link_s[:, None], clock.asked_s) for clock in (self, other)]
        differ: Flags = np.abs(busy[0] - busy[1]) > _SAME_S
        differ |= np.any(np.abs(asked[0] - asked[1]) > _SAME_S, axis=1)
        return differ


def ahead_slots(frames: int, experts: int, ahead: int) -> int:
    """Columns of :attr:`Clock.asked_s`.

    Parameters
    ----------
    experts, ahead
        The most that a pass consumes, and that is asked for ahead of the next one. Where there are
        frames for all of them none has to wait for one.
    """
    return 1 if not ahead or frames >= experts + ahead else frames


class _Standing(Protocol):
    """Where lanes of a replay stand: :class:`Clock`, or that of three tiers."""

    @property
    def now_s(self) -> Seconds: ...
    def take(self: C, lanes: Columns) -> C: ...
    def put(self: C, lanes: Columns, other: C) -> None: ...
    def later(self: C, seconds: Seconds) -> C: ...
    def since_now(self: C) -> C: ...
    def apart(self: C, other: C) -> Flags: ...


C = TypeVar("C", bound=_Standing)
C_co = TypeVar("C_co", bound=_Standing, covariant=True)


class Done(Protocol[C_co]):
    """What a pass did: :class:`moepack.timeline.Outcome`, or that of three tiers."""

    @property
    def clock(self) -> C_co:
        """After the pass."""

    @property
    def ready(self) -> Flags:
        """Segments that were there when the routing was known."""

    @property
    def demanded(self) -> Flags:
        """Segments that were fetched on demand."""

    @property
    def begun(self) -> Flags:
        """What was fetched ahead, needed or not."""

    @property
    def wait_s(self) -> Seconds:
        """The compute waited for the link."""

    @property
    def saved_s(self) -> Seconds:
        """Seconds of the link that breaking off saved."""


class Instead(NamedTuple):
    """What stands for segments of experts of which nothing was begun ahead, [lanes, segments].

    Attributes
    ----------
    compute_s, fetch_s
        As in :class:`Work`: of a low copy, of nothing, or of the segment itself.
    """

    compute_s: Seconds
    fetch_s: Seconds


def of_lanes(values: Any, lanes: Columns) -> Any:
    """Of values by lane those of some; what is alike in all of them stays."""
    return values[lanes] if np.ndim(values) else values


class Costs(NamedTuple):
    """What transfers cost the computing thread beside the link's own time, each [lanes] or float.

    Attributes
    ----------
    demand_s, burst_s
        One that is demanded, and the first of those in a pass besides: the thread has nothing else
        to do, and waits until it is woken.
    ahead_s, ahead_burst_s
        One that was begun ahead, needed or not; and beginning any, where nothing is demanded. They
        come while the thread computes.
    """

    demand_s: Seconds | float = 0.0
    burst_s: Seconds | float = 0.0
    ahead_s: Seconds | float = 0.0
    ahead_burst_s: Seconds | float = 0.0

    def take(self, lanes: Columns) -> Costs:
        """Those of some of the lanes."""
        return Costs(*(of_lanes(values, lanes) for values in self))

    def of_demands(self, demanded: Flags) -> Seconds:
        """What each segment costs, [.., lanes, segments]."""
        first = demanded & (np.cumsum(demanded, axis=-1) == 1)
        each_s, first_s = (np.asarray(cost)[..., None] for cost in (self.demand_s, self.burst_s))
        return np.asarray(demanded * each_s + first * first_s)

    def of_ahead(self, begun: Flags, demanded: Flags) -> Seconds:
        """What was begun ahead costs, [lanes]."""
        counts = begun.sum(axis=1)
        alone = (counts > 0) & ~demanded.any(axis=1)
        return np.asarray(counts * self.ahead_s + alone * self.ahead_burst_s)


class Work(NamedTuple):
    """What one pass of one layer has to do.

    Attributes
    ----------
    before_s, guess_s, after_s : [lanes] or float
        Compute before the routing is known (attention, router), then of guessing the next layer's
        experts, which are asked for then, and then what needs no routed expert (shared expert).
    compute_s : [lanes, segments]
        In the order of summation; 0 where a segment is not needed.
    fetch_s : [lanes, segments]
        Seconds of the link for a segment that is missing; 0 where it is resident or not needed.
    ahead_s : [lanes, ahead]
        Seconds of the link for what was asked for ahead, in its order; 0 for nothing.
    ahead_of : [lanes, segments]
        Which of these brings a segment; the number of columns where none does.
    costs : Costs
        What the transfers cost the compute.
    piece_s : [lanes, ahead] or float
        Seconds of the link for a piece, behind which a transfer that nobody needs is broken off.
    """

    before_s: Seconds | float
    guess_s: Seconds | float
    after_s: Seconds | float
    compute_s: Seconds
    fetch_s: Seconds
    ahead_s: Seconds
    ahead_of: Columns
    costs: Costs = Costs()
    piece_s: Seconds | float = NEVER

    def take(self, lanes: Columns) -> Work:
        """That of some of the lanes."""
        fields: dict[str, Any] = self._asdict()
        costs = fields.pop("costs")
        taken = {name: of_lanes(values, lanes) for name, values in fields.items()}
        return Work(**taken, costs=costs.take(lanes))
