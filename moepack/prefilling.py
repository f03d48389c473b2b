"""The clock over some prompts: every layer of each, one behind the other.

An engine computes the experts of a prompt in the order of summation, whatever has come, and the
link works ahead as far as there are frames. A layer depends on the one before it only by what that
has left of the link and of the frames; so all layers of all prompts run side by side, each again
from where the one before it has ended, until nothing changes.
"""

from __future__ import annotations

import numpy as np

from moepack.fixed_times import FixedTimes
from moepack.passes import Segments
from moepack.prompts import PromptPasses
from moepack.timeline import Clock, Columns, Work, advance, ahead_slots


def prefill(passes: PromptPasses, fixed: FixedTimes, segments: Segments, *, frames: int) -> Clock:
    """Run some prompts of one length, which begin with everything idle at 0.

    Parameters
    ----------
    fixed
        Of the prompt's blocks.
    frames
        Experts in flight at once.

    Returns
    -------
    Clock
        Of every prompt when its first token is drawn.
    """
    prompts, layers, columns = passes.fetch_s.shape
    parts = segments.link_s.shape[1]
    lanes = prompts * layers
    work = _work(passes, fixed, segments)
    asks = bool(work.ahead_s.any())
    slots = ahead_slots(frames, columns // parts, columns // parts if asks else 0)
    begins, ends = Clock.start(lanes, slots), Clock.start(lanes, slots)
    elapsed_s = np.zeros(lanes)
    first = np.arange(0, lanes, layers)
    todo = np.arange(lanes)
    while len(todo):
        some = begins.take(todo)
        clock = advance(
            some, _take(work, todo), as_ready=False, frames=frames, segments_per_expert=parts
        ).clock
        elapsed_s[todo] = clock.now_s
        ends.put(todo, clock.since_now())
        follows = ends.take(np.arange(lanes) - 1)
        follows.put(first, Clock.start(prompts, slots))
        todo = np.flatnonzero(follows.apart(begins)) if asks else todo[:0]
        begins = follows
    now_s = elapsed_s.reshape(prompts, layers).sum(axis=1)
    last = ends.take(first + layers - 1)
    return Clock(now_s + fixed.tail_s, last.link_s + now_s, last.asked_s + now_s[:, None])


def _work(passes: PromptPasses, fixed: FixedTimes, segments: Segments) -> Work:
    """Every layer of every prompt as a lane."""
    prompts, _, columns = passes.fetch_s.shape
    ahead_s = passes.ahead_s.copy()
    ahead_s[:, 0] = 0.0  # the first layer's experts are not known before its own routing
    fetch_s, ahead_s = (each.reshape(-1, columns) for each in (passes.fetch_s, ahead_s))
    return Work(
        np.tile(fixed.before_s, prompts),
        np.tile(fixed.guess_s, prompts),
        np.tile(fixed.after_s, prompts),
        passes.compute_s.reshape(-1, columns),
        fetch_s,
        ahead_s if ahead_s.any() else ahead_s[:, :0],
        np.where((fetch_s > 0) & (ahead_s > 0), np.arange(columns), columns),
        np.tile(segments.transfer_s, prompts),
    )


def _take(work: Work, lanes: Columns) -> Work:
    return Work(*(np.asarray(values)[lanes] for values in work))
