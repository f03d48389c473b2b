"""The clock over some prompts: every layer of each, one behind the other.

An engine computes the experts of a prompt in the order of summation, whatever has come, and the
link works ahead as far as there are frames. A layer depends on the one before it only by what that
has left of the link and of the frames; so all layers of all prompts run side by side, each again
from where the one before it has ended, until nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moepack.fixed_times import FixedTimes
from moepack.lane_clock import C, Clock, Columns, Costs, Done, Seconds, Work, ahead_slots
from moepack.link_lanes import TierClock, TierWork
from moepack.prompts import PromptPasses
from moepack.segment_times import Segments
from moepack.tier_timeline import advance_tiers
from moepack.timeline import advance

#: Runs some lanes (of all) one pass on.
_Advance = Callable[[C, Columns], Done[C]]


def prefill(passes: PromptPasses, fixed: FixedTimes, segments: Segments, *, frames: int) -> Seconds:
    """Run some prompts of one length, which begin with everything idle at 0.

    Parameters
    ----------
    fixed
        Of the prompt's blocks.
    frames
        Experts in flight at once.

    Returns
    -------
    [prompts]
        When the first token of each is drawn.
    """
    prompts, layers, columns = passes.fetch_s.shape
    parts = segments.link_s.shape[1]
    asks = bool(passes.ahead_s[:, 1:].any())
    if passes.read_s is not None:
        tiers = _tier_work(passes, fixed, segments)
        ahead = tiers.ahead_s.shape[1]

        def run_tiers(clock: TierClock, lanes: Columns) -> Done[TierClock]:
            work = tiers.take(lanes)
            return advance_tiers(
                clock, work, as_ready=False, frames=frames, segments_per_expert=parts
            )

        idle = TierClock.start(prompts * layers, ahead, segments.bounces)
        now_s = _elapsed(idle, run_tiers, layers, asks)
    else:
        link = _work(passes, fixed, segments)
        slots = ahead_slots(frames, columns // parts, columns // parts if asks else 0)

        def run(clock: Clock, lanes: Columns) -> Done[Clock]:
            work = link.take(lanes)
            return advance(clock, work, as_ready=False, frames=frames, segments_per_expert=parts)

        now_s = _elapsed(Clock.start(prompts * layers, slots), run, layers, asks)
    return np.asarray(now_s + fixed.tail_s)


def computing_s(passes: PromptPasses, fixed: FixedTimes, segments: Segments) -> Seconds:
    """What of that the compute needs, [prompts]; the rest it waits for the link."""
    each_s = fixed.before_s.sum() + fixed.guess_s.sum() + fixed.after_s.sum() + fixed.tail_s
    costs_s = segments.prompt_costs.of_demands(passes.fetch_s > 0)
    return np.asarray((passes.compute_s + costs_s).sum(axis=(1, 2)) + each_s)


def _elapsed(idle: C, run: _Advance[C], layers: int, asks: bool) -> Seconds:
    """Seconds of each prompt through all its layers, each of which is a lane of ``idle``."""
    lanes = len(idle.now_s)
    everyone = np.arange(lanes)
    begins, ends = idle.take(everyone), idle.take(everyone)
    elapsed_s = np.zeros(lanes)
    first = np.arange(0, lanes, layers)
    todo = everyone
    while len(todo):
        clock = run(begins.take(todo), todo).clock
        elapsed_s[todo] = clock.now_s
        ends.put(todo, clock.since_now())
        follows = ends.take(everyone - 1)
        follows.put(first, idle.take(first))
        todo = np.flatnonzero(follows.apart(begins)) if asks else todo[:0]
        begins = follows
    return np.asarray(elapsed_s.reshape(-1, layers).sum(axis=1))


def _ahead(passes: PromptPasses, ahead_s: Seconds) -> Seconds:
    """[lanes, columns]; the first layer's experts are not known before its own routing."""
    found = ahead_s.copy()
    found[:, 0] = 0.0
    found = found.reshape(-1, passes.fetch_s.shape[2])
    return found if passes.ahead_s[:, 1:].any() else found[:, :0]


def _work(passes: PromptPasses, fixed: FixedTimes, segments: Segments) -> Work:
    """Every layer of every prompt as a lane."""
    prompts, _, columns = passes.fetch_s.shape
    ahead_s = _ahead(passes, passes.ahead_s)
    fetch_s = passes.fetch_s.reshape(-1, columns)
    return Work(
        np.tile(fixed.before_s, prompts),
        np.tile(fixed.guess_s, prompts),
        np.tile(fixed.after_s, prompts),
        passes.compute_s.reshape(-1, columns),
        fetch_s,
        ahead_s,
        _brought_by(fetch_s, ahead_s),
        Costs(*(np.tile(np.asarray(each_s), prompts) for each_s in segments.prompt_costs)),
        np.tile(segments.piece_s(), (prompts, ahead_s.shape[1] // segments.link_s.shape[1])),
    )


def _tier_work(passes: PromptPasses, fixed: FixedTimes, segments: Segments) -> TierWork:
    """The same over three tiers."""
    assert passes.read_s is not None, "RAM holds everything"
    assert passes.ahead_read_s is not None, "RAM holds everything"
    work = _work(passes, fixed, segments)
    ahead_read_s = _ahead(passes, passes.ahead_read_s)
    # Behind the last layer nothing follows: the first one's are nothing anyway.
    nexts = np.arange(1, len(ahead_read_s) + 1) % len(ahead_read_s)
    return TierWork(
        work.before_s,
        work.guess_s,
        work.after_s,
        work.compute_s,
        work.fetch_s,
        passes.read_s.reshape(work.fetch_s.shape),
        work.ahead_s,
        ahead_read_s,
        work.ahead_of,
        work.ahead_s[nexts],
        ahead_read_s[nexts],
        work.costs,
    )


def _brought_by(fetch_s: Seconds, ahead_s: Seconds) -> Columns:
    """Which of what is asked for ahead brings each segment: experts stand in one order in both."""
    columns = ahead_s.shape[1]
    if not columns:
        return np.zeros(fetch_s.shape, dtype=np.intp)
    return np.where((fetch_s > 0) & (ahead_s > 0), np.arange(columns), columns)
