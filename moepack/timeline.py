"""The clock of the replay: one serial link, one compute queue, many independent lanes at once.

A *pass* is one layer over one token (or over a whole prompt). Its experts are consumed as segments;
what is missing crosses the link, one transfer at a time, through *frames* that each hold one expert
until it has been computed:

- what was asked for ahead goes while the layer before computes, once all that this one demands has
  a frame; when the routing is known, a transfer in flight finishes if it was right, and is broken
  off behind the piece under way if it was wrong; a queued one that turned out wrong is dropped, and
  a queued one that was right is asked for like everything else that is missing;
- what is demanded goes before anything that is asked for ahead of the next layer, and in ascending
  order of experts, but for the rest of an expert that is coming: that goes first;
- the next layer's experts are guessed, and the shared expert is computed, before the routed ones;
- an engine that computes *as ready* takes what is resident first, then what was brought ahead, then
  what is demanded; another, and every engine with more than one token, waits in the order of
  summation. Either computes while the link works.

A frame that something unwanted arrives in holds nobody up: it is free as soon as the link is.

Where lanes stand, and what passes ask of them, are the records of :mod:`moepack.lane_clock`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moepack.lane_clock import NEVER, Clock, Columns, Flags, Instead, Seconds, Work


class Outcome(NamedTuple):
    """What a pass did.

    Attributes
    ----------
    clock : Clock
        After the pass.
    ready : bool [lanes, segments]
        The segment was in the fast tier when the routing was known.
    demanded : bool [lanes, segments]
        It was fetched on demand.
    begun : bool [lanes, ahead]
        It was fetched ahead, needed or not.
    wait_s : [lanes]
        The compute waited for the link.
    saved_s : [lanes]
        Seconds that the link did not need, as what it carried for nobody was broken off.
    """

    clock: Clock
    ready: Flags
    demanded: Flags
    begun: Flags
    wait_s: Seconds
    saved_s: Seconds


def advance(
    clock: Clock,
    work: Work,
    *,
    as_ready: bool,
    frames: int,
    segments_per_expert: int,
    instead: Instead | None = None,
) -> Outcome:
    """Run one pass of every lane.

    Parameters
    ----------
    as_ready
        Whether resident segments are computed while others arrive.
    frames
        Experts in flight at once. Where they are fewer than a pass may lack, a fetch waits until
        the frame of an earlier one has been consumed.
    segments_per_expert
        1 or 2: neighbouring segments that share a frame.
    instead
        Where missing experts may be replaced: what they then take.
    """
    routed_s = clock.now_s + work.before_s
    begun, ends_s = _fetched_ahead(clock, work.ahead_s, routed_s, segments_per_expert)
    link_s, saved_s = clock.link_s, np.zeros(len(begun))
    if instead is not None:
        work = _replaced(work, instead, begun, segments_per_expert)
    lacking = work.fetch_s > 0.0
    arrives_s = np.full(lacking.shape, -NEVER)
    asked_s = routed_s + work.guess_s
    begin_s = asked_s + work.after_s
    if begun.any():
        comes_s = np.full((len(begun), begun.shape[1] + 1), NEVER)
        np.copyto(comes_s[:, :-1], ends_s, where=begun)
        brought_s = np.take_along_axis(comes_s, work.ahead_of, axis=1)
        coming = lacking & (brought_s < NEVER)
        np.copyto(arrives_s, brought_s, where=coming)
        over_s = _over(work, begun, ends_s, coming, routed_s)
        link_s = np.maximum(link_s, np.where(begun, over_s, -NEVER).max(axis=1))
        saved_s = (ends_s - over_s).sum(axis=1)
        ready = ~lacking | (coming & (brought_s <= routed_s[:, None]))
        begin_s = begin_s + work.costs.of_ahead(begun, lacking & ~coming)
        rest = lacking & ~coming & _of_expert(coming, segments_per_expert)
        if rest.any():  # of an expert that is coming: it goes first
            rest_s = np.where(rest, work.fetch_s, 0.0).sum(axis=1)
            link_s = np.where(rest_s > 0.0, np.maximum(link_s, routed_s) + rest_s, link_s)
            np.copyto(arrives_s, link_s[:, None], where=rest)
    else:
        coming = rest = np.zeros_like(lacking)
        ready = ~lacking
    work = work._replace(compute_s=work.compute_s + work.costs.of_demands(lacking & ~coming))
    lane = _Lane(
        routed_s, begin_s, link_s, work, arrives_s, lacking & ~coming & ~rest, coming, rest, ready
    )
    slots = clock.asked_s.shape[1]
    # One column alone says nothing of a single frame: what comes next has to wait for that.
    if slots == 1 and frames > 1 and frames >= lacking.shape[1] // segments_per_expert:
        done_s, link_s = _ample(lane, as_ready)
        frees_s = asked_s[:, None]
    else:
        done_s, link_s, frees_s = _in_frames(lane, as_ready, frames, segments_per_expert, slots)
        frees_s = np.maximum(frees_s, asked_s[:, None])
    wait_s = done_s - begin_s - work.compute_s.sum(axis=1)
    ends = Clock(done_s, link_s, frees_s)
    return Outcome(ends, ready, lacking & ~coming, begun, wait_s, saved_s)


def brought(begun: Flags, ahead_of: Columns) -> Flags:
    """Which segments come from what was begun ahead, [.., segments]; all in the last axis."""
    some = np.concatenate([begun, np.zeros((*begun.shape[:-1], 1), dtype=np.bool_)], axis=-1)
    return np.take_along_axis(some, ahead_of, axis=-1)


def _replaced(work: Work, instead: Instead, begun: Flags, segments_per_expert: int) -> Work:
    """The work with what stands for missing experts, but for those of which something comes."""
    comes = _of_expert(brought(begun, work.ahead_of), segments_per_expert)
    return work._replace(
        compute_s=np.where(comes, work.compute_s, instead.compute_s),
        fetch_s=np.where(comes, work.fetch_s, instead.fetch_s),
    )


def _fetched_ahead(
    clock: Clock, ahead_s: Seconds, routed_s: Seconds, segments_per_expert: int
) -> tuple[Flags, Seconds]:
    """What of it was begun before the routing was known, and when each ends, [lanes, ahead]."""
    columns = ahead_s.shape[1]
    if not columns:
        return np.zeros(ahead_s.shape, dtype=np.bool_), ahead_s
    asked = ahead_s > 0.0
    total_s = np.cumsum(ahead_s, axis=1)
    slots = clock.asked_s.shape[1]
    if slots == 1:
        ends_s = np.maximum(clock.link_s, clock.asked_s[:, 0])[:, None] + total_s
        return (ends_s - ahead_s < routed_s[:, None]) & asked, ends_s
    # Each expert that lacks something takes the next frame.
    some = asked.reshape(len(asked), -1, segments_per_expert).any(axis=2)
    turn = np.minimum(np.maximum(np.cumsum(some, axis=1) - 1, 0), slots - 1)
    frees_s = np.take_along_axis(clock.asked_s, turn, axis=1)
    frees_s = np.repeat(frees_s, segments_per_expert, axis=1)
    late_s = np.where(asked, frees_s - (total_s - ahead_s), -NEVER)
    late_s = np.maximum(np.maximum.accumulate(late_s, axis=1), clock.link_s[:, None])
    ends_s = late_s + total_s
    return (ends_s - ahead_s < routed_s[:, None]) & asked, ends_s


def _over(work: Work, begun: Flags, ends_s: Seconds, coming: Flags, routed_s: Seconds) -> Seconds:
    """When the link is done with what was begun ahead, [lanes, ahead]: what is wrong breaks off."""
    wrong = np.concatenate([begun, np.zeros((len(begun), 1), dtype=np.bool_)], axis=1)
    np.put_along_axis(wrong, np.where(coming, work.ahead_of, begun.shape[1]), False, axis=1)
    begins_s = ends_s - work.ahead_s
    pieces = np.ceil((routed_s[:, None] - begins_s) / work.piece_s)
    broken_s = np.minimum(ends_s, begins_s + pieces * work.piece_s)
    return np.where(wrong[:, :-1], broken_s, ends_s)


def _of_expert(flags: Flags, segments_per_expert: int) -> Flags:
    """Of every segment, whether any of its expert's is flagged."""
    if segments_per_expert == 1:
        return flags
    some = flags.reshape(len(flags), -1, segments_per_expert).any(axis=2)
    return np.repeat(some, segments_per_expert, axis=1)


