"""The clock over some prompts: every layer of each, one behind the other."""

from __future__ import annotations

import numpy as np

from moepack.decoding import advance_lanes, independent
from moepack.fixed_times import FixedTimes
from moepack.prompts import PromptPasses
from moepack.timeline import Clock, Work


def prefill(
    passes: PromptPasses, fixed: FixedTimes, *, as_ready: bool, frames: int, parts: int
) -> Clock:
    """Run some prompts of one length, which begin with everything idle at 0.

    Parameters
    ----------
    fixed
        Of the prompt's blocks.
    frames, parts
        See :func:`moepack.timeline.advance`.

    Returns
    -------
    Clock
        Of every prompt when its first token is drawn.
    """
    lanes, layers, columns = passes.fetch_s.shape
    if not passes.ahead_s.any():
        work = independent(fixed, passes.compute_s, passes.fetch_s)
        done = advance_lanes(Clock.start(lanes * layers), work, as_ready, frames, parts)
        ends_s = done.clock.now_s.reshape(lanes, layers).sum(axis=1)
        return Clock(ends_s + fixed.tail_s, ends_s, ends_s)
    clock = Clock.start(lanes)
    for index in range(layers):
        # The first layer's experts are not known before its own routing.
        ahead_s = passes.ahead_s[:, index] * (index > 0)
        asked = (passes.fetch_s[:, index] > 0) & (ahead_s > 0)
        work = Work(
            fixed.before_s[index],
            fixed.after_s[index],
            passes.compute_s[:, index],
            passes.fetch_s[:, index],
            ahead_s,
            np.where(asked, np.arange(columns), columns),
        )
        clock = advance_lanes(clock, work, as_ready, frames, parts).clock
    return clock._replace(now_s=clock.now_s + fixed.tail_s)
