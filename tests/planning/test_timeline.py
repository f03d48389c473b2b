"""The timeline against a plain simulation of one link and one processor, expert by expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.lane_clock import Clock, Costs, Work, ahead_slots
from moepack.timeline import advance
from tests.support import simulation
from tests.support.simulation import Segment, Simulation

COSTS = simulation.Costs(demand=0.5, burst=1.25, ahead=0.25, ahead_burst=0.75)

Pass = tuple[float, float, float, list[list[Segment]], list[float]]


def work_of(
    before: float,
    guess: float,
    after: float,
    experts: list[list[Segment]],
    ahead: list[float],
    costs: Costs = Costs(),  # noqa: B008 is a tuple
    piece: float | None = None,
) -> Work:
    """One lane."""
    parts = [part for expert in experts for part in expert]
    return Work(
        before_s=before,
        guess_s=guess,
        after_s=after,
        compute_s=np.array([[part.compute for part in parts]]),
        fetch_s=np.array([[part.fetch for part in parts]]),
        ahead_s=np.array([ahead]).reshape(1, -1),
        ahead_of=np.array([[len(ahead) if p.ahead is None else p.ahead for p in parts]]),
        costs=costs,
        piece_s=1e30 if piece is None else piece,
    )


# Multiples of a quarter: sums are exact, so nothing hangs on rounding.
quarters = st.integers(0, 12).map(lambda n: n / 4)


@st.composite
def layers(draw: st.DrawFn, parts: int, frames: int, count: int) -> Pass:
    """A pass of so many experts, some predicted rightly, with wrong guesses between."""
    experts = [
        [Segment(draw(quarters) + 0.25, draw(quarters), None) for _ in range(parts)]
        for _ in range(count)
    ]
    ahead: list[float] = []
    for guess in draw(st.lists(st.integers(0, 5), max_size=min(4, frames), unique=True)):
        for part in range(parts):
            if guess < count:  # a right one: it brings the segment if that is missing
                segment = experts[guess][part]
                if segment.fetch:
                    segment.ahead = len(ahead)
                ahead.append(segment.fetch)
            else:
                ahead.append(draw(quarters))
    return draw(quarters), draw(quarters), draw(quarters), experts, ahead


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("as_ready", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_passes_end_when_a_plain_simulation_says(
    parts: int, as_ready: bool, frames: int, data: st.DataObject
) -> None:
    """In order, one frame has to be left for what nobody guessed."""
    most = frames if as_ready else frames - 1
    count = data.draw(st.integers(1, 3))
    passes = data.draw(st.lists(layers(parts, most, count), min_size=1, max_size=4))
    piece = data.draw(st.sampled_from([None, 0.25, 0.5, 1.0, 1.25, 4.0]))
    plain = Simulation(as_ready=as_ready, frames=frames, costs=COSTS, piece=piece)
    clock = Clock.start(1, ahead_slots(frames, count, 4))
    for one in passes:
        groups = [one[4][place : place + parts] for place in range(0, len(one[4]), parts)]
        seen = plain.run(*one[:4], groups)
        work = work_of(*one, Costs(*COSTS), piece)
        done = advance(clock, work, as_ready=as_ready, frames=frames, segments_per_expert=parts)
        assert done.saved_s[0] == seen.saved
        clock = done.clock
        assert clock.now_s[0] == seen.end
        assert clock.link_s[0] == plain.link
        assert set(np.flatnonzero(done.ready[0])) == seen.ready
        assert set(np.flatnonzero(done.demanded[0])) == seen.demanded
        assert set(np.flatnonzero(done.begun[0])) == seen.begun


@pytest.mark.parametrize("as_ready", [False, True])
@given(data=st.data())
def test_what_came_ahead_is_never_dearer_than_what_is_demanded(
    as_ready: bool, data: st.DataObject
) -> None:
    """All that are lacking have come, or some, but not the first: what demands cost hides behind
    the next one's arrival, and would not where the last alone were demanded."""
    count = data.draw(st.integers(1, 4))
    lacking = [Segment(data.draw(quarters), data.draw(quarters) + 0.25) for _ in range(count)]
    came = set(range(count))
    if count > 1 and data.draw(st.booleans()):
        came = data.draw(st.sets(st.integers(1, count - 1), min_size=1))
    brought = [
        [replace(part, ahead=sorted(came).index(place) if place in came else None)]
        for place, part in enumerate(lacking)
    ]
    ahead = [lacking[place].fetch for place in sorted(came)]
    before = sum(ahead) + data.draw(quarters) + 0.25
    demand, burst = data.draw(quarters), data.draw(quarters)
    shares = st.integers(0, 4).map(lambda n: n / 4)
    costs = Costs(demand, burst, demand * data.draw(shares), burst * data.draw(shares))

    def seconds(experts: list[list[Segment]], ahead: list[float]) -> float:
        work = work_of(before, 0.0, 0.0, experts, ahead, costs)
        done = advance(Clock.start(1), work, as_ready=as_ready, frames=8, segments_per_expert=1)
        assert done.demanded.sum() == count - len(ahead)
        return float(done.clock.now_s[0])

    assert seconds(brought, ahead) <= seconds([[part] for part in lacking], [])


