"""How likely what is missing has to be read from the disk: what the closed form knows of RAM.

RAM holds the head of each layer's hot ranking (:mod:`moepack.ram_tier`), about as far in every
layer, however the experts are cut. So of the misses of a cache those count that fall behind it, on
*fit*.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moepack.cost import Array
from moepack.placements import place_layer, placement
from moepack.plan import Policy
from moepack.plan_request import PlanRequest
from moepack.routing_tables import RoutingTables
from moepack.trace import NO_PREDICTION


class TierChances:
    """Shares of what a layer's cache lacks that RAM lacks too.

    Attributes
    ----------
    places : tuple of int or None
        How many experts of each layer RAM holds; None where it holds all of them.
    bounces : int
        How many of the others may be on their way at once.
    """

    def __init__(self, request: PlanRequest, tables: RoutingTables) -> None:
        self._tables = tables
        layout = request.keep_layout or request.whole_layout
        layers = [
            place_layer(request, cut, hot, 0, policy="lru")
            for cut, hot in zip(layout.layers, tables.hot, strict=True)
        ]
        host = placement(request, layout, layers, staging_experts=1).host
        self.places: tuple[int, ...] | None = None
        self.bounces = 0 if host is None else host.bounces
        if host is not None and host.bounces:
            self.places = tuple(
                round(share * len(hot)) for share, hot in zip(host.shares, tables.hot, strict=True)
            )
        self._known: dict[tuple[int, Policy], tuple[Array, Array]] = {}

    def shares(self, index: int, policy: Policy) -> tuple[Array, Array]:
        """Of what 0, 1 ... N slots lack, the share that RAM lacks too.

        Returns
        -------
        activated : float64 [N + 1]
            Of the activated experts.
        predicted : float64 [R, N + 1]
            Of the expert predicted at each rank.
        """
        if (index, policy) not in self._known:
            self._known[index, policy] = self._shares(index, policy)
        return self._known[index, policy]

    def _shares(self, index: int, policy: Policy) -> tuple[Array, Array]:
        assert self.places is not None, "RAM holds everything"
        tables, held = self._tables, self.places[index]
        trace, shape = tables.trace, tables.layers[index]
        experts = shape.num_experts
        place = np.empty(experts, dtype=np.intp)
        place[list(tables.hot[index])] = np.arange(experts)
        if policy == "pinned":
            # What never leaves the device RAM holds last: it holds as many of the others.
            slots = np.arange(experts + 1)
            ids, predicted = place, np.tile(place, (trace.predicted.shape[2], 1))
            used = tables.shares[index]
            lacked = ids[:, None] >= slots
            read = ids[:, None] >= slots + held
            share = _ratio((used[:, None] * read).sum(axis=0), (used[:, None] * lacked).sum(axis=0))
            return share, np.broadcast_to(share, (len(predicted), experts + 1))
        fit = tables.tokens("fit")
        ranks = tables.ranks(policy)
        ids = trace.ids[fit, index, : shape.top_k].astype(np.intp)
        activated = _tail_share(
            ranks.ids[fit, index, : shape.top_k].reshape(1, -1),
            (place[ids] >= held).reshape(1, -1),
            np.ones((1, ids.size), dtype=np.bool_),
            experts,
        )[0]
        named = trace.predicted[fit, index].astype(np.intp)
        known = named != NO_PREDICTION
        behind = place[np.where(known, named, 0)] >= held
        ahead = _tail_share(ranks.predicted[fit, index].T, behind.T, known.T, experts)
        return activated, ahead


def _tail_share(
    ranks: npt.NDArray[np.uint16],
    flagged: npt.NDArray[np.bool_],
    known: npt.NDArray[np.bool_],
    experts: int,
) -> Array:
    """Of what ranks from 0, 1 ... N on hold, the share that is flagged, each [R, N + 1]."""
    rows, width = len(ranks), experts + 1
    at = np.minimum(ranks, experts).astype(np.intp) + width * np.arange(rows)[:, None]
    counts = [
        np.bincount(at[which], minlength=rows * width).reshape(rows, width)[:, ::-1]
        for which in (known & flagged, known)
    ]
    some, every = (count.cumsum(axis=1)[:, ::-1] for count in counts)
    return _ratio(some, every)


def _ratio(some: Array, every: Array) -> Array:
    return np.asarray(np.divide(some, every, out=np.zeros(some.shape), where=every > 0))
