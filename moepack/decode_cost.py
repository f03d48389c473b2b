"""What one decoded token costs in one layer, with and without fetching ahead, in closed form.

See :mod:`moepack.cost` for the terms and the shapes.
"""

from __future__ import annotations

import math

import numpy as np

from moepack.cost import Array, Held, Lacks, LayerTimes, Parts
from moepack.expert_stage import Stage
from moepack.prefetching import Ahead, Brought, brought, nothing_brought

# Stands for no width at all, so that nothing is divided by 0.
_LEAST_WIDTH_S = 1e-15


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
    in_time = ranks_in_time(*_rooms_s(stage, parts, ahead, after, gap_s))
    ended_s, going_s = _after_ranks(stage, parts, ahead, after)
    found = {}
    waiting_s: Array | float = 0.0
    for ranks, share in enumerate(in_time):
        found[ranks] = waiting_s + share * ended_s[ranks]
        if ranks < most:
            waiting_s = waiting_s + (share - in_time[ranks + 1]) * going_s[ranks]
    layer_s = np.stack([found[min(depth, most)] for depth in depths])
    return layer_s + _unhidden_s(times, top_k, parts, held, as_ready)


def ranks_in_time(rooms_s: Array, deviations_s: Array, transfers_s: Array) -> Array:
    """How likely the first m = 0, 1 ... D ranks are there in time, [D + 1, ...].

    MoEpic's m* is the largest m whose transfers, the sum of tau(r) over r <= m, end within the
    window. What a rank lacks is chance, so the sum is too: with what is left of the window as a
    uniform variable of that mean and deviation, a rank is there with the mean, over its transfer,
    of the chance that something is left. Without deviation every rank but one is there or not, and
    of that one the fraction that has been transferred.

    Parameters
    ----------
    rooms_s, deviations_s : [D + 1, ...]
        What is left of the window after m ranks, and its standard deviation.
    transfers_s : [D, ...]
        Seconds of each rank, if it lacks something.
    """
    shares = np.ones(rooms_s.shape)
    room_s = rooms_s[0]
    for rank, transfer_s in enumerate(transfers_s):
        np.minimum(room_s, rooms_s[rank], out=room_s)
        width_s = np.maximum(deviations_s[rank] * math.sqrt(12.0), _LEAST_WIDTH_S)
        share = np.clip(room_s / width_s + 0.5, 0.0, 1.0)
        left_s = _expected_left_s(room_s, width_s)
        left_s -= _expected_left_s(room_s - transfer_s, width_s)
        np.divide(left_s, transfer_s, out=share, where=transfer_s > 1e-6 * width_s)
        np.minimum(share, shares[rank], out=shares[rank + 1])
    return shares


def _expected_left_s(mean_s: Array, width_s: Array) -> Array:
    """Expectation of the positive part of a uniform variable."""
    half_s = width_s / 2.0
    inside_s = np.clip(mean_s + half_s, 0.0, width_s)
    return np.asarray(inside_s * inside_s / (2.0 * width_s) + np.maximum(mean_s - half_s, 0.0))


def _rooms_s(
    stage: Stage, parts: Parts, ahead: Ahead, brought: Brought, gap_s: float
) -> tuple[Array, Array, Array]:
    """What :func:`ranks_in_time` needs, each [D + 1, S, C] or [D, S, C].

    tau(r), the link's seconds for a rank, is what its expert lacks: for whole experts
    t_e * (1 - Q(r)).
    """
    top_s, bottom_s, _ = parts.columns()
    both_s = top_s + bottom_s
    ranks = len(brought.covered) - 1
    bottom, both = (lack[:ranks] for lack in ahead.lacks())
    needs_s = parts.link_s(Lacks(_sums(bottom), _sums(both)))
    # Of each rank the mean square less the square of the mean.
    terms = (bottom - bottom**2, both - both**2, -2.0 * bottom * both)
    squares = np.stack([bottom_s**2, both_s**2, bottom_s * both_s])
    variance = np.tensordot(np.stack([_sums(term) for term in terms]), squares, axes=(0, 0))
    rooms_s = stage.link_idle_s(brought.mean_lacks()) + gap_s - needs_s
    some = np.maximum(bottom + both, 1e-9)
    transfers_s = parts.link_s(Lacks(bottom / some, both / some))
    return rooms_s, np.sqrt(np.maximum(variance, 0.0)), transfers_s


def _sums(values: Array) -> Array:
    """Sums of the first 0, 1 ... D rows, [D + 1, ...]."""
    return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])


def _after_ranks(stage: Stage, parts: Parts, ahead: Ahead, brought: Brought) -> tuple[Array, Array]:
    """Expected stage after m = 0 ... D ranks, without and with the next in flight, [D + 1, S, C].

    One rank more never makes it longer: a rule that the estimates break a little, and one that
    keeps a faster link from being dearer.
    """
    ended_s, link_bound = stage.expected(brought)
    ranks = len(ended_s)
    half_wrong = (1.0 - ahead.accuracy[:, None]) / 2.0
    late = (np.pad(half_wrong * lack, ((0, 1), (0, 0)))[:ranks] for lack in ahead.lacks())
    going_s = link_bound * parts.link_s(Lacks(*late)) + ended_s
    for rank in range(1, ranks):
        for table in (ended_s, going_s):
            np.minimum(table[rank], table[rank - 1], out=table[rank])
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
