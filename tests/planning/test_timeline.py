"""The timeline against a plain simulation of one link and one processor, expert by expert."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.timeline import Clock, Work, advance
from tests.support.simulation import Segment, Simulation


def work_of(before: float, after: float, experts: list[list[Segment]], ahead: list[float]) -> Work:
    """One lane."""
    parts = [part for expert in experts for part in expert]
    return Work(
        before_s=before,
        after_s=after,
        compute_s=np.array([[part.compute for part in parts]]),
        fetch_s=np.array([[part.fetch for part in parts]]),
        ahead_s=np.array([ahead]).reshape(1, -1),
        ahead_of=np.array([[len(ahead) if p.ahead is None else p.ahead for p in parts]]),
    )


# Multiples of a quarter: sums are exact, so nothing hangs on rounding.
quarters = st.integers(0, 12).map(lambda n: n / 4)


@st.composite
def layers(draw: st.DrawFn, parts: int) -> tuple[float, float, list[list[Segment]], list[float]]:
    """A pass of three experts, some predicted rightly, with wrong guesses between."""
    experts = [
        [Segment(draw(quarters) + 0.25, draw(quarters), None) for _ in range(parts)]
        for _ in range(3)
    ]
    ahead: list[float] = []
    for guess in draw(st.lists(st.integers(0, 5), max_size=4, unique=True)):
        for part in range(parts):
            if guess < 3:  # a right one: it brings the segment if that is missing
                segment = experts[guess][part]
                if segment.fetch:
                    segment.ahead = len(ahead)
                ahead.append(segment.fetch)
            else:
                ahead.append(draw(quarters))
    return draw(quarters), draw(quarters), experts, ahead


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("as_ready", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 8])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_passes_end_when_a_plain_simulation_says(
    parts: int, as_ready: bool, frames: int, data: st.DataObject
) -> None:
    passes = data.draw(st.lists(layers(parts), min_size=1, max_size=4))
    plain = Simulation(as_ready=as_ready, frames=frames)
    clock = Clock.start(1)
    for one in passes:
        seen = plain.run(*one)
        done = advance(
            clock, work_of(*one), as_ready=as_ready, frames=frames, segments_per_expert=parts
        )
        clock = done.clock
        assert clock.now_s[0] == seen.end
        assert set(np.flatnonzero(done.ready[0])) == seen.ready
        assert set(np.flatnonzero(done.demanded[0])) == seen.demanded
        assert set(np.flatnonzero(done.begun[0])) == seen.begun


def test_two_misses_by_hand() -> None:
    """Routed at 2; transfers end at 5 and 8; 1 of compute each: 9 in order, resident or not."""
    experts = [[Segment(1.0, 0.0, None)], [Segment(1.0, 3.0, None)], [Segment(1.0, 3.0, None)]]
    done = advance(
        Clock.start(1),
        work_of(2.0, 0.5, experts, []),
        as_ready=False,
        frames=3,
        segments_per_expert=1,
    )
    assert done.clock.now_s[0] == 9.5
    assert done.clock.link_s[0] == 8.0
    assert done.wait_s[0] == 9.0 - 2.0 - 3.0


def test_a_wrong_guess_in_flight_delays_a_demand_and_a_queued_one_is_dropped() -> None:
    """Guesses of 4 each from 0, routing at 5: one is done, one ends at 8, the third never goes."""
    experts = [[Segment(1.0, 4.0, None)]]
    done = advance(
        Clock.start(1),
        work_of(5.0, 0.0, experts, [4.0, 4.0, 4.0]),
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
        work_of(5.0, 0.0, experts, [4.0]),
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
        rng.random((lanes, segments)),
        rng.random((lanes, segments)) * (rng.random((lanes, segments)) < 0.5),
        rng.random((lanes, ahead)),
        rng.integers(0, ahead + 1, (lanes, segments)),
    )
    clock = Clock(rng.random(lanes), rng.random(lanes), rng.random(lanes))
    for as_ready, frames in ((True, 8), (False, 8), (False, 2)):
        together = advance(clock, work, as_ready=as_ready, frames=frames, segments_per_expert=2)
        for lane in range(lanes):
            alone = advance(
                Clock(*(values[lane : lane + 1] for values in clock)),
                Work(*(np.asarray(values)[lane : lane + 1] for values in work)),
                as_ready=as_ready,
                frames=frames,
                segments_per_expert=2,
            )
            assert alone.clock.now_s[0] == together.clock.now_s[lane]
            assert alone.clock.link_s[0] == together.clock.link_s[lane]
