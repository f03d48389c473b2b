"""What the segments of mixed layers take, expert by expert: for the replay.

Shapes as in :mod:`moepack.passes`; ``N`` counts the experts of the widest layer, ``C`` the
encodings of the layer that has most of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.budget import stored_bytes
from moepack.compute import ComputeProfile
from moepack.cost import LinkSeconds
from moepack.lane_clock import Columns, Flags, Seconds
from moepack.layout import LayerLayout
from moepack.model_spec import ModelSpec
from moepack.segments import PARTS, Part

Values = npt.NDArray[Any]


class SegmentClasses(NamedTuple):
    """Segments by their experts' encodings, under a layout that has mixed layers.

    Attributes
    ----------
    cuts : tuple of LayerLayout
        Of the layers with experts.
    place : int [L, N]
        Of every expert, the place of its encoding among those of its layer.
    stored_bytes, link_s, compute_s : [L, C, G]
        Of one transfer, and of one token's computing; 0 where there is no such segment.
    read_s : [L, C, G] or None
        Of the disk, where RAM does not hold everything.
    """

    cuts: tuple[LayerLayout, ...]
    place: Columns
    stored_bytes: npt.NDArray[np.int64]
    link_s: Seconds
    compute_s: Seconds
    read_s: Seconds | None = None

    def each(self, values: Values, experts: Columns) -> Values:
        """Of [L, C, G], what belongs to experts [.., L, K]: [.., L, K * G]."""
        rows = np.arange(len(self.place))[:, None]
        found = values[rows, self.place[rows, experts]]
        return found.reshape(*experts.shape[:-1], experts.shape[-1] * values.shape[2])

    def tally(self, flags: Flags, experts: Columns) -> npt.NDArray[np.int64]:
        """How many segments [T, L, K * G] of experts [T, L, K] are flagged, by class [L, C, G]."""
        rows = np.arange(len(self.place))[:, None]
        place = self.place[rows, experts][..., None]
        flagged = flags.reshape(*experts.shape, self.link_s.shape[2])
        classes = range(self.link_s.shape[1])
        return np.stack([(flagged & (place == its)).sum(axis=(0, 2)) for its in classes], axis=1)


def segment_classes(
    spec: ModelSpec,
    compute: ComputeProfile,
    layers: Sequence[LayerLayout],
    link: LinkSeconds,
    parts: int,
) -> SegmentClasses | None:
    """Sizes and times of every layer's segments by encoding; None where no layer is mixed.

    Parameters
    ----------
    parts
        Segments of an expert: 1 where no layer is cut.
    """
    if not any(cut.encodings for cut in layers):
        return None
    counts = [spec.moe(cut.layer).num_experts for cut in layers]
    shape = len(layers), max(len(cut.classes) for cut in layers), len(PARTS)
    sizes = np.zeros(shape, dtype=np.int64)
    compute_s = np.zeros(shape)
    place = np.zeros((len(counts), max(counts)), dtype=np.intp)
    for row, (cut, count) in enumerate(zip(layers, counts, strict=True)):
        place[row, :count] = cut.class_of(count)
        entry, two = compute.layer(cut.layer), 0 < cut.split < cut.width
        for its, name in enumerate(cut.classes):
            sizes[row, its] = [stored_bytes(spec, cut, part, name) for part in PARTS]
            expert_s = entry.expert_times(name, cut=two).at(1)
            compute_s[row, its] = expert_s * cut.split_ratio, expert_s * (1.0 - cut.split_ratio)
    if parts == 1:
        sizes, compute_s = (values.sum(axis=2, keepdims=True) for values in (sizes, compute_s))
    return SegmentClasses(tuple(layers), place, sizes, seconds_of(sizes, link), compute_s)


def seconds_of(sizes: npt.NDArray[np.int64], link: LinkSeconds) -> Seconds:
    """Seconds of one transfer of each size; 0 of none."""
    known = {int(size): link(int(size)) for size in np.unique(sizes) if size}
    seconds: Seconds = np.zeros(sizes.shape)
    for size, taken_s in known.items():
        seconds[sizes == size] = taken_s
    return seconds


def whole_part(cut: LayerLayout) -> Part:
    """The part that the whole experts of a layer are."""
    return "top" if cut.split else "bottom"
