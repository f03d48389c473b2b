"""The shards that a layout consists of, before any is written (:mod:`moepack.shard_writer`).

Shards are written in *units* that finish together: the trunk, then each layer's top and bottom,
because an expert is read once and cut into both. A layer's low copies are a unit of their own,
which takes reading its experts again: so a pack without them gives a pack with them all the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from moepack.budget import layer_segment
from moepack.layout import LayerLayout, Layout
from moepack.manifest import (
    TRUNK_FILE,
    SegmentGroup,
    ShardEntry,
    TrunkEntry,
    shard_file,
    version_for,
)
from moepack.model_spec import ModelSpec
from moepack.records import record
from moepack.rounding import CALIBRATED_ROUNDING, ROUNDING
from moepack.safetensors_io import ShardDraft, draft_shard
from moepack.segments import (
    BASE,
    LOW,
    PARTS,
    Part,
    SegmentShape,
)
from moepack.trunk import stored_trunk


class Cut(NamedTuple):
    """The part of a layer's experts that a shard holds.

    ``shapes`` is what a segment of each of the layer's encodings holds; the layer of a variant is
    that of :attr:`moepack.layout.Layout.low_layers`.
    """

    layout: LayerLayout
    part: Part
    shapes: Mapping[str, SegmentShape]
    variant: str = BASE

    def shape(self, expert: int) -> SegmentShape:
        """What the segment of one expert holds."""
        return self.shapes[self.layout.encoding_of(expert)]

    @property
    def largest_bytes(self) -> int:
        """Of the largest of its segments."""
        return max(shape.size_bytes for shape in self.shapes.values())


class Shard(NamedTuple):
    """One shard to write. ``cut`` is None for the trunk."""

    path: str
    draft: ShardDraft
    cut: Cut | None

    @property
    def entry(self) -> ShardEntry:
        """As the manifest lists it."""
        header = self.draft.header
        digest = hashlib.sha256(header).hexdigest()
        return ShardEntry(self.path, self.draft.size_bytes, len(header), digest)


class Unit(NamedTuple):
    """Shards that are finished together. ``layer`` is None for the trunk."""

    layer: int | None
    shards: tuple[Shard, ...]
    variant: str = BASE

    @property
    def name(self) -> str:
        """For the journal."""
        if self.layer is None:
            return "trunk"
        return f"layer {self.layer}" + ("" if self.variant == BASE else f" ({self.variant})")

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(shard.draft.size_bytes for shard in self.shards)


@record
class FinishedUnit:
    """What the manifest will say of a unit whose files are written."""

    name: str
    shards: tuple[ShardEntry, ...]
    trunk: tuple[TrunkEntry, ...]
    groups: tuple[SegmentGroup, ...]


def draft_units(spec: ModelSpec, layout: Layout) -> tuple[Unit, ...]:
    """Every shard of a pack, in the order of the manifest: sizes and headers, no data."""
    units = [Unit(None, (Shard(TRUNK_FILE, _draft_trunk(spec, layout.trunk), None),))]
    low_layers = layout.low_layers or (None,) * len(layout.layers)
    for cut, low in zip(layout.layers, low_layers, strict=True):
        units.append(_draft_layer(spec, cut, BASE, layout.calibration))
        if low is not None:
            units.append(_draft_layer(spec, low, LOW, layout.calibration))
    return tuple(units)


def _draft_trunk(spec: ModelSpec, trunk: str) -> ShardDraft:
    fields = {"content": "trunk"}
    if trunk:
        fields |= {"encoding": trunk, "rounding": str(ROUNDING)}
    metadata = _metadata(version=version_for((), trunk), **fields)
    return draft_shard(([tensor] for tensor in stored_trunk(spec, trunk)), metadata)


def _draft_layer(spec: ModelSpec, layout: LayerLayout, variant: str, calibration: str) -> Unit:
    layer = layout.layer
    shards = []
    for part in PARTS:
        shapes = {
            name: shape
            for name in layout.classes
            if (shape := layer_segment(spec, layout, part, name)) is not None
        }
        if shapes:
            cut = Cut(layout, part, shapes, variant)
            draft = _draft_experts(cut, spec.moe(layer).num_experts, calibration)
            shards.append(Shard(shard_file(layer, part, variant), draft, cut))
    return Unit(layer, tuple(shards), variant)


def _draft_experts(cut: Cut, experts: int, calibration: str) -> ShardDraft:
    layer, names = cut.layout.layer, cut.layout.classes
    blocks = (
        [
            replace(item, name=f"layers.{layer}.experts.{expert}.{item.name}")
            for item in cut.shape(expert).tensors
        ]
        for expert in range(experts)
    )
    fields = {"layer": str(layer), "part": cut.part, "variant": cut.variant}
    version = version_for(names)
    if version > 1:
        # Part of the header, by which layers are reused: codes of another search are made anew.
        rounding = CALIBRATED_ROUNDING if calibration else ROUNDING
        fields |= {"encoding": ",".join(names), "rounding": str(rounding)}
        if calibration:
            fields["calibration"] = calibration
    return draft_shard(blocks, _metadata(version=version, content="experts", **fields))


def _metadata(*, version: int = 1, **fields: str) -> dict[str, str]:
    return {"format": "moepack", "version": str(version), **fields}
