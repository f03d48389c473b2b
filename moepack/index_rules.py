"""The rules of a manifest that can be checked against the manifest itself.

Does the index describe this model under this layout, whole? Each broken rule has its own error. The
rules that need the files are in :mod:`moepack.file_rules`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from moepack.budget import layer_segment, require_low_copies
from moepack.encodings import ENCODINGS
from moepack.errors import DeclaredSizeError, EncodingError, PackFormatError, PlanError
from moepack.layout import LayerLayout, Layout
from moepack.manifest import TRUNK_FILE, Manifest, SegmentGroup
from moepack.model_spec import DTYPE_BYTES, ModelSpec
from moepack.segments import BASE, LOW, PARTS, align_up
from moepack.trunk import TRUNK_ENCODINGS, stored_trunk
from moepack.units import TIB, format_size

#: More than thirty times the largest open model.
MAX_DECLARED_BYTES = 64 * TIB

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(manifest: Manifest) -> None:
    """The index describes this model, under this layout, and leaves nothing out.

    Raises
    ------
    DeclaredSizeError
        When the model is larger than any real one.
    PackFormatError
        For every other disagreement.
    """
    spec, layout = manifest.spec, manifest.layout
    _check_sizes(spec)
    require(layout.model_digest == spec.digest, "the layout is for another model than the spec")
    require(layout.digest == manifest.layout_digest, "the layout does not match its digest")
    require(
        tuple(cut.layer for cut in layout.layers) == spec.moe_layers,
        "the layers of the layout are not the layers with experts",
    )
    for cut in layout.layers:
        _check_cut(spec, cut)
    _check_low_copies(spec, layout)
    calibration = layout.calibration
    require(
        not calibration or (_SHA256.fullmatch(calibration) is not None and layout.is_rounded),
        f"the calibration {calibration!r}; expected a SHA-256, of a layout with rounded experts",
    )
    _check_groups(manifest)
    require(
        layout.trunk in TRUNK_ENCODINGS, f"the trunk is encoded as {layout.trunk!r}, expected INT8"
    )
    names = tuple(tensor.name for tensor in stored_trunk(spec, layout.trunk))
    require(
        tuple(item.name for item in manifest.trunk) == names,
        "the trunk's index does not list the model's trunk tensors in order",
    )
    for digest in _digests(manifest):
        require(_SHA256.fullmatch(digest) is not None, f"{digest!r} is not a SHA-256")


def _check_cut(spec: ModelSpec, cut: LayerLayout) -> None:
    """A layer is cut as its experts can be."""
    moe = spec.moe(cut.layer)
    width = moe.intermediate_size
    require(
        cut.width == width and 0 <= cut.split <= width,
        f"layer {cut.layer} is split at {cut.split} of {cut.width}, its width is {width}",
    )
    require(
        not cut.encodings or len(cut.encodings) == moe.num_experts,
        f"layer {cut.layer} has encodings of {len(cut.encodings)} experts, and {moe.num_experts}",
    )
    for name in cut.classes:
        require(name in ENCODINGS, f"layer {cut.layer} is encoded as {name!r}")
        # Version 1, in which one cannot be told from the other, knows no mixed layers.
        require(
            not cut.encodings or name == spec.dtype or ENCODINGS[name].quantised,
            f"layer {cut.layer} mixes {name} with other encodings, the model is {spec.dtype}",
        )
        try:
            layer_segment(spec, cut, "top", name)
        except EncodingError as failure:
            raise PackFormatError(f"manifest.json: layer {cut.layer}: {failure}") from None


def _check_low_copies(spec: ModelSpec, layout: Layout) -> None:
    """Low copies can be of this encoding, and are smaller than what they stand for."""
    low = layout.low
    require(not low or low in ENCODINGS, f"low copies are encoded as {low!r}")
    require(not low or ENCODINGS[low].quantised, f"low copies are {low}, which is not quantised")
    try:
        require_low_copies(spec, layout)
    except PlanError as failure:
        raise PackFormatError(f"manifest.json: low copies: {failure}") from None


def _check_sizes(spec: ModelSpec) -> None:
    """Refuse sizes that no model has before anything is computed from them."""
    require(spec.hidden_size > 0, f"a hidden size of {spec.hidden_size}")
    require(spec.dtype in DTYPE_BYTES, f"the dtype {spec.dtype!r}")
    for info in spec.trunk:
        require(info.dtype in DTYPE_BYTES, f"{info.name} has the dtype {info.dtype!r}")
        require(all(size > 0 for size in info.shape), f"{info.name} has the shape {info.shape}")
        check_plausible(info.name, info.size_bytes)
    for number in spec.moe_layers:
        moe = spec.moe(number)
        require(
            moe.num_experts > 0 and moe.intermediate_size > 0,
            f"layer {number} has {moe.num_experts} experts of width {moe.intermediate_size}",
        )
        check_plausible(f"layer {number}", moe.num_experts * spec.expert_bytes(number))


def _check_groups(manifest: Manifest) -> None:
    """Every expert has its segments, each once and of the geometry of its layout."""
    spec, layout = manifest.spec, manifest.layout
    cuts = {(cut.layer, BASE): cut for cut in layout.layers}
    cuts |= {(cut.layer, LOW): cut for cut in layout.low_layers}
    laid_out = {
        (cut.layer, part, variant): {
            name: layer_segment(spec, cut, part, name) for name in cut.classes
        }
        for (_, variant), cut in cuts.items()
        for part in PARTS
        if layer_segment(spec, cut, part) is not None
    }
    experts: defaultdict[tuple[int, str, str], list[int]] = defaultdict(list)
    contents: dict[str, tuple[int, str, str] | None] = {TRUNK_FILE: None}
    for group in manifest.groups:
        what = f"layer {group.layer}, {group.part} ({group.variant})"
        key = (group.layer, group.part, group.variant)
        if (group.layer, group.part, BASE) not in laid_out:
            raise _refused(f"{what} is not part of the layout")
        if key in laid_out:
            require(
                group.shape == laid_out[key].get(group.encoding),
                f"the segments of {what} are not cut as the layout says",
            )
            _check_members(what, cuts[group.layer, group.variant], group)
        else:
            _check_shape(what, group)
        require(
            contents.setdefault(group.shard, key) == key,
            f"{group.shard} holds {what} and something else",
        )
        experts[key] += [item.expert for item in group.segments]
    for (layer, part, variant), numbers in experts.items():
        known = range(spec.moe(layer).num_experts)
        what = f"layer {layer}, {part} ({variant})"
        require(len(set(numbers)) == len(numbers), f"{what} lists an expert twice")
        require(all(number in known for number in numbers), f"{what} lists an unknown expert")
    for layer, part, variant in laid_out:
        missing = spec.moe(layer).num_experts - len(experts[layer, part, variant])
        what = f"layer {layer}, {part}" + ("" if variant == BASE else f" ({variant})")
        require(missing == 0, f"{what} lacks {missing} experts")


def _check_members(what: str, cut: LayerLayout, group: SegmentGroup) -> None:
    """The experts of a group are stored in its encoding."""
    for item in group.segments if cut.encodings else ():
        known = 0 <= item.expert < len(cut.encodings)
        require(
            known and cut.encodings[item.expert] == group.encoding,
            f"{what} lists expert {item.expert} as {group.encoding}, the layout does not",
        )


def _check_shape(what: str, group: SegmentGroup) -> None:
    """The geometry of a variant that the layout does not describe is consistent in itself."""
    shape = group.shape
    starts_bytes = [tensor.offset_bytes for tensor in shape.tensors]
    require(
        starts_bytes == sorted(starts_bytes)
        and starts_bytes[:1] == [0]
        and starts_bytes[-1] <= shape.size_bytes
        and shape.stored_bytes == align_up(shape.size_bytes),
        f"the tensors of {what} do not fill their segment",
    )


def _digests(manifest: Manifest) -> Iterator[str]:
    yield from (shard.header_sha256 for shard in manifest.shards)
    yield from (item.sha256 for item in manifest.trunk)
    yield from (item.sha256 for item in manifest.auxiliary)
    yield from (item.sha256 for group in manifest.groups for item in group.segments)


def require(holds: bool, what: str) -> None:
    """Refuse the manifest for what it says, unless the rule holds."""
    if not holds:
        raise _refused(what)


def _refused(what: str) -> PackFormatError:
    return PackFormatError(f"manifest.json: {what}; pack again")


def check_plausible(what: str, size_bytes: int) -> None:
    """Refuse a size that no model has."""
    if size_bytes > MAX_DECLARED_BYTES:
        raise DeclaredSizeError(
            f"manifest.json: {what} declares {format_size(size_bytes)}, expected at most "
            f"{format_size(MAX_DECLARED_BYTES)} in all; do not use this folder"
        )