class _Lane(NamedTuple):
    """One pass from its routing on: seconds [lanes], and of every segment [lanes, segments].

    ``arrives_s`` is set of what is ``coming`` and of the ``rest`` of its expert; what is
    ``demanded`` beside them needs a frame of its own.
    """

    routed_s: Seconds
    begin_s: Seconds
    link_s: Seconds
    work: Work
    arrives_s: Seconds
    demanded: Flags
    coming: Flags
    rest: Flags
    ready: Flags


def _ample(lane: _Lane, as_ready: bool) -> tuple[Seconds, Seconds]:
    """When the last segment has been computed, and the link is free, with a frame for everything.

    Bound by the compute, or by an arrival and what is computed from then on.
    """
    compute_s, demanded = lane.work.compute_s, lane.demanded
    arrives_s = np.maximum(lane.link_s, lane.routed_s)[:, None] + np.cumsum(
        np.where(demanded, lane.work.fetch_s, 0.0), axis=1
    )
    link_s = np.where(demanded.any(axis=1), arrives_s[:, -1], lane.link_s)
    arrives_s = np.where(demanded, arrives_s, lane.arrives_s)
    if as_ready:
        # One transfer at most is in flight; behind it comes the rest of its expert.
        behind_s = _suffix(np.where(demanded, compute_s, 0.0))
        if lane.coming.any():
            late_s = np.where(lane.ready, 0.0, compute_s)
            rest_s = np.where(lane.rest, late_s, 0.0).sum(axis=1)[:, None] + behind_s[:, :1]
            behind_s = np.where(lane.coming, late_s.sum(axis=1)[:, None], behind_s)
            behind_s = np.where(lane.rest, rest_s, behind_s)
        bound_s = np.where(lane.ready, -NEVER, arrives_s + behind_s).max(axis=1)
    else:
        bound_s = (arrives_s + _suffix(compute_s)).max(axis=1)
    return np.maximum(lane.begin_s + compute_s.sum(axis=1), bound_s), link_s


