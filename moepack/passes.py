"""What each pass of a placement has to compute and to fetch: the replay's work, as arrays.

Shapes: ``T`` tokens, ``L`` layers with experts, ``K`` places for activated experts, ``D`` predicted
ones that are looked at, ``G`` segments of an expert (1 where no layer is cut, else 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.activations import Activations
from moepack.errors import PlanMismatchError
from moepack.lane_clock import Columns, Flags, Instead, Seconds
from moepack.on_miss import EXACT, LEFT_OUT, LOWERED
from moepack.plan import LayerPlacement, Placement
from moepack.routing_tables import Cache, RoutingTables
from moepack.segment_times import Segments
from moepack.trace import NO_PREDICTION, LayerShape

#: What a bound may know: the next layer's experts, or all that is to come.
Oracle = Literal["none", "prediction", "future"]


class DecodePasses(NamedTuple):
    """One token at a time through every layer that has experts.

    Attributes
    ----------
    compute_s, fetch_s : [T, L, K * G]
        In the order of consumption; see :class:`moepack.lane_clock.Work`.
    ahead_s : [T, L, D * G]
    ahead_of : int [T, L, K * G]
    hits : bool [T, L, K]
        The part that is cached first was resident.
    read_s, ahead_read_s
        Of the disk, before ``fetch_s`` and ``ahead_s``; None where RAM holds everything.
    fates : int8 [T, L, K]
        What becomes of what is missing, unless something of it was begun ahead
        (:mod:`moepack.on_miss`); None where everything is exact.
    instead : Instead or None
        The times of that, [T, L, K * G].
    """

    compute_s: Seconds
    fetch_s: Seconds
    ahead_s: Seconds
    ahead_of: Columns
    hits: Flags
    read_s: Seconds | None = None
    ahead_read_s: Seconds | None = None
    fates: npt.NDArray[np.int8] | None = None
    instead: Instead | None = None


def decode_passes(
    tables: RoutingTables,
    found: Activations,
    placement: Placement,
    segments: Segments,
    oracle: Oracle,
) -> DecodePasses:
    """The work of decoding some tokens under a placement.

    Parameters
    ----------
    found
        From :func:`activations`, made :func:`perfect` for any oracle.
    """
    held, held_ahead = _held(tables, found, placement, segments, oracle)
    named = found.valid
    if oracle == "none":
        named = tables.trace.predicted[found.tokens] != NO_PREDICTION
    return passes_with(found, named, placement, segments, held, held_ahead)


def passes_with(
    found: Activations,
    named: Flags,
    placement: Placement,
    segments: Segments,
    held: Flags,
    held_ahead: Flags,
    fates: npt.NDArray[np.int8] | None = None,
) -> DecodePasses:
    """The same where it is known what is resident.

    Parameters
    ----------
    named : bool [T, L, R]
        Which predictions exist.
    held : bool [T, L, K, G]
        The parts of the activated experts that are resident, in the order of consumption.
    held_ahead : bool [T, L, R, G]
        Those of the predicted experts.
    fates : int8 [T, L, K]
        What becomes of each activated expert that is missing and of which nothing was begun ahead,
        in the order of consumption (:mod:`moepack.on_miss`); None: it is fetched.
    """
    parts = segments.link_s.shape[1]
    valid = np.repeat(found.valid, parts, axis=2)  # [T, L, K * G]
    flat = valid.shape
    missing = valid & ~held.reshape(flat)
    fetch_s = np.where(missing, segments.linking_s(found.ids), 0.0)
    compute_s = np.where(valid, segments.computing_s(found.ids), 0.0)
    depths = np.array([place.prefetch_depth for place in placement.layers])
    depth = min(int(depths.max(initial=0)), found.right.shape[2])
    asked = (np.arange(depth) < depths[:, None]) & named[:, :, :depth]
    most = placement.staging_experts
    guessed = found.predicted[:, :, :depth]
    ahead_s = ahead_seconds(placement, segments, guessed, asked, held_ahead[:, :, :depth], most)
    # A segment is brought by its expert's rank, if that rank really asks for it.
    none = depth * parts
    ahead_of = np.full(flat, none)
    if depth:
        place = np.repeat(np.minimum(found.guess, depth - 1) * parts, parts, axis=2)
        place += np.tile(np.arange(parts), flat[2] // parts)
        comes = np.repeat(found.guess < depth, parts, axis=2) & (fetch_s > 0)
        comes &= np.take_along_axis(ahead_s, place, axis=2) > 0
        np.copyto(ahead_of, place, where=comes)
    instead = None
    if fates is not None:
        fates = np.where(found.valid & ~held.all(axis=3), fates, np.int8(EXACT))
        instead = Instead(compute_s.copy(), fetch_s.copy())
        _replace_missing(instead, np.repeat(fates, parts, axis=2), segments)
    hits = _cached_first(held, segments) & found.valid
    made = DecodePasses(compute_s, fetch_s, ahead_s, ahead_of, hits, fates=fates, instead=instead)
    if segments.from_disk is None:
        return made
    layers = np.arange(len(segments.from_disk))[:, None]
    from_disk = segments.from_disk[layers, found.ids]
    ahead_from_disk = segments.from_disk[layers, guessed]
    return made._replace(
        read_s=read_seconds(segments, found.ids, fetch_s, from_disk),
        ahead_read_s=read_seconds(segments, guessed, ahead_s, ahead_from_disk),
    )


def _replace_missing(instead: Instead, fates: npt.NDArray[np.int8], segments: Segments) -> None:
    """Give what is missing the times of what stands for it, in place."""
    assert segments.low is not None, "low copies of nothing"
    compute_s, fetch_s = instead
    missing, columns = fetch_s > 0.0, fetch_s.shape[2]
    for times, low in ((fetch_s, segments.low.link_s), (compute_s, segments.low.compute_s)):
        times[missing & (fates == LEFT_OUT)] = 0.0
        every = np.tile(low, columns // low.shape[1])
        np.copyto(times, every, where=missing & (fates == LOWERED))


def read_seconds(
    segments: Segments, experts: Columns, fetch_s: Seconds, from_disk: Flags
) -> Seconds:
    """Seconds of the disk for what crosses the bus, [.., L, K * G].

    Parameters
    ----------
    experts : int [.., L, K]
    fetch_s : [.., L, K * G]
        0 for nothing.
    from_disk : bool [.., L, K, G]
    """
    reads = (fetch_s > 0.0) & from_disk.reshape(fetch_s.shape)
    return np.where(reads, segments.reading_s(experts), 0.0)


def ahead_seconds(
    placement: Placement,
    segments: Segments,
    experts: Columns,
    asked: Flags,
    held: Flags,
    most: int,
) -> Seconds:
    """Seconds of the link for what is asked for ahead, [.., L, D * G].

    Each layer's mode says which parts.

    Parameters
    ----------
    experts : int [.., L, D]
        Predicted, best first.
    asked : bool [.., L, D]
        Which of them are asked for.
    held : bool [.., L, D, G]
        Their parts that are resident.
    most
        Experts that may be fetched.
    """
    bottoms = np.array([place.prefetch == "bottoms" for place in placement.layers])
    if bottoms.any():
        asked = asked & (~bottoms[:, None] | ~segments.has_top[:, None] | held[..., 0])
    depth, parts = asked.shape[-1], held.shape[-1]
    if most < depth:
        lacking = asked & ~held.all(axis=-1)
        asked = asked & (np.cumsum(lacking, axis=-1) <= most)
    missing = np.repeat(asked, parts, axis=-1) & ~held.reshape(*held.shape[:-2], depth * parts)
    return np.where(missing, segments.linking_s(experts), 0.0)


def guessed_layers(
    placement: Placement, segments: Segments, layers: Sequence[LayerShape]
) -> list[bool]:
    """Of every layer, whether its experts are guessed: not where all of them are there."""
    found = []
    for index, (place, shape) in enumerate(zip(placement.layers, layers, strict=True)):
        slots = [place.top_slots, place.bottom_slots]
        if segments.stored_bytes.shape[1] == 1:
            slots = [sum(slots)]
        there = placement.pool is None and all(
            count >= shape.num_experts or not size
            for count, size in zip(slots, segments.stored_bytes[index], strict=True)
        )
        found.append(place.prefetch != "off" and not there)
    return found


def _cached_first(held: Flags, segments: Segments) -> Flags:
    """Of [.., L, K, G], the part that is cached first: the top where there is one."""
    if held.shape[-1] == 1:
        return held[..., 0]
    return np.where(segments.has_top[:, None], held[..., 0], held[..., 1])


def _held(
    tables: RoutingTables,
    found: Activations,
    placement: Placement,
    segments: Segments,
    oracle: Oracle,
) -> tuple[Flags, Flags]:
    """What is resident when its layer begins: activated [T, L, K, G], predicted [T, L, R, G]."""
    tokens, order = found.tokens, found.order
    parts = segments.link_s.shape[1]
    held = np.zeros((*order.shape, parts), dtype=np.bool_)
    ahead = np.zeros((*found.right.shape, parts), dtype=np.bool_)
    if placement.pool is not None:
        activated, predicted = tables.pooled(placement.pool)
        held[..., 0] = np.take_along_axis(activated[tokens], order, axis=2)
        ahead[..., 0] = predicted[tokens] if oracle == "none" else held[..., 0]
        return held, ahead
    if oracle == "future":
        if segments.classes is not None:
            raise PlanMismatchError(
                "what a cache that knows the future would hold is not known of layers whose "
                "experts are stored in several encodings; expected layers of one encoding"
            )
        slots = np.array([place.top_slots for place in placement.layers])
        future = tables.future[tokens] < slots[:, None]
        held[..., 0] = np.take_along_axis(future, order, axis=2)
        return held, held.copy()
    counts = [
        _slots(place, parts, cut=bool(cut))
        for place, cut in zip(placement.layers, segments.interior, strict=True)
    ]
    caches = [
        [Cache(index, place.policy, count, place.half_life_tokens) for count in counts[index]]
        for index, place in enumerate(placement.layers)
    ]
    mixed: Mapping[int, tuple[Flags, Flags]] = {}
    if segments.classes is not None:
        mixed = tables.classes(segments.classes.cuts).held(placement.layers)
    alike = (several for index, several in enumerate(caches) if index not in mixed)
    tables.prepare(cache for several in alike for cache in several)
    for index, several in enumerate(caches):
        for part, cache in enumerate(several):
            activated, predicted = mixed[index] if index in mixed else tables.held(cache)
            mine = np.take_along_axis(activated[tokens], order[:, index], axis=1)
            held[:, index, :, part] = mine
            ahead[:, index, :, part] = predicted[tokens] if oracle == "none" else mine
    # A part that does not exist is never missing.
    absent = segments.stored_bytes == 0
    held |= absent[:, None, :]
    ahead |= absent[:, None, :]
    return held, ahead


def _slots(place: LayerPlacement, parts: int, *, cut: bool) -> tuple[int, ...]:
    """Slots for each segment; a layer that is not cut keeps its experts in one of two pools."""
    if cut or parts == 2:
        return place.top_slots, place.bottom_slots
    return (place.top_slots + place.bottom_slots,)
