"""Sizes and times of the segments of a layout's experts: over the link, computed, from the disk.

Shapes: ``L`` layers with experts, ``K`` experts of a token, ``N`` of the widest layer, ``G``
segments of an expert (1 where no layer is cut, else 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.budget import stored_bytes
from moepack.compute import ComputeProfile
from moepack.cost import LinkSeconds
from moepack.errors import ProfileError
from moepack.lane_clock import NEVER, Columns, Costs, Flags, Seconds
from moepack.layout import LayerLayout, Layout
from moepack.model_spec import ModelSpec
from moepack.plan import Placement
from moepack.ram_tier import ram_tier
from moepack.segment_classes import SegmentClasses, seconds_of, segment_classes
from moepack.segments import PARTS, PIECE_BYTES


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
    costs
        What transfers cost the computing thread beside one token, each [L].
    prompt_costs
        The same of a pass over a prompt, where it does not matter when they were asked for: there
        is always something to compute.
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
    in_pieces
        Whether transfers ahead go in pieces, behind which they can be broken off.
    """

    stored_bytes: npt.NDArray[np.int64]
    link_s: Seconds
    compute_s: Seconds
    share: Seconds
    costs: Costs
    prompt_costs: Costs
    has_top: Flags
    interior: Flags
    read_s: Seconds | None = None
    from_disk: Flags | None = None
    bounces: int = 0
    low: LowCopies | None = None
    classes: SegmentClasses | None = None
    in_pieces: bool = False

    def piece_s(self) -> Seconds:
        """Seconds of the link for a piece of a transfer; see :data:`moepack.segments.PIECE_BYTES`.

        Where transfers cannot be broken off, of all of it.
        """
        pieces = self.stored_bytes / PIECE_BYTES if self.in_pieces else 1.0
        return np.where(self.link_s > 0.0, self.link_s / np.maximum(pieces, 1.0), NEVER)

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
    demanded = np.array([(entry.transfer_s, entry.burst_s) for entry in entries]).T
    ahead = np.array([entry.of_ahead for entry in entries]).T
    of_prompt = np.array([entry.of_prompt for entry in entries]).T
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
        Costs(*demanded, *ahead),
        Costs(*of_prompt, *of_prompt),
        has_top,
        interior,
        classes=classes,
        in_pieces=compute.device == "cpu",
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
