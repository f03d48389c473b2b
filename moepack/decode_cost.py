"""What one decoded token costs in one layer, with and without fetching ahead, in closed form.

See :mod:`moepack.cost` for the terms and the shapes.
"""

from __future__ import annotations

import math

import numpy as np

from moepack.cost import Array, Held, Lacks, LayerTimes, Parts
from moepack.expert_stage import Stage
from moepack.prefetching import Ahead, Brought, brought, nothing_brought
from moepack.tier_stage import TierStage

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

    ``other + E[stage] + K * transfers * transfer_s + P(any) * burst_s``: the expectation is over
    how many of the K experts lack what (multinomial), since that of a maximum is not the maximum of
    expectations.

    ``staging_experts`` and ``as_ready`` are those of :class:`~moepack.expert_stage.Stage`.

    Returns
    -------
    [S, C]
    """
    lacks = held.lacking()
    stage = _stage(times, top_k, parts, lacks, staging_experts=staging_experts, as_ready=as_ready)
    seconds, _ = stage.expected(nothing_brought(lacks, top_k))
    return np.asarray(seconds[0] + _unhidden_s(times, top_k, parts, held))


def decode_ahead_s(
    times: LayerTimes,
    top_k: int,
    parts: Parts,
    held: Held,
    ahead: Ahead,
    depth: int,
    *,
    staging_experts: int,
    as_ready: bool = False,
) -> Array:
    """Expected seconds of one token through one layer whose experts are also fetched ahead.

    With the first m ranks of the prediction there, the rest is fetched on demand: E(m), an
    expectation as in :func:`decode_layer_s`. A rank that was begun and done in time to a share
    (:func:`ranks_in_time`) brings that share of ``E(r - 1) - E(r)``; the rest of its transfer, if
    it was wrong, delays the demands: ``(begun - done) (1 - A) tau``, half a transfer on average
    (half a piece, where it is broken off), weighted by how likely the layer waits for the link at
    all. What was begun costs the computing thread what a transfer ahead does, instead of what a
    demand would have.

    Returns
    -------
    [depth, S, C]
        When 1, 2 ... ``depth`` ranks are asked for. The best of them (and of none) is what never
        gets dearer with a faster link: a given one may, as a faster link begins a wrong transfer
        that a slower one did not come to.
    """
    lacks = held.lacking()
    times = times._replace(shared_s=times.shared_s + ahead.guess_s)
    after = brought(lacks, ahead, top_k).first(depth)
    stage = _stage(times, top_k, parts, lacks, staging_experts=staging_experts, as_ready=as_ready)
    begun, done = _ranks_in_time(stage, parts, ahead, after)
    expected_s, link_bound = stage.expected(after)
    wrong = (1.0 - ahead.accuracy[:, None])[:depth]
    wasted = ahead.lacks().each(lambda lack: wrong * lack[:depth])
    late_s = parts.link_s(wasted) / parts.pieces
    if isinstance(stage, TierStage):
        late_s = np.maximum(late_s, parts.read_s(wasted))
    costs_s = _transfers(wasted, parts) * times.ahead_transfer_s
    transfers = top_k * _transfers(after.mean_lacks(), parts)
    spared_s = (transfers[:-1] - transfers[1:]) * (times.transfer_s - times.ahead_transfer_s)
    some = after.any_lacks()[..., None]
    spared_s = spared_s + (some[:-1] - some[1:]) * (times.burst_s - times.ahead_burst_s)
    costs_s = costs_s - spared_s
    layer_s = np.empty(late_s.shape)
    total_s = expected_s[0] + _unhidden_s(times, top_k, parts, held)
    for rank in range(depth):
        # One rank more never makes it longer: a rule that the estimates break a little.
        np.minimum(expected_s[rank + 1], expected_s[rank], out=expected_s[rank + 1])
        brings_s = done[rank] * (expected_s[rank] - expected_s[rank + 1])
        delays_s = (begun[rank] - done[rank]) * late_s[rank] * link_bound[rank]
        total_s = total_s - brings_s + delays_s + begun[rank] * costs_s[rank]
        layer_s[rank] = total_s
    return layer_s


def _stage(
    times: LayerTimes,
    top_k: int,
    parts: Parts,
    lacks: Lacks,
    *,
    staging_experts: int,
    as_ready: bool,
) -> Stage:
    kind = Stage if lacks.both_disk is None else TierStage
    return kind(times, top_k, parts, lacks, staging_experts=staging_experts, as_ready=as_ready)


def _ranks_in_time(stage: Stage, parts: Parts, ahead: Ahead, after: Brought) -> tuple[Array, Array]:
    """:func:`ranks_in_time`; what has to be read first is in time where both disk and link are."""
    begun, done = ranks_in_time(*_rooms_s(stage, parts, ahead, after, ahead.gap_s))
    lacks = ahead.lacks()
    if lacks.bottom_disk is None or lacks.both_disk is None:
        return begun, done
    ranks = len(begun)
    reads = (lacks.bottom_disk + lacks.both_disk)[:ranks]
    share = (reads / np.maximum(lacks.bottom + lacks.both, 1e-9)[:ranks])[..., None]
    read_begun, read_done = ranks_in_time(*_disk_rooms_s(stage, parts, ahead, after))
    begun = begun + share * (read_begun - begun)
    return begun, np.minimum(done + share * (np.minimum(read_done, done) - done), begun)


def ranks_in_time(rooms_s: Array, deviations_s: Array, transfers_s: Array) -> tuple[Array, Array]:
    """How likely each rank is begun before the routing is known, and what share of it is done.

    MoEpic's m* is the largest m whose transfers, the sum of tau(r) over r <= m, end within the
    window. What a rank lacks is chance, so the sum is too: what the ranks before leave of the
    window is taken as a uniform variable of that mean and deviation. A rank is begun if something
    is left, and its done share is the mean, over its transfer, of the chance that something still
    is. Without deviation, of all ranks one at most is neither done nor to be done on demand.

    Parameters
    ----------
    rooms_s, deviations_s : [D + 1, ...]
        What is left of the window after m ranks, and its standard deviation.
    transfers_s : [D, ...]
        Seconds of each rank, if it lacks something.

    Returns
    -------
    begun, done : [D, ...]
    """
    begun, done = np.empty(transfers_s.shape), np.empty(transfers_s.shape)
    room_s = rooms_s[0]
    for rank, transfer_s in enumerate(transfers_s):
        np.minimum(room_s, rooms_s[rank], out=room_s)
        width_s = np.maximum(deviations_s[rank] * math.sqrt(12.0), _LEAST_WIDTH_S)
        np.clip(room_s / width_s + 0.5, 0.0, 1.0, out=begun[rank])
        done[rank] = begun[rank]
        left_s = _expected_left_s(room_s, width_s)
        left_s -= _expected_left_s(room_s - transfer_s, width_s)
        np.divide(left_s, transfer_s, out=done[rank], where=transfer_s > 1e-6 * width_s)
        if rank:
            np.minimum(begun[rank], begun[rank - 1], out=begun[rank])
            np.minimum(done[rank], done[rank - 1], out=done[rank])
        np.minimum(done[rank], begun[rank], out=done[rank])
    return begun, done


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
    bottom, both = (lack[:ranks] for lack in ahead.lacks()[:2])
    needs_s = parts.link_s(Lacks(_sums(bottom), _sums(both)))
    # Of each rank the mean square less the square of the mean.
    terms = (bottom - bottom**2, both - both**2, -2.0 * bottom * both)
    squares = np.stack([bottom_s**2, both_s**2, bottom_s * both_s])
    variance = np.tensordot(np.stack([_sums(term) for term in terms]), squares, axes=(0, 0))
    rooms_s = stage.link_idle_s(brought.mean_lacks()) + gap_s - needs_s
    # What a rank that lacks something takes of the room: the more is there, the less is demanded.
    some = np.maximum(bottom + both, 1e-9)[..., None]
    takes_s = np.maximum(rooms_s[:-1] - rooms_s[1:], 0.0) / some
    return rooms_s, np.sqrt(np.maximum(variance, 0.0)), takes_s


def _disk_rooms_s(
    stage: Stage, parts: Parts, ahead: Ahead, brought: Brought
) -> tuple[Array, Array, Array]:
    """The same of the disk, for what RAM does not hold."""
    lacks = ahead.lacks()
    assert lacks.bottom_disk is not None, "RAM holds everything"
    assert lacks.both_disk is not None, "RAM holds everything"
    top_s, bottom_s = parts.read_columns()
    ranks = len(brought.covered) - 1
    bottom, both = lacks.bottom_disk[:ranks], lacks.both_disk[:ranks]
    sums = Lacks(_sums(bottom), _sums(both), _sums(bottom), _sums(both))
    terms = (bottom - bottom**2, both - both**2, -2.0 * bottom * both)
    both_s = top_s + bottom_s
    squares = np.stack([bottom_s**2, both_s**2, bottom_s * both_s])
    variance = np.tensordot(np.stack([_sums(term) for term in terms]), squares, axes=(0, 0))
    assert isinstance(stage, TierStage), "RAM holds everything"
    rooms_s = stage.disk_idle_s(brought.mean_lacks()) + ahead.gap_s - parts.read_s(sums)
    some = np.maximum(bottom + both, 1e-9)[..., None]
    takes_s = np.maximum(rooms_s[:-1] - rooms_s[1:], 0.0) / some
    return rooms_s, np.sqrt(np.maximum(variance, 0.0)), takes_s


def _sums(values: Array) -> Array:
    """Sums of the first 0, 1 ... D rows, [D + 1, ...]."""
    return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])


def _unhidden_s(times: LayerTimes, top_k: int, parts: Parts, held: Held) -> Array:
    """What a token takes beside the stage of its experts, [S, C].

    Every transfer of something needed costs the computing thread its share, whenever it was asked
    for.
    """
    lacks = held.lacking()
    any_of_it = 1.0 - (1.0 - np.minimum(lacks.bottom + lacks.both, 1.0)) ** top_k
    return np.asarray(
        times.other_s
        + top_k * _transfers(lacks, parts) * times.transfer_s
        + any_of_it[:, None] * times.burst_s
    )


def _transfers(lacks: Lacks, parts: Parts) -> Array:
    """How many transfers that takes, [.., C] for lacks of [..]."""
    top_s, bottom_s, _ = parts.columns()
    has_top, has_bottom = (np.asarray(part_s > 0.0, np.float64) for part_s in (top_s, bottom_s))
    both = lacks.both[..., None] * (has_top + has_bottom)
    return np.asarray(lacks.bottom[..., None] * has_bottom + both)
