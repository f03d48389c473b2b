"""Low copies beside the experts of a plan: the room that they take, and the plan that has them.

Everything else is planned as if there were none, with the memory that remains: which experts stay
is chosen for exact misses, and only what the choice is expected to do is priced with the others.
"""

from __future__ import annotations

from dataclasses import replace

from moepack.budget import placement_memory, require_low_copies
from moepack.encodings import encoding
from moepack.errors import CapabilityError, PlanMismatchError
from moepack.layout import LayerLayout
from moepack.layouts import cut_layout
from moepack.placements import place_layer
from moepack.plan import LayerPlacement, Placement
from moepack.plan_request import PlanRequest
from moepack.segments import cuts
from moepack.strategies import Contender
from moepack.working_memory import workspace_bytes


def without_low_copies(request: PlanRequest) -> PlanRequest:
    """The request to be planned for first: of the memory that low copies leave.

    Raises
    ------
    CapabilityError
        When the engine does not take low copies on this device.
    PlanMismatchError
        When a layout is kept that has others, or none.
    EncodingError
        When the experts cannot be stored so.
    """
    if request.on_miss is not None and request.device not in request.engine.low_copies:
        able = ", ".join(request.engine.low_copies) or "none"
        raise CapabilityError(
            f"misses are to be replaced by low copies on {request.device}; this engine does on "
            f"{able}: plan without --on-miss"
        )
    kept = request.keep_layout
    if kept is not None and request.low != kept.low:
        raise PlanMismatchError(
            f"the pack whose layout is kept has low copies in {kept.low or 'no encoding'}, asked "
            f"for were some in {request.low or 'none'}; plan without --keep-layout, and pack again"
        )
    if not request.low:
        return request
    layout = kept or request.whole_layout
    require_low_copies(request.spec, replace(layout, low=request.low))
    bare = replace(layout, low="")
    with_low, without = (
        workspace_bytes(
            request.spec,
            request.context_tokens,
            layout.prefill_block_tokens,
            threads=request.compute.threads,
            encodings=encodings,
            trunk=layout.trunk,
        )
        for encodings in (bare.encodings | {request.low}, bare.encodings)
    )
    return replace(
        request,
        fast_budget_bytes=max(0, request.fast_budget_bytes - (with_low - without)),
        keep_layout=None if kept is None else bare,
        low="",
        on_miss=None,
    )


def with_low_copies(request: PlanRequest, found: Contender) -> Contender:
    """What was found for :func:`without_low_copies`, with the low copies.

    A layer that is cut where they cannot be is cut at the nearest place where they can, and its
    budget is spent anew.
    """
    if not request.low:
        return found
    multiple = encoding(request.low).multiple
    layers, places = [], []
    for cut, place in zip(found.layout.layers, found.placement.layers, strict=True):
        suited = _suited(request, cut, multiple)
        layers.append(suited)
        places.append(place if suited == cut else _placed_again(request, suited, place))
    layout = replace(found.layout, layers=tuple(layers), low=request.low)

    def placed() -> Placement:
        changed = replace(found.placement, layers=tuple(places), on_miss=request.on_miss)
        return replace(changed, memory=placement_memory(request.spec, layout, changed))

    # What is cut elsewhere is padded otherwise, in every frame: a slot may have to go for that.
    while placed().memory.total_bytes > request.fast_budget_bytes and _drop_slot(places):
        pass
    return found._replace(layout=layout, placement=placed())


def _suited(request: PlanRequest, cut: LayerLayout, multiple: int) -> LayerLayout:
    if cut.split % multiple == 0:
        return cut
    spec = request.spec
    options = cuts(spec.moe(cut.layer), spec.hidden_size, cut.encoding)
    nearest = min(
        (split for split in options if split % multiple == 0),
        key=lambda split: abs(split - cut.split),
    )
    return cut_layout(spec, cut.layer, nearest, cut.encoding)


def _placed_again(request: PlanRequest, cut: LayerLayout, place: LayerPlacement) -> LayerPlacement:
    slots = place_layer(request, cut, place.hot, place.budget_bytes, policy="lru")
    return replace(place, top_slots=slots.top_slots, bottom_slots=slots.bottom_slots)


def _drop_slot(places: list[LayerPlacement]) -> bool:
    """Take a slot from the layer that has most; False where none has any."""

    def slots(place: LayerPlacement) -> int:
        return place.top_slots + place.bottom_slots

    at = max(range(len(places)), key=lambda index: slots(places[index]))
    place = places[at]
    if not slots(place):
        return False
    if place.bottom_slots:
        places[at] = replace(place, bottom_slots=place.bottom_slots - 1)
    else:
        places[at] = replace(place, top_slots=place.top_slots - 1)
    return True
