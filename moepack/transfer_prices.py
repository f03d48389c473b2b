"""What the forecasts say of the walks that a profile measures, if transfers cost nothing but time.

What such a walk took beyond that is what its transfers cost the computing thread.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moepack.budget import stored_bytes
from moepack.cost import Held, LayerTimes, Parts
from moepack.decode_cost import decode_layer_s
from moepack.expert_probe import LEAD_IN, Probe
from moepack.lane_clock import Clock, Work
from moepack.layouts import layer_layout
from moepack.timeline import advance


class Around(NamedTuple):
    """Beside the routed experts: until the routing is known, the shared expert; and the head."""

    before_s: float
    after_s: float
    head_s: float


def priced_in_order_s(link_s: float, expert_s: float, *, there: int, missing: int) -> float:
    """What the replay says of a prompt's experts: first those that are there, then the others."""
    now_s = there * expert_s
    for number in range(1, missing + 1):
        now_s = max(now_s, number * link_s) + expert_s
    return now_s


def expert_link_s(probe: Probe, number: int, read_s: float | None = None) -> float:
    """Seconds of the link for a whole expert of a layer.

    Parameters
    ----------
    read_s
        What reading one took meanwhile; None: as in the hardware profile. Disks that are shared
        change from minute to minute, and that is not the computing thread's time.
    """
    spec = probe.engine.spec
    size_bytes = stored_bytes(spec, layer_layout(spec, number, 1.0), "top")
    return read_s or probe.hardware.link_seconds(size_bytes)


def priced_missing_s(
    probe: Probe,
    number: int,
    fixed_s: float,
    expert_s: float,
    *,
    missing: int,
    read_s: float | None = None,
) -> float:
    """What the cost model says of one token's pass of which so many experts are missing.

    ``read_s``: as in :func:`expert_link_s`.
    """
    top_k = probe.engine.spec.moe(number).top_k
    there = top_k - missing
    priced_s = decode_layer_s(
        # What is there is computed while the first of the others comes, as a shared expert is.
        LayerTimes(fixed_s, expert_s, shared_s=there * expert_s),
        missing,
        Parts(expert_link_s(probe, number, read_s), 0.0, 1.0),
        Held(top=0.0, bottom=1.0),
        staging_experts=top_k,
        as_ready=True,
    )
    return float(priced_s.item())


def priced_ahead_s(
    probe: Probe,
    number: int,
    around: Around,
    expert_s: float,
    *,
    layers: int,
    missing: int,
    read_s: float | None = None,
) -> float:
    """What the replay says of one layer, in a walk whose experts are asked for ahead.

    Parameters
    ----------
    layers
        That are walked over.
    missing
        So many of one token's experts are asked for while the layer before computes; the others
        are there.
    read_s
        See :func:`expert_link_s`.
    """
    top_k = probe.engine.spec.moe(number).top_k
    fetch_s = expert_link_s(probe, number, read_s)
    experts = np.arange(top_k)[None]
    work = Work(
        before_s=around.before_s,
        guess_s=0.0,
        after_s=around.after_s,
        compute_s=np.full(experts.shape, expert_s),
        fetch_s=np.where(experts < missing, fetch_s, 0.0),
        ahead_s=np.full((1, missing), fetch_s),
        ahead_of=np.minimum(experts, missing),
    )
    clock = Clock.start(1)
    for _ in range(1 + LEAD_IN):
        clock = clock.since_now()
        for _ in range(layers):
            done = advance(clock, work, as_ready=True, frames=2 * top_k, segments_per_expert=1)
            clock = done.clock
        walk_s = float(clock.now_s.item())
        clock = clock.later(np.full(1, around.head_s))
    return walk_s / layers
