"""How many bytes of the fast tier a placement takes: the contract between planner and runtime.

The planner reserves exactly what the runtime allocates, because both ask here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moepack.errors import PlanMismatchError
from moepack.footprint import MemoryBreakdown
from moepack.layout import LayerLayout, Layout
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement, Placement, SharedPool
from moepack.segments import PARTS, Part, SegmentShape, align_up, segment_shape
from moepack.trunk import stored_trunk
from moepack.working_memory import hidden_bytes, kv_bytes, workspace_bytes

#: Every loaded trunk tensor starts on a cache line: matrix kernels may round differently elsewhere.
TRUNK_ALIGNMENT_BYTES = 64


def layer_segment(
    spec: ModelSpec, layout: LayerLayout, part: Part, name: str | None = None
) -> SegmentShape | None:
    """Geometry of one part of a layer's experts under its layout.

    Parameters
    ----------
    name
        Of a mixed layer those experts that are stored in the encoding of this name; None, here and
        below: those that take most bytes, which in any other layer are all.
    """
    moe = spec.moe(layout.layer)
    name = name or layout.encoding
    return segment_shape(moe, spec.hidden_size, name, layout.split, part, bias_dtype=spec.dtype)


def stored_bytes(spec: ModelSpec, layout: LayerLayout, part: Part, name: str | None = None) -> int:
    """Stored bytes of one part of one expert; 0 where the part is empty."""
    shape = layer_segment(spec, layout, part, name)
    return 0 if shape is None else shape.stored_bytes


def layer_bytes(spec: ModelSpec, layout: LayerLayout) -> int:
    """Stored bytes of all parts of all experts of a layer."""
    experts = spec.moe(layout.layer).num_experts
    return sum(
        count * stored_bytes(spec, layout, part, name)
        for name, count in layout.class_sizes(experts).items()
        for part in PARTS
    )


def require_low_copies(spec: ModelSpec, layout: Layout) -> None:
    """Refuse low copies that experts do not fit, or that take no less than the experts themselves.

    A low copy passes through the room of the part that it stands for.

    Raises
    ------
    UnknownEncodingError, GroupMismatchError
        When the experts cannot be stored so, or not where they are cut.
    PlanMismatchError
        When a copy would take as much as its expert.
    """
    for cut, low in zip(layout.layers, layout.low_layers, strict=False):
        if cut.encodings:
            raise PlanMismatchError(
                f"layer {cut.layer} holds experts in {', '.join(cut.classes)} and is to have low "
                "copies; expected experts that are stored alike; plan again"
            )
        pairs = [(stored_bytes(spec, cut, part), stored_bytes(spec, low, part)) for part in PARTS]
        if any(small > large for large, small in pairs) or not any(
            small < large for large, small in pairs
        ):
            whole, copy = (sum(sizes) for sizes in zip(*pairs, strict=True))
            raise PlanMismatchError(
                f"an expert of layer {cut.layer} takes {whole} bytes in {cut.encoding}, its low "
                f"copy {copy} in {layout.low}; expected fewer: choose an encoding of fewer bits"
            )


def class_slots(layout: LayerLayout, placement: LayerPlacement) -> tuple[int, ...]:
    """How many slots the experts of each of a layer's encodings have.

    Of the one part that they have; where all are stored alike, of tops and bottoms together.

    Raises
    ------
    PlanMismatchError
        When the slots of a mixed layer do not fit its encodings.
    """
    slots = placement.top_slots + placement.bottom_slots
    if not layout.encodings:
        if placement.class_slots:
            raise PlanMismatchError(
                f"layer {layout.layer} is placed with slots for {len(placement.class_slots)} "
                "encodings and its experts are stored alike; plan again"
            )
        return (slots,)
    members = layout.class_sizes(len(layout.encodings))
    sizes = tuple(members.values())
    if 0 < layout.split < layout.width:
        raise PlanMismatchError(
            f"layer {layout.layer} holds experts in {len(sizes)} encodings and cuts them at "
            f"{layout.split} of {layout.width} neurons; expected whole experts; plan again"
        )
    found = placement.class_slots
    if not found and slots in (0, len(layout.encodings)):
        found = sizes if slots else (0,) * len(sizes)
    fits = len(found) == len(sizes)
    if not fits or any(count > size for count, size in zip(found, sizes, strict=True)):
        raise PlanMismatchError(
            f"layer {layout.layer} has slots for {found or slots} experts and "
            f"{', '.join(f'{count} in {name}' for name, count in members.items())}; expected so "
            "many of each at most; plan again"
        )
    return found


def trunk_bytes(spec: ModelSpec, trunk: str = "") -> int:
    """Bytes of the loaded trunk: each tensor from a cache line on, all in whole pages.

    Parameters
    ----------
    trunk
        What its large matrices are stored in (:mod:`moepack.trunk`), here and below.
    """
    tensors = stored_trunk(spec, trunk) if trunk else spec.trunk
    return align_up(sum(align_up(tensor.size_bytes, TRUNK_ALIGNMENT_BYTES) for tensor in tensors))


def fixed_bytes(
    spec: ModelSpec,
    context_tokens: int,
    block_tokens: int,
    *,
    threads: int = 1,
    encodings: Collection[str] = (),
    trunk: str = "",
) -> int:
    """Bytes that every placement takes, before the first expert: trunk, cache, buffers.

    ``encodings``: those of the layers.
    """
    return (
        trunk_bytes(spec, trunk)
        + kv_bytes(spec, context_tokens, block_tokens)
        + hidden_bytes(spec, context_tokens)
        + workspace_bytes(
            spec, context_tokens, block_tokens, threads=threads, encodings=encodings, trunk=trunk
        )
    )


def staging_bytes(spec: ModelSpec, layout: Layout, staging_experts: int) -> int:
    """Bytes of the staging buffer: whole experts of the layer whose experts are largest."""
    whole = max(sum(stored_bytes(spec, layer, part) for part in PARTS) for layer in layout.layers)
    return staging_experts * whole


def slots_bytes(spec: ModelSpec, layout: LayerLayout, placement: LayerPlacement) -> int:
    """Bytes of one layer's slots.

    Raises
    ------
    PlanMismatchError
        When those of a mixed layer do not fit its encodings, here and below.
    """
    if layout.encodings:
        counts = zip(layout.classes, class_slots(layout, placement), strict=True)
        return sum(
            count * stored_bytes(spec, layout, part, name)
            for name, count in counts
            for part in PARTS
        )
    return placement.top_slots * stored_bytes(
        spec, layout, "top"
    ) + placement.bottom_slots * stored_bytes(spec, layout, "bottom")


def memory_breakdown(
    spec: ModelSpec,
    layout: Layout,
    layers: Sequence[LayerPlacement],
    *,
    staging_experts: int,
    context_tokens: int,
    threads: int = 1,
    pool: SharedPool | None = None,
) -> MemoryBreakdown:
    """Every byte of the fast tier, by purpose."""
    block = layout.prefill_block_tokens
    return MemoryBreakdown(
        trunk_bytes=trunk_bytes(spec, layout.trunk),
        kv_bytes=kv_bytes(spec, context_tokens, block),
        hidden_bytes=hidden_bytes(spec, context_tokens),
        workspace_bytes=workspace_bytes(
            spec,
            context_tokens,
            block,
            threads=threads,
            encodings=layout.encodings,
            trunk=layout.trunk,
        ),
        staging_bytes=staging_bytes(spec, layout, staging_experts),
        slots_bytes=sum(
            slots_bytes(spec, cut, place) for cut, place in zip(layout.layers, layers, strict=True)
        )
        + (pool.slots * stored_bytes(spec, layout.layers[0], "top") if pool else 0),
    )


def placement_memory(spec: ModelSpec, layout: Layout, placement: Placement) -> MemoryBreakdown:
    """What a placement takes of the fast tier, whatever it says of it itself."""
    return memory_breakdown(
        spec,
        layout,
        placement.layers,
        staging_experts=placement.staging_experts,
        context_tokens=placement.context_tokens,
        threads=placement.threads,
        pool=placement.pool,
    )


def slow_bytes(spec: ModelSpec, layout: Layout) -> int:
    """Stored bytes of every segment: what the slow tier holds."""
    return sum(layer_bytes(spec, cut) for cut in layout.layers)
