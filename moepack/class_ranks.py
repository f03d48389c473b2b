"""Caches of mixed layers of any size at once: where experts stand among those stored alike.

A *class* of a layer is its experts of one encoding, and has slots of its own
(:mod:`moepack.mixed_residency`). A token uses as many of a class as it happens to. As long as no
token uses more of it than it has slots, what a class holds is the head of one stack, as in layers
that are not mixed (:mod:`moepack.stack_ranks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack import percolation
from moepack.expert_order import ExpertOrder, policy_order
from moepack.plan import Policy
from moepack.stack_ranks import NO_RANK, Ranks
from moepack.trace import NO_PREDICTION, LayerShape, Trace

#: Stacks of so many codes are followed at once, a token: 130 MB of them.
_MOST_CODES = 1 << 15


class ClassRanks(NamedTuple):
    """Ranks of a trace's experts in the stacks of their classes, uint16.

    Attributes
    ----------
    ids : [T, L, K]
        :data:`~moepack.stack_ranks.NO_RANK` past a layer's own top-k.
    predicted : [T, L, R]
        Of a prediction that does not exist the same.
    """

    ids: Ranks
    predicted: Ranks


class ClassTrace:
    """A trace of mixed layers, by class. ``V`` counts the classes of all layers.

    Parameters
    ----------
    trace
        Of these layers alone.
    hot
        Of each layer every expert, hottest first.
    class_of
        Of each layer, of every expert, the place of its class.

    Attributes
    ----------
    keys : tuple of (int, int)
        Of each class its layer, by place, and its own place there.
    members : tuple of tuple of int
        Of each class its experts, ascending: numbered so within it.
    ids, predicted : uint16 [T, V, K], [T, V, R]
        Numbers within the class; :attr:`nobody` for an expert of another.
    hot : int [V, N]
        Numbers, hottest first. Behind the members come those that smaller classes lack.
    """

    def __init__(
        self,
        trace: Trace,
        layers: Sequence[LayerShape],
        hot: Sequence[Sequence[int]],
        class_of: Sequence[Sequence[int]],
    ) -> None:
        self.keys = tuple(
            (row, its) for row, places in enumerate(class_of) for its in range(max(places) + 1)
        )
        self.members = tuple(
            tuple(expert for expert, place in enumerate(class_of[row]) if place == its)
            for row, its in self.keys
        )
        self.nobody = max(map(len, self.members))
        number = np.full((len(self.keys), NO_PREDICTION + 1), self.nobody, dtype=np.uint16)
        ranking = np.empty((len(self.keys), self.nobody), dtype=np.intp)
        for place, ((row, its), members) in enumerate(zip(self.keys, self.members, strict=True)):
            number[place, list(members)] = np.arange(len(members))
            mine = [number[place, expert] for expert in hot[row] if class_of[row][expert] == its]
            ranking[place] = [*mine, *range(len(members), self.nobody)]
        self.hot = ranking
        rows = [row for row, _ in self.keys]
        each = np.arange(len(rows))[:, None]
        past = np.arange(trace.ids.shape[2]) >= np.array([layer.top_k for layer in layers])[:, None]
        self.ids = number[each, np.where(past, NO_PREDICTION, trace.ids)[:, rows]]
        self.predicted = number[each, trace.predicted[:, rows]]

    def some(self, places: Sequence[int]) -> ClassTrace:
        """Some of the classes; one may be there several times."""
        made = object.__new__(ClassTrace)
        made.nobody = self.nobody
        made.keys = tuple(self.keys[place] for place in places)
        made.members = tuple(self.members[place] for place in places)
        made.hot = self.hot[list(places)]
        made.ids, made.predicted = self.ids[:, list(places)], self.predicted[:, list(places)]
        return made

    def most_used(self) -> npt.NDArray[np.intp]:
        """Of each class, how many of it a token uses at the most, [V]."""
        counts = (self.ids != self.nobody).sum(axis=2)
        return np.asarray(counts.max(axis=0, initial=0))

    def order(self, policy: Policy, half_lives: Sequence[float]) -> ExpertOrder:
        """The order in which classes keep their experts, as :mod:`moepack.percolation` wants it.

        Parameters
        ----------
        half_lives
            Of each class, in tokens, where the policy is ``lfu_decay``.
        """
        absent = self.ids == self.nobody
        # Experts of a token differ, those that are not there as well.
        others = self.nobody + np.arange(self.ids.shape[2], dtype=np.uint16)
        ids = np.where(absent, others, self.ids)
        hot = np.hstack([self.hot, np.tile(others, (len(self.hot), 1))])
        order = policy_order(ids, hot, policy, half_lives=half_lives)
        before, after = order.before, order.after
        return order._replace(
            before=np.where(absent, np.iinfo(before.dtype).max, before),
            after=np.where(absent, after.dtype.type(0), after),
        )

    def ranks(
        self, policies: Sequence[Policy], half_lives: Sequence[float]
    ) -> Iterator[tuple[Policy, Ranks, Ranks]]:
        """Of each policy the ranks in every class's own stack, uint16 [T, V, K] and [T, V, R].

        As in :class:`ClassRanks`; several policies take little longer than one.
        """
        absent = self.predicted == self.nobody
        asked = np.where(absent, 0, self.predicted)
        if "pinned" in policies:
            places = np.argsort(self.hot, axis=1).astype(np.uint16)[None]
            used = np.where(self.ids == self.nobody, 0, self.ids)
            found = (
                np.take_along_axis(places, each.astype(np.intp), axis=2) for each in (used, asked)
            )
            yield "pinned", *self._known(*found)
        count, classes = max(1, _MOST_CODES // self.hot.size), len(self.keys)
        moving = [policy for policy in policies if policy != "pinned"]
        for begin in range(0, len(moving), count):
            some = moving[begin : begin + count]
            orders = (self.order(each, half_lives if each == "lfu_decay" else ()) for each in some)
            used, others = percolation.ranks(
                _joined(list(orders)),
                np.tile(self.hot, (len(some), 1)),
                np.tile(asked, (1, len(some), 1)) if asked.size else None,
            )
            for place, policy in enumerate(some):
                mine = slice(place * classes, (place + 1) * classes)
                yield policy, *self._known(used[:, mine], others[:, mine])

    def _known(self, ids: Ranks, predicted: Ranks) -> tuple[Ranks, Ranks]:
        none = np.uint16(NO_RANK)
        return (
            np.where(self.ids == self.nobody, none, ids),
            np.where(self.predicted == self.nobody, none, predicted),
        )

    def by_layer(self, of_class: Ranks, layers: int) -> Ranks:
        """Ranks [T, V, any] of classes, as those of their layers' experts [T, L, any]."""
        found = np.full((len(of_class), layers, of_class.shape[2]), NO_RANK, dtype=np.uint16)
        for place, (row, _) in enumerate(self.keys):
            np.minimum(found[:, row], of_class[:, place], out=found[:, row])
        return found


def _joined(orders: Sequence[ExpertOrder]) -> ExpertOrder:
    """Several orders of the same classes behind one another."""
    start, before, after, expert_of = zip(*orders, strict=True)
    joined: list[npt.NDArray[Any]] = [
        np.concatenate(start),
        np.concatenate(before, axis=1),
        np.concatenate(after, axis=1),
        np.concatenate(expert_of),
    ]
    return ExpertOrder(*joined)
