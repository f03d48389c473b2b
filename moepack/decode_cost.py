"""What one decoded token costs in one layer, with and without fetching ahead, in closed form.

See :mod:`moepack.cost` for the terms and the shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from moepack.cost import Array, Held, Lacks, LayerTimes, Parts
from moepack.expert_stage import Stage
from moepack.plan import PrefetchMode


class Ahead(NamedTuple):
    """What is fetched before the routing is known. ``D`` counts ranks of the prediction.

    Attributes
    ----------
    mode : {"bottoms", "all"}
        Which parts of a predicted expert are fetched.
    gap_s : float
        Compute between the experts of the layer before and this layer's routing.
    accuracy : [D]
        A(r): how likely the expert predicted at rank r is activated.
    held : Held, each [D] or [D, S]
        Q(r): how likely its parts are resident.
    """

    mode: PrefetchMode
    gap_s: float
    accuracy: Array
    held: Held


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
    return stage.expected(lacks)[0] + _unhidden_s(times, top_k, parts, held, as_ready)


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
    ranks alone miss the simulation by twice as much). Where the window ends first, a wrong transfer
    may be in flight and delays the demands by half of itself: ``1/2 * mean over ranks of (1 - A)
    tau``, weighted by how likely the layer waits for the link at all.

    Parameters
    ----------
    depths
        How many ranks are asked for, 1 to D.

    Returns
    -------
    [depths, S, C]
    """
    before = held.lacking()
    after = lacking_after(before, ahead, top_k)
    stage = Stage(times, top_k, parts, before, staging_experts=staging_experts, as_ready=as_ready)
    gap_s = ahead.gap_s + (0.0 if as_ready else times.shared_s)
    in_time = ranks_in_time(_room_s(stage, parts, ahead, after, gap_s))
    expected_s, bound = stage.expected(after)
    found = []
    for depth in depths:
        cap = min(depth, staging_experts)
        ranks = np.minimum(in_time, cap)
        late_s = np.where(in_time < cap, _wrong_s(parts, ahead, depth) / 2.0, 0.0)
        found.append(_at(expected_s, ranks) + late_s * _at(bound, ranks))
    return np.stack(found) + _unhidden_s(times, top_k, parts, held, as_ready)


def lacking_after(before: Lacks, ahead: Ahead, top_k: int) -> Lacks:
    """What an activated expert still lacks once m ranks are there, each [D + 1, S].

    Rank r brings ``A(r) / K`` times what it lacked: R(m) is the sum over r <= m. Where A and Q
    together say more than the hit rate leaves for a kind of lack, the other kind takes it.
    """
    only_bottom, both = _rank_lacks(ahead)
    share = np.asarray(ahead.accuracy)[:, None] / top_k
    brought_bottom, brought_both = _cumulated(share * only_bottom), _cumulated(share * both)
    bottom, all_of_it = before.bottom - brought_bottom, before.both - brought_both
    if ahead.mode == "bottoms":
        return Lacks(np.maximum(bottom, 0.0), np.maximum(all_of_it, 0.0))
    return Lacks(
        np.maximum(np.maximum(bottom, 0.0) + np.minimum(all_of_it, 0.0), 0.0),
        np.maximum(np.maximum(all_of_it, 0.0) + np.minimum(bottom, 0.0), 0.0),
    )


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
    stage: Stage, parts: Parts, ahead: Ahead, after: Lacks, gap_s: float
) -> Iterator[Array]:
    """What is left of the window after m = 0, 1 ... D ranks, each [S, C].

    tau(r), the link's seconds for a rank, is what its expert lacks: for whole experts
    t_e * (1 - Q(r)).
    """
    top_s, bottom_s, _ = parts.columns()
    only_bottom, both = _rank_lacks(ahead)
    needs_s: Array | float = 0.0
    for ranks, (bottom_lack, both_lack) in enumerate(zip(*after, strict=True)):
        if ranks:
            needs_s = needs_s + only_bottom[ranks - 1, :, None] * bottom_s
            needs_s = needs_s + both[ranks - 1, :, None] * (top_s + bottom_s)
        yield stage.link_idle_s(Lacks(bottom_lack, both_lack)) + gap_s - needs_s


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


def _rank_lacks(ahead: Ahead) -> tuple[Array, Array]:
    """What the expert of each rank lacks and is fetched for: its bottom alone, or both, [D, S]."""
    top, bottom = (
        values if values.ndim == 2 else values[:, None]
        for values in (np.asarray(chance, dtype=np.float64) for chance in ahead.held)
    )
    only_bottom, both = top - np.minimum(top, bottom), 1.0 - top
    return only_bottom, both if ahead.mode == "all" else np.zeros_like(both)


def _wrong_s(parts: Parts, ahead: Ahead, depth: int) -> Array:
    """Mean over the ranks of ``(1 - A(r)) tau(r)``, [S, C]."""
    top_s, bottom_s, _ = parts.columns()
    wrong = 1.0 - np.asarray(ahead.accuracy)[:depth, None]
    only_bottom, both = (
        (wrong * lack[:depth]).mean(axis=0)[:, None] for lack in _rank_lacks(ahead)
    )
    return np.asarray(only_bottom * bottom_s + both * (top_s + bottom_s))


def _cumulated(values: Array) -> Array:
    """Sums of the first 0, 1 ... D rows, [D + 1, ...]."""
    return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])


def _at(table: Array, ranks: Array) -> Array:
    """A table over m = 0 ... D, [D + 1, S, C], at fractional ranks [S, C]."""
    low = np.minimum(ranks.astype(np.intp), len(table) - 2)
    share = ranks - low
    place = low * ranks.size + np.arange(ranks.size).reshape(ranks.shape)
    flat = table.reshape(-1)
    return np.asarray((1.0 - share) * flat[place] + share * flat[place + ranks.size])