def _suffix(values_s: Seconds) -> Seconds:
    """Sum of each column and all behind it."""
    return np.cumsum(values_s[:, ::-1], axis=1)[:, ::-1]


def _in_frames(
    lane: _Lane, as_ready: bool, frames: int, segments_per_expert: int, slots: int
) -> tuple[Seconds, Seconds, Seconds]:
    """The same expert by expert: a fetch takes over the frame of one that has been computed.

    Returns
    -------
    done_s, link_s : [lanes]
    frees_s : [lanes, slots]
        When each frame is free for what is fetched ahead.
    """
    everyone = np.arange(len(lane.routed_s))
    shape = (len(everyone), -1, segments_per_expert)
    compute_s, arrives_s = (each.reshape(shape) for each in (lane.work.compute_s, lane.arrives_s))
    asked_s = np.where(lane.demanded, lane.work.fetch_s, 0.0).reshape(shape)
    done_s, link_s = lane.begin_s, lane.link_s
    demanded: Flags = np.any(asked_s, axis=2)
    flies: Flags = demanded | np.any(lane.coming.reshape(shape), axis=2)
    if as_ready:
        lacking = (lane.work.fetch_s > 0.0).reshape(shape)
        done_s = done_s + np.where(lacking, 0.0, compute_s).sum(axis=(1, 2))
        order = _as_they_come(lane, demanded, flies, shape)
        compute_s, arrives_s, asked_s = (
            np.take_along_axis(each, order[..., None], axis=1)
            for each in (np.where(lacking, compute_s, 0.0), arrives_s, asked_s)
        )
        demanded, flies = (np.take_along_axis(each, order, axis=1) for each in (demanded, flies))
    # When each frame was last given back. The frames that nothing lies in are taken first, then
    # each as it comes back; what was brought ahead has one already.
    given_s = np.repeat(lane.routed_s[:, None], frames, axis=1)
    gives = np.zeros(len(everyone), dtype=np.intp)
    takes = flies.sum(axis=1) - demanded.sum(axis=1)
    for expert in range(flies.shape[1]):
        wants, flying = demanded[:, expert], flies[:, expert]
        if wants.any():
            frame_s = np.maximum(link_s, given_s[everyone, takes % frames])
            link_s = np.where(wants, frame_s, link_s)
            takes += wants
        for part in range(segments_per_expert):
            link_s = link_s + asked_s[:, expert, part]
            there_s = np.where(asked_s[:, expert, part] > 0.0, link_s, arrives_s[:, expert, part])
            done_s = np.maximum(done_s, there_s) + compute_s[:, expert, part]
        if flying.any():
            given_s[everyone[flying], gives[flying] % frames] = done_s[flying]
            gives += flying
    frees_s = given_s[everyone[:, None], (gives[:, None] + np.arange(slots)) % frames]
    return done_s, link_s, frees_s


def _as_they_come(
    lane: _Lane, demanded: Flags, flies: Flags, shape: tuple[int, int, int]
) -> Columns:
    """The order of the experts: what was brought ahead, what is demanded, what is there."""
    experts = flies.shape[1]
    ahead = lane.work.ahead_s.shape[1]
    place = np.where(lane.coming, lane.work.ahead_of, ahead).reshape(shape).min(axis=2)
    there = np.where(flies, 0, experts)
    key = np.where(demanded, ahead, place) + there + np.arange(experts) * (demanded | ~flies)
    return np.argsort(key, axis=1, kind="stable")
