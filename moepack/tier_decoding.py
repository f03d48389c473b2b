"""Decoding over three tiers; see :mod:`moepack.decoding` and :mod:`moepack.tier_timeline`."""

from __future__ import annotations

import numpy as np

from moepack.decoding import AnyDecoding
from moepack.lane_clock import Columns, Costs, Seconds
from moepack.link_lanes import TierClock, TierWork
from moepack.tier_timeline import TierOutcome, advance_tiers


class TierDecoding(AnyDecoding[TierClock]):
    """Decoding where some of what is missing is read from the disk first."""

    def _idle(self, lanes: int) -> TierClock:
        return TierClock.start(lanes, self._passes.ahead_s.shape[2], self._segments.bounces)

    def _first(self) -> TierClock:
        passes = self._passes
        ahead_s, nothing = passes.ahead_s[:1, 0], np.zeros((1, self._parts))
        work = TierWork(
            before_s=0.0,
            guess_s=0.0,
            after_s=0.0,
            compute_s=nothing,
            fetch_s=nothing,
            read_s=nothing,
            ahead_s=np.zeros_like(ahead_s),
            ahead_read_s=np.zeros_like(ahead_s),
            ahead_of=np.full(nothing.shape, ahead_s.shape[1]),
            next_s=ahead_s,
            next_read_s=self._ahead_read_s[:1, 0],
        )
        return self._advance(self._idle(1), work).clock

    def _all(self) -> TierOutcome:
        passes, fixed = self._passes, self._fixed
        lanes = self._tokens * self._layers
        compute_s, fetch_s, read_s = (
            values.reshape(lanes, -1) for values in (passes.compute_s, passes.fetch_s, self._read_s)
        )
        nothing = np.zeros((lanes, 0))
        work = TierWork(
            np.tile(fixed.before_s, self._tokens),
            np.tile(fixed.guess_s, self._tokens),
            np.tile(fixed.after_s, self._tokens),
            compute_s,
            fetch_s,
            read_s,
            nothing,
            nothing,
            np.zeros(fetch_s.shape, dtype=np.intp),
            nothing,
            nothing,
            Costs(*(np.tile(np.asarray(each_s), self._tokens) for each_s in self._segments.costs)),
        )
        return self._advance(TierClock.start(lanes, 0, self._segments.bounces), work)

    def _pass(self, now: TierClock, tokens: Columns, layers: Columns) -> TierOutcome:
        passes, fixed = self._passes, self._fixed
        following = (layers + 1) % self._layers
        # Behind the last layer the first one is guessed, for the next token.
        after = np.where(following > 0, tokens, np.minimum(tokens + 1, self._tokens - 1))
        goes_on = (tokens + 1 < self._tokens) | (following > 0)
        work = TierWork(
            fixed.before_s[layers],
            fixed.guess_s[layers],
            fixed.after_s[layers],
            passes.compute_s[tokens, layers],
            passes.fetch_s[tokens, layers],
            self._read_s[tokens, layers],
            passes.ahead_s[tokens, layers],
            self._ahead_read_s[tokens, layers],
            passes.ahead_of[tokens, layers],
            passes.ahead_s[after, following] * goes_on[:, None],
            self._ahead_read_s[after, following] * goes_on[:, None],
            self._segments.costs.take(layers),
        )
        return self._advance(now, work)

    def _advance(self, now: TierClock, work: TierWork) -> TierOutcome:
        return advance_tiers(
            now,
            work,
            as_ready=self._as_ready,
            frames=self._frames,
            segments_per_expert=self._parts,
        )

    @property
    def _read_s(self) -> Seconds:
        assert self._passes.read_s is not None, "RAM holds everything"
        return self._passes.read_s

    @property
    def _ahead_read_s(self) -> Seconds:
        assert self._passes.ahead_read_s is not None, "RAM holds everything"
        return self._passes.ahead_read_s
