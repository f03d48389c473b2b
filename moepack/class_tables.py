"""What the caches of a layout's mixed layers hold, whatever slots its classes have.

Of every layer whose experts are stored in several encodings; :mod:`moepack.routing_tables` knows
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.budget import class_slots
from moepack.class_caches import stepped_classes
from moepack.class_ranks import ClassRanks, ClassTrace
from moepack.cost import Array
from moepack.lane_clock import Flags
from moepack.layout import LayerLayout
from moepack.plan import POLICIES, LayerPlacement, Policy
from moepack.trace import NO_PREDICTION, ROUTING_PARTS, LayerShape, Trace, hot_rankings


class ClassCurves(NamedTuple):
    """One class of a layer on *fit*, under one policy. ``n`` counts its members.

    Attributes
    ----------
    members : int
    activations : float
        Of its experts, for each token.
    hits : float64 [n + 1]
        Of those, how many 0, 1 ... n slots hold.
    predicted : float64 [R, n + 1]
        How likely the expert that is predicted at each rank is of this class and held. Over the
        tokens that have such a prediction.
    """

    members: int
    activations: float
    hits: Array
    predicted: Array


class _Stepped(NamedTuple):
    """A cache that is no stack: a class, by its place, and its slots."""

    place: int
    policy: Policy
    slots: int
    half_life_tokens: float | None


class ClassTables:
    """Of one layout. ``L`` counts its mixed layers.

    Parameters
    ----------
    trace, layers, hot
        Of all layers with experts.
    cuts
        Their layouts.
    half_lives
        Of all layers, in tokens, for ``lfu_decay``; asked for where they are needed.
    """

    def __init__(
        self,
        trace: Trace,
        layers: Sequence[LayerShape],
        hot: Sequence[tuple[int, ...]],
        cuts: Sequence[LayerLayout],
        half_lives: Callable[[], Sequence[float]],
    ) -> None:
        self.rows = [row for row, cut in enumerate(cuts) if cut.encodings]
        self._cuts = [cuts[row] for row in self.rows]
        self._layers = [layers[row] for row in self.rows]
        self._hot = [hot[row] for row in self.rows]
        self._half_lives = half_lives
        self._trace = replace(
            trace,
            ids=trace.ids[:, self.rows],
            weights=trace.weights[:, self.rows],
            predicted=trace.predicted[:, self.rows],
        )
        self._class_of = [cut.class_of(len(cut.encodings)) for cut in self._cuts]
        self._classes = ClassTrace(self._trace, self._layers, self._hot, self._class_of)
        self._places = {key: place for place, key in enumerate(self._classes.keys)}
        self._most_used = self._classes.most_used()
        # Of every expert its class; of what is not there any.
        self._class_table = np.zeros((len(self.rows), 1 << 16), dtype=np.intp)
        for index, places in enumerate(self._class_of):
            self._class_table[index, : len(places)] = places
        each = np.arange(len(self.rows))[:, None]
        self._of_ids = self._class_table[each, self._trace.ids]
        self._of_predicted = self._class_table[each, self._trace.predicted]
        self._ranks: dict[tuple[Policy, tuple[float, ...]], ClassRanks] = {}
        self._stepped: dict[_Stepped, tuple[Flags, Flags]] = {}
        self._curves: dict[tuple[int, Policy], tuple[ClassCurves, ...]] = {}

    def held(self, placed: Sequence[LayerPlacement]) -> Mapping[int, tuple[Flags, Flags]]:
        """Which activations, and which predicted experts, each mixed layer's caches hold.

        Parameters
        ----------
        placed
            Of all layers with experts.

        Returns
        -------
        mapping of int to (bool [T, K], bool [T, R])
            By the layer's place among those with experts. Of what does not exist: False.
        """
        self.step([placed])
        return {
            row: self._one(index, place, slots)
            for index, (row, place, slots) in enumerate(self._placed(placed))
        }

    def step(self, placements: Iterable[Sequence[LayerPlacement]]) -> None:
        """Make :meth:`held` ready for many placements at once.

        Caches that cannot hold what a token may use are stepped: the order of experts, which that
        begins with, is found once for all of them.
        """
        missing: dict[_Stepped, None] = {}
        for placed in placements:
            mine = self._placed(placed)
            self._rank_decaying([place.half_life_tokens for _, place, _ in mine])
            for index, (_, place, slots) in enumerate(mine):
                missing |= dict.fromkeys(self._small(index, place, slots))
        for policy in dict.fromkeys(each.policy for each in missing):
            alike = [each for each in missing if each.policy == policy]
            # A class of some half-life has one order, whatever its slots.
            orders = list(dict.fromkeys((each.place, each.half_life_tokens) for each in alike))
            some = self._classes.some([place for place, _ in orders])
            lives = [half_life for _, half_life in orders if half_life is not None]
            stacked = [
                [each.slots for each in alike if (each.place, each.half_life_tokens) == order]
                for order in orders
            ]
            for number, count, found in stepped_classes(some, policy, stacked, lives):
                at, half_life = orders[number]
                self._stepped[_Stepped(at, policy, count, half_life)] = found

    def _placed(
        self, placed: Sequence[LayerPlacement]
    ) -> list[tuple[int, LayerPlacement, tuple[int, ...]]]:
        """Of each mixed layer its place among all, its placement, and the slots of its classes."""
        return [
            (row, placed[row], class_slots(cut, placed[row]))
            for row, cut in zip(self.rows, self._cuts, strict=True)
        ]

    def prepare(self, policies: Iterable[Policy]) -> None:
        """Rank the trace under some policies at once: several take little longer than one."""
        wanted = [each for each in dict.fromkeys(policies) if self._key(each) not in self._ranks]
        if wanted:
            self._rank(wanted, self._fitted(wanted))

    def curves(self, row: int, policy: Policy) -> tuple[ClassCurves, ...]:
        """Of a mixed layer, by its place among those with experts, every class on *fit*.

        Caches of fewer slots than a token uses are taken for the head of a larger one's stack,
        which they are not quite. What ``pinned`` holds is learnt from the first halves of the texts
        and scored on the second.
        """
        index = self.rows.index(row)
        if (index, policy) not in self._curves:
            self.prepare(POLICIES)
            self._curves[index, policy] = self._scored(index, policy)
        return self._curves[index, policy]

    def _fitted(self, policies: Iterable[Policy]) -> tuple[float, ...]:
        """The half-lives of the mixed layers, where a policy has some."""
        if "lfu_decay" not in policies:
            return ()
        of_all = self._half_lives()
        return tuple(of_all[row] for row in self.rows)

    def _key(self, policy: Policy) -> tuple[Policy, tuple[float, ...]]:
        return policy, self._fitted([policy])

    def _of_classes(self, half_lives: Sequence[float]) -> list[float]:
        return [half_lives[index] for index, _ in self._classes.keys] if half_lives else []

    def _rank(self, policies: Sequence[Policy], half_lives: tuple[float, ...]) -> None:
        ranked = self._classes.ranks(policies, self._of_classes(half_lives))
        for policy, ids, predicted in ranked:
            count = len(self.rows)
            found = ClassRanks(
                self._classes.by_layer(ids, count), self._classes.by_layer(predicted, count)
            )
            self._ranks[policy, half_lives if policy == "lfu_decay" else ()] = found

    def _rank_decaying(self, half_lives: Sequence[float | None]) -> None:
        """Rank what decays otherwise than has been ranked: all of it at once."""
        asked = {
            index: half_life for index, half_life in enumerate(half_lives) if half_life is not None
        }
        if any(self._decaying(index, half_life) is None for index, half_life in asked.items()):
            some = next(iter(asked.values()))
            lives = tuple(asked.get(index, some) for index in range(len(self.rows)))
            self._rank(["lfu_decay"], lives)

    def _decaying(self, index: int, half_life: float) -> ClassRanks | None:
        """Ranks in which one layer has a half-life, whatever the others have."""
        for (_, lives), ranks in self._ranks.items():
            if lives and lives[index] == half_life:
                return ranks
        return None

    def _ranked(self, index: int, policy: Policy, half_life: float | None) -> ClassRanks:
        if half_life is None:
            self.prepare([policy])
            return self._ranks[policy, ()]
        found = self._decaying(index, half_life)
        assert found is not None, "a half-life that has not been ranked"
        return found

    def _one(self, index: int, place: LayerPlacement, slots: Sequence[int]) -> tuple[Flags, Flags]:
        ranks = self._ranked(index, place.policy, place.half_life_tokens)
        counts = np.array(slots)
        of_ids, of_predicted = self._of_ids[:, index], self._of_predicted[:, index]
        activated = ranks.ids[:, index] < counts[of_ids]
        predicted = ranks.predicted[:, index] < counts[of_predicted]
        for its, count in enumerate(slots):
            key = _Stepped(self._places[index, its], place.policy, count, place.half_life_tokens)
            if key in self._stepped:
                hits, ahead = self._stepped[key]
                activated = np.where(of_ids == its, hits, activated)
                predicted = np.where(of_predicted == its, ahead, predicted)
        return activated, predicted

    def _small(self, index: int, place: LayerPlacement, slots: Sequence[int]) -> Iterator[_Stepped]:
        """The caches of a layer that no ranks hold for, and that have not been stepped."""
        for its, count in enumerate(slots):
            key = _Stepped(self._places[index, its], place.policy, count, place.half_life_tokens)
            small = place.policy != "pinned" and 0 < count < self._most_used[key.place]
            if small and key not in self._stepped:
                yield key

    def _scored(self, index: int, policy: Policy) -> tuple[ClassCurves, ...]:
        trace, shape = self._trace, self._layers[index]
        fit = trace.part == ROUTING_PARTS.index("fit")
        if policy == "pinned":
            ranks, rows = self._pinned, np.flatnonzero(fit)[self._halves.part > 0]
        else:
            self.prepare([policy])
            fitted = self._fitted([policy])
            ranks = self._ranked(index, policy, fitted[index] if fitted else None)
            rows = np.flatnonzero(fit)
        known = np.maximum(1, (trace.predicted[rows, index] != NO_PREDICTION).sum(axis=0))
        ids, guesses = ranks.ids[rows, index], ranks.predicted[rows, index]
        of_ids, of_guesses = self._of_ids[rows, index], self._of_predicted[rows, index]
        used = np.arange(ids.shape[1]) < shape.top_k
        found = []
        for its in range(max(self._class_of[index]) + 1):
            members = self._class_of[index].count(its)
            mine = (of_ids == its) & used
            hits = _below(ids[mine], members) / max(1, len(rows))
            ahead = [
                _below(guesses[of_guesses[:, rank] == its, rank], members) / known[rank]
                for rank in range(guesses.shape[1])
            ]
            activations = float(mine.sum()) / max(1, len(rows))
            shape_of = (guesses.shape[1], members + 1)
            predicted = np.array(ahead).reshape(shape_of)
            found.append(ClassCurves(members, activations, hits, predicted))
        return tuple(found)

    @cached_property
    def _halves(self) -> Trace:
        return self._trace.halved_fit()

    @cached_property
    def _pinned(self) -> ClassRanks:
        """Ranks of what is learnt from the first halves of *fit*, over the whole trace."""
        hot = hot_rankings(self._halves, self._layers)
        place = np.zeros((len(self.rows), 1 << 16), dtype=np.uint16)
        place[:] = (1 << 16) - 1
        for index, ranking in enumerate(hot):
            for its in range(max(self._class_of[index]) + 1):
                mine = [expert for expert in ranking if self._class_of[index][expert] == its]
                place[index, mine] = np.arange(len(mine))
        each = np.arange(len(self.rows))[:, None]
        return ClassRanks(place[each, self._trace.ids], place[each, self._trace.predicted])


def _below(ranks: npt.NDArray[np.uint16], members: int) -> Array:
    """How many of some ranks are below 0, 1 ... ``members``, [members + 1]."""
    counts = np.bincount(np.minimum(ranks, members), minlength=members + 1)[:members]
    return np.concatenate([[0.0], np.cumsum(counts)])
