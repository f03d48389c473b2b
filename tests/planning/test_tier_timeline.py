"""The timeline of three tiers against a plain simulation of a disk, a bus and one processor."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.lane_clock import Clock, Costs, Work, ahead_slots
from moepack.link_lanes import TierClock, TierWork
from moepack.tier_timeline import advance_tiers
from moepack.timeline import advance
from tests.support import simulation
from tests.support.two_stage import Segment, TwoStage

COSTS = simulation.Costs(demand=0.5, burst=1.25, ahead=0.25, ahead_burst=0.75)

#: Before, guess, after, experts, what was asked for ahead (copy and read).
Pass = tuple[float, float, float, list[list[Segment]], list[tuple[float, float]]]

# Multiples of a quarter: sums are exact, so nothing hangs on rounding.
quarters = st.integers(0, 12).map(lambda n: n / 4)
reads = st.sampled_from([0.0, 0.0, 0.25, 0.75, 2.0, 5.0])


@st.composite
def layers(draw: st.DrawFn, parts: int, most: int, count: int, disk: bool, first: bool) -> Pass:
    """A pass of so many experts, some predicted rightly, with wrong guesses between."""

    def read() -> float:
        return draw(reads) if disk else 0.0

    experts = [
        [Segment(draw(quarters) + 0.25, draw(quarters), read()) for _ in range(parts)]
        for _ in range(count)
    ]
    for segment in itertools.chain(*experts):
        segment.read *= segment.fetch > 0
    ahead: list[tuple[float, float]] = []
    guesses = st.lists(st.integers(0, 5), max_size=0 if first else min(4, most), unique=True)
    for guess in draw(guesses):
        for part in range(parts):
            if guess < count:  # a right one: it brings the segment if that is missing
                segment = experts[guess][part]
                if segment.fetch:
                    segment.ahead = len(ahead)
                ahead.append((segment.fetch, segment.read))
            else:
                copy = draw(quarters)
                ahead.append((copy, read() * (copy > 0)))
    return draw(quarters), draw(quarters), draw(quarters), experts, ahead


@st.composite
def several(draw: st.DrawFn, parts: int, most: int, count: int, *, disk: bool) -> list[Pass]:
    passes = range(draw(st.integers(1, 4)))
    return [draw(layers(parts, most, count, disk, first=number == 0)) for number in passes]


def padded(ahead: list[tuple[float, float]], columns: int) -> npt.NDArray[np.float64]:
    """[2, 1, columns]: seconds of the bus and of the disk."""
    found = np.zeros((2, 1, columns))
    for place, pair in enumerate(ahead):
        found[:, 0, place] = pair
    return found


def work_of(one: Pass, nexts: list[tuple[float, float]], columns: int) -> TierWork:
    """One lane."""
    before, guess, after, experts, ahead = one
    flat = [part for expert in experts for part in expert]
    copy, read = padded(ahead, columns)
    next_copy, next_read = padded(nexts, columns)
    return TierWork(
        before_s=before,
        guess_s=guess,
        after_s=after,
        compute_s=np.array([[part.compute for part in flat]]),
        fetch_s=np.array([[part.fetch for part in flat]]),
        read_s=np.array([[part.read for part in flat]]),
        ahead_s=copy,
        ahead_read_s=read,
        ahead_of=np.array([[columns if p.ahead is None else p.ahead for p in flat]]),
        next_s=next_copy,
        next_read_s=next_read,
        costs=Costs(*COSTS),
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("as_ready", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_passes_end_when_a_plain_simulation_says(
    parts: int, as_ready: bool, frames: int, data: st.DataObject
) -> None:
    most = frames if as_ready else frames - 1
    passes = data.draw(several(parts, most, data.draw(st.integers(1, 3)), disk=True))
    bounces = data.draw(st.integers(2, 4))
    plain = TwoStage(as_ready=as_ready, frames=frames, costs=COSTS, bounces=bounces)
    columns = 4 * parts
    clock = TierClock.start(1, columns, bounces)
    for one, following in zip(passes, [*passes[1:], None], strict=True):
        nexts = following[4] if following else []
        groups = [nexts[place : place + parts] for place in range(0, len(nexts), parts)]
        seen = plain.run(*one[:4], groups)
        done = advance_tiers(
            clock.since_now(),
            work_of(one, nexts, columns),
            as_ready=as_ready,
            frames=frames,
            segments_per_expert=parts,
        )
        began_s = plain.now - seen.end + seen.routed - one[0]
        clock = done.clock
        assert began_s + clock.now_s[0] == seen.end
        assert set(np.flatnonzero(done.ready[0])) == seen.ready
        assert set(np.flatnonzero(done.demanded[0])) == seen.demanded
        assert set(np.flatnonzero(done.begun[0])) == seen.begun


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("as_ready", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 8])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_with_everything_in_ram_it_is_the_timeline_of_two_tiers(
    parts: int, as_ready: bool, frames: int, data: st.DataObject
) -> None:
    most = frames if as_ready else frames - 1
    count = data.draw(st.integers(1, 3))
    passes = data.draw(several(parts, most, count, disk=False))
    columns = 4 * parts
    tiers, clock = TierClock.start(1, columns), Clock.start(1, ahead_slots(frames, count, 4))
    for one, following in zip(passes, [*passes[1:], None], strict=True):
        work = work_of(one, following[4] if following else [], columns)
        three = advance_tiers(
            tiers, work, as_ready=as_ready, frames=frames, segments_per_expert=parts
        )
        same = Work(*(getattr(work, name) for name in Work._fields[:-1]))
        two = advance(clock, same, as_ready=as_ready, frames=frames, segments_per_expert=parts)
        tiers, clock = three.clock, two.clock
        assert tiers.now_s == clock.now_s
        assert three.wait_s == two.wait_s
        for name in ("ready", "demanded", "begun"):
            assert np.array_equal(getattr(three, name), getattr(two, name))
