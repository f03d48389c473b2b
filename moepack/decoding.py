"""Decoding under a placement: every token of a part through every layer, and the sums of it.

Where nothing is fetched ahead, no pass depends on another and all are computed at once. Otherwise
the tokens are cut into lanes that run side by side, each again from where the one before it has
ended, until nothing changes: the result is that of one lane.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.activations import Activations
from moepack.fixed_times import FixedTimes
from moepack.lane_clock import (
    C,
    Clock,
    Columns,
    Costs,
    Done,
    Flags,
    Instead,
    Seconds,
    Work,
    ahead_slots,
)
from moepack.on_miss import EXACT, LEFT_OUT, LOWERED
from moepack.passes import DecodePasses
from moepack.replayed import Replayed
from moepack.segment_times import Segments
from moepack.timeline import Outcome, advance, brought

#: Lanes that run side by side, and passes that each runs beforehand to find where it begins.
LANES = 1024
WARMING = 8

_FIRST = np.zeros(1, dtype=np.intp)


def independent(fixed: FixedTimes, compute_s: Seconds, fetch_s: Seconds, costs: Costs) -> Work:
    """Passes [.., L, columns] of which none fetches ahead: each is a lane of its own.

    ``costs``: of each layer.
    """
    columns = fetch_s.shape[-1]
    lanes = fetch_s.size // columns
    turns = lanes // len(fixed.before_s)
    return Work(
        np.tile(fixed.before_s, turns),
        np.tile(fixed.guess_s, turns),
        np.tile(fixed.after_s, turns),
        compute_s.reshape(lanes, columns),
        fetch_s.reshape(lanes, columns),
        np.zeros((lanes, 0)),
        np.zeros((lanes, columns), dtype=np.intp),
        Costs(*(np.tile(np.asarray(each_s), turns) for each_s in costs)),
    )


def advance_lanes(
    clock: Clock,
    work: Work,
    as_ready: bool,
    frames: int,
    parts: int,
    instead: Instead | None = None,
) -> Outcome:
    """See :func:`moepack.timeline.advance`."""
    return advance(
        clock, work, as_ready=as_ready, frames=frames, segments_per_expert=parts, instead=instead
    )


class Seen(NamedTuple):
    """What every pass did: segments ready and demanded, and begun ahead [T, L, .].

    Waits, and what breaking off saved, [T, L].
    """

    ready: Flags
    demanded: Flags
    begun: Flags
    wait_s: Seconds
    saved_s: Seconds


def _share(fates: npt.NDArray[np.int8] | None, fate: int, activations: int) -> float:
    return 0.0 if fates is None else float(np.count_nonzero(fates == fate)) / activations


class AnyDecoding(ABC, Generic[C]):
    """The decoding of one part under one placement: totals over all its tokens."""

    def __init__(
        self,
        passes: DecodePasses,
        found: Activations,
        fixed: FixedTimes,
        segments: Segments,
        *,
        as_ready: bool,
        frames: int,
        lanes: int = LANES,
        start: C | None = None,
    ) -> None:
        self._lanes = lanes
        self._start = start
        self._passes = passes
        self._found = found
        self._fixed = fixed
        self._segments = segments
        self._as_ready = as_ready
        self._frames = frames
        self._tokens, self._layers, self._columns = passes.fetch_s.shape
        self._parts = segments.link_s.shape[1]
        self._piece_s = segments.piece_s()
        self._done: tuple[Seen, float] | None = None

    @abstractmethod
    def _idle(self, lanes: int) -> C:
        """Where lanes begin."""

    def _first(self) -> C:
        """Where the first token begins: everything idle, its first layer's experts guessed."""
        return self._idle(1)

    @abstractmethod
    def _all(self) -> Done[C]:
        """Every pass as a lane of its own: nothing is fetched ahead."""

    @abstractmethod
    def _pass(self, now: C, tokens: Columns, layers: Columns) -> Done[C]:
        """One layer over one token in every lane; each lane has its own."""

    def run(self) -> tuple[Seen, float]:
        """What every pass did, and the seconds of all tokens."""
        if self._done is None:
            self._done = self._in_lanes() if self._passes.ahead_s.any() else self._at_once()
        return self._done

    def came(self) -> Flags:
        """Activated experts of which something was begun ahead, [T, L, K] in the trace's order."""
        seen, _ = self.run()
        comes = self._brought(seen)
        found = np.empty_like(comes)
        np.put_along_axis(found, self._found.order, comes, axis=2)
        return found

    def replayed(self, ttft_s: float) -> Replayed:
        """Run all tokens and sum up."""
        tokens, layers = self._tokens, self._layers
        seen, seconds = self.run()
        fates = self.fates(seen)
        found, parts = self._found, self._parts
        ready = found.valid.copy()
        for part in range(parts):
            ready &= seen.ready[..., part::parts]
        if fates is not None:
            ready &= fates == EXACT
        needed = np.repeat(found.right[:, :, : seen.begun.shape[2] // parts], parts, axis=2)
        activations = max(1, int(found.valid.sum()))
        demanded = self._per_token(seen.demanded, found.ids)
        used, wasted = (
            self._per_token(flags, self._guessed(seen))
            for flags in (seen.begun & needed, seen.begun & ~needed)
        )
        each = self._segments.classes or self._segments
        stored_bytes = each.stored_bytes
        disk_bytes, disk_s = self._from_disk(seen)
        saved_bytes, saved_s = self._saved(seen, fates)
        broken_bytes, broken_s = self._broken_off(seen)
        return Replayed(
            ttft_s=ttft_s,
            tpot_s=seconds / tokens,
            hit_rate=float(self._passes.hits.sum()) / activations,
            ready_rate=float(ready.sum()) / activations,
            demand_bytes=float((demanded * stored_bytes).sum()) - saved_bytes,
            ahead_used_bytes=float((used * stored_bytes).sum()),
            ahead_wasted_bytes=float((wasted * stored_bytes).sum()) - broken_bytes,
            link_s=float(((demanded + used + wasted) * each.link_s).sum()) - saved_s - broken_s,
            layer_wait_s=seen.wait_s.mean(axis=0),
            events=tokens * layers,
            disk_bytes=disk_bytes,
            disk_s=disk_s,
            substituted_rate=_share(fates, LOWERED, activations),
            skipped_rate=_share(fates, LEFT_OUT, activations),
        )

    def fates(self, seen: Seen) -> npt.NDArray[np.int8] | None:
        """What became of each activated expert, int8 [T, L, K]; see :mod:`moepack.on_miss`."""
        fates = self._passes.fates
        return None if fates is None else np.where(self._brought(seen), np.int8(EXACT), fates)

    def _brought(self, seen: Seen) -> Flags:
        """Experts of which something was begun ahead, [T, L, K]."""
        if not seen.begun.size:
            return np.zeros(self._found.order.shape, dtype=np.bool_)
        comes = brought(seen.begun, self._passes.ahead_of)
        return np.asarray(comes.reshape(*self._found.order.shape, self._parts).any(axis=3))

    def _saved(self, seen: Seen, fates: npt.NDArray[np.int8] | None) -> tuple[float, float]:
        """Bytes and seconds of the link that low copies take less than their experts, a token."""
        segments = self._segments
        if fates is None or segments.low is None:
            return 0.0, 0.0
        lowered = np.repeat(fates == LOWERED, self._parts, axis=2)
        counts = self._per_token(seen.demanded & lowered, self._found.ids)
        saved_bytes = counts * (segments.stored_bytes - segments.low.stored_bytes)
        saved_s = counts * (segments.link_s - segments.low.link_s)
        return float(saved_bytes.sum()), float(saved_s.sum())

    def _broken_off(self, seen: Seen) -> tuple[float, float]:
        """Bytes and seconds of the link that breaking off saves, a token."""
        layer_s = seen.saved_s.mean(axis=0)
        sizes, link_s = (each.sum(axis=1) for each in self._segments[:2])
        rates = sizes / np.where(link_s > 0.0, link_s, 1.0)  # a link may cost nothing
        return float((layer_s * rates).sum()), float(layer_s.sum())

    def _from_disk(self, seen: Seen) -> tuple[float, float]:
        """Bytes that the disk reads for one token, and its seconds for them."""
        passes, each = self._passes, self._segments.classes or self._segments
        if passes.read_s is None or passes.ahead_read_s is None or each.read_s is None:
            return 0.0, 0.0
        reads = self._per_token(seen.demanded & (passes.read_s > 0.0), self._found.ids)
        if seen.begun.size:
            ahead = seen.begun & (passes.ahead_read_s > 0.0)
            reads = reads + self._per_token(ahead, self._guessed(seen))
        return float((reads * each.stored_bytes).sum()), float((reads * each.read_s).sum())

    def _guessed(self, seen: Seen) -> Columns:
        """The experts that were asked for ahead, [T, L, D]."""
        return self._found.predicted[:, :, : seen.begun.shape[2] // self._parts]

    def _per_token(self, flags: Flags, experts: Columns) -> Seconds:
        """Of [T, L, K * G], how many of each layer's segments, [L, G].

        Where there are mixed layers, of each of its encodings' segments: [L, C, G].
        """
        classes = self._segments.classes
        if classes is not None:
            return np.asarray(classes.tally(flags, experts) / self._tokens)
        counts = np.count_nonzero(flags, axis=0).reshape(self._layers, -1, self._parts)
        return np.asarray(counts.sum(axis=1) / self._tokens)

    def _at_once(self) -> tuple[Seen, float]:
        """Nothing is fetched ahead: the link is idle when a pass begins."""
        shape = (self._tokens, self._layers, -1)
        done = self._all()
        seen = Seen(
            done.ready.reshape(shape),
            done.demanded.reshape(shape),
            np.zeros((self._tokens, self._layers, 0), dtype=np.bool_),
            done.wait_s.reshape(shape[:2]),
            done.saved_s.reshape(shape[:2]),
        )
        return seen, float(done.clock.now_s.sum()) + self._tokens * self._fixed.tail_s

    def _in_lanes(self) -> tuple[Seen, float]:
        """Cut the passes into lanes and run them until each begins where the one before ended."""
        total = self._tokens * self._layers
        count = max(1, min(self._lanes, total // WARMING))
        bounds = np.linspace(0, total, count + 1).astype(np.intp)
        # First as some passes before leave it, if they began with everything idle: seldom wrong.
        before = np.maximum(bounds[:-1] - WARMING, 0)
        passes = self._passes
        seen = Seen(
            np.empty(passes.fetch_s.shape, dtype=np.bool_),
            np.empty(passes.fetch_s.shape, dtype=np.bool_),
            np.empty(passes.ahead_s.shape, dtype=np.bool_),
            np.empty(passes.fetch_s.shape[:2]),
            np.empty(passes.fetch_s.shape[:2]),
        )
        begins = self._run_lanes(before, bounds[:-1], self._idle(count), seen).since_now()
        first = self._first() if self._start is None else self._start
        begins.put(_FIRST, first)
        ends = self._idle(count)
        elapsed_s = np.zeros(count)
        todo = np.arange(count)
        while len(todo):
            clock = self._run_lanes(bounds[todo], bounds[todo + 1], begins.take(todo), seen)
            elapsed_s[todo] = clock.now_s
            ends.put(todo, clock.since_now())
            follows = ends.take(np.arange(count) - 1)
            follows.put(_FIRST, first)
            todo = np.flatnonzero(follows.apart(begins))
            begins = follows
        return seen, float(elapsed_s.sum())

    def _run_lanes(
        self, begins: npt.NDArray[np.intp], ends: npt.NDArray[np.intp], clock: C, seen: Seen
    ) -> C:
        """Run lanes of passes from ``begins`` to ``ends``; pass ``t L + l`` is of token t."""
        for step in range(int((ends - begins).max(initial=0))):
            alive = np.flatnonzero(begins + step < ends)
            tokens, layers = np.divmod(begins[alive] + step, self._layers)
            done = self._pass(clock.take(alive), tokens, layers)
            seen.ready[tokens, layers] = done.ready
            seen.demanded[tokens, layers] = done.demanded
            seen.begun[tokens, layers] = done.begun
            seen.wait_s[tokens, layers] = done.wait_s
            seen.saved_s[tokens, layers] = done.saved_s
            tail_s = np.where(layers == self._layers - 1, self._fixed.tail_s, 0.0)
            clock.put(alive, done.clock.later(tail_s))
        return clock


class Decoding(AnyDecoding[Clock]):
    """Over two tiers: one link."""

    def _idle(self, lanes: int) -> Clock:
        experts, ahead = self._columns // self._parts, self._passes.ahead_s.shape[2] // self._parts
        return Clock.start(lanes, ahead_slots(self._frames, experts, ahead))

    def _all(self) -> Outcome:
        passes = self._passes
        # Nothing was begun ahead, so everything that may be replaced is.
        compute_s, fetch_s = passes.instead or (passes.compute_s, passes.fetch_s)
        work = independent(self._fixed, compute_s, fetch_s, self._segments.costs)
        clock = Clock.start(self._tokens * self._layers)
        return advance_lanes(clock, work, self._as_ready, self._frames, self._parts)

    def _pass(self, now: Clock, tokens: Columns, layers: Columns) -> Outcome:
        passes, fixed = self._passes, self._fixed
        work = Work(
            fixed.before_s[layers],
            fixed.guess_s[layers],
            fixed.after_s[layers],
            passes.compute_s[tokens, layers],
            passes.fetch_s[tokens, layers],
            passes.ahead_s[tokens, layers],
            passes.ahead_of[tokens, layers],
            self._segments.costs.take(layers),
            np.tile(self._piece_s[layers], passes.ahead_s.shape[2] // self._parts),
        )
        instead = passes.instead and Instead(*(v[tokens, layers] for v in passes.instead))
        return advance_lanes(now, work, self._as_ready, self._frames, self._parts, instead)
