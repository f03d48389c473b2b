"""Slots of mixed layers: for the experts of each encoding a cache of their own.

Segments of different encodings differ in size, so an expert can only take the slot of one that is
stored alike. Each of these *classes* follows the rules of :mod:`moepack.residency` as if its
experts were a layer, but for time: every token of the layer passes in all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate

from moepack.budget import class_slots
from moepack.layout import LayerLayout
from moepack.plan import LayerPlacement, Policy
from moepack.residency import Access, ExpertCache, LayerCache
from moepack.segments import Part


class MixedCache:
    """One cache for each class, seen as the cache of a layer.

    Its slots are numbered through: those of the first class, then those of the second, and so on.

    Parameters
    ----------
    class_of : sequence of int
        Of every expert, which class it belongs to.
    slots : sequence of int
        Of every class, 0 to the number of its experts.
    hot : sequence of int
        Every expert of the layer, hottest first: each cache starts from the first of its own.
    half_life_tokens
        Where the policy is ``lfu_decay``, and only there.
    """

    def __init__(
        self,
        class_of: Sequence[int],
        slots: Sequence[int],
        hot: Sequence[int],
        policy: Policy,
        *,
        half_life_tokens: float | None = None,
    ) -> None:
        self._class_of = class_of
        # Experts are numbered within their class, in the order of their ids.
        self._number: list[int] = []
        self._experts: list[list[int]] = [[] for _ in slots]
        for expert, its in enumerate(class_of):
            self._number.append(len(self._experts[its]))
            self._experts[its].append(expert)
        self._first_slot = [0, *accumulate(slots)]
        self._caches = [
            ExpertCache(
                count,
                [self._number[expert] for expert in hot if class_of[expert] == its],
                policy,
                half_life_tokens=half_life_tokens,
            )
            for its, count in enumerate(slots)
        ]

    @property
    def resident(self) -> dict[int, int]:
        """See :meth:`moepack.residency.LayerCache.resident`."""
        found: dict[int, int] = {}
        for its, cache in enumerate(self._caches):
            found |= self._of_layer(its, cache.resident)
        return found

    def holds(self, expert: int) -> bool:
        """See :meth:`moepack.residency.LayerCache.holds`."""
        return self._caches[self._class_of[expert]].holds(self._number[expert])

    def step(self, tokens: Iterable[Sequence[int]], unkept: Collection[int] = ()) -> Access:
        """See :meth:`moepack.residency.LayerCache.step`."""
        divided: list[list[list[int]]] = [[] for _ in self._caches]
        for experts in tokens:
            mine: list[list[int]] = [[] for _ in self._caches]
            for expert in experts:
                mine[self._class_of[expert]].append(self._number[expert])
            for token, numbers in zip(divided, mine, strict=True):
                token.append(numbers)
        resident: dict[int, int] = {}
        admitted: dict[int, int] = {}
        passing: list[set[int]] = [set() for _ in self._caches]
        for expert in unkept:
            passing[self._class_of[expert]].add(self._number[expert])
        for its, (cache, token) in enumerate(zip(self._caches, divided, strict=True)):
            found = cache.step(token, passing[its])
            resident |= self._of_layer(its, found.resident)
            admitted |= self._of_layer(its, found.admitted)
        return Access(resident, admitted)

    def _of_layer(self, its: int, found: dict[int, int]) -> dict[int, int]:
        """Experts and slots of one class by the layer's numbers."""
        experts, first = self._experts[its], self._first_slot[its]
        return {experts[number]: first + slot for number, slot in found.items()}


def layer_cache(cut: LayerLayout, place: LayerPlacement, part: Part) -> LayerCache:
    """The cache of one part of a layer's experts, as an engine steps it.

    Raises
    ------
    PlanMismatchError
        When the slots of a mixed layer do not fit its encodings.
    """
    if not cut.encodings:
        slots = place.top_slots if part == "top" else place.bottom_slots
        return ExpertCache(slots, place.hot, place.policy, half_life_tokens=place.half_life_tokens)
    return MixedCache(
        cut.class_of(len(place.hot)),
        class_slots(cut, place),
        place.hot,
        place.policy,
        half_life_tokens=place.half_life_tokens,
    )


def starting(cut: LayerLayout, place: LayerPlacement, part: Part) -> tuple[int, ...]:
    """The experts whose part is resident before the first pass, as in :func:`layer_cache`.

    Raises
    ------
    PlanMismatchError
        As :func:`layer_cache`.
    """
    if not cut.encodings:
        return place.hot[: place.top_slots if part == "top" else place.bottom_slots]
    left = dict(zip(cut.classes, class_slots(cut, place), strict=True))
    found = []
    for expert in place.hot:
        name = cut.encodings[expert]
        if left[name]:
            left[name] -= 1
            found.append(expert)
    return tuple(found)
