"""The caches of a placement, stepped over a trace as an engine steps them, by its rules.

:mod:`moepack.stack_ranks` says the same of whole traces much faster, where whatever is used is
admitted. That is not so where missing experts are replaced or left out (:mod:`moepack.on_miss`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from moepack.lane_clock import Flags
from moepack.mixed_residency import layer_cache
from moepack.on_miss import EXACT, fates
from moepack.plan import LayerPlacement, Placement
from moepack.residency import ExpertCache, LayerCache, SharedCache
from moepack.routing_tables import RoutingTables
from moepack.segment_classes import whole_part
from moepack.segment_times import Segments


class SteppedCaches:
    """The caches of one placement, from its start on.

    Parameters
    ----------
    segments
        Of the layout that is placed.
    """

    def __init__(self, tables: RoutingTables, placement: Placement, segments: Segments) -> None:
        self._tables = tables
        self._placement = placement
        self._parts = segments.stored_bytes.shape[1]
        # One for each of a layer's segments; None where there is no such segment.
        self._layers: list[tuple[LayerCache | None, ...]] = []
        hot = [place.hot for place in placement.layers]
        if placement.pool is not None:
            pool = SharedCache(placement.pool.slots, hot, placement.pool.policy)
            self._layers = [(pool.layer(index),) for index in range(len(hot))]
            return
        for index, place in enumerate(placement.layers):
            slots = [place.top_slots, place.bottom_slots]
            if self._parts == 1:
                slots = [sum(slots)]
            mixed = segments.mixed(index)
            caches = (
                ExpertCache(count, place.hot, place.policy, half_life_tokens=place.half_life_tokens)
                if mixed is None
                else layer_cache(mixed, place, whole_part(mixed))
                for count in slots
            )
            sizes = segments.stored_bytes[index]
            self._layers.append(
                tuple(cache if size else None for cache, size in zip(caches, sizes, strict=True))
            )

    def all_held(self) -> Flags:
        """What is resident now, bool [L, N, G]."""
        widest = max(shape.num_experts for shape in self._tables.layers)
        held = np.ones((len(self._layers), widest, self._parts), dtype=np.bool_)
        for index, caches in enumerate(self._layers):
            for part, cache in enumerate(caches):
                if cache is not None:
                    held[index, :, part] = False
                    held[index, list(cache.resident), part] = True
        return held

    def step(self, tokens: npt.NDArray[np.intp]) -> None:
        """One pass of all these tokens."""
        for index, (caches, shape) in enumerate(
            zip(self._layers, self._tables.layers, strict=True)
        ):
            ids = self._tables.trace.ids[tokens, index, : shape.top_k].tolist()
            for cache in caches:
                if cache is not None:
                    cache.step(ids)

    def fates(self, tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.int8] | None:
        """What becomes of each activated expert if it is missing, int8 [T, L, K]; None: it comes.

        In the trace's order; see :mod:`moepack.on_miss`.
        """
        rule = self._placement.on_miss
        return None if rule is None else fates(self._tables.trace.weights[tokens], rule)

    def copy(self) -> SteppedCaches:
        """The same, to be stepped by itself."""
        other = copy.copy(self)
        other._layers = copy.deepcopy(self._layers)
        return other

    def become(self, other: SteppedCaches) -> None:
        """Hold what another one of the same placement does, which is then done with."""
        self._layers = other._layers

    def decode(
        self, tokens: npt.NDArray[np.intp], came: Flags | None = None
    ) -> tuple[Flags, Flags]:
        """One pass for each token, each layer behind the other.

        Parameters
        ----------
        came : bool [T, L, K]
            Experts that were fetched ahead in time, in the trace's order; None: all that were asked
            for, which only matters where missing ones may be replaced.

        Returns
        -------
        activated : bool [T, L, K, G]
            Which were resident when the token came to the layer, in the trace's order.
        predicted : bool [T, L, R, G]
        """
        trace = self._tables.trace
        lost = self.fates(tokens)
        activated = np.ones((*trace.ids[tokens].shape, self._parts), dtype=np.bool_)
        predicted = np.ones((*trace.predicted[tokens].shape, self._parts), dtype=np.bool_)
        for row, token in enumerate(tokens):
            for index, (caches, shape) in enumerate(
                zip(self._layers, self._tables.layers, strict=True)
            ):
                ids = trace.ids[token, index].tolist()
                guesses = trace.predicted[token, index].tolist()
                unkept: Collection[int] = ()
                if lost is not None:
                    if came is None:
                        place = self._placement.layers[index]
                        ahead = _asked_ahead(place, guesses, caches)
                    else:
                        ahead = {e for e, there in zip(ids, came[row, index], strict=True) if there}
                    found = zip(ids[: shape.top_k], lost[row, index].tolist(), strict=False)
                    unkept = {e for e, fate in found if fate != EXACT and e not in ahead}
                for part, cache in enumerate(caches):
                    if cache is not None:
                        activated[row, index, :, part] = list(map(cache.holds, ids))
                        predicted[row, index, :, part] = list(map(cache.holds, guesses))
                        cache.step([ids[: shape.top_k]], unkept)
        return activated, predicted


def _asked_ahead(
    place: LayerPlacement, guesses: Sequence[int], caches: Sequence[LayerCache | None]
) -> set[int]:
    """The experts that are fetched ahead, if they are missing."""
    guessed = guesses[: place.prefetch_depth]
    top = caches[0]
    if place.prefetch == "bottoms" and len(caches) > 1 and top is not None:
        return {expert for expert in guessed if top.holds(expert)}
    return set(guessed)
