"""What each pass of a placement has to compute and to fetch: the replay's work, as arrays.

Shapes: ``T`` tokens, ``L`` layers with experts, ``K`` places for activated experts, ``D`` predicted
ones that are looked at, ``G`` segments of an expert (1 where no layer is cut, else 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.budget import stored_bytes
from moepack.compute import ComputeProfile
from moepack.cost import LinkSeconds
from moepack.errors import PlanMismatchError, ProfileError
from moepack.model_spec import ModelSpec
from moepack.on_miss import EXACT, LEFT_OUT, LOWERED
from moepack.plan import LayerLayout, LayerPlacement, Layout, Placement
from moepack.ram_tier import ram_tier
from moepack.routing_tables import Cache, RoutingTables
from moepack.segment_classes import SegmentClasses, seconds_of, segment_classes
from moepack.segments import PARTS
from moepack.timeline import Columns, Flags, Seconds
from moepack.trace import NO_PREDICTION, LayerShape

#: What a bound may know: the next layer's experts, or all that is to come.
Oracle = Literal["none", "prediction", "future"]


class LowCopies(NamedTuple):
    """What stands for a segment that is missing, each [L, G]; see :class:`Segments`."""

    stored_bytes: npt.NDArray[np.int64]
    link_s: Seconds
    compute_s: Seconds


class Segments(NamedTuple):
    """The segments of each layer's experts under one layout, each [L, G] where nothing is said.

    Attributes
    ----------
    stored_bytes, link_s
        Of one transfer; 0 where a layer lacks the part.
    compute_s
        Of one token.
    share
        Of an expert's computing.
    transfer_s
        What one transfer costs the computing thread, [L].
    burst_s
        What having to transfer anything in a pass costs it, [L].
    has_top, interior
        Whether a layer has tops, and whether it has bottoms as well, [L].
    read_s
        Of the disk, for a segment that RAM does not hold; None where it holds everything.
    from_disk
        Which those are, bool [L, N, G].
    bounces
        How many of them may be on their way at once.
    low
        Their low copies; None where there are none.
    classes
        The same by encoding, where there are mixed layers; what is above is then of the largest.
    """

    stored_bytes: npt.NDArray[np.int64]
    link_s: Seconds
    compute_s: Seconds
    share: Seconds
    transfer_s: Seconds
    burst_s: Seconds
    has_top: Flags
    interior: Flags
    read_s: Seconds | None = None
    from_disk: Flags | None = None
    bounces: int = 0
    low: LowCopies | None = None
    classes: SegmentClasses | None = None

    def mixed(self, row: int) -> LayerLayout | None:
        """The layout of a layer if that is mixed, else None."""
        cut = None if self.classes is None else self.classes.cuts[row]
        return cut if cut is not None and cut.encodings else None

    def linking_s(self, experts: Columns) -> Seconds:
        """Seconds of the link for the segments of experts [.., L, K]: [.., L, K * G]."""
        if self.classes is None:
            return self._all(self.link_s, experts)
        return self.classes.each(self.classes.link_s, experts)

    def computing_s(self, experts: Columns) -> Seconds:
        """The same of computing one token."""
        if self.classes is None:
            return self._all(self.compute_s, experts)
        return self.classes.each(self.classes.compute_s, experts)

    def reading_s(self, experts: Columns) -> Seconds:
        """The same of the disk."""
        if self.classes is None:
            assert self.read_s is not None, "RAM holds everything"
            return self._all(self.read_s, experts)
        assert self.classes.read_s is not None, "RAM holds everything"
        return self.classes.each(self.classes.read_s, experts)

    def _all(self, values: npt.NDArray[Any], experts: Columns) -> npt.NDArray[Any]:
        """Of [L, G], the same for every expert: [L, K * G]."""
        return np.tile(values, experts.shape[-1])


def segments_of(
    spec: ModelSpec, compute: ComputeProfile, layout: Layout, link: LinkSeconds
) -> Segments:
    """Sizes and times of every layer's segments, and of their low copies."""
    found = _segments_of(spec, compute, layout.layers, link)
    if not layout.low:
        return found
    low = _segments_of(spec, compute, layout.low_layers, link)
    return found._replace(low=LowCopies(low.stored_bytes, low.link_s, low.compute_s))


