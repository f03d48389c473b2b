"""Decoding over caches that are stepped token by token, where times decide what they hold.

Where missing experts may be replaced or left out (:mod:`moepack.on_miss`), one that is fetched
ahead escapes that if its transfer has begun when its layer comes, and a cache takes only what is
exact. So contents depend on times, and times on contents. At first whatever is asked for ahead is
taken to come; what came by the clock then decides the next round, until both agree or
:data:`ROUNDS` are over: what differs then are single experts, in a cache for a while or not.
"""

from __future__ import annotations

import numpy as np

from moepack.activations import Activations
from moepack.decoding import Decoding
from moepack.fixed_times import FixedTimes
from moepack.lane_clock import Flags
from moepack.passes import passes_with
from moepack.plan import Placement
from moepack.routing_tables import RoutingTables
from moepack.segment_times import Segments
from moepack.stepped_caches import SteppedCaches
from moepack.tier_decoding import TierDecoding
from moepack.trace import NO_PREDICTION

#: Every one costs as much as the replay itself.
ROUNDS = 4


def stepped_decoding(
    tables: RoutingTables,
    caches: SteppedCaches,
    found: Activations,
    placement: Placement,
    segments: Segments,
    fixed: FixedTimes,
    *,
    as_ready: bool,
) -> Decoding | TierDecoding:
    """Decode tokens one after the other, with the link idle before the first.

    Parameters
    ----------
    caches
        As they are before the first token; they are left as they are behind the last.
    found
        From :func:`moepack.activations.activations`.
    as_ready
        Whether what is resident is computed while the rest arrives.
    """
    came: Flags | None = None
    named = tables.trace.predicted[found.tokens] != NO_PREDICTION
    lost = caches.fates(found.tokens)
    if lost is not None:
        lost = np.take_along_axis(lost, found.order, axis=2)
    for _ in range(ROUNDS):
        stepped = caches.copy()
        held, held_ahead = stepped.decode(found.tokens, came)
        held = np.take_along_axis(held, found.order[..., None], axis=2)
        passes = passes_with(found, named, placement, segments, held, held_ahead, lost)
        decoding = Decoding if passes.read_s is None else TierDecoding
        run = decoding(
            passes,
            found,
            fixed,
            segments,
            as_ready=as_ready,
            frames=placement.staging_experts,
        )
        if lost is None or not passes.ahead_s.any():
            break
        before, came = came, run.came()
        if before is not None and np.array_equal(before, came):
            break
    caches.become(stepped)
    return run
