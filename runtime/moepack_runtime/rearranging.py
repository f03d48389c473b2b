"""Slots change hands between layers: nothing is allocated, nothing is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from moepack.errors import BudgetTooSmallError, PlanMismatchError
from moepack.plan import LayerPlacement, Placement
from moepack.segments import Part
from moepack_runtime.experts import ExpertMemory, Load
from moepack_runtime.pieces import Piece
from moepack_runtime.slots import LayerSlots


def require_same_slots(
    placement: Placement, memory: ExpertMemory, layers: Sequence[LayerPlacement]
) -> None:
    """Refuse layers that the slots of a placement, divided otherwise, do not give.

    Raises
    ------
    PlanMismatchError, BudgetTooSmallError
        See :meth:`moepack_runtime.engine.Engine.rearrange`.
    """
    if placement.pool is not None:
        raise PlanMismatchError(
            f"all layers share {placement.pool.slots} slots, so that none can move between them; "
            "expected a plan whose layers have slots of their own"
        )
    mixed = [number for number, layer in memory.layers.items() if layer.is_mixed]
    if mixed:
        raise PlanMismatchError(
            f"layer {mixed[0]} holds experts in several encodings, and slots of as many sizes, "
            "which do not move; expected a plan whose layers each have one encoding"
        )
    before = [_without_slots(place) for place in placement.layers]
    if [_without_slots(place) for place in layers] != before:
        raise PlanMismatchError(
            "a running engine was given layers that differ in more than slots, budgets and hot "
            "rankings; expected the policies and the prefetching of its own; open it again"
        )
    counts: Counter[int] = Counter()
    for place in layers:
        layer = memory.layers[place.layer]
        for part, count in _counts(place).items():
            if part in layer.slots:
                counts[layer.slot_bytes(part)] += count
            elif count:
                raise PlanMismatchError(
                    f"layer {place.layer} was given {count} slots for {part}s and has none"
                )
    held = Counter(piece.memory.nbytes for piece in _all(memory))
    for size_bytes, count in counts.items():
        if count > held[size_bytes]:
            missing_bytes = (count - held[size_bytes]) * size_bytes
            raise BudgetTooSmallError(
                f"{count} slots of {size_bytes} bytes were asked for and the plan has "
                f"{held[size_bytes]}: {missing_bytes} bytes are missing; expected no more",
                missing_bytes=missing_bytes,
            )


def rearrange(memory: ExpertMemory, layers: Sequence[LayerPlacement]) -> int:
    """Divide the slots otherwise, and load what comes. Between two passes.

    Parameters
    ----------
    layers
        For which there are slots enough: see :func:`require_same_slots`.

    Returns
    -------
    int
        Bytes of the slots that a layer has and did not have before.
    """
    memory.come_to_rest()
    spare: dict[int, list[Piece]] = {}
    for piece in memory.spare:
        spare.setdefault(piece.memory.nbytes, []).append(piece)
    growing: list[tuple[LayerSlots, Part, int, LayerPlacement]] = []
    for place in layers:
        layer = memory.layers[place.layer]
        for part, slots in layer.slots.items():
            count = _counts(place)[part]
            more = count - len(slots.pieces)
            if more > 0:
                growing.append((layer, part, more, place))
            else:
                freed = layer.shrink(part, count, place.hot)
                spare.setdefault(layer.slot_bytes(part), []).extend(freed)
    loads, moved_bytes = [], 0
    for layer, part, more, place in growing:
        free = spare[layer.slot_bytes(part)]
        taken = [free.pop() for _ in range(more)]
        loads.append(Load(layer, part, layer.grow(part, taken, place.hot)))
        moved_bytes += more * layer.slot_bytes(part)
    memory.spare = [piece for of_size in spare.values() for piece in of_size]
    memory.fill(loads)
    return moved_bytes


def _without_slots(place: LayerPlacement) -> LayerPlacement:
    experts = tuple(range(len(place.hot)))
    return replace(place, budget_bytes=0, top_slots=0, bottom_slots=0, hot=experts)


def _counts(place: LayerPlacement) -> dict[Part, int]:
    return {"top": place.top_slots, "bottom": place.bottom_slots}


def _all(memory: ExpertMemory) -> Iterator[Piece]:
    """The memory of every slot there is."""
    yield from memory.spare
    for layer in memory.layers.values():
        for slots in layer.slots.values():
            yield from slots.pieces