def test_two_misses_by_hand() -> None:
    """Routed at 2, guessed and shared until 3; transfers end at 5 and 8; 1 of compute each: 9."""
    experts = [[Segment(1.0, 0.0, None)], [Segment(1.0, 3.0, None)], [Segment(1.0, 3.0, None)]]
    done = advance(
        Clock.start(1),
        work_of(2.0, 0.25, 0.75, experts, []),
        as_ready=False,
        frames=3,
        segments_per_expert=1,
    )
    assert done.clock.now_s[0] == 9.0
    assert done.clock.link_s[0] == 8.0
    assert done.clock.asked_s[0] == 2.25
    assert done.wait_s[0] == 9.0 - 3.0 - 3.0


@pytest.mark.parametrize(("as_ready", "end"), [(True, 14.0), (False, 17.0)])
def test_two_misses_with_one_frame_by_hand(as_ready: bool, end: float) -> None:
    """Routed at 2; the first comes at 5 and is computed until 8; only then the second is fetched.

    It comes at 11 and ends at 14. The resident one hides behind the first transfer where it is
    computed first; in order it comes last.
    """
    experts = [[Segment(3.0, 3.0, None)], [Segment(3.0, 3.0, None)], [Segment(3.0, 0.0, None)]]
    done = advance(
        Clock.start(1),
        work_of(2.0, 0.0, 0.0, experts, []),
        as_ready=as_ready,
        frames=1,
        segments_per_expert=1,
    )
    assert done.clock.now_s[0] == end


@pytest.mark.parametrize(
    ("piece", "link", "end"), [(0.5, 7.5, 8.5), (2.5, 8.0, 9.0), (4.0, 9.0, 10.0)]
)
def test_what_turns_out_wrong_is_broken_off_by_hand(piece: float, link: float, end: float) -> None:
    """Asked for at 0, it would end at 6; routed at 4.25 nobody needs it: the piece ends it.

    Then 3 of the link for what is missing, and 1 of compute.
    """
    work = work_of(4.25, 0.0, 0.0, [[Segment(1.0, 3.0)]], [6.0], piece=piece)
    done = advance(Clock.start(1), work, as_ready=True, frames=3, segments_per_expert=1)
    assert done.clock.link_s[0] == link
    assert done.clock.now_s[0] == end