def _segments_of(
    spec: ModelSpec, compute: ComputeProfile, layers: Sequence[LayerLayout], link: LinkSeconds
) -> Segments:
    sizes = np.array(
        [[stored_bytes(spec, cut, part) for part in PARTS] for cut in layers], dtype=np.int64
    )
    has_top, interior = sizes[:, 0] > 0, np.all(sizes > 0, axis=1)
    tops = np.array([cut.split_ratio for cut in layers])
    share = np.stack([tops, 1.0 - tops], axis=1)
    entries = [compute.layer(cut.layer) for cut in layers]
    expert_s = [
        entry.expert_times(cut.encoding, cut=bool(two)).at(1)
        for entry, cut, two in zip(entries, layers, interior, strict=True)
    ]
    compute_s = np.array(expert_s)[:, None] * share
    transfer_s, burst_s = np.array([(entry.transfer_s, entry.burst_s) for entry in entries]).T
    link_s = seconds_of(sizes, link)
    if not interior.any():  # one segment each: the part that is there
        sizes = sizes.sum(axis=1, keepdims=True)
        link_s, compute_s, share = (
            values.sum(axis=1, keepdims=True) for values in (link_s, compute_s, share)
        )
    classes = segment_classes(spec, compute, layers, link, sizes.shape[1])
    return Segments(
        sizes,
        link_s,
        compute_s,
        share,
        transfer_s,
        burst_s,
        has_top,
        interior,
        classes=classes,
    )


def behind_ram(
    segments: Segments,
    spec: ModelSpec,
    layout: Layout,
    placement: Placement,
    disk: LinkSeconds | None,
) -> Segments:
    """The same with what a placement's RAM does not hold read from the disk first.

    Parameters
    ----------
    disk
        Seconds of one read of so many bytes; not needed where RAM holds everything.

    Raises
    ------
    ProfileError
        Where it is needed, and not known.
    """
    host = placement.host
    if host is None or not host.bounces:
        return segments
    if disk is None:
        raise ProfileError(
            "RAM does not hold all experts of this plan, and how fast the disk is has not been "
            "measured; run moepack profile --hardware-only"
        )
    sizes, classes = segments.stored_bytes, segments.classes
    if classes is not None:
        classes = classes._replace(read_s=seconds_of(classes.stored_bytes, disk))
    widest = max(len(place.hot) for place in placement.layers)
    from_disk = np.ones((len(sizes), widest, len(PARTS)), dtype=np.bool_)
    rows = {cut.layer: row for row, cut in enumerate(layout.layers)}
    tier = ram_tier(spec, layout, placement.layers, host.pinned_bytes, readers=placement.readers)
    for held in tier.held:
        from_disk[rows[held.layer], held.expert, PARTS.index(held.part)] = False
    if sizes.shape[1] == 1:  # one segment each: the part that is there
        part = np.where(segments.has_top, 0, 1)
        from_disk = np.take_along_axis(from_disk, part[:, None, None], axis=2)
    return segments._replace(
        read_s=seconds_of(sizes, disk),
        from_disk=from_disk,
        bounces=host.bounces,
        classes=classes,
    )


class Activations(NamedTuple):
    """The experts of one part of a trace in the order in which they are consumed.

    Attributes
    ----------
    tokens : int [T]
        Of the whole trace.
    order : int [T, L, K]
        Place of each in the trace's own order; the padding of smaller layers comes last.
    valid : bool [T, L, K]
        No padding.
    guess : int [T, L, K]
        Rank at which each was predicted; the number of ranks where it was not.
    right : bool [T, L, R]
        The expert predicted at each of the R ranks is activated.
    ids, predicted : int [T, L, K], [T, L, R]
        The experts themselves; 0 where there is none.
    """

    tokens: npt.NDArray[np.intp]
    order: Columns
    valid: Flags
    guess: Columns
    right: Flags
    ids: Columns
    predicted: Columns


