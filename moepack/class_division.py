"""Dividing a mixed layer's fast memory among the encodings of its experts.

The experts of one encoding, a class, have slots of their own, of their own size. What the layer
misses is the sum of what its classes miss, and each misses the less the more slots it has: a
division that none undercuts consists, of every class, of some first slots. All of them are found by
adding one class to the others after the other: of the sums those are kept beside which no other
takes as few bytes and misses as little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.budget import stored_bytes
from moepack.byte_division import Frontier
from moepack.class_tables import ClassCurves
from moepack.cost import Array
from moepack.layout import LayerLayout
from moepack.model_spec import ModelSpec
from moepack.plan import Policy
from moepack.routing_tables import RoutingTables
from moepack.segment_classes import whole_part

Integers = npt.NDArray[np.int64]

#: Divisions of a layer that are told at most, evenly spread over its bytes.
MOST_DIVISIONS = 512

#: What an expert counts as used that is not on the text, in activations a token: any slot is worth
#: something, so more of them are never worth less.
UNSEEN = 1e-5


class Divisions(NamedTuple):
    """Divisions that no other undercuts, by ascending bytes: the first is none, the last all.

    Attributes
    ----------
    slots : int64 [D, classes]
    bytes : int64 [D]
        What they take.
    missed : float64 [D]
        What is missed of a token's experts, weighed as was asked for.
    """

    slots: Integers
    bytes: Integers
    missed: Array

    @property
    def frontier(self) -> Frontier:
        """The same for :func:`moepack.byte_division.divide`."""
        places = np.arange(len(self.bytes))
        return Frontier(self.bytes, self.missed, places, np.zeros_like(places))

    def within(self, budget_bytes: int) -> tuple[int, ...]:
        """Slots of the best division that takes so much at the most."""
        place = int(np.searchsorted(self.bytes, budget_bytes, side="right")) - 1
        return tuple(int(count) for count in self.slots[place])


def divisions(
    curves: Sequence[ClassCurves], slot_bytes: Sequence[int], weights: Sequence[float]
) -> Divisions:
    """All divisions of a layer that count.

    Parameters
    ----------
    curves
        Of each class.
    slot_bytes
        Of each, what a slot takes.
    weights
        Of each, what a miss costs.
    """
    found = Divisions(np.zeros((1, 0), np.int64), np.zeros(1, np.int64), np.zeros(1))
    for curve, size_bytes, weight in zip(curves, slot_bytes, weights, strict=True):
        counts = np.arange(curve.members + 1)
        missed = weight * (curve.activations - curve.hits + UNSEEN * counts[::-1])
        found = _undercut_by_none(
            Divisions(
                np.column_stack(
                    [
                        np.repeat(found.slots, len(counts), axis=0),
                        np.tile(counts, len(found.bytes)),
                    ]
                ),
                (found.bytes[:, None] + size_bytes * counts).ravel(),
                (found.missed[:, None] + missed).ravel(),
            )
        )
    return _thinned(found)


def layer_divisions(
    spec: ModelSpec,
    tables: RoutingTables,
    cuts: Sequence[LayerLayout],
    row: int,
    policy: Policy,
) -> Divisions:
    """The same for a layer of whole experts, by the bytes that are missed.

    Parameters
    ----------
    cuts
        Of all layers with experts.
    row
        The layer's place among them.
    """
    cut, shape = cuts[row], tables.layers[row]
    sizes = class_bytes(spec, cut)
    if cut.encodings:
        return divisions(tables.classes(cuts).curves(row, policy), sizes, sizes)
    hits = shape.top_k * tables.fit_curves(policy)[row, : shape.num_experts + 1]
    alike = ClassCurves(shape.num_experts, shape.top_k, hits, np.zeros((0, len(hits))))
    return divisions([alike], sizes, sizes)


def class_bytes(spec: ModelSpec, cut: LayerLayout) -> list[int]:
    """What a slot takes for the whole experts of each of a layer's encodings."""
    return [stored_bytes(spec, cut, whole_part(cut), name) for name in cut.classes]


def _undercut_by_none(found: Divisions) -> Divisions:
    order = np.lexsort((found.missed, found.bytes))
    lowest = np.minimum.accumulate(found.missed[order])
    kept = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
    return Divisions(found.slots[kept], found.bytes[kept], found.missed[kept])


def _thinned(found: Divisions) -> Divisions:
    if len(found.bytes) <= MOST_DIVISIONS:
        return found
    asked = np.linspace(0, int(found.bytes[-1]), MOST_DIVISIONS)
    kept = np.unique(np.searchsorted(found.bytes, asked, side="right") - 1)
    return Divisions(found.slots[kept], found.bytes[kept], found.missed[kept])
