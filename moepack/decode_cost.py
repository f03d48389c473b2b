"""What one decoded token costs in one layer, with and without fetching ahead, in closed form.

See :mod:`moepack.cost` for the terms and the shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from moepack.cost import Array, Held, Lacks, LayerTimes, Parts
from moepack.expert_stage import Stage
from moepack.prefetching import Ahead, Brought, brought, nothing_brought


def decode_layer_s(
    times: LayerTimes,
    top_k: int,
    parts: Parts,
    held: Held,
    *,
    staging_experts: int,
    as_ready: bool = False,
) -> Array:
    """Expected seconds of one token through one layer that fetches on demand.

    ``other + E[stage] + K * transfers * transfer_s``: the expectation is over how many of the K
    experts lack what (multinomial), since that of a maximum is not the maximum of expectations.

    ``staging_experts`` and ``as_ready`` are those of :class:`~moepack.expert_stage.Stage`.

    Returns
    -------
    [S, C]
    """
    lacks = held.lacking()
    stage = Stage(times, top_k, parts, lacks, staging_experts=staging_experts, as_ready=as_ready)
    seconds, _ = stage.expected(nothing_brought(lacks, top_k))
    return np.asarray(seconds[0] + _unhidden_s(times, top_k, parts, held, as_ready))


def decode_ahead_s(
    times: LayerTimes,
    top_k: int,
    parts: Parts,
    held: Held,
    ahead: Ahead,
    depths: tuple[int, ...],
    *,
    staging_experts: int,
    as_ready: bool = False,
) -> Array:
    """Expected seconds of one token through one layer whose experts are also fetched ahead.

    The first m* ranks of the prediction are there in time (:func:`ranks_in_time`; fewer where the
    depth or the staging ends before), the rest is fetched on demand. A fraction of a rank is a
    share of the two neighbouring expectations: its transfer has begun, or the window varies (whole
    ranks alone miss the simulation by twice as much). Where the window ends first, the next rank is
    in flight and, if wrong, delays the demands by half of itself, ``(1 - A) tau / 2``, weighted by
    how likely the layer waits for the link at all.

    Parameters
    ----------
    depths
        How many ranks are asked for, 1 to D.

    Returns
    -------
    [depths, S, C]
    """
    lacks = held.lacking()
    most = min(max(depths), staging_experts)
    after = brought(lacks, ahead, top_k).first(most)
    stage = Stage(times, top_k, parts, lacks, staging_experts=staging_experts, as_ready=as_ready)
    gap_s = ahead.gap_s + (0.0 if as_ready else times.shared_s)
    in_time = ranks_in_time(_room_s(stage, parts, ahead, after, gap_s))
    ended_s, going_s = _after_ranks(stage, parts, ahead, after)
    found = []
    for depth in depths:
        cap = min(depth, most)
        ranks = np.minimum(in_time, cap)
        found.append(np.where(in_time < cap, _at(going_s, ranks), _at(ended_s, ranks)))
    return np.stack(found) + _unhidden_s(times, top_k, parts, held, as_ready)


def ranks_in_time(rooms_s: Iterable[Array]) -> Array:
    """The largest m whose transfers end within the window, fractional: m*.

    ``max {m : sum of tau(r) over r <= m is <= W(m)}``, up to the first m that fails: the more is
    ready, the less of the link do demands take before, so the window depends on m too.

    Parameters
    ----------
    rooms_s : iterable of [...]
        What is left of the window after m = 0, 1 ... D ranks.
    """
    rooms = iter(rooms_s)
    before_s = next(rooms)
    going = before_s >= 0.0
    ranks = np.zeros(before_s.shape)
    for room_s in rooms:
        fails = room_s < 0.0
        share = np.divide(
            before_s, before_s - room_s, out=np.ones(ranks.shape), where=fails & going
        )
        ranks += going * share
        going = going & ~fails
        before_s = room_s
    return ranks


def _room_s(
    stage: Stage, parts: Parts, ahead: Ahead, brought: Brought, gap_s: float
) -> Iterator[Array]:
    """What is left of the window after m = 0, 1 ... D ranks, each [S, C].

    tau(r), the link's seconds for a rank, is what its expert lacks: for whole experts
    t_e * (1 - Q(r)).
    """
    top_s, bottom_s, _ = parts.columns()
    only_bottom, both = ahead.lacks()
    needs_s: Array | float = 0.0
    for ranks, (bottom_lack, both_lack) in enumerate(zip(*brought.mean_lacks(), strict=True)):
        if ranks:
            needs_s = needs_s + only_bottom[ranks - 1, :, None] * bottom_s
            needs_s = needs_s + both[ranks - 1, :, None] * (top_s + bottom_s)
        yield stage.link_idle_s(Lacks(bottom_lack, both_lack)) + gap_s - needs_s


def _after_ranks(stage: Stage, parts: Parts, ahead: Ahead, brought: Brought) -> tuple[Array, Array]:
    """Expected stage after m = 0 ... D ranks, without and with the next in flight, [D + 1, S, C].

    One rank more never makes it longer: a rule that the estimates break a little, and one that
    keeps a faster link from being dearer.
    """
    top_s, bottom_s, _ = parts.columns()
    ended_s, going_s = stage.expected(brought)  # the latter not seconds yet: how likely they count
    late_bottom, late_both = (
        np.pad((1.0 - ahead.accuracy[:, None]) * lack / 2.0, ((0, 1), (0, 0)))
        for lack in ahead.lacks()
    )
    for ranks in range(len(ended_s)):
        late_s = late_bottom[ranks, :, None] * bottom_s
        late_s += late_both[ranks, :, None] * (top_s + bottom_s)
        going_s[ranks] *= late_s
        going_s[ranks] += ended_s[ranks]
        if ranks:
            np.minimum(ended_s[ranks], ended_s[ranks - 1], out=ended_s[ranks])
            np.minimum(going_s[ranks], going_s[ranks - 1], out=going_s[ranks])
    return ended_s, going_s


def _unhidden_s(times: LayerTimes, top_k: int, parts: Parts, held: Held, as_ready: bool) -> Array:
    """What a token takes beside the stage of its experts, [S, C].

    Every transfer of something needed costs the computing thread its share, whenever it was asked
    for.
    """
    lacks = held.lacking()
    top_s, bottom_s, _ = parts.columns()
    has_top, has_bottom = (np.asarray(part_s > 0.0, np.float64) for part_s in (top_s, bottom_s))
    transfers = lacks.bottom[:, None] * has_bottom + lacks.both[:, None] * (has_top + has_bottom)
    other_s = times.other_s + (0.0 if as_ready else times.shared_s)
    return other_s + top_k * transfers * times.transfer_s


def _at(table: Array, ranks: Array) -> Array:
    """A table over m = 0 ... D, [D + 1, S, C], at fractional ranks [S, C]."""
    low = np.minimum(ranks.astype(np.intp), len(table) - 2)
    share = ranks - low
    place = low * ranks.size + np.arange(ranks.size).reshape(ranks.shape)
    flat = table.reshape(-1)
    return np.asarray((1.0 - share) * flat[place] + share * flat[place + ranks.size])