def test_what_is_fetched_ahead_waits_for_a_frame() -> None:
    """Two frames, two misses: routed at 1, they come at 3 and 5, and end at 4 and 6.

    So the next layer's first may come from 5 on, when the link is free, and its second from 6 on.
    """
    first = work_of(1.0, 0.5, 0.0, [[Segment(1.0, 2.0)], [Segment(1.0, 2.0)]], [])
    done = advance(Clock.start(1, 2), first, as_ready=True, frames=2, segments_per_expert=1)
    assert done.clock.link_s[0] == 5.0
    assert done.clock.asked_s[0].tolist() == [4.0, 6.0]
    second = work_of(1.5, 0.0, 0.0, [[Segment(1.0, 0.25, 1)], [Segment(1.0, 0.0)]], [0.25, 0.25])
    done = advance(done.clock, second, as_ready=True, frames=2, segments_per_expert=1)
    assert done.begun.all()
    assert done.ready.all()
    assert done.clock.link_s[0] == 6.25


def test_with_one_frame_and_one_expert_what_is_fetched_ahead_waits_for_the_frame() -> None:
    """A miss is routed at 1, comes at 3 and has been computed at 4: only then the next one may."""
    first = work_of(1.0, 0.5, 0.0, [[Segment(1.0, 2.0)]], [])
    clock = Clock.start(1, ahead_slots(1, 1, 1))
    done = advance(clock, first, as_ready=True, frames=1, segments_per_expert=1)
    assert done.clock.link_s[0] == 3.0
    assert done.clock.asked_s.tolist() == [[4.0]]
    second = work_of(1.5, 0.0, 0.0, [[Segment(1.0, 2.0, 0)]], [2.0])
    done = advance(done.clock, second, as_ready=True, frames=1, segments_per_expert=1)
    assert done.begun.all()
    assert not done.ready.any()
    assert done.clock.now_s[0] == 7.0


def test_a_wrong_guess_in_flight_delays_a_demand_and_a_queued_one_is_dropped() -> None:
    """Guesses of 4 each from 0, routing at 5: one is done, one ends at 8, the third never goes."""
    experts = [[Segment(1.0, 4.0, None)]]
    done = advance(
        Clock.start(1),
        work_of(5.0, 0.0, 0.0, experts, [4.0, 4.0, 4.0]),
        as_ready=True,
        frames=8,
        segments_per_expert=1,
    )
    assert done.begun[0].tolist() == [True, True, False]
    assert done.clock.link_s[0] == 12.0
    assert done.clock.now_s[0] == 13.0


def test_a_right_guess_hides_its_transfer() -> None:
    experts = [[Segment(1.0, 4.0, 0)]]
    done = advance(
        Clock.start(1),
        work_of(5.0, 0.0, 0.0, experts, [4.0]),
        as_ready=True,
        frames=8,
        segments_per_expert=1,
    )
    assert done.clock.now_s[0] == 6.0
    assert done.ready.all()
    assert not done.demanded.any()
    assert done.wait_s[0] == 0.0


def test_lanes_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(0)
    lanes, segments, ahead = 5, 6, 4
    work = Work(
        rng.random(lanes),
        rng.random(lanes),
        rng.random(lanes),
        rng.random((lanes, segments)),
        rng.random((lanes, segments)) * (rng.random((lanes, segments)) < 0.5),
        rng.random((lanes, ahead)),
        rng.integers(0, ahead + 1, (lanes, segments)),
    )
    for as_ready, frames, slots in ((True, 8, 1), (False, 8, 1), (False, 3, 3), (True, 3, 3)):
        clock = Clock(
            rng.random(lanes), rng.random(lanes), np.sort(rng.random((lanes, slots)), axis=1)
        )
        together = advance(clock, work, as_ready=as_ready, frames=frames, segments_per_expert=2)
        for lane in range(lanes):
            alone = advance(
                Clock(*(values[lane : lane + 1] for values in clock)),
                work.take(np.array([lane])),
                as_ready=as_ready,
                frames=frames,
                segments_per_expert=2,
            )
            assert alone.clock.now_s[0] == together.clock.now_s[lane]
            assert alone.clock.link_s[0] == together.clock.link_s[lane]