def activations(tables: RoutingTables, tokens: npt.NDArray[np.intp]) -> Activations:
    """Put the experts of some tokens in the order of consumption, and match the predictions."""
    ids = tables.trace.ids[tokens].astype(np.intp)
    predicted = tables.trace.predicted[tokens].astype(np.intp)
    order = np.argsort(np.where(tables.valid, ids, NO_PREDICTION), axis=2, kind="stable")
    ids = np.take_along_axis(ids, order, axis=2)
    valid = np.take_along_axis(np.broadcast_to(tables.valid, ids.shape), order, axis=2)
    same = (ids[:, :, :, None] == predicted[:, :, None, :]) & valid[:, :, :, None]
    guess = np.where(same.any(axis=3), same.argmax(axis=3), predicted.shape[2])
    return Activations(
        tokens,
        order,
        valid,
        guess,
        same.any(axis=2),
        np.where(valid, ids, 0),
        np.where(predicted != NO_PREDICTION, predicted, 0),
    )


def perfect(found: Activations) -> Activations:
    """The same with every expert predicted, in the order of consumption."""
    guess = np.broadcast_to(np.arange(found.order.shape[2]), found.order.shape)
    return found._replace(guess=guess, right=found.valid, predicted=found.ids)


class DecodePasses(NamedTuple):
    """One token at a time through every layer that has experts.

    Attributes
    ----------
    compute_s, fetch_s : [T, L, K * G]
        In the order of consumption; see :class:`moepack.timeline.Work`.
    ahead_s : [T, L, D * G]
    ahead_of : int [T, L, K * G]
    hits : bool [T, L, K]
        The part that is cached first was resident.
    read_s, ahead_read_s
        Of the disk, before ``fetch_s`` and ``ahead_s``; None where RAM holds everything.
    fates : int8 [T, L, K]
        What is not exact (:mod:`moepack.on_miss`); None where everything is.
    """

    compute_s: Seconds
    fetch_s: Seconds
    ahead_s: Seconds
    ahead_of: Columns
    hits: Flags
    read_s: Seconds | None = None
    ahead_read_s: Seconds | None = None
    fates: npt.NDArray[np.int8] | None = None


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
        What becomes of each activated expert that is missing and was not asked for ahead, in the
        order of consumption (:mod:`moepack.on_miss`); None: it is fetched.
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
    if fates is not None:
        alone = (ahead_of == none).reshape(*found.valid.shape, parts).all(axis=3)
        fates = np.where(found.valid & ~held.all(axis=3) & alone, fates, np.int8(EXACT))
        _replace_missing(fetch_s, compute_s, np.repeat(fates, parts, axis=2), segments)
    compute_s += disturbance_s(fetch_s, segments)
    hits = _cached_first(held, segments) & found.valid
    made = DecodePasses(compute_s, fetch_s, ahead_s, ahead_of, hits, fates=fates)
    if segments.from_disk is None:
        return made
    layers = np.arange(len(segments.from_disk))[:, None]
    from_disk = segments.from_disk[layers, found.ids]
    ahead_from_disk = segments.from_disk[layers, guessed]
    return made._replace(
        read_s=read_seconds(segments, found.ids, fetch_s, from_disk),
        ahead_read_s=read_seconds(segments, guessed, ahead_s, ahead_from_disk),
    )


def _replace_missing(
    fetch_s: Seconds, compute_s: Seconds, fates: npt.NDArray[np.int8], segments: Segments
) -> None:
    """Give what is missing the times of what stands for it, in place, each [T, L, K * G]."""
    assert segments.low is not None, "low copies of nothing"
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


def disturbance_s(fetch_s: Seconds, segments: Segments) -> Seconds:
    """What transfers cost the computing thread: each its share, the first one the burst's as well.

    Parameters
    ----------
    fetch_s : [.., L, segments]
        As they are consumed; 0 where nothing is fetched.
    """
    comes = fetch_s > 0
    first = comes & (np.cumsum(comes, axis=-1) == 1)
    return np.asarray(comes * segments.transfer_s[:, None] + first * segments.burst_s[:, None])


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
